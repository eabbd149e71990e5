"""An adapter that can everything and lies about nothing, over an engine that is a few lines of this process.

Liars are made of it by overriding one method.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from orla_lg.core.call import Ask, Chunk, Usage
from orla_lg.core.engine.backend import Backend, Capability, Directions, Effect, Probe, Support
from orla_lg.core.engine.capabilities import (
    Copied,
    EngineStats,
    PrefixCache,
    Scope,
    Warmed,
    WholeCache,
    WorkflowCache,
)
from orla_lg.errors import BackendUnavailable, EngineRefused

URL = "http://paragon/v1"
MODEL = "paragon"
CONTEXT = 2000
CAPACITY = 2500
PIECE_S = 0.001


@dataclass(eq=False)
class World:
    """The engine: its KV cache and what runs."""

    caches: dict[str, list[str]] = field(default_factory=dict)
    """Prompt by workflow; the first is the first to go."""
    pinned: dict[str, float] = field(default_factory=dict)
    """Until when, as ``time.monotonic``."""
    kept: set[str] = field(default_factory=set)
    """Who is expected back."""
    running: dict[str, asyncio.Event] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)

    def admit(self, workflow: str, words: list[str]) -> int:
        cached = max((common(words, each) for each in self.caches.values()), default=0)
        self.caches.pop(workflow, None)
        self.caches[workflow] = words
        now = time.monotonic()
        loose = [name for name in self.caches if self.pinned.get(name, 0.0) < now and name != workflow]
        loose.sort(key=self.kept.__contains__)
        while sum(map(len, self.caches.values())) > CAPACITY and loose:
            del self.caches[loose.pop(0)]
        return min(cached, len(words) - 1)


def common(one: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    for here, there in zip(one, other, strict=False):
        if here != there:
            break
        count += 1
    return count


def words_of(body: Mapping[str, Any]) -> list[str]:
    messages = body["messages"]
    if not isinstance(messages, list):
        raise EngineRefused("messages must be a list", status=400)
    return [word for message in messages for word in message["content"].split()]


class Paragon:
    keep_alive = True

    def __init__(self, backend: Backend | None = None, world: World | None = None) -> None:
        self.backend = backend or Backend("paragon", URL)
        self.world = world or World()

    def at(self, url: str) -> Paragon:
        return type(self)(Backend("paragon", url), self.world)

    def reach(self) -> None:
        if self.backend.url != URL:
            raise BackendUnavailable(f"backend 'paragon' at {self.backend.url} does not answer")

    def says(self) -> dict[str, Any]:
        return {
            "models": (MODEL,),
            "capabilities": {**dict.fromkeys(Capability, Support.NATIVE), Capability.TOOLS: Support.UNSUPPORTED},
            "context_tokens": CONTEXT,
            "kv_tokens": CAPACITY,
            "slots": 4,
            "version": "1",
            "incarnation": "first",
        }

    async def probe(self) -> Probe:
        self.reach()
        return Probe(**self.says())

    def request_fields(self, ask: Ask, told: Directions) -> dict[str, Any]:
        urgent = {"priority": -round(2 * told.priority)} if told.priority else {}
        keep = {"keep": True} if told.keep_s else {}
        return {"workflow": told.workflow or told.call_id, "call": told.call_id, **urgent, **keep}

    def refusal(self, body: Mapping[str, Any]) -> str | None:
        if body["model"] != MODEL:
            return "no such model"
        if len(words_of(body)) > CONTEXT:
            return "too long"
        return None if isinstance(body.get("priority", 0), int) else "priority must be a whole number"

    def text(self, body: Mapping[str, Any]) -> str:
        if body.get("response_format"):
            return '{"colour": "red", "sure": true}'
        return " ".join(["word"] * body["max_tokens"])

    async def generate(self, body: Mapping[str, Any]) -> AsyncGenerator[Chunk]:
        self.reach()
        if (refusal := self.refusal(body)) is not None:
            raise EngineRefused(refusal, status=400)
        words = words_of(body)
        cached = self.world.admit(body["workflow"], words)
        if body.get("keep"):
            self.world.kept.add(body["workflow"])
        ended = self.world.running[body["call"]] = asyncio.Event()
        pieces = self.text(body).split(" ")[: body["max_tokens"]]
        try:
            for number, piece in enumerate(pieces):
                await asyncio.sleep(PIECE_S)
                if ended.is_set():
                    return
                yield Chunk(piece if number == 0 else f" {piece}")
            yield Chunk(usage=Usage(len(words), cached, len(pieces)), finish_reason="length")
        finally:
            self.world.running.pop(body["call"], None)

    async def aclose(self) -> None:
        pass

    # KVControl

    async def pin(self, scope: Scope, *, ttl_s: float | None = None) -> Effect:
        assert isinstance(scope, WorkflowCache)
        self.world.pinned[scope.workflow] = inf if ttl_s is None else time.monotonic() + ttl_s
        return Effect.PINNED

    async def release(self, scope: Scope) -> Effect:
        assert isinstance(scope, WorkflowCache)
        self.world.pinned.pop(scope.workflow, None)
        self.world.caches = {scope.workflow: self.world.caches.pop(scope.workflow, []), **self.world.caches}
        return Effect.DEMOTED

    async def flush(self, scope: Scope) -> Effect:
        caches = self.world.caches
        if isinstance(scope, WholeCache):
            caches.clear()
        if isinstance(scope, WorkflowCache):
            caches.pop(scope.workflow, None)
        if isinstance(scope, PrefixCache):
            words = words_of(scope.body)
            for name in [name for name, cached in caches.items() if common(cached, words) > 0]:
                del caches[name]
        return Effect.FREED

    # SlotStore: slot n is what the n-th newest workflow but three holds; one is enough for the suite

    async def erase(self, slot: int) -> Effect:
        if slot >= 4:
            return Effect.FAILED
        self.world.caches.popitem()
        return Effect.FREED

    async def save(self, slot: int, name: str) -> Copied:
        self.world.files[name] = list(self.world.caches.values())[-1]
        return Copied(Effect.SAVED)

    async def restore(self, slot: int, name: str) -> Effect:
        if name not in self.world.files:
            return Effect.FAILED
        self.world.caches[name] = self.world.files[name]
        return Effect.RESTORED

    # The rest

    async def warm(self, body: Mapping[str, Any]) -> Warmed:
        usage = Usage()
        try:
            async for chunk in self.generate({**body, "max_tokens": 1}):
                usage = chunk.usage or usage
        except (BackendUnavailable, EngineRefused):
            return Warmed(Effect.FAILED)
        return Warmed(Effect.WARMED, usage)

    async def stats(self) -> EngineStats:
        return EngineStats(running=len(self.world.running), kv_usage=0.5, prefix_queries=9, prefix_hits=3)

    async def tokenize(self, body: Mapping[str, Any]) -> Sequence[int]:
        return [len(word) for word in words_of(body)]

    async def abort(self, call_id: str) -> bool:
        ended = self.world.running.get(call_id)
        if ended is not None:
            ended.set()
        return ended is not None

    async def sleep(self) -> Effect:
        self.world.caches.clear()
        return Effect.FREED

    async def wake(self) -> Effect:
        return Effect.RESTORED
