"""Adapters that lie, each in one way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx

from orla_lg.core.call import Ask, Chunk, Usage
from orla_lg.core.engine.backend import Backend, Capability, Directions, Effect, Probe, Support
from orla_lg.core.engine.capabilities import EngineStats, Scope, Warmed, WorkflowCache
from orla_lg.errors import BackendUnavailable, EngineRefused
from orla_lg.openai_api.adapter import OpenAIAdapter
from tests.testing.paragon import Paragon, World, common


class Slotless(Paragon):
    """Its pins must withstand pressure, for there are no slots to hide in."""

    def says(self) -> dict[str, Any]:
        return {**super().says(), "slots": None}


class MisnamesItsModel(Paragon):
    def __init__(self, backend: Backend | None = None, world: World | None = None) -> None:
        super().__init__(
            Backend("paragon", (backend or Backend("p", "http://paragon/v1")).url, model="paragon"), world
        )

    def says(self) -> dict[str, Any]:
        return {**super().says(), "models": ("another",)}

    def refusal(self, body: Mapping[str, Any]) -> str | None:
        return super().refusal(body)


class NoContext(Paragon):
    async def probe(self) -> Probe:
        probe = await super().probe()
        object.__setattr__(probe, "kv_tokens", 0)  # past what ``Probe`` believes of an engine
        return probe


class Incomplete(Paragon):
    def says(self) -> dict[str, Any]:
        said = super().says()
        return {**said, "capabilities": {k: v for k, v in said["capabilities"].items() if k != Capability.TOOLS}}


class NoAdvice(Paragon):
    def says(self) -> dict[str, Any]:
        said = super().says()
        return {**said, "capabilities": {**said["capabilities"], Capability.TOOLS: Support.FLAG}}


class NeedlessAdvice(Paragon):
    def says(self) -> dict[str, Any]:
        return {**super().says(), "advice": {Capability.WARM: "start it with --warm"}}


class ClaimsSleep(Paragon):
    sleep = None  # type: ignore[assignment]


class Unsteady(Paragon):
    count = 0

    def says(self) -> dict[str, Any]:
        self.count += 1
        return {**super().says(), "incarnation": str(self.count)}


class SeesGhosts(Paragon):
    async def probe(self) -> Probe:
        return Probe(**self.says())


class NamesNobody(Paragon):
    def reach(self) -> None:
        if self.backend.url != "http://paragon/v1":
            raise BackendUnavailable("connection refused")


class NotJson(Paragon):
    def request_fields(self, ask: Ask, told: Directions) -> dict[str, Any]:
        return {**super().request_fields(ask, told), "told": {told.workflow}}


class TakesOver(Paragon):
    def request_fields(self, ask: Ask, told: Directions) -> dict[str, Any]:
        return {**super().request_fields(ask, told), "stream": True}


class SendsFractions(Paragon):
    def request_fields(self, ask: Ask, told: Directions) -> dict[str, Any]:
        fields = super().request_fields(ask, told)
        return {**fields, "priority": -told.priority} if told.priority else fields


class WrongWayRound(Paragon):
    def request_fields(self, ask: Ask, told: Directions) -> dict[str, Any]:
        fields = super().request_fields(ask, told)
        return fields if told.priority < 50 else {**fields, "priority": 0}


class NeverNeutral(Paragon):
    def request_fields(self, ask: Ask, told: Directions) -> dict[str, Any]:
        return {**super().request_fields(ask, told), "priority": 5 - round(2 * told.priority)}


class AllAlike(Paragon):
    def request_fields(self, ask: Ask, told: Directions) -> dict[str, Any]:
        return {**super().request_fields(ask, told), "priority": 0}


class AllAtOnce(Paragon):
    async def generate(self, body: Mapping[str, Any]) -> AsyncGenerator[Chunk]:
        if body.get("max_tokens") != 16:
            async for chunk in super().generate(body):
                yield chunk
            return
        for chunk in [chunk async for chunk in super().generate(body)]:
            yield chunk


class Counting(Paragon):
    """Tells other counts than it has."""

    def told(self, usage: Usage, body: Mapping[str, Any]) -> Usage:
        return usage

    async def generate(self, body: Mapping[str, Any]) -> AsyncGenerator[Chunk]:
        inner = super().generate(body)
        try:
            async for chunk in inner:
                yield chunk if chunk.usage is None else replace(chunk, usage=self.told(chunk.usage, body))
        finally:
            await inner.aclose()


class TooManyTokens(Counting):
    def told(self, usage: Usage, body: Mapping[str, Any]) -> Usage:
        return replace(usage, completion_tokens=usage.completion_tokens + 1)


class NoReason(Counting):
    async def generate(self, body: Mapping[str, Any]) -> AsyncGenerator[Chunk]:
        inner = super().generate(body)
        try:
            async for chunk in inner:
                yield replace(chunk, finish_reason=None)
        finally:
            await inner.aclose()


class MixesStreams(Counting):
    def told(self, usage: Usage, body: Mapping[str, Any]) -> Usage:
        return replace(usage, prompt_tokens=40) if len(self.world.running) > 3 else usage


class TakesAnyLength(Paragon):
    def refusal(self, body: Mapping[str, Any]) -> str | None:
        return None if body["model"] == "paragon" else "no such model"


class RefusesAsBroken(Paragon):
    async def generate(self, body: Mapping[str, Any]) -> AsyncGenerator[Chunk]:
        if body["model"] == "orla-no-such-model":
            raise EngineRefused("no such model", status=500)
        async for chunk in super().generate(body):
            yield chunk


class NeverStops(Paragon):
    """Closing its stream is only closing an eye: the request goes on."""

    async def generate(self, body: Mapping[str, Any]) -> AsyncGenerator[Chunk]:
        inner, whole = super().generate(body), False
        try:
            async for chunk in inner:
                yield chunk
            whole = True
        finally:
            if not whole:
                self.world.running["a ghost"] = asyncio.Event()
                asyncio.get_running_loop().call_later(5.0, self.world.running.pop, "a ghost", None)


class AbortsNothing(Paragon):
    async def abort(self, call_id: str) -> bool:
        return True


class IgnoresSchema(Paragon):
    def text(self, body: Mapping[str, Any]) -> str:
        return "red, I am sure" if body.get("response_format") else super().text(body)


class CountsNoCache(Counting):
    def told(self, usage: Usage, body: Mapping[str, Any]) -> Usage:
        return replace(usage, cached_tokens=None)


class HidesItsCache(Paragon):
    def says(self) -> dict[str, Any]:
        said = super().says()
        return {**said, "capabilities": {**said["capabilities"], Capability.CACHED_TOKENS: Support.UNSUPPORTED}}


class WarmsNothing(Paragon):
    async def warm(self, body: Mapping[str, Any]) -> Warmed:
        return Warmed(Effect.FAILED if isinstance(body["messages"], str) else Effect.WARMED)


class AlwaysWarm(Paragon):
    async def warm(self, body: Mapping[str, Any]) -> Warmed:
        done = await super().warm(body)
        return Warmed(Effect.WARMED, done.usage)


class FlushesNothing(Paragon):
    async def flush(self, scope: Scope) -> Effect:
        return Effect.FREED if isinstance(scope, WorkflowCache) else await super().flush(scope)


class WidensFlush(Paragon):
    async def flush(self, scope: Scope) -> Effect:
        self.world.caches.clear()
        return Effect.FREED


class FlushesShared(Paragon):
    async def flush(self, scope: Scope) -> Effect:
        if isinstance(scope, WorkflowCache) and (mine := self.world.caches.get(scope.workflow)):
            alike = [name for name, words in self.world.caches.items() if common(words, mine)]
            for name in alike:
                del self.world.caches[name]
        return Effect.FREED if isinstance(scope, WorkflowCache) else await super().flush(scope)


class FlushEndsStreams(Paragon):
    async def flush(self, scope: Scope) -> Effect:
        for ended in self.world.running.values():
            ended.set()
        return await super().flush(scope)


class FlushesHalf(Paragon):
    async def flush(self, scope: Scope) -> Effect:
        if type(scope).__name__ == "WholeCache":
            self.world.caches.popitem()
            return Effect.FREED
        return await super().flush(scope)


class ReleaseFrees(Paragon):
    async def release(self, scope: Scope) -> Effect:
        await super().release(scope)
        await self.flush(scope)
        return Effect.DEMOTED


class PinsNothing(Slotless):
    async def pin(self, scope: Scope, *, ttl_s: float | None = None) -> Effect:
        return Effect.PINNED


class PinsForEver(Slotless):
    async def pin(self, scope: Scope, *, ttl_s: float | None = None) -> Effect:
        return await super().pin(scope)


class ReleasesNothing(Slotless):
    async def release(self, scope: Scope) -> Effect:
        return Effect.DEMOTED


class KeepsNothing(Slotless):
    def request_fields(self, ask: Ask, told: Directions) -> dict[str, Any]:
        return super().request_fields(ask, replace(told, keep_s=None))


class FlushesUnasked(Paragon):
    def says(self) -> dict[str, Any]:
        said = super().says()
        return {**said, "capabilities": {**said["capabilities"], Capability.FLUSH_ALL: Support.UNSUPPORTED}}


class RestoresNothing(Paragon):
    async def restore(self, slot: int, name: str) -> Effect:
        return Effect.RESTORED if name in self.world.files else Effect.FAILED


class RestoresAnything(Paragon):
    async def restore(self, slot: int, name: str) -> Effect:
        await super().restore(slot, name)
        return Effect.RESTORED


class MistakesSlots(Paragon):
    async def erase(self, slot: int) -> Effect:
        return await super().erase(slot % 4)


class AlwaysIdle(Paragon):
    async def stats(self) -> EngineStats:
        return EngineStats(running=0)


class Overfull(Paragon):
    async def stats(self) -> EngineStats:
        return replace(await super().stats(), kv_usage=50.0)


class Miscounts(Paragon):
    async def tokenize(self, body: Mapping[str, Any]) -> Sequence[int]:
        return list(await super().tokenize(body)) * 2


class SleepsBadly(Paragon):
    async def sleep(self) -> Effect:
        return Effect.FREED


class BoundToItsLoop(Paragon):
    def __init__(self, backend: Backend | None = None, world: World | None = None) -> None:
        super().__init__(backend, world)
        self.loop: Any = None

    async def probe(self) -> Probe:
        self.loop = self.loop or asyncio.get_running_loop()
        if self.loop is not asyncio.get_running_loop():
            raise RuntimeError("attached to a different loop")
        return await super().probe()


class ClosesOnce(Paragon):
    closed = False

    async def aclose(self) -> None:
        if self.closed:
            raise RuntimeError("closed already")
        self.closed = True


class Credulous(OpenAIAdapter):
    """A stream that stops is a stream that ended."""

    async def generate(self, body: Mapping[str, Any]) -> AsyncGenerator[Chunk]:
        try:
            async for chunk in super().generate(body):
                yield chunk
        except BackendUnavailable as error:
            if "stopped before its end" not in str(error):
                raise


class ReadsAnything(OpenAIAdapter):
    """What is no event is skipped, and a stream without any is an empty answer."""

    def _event(self, line: str) -> dict[str, Any] | None:
        return super()._event(line) if line.startswith("data:") else None

    async def generate(self, body: Mapping[str, Any]) -> AsyncGenerator[Chunk]:
        seen = False
        try:
            async for chunk in super().generate(body):
                seen = True
                yield chunk
        except BackendUnavailable as error:
            if seen or isinstance(error.__cause__, httpx.HTTPError):
                raise


class ForgetsStatus(OpenAIAdapter):
    def _heed_status(self, what: str, response: Any) -> None:
        try:
            super()._heed_status(what, response)
        except EngineRefused as error:
            raise EngineRefused(str(error), status=400) from error


class BelievesCounts(OpenAIAdapter):
    def _event(self, line: str) -> dict[str, Any] | None:
        parsed = super()._event(line)
        counts = (parsed or {}).get("usage")
        assert counts is None or counts["prompt_tokens"] >= 0
        return parsed


class ProbesNothing(OpenAIAdapter):
    async def probe(self) -> Probe:
        try:
            return await super().probe()
        except BackendUnavailable as error:
            if "does not answer" in str(error):
                raise
            return Probe()


class ClaimsTools(OpenAIAdapter):
    def request_fields(self, ask: Ask, told: Directions) -> dict[str, Any]:
        return {"parallel_tools": 7} if ask.tools else {}
