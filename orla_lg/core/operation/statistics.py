"""A core at one moment, and a backend: its queue, its cache, its engine's health, and what its waiting calls lack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from orla_lg.core.accounting.costs import Costs
from orla_lg.core.cache.engine_cache import AdmissionStatistics, EngineCache, MemoryStatistics
from orla_lg.core.call import Call
from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.engine.health import Health
from orla_lg.core.limits.book import LimitStatistics
from orla_lg.core.prefetch.book import WarmStatistics
from orla_lg.core.prefetch.prefetcher import Prefetcher
from orla_lg.core.prefetch.prompts import SplitStatistics
from orla_lg.core.queues import BackendQueue, Queued, QueueStatistics
from orla_lg.core.workflow import WorkflowStatistics

SHOWN = 100
"""Of the calls that wait at a backend, statistics name so many: those that go first."""


class WaitsFor(StrEnum):
    """What keeps a call."""

    PLACE = "place"
    """``max_concurrency`` calls are in flight, or as many as the engine runs at once."""
    SLOT = "slot"
    """There is room, but other workflows hold the engine's cache slots."""
    CACHE = "cache"
    """There is room, but the KV cache does not hold its tokens besides the others'."""
    PREFIX = "prefix"
    """Another branch prefills the prefix that both share."""
    PAUSED = "paused"
    """The backend is paused."""
    CIRCUIT = "circuit"
    """Another call tries whether the engine answers again."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A call that waits."""

    call: str
    """The id that its record will have."""
    workflow: str
    run: str | None
    stage: str
    tenant: str | None
    priority: float
    waited_s: float
    """Since it arrived; earlier attempts count."""
    waits_for: WaitsFor
    expected_tokens: int
    """Prompt and answer together, as far as that can be told beforehand."""
    final_odds: float | None = None
    """How likely it is its run's last call, where the order of the queue goes by that (policy ``final_first``)."""


class SeenBackend(Protocol):
    """What statistics need of a backend's scheduler."""

    queue: BackendQueue
    cache: EngineCache
    health: Health
    prefetcher: Prefetcher


@dataclass(frozen=True, slots=True)
class BackendStatistics:
    """A backend at one moment."""

    queue: QueueStatistics
    memory: MemoryStatistics
    reachable: bool | None
    """``None`` before the first probe ended."""
    circuit: Circuit = Circuit.CLOSED
    trips: int = 0
    """How often the circuit opened."""
    admission: AdmissionStatistics | None = None
    """``None`` on engines with slots."""
    warm_ups: WarmStatistics = field(default_factory=WarmStatistics)
    waiting: tuple[Waiting, ...] = ()
    """Calls that wait, and for what, the first to go first; at most ``SHOWN``, ``queue.waiting`` counts all."""


def statistics_of(scheduler: SeenBackend, now: float) -> BackendStatistics:
    """Return a snapshot of a backend; under its lock, *now* in monotonic seconds."""
    queue, health, cache = scheduler.queue, scheduler.health, scheduler.cache
    return BackendStatistics(
        queue.statistics(),
        cache.statistics(),
        health.reachable,
        health.state(),
        health.breaker.trips,
        admission=cache.admission_statistics(),
        warm_ups=scheduler.prefetcher.statistics(),
        waiting=waiting_calls(queue, list(health.at_trial.values()), now),
    )


def waiting_calls(queue: BackendQueue, at_circuit: Sequence[Call], now: float) -> tuple[Waiting, ...]:
    """Return the calls that wait, the first to go first; *now* in monotonic seconds."""
    tried = [_waiting(call, now, WaitsFor.CIRCUIT) for call in at_circuit[:SHOWN]]
    queued = [_waiting(each.call, now, _waits_for(each, queue)) for each in queue.first(SHOWN - len(tried), now)]
    return (*tried, *queued)


def _waits_for(queued: Queued, queue: BackendQueue) -> WaitsFor:
    if queue.paused:
        return WaitsFor.PAUSED
    if queued.held:
        return WaitsFor(queued.held)
    return WaitsFor.SLOT if queue.has_room() else WaitsFor.PLACE


def _waiting(call: Call, now: float, waits_for: WaitsFor) -> Waiting:
    who = call.identity
    return Waiting(
        call.id, who.name, who.run, who.stage, call.hints.tenant or None, call.priority,
        max(0.0, now - call.arrived_s), waits_for, round(call.expected_tokens),
        call.final_odds,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class EarlyToolStatistics:
    """The tools that were started before their turn, since the start of an ``Orla``."""

    started: int = 0
    used: int = 0
    """Whose result their call got."""
    hidden_s: float = 0.0
    """Of the time of those, seconds that passed before the call's turn."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Whose result no call got, by reason (docs/tools.md)."""
    failed: int = 0
    """Whose result could not be handed over: the tool raised, or needed its place."""
    ran_twice: int = 0
    """Whose call then ran the tool in its place."""
    no_room: int = 0
    """Starts that were not made: too many ran or waited."""
    waiting: int = 0
    """Now: neither handed over nor dropped."""
    in_threads: int = 0
    """Now: bodies that run in threads."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Tools that are not started early any more, by reason (docs/tools.md)."""
    offered: int = 0
    """Calls that offered a safe tool to their model."""
    late: dict[str, int] = field(default_factory=dict)
    """Attempts of those whose tool calls came with the answer's end only, by reason (docs/tools.md)."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """An ``Orla`` at one moment."""

    backends: dict[str, BackendStatistics]
    workflows: WorkflowStatistics
    calls: int
    """Calls ended since the start."""
    records_dropped: int
    external: int
    """Calls that were not ours to place."""
    unidentified: int
    """Calls made while graphs ran whose context was lost on the way."""
    costs: Costs
    unwritten: int
    """Lines that the records file could not take."""
    limits: list[LimitStatistics] = field(default_factory=list)
    """How far limits are used up: of stages and tenants seen lately, and of the runs that are open."""
    split_prompts: SplitStatistics = field(default_factory=SplitStatistics)
    """Of this process: next prompts that were predicted while tools ran (``wrap(split_prompts=True)``)."""
    direct: int = 0
    """Of a replica of a core elsewhere: calls that went on without the core (``on_core_lost="direct"``)."""
    early_tools: EarlyToolStatistics = field(default_factory=EarlyToolStatistics)
    """Tools that began while a model still decoded; of this process's graphs."""
