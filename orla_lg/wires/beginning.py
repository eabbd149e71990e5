"""The beginning of a stream: judged before its caller gets it, so that the call can still be tried elsewhere."""

from __future__ import annotations

import codecs
import re

from orla_lg.wires import reading
from orla_lg.wires.reading import SHOWN_BYTES, EventSplitter, Garbage, LineSplitter
from orla_lg.wires.wire import Wire

_FIELD = re.compile(rb"(?:\A|[\r\n])(?:data|event|id|retry)?:")
"""A line that only a stream of events has."""


class Beginning:
    """Judges the beginning of a stream as its bytes come, in pieces of any size.

    Args:
        wire: Whose stream it is.
        json_too: An answer in one piece will do as well.
    """

    def __init__(self, wire: Wire, *, json_too: bool) -> None:
        self.is_json = False
        """Whether it is an answer in one piece."""
        self.head = b""
        """What it begins with."""
        self.first = b""
        """Its events up to the first that brings something, once that is there."""
        self._wire = wire
        self._json_too = json_too
        self._bytes = 0
        self._splitter = splitter_of(wire)

    def feed(self, data: bytes) -> bool:
        """Take in *data*; returns whether the first event that brings something is there.

        Raises:
            Garbage: It cannot become an answer any more.
        """
        if len(self.head) < SHOWN_BYTES:
            self.head = (self.head + data).removeprefix(codecs.BOM_UTF8).lstrip()
            if self._json_too and self.head.startswith(b"{"):
                self.is_json = True
                return True
        self._bytes += len(data)
        for event in self._splitter.feed(data):
            self.first += event
            if self._wire.brings(event):
                return True
        if self._splitter.is_stuck:
            raise Garbage(f"an event of more than {reading.MAX_EVENT_BYTES} bytes")
        if self._bytes > reading.MAX_EVENT_BYTES:
            raise Garbage(f"no event in {self._bytes} bytes, which begin with {self.head[:SHOWN_BYTES]!r}")
        return False

    def end(self) -> None:
        """Judge what ended before an event that brings something; lines that SSE does not know mean nothing there.

        Raises:
            Garbage: It has nothing of a stream of events.
        """
        if not self.head:
            return
        if self._wire.framing == "ndjson":
            if not self.head.startswith(b"{"):
                raise Garbage(f"expected lines of JSON, got {self.head[:SHOWN_BYTES]!r}")
        elif not _FIELD.search(self.head):
            raise Garbage(f"expected server-sent events, got {self.head[:SHOWN_BYTES]!r}")


def splitter_of(wire: Wire) -> EventSplitter:
    """Return what cuts a stream of *wire* into events."""
    return LineSplitter() if wire.framing == "ndjson" else EventSplitter()
