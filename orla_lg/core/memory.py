"""Steps 5 and 8, prepare and signal: what stays cached. A ledger, a policy, and what really happened.

The ledger is what we believe each backend holds per workflow; ``cached_tokens`` of the next answer is the
only witness. A policy turns events into actions (keep, release, flush); the engine's adapter turns actions
into effects. A workflow flush is never widened to a flush of everything. The default policy is the Orla
paper's (section 2.2, Memory manager): preserve between stages on one backend, flush at the boundaries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Protocol

from orla_lg.core.backend import Effect
from orla_lg.core.call import CacheHint, Call
from orla_lg.core.slots import Seat, SlotTable
from orla_lg.errors import ConfigError, did_you_mean


class EventKind(StrEnum):
    """What may happen to a workflow that its cache should know of."""

    CALL_DONE = "call_done"
    STRAY_DONE = "stray_done"
    """A call of no workflow we follow ended."""
    SWITCHED = "switched"
    """The workflow has no more calls on ``backend`` and now calls another one."""
    INTERRUPTED = "interrupted"
    IDLE = "idle"
    """The last run on a thread ended; the user may write again."""
    OVER = "over"
    """The last run of a workflow without a thread ended."""
    THREAD_DELETED = "thread_deleted"
    FORGOTTEN = "forgotten"
    """More threads lie idle than we remember; this was the oldest."""


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """Something that happened to a workflow."""

    kind: EventKind
    workflow: str
    backend: str | None = None
    """``None`` concerns every backend that holds something of the workflow."""
    hint: CacheHint | None = None

    @property
    def final(self) -> bool:
        """Whether the workflow will not come back."""
        return self.kind in (EventKind.OVER, EventKind.THREAD_DELETED, EventKind.FORGOTTEN)


class Verb(StrEnum):
    """What a policy may ask for."""

    RELEASE = "release"
    """Others may take the place; the contents stay until they do."""
    FLUSH = "flush"
    """The contents go."""


@dataclass(frozen=True, slots=True)
class CacheAction:
    """What is to be done with a workflow's cache on a backend (``None``: on all that hold some)."""

    verb: Verb
    workflow: str
    backend: str | None = None


class MemoryPolicy(Protocol):
    """Decides what to do with caches; keeping is doing nothing."""

    def decide(self, event: CacheEvent) -> Sequence[CacheAction]:
        """Return what is to be done after *event*."""
        ...


class FlushAtBoundary:
    """The paper's default: kept from stage to stage, flushed on a switch of backend and at the end.

    A thread's end is not the end: the user may write again, so its cache is released, not flushed. What
    is called outside any run is released at once.
    """

    _VERBS: ClassVar[dict[EventKind, Verb]] = {
        EventKind.STRAY_DONE: Verb.RELEASE,
        EventKind.SWITCHED: Verb.FLUSH,
        EventKind.INTERRUPTED: Verb.RELEASE,
        EventKind.IDLE: Verb.RELEASE,
        EventKind.OVER: Verb.FLUSH,
        EventKind.THREAD_DELETED: Verb.FLUSH,
        EventKind.FORGOTTEN: Verb.FLUSH,
    }

    def decide(self, event: CacheEvent) -> Sequence[CacheAction]:  # noqa: D102
        verb = self._VERBS.get(event.kind)
        if event.hint == "flush" and event.kind in (EventKind.CALL_DONE, EventKind.STRAY_DONE):
            verb = Verb.FLUSH
        if event.hint == "preserve" and event.kind is EventKind.SWITCHED:
            verb = None
        return () if verb is None else (CacheAction(verb, event.workflow, event.backend),)


class FlushPerRequest(FlushAtBoundary):
    """Flush after every call: the paper's baseline, for comparison."""

    _VERBS: ClassVar[dict[EventKind, Verb]] = FlushAtBoundary._VERBS | {
        EventKind.CALL_DONE: Verb.FLUSH,
        EventKind.STRAY_DONE: Verb.FLUSH,
    }


class ReleaseOnly(FlushAtBoundary):
    """Never flush: places are given back at boundaries, contents stay until somebody needs the room."""

    _VERBS: ClassVar[dict[EventKind, Verb]] = {
        kind: Verb.RELEASE for kind in FlushAtBoundary._VERBS if kind is not EventKind.SWITCHED
    }


_NAMED: dict[str, type[FlushAtBoundary]] = {
    "default": FlushAtBoundary,
    "flush_per_request": FlushPerRequest,
    "release_only": ReleaseOnly,
}


def memory_policy(chosen: str | MemoryPolicy) -> MemoryPolicy:
    """Return the policy for a name, or the object itself.

    Raises:
        ConfigError: The name is unknown, or the object has no ``decide``.
    """
    if isinstance(chosen, str):
        if chosen not in _NAMED:
            raise ConfigError(f"unknown memory policy {chosen!r}{did_you_mean(chosen, _NAMED)}")
        return _NAMED[chosen]()
    if not callable(getattr(chosen, "decide", None)):
        raise ConfigError(f"{chosen!r} is no memory policy: it needs decide(event)")
    return chosen


@dataclass(frozen=True, slots=True)
class MemoryStatistics:
    """A backend's ledger at one moment."""

    workflows: int
    """Workflows believed to hold cache there."""
    tokens: int
    """What we believe they hold, in tokens."""
    slots: int | None
    slots_held: int
    effects: dict[str, int]
    """Per ``verb:effect``, how often."""


@dataclass(eq=False)
class Ledger:
    """What we believe one backend holds. Under the backend's lock, like the queue."""

    resident: dict[str, int] = field(default_factory=dict)
    """Tokens per workflow, on engines without slots."""
    slots: SlotTable | None = None
    effects: Counter[str] = field(default_factory=Counter)

    def prepare(self, call: Call, now: float, *, running: bool) -> Seat | None:
        """Seat a call that is about to be granted.

        ``None`` where the engine has no slots, or has none left for a call granted beyond the bound: the
        engine then places it itself.
        """
        if self.slots is None:
            return None
        seat = self.slots.seat(call.identity.workflow, call.ask.prefix, now, hold=running)
        if seat is not None and seat.fresh:
            self.note(Verb.FLUSH, Effect.DEFERRED)
        return seat

    def settle(self, call: Call, seat: Seat | None, tokens: int, now: float, *, followed: bool) -> None:
        """Note what the call left in the cache, in tokens; only ``followed`` workflows keep a place."""
        if self.slots is None:
            if followed and tokens:
                self.resident[call.identity.workflow] = tokens
        elif seat is not None:
            self.slots.vacate(seat.slot, call.ask.prefix, tokens, now, hold=followed)

    def apply(self, action: CacheAction) -> bool:
        """Carry out what a policy asked for; returns whether the engine must be told, and its effect noted.

        On an engine with slots a flush gives them up at once and ``start_erasing`` has them erased; a release
        is ours alone. On others only the engine itself can do it.
        """
        if self.slots is None:
            known = action.workflow in self.resident
            if action.verb is Verb.FLUSH:
                self.resident.pop(action.workflow, None)
            return known
        if action.verb is Verb.FLUSH:
            self.slots.flush(action.workflow)
        elif self.slots.release(action.workflow):
            self.note(action.verb, Effect.DEMOTED)
        return False

    def erased(self, table: SlotTable, slot: int, effect: Effect) -> None:
        """Note how the engine's erasing of a flushed slot of *table* went."""
        table.erased(slot, clean=effect is Effect.FREED)
        self.note(Verb.FLUSH, effect)

    def note(self, verb: Verb, effect: Effect) -> None:
        """Count what became of an order."""
        self.effects[f"{verb}:{effect}"] += 1

    def engine_lost(self) -> None:
        """Believe no contents any more: the engine may come back empty."""
        self.resident.clear()
        if self.slots is not None:
            self.slots.lose_contents()

    def statistics(self) -> MemoryStatistics:
        """Return a snapshot."""
        if self.slots is None:
            tokens = sum(self.resident.values())
            return MemoryStatistics(len(self.resident), tokens, None, 0, dict(self.effects))
        slots = self.slots.slots
        return MemoryStatistics(
            workflows=len({slot.owner for slot in slots} - {None}),
            tokens=sum(slot.tokens for slot in slots),
            slots=len(slots),
            slots_held=sum(slot.held for slot in slots),
            effects=dict(self.effects),
        )
