"""What the core is shown of a simulated engine: a pool of blocks, or slots, and what it can be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from math import inf

from orla_lg.core.engine.backend import Capability, Effect, Probe, Support
from orla_lg.core.engine.capabilities import Copied, Scope, WorkflowCache
from orla_lg.replay.traffic import BackendSetting
from orla_lg.virtual import StillAdapter
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.request import SimRequest

TOLD = (Capability.PIN, Capability.RELEASE, Capability.FLUSH_WORKFLOW)
"""What a simulated engine does for those that could do it."""


class SimulatedAdapter(StillAdapter):
    """What an adapter is before an engine whose cache is a pool of blocks, and may be told what to keep."""

    def __init__(self, probe: Probe, engine: SimEngine) -> None:
        super().__init__(probe)
        self._blocks = engine.ownership
        self.clock: Callable[[], float] = lambda: 0.0

    def sent(self, request: SimRequest, slot: int | None) -> SimRequest:
        """Return a request as it reaches the engine."""
        return request

    async def pin(self, scope: Scope, *, ttl_s: float | None = None) -> Effect:
        """Keep a workflow until nothing else is left to evict."""
        if not isinstance(scope, WorkflowCache):
            return Effect.UNSUPPORTED
        until_s = inf if ttl_s is None else self.clock() + ttl_s
        return Effect.PINNED if self._blocks.pin_workflow(scope.workflow, until_s) else Effect.FAILED

    async def release(self, scope: Scope) -> Effect:
        """Evict a workflow next."""
        if not isinstance(scope, WorkflowCache):
            return Effect.UNSUPPORTED
        self._blocks.release_workflow(scope.workflow)
        return Effect.DEMOTED

    async def flush(self, scope: Scope) -> Effect:
        """Forget a workflow now."""
        if not isinstance(scope, WorkflowCache):
            return Effect.UNSUPPORTED
        self._blocks.flush_workflow(scope.workflow)
        return Effect.FREED


_Held = list[tuple[int, int]]
"""Of each block in a slot, its hash among all prompts and its own, which no block of another slot has."""


class SlotAdapter(SimulatedAdapter):
    """The same before an engine with slots: each holds the last prompt that ran in it, and no other finds that."""

    def __init__(self, probe: Probe, engine: SimEngine) -> None:
        super().__init__(probe, engine)
        self._held: dict[int, _Held] = {}
        self._saved: dict[str, _Held] = {}
        self._own = count(1)

    def sent(self, request: SimRequest, slot: int | None) -> SimRequest:
        """Return a request that finds what its slot holds, and leaves in the slot what it makes."""
        if slot is None:
            return replace(request, hashes=())
        held = self._held.get(slot, [])
        same = next(
            (at for at, (one, (known, _)) in enumerate(zip(request.hashes, held, strict=False)) if one != known),
            min(len(request.hashes), len(held)),
        )
        made = self._held[slot] = [*held[:same], *((each, next(self._own)) for each in request.hashes[same:])]
        return replace(request, hashes=[own for _, own in made])

    async def pin(self, scope: Scope, *, ttl_s: float | None = None) -> Effect:
        """Do nothing: a slot stays until another workflow is given it."""
        return Effect.PINNED if isinstance(scope, WorkflowCache) and scope.slot is not None else Effect.UNSUPPORTED

    async def release(self, scope: Scope) -> Effect:
        """Do nothing: a slot may be given away."""
        return Effect.DEMOTED if isinstance(scope, WorkflowCache) and scope.slot is not None else Effect.UNSUPPORTED

    async def flush(self, scope: Scope) -> Effect:
        """Erase a workflow's slot."""
        if not isinstance(scope, WorkflowCache) or scope.slot is None:
            return Effect.UNSUPPORTED
        return await self.erase(scope.slot)

    async def erase(self, slot: int) -> Effect:
        """Empty a slot."""
        self._held.pop(slot, None)
        return Effect.FREED

    async def save(self, slot: int, name: str) -> Copied:
        """Keep what a slot holds under a name; that takes no time here."""
        self._saved[name] = self._held.get(slot, [])
        return Copied(Effect.SAVED, None)

    async def restore(self, slot: int, name: str) -> Effect:
        """Fill a slot with what was kept."""
        if name not in self._saved:
            return Effect.FAILED
        self._held[slot] = self._saved[name]
        return Effect.RESTORED


def adapter_of(setting: BackendSetting, engine: SimEngine) -> SimulatedAdapter:
    """Return the adapter of a simulated engine that can be told what the recorded one could."""
    parameters = engine.parameters
    told = (*TOLD, Capability.SAVE_RESTORE) if setting.slots else TOLD
    native = {Capability.CACHED_TOKENS, *(each for each in told if each in setting.can)}
    if parameters.priority:
        native.add(Capability.PRIORITY)
    probe = Probe(
        capabilities={each: Support.NATIVE if each in native else Support.UNSUPPORTED for each in Capability},
        context_tokens=parameters.context_tokens,
        kv_tokens=None if setting.kv_tokens is None else parameters.kv_tokens,  # what was not known then is not now
        slots=setting.slots,
    )
    return (SlotAdapter if setting.slots else SimulatedAdapter)(probe, engine)
