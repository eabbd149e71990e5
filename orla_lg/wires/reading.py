"""The one strict place that reads what peers send: JSON, counts, server-sent events."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

_EVENT_END = re.compile(rb"\r\n\r\n|\n\r?\n|\r\r")
SHOWN_BYTES = 120
"""Of what came, in an error."""

MAX_EVENT_BYTES = 16 * 2**20
"""One event of a stream that is longer is not waited for."""
MAX_COUNT_DIGITS = 15
"""Of a count that an engine writes as a text."""
MAX_COUNT = 10**12
"""A larger number is no count of tokens, and no time in milliseconds."""


class Garbage(Exception):
    """What came is no beginning of an answer: not server-sent events, or an event that says the engine failed."""

    def __init__(self, message: str, body: object = None) -> None:
        super().__init__(message)
        self.body = body


def parse(data: bytes | str) -> Any:
    """Return the JSON in *data*.

    Raises:
        Garbage: It is none, or none that Python reads: nested too deeply, numbers of thousands of digits, no UTF-8.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Garbage(f"no JSON ({type(error).__name__}): {data[:SHOWN_BYTES]!r}") from error


def object_in(holder: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the object under *key*, an empty one where there is none.

    Raises:
        Garbage: It is something else.
    """
    held = holder.get(key)
    if held is None:
        return {}
    if not isinstance(held, Mapping):
        raise Garbage(f"{key!r} is {type(held).__name__}, expected an object")
    return held


def list_in(holder: Mapping[str, Any], key: str) -> Sequence[Any]:
    """Return the list under *key*, an empty one where there is none.

    Raises:
        Garbage: It is something else.
    """
    held = holder.get(key)
    if held is None:
        return ()
    if not isinstance(held, list):
        raise Garbage(f"{key!r} is {type(held).__name__}, expected a list")
    return held


def heed_shape(body: bytes, content_type: str) -> None:
    """Look whether a whole answer has the shape of a JSON object; quick, and blind to what is inside.

    Raises:
        json.JSONDecodeError: It claims to be JSON and is not; what the SDK says of it, too.
        Garbage: It is something else.
    """
    if body.lstrip().startswith(b"{") and body.rstrip().endswith(b"}"):
        return
    if "json" in content_type:
        try:
            if isinstance(json.loads(body), dict):  # in UTF-16, or behind a byte order mark
                return
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise Garbage(f"no JSON ({type(error).__name__}): {body[:SHOWN_BYTES]!r}") from error
    raise Garbage(f"expected a JSON object, got {len(body)} bytes: {body[:SHOWN_BYTES]!r}")


def count(value: Any) -> int | None:
    """Return how many tokens, slots or the like an engine says there are; ``None`` for what cannot be."""
    if value is None:
        return None
    if type(value) is int:  # as nearly always
        return value if 0 <= value <= MAX_COUNT else None
    if isinstance(value, str) and value.isdecimal() and len(value) <= MAX_COUNT_DIGITS:
        value = int(value)
    return int(value) if is_number(value) and 0 <= value <= MAX_COUNT else None


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether *value* is a JSON number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


class EventSplitter:
    """Cuts a byte stream into whole server-sent events, however the network cut it."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._searched = 0
        """Up to here nothing ends in what is held back."""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that *data* completes, each with its closing blank line."""
        rest = self._rest
        rest += data
        events, start = [], 0
        for end in [found.end() for found in _EVENT_END.finditer(rest, self._searched)]:
            events.append(bytes(rest[start:end]))
            start = end
        if start:
            del rest[:start]
        self._searched = max(0, len(rest) - 3)
        return events

    @property
    def is_stuck(self) -> bool:
        """Whether an event is too long to be waited for (``MAX_EVENT_BYTES``)."""
        return len(self._rest) > MAX_EVENT_BYTES

    def whole(self, data: bytes) -> bool:
        """Whether *data* is whole events, as engines send them: then nothing needs cutting."""
        return not self._rest and data.endswith(b"\n\n")

    def rest(self) -> bytes:
        """Return what no blank line has closed."""
        rest, self._rest, self._searched = bytes(self._rest), bytearray(), 0
        return rest


class LineSplitter(EventSplitter):
    """Cuts a byte stream into lines, each of which is an event: JSON objects one after the other."""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that *data* completes, each with its end; empty ones are none."""
        cut = data.rfind(b"\n") + 1
        if not cut:
            self._rest += data
            return []
        lines, self._rest = (bytes(self._rest) + data[:cut]).split(b"\n"), bytearray(data[cut:])
        return [line + b"\n" for line in lines if line.strip()]

    def whole(self, data: bytes) -> bool:
        """Whether *data* is whole lines."""
        return not self._rest and data.endswith(b"\n")


def payload(event: bytes) -> dict[str, Any] | None:
    """Return the JSON object in an event's data lines; ``None`` for comments and ``[DONE]``.

    Raises:
        Garbage: The data are no JSON.
    """
    lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
    data = b"\n".join(lines)
    if not data or data.startswith(b"[DONE]"):
        return None
    parsed = parse(data)
    return parsed if isinstance(parsed, dict) else None
