"""Watching a response's bytes pass: first token, usage, end. The SDK above never notices.

A ``Tap`` holds the rules; ``TappedStream`` and ``AsyncTappedStream`` put it between httpx and the network,
hung in by a response hook. That is the one place that every form of the SDK's answer passes (plain, raw,
parsed, streamed), and where closing a stream early arrives for certain.

A stream is *primed* before its caller gets it: read up to its first event. An engine that dies during prefill,
or that answers garbage, is found out while the call can still be tried elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, Literal, Protocol

import httpx2

from orla_lg.core.background import is_collecting
from orla_lg.core.inflight import ABANDONED, InFlightCall
from orla_lg.errors import BackendUnavailable
from orla_lg.wires import chat, reading
from orla_lg.wires.assembly import Assembly
from orla_lg.wires.beginning import Beginning, splitter_of
from orla_lg.wires.chat import CHAT
from orla_lg.wires.decoding import decode, heed_charset
from orla_lg.wires.hearing import Hearing
from orla_lg.wires.watching import AnswerWatch
from orla_lg.wires.wire import Wire

Mode = Literal["plain", "stream", "assemble"]

TAIL_BYTES = 16_384
"""Enough for the last event of a stream, which brings the usage."""

MAX_PLAIN_BYTES = 64 * 2**20
"""A whole answer that is longer passes without a look at its shape: of it, too, only the end is kept here."""

MAX_ASSEMBLED_BYTES = 256 * 2**20
"""A stream that is longer is not assembled: a million tokens, each in an event of its own."""


DRAIN_S = 0.1
"""So long is waited for the end of a connection's response after the end of the answer: then it can be used again."""

Hides = Callable[[bytes], bool]
"""Whether an event of a stream is not for the caller."""


class TappedResponse(Protocol):
    """What a tap may see and change of a response."""

    status_code: int
    headers: Any


class Tap:
    """Sees one response pass.

    Until the sender hands the response over to the caller, an end or a break is the sender's to judge
    (it may try again); afterwards it ends the flight.

    Args:
        inflight: The call.
        mode: What the caller gets of the response.
        hides: Events of a stream that the caller does not get.
        wire: What the engine sends.
        watch: Hears what comes.
        early: Whether it hears tool calls before the end.
    """

    def __init__(
        self,
        inflight: InFlightCall,
        mode: Mode,
        *,
        hides: Hides | None = None,
        wire: Wire = CHAT,
        watch: AnswerWatch | None = None,
        early: bool = True,
    ) -> None:
        self.complete = False
        self.begun = False
        self.counted = False
        """Whether token counts came."""
        self._inflight = inflight
        self._wire = wire
        self.mode = mode
        self.content_type: str | None = None
        """What the engine says that it sends, where the caller is told otherwise."""
        self._hearing = None if watch is None else Hearing(watch, wire, early=early)
        self.assembly: Assembly | None = None
        if mode == "assemble":
            self.assembly = Assembly(None if self._hearing is None else self._hearing.calls)
        elif mode == "stream" and self._hearing is not None:
            self._hearing.streams()
        self.stream: TappedStream | AsyncTappedStream | None = None
        self._handed_over = False
        self._beginning = None if mode == "plain" else Beginning(wire, json_too=mode == "assemble")
        self._first = b""
        """A stream's events up to the first that brings something; some wires count the prompt there."""
        self._hides = hides
        self._splitter = splitter_of(wire) if hides is not None or mode == "assemble" else None
        self.assembled = False
        """Whether the stream that is assembled said that it is done: what follows is none of the answer."""
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0
        self._bytes = 0

    def feed(self, data: bytes) -> bytes:
        """Take note of *data* and return what the caller gets of it.

        Raises:
            Garbage: It cannot become an answer any more.
        """
        kept, size = self._kept, len(data)
        kept.append(data)
        self._kept_bytes += size
        self._bytes += size
        if self._kept_bytes > TAIL_BYTES and (self.mode != "plain" or self._bytes > MAX_PLAIN_BYTES):
            while self._kept_bytes - len(kept[0]) > TAIL_BYTES:
                self._kept_bytes -= len(kept.popleft())
        beginning = self._beginning
        if beginning is not None and beginning.feed(data):
            self._first = beginning.first
            self._begin(is_json=beginning.is_json)
        if self._hearing is not None:
            self._hearing.feed(data)
        if beginning is not None and beginning.is_json:
            return beginning.head
        if self._splitter is None:
            return data
        if self.assembly is not None:
            self._assemble(self.assembly, self._splitter.feed(data))
            if self._splitter.is_stuck or self._bytes > MAX_ASSEMBLED_BYTES:
                raise reading.Garbage(f"a stream of {self._bytes} bytes, too long to be made one answer")
            return b""
        if self._splitter.whole(data) and not chat.may_be_usage_only(data):
            return data
        passing = b"".join([event for event in self._splitter.feed(data) if not self._is_hidden(event)])
        return passing + self._splitter.rest() if self._splitter.is_stuck else passing

    def _is_hidden(self, event: bytes) -> bool:
        return self._hides is not None and self._hides(event)

    def _begin(self, *, is_json: bool) -> None:
        """Note that the first event is there, or that the engine answers in one piece what was to be streamed."""
        self._beginning, self.begun = None, True
        if is_json:
            self.mode, self.assembly, self._splitter = "plain", None, None
        else:
            self._inflight.first_token()

    def _assemble(self, assembly: Assembly, events: list[bytes]) -> None:
        try:
            for event in events:
                if self.assembled:
                    return
                if (chunk := reading.payload(event)) is not None:
                    assembly.add(chunk)
                else:
                    self.assembled = chat.is_done(event)
        except RecursionError as error:
            raise reading.Garbage("a chunk is nested too deeply") from error

    @property
    def ended(self) -> bool:
        """Whether the answer was whole before its bytes ended: a break after that takes nothing from it."""
        if self.assembly is not None:
            return self.assembled or (self.assembly.finished and not self.assembly.error)
        return self.mode == "stream" and self._wire.is_over(b"".join(self._kept))

    def last(self, response: TappedResponse) -> bytes:
        """Return what the caller still gets when the engine's bytes are through.

        Raises:
            Garbage, json.JSONDecodeError: It was no answer.
            httpx2.RemoteProtocolError: It stopped before its end.
        """
        if self._beginning is not None:
            self._beginning.end()
        rest = b"" if self._splitter is None else self._splitter.rest()
        if self.assembly is not None:
            whole = self._whole(self.assembly, rest, response)
            self.complete = True
            return whole
        self._read_usage()
        kept = b"".join(self._kept)
        if self.mode == "stream" and not self._wire.ends_well(kept):
            raise httpx2.RemoteProtocolError("the engine's stream stopped before its end")
        if self.mode == "plain" and self._bytes <= MAX_PLAIN_BYTES:
            came = response.headers.get("content-type", "") if self.content_type is None else self.content_type
            reading.heed_shape(kept, came)
        self.complete = True
        if self._hearing is not None:
            self._hear_end(kept)
        return b"" if rest and self._is_hidden(rest) else rest

    def _hear_end(self, kept: bytes) -> None:
        assert self._hearing is not None
        if self.mode == "stream":
            self._hearing.stream_ends()
        elif self._bytes <= len(kept):
            self._hearing.came_whole(kept)
        else:
            self._hearing.breaks_off()  # of an answer as long only the end is kept

    def _whole(self, assembly: Assembly, rest: bytes, response: TappedResponse) -> bytes:
        self._assemble(assembly, [rest])
        self._read_usage()
        if assembly.error is not None:
            response.status_code = _status(assembly.error)
            return json.dumps(assembly.error).encode()
        if assembly.empty:
            raise reading.Garbage("the stream brought no answer")
        if not assembly.finished and not chat.ends_well(b"".join(self._kept)):
            raise httpx2.RemoteProtocolError("the engine's stream stopped before its end")
        try:
            completion = assembly.completion()
            whole = json.dumps(completion).encode()
        except (RecursionError, ValueError) as error:
            raise reading.Garbage(f"the answer cannot be written ({type(error).__name__})") from error
        if self._hearing is not None:
            self._hearing.assembled(completion)
        return whole

    def _read_usage(self) -> None:
        kept = b"".join(self._kept)
        if len(kept) < self._bytes:
            kept = self._first + kept
        if usage := self._wire.usage_in(kept):
            self.counted = True
            self._inflight.saw(usage)

    def hand_over(self) -> None:
        """Note that the caller has the response; ends the flight if its body is already read."""
        self._handed_over = True
        if self.complete:
            self._inflight.finish()

    def broke(self, error: Exception) -> None:
        """Note that reading failed; what was ended from here fails with the reason.

        Raises:
            BackendUnavailable: The request was ended from here.
        """
        if self._hearing is not None:
            self._hearing.breaks_off()
        if not self._handed_over:
            return
        cut = self._inflight.cut
        self._inflight.broke(BackendUnavailable(cut) if cut else error)
        if cut:
            raise BackendUnavailable(cut) from error

    def close(self, inner: Callable[[], None]) -> None:
        """Close the engine's connection; in another thread, where the collector ends a stream in this one.

        A connection's locks are not reentrant, and the collector may have begun under one of them.
        """
        if is_collecting():
            self._inflight.services.background.hand_over(inner)
        else:
            inner()

    def closed(self) -> None:
        """Note that the stream was closed, read to its end or not."""
        if not self.complete:
            self._read_usage()
            self.complete = self.ended
        if (hearing := self._hearing) is not None:
            end = hearing.stream_ends if self.complete and self.mode == "stream" else hearing.breaks_off
            if is_collecting():  # whatever lock this thread holds
                self._inflight.services.background.hand_over(end)
            else:
                end()
        if self._handed_over:
            self._inflight.finish(None if self.complete else ABANDONED)


def _status(error: dict[str, Any]) -> int:
    body = error.get("error")
    code = body.get("code") if isinstance(body, dict) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 500


class TappedStream(httpx2.SyncByteStream):
    """A response's bytes, watched; dropping it unread ends the flight too."""

    def __init__(self, tap: Tap, response: httpx2.Response) -> None:
        self._tap, self._inner = tap, response.stream
        self._response: httpx2.Response | None = response
        """Until it is closed."""
        self._passing = self._pass()
        self._primed: list[bytes] = []

    def prime(self) -> None:
        """Read up to the first event; what fails closes the response."""
        try:
            while not self._tap.begun and (data := next(self._passing, None)) is not None:
                self._primed.append(data)
        except BaseException:
            if self._response is not None:
                self._response.close()
            raise

    def __iter__(self) -> Iterator[bytes]:
        return filter(None, itertools.chain(self._primed, self._passing))

    def _pass(self) -> Iterator[bytes]:
        tap, response = self._tap, self._response
        assert response is not None
        try:
            try:
                coming = iter(self._inner)  # type: ignore[arg-type]
                for data in coming:
                    yield tap.feed(data)
                    if tap.assembled:
                        break
                if tap.assembled:
                    _drain(coming, response)
            except httpx2.HTTPError:
                if not tap.ended:
                    raise
            yield tap.last(response)
        except Exception as error:  # whatever broke it, the call ends with it, and its caller gets it
            tap.broke(error)
            raise

    @property
    def elapsed(self) -> timedelta | None:
        """How long the response took, for ``Response.elapsed``."""
        return getattr(self._inner, "elapsed", None)

    def close(self) -> None:
        """Close the engine's side."""
        try:
            self._tap.close(self._inner.close)  # type: ignore[union-attr]
        finally:
            self._tap.closed()
            self._response = self._tap.stream = None  # else all of it stays until the collector runs

    def __del__(self) -> None:
        if self._response is not None and not self._response.is_closed:
            self.close()


class AsyncTappedStream(httpx2.AsyncByteStream):
    """``TappedStream`` for a running loop."""

    def __init__(self, tap: Tap, response: httpx2.Response) -> None:
        self._tap, self._inner = tap, response.stream
        self._response: httpx2.Response | None = response
        """Until it is closed."""
        self._passing = self._pass()
        self._primed: list[bytes] = []
        self._loop = asyncio.get_running_loop()

    async def prime(self) -> None:
        """Read up to the first event; what fails closes the response."""
        try:
            while not self._tap.begun and (data := await anext(self._passing, None)) is not None:
                self._primed.append(data)
        except BaseException:
            if self._response is not None:
                await self._response.aclose()
            raise

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for data in self._primed:
            if data:
                yield data
        async for data in self._passing:
            if data:
                yield data

    async def _pass(self) -> AsyncGenerator[bytes]:
        tap, response = self._tap, self._response
        assert response is not None
        try:
            try:
                coming = aiter(self._inner)  # type: ignore[arg-type]
                async for data in coming:
                    yield tap.feed(data)
                    if tap.assembled:
                        break
                if tap.assembled:
                    await _adrain(coming)
            except httpx2.HTTPError:
                if not tap.ended:
                    raise
            yield tap.last(response)
        except Exception as error:  # whatever broke it, the call ends with it, and its caller gets it
            tap.broke(error)
            raise

    @property
    def elapsed(self) -> timedelta | None:
        """How long the response took, for ``Response.elapsed``."""
        return getattr(self._inner, "elapsed", None)

    async def aclose(self) -> None:
        """Close the engine's side."""
        try:
            await self._inner.aclose()  # type: ignore[union-attr]
        finally:
            self._tap.closed()
            self._response = self._tap.stream = None

    def __del__(self) -> None:
        if self._response is None or self._response.is_closed:
            return
        self._tap.closed()
        if self._loop.is_running():  # the connection belongs to that loop, so it closes there
            inner, loop = self._inner, self._loop
            loop.call_soon_threadsafe(lambda: loop.create_task(inner.aclose()))  # type: ignore[union-attr]


def _drain(coming: Iterator[bytes], response: httpx2.Response) -> None:
    """Read on to the end of the response, if that is near."""
    network, until_s = response.extensions.get("network_stream"), time.monotonic() + DRAIN_S
    if network is not None:  # httpx knows one time-out for all reads of a response
        network.read = functools.partial(_read_soon, network.read)
    try:
        for _ in coming:
            if time.monotonic() > until_s:
                return
    finally:
        if network is not None:
            del network.read


def _read_soon(read: Callable[..., bytes], max_bytes: int, timeout: float | None = None) -> bytes:
    return read(max_bytes, timeout=DRAIN_S)


async def _adrain(coming: AsyncIterator[bytes]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            async for _ in coming:
                pass


TAP: ContextVar[Tap | None] = ContextVar("orla_tap", default=None)
"""The tap for the request that this task or thread is sending."""


def tap_response(response: httpx2.Response) -> None:
    """Hang the current tap into a response that brings an answer; others pass, with a charset to read."""
    tap = TAP.get()
    if tap is None or not response.is_success:
        heed_charset(response)
        return
    decode(response)
    if tap.assembly is not None:
        _relabel(tap, response)
    response.stream = tap.stream = TappedStream(tap, response)


async def atap_response(response: httpx2.Response) -> None:
    """``tap_response`` as an async hook."""
    tap = TAP.get()
    if tap is None or not response.is_success:
        heed_charset(response)
        return
    decode(response)
    if tap.assembly is not None:
        _relabel(tap, response)
    response.stream = tap.stream = AsyncTappedStream(tap, response)


def _relabel(tap: Tap, response: httpx2.Response) -> None:
    tap.content_type = response.headers.get("content-type", "")
    response.headers["content-type"] = "application/json"
