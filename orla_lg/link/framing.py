"""Frames on the link: four bytes of length, big-endian, then one message as a msgpack array.

A frame holds at most ``MOST_FRAME_BYTES``; a peer that announces more is not a peer. What is read is bounded by that,
whatever is in it, and nothing is decoded before it is whole.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import ormsgpack

from orla_lg.errors import OrlaError

MOST_FRAME_BYTES = 1 << 20

_LENGTH = struct.Struct(">I")


class LinkBroken(OrlaError):
    """The peer sent what is no frame, or no message; the connection is of no use any more."""


def frame(message: tuple[Any, ...]) -> bytes:
    """Return a message as it is sent.

    Raises:
        LinkBroken: It is larger than a frame may be, or holds what msgpack cannot say.
    """
    try:
        packed = ormsgpack.packb(message)
    except (TypeError, ormsgpack.MsgpackEncodeError) as error:
        raise LinkBroken(f"a message cannot be packed: {error}") from error
    if len(packed) > MOST_FRAME_BYTES:
        raise LinkBroken(f"a message of {len(packed)} bytes does not fit into a frame of {MOST_FRAME_BYTES}")
    return _LENGTH.pack(len(packed)) + packed


class FrameReader:
    """Cuts what arrives into messages."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[list[Any]]:
        """Take in bytes, and yield the messages that are whole now.

        Raises:
            LinkBroken: The bytes are no frames, or a frame is no message.
        """
        held = self._held
        held += data
        begin = 0
        try:
            while len(held) - begin >= _LENGTH.size:
                (size,) = _LENGTH.unpack_from(held, begin)
                if size > MOST_FRAME_BYTES:
                    raise LinkBroken(
                        f"the peer announced a frame of {size} bytes, at most {MOST_FRAME_BYTES} are right"
                    )
                end = begin + _LENGTH.size + size
                if len(held) < end:
                    return
                packed = bytes(held[begin + _LENGTH.size : end])
                begin = end
                yield _unpacked(packed)
        finally:
            del held[:begin]


def _unpacked(packed: bytes) -> list[Any]:
    try:
        message = ormsgpack.unpackb(packed)
    except (ValueError, ormsgpack.MsgpackDecodeError) as error:
        raise LinkBroken(f"a frame of {len(packed)} bytes is no msgpack: {error}") from error
    if not isinstance(message, list) or not message or not isinstance(message[0], str):
        raise LinkBroken("a frame is no array that begins with the message's name")
    return message
