"""What a peer sends, read within bounds: so many bytes, also once they are unpacked, so deep, so many digits.

A probe, a mapping service and an embedding are answers of programs that are not ours. Whatever one of them sends must
cost a bounded amount of memory and time, and can only end in a value or in ``ValueError``.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

MAX_DEPTH = 100
"""Objects and lists in one another."""

MAX_DIGITS = 400
"""Of one whole number; what Python makes of more takes a time that grows with their square."""

_TOO_MANY_DIGITS = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))
_PLAIN = frozenset({"", "identity"})
_UNPACKED = frozenset({"gzip", "x-gzip", "deflate"})
_ANY_HEADER = 32 + zlib.MAX_WBITS
"""Tells zlib to recognise gzip and zlib by their first bytes."""


class OutOfBounds(ValueError):
    """An answer is larger, deeper or packed otherwise than what is read."""


class RawResponse(Protocol):
    """The part of an HTTP client's response that is read here."""

    @property
    def headers(self) -> Mapping[str, str]: ...  # noqa: D102

    def aiter_raw(self) -> AsyncIterator[bytes]:
        """Yield the body as it came, still packed."""
        ...


async def read_body(response: RawResponse, most_bytes: int) -> bytes:
    """Return the body of a response, unpacked.

    Raises:
        OutOfBounds: It has more than *most_bytes* bytes, packed or unpacked, or cannot be unpacked.
    """
    packing = response.headers.get("content-encoding", "").strip().lower()
    if packing not in _PLAIN | _UNPACKED:
        raise OutOfBounds(f"the answer is packed with {packing[:40]!r}, which was not asked for")
    unpacker = zlib.decompressobj(_ANY_HEADER) if packing in _UNPACKED else None
    parts, taken, unpacked = list[bytes](), 0, 0
    async for raw in response.aiter_raw():
        taken += len(raw)
        part = raw if unpacker is None else _unpacked(unpacker, raw, most_bytes - unpacked)
        unpacked += len(part)
        if max(taken, unpacked) > most_bytes:
            raise OutOfBounds(f"the answer has more than {most_bytes} bytes")
        parts.append(part)
    if unpacker is not None and not unpacker.eof:
        raise OutOfBounds("the packed answer is not whole")
    return b"".join(parts)


def _unpacked(unpacker: Any, raw: bytes, room: int) -> bytes:
    try:
        part: bytes = unpacker.decompress(raw, room + 1)  # one more than there is room for shows that there is more
    except zlib.error as error:
        raise OutOfBounds(f"the answer cannot be unpacked: {error}") from error
    return part


def parse_json(data: bytes) -> Any:
    """Return what JSON says.

    Raises:
        ValueError: It is no JSON; ``OutOfBounds``: too deep, or with a number of too many digits.
    """
    try:
        # Only where so many digits stand in a row, which may be inside a text, is each number looked at by itself.
        value = json.loads(data, parse_int=_whole) if _TOO_MANY_DIGITS.search(data) else json.loads(data)
    except RecursionError:
        raise OutOfBounds(f"the answer is nested deeper than {MAX_DEPTH}") from None
    _heed_depth(value)
    return value


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise OutOfBounds(f"the answer has a number of {len(digits)} digits")
    return int(digits)


def _heed_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        if not level:
            return
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    if level:
        raise OutOfBounds(f"the answer is nested deeper than {MAX_DEPTH}")
