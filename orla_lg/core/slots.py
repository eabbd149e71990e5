"""Cache slots: engines that keep KV cache in numbered places (llama.cpp), shared out by workflow.

A workflow *holds* a slot while it runs, so its cache waits for its next stage; a slot whose workflow is
idle, interrupted or unknown is only *remembered* and may be taken. Who may sit where, best first:

====  =========================================================================================
own   a slot of the workflow itself, the one sharing most of the prompt
free  nobody's slot, a clean one first
left  a slot remembered for a workflow that is not running, least recently used first
more  a second slot of a workflow, idle for ``spare_hold_s``: its parallel branches have probably joined
late  a slot whose holder made no call for ``hold_s``: holding is a favour, bounded for everyone's sake
====  =========================================================================================

Between *own* and *free* there is waiting: ``fanout`` says when a busy slot of the workflow is worth it.
A call that finds none of these stays queued. No workflow waits for another while it can use its own
slot, so holding cannot deadlock. All methods are called under the backend's lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Slot:
    """One place on the engine. ``busy`` and ``erasing`` exclude each other; ``held`` implies an owner."""

    index: int
    owner: str | None = None
    held: bool = False
    busy: bool = False
    erasing: bool = False
    flushed: bool = False
    """May hold tokens that were flushed or taken away: they must not be reused before another call replaced them."""
    flush_when_idle: bool = False
    """A flush came while the slot was busy."""
    prefix: tuple[int, ...] = ()
    """Chained message hashes of the last prompt (``Ask.prefix``)."""
    tokens: int = 0
    last_used_s: float = 0.0

    def common(self, prefix: tuple[int, ...]) -> int:
        """Return how many leading messages of *prefix* the slot still holds."""
        return in_common(self.prefix, prefix)


@dataclass(frozen=True, slots=True)
class Seat:
    """A slot given to a call."""

    slot: int
    how: str
    """``reused`` (own), ``claimed`` (free) or ``reclaimed`` (taken from another workflow)."""
    fresh: bool
    """The slot's old tokens must not be reused."""


@dataclass(eq=False)
class SlotTable:
    """Who sits in which slot of one backend."""

    count: int
    hold_s: float = 5.0
    spare_hold_s: float = 1.0
    """Long enough for a branch that calls a quick tool and then the model again."""
    slots: list[Slot] = field(init=False)

    def __post_init__(self) -> None:
        self.slots = [Slot(index) for index in range(self.count)]

    def seat(self, workflow: str, prefix: tuple[int, ...], now: float, *, hold: bool) -> Seat | None:
        """Give *workflow* a slot, or return ``None`` when none may be taken now.

        Args:
            workflow: Who sits down.
            prefix: The prompt as chained message hashes.
            now: Monotonic seconds.
            hold: Whether the workflow is running and so keeps the slot afterwards.
        """
        slot = self._own(workflow, prefix) or self._free() or self._takeable(now)
        if slot is None:
            return None
        how = "reused" if slot.owner == workflow else "claimed" if slot.owner is None else "reclaimed"
        seat = Seat(slot.index, how, slot.flushed)
        if how == "reclaimed":
            self._flush(slot)
        slot.owner, slot.held, slot.busy, slot.last_used_s = workflow, hold, True, now
        return seat

    def _own(self, workflow: str, prefix: tuple[int, ...]) -> Slot | None:
        own = [s for s in self._idle() if s.owner == workflow]
        return max(own, key=lambda s: (s.common(prefix), s.last_used_s), default=None)

    def reusable(self, workflow: str, prefix: tuple[int, ...]) -> int:
        """Return how many leading messages of *prefix* the workflow's best idle slot still holds; 0 without one."""
        own = self._own(workflow, prefix)
        return 0 if own is None else own.common(prefix)

    def _free(self) -> Slot | None:
        return min((s for s in self._idle() if s.owner is None), key=lambda s: s.flushed, default=None)

    def _takeable(self, now: float) -> Slot | None:
        owned = self._owned()
        due = [s for s in self._idle() if s.owner is not None and now >= self._due_s(s, owned)]
        return min(due, key=lambda s: (s.held, s.held and owned[s.owner] == 1, s.last_used_s), default=None)

    def _due_s(self, slot: Slot, owned: Counter[str | None]) -> float:
        """Return when (monotonic) others may take an idle slot."""
        if not slot.held:
            return slot.last_used_s
        return slot.last_used_s + (self.spare_hold_s if owned[slot.owner] > 1 else self.hold_s)

    def _owned(self) -> Counter[str | None]:
        return Counter(s.owner for s in self.slots)

    def _idle(self) -> list[Slot]:
        return [s for s in self.slots if not (s.busy or s.erasing)]

    def eligible(self, now: float) -> set[str] | None:
        """Return the workflows that could sit down now; ``None`` means anybody could."""
        if any(s.owner is None for s in self._idle()) or self._takeable(now) is not None:
            return None
        return {s.owner for s in self._idle() if s.owner is not None}

    def next_expiry_s(self) -> float | None:
        """Return when (monotonic) the first idle holder's favour ends, or ``None``."""
        owned = self._owned()
        return min((self._due_s(s, owned) for s in self._idle() if s.held), default=None)

    def vacate(self, index: int, prefix: tuple[int, ...], tokens: int, now: float, *, hold: bool) -> None:
        """Note that the call in slot *index* ended.

        Args:
            index: From the call's ``Seat``.
            prefix: The prompt as chained message hashes.
            tokens: What the call left there; 0 when it did not get as far as the engine.
            now: Monotonic seconds.
            hold: Whether the workflow is still running.
        """
        slot = self.slots[index]
        slot.busy, slot.held, slot.last_used_s = False, slot.held and hold, now
        if tokens:
            slot.prefix, slot.tokens, slot.flushed = prefix, tokens, False
        if slot.flush_when_idle:
            self._flush(slot)

    def release(self, workflow: str) -> int:
        """Let others take the workflow's slots; returns how many it held. Contents stay."""
        mine = [s for s in self.slots if s.owner == workflow and s.held]
        for slot in mine:
            slot.held = False
        return len(mine)

    def flush(self, workflow: str) -> None:
        """Give up the workflow's slots with their contents."""
        for slot in self.slots:
            if slot.owner == workflow and slot.busy:
                slot.flush_when_idle = True
            elif slot.owner == workflow:
                self._flush(slot)

    def _flush(self, slot: Slot) -> None:
        slot.owner, slot.held, slot.flushed, slot.flush_when_idle = None, False, True, False
        slot.prefix, slot.tokens = (), 0

    def start_erasing(self) -> list[int]:
        """Lock the flushed slots that lie idle, for the engine to erase; returns their numbers."""
        dirty = [s for s in self._idle() if s.flushed]
        for slot in dirty:
            slot.erasing = True
        return [slot.index for slot in dirty]

    def erased(self, index: int, *, clean: bool) -> None:
        """Unlock a slot after the engine tried to erase it."""
        slot = self.slots[index]
        slot.erasing = False
        slot.flushed = slot.flushed and not clean

    def lose_contents(self) -> None:
        """Note that the engine may have started anew. Owners and flush marks stay, in case it did not."""
        for slot in self.slots:
            slot.prefix, slot.tokens = (), 0

    def check_integrity(self) -> None:
        """Assert the invariants."""
        for slot in self.slots:
            assert not (slot.busy and slot.erasing), slot
            assert not slot.held or slot.owner is not None, slot
            assert not slot.flush_when_idle or slot.busy, slot


def in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many leading messages two prompts share, both as chained message hashes."""
    shared = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        shared += 1
    return shared
