"""Lets a watch hear one attempt's answer, whatever its wire; the answer itself passes by untouched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from orla_lg.wires import reading
from orla_lg.wires.assembly import Assembly
from orla_lg.wires.beginning import splitter_of
from orla_lg.wires.reading import Garbage
from orla_lg.wires.watching import AnswerWatch, HeardToolCall
from orla_lg.wires.whole_calls import HeardCalls
from orla_lg.wires.wire import Wire

log = logging.getLogger("orla_lg")

MAX_STREAM_BYTES = 64 * 2**20
"""Of a stream that is longer nothing more is heard but its end."""

MAX_WHOLE_BYTES = 4 * 2**20
"""The message of a whole answer that is longer is not heard."""

T = TypeVar("T")

_faults = set[str]()
"""Kinds of watches that failed, as far as a warning said so."""
MANY_KINDS = 100


class Hearing:
    """What a watch hears of one attempt.

    Args:
        watch: Hears it.
        wire: What the engine sends.
        early: Whether tool calls are heard before the end.
    """

    def __init__(self, watch: AnswerWatch, wire: Wire, *, early: bool) -> None:
        self.calls = HeardCalls(self._tell) if early and watch.wants_calls else None
        """For what puts the answer together; ``None``: no tool call is heard."""
        self._watch: AnswerWatch | None = watch
        self._wire = wire
        self._wants_message = watch.wants_message
        self._begun = self._ended = False
        self._stream: HeardStream | None = None

    def streams(self) -> None:
        """Note that the answer comes as a stream which nothing else reads."""
        if self._wants_message or self.calls is not None:
            self._stream = HeardStream(self._wire, self.calls, whole=self._wants_message)

    def feed(self, data: bytes) -> None:
        """Take note of a piece of the answer."""
        if not self._begun:
            self._begun = True
            if self._watch is not None:
                self._call(self._watch.begins)
        if self._stream is not None and not _safely(self._stream.feed, data):
            self._stream = None

    def stream_ends(self) -> None:
        """Note that the stream is over, and complete."""
        self._ends(None if self._stream is None else _safely(self._stream.end))

    def assembled(self, completion: Mapping[str, Any]) -> None:
        """Note that the answer is complete, and was put together as *completion*."""
        choices = completion["choices"]
        if self.calls is not None:
            self.calls.finish(None)
        self._ends(choices[0]["message"] if choices and self._wants_message else None)

    def came_whole(self, body: bytes) -> None:
        """Note that the answer is complete, and came in one piece."""
        reads = self._wants_message and not self._ended and len(body) <= MAX_WHOLE_BYTES
        self._ends(_safely(self._message_in, body) if reads else None)

    def _message_in(self, body: bytes) -> Mapping[str, Any] | None:
        answer = reading.parse(body)
        return self._wire.message_in(answer) if isinstance(answer, dict) else None

    def breaks_off(self) -> None:
        """Note that the answer ended without being complete."""
        self._ends(None)

    def _ends(self, message: Mapping[str, Any] | None) -> None:
        if self._begun and not self._ended and self._watch is not None:
            self._call(self._watch.ends, message)
        self._ended, self._watch = True, None

    def _tell(self, call: HeardToolCall) -> None:
        if self._watch is not None:
            self._call(self._watch.tool_call, call)

    def _call(self, hear: Callable[..., object], *heard: object) -> None:
        try:
            hear(*heard)
        except Exception:  # noqa: BLE001 - whatever a watch fails with, the answer is its caller's
            kind, self._watch = type(self._watch).__qualname__, None
            _report(kind)


def _report(kind: str) -> None:
    if kind not in _faults and len(_faults) < MANY_KINDS:
        _faults.add(kind)
        log.exception("%s failed over an answer, and hears no more of it; this is logged once", kind)


def _safely(read: Callable[[bytes], T] | Callable[[], T], *data: bytes) -> T | None:
    """Return what *read* does; ``None`` where an answer cannot be read: that is for its caller to find out."""
    try:
        return read(*data)
    except (Garbage, RecursionError):
        return None
    except Exception:  # noqa: BLE001 - a fault of ours, which must not reach the answer's caller
        _report(f"the reading of {read.__qualname__}")
        return None


class HeardStream:
    """Reads a stream that passes, as far as something of it is heard.

    Args:
        wire: Whose stream it is.
        calls: Hear its tool calls; ``None``: none is heard.
        whole: Whether its message is of use; else what comes before the first tool call is not read.
    """

    def __init__(self, wire: Wire, calls: HeardCalls | None, *, whole: bool) -> None:
        self._wire, self._calls = wire, calls
        self._chunk_in = wire.chunks()
        self._assembly = Assembly(calls)
        self._splitter = splitter_of(wire)
        self._whole = self._reads = whole
        self._bytes = 0
        self._is_over = False
        """Whether the stream said that it is done: what follows is none of the answer."""

    def feed(self, data: bytes) -> bool:
        """Take note of a piece; returns whether more can be heard.

        Raises:
            Garbage: What came cannot be read.
        """
        self._bytes += len(data)
        if not self._reads and self._splitter.whole(data) and self._wire.calls_mark not in data:
            return True
        for event in self._splitter.feed(data):
            self._take(event)
        return self._bytes <= MAX_STREAM_BYTES and not self._splitter.is_stuck and not self._assembly.error

    def _take(self, event: bytes) -> None:
        self._reads = self._reads or self._wire.calls_mark in event
        if not self._reads or self._is_over:
            return
        if (chunk := self._chunk_in(event)) is not None:
            self._assembly.add(chunk)
        else:
            self._is_over = self._wire.is_over(event)

    def end(self) -> dict[str, Any] | None:
        """Note that the stream is over, and complete; returns its message, ``None`` without one."""
        if rest := self._splitter.rest():
            self._take(rest)
        if self._calls is not None:
            self._calls.finish(None)
        return self._assembly.message() if self._whole and not self._assembly.error else None
