"""Watching a response's bytes pass: first token, usage, end. The SDK above never notices.

A ``Tap`` holds the rules; ``TappedStream`` and ``AsyncTappedStream`` put it between httpx and the network,
hung in by a response hook. That is the one place that every form of the SDK's answer passes (plain, raw,
parsed, streamed), and where closing a stream early arrives for certain.

A stream is *primed* before its caller gets it: read up to its first event. An engine that dies during prefill,
or that answers garbage, is found out while the call can still be tried elsewhere.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextvars import ContextVar
from typing import Any, Literal

import httpx2

from orla_lg.core.flight import ABANDONED, Flight
from orla_lg.openai_api import wire

Mode = Literal["plain", "stream", "assemble"]

TAIL_BYTES = 16_384
"""Enough for the last event of a stream, which brings the usage."""


class Tap:
    """Sees one response pass.

    Until the sender hands the response over to the caller, an end or a break is the sender's to judge
    (it may try again); afterwards it ends the flight.
    """

    def __init__(self, flight: Flight, mode: Mode, *, strip_usage: bool = False) -> None:
        self.complete = False
        self.begun = False
        self._flight = flight
        self.mode = mode
        self.stream: TappedStream | AsyncTappedStream | None = None
        self._handed_over = False
        self._splitter = wire.EventSplitter() if strip_usage or mode == "assemble" else None
        self._assembly = wire.Assembly() if mode == "assemble" else None
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0

    def feed(self, data: bytes) -> bytes:
        """Take note of *data* and return what the caller gets of it."""
        self._keep(data)
        if self.mode != "plain" and not self.begun:
            self._judge_beginning()
        if self._splitter is None:
            return data
        if self._assembly is None and self._splitter.whole(data) and not wire.may_be_usage_only(data):
            return data
        events = self._splitter.feed(data)
        if self._assembly is not None:
            self._assemble(events)
            return b""
        return b"".join(event for event in events if not wire.is_usage_only(event))

    def _judge_beginning(self) -> None:
        """See whether the first event is there, and one."""
        beginning = b"".join(self._kept)
        if wire.begins(beginning, json_too=self.mode == "assemble"):
            self.begun = True
            self._flight.first_token()

    def _keep(self, data: bytes) -> None:
        self._kept.append(data)
        self._kept_bytes += len(data)
        while self.mode == "stream" and self._kept_bytes - len(self._kept[0]) > TAIL_BYTES:
            self._kept_bytes -= len(self._kept.popleft())

    def _assemble(self, events: list[bytes]) -> None:
        assert self._assembly is not None
        for event in events:
            if (chunk := wire.payload(event)) is not None:
                self._assembly.add(chunk)

    def last(self, response: httpx2.Response) -> bytes:
        """Return what the caller still gets when the engine's bytes are through."""
        self._read_usage()
        if self.mode == "stream" and not wire.ends_well(b"".join(self._kept)):
            raise httpx2.RemoteProtocolError("the engine's stream stopped before its end")
        if self.mode == "plain":
            wire.heed_shape(b"".join(self._kept), response.headers.get("content-type", ""))
        self.complete = True
        if self._splitter is None:
            return b""
        rest = self._splitter.rest()
        if self._assembly is None:
            return b"" if wire.is_usage_only(rest) else rest
        self._assemble([rest])
        if self._assembly.empty:
            return b"".join(self._kept)  # no event stream: the SDK judges what it is
        if self._assembly.error is not None:
            response.status_code = _status(self._assembly.error)
            return json.dumps(self._assembly.error).encode()
        return json.dumps(self._assembly.completion()).encode()

    def _read_usage(self) -> None:
        if usage := wire.usage_in(b"".join(self._kept)):
            self._flight.saw(usage)

    def hand_over(self) -> None:
        """Note that the caller has the response; ends the flight if its body is already read."""
        self._handed_over = True
        if self.complete:
            self._flight.finish()

    def broke(self, error: BaseException) -> None:
        """Note that reading failed."""
        if self._handed_over:
            self._flight.broke(error)

    def closed(self) -> None:
        """Note that the stream was closed, read to its end or not."""
        if not self.complete:
            self._read_usage()
            self.complete = any(wire.DONE in data for data in self._kept)
        if self._handed_over:
            self._flight.finish(None if self.complete else ABANDONED)


def _status(error: dict[str, Any]) -> int:
    body = error.get("error")
    code = body.get("code") if isinstance(body, dict) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 500


class TappedStream(httpx2.SyncByteStream):
    """A response's bytes, watched; dropping it unread ends the flight too."""

    def __init__(self, tap: Tap, response: httpx2.Response) -> None:
        self._tap, self._inner, self._response = tap, response.stream, response
        self._passing = self._pass()
        self._primed: list[bytes] = []

    def prime(self) -> None:
        """Read up to the first event; what fails closes the response."""
        try:
            while not self._tap.begun and (data := next(self._passing, None)) is not None:
                self._primed.append(data)
        except BaseException:
            self._response.close()
            raise

    def __iter__(self) -> Iterator[bytes]:
        for data in itertools.chain(self._primed, self._passing):
            if data:
                yield data

    def _pass(self) -> Iterator[bytes]:
        tap = self._tap
        try:
            for data in self._inner:  # type: ignore[union-attr]
                yield tap.feed(data)
            yield tap.last(self._response)
        except Exception as error:  # whatever broke it, the call ends with it, and its caller gets it
            tap.broke(error)
            raise

    def close(self) -> None:
        """Close the engine's side."""
        try:
            self._inner.close()  # type: ignore[union-attr]
        finally:
            self._tap.closed()

    def __del__(self) -> None:
        if not self._response.is_closed:
            self.close()


class AsyncTappedStream(httpx2.AsyncByteStream):
    """``TappedStream`` for a running loop."""

    def __init__(self, tap: Tap, response: httpx2.Response) -> None:
        self._tap, self._inner, self._response = tap, response.stream, response
        self._passing = self._pass()
        self._primed: list[bytes] = []
        self._loop = asyncio.get_running_loop()

    async def prime(self) -> None:
        """Read up to the first event; what fails closes the response."""
        try:
            while not self._tap.begun and (data := await anext(self._passing, None)) is not None:
                self._primed.append(data)
        except BaseException:
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
        tap = self._tap
        try:
            async for data in self._inner:  # type: ignore[union-attr]
                yield tap.feed(data)
            yield tap.last(self._response)
        except Exception as error:  # whatever broke it, the call ends with it, and its caller gets it
            tap.broke(error)
            raise

    async def aclose(self) -> None:
        """Close the engine's side."""
        try:
            await self._inner.aclose()  # type: ignore[union-attr]
        finally:
            self._tap.closed()

    def __del__(self) -> None:
        if self._response.is_closed:
            return
        self._tap.closed()
        if self._loop.is_running():  # the connection belongs to that loop, so it closes there
            inner, loop = self._inner, self._loop
            loop.call_soon_threadsafe(lambda: loop.create_task(inner.aclose()))  # type: ignore[union-attr]


TAP: ContextVar[Tap | None] = ContextVar("orla_tap", default=None)
"""The tap for the request that this task or thread is sending."""


def tap_response(response: httpx2.Response) -> None:
    """Hang the current tap into a response that brings an answer; errors pass untouched."""
    tap = TAP.get()
    if tap is None or response.status_code >= 400:
        return
    _label(tap, response)
    response.stream = tap.stream = TappedStream(tap, response)


async def atap_response(response: httpx2.Response) -> None:
    """``tap_response`` as an async hook."""
    tap = TAP.get()
    if tap is None or response.status_code >= 400:
        return
    _label(tap, response)
    response.stream = tap.stream = AsyncTappedStream(tap, response)


def _label(tap: Tap, response: httpx2.Response) -> None:
    if tap.mode == "assemble":
        response.headers["content-type"] = "application/json"
