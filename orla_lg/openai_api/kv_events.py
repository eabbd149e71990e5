"""The stream of cache events that vLLM and SGLang publish over ZeroMQ: numbered batches, packed with MessagePack.

Both have the same format (SGLang took over vLLM's): a message is ``(topic, number, payload)``, the payload an array
``[time, events, rank]``, an event a map with its ``type``; older versions of both write an event as an array that
begins with its type. What was missed can be had again from the ``replay_endpoint``, if the engine has one.

Facts are from the sources of vLLM 0.32 and SGLang 0.5.23 (both have a ``kv_events.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from orla_lg.core.engine.backend import Backend
from orla_lg.core.engine.capabilities import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent
from orla_lg.errors import ConfigError

REPLAY_TIMEOUT_S = 10.0
"""A replay that takes longer is none."""

REPLAY_SILENCE_S = 0.5
"""Nothing for so long, and no more will come: vLLM looks for questions ten times a second."""

MAX_WAITING = 100_000
"""Batches that may wait to be read, here as at the engine; more are dropped, which their numbers show."""

OUR_MEDIA = (None, "GPU")
"""Where blocks lie that a prompt is looked up in first; others are tiers below."""

_STORED = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium")
_REMOVED = ("block_hashes", "medium")
"""Fields in the order of events that are arrays."""


def require(backend: Backend) -> None:
    """Check that what a backend asks for can be had.

    Raises:
        ConfigError: It names ``kv_events``, and the packages that this needs are not installed.
    """
    for name in ("zmq", "msgpack") if backend.kv_events is not None else ():
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"backend {backend.name!r}: kv_events needs the package {name!r}; pip install 'orla-lg[kv-events]'"
            )


def kv_events(backend: Backend) -> AsyncGenerator[Sequence[KVEvent]] | None:
    """Return what a backend's engine publishes; ``None`` if it names no ``kv_events``."""
    return None if backend.kv_events is None else _listen(backend.kv_events, backend.kv_replay)


async def _listen(endpoint: str, replay_endpoint: str | None) -> AsyncGenerator[Sequence[KVEvent]]:
    import zmq
    from zmq.asyncio import Context

    with Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, MAX_WAITING)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(endpoint)
        last = -1  # what it told before it heard of us was missed like anything else
        while True:
            _, number_bytes, payload = await socket.recv_multipart()
            number = int.from_bytes(number_bytes, "big")
            if number <= last:
                yield [BlocksCleared()]  # it counts from the beginning again: another engine, with an empty cache
                last = -1
            if number > last + 1:
                for events in await _missed(context, replay_endpoint, last + 1, number):
                    yield events
            last = number
            yield events_of(payload)


async def _missed(context: Any, endpoint: str | None, first: int, until: int) -> list[list[KVEvent]]:
    """Return the events of missed batches, if the engine still has all of them."""
    batches: list[bytes] = []
    if endpoint is not None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REPLAY_TIMEOUT_S):
                batches = await _replay(context, endpoint, first, until)
    if len(batches) < until - first:
        return [[BlocksCleared(missed=True)]]
    return [events_of(payload) for payload in batches]


async def _replay(context: Any, endpoint: str, first: int, until: int) -> list[bytes]:
    """Ask for batches until all are there, or none comes any more.

    The engine answers with all that it has from a number on. What its socket cannot take at once (a thousand
    messages, as ZeroMQ has it) falls, so it is asked again from there.
    """
    import zmq

    with context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, MAX_WAITING)
        socket.connect(endpoint)
        batches: list[bytes] = []
        before = -1
        while before < len(batches) < until - first:
            before = len(batches)
            await socket.send_multipart((b"", (first + before).to_bytes(8, "big")))
            batches += await _answer(socket, first + before, until)
        return batches


async def _answer(socket: Any, first: int, until: int) -> list[bytes]:
    """Return what comes in one go, up to the first that is missing; its end is a number of -1, or silence."""
    batches: list[bytes] = []
    while len(batches) < until - first and await socket.poll(REPLAY_SILENCE_S * 1000):
        *_, number_bytes, payload = await socket.recv_multipart()
        number = int.from_bytes(number_bytes, "big", signed=True)
        if number == first + len(batches):
            batches.append(payload)
        elif number < 0:
            break
    return batches


def events_of(payload: bytes) -> list[KVEvent]:
    """Return the events of a batch that concern the cache proper; kinds that we do not know are left out."""
    import msgpack

    _, told, *_ = msgpack.unpackb(payload, strict_map_key=False)
    return [event for each in told if (event := _event(each)) is not None]


def _event(told: Any) -> KVEvent | None:
    kind, fields = _fields(told)
    if kind == "AllBlocksCleared":
        return BlocksCleared()
    if fields.get("medium") not in OUR_MEDIA or fields.get("group_idx") not in (None, 0):
        return None
    if kind == "BlockRemoved":
        return BlocksRemoved(fields["block_hashes"])
    if kind == "BlockStored":
        session = fields.get("session_id")
        return BlocksStored(fields["block_hashes"], fields["parent_block_hash"], fields["block_size"], session)
    return None


def _fields(told: Any) -> tuple[str, Mapping[str, Any]]:
    """Return an event's kind and fields, whichever way it is written."""
    if isinstance(told, Mapping):
        return str(told.get("type")), told
    kind, *values = told
    names = _STORED if kind == "BlockStored" else _REMOVED
    return str(kind), dict(zip(names, values, strict=False))
