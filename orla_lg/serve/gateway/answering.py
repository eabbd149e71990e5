"""The way of an answer back to its caller, and what ends it early: a client that goes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from orla_lg.core.inflight import InFlightCall
from orla_lg.serve.gateway import answers
from orla_lg.serve.gateway.answers import Header, UpstreamError
from orla_lg.serve.gateway.sender import EngineReply
from orla_lg.serve.gateway.silence import SilenceWatch
from orla_lg.serve.past_calls.captures import Capturing
from orla_lg.wires.wire import Wire

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

UNAUTHORIZED = 401
"""From an engine: it refuses the server's key for it, and says of the caller's nothing."""

log = logging.getLogger("orla_lg")


class DisconnectWatch:
    """Cancels a request's task when its client goes.

    Args:
        receive: The request's.
        task: What serves it.
    """

    __slots__ = ("_receive", "_task", "_watching", "gone", "over")

    def __init__(self, receive: Receive, task: asyncio.Task[Any]) -> None:
        self.gone = False
        """Whether the client went before its answer was whole."""
        self.over = False
        self._receive = receive
        self._task = task
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self.over:
            self.gone = True
            self._task.cancel("the client closed its connection")

    def end(self) -> None:
        """Watch no longer."""
        self.over = True
        if not self._watching.done():
            self._watching.cancel()


class Answering:
    """The way of one answer back.

    Args:
        send: The request's.
        call_id: Its call's.
        wire: The caller's.
    """

    def __init__(self, send: Send, call_id: str, wire: Wire) -> None:
        self._send = send
        self._call_id = call_id
        self._wire = wire
        self.capturing: Capturing | None = None
        """Keeps what the caller gets; ``None``: nothing does."""

    async def reply(
        self, reply: EngineReply, inflight: InFlightCall, headers: dict[bytes, bytes], silence: SilenceWatch
    ) -> None:
        """Send an answer, and end the call with it; one that breaks off breaks the connection."""
        out = reply.headers
        out += answers.named(headers, self._call_id, self._wire)
        out += answers.about(inflight)
        if reply.response is None:
            usage = inflight.usage
            if usage is not None and usage.cached_tokens is not None:
                out.append((b"x-orla-cached-tokens", b"%d" % usage.cached_tokens))
            try:
                await self.whole(200, out, reply.content)
            finally:
                reply.tap.hand_over()
            return
        reply.tap.hand_over()
        send = self._send
        if self.capturing is not None:
            self.capturing.is_stream, send = True, self._kept
        try:
            await send({"type": "http.response.start", "status": 200, "headers": out})
            await send({"type": "http.response.body", "body": reply.content, "more_body": True})
            with silence.bound() as bound:
                while (data := await reply.more()) is not None:
                    bound.heard = True
                    if data:
                        await send({"type": "http.response.body", "body": data, "more_body": True})
        except TimeoutError:
            reply.silent()
            return
        except Exception as error:  # noqa: BLE001 - the engine's answer broke off, and so does the caller's
            log.info("call %s broke off: %s", self._call_id, inflight.services.masking.mask(f"{error}"[:500]))
            return  # without an end: the server closes the connection
        finally:
            reply.close()
        await send({"type": "http.response.body", "body": b""})

    async def refuse(self, error: Exception, inflight: InFlightCall | None, headers: dict[bytes, bytes]) -> None:
        """Answer with what was wrong."""
        out = answers.named(headers, self._call_id, self._wire)
        if inflight is not None:
            out += answers.about(inflight)
        if isinstance(error, UpstreamError) and error.status != UNAUTHORIZED:
            out += error.kept()
            await self.whole(error.status, out, error.content)
            return
        said = answers.failed(error, inflight)
        if said is None:
            log.exception("call %s of the gateway failed", self._call_id, exc_info=error)
            said = answers.Failed(500, "the server failed; its log has more", "server_error")
        await self.say(said, out)

    async def say(self, said: answers.Failed, headers: Sequence[Header] = ()) -> None:
        """Answer with an error."""
        more, content = answers.refusal(said, self._wire)
        await self.whole(said.status, [*headers, *more], content)

    async def whole(self, status: int, headers: list[Header], content: bytes) -> None:
        """Answer in one piece."""
        headers.append((b"content-length", b"%d" % len(content)))
        if self.capturing is not None:
            self.capturing.feed(content)
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": content})

    async def _kept(self, message: Message) -> None:
        """Send a part of an answer, which is kept."""
        if self.capturing is not None:
            self.capturing.feed(message.get("body", b""))
        await self._send(message)
