"""Who waits at a backend, and for what: what a person who watches wants to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from orla_lg.core.call import Call
from orla_lg.core.queues import BackendQueue, Queued

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
    """Somebody paused the backend."""
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


def who_waits(queue: BackendQueue, at_circuit: Sequence[Call], now: float) -> tuple[Waiting, ...]:
    """Return those who wait, whoever goes first first; *now* in monotonic seconds."""
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
    )  # fmt: skip
