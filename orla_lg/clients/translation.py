"""Answers of a chat completion in the caller's wire, whole or streamed."""

from __future__ import annotations

import json
from typing import Any

from orla_lg.core.inflight import InFlightCall
from orla_lg.wires import reading
from orla_lg.wires.wire import Body, Wire

CONTENT_TYPES = {"sse": b"text/event-stream", "ndjson": b"application/x-ndjson"}


def answer(content: bytes, wire: Wire, asked: Body) -> bytes:
    """Return a whole chat completion as the answer to the request *asked*.

    Raises:
        Garbage: There is no answer in it.
    """
    completion = reading.parse(content)
    if not isinstance(completion, dict):
        raise reading.Garbage(f"expected a chat completion, got {type(completion).__name__}")
    return json.dumps(wire.from_chat(completion, asked)).encode()


def refusal(content: bytes, status: int, wire: Wire) -> bytes:
    """Return what an engine says of an error, in the form of *wire*."""
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        said = content.decode("utf-8", "replace")
    error = said.get("error", said) if isinstance(said, dict) else said
    message, kind = error, None
    if isinstance(error, dict):
        message = error.get("message") or error
        kind = error.get("type") or error.get("code")
    return json.dumps(wire.error(status, f"{message}", kind=kind if isinstance(kind, str) else None)).encode()


class StreamTranslation:
    """Turns the bytes of a chat completion's stream into those of the caller's wire.

    Args:
        inflight: The call; it ends with what breaks off its stream.
        wire: The caller's.
        asked: The caller's request.
    """

    def __init__(self, inflight: InFlightCall, wire: Wire, asked: Body) -> None:
        self._inflight = inflight
        self._reader = wire.reader(asked)
        self._splitter = reading.EventSplitter()
        self._broken = False

    def feed(self, data: bytes) -> bytes:
        """Return the events that *data* completes."""
        return b"".join([self._turned(event) for event in self._splitter.feed(data)])

    def end(self) -> bytes:
        """Return what closes the stream."""
        rest = self._turned(self._splitter.rest())
        return rest if self._broken else rest + self._reader.end()

    def _turned(self, event: bytes) -> bytes:
        if self._broken:
            return b""
        try:
            chunk: Any = reading.payload(event)
            if chunk is None:
                return b""
            self._broken = bool(chunk.get("error"))
            return self._reader.feed(chunk)
        except (reading.Garbage, RecursionError) as error:
            self._broken = True
            said = self._reader.feed({"error": {"message": f"{error}", "type": "server_error"}})
            self._inflight.broke(error)  # unless the reader breaks the stream off: then that ends the call
            return said
