"""One request and its answer, or what becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from orla_lg.testing.faults.answers import cut, deltas, digest, message_for, usage_for
from orla_lg.testing.faults.http import Headers, Seen, chunk, head
from orla_lg.testing.faults.reply import Fault, Reply

CREATED = 1_700_000_000
CHAT = "/v1/chat/completions"

_PIECES_BEFORE_FAULT = 2

_WHOLE: dict[Fault, tuple[str, bytes]] = {
    Fault.GARBAGE: ("application/json", b"<html>this is no JSON"),
    Fault.HTML_PAGE: ("text/html", b"<!doctype html><html><body><h1>Welcome</h1></body></html>"),
    Fault.BINARY: ("application/octet-stream", bytes(range(256)) * 4),
}


Speaker = Callable[[dict[str, Any]], dict[str, Any] | Sequence[bytes]]
"""What answers another wire: from the body of a request, the object of an answer or the pieces of a stream."""


class Gone(Exception):
    """The connection ends here."""

    def __init__(self, *, politely: bool = False) -> None:
        super().__init__()
        self.politely = politely


class AnsweringEngine(Protocol):
    """What an exchange asks of its engine, and reports to it."""

    models: tuple[str, ...]
    context_tokens: int | None
    speaks: dict[str, Speaker]

    def note(self, seen: Seen) -> None:
        """Keep a request for the test to read."""

    def reply_to(self, seen: Seen) -> Reply:
        """Return how to treat a request."""

    def refusal(self, body: dict[str, Any]) -> tuple[int, str] | None:
        """Return with which status and message a healthy engine refuses a request."""

    def working(self, body: dict[str, Any]) -> contextlib.AbstractContextManager[int]:
        """Run a request while the context is open, which gives how many prompt tokens are cached."""

    def props(self) -> dict[str, Any] | None:
        """Return what ``/props`` shows; ``None`` where there is no such path."""

    def slot_action(self, seen: Seen) -> tuple[int, dict[str, Any]]:
        """Act on a slot; returns status and answer."""

    def forget(self) -> None:
        """Lose all caches."""

    async def drop(self, but: asyncio.Task[None] | None = None) -> None:
        """End all other connections."""


class Exchange:
    """One request and its answer."""

    def __init__(
        self, engine: AnsweringEngine, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.engine, self.seen, self.reader, self.writer = engine, seen, reader, writer

    async def answer(self) -> None:
        """Answer, fail, or raise ``Gone``."""
        engine, seen = self.engine, self.seen
        if seen.path == CHAT:
            with engine.working(seen.body) as cached:
                engine.note(seen)
                reply = engine.reply_to(seen)
                if not await self._failed(reply):
                    await self._chat(reply, cached)
            return
        engine.note(seen)
        reply = engine.reply_to(seen)
        if await self._failed(reply):
            return
        if seen.path not in engine.speaks:
            self._other(seen)
        elif not seen.body:
            self._refuse(400, "the request is empty")
        else:
            await self._speak(reply, engine.speaks[seen.path](seen.body))

    async def _speak(self, reply: Reply, answer: dict[str, Any] | Sequence[bytes]) -> None:
        """Answer on another wire."""
        if isinstance(answer, dict):
            await self._send_whole(reply, json.dumps(answer).encode())
            return
        kind = "application/x-ndjson" if self.seen.path.startswith("/api/") else "text/event-stream"
        self.writer.write(head(200, (("content-type", kind), ("transfer-encoding", "chunked"), *reply.headers)))
        for number, piece in enumerate(answer):
            if reply.token_s:
                await self._while_there(asyncio.sleep(reply.token_s))
            if number == _PIECES_BEFORE_FAULT and reply.fault == Fault.DEAD_MID_STREAM:
                await self._die()
            self.writer.write(chunk(piece))
        self.writer.write(b"0\r\n\r\n")
        await self.writer.drain()

    def _other(self, seen: Seen) -> None:
        if seen.path == "/v1/models":
            self._send(200, {"object": "list", "data": [self._model(name) for name in self.engine.models]})
        elif seen.path == "/v1/responses" and seen.body:  # one that asks for nothing finds out what is spoken
            self._send(200, self._response())
        elif seen.path == "/props" and (props := self.engine.props()) is not None:
            self._send(200, props)
        elif seen.path.startswith("/slots/"):
            self._send(*self.engine.slot_action(seen))
        else:
            self._refuse(404, "not found")

    def _model(self, name: str) -> dict[str, Any]:
        listed = {"id": name, "object": "model", "created": CREATED, "owned_by": "stub"}
        context = self.engine.context_tokens
        return listed if context is None else {**listed, "max_model_len": context}

    def _response(self) -> dict[str, Any]:
        content = [{"type": "output_text", "text": "a response", "annotations": []}]
        message = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": content}
        return {
            "id": "resp_1", "object": "response", "created_at": CREATED, "status": "completed",
            "model": self.seen.body.get("model"), "output": [message], "parallel_tool_calls": True,
            "tool_choice": "auto", "tools": [], "error": None, "incomplete_details": None, "instructions": None,
            "metadata": {}, "temperature": 1.0, "top_p": 1.0,
        }  # fmt: skip

    async def _failed(self, reply: Reply) -> bool:
        """Carry out what goes wrong before an answer begins; returns whether that was all."""
        if reply.before_s:
            await self._while_there(asyncio.sleep(reply.before_s))
        if reply.gate is not None:
            await self._while_there(reply.gate.passed())
        fault = Fault(reply.fault) if reply.fault is not None else None
        if fault is Fault.HANG:
            await self._while_there(asyncio.Event().wait())
        if fault is Fault.RESTART:
            self.engine.forget()
            await self.engine.drop(but=asyncio.current_task())
        if fault in (Fault.RESET, Fault.RESTART):
            raise Gone
        if fault is Fault.DEAD_BEFORE_HEADERS:
            raise Gone(politely=True)
        if reply.status != 200:
            self._refuse(reply.status, f"the stub answers {reply.status}", reply.headers)
            return True
        if fault in _WHOLE:
            kind, data = _WHOLE[fault]
            self._send_raw(200, data, (("content-type", kind), *reply.headers))
            return True
        return False

    async def _chat(self, reply: Reply, cached: int) -> None:
        body = self.seen.body
        if (refusal := self.engine.refusal(body)) is not None:
            self._refuse(*refusal)
            return
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        message, finish = cut(message_for(body, reply.text), limit)
        usage = _told(usage_for(body["messages"], message, cached), reply)
        if body.get("stream") and not reply.ignore_stream:
            await self._stream(reply, message, usage, finish)
            return
        choice = {"index": 0, "message": message, "finish_reason": finish}
        answer = {**self._top("chat.completion"), "choices": [choice], "usage": usage}
        data = json.dumps({name: value for name, value in answer.items() if value is not None}).encode()
        await self._send_whole(reply, data)

    async def _send_whole(self, reply: Reply, data: bytes) -> None:
        half = data[: len(data) // 2]
        if reply.fault in (Fault.DEAD_MID_STREAM, Fault.DEAD_IN_PREFILL):
            self.writer.write(head(200, (("content-length", str(len(data))),)))
            self.writer.write(half if reply.fault == Fault.DEAD_MID_STREAM else b"")
            await self.writer.drain()
            raise Gone
        kind = "text/plain" if reply.fault == Fault.WRONG_TYPE else "application/json"
        sent = half if reply.fault == Fault.TRUNCATED_JSON else data
        self._send_raw(200, sent, (("content-type", kind), *reply.headers))

    async def _while_there(self, pause: Any) -> None:
        """Wait for *pause* as long as the client does."""
        pausing, leaving = asyncio.ensure_future(pause), asyncio.ensure_future(self.reader.read(1))  # noqa: TID251
        try:
            done, _ = await asyncio.wait({pausing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            pausing.cancel()
            leaving.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await leaving
        if leaving in done:
            raise Gone

    def _top(self, kind: str) -> dict[str, Any]:
        body = self.seen.body
        return {"id": f"chatcmpl-{digest(body)[:12]}", "object": kind, "created": CREATED, "model": body.get("model")}

    async def _stream(self, reply: Reply, message: dict[str, Any], usage: dict[str, Any] | None, finish: str) -> None:
        kind = "text/plain" if reply.fault == Fault.WRONG_TYPE else "text/event-stream"
        headers = (("content-type", kind), ("transfer-encoding", "chunked"), *reply.headers)
        self.writer.write(head(200, headers))
        if reply.fault == Fault.DEAD_IN_PREFILL:
            await self._die()
        async for event in self._events(reply, message, usage, finish):
            if self.writer.is_closing():
                raise Gone
            self.writer.write(chunk(b"data: " + event + b"\n\n"))
            if reply.token_s or reply.mid_gate is not None:
                await self.writer.drain()
        self.writer.write(b"0\r\n\r\n")
        await self.writer.drain()

    async def _die(self) -> None:
        await self.writer.drain()
        raise Gone

    async def _events(
        self, reply: Reply, message: dict[str, Any], usage: dict[str, Any] | None, finish: str
    ) -> AsyncIterator[bytes]:
        top, parts = self._top("chat.completion.chunk"), deltas(message)
        for number, delta in enumerate(parts):
            if reply.token_s:
                await self._while_there(asyncio.sleep(reply.token_s))
            last = number == len(parts) - 1
            if number == _PIECES_BEFORE_FAULT and (broken := await self._broken(reply)) is not None:
                yield broken
                return
            if last and reply.fault == Fault.NO_DONE:
                return
            reason = finish if last else None
            yield json.dumps({**top, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}).encode()
        if usage is not None and (self.seen.body.get("stream_options") or {}).get("include_usage"):
            yield json.dumps({**top, "choices": [], "usage": usage}).encode()
        yield b"[DONE]"

    async def _broken(self, reply: Reply) -> bytes | None:
        """Carry out what goes wrong in the middle of a stream; returns the event that is its end."""
        if reply.fault == Fault.DEAD_MID_STREAM:
            await self._die()
        if reply.fault == Fault.ERROR_EVENT:
            return json.dumps({"error": {"message": "the engine failed", "type": "stub_error", "code": 500}}).encode()
        if reply.fault == Fault.TRUNCATED_JSON:
            return json.dumps(self._top("chat.completion.chunk")).encode()[:-20]
        if reply.mid_gate is not None:
            await self.writer.drain()
            await self._while_there(reply.mid_gate.passed())
        return None

    def _refuse(self, status: int, message: str, headers: Headers = ()) -> None:
        self._send(status, {"error": {"message": message, "type": "stub_error", "code": status}}, headers)

    def _send(self, status: int, answer: dict[str, Any], headers: Headers = ()) -> None:
        self._send_raw(status, json.dumps(answer).encode(), (("content-type", "application/json"), *headers))

    def _send_raw(self, status: int, data: bytes, headers: Headers) -> None:
        self.writer.write(head(status, (("content-length", str(len(data))), *headers)) + data)


def _told(usage: dict[str, Any], reply: Reply) -> dict[str, Any] | None:
    """Return the token counts as the engine tells them."""
    if reply.fault == Fault.NO_USAGE:
        return None
    if reply.fault == Fault.CACHED_ABOVE_PROMPT:
        return {**usage, "prompt_tokens_details": {"cached_tokens": usage["prompt_tokens"] + 100}}
    if reply.fault == Fault.NEGATIVE_TOKENS:
        return {**usage, "prompt_tokens": -usage["prompt_tokens"], "completion_tokens": -1}
    return usage
