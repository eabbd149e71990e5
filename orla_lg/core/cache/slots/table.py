"""Cache slots: engines that keep KV cache in numbered places (llama.cpp), shared out by workflow.

A workflow *holds* a slot while it runs, so its cache waits for its next stage; a slot whose workflow is
idle, interrupted or unknown is only *remembered* and may be taken. Which slot a call gets, best first:

=====  ==========================================================================================
own    a slot of the workflow itself, the one sharing most of the prompt
free   a slot without an owner, a clean one first
taken  of the slots that may be taken, the one whose loss is expected to cost least (``worth``)
=====  ==========================================================================================

May be taken: a slot that is only remembered; one whose holder made no call for ``hold_s``, because holding is a
favour, and bounded; a second slot of a workflow after ``spare_hold_s``, because its parallel branches
have probably joined. Where the engine can save slots, holding lasts no longer than the loss would: to give up
waiting when the wait has cost as much as what it avoids costs at most twice what foresight would have (ski rental:
Karlin, Manasse, Rudolph and Sleator, "Competitive snoopy caching", 1988).

A lease may come with a ``Swap``: what was there is saved first, what the workflow left elsewhere is restored then.
The slot stays locked until the engine did both, or failed to, whatever becomes of the call meanwhile.

Between *own* and *free* there is waiting: ``fanout`` says when a busy slot of the workflow is worth it.
A call that finds none of these stays queued. No workflow waits for another while it can use its own
slot, so holding cannot deadlock. All methods are called under the backend's lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from orla_lg.core.cache.slots.files import Saved
from orla_lg.core.cache.slots.swap import Slot, Swap, Swaps
from orla_lg.core.call import in_common
from orla_lg.core.engine.backend import Effect
from orla_lg.core.identity import tenant_of
from orla_lg.core.memory.events import Doing


@dataclass(frozen=True, slots=True)
class SlotLease:
    """A slot given to a call."""

    slot: int
    how: str
    """``reused`` (own), ``claimed`` (free) or ``reclaimed`` (taken from another workflow)."""
    fresh: bool
    """The slot's old tokens must not be reused; a restore replaces them."""
    swap: Swap | None = None
    strange: bool = False
    """That is so because they may be another tenant's, and not because of a flush."""

    @property
    def action(self) -> str:
        """``how``, or ``restored``; ``recomputed`` where a restore failed."""
        if self.swap is None or self.swap.restore is None:
            return self.how
        return "restored" if self.swap.effect is Effect.RESTORED else "recomputed"

    @property
    def reuses(self) -> bool:
        """Whether the engine may reuse what it finds in the slot."""
        return not self.fresh or self.action == "restored"


@dataclass(eq=False)
class SlotTable:
    """Which call has which slot of one backend."""

    count: int
    hold_s: float = 5.0
    spare_hold_s: float = 1.0
    """Long enough for a branch that calls a quick tool and then the model again."""
    swaps: Swaps = field(default_factory=Swaps)
    isolated: bool = False
    """No slot's tokens are reused for another tenant than the one that left them there."""
    slots: list[Slot] = field(init=False)
    _strays: set[str] = field(default_factory=set, init=False)
    """Calls without a lease, which the engine places itself, in a slot that is not known then."""

    def __post_init__(self) -> None:
        # What a slot holds before its first call is not known: another process may have left it there.
        self.slots = [Slot(index, mixed=self.isolated) for index in range(self.count)]

    # Acquiring

    def acquire(
        self, workflow: str, prefix: tuple[int, ...], now: float, *, hold: bool, must: bool = False
    ) -> SlotLease | None:
        """Give *workflow* a slot, or return ``None`` when none may be taken now.

        Args:
            workflow: The call's.
            prefix: The prompt as chained message hashes.
            now: Monotonic seconds.
            hold: Whether the workflow is running and so keeps the slot afterwards.
            must: The call goes in any case. Where tenants are isolated it then takes even a slot that is held, since
                it is not known what is where once the engine has placed a call itself.

        Returns:
            The lease; if it has a ``swap``, that must be carried out (``orders``), and the slot is locked until then.
        """
        slot = self._own(workflow, prefix) or self._free() or self._takeable(now)
        if slot is None and must and self.isolated:
            slot = min(self._idle(), key=lambda each: self.swaps.loss_s(each, now), default=None)
        if slot is None:
            return None
        how = "reused" if slot.owner == workflow else "claimed" if slot.owner is None else "reclaimed"
        swap = slot.ahead or self.swaps.begin(slot, workflow, prefix, now)
        strange = not slot.flushed and self._is_strange(slot, workflow)
        lease = SlotLease(slot.index, how, slot.flushed or strange, swap, strange)
        if how == "reclaimed":
            self._flush(slot)
        slot.owner, slot.held, slot.busy, slot.last_used_s = workflow, hold, True, now
        slot.blank, slot.moving, slot.doing = False, lease.swap is not None, Doing.GENERATING
        return lease

    def slot_for_prefetch(
        self, workflow: str, prefix: tuple[int, ...], now: float, spare: Callable[[str], bool] = lambda owner: False
    ) -> Slot | None:
        """Return the slot for a warm-up: an idle one of *workflow* itself, or a free one, or one that may be taken.

        That is the one which its call would take, a moment later. Where the engine saves slots none is taken: what
        is lost there comes back sooner than it could be prefilled.

        Args:
            workflow: The one to prefetch for.
            prefix: Its prompt as chained message hashes.
            now: Monotonic seconds.
            spare: Says of the owner of a slot whether it is not to be taken.
        """
        own = [slot for slot in self._idle() if slot.owner == workflow]
        slot = max(own, key=lambda slot: (slot.common(prefix), slot.last_used_s), default=None) or self._free()
        return slot if slot is not None or self.swaps.saves else self._takeable(now, spare)

    def acquire_for_prefetch(self, workflow: str, slot: Slot, now: float) -> SlotLease:
        """Give *workflow* the slot that ``slot_for_prefetch`` found, for a warm-up.

        Nothing is saved or restored for that, and its favour is neither begun nor prolonged.
        """
        how = "reused" if slot.owner == workflow else "claimed" if slot.owner is None else "reclaimed"
        strange = not slot.flushed and self._is_strange(slot, workflow)
        lease = SlotLease(slot.index, how, slot.flushed or strange, strange=strange)
        if how == "reclaimed":
            self._flush(slot)
            slot.flushed = lease.fresh  # no flush was asked for, so what a broken-off prefill leaves may be used
        if how != "reused":
            slot.last_used_s, slot.doing = now, Doing.TOOL
        slot.owner, slot.busy, slot.blank = workflow, True, False
        return lease

    def _is_strange(self, slot: Slot, workflow: str) -> bool:
        """Whether a slot may hold what *workflow* must not find there: tokens of another tenant."""
        if not self.isolated:
            return False
        strange = slot.owner is not None and tenant_of(slot.owner) != tenant_of(workflow)
        return slot.mixed or strange

    def _own(self, workflow: str, prefix: tuple[int, ...]) -> Slot | None:
        own = [s for s in self.slots if s.owner == workflow and (s.idle or (s.ahead and not s.busy))]
        return max(own, key=lambda s: (s.common(prefix), s.last_used_s), default=None)

    def reusable(self, workflow: str, prefix: tuple[int, ...]) -> int:
        """Return how many leading messages of *prefix* the workflow has in an idle slot or would have restored."""
        own = self._own(workflow, prefix)
        there = 0 if own is None or own.mixed else own.common(prefix)
        saved = self.swaps.to_restore(own, workflow, prefix)
        return there if saved is None else max(there, in_common(saved.prefix, prefix))

    def _free(self) -> Slot | None:
        return min((s for s in self._idle() if s.owner is None), key=lambda s: s.flushed, default=None)

    def _takeable(self, now: float, spare: Callable[[str], bool] = lambda owner: False) -> Slot | None:
        owned = self._owned()
        due = [
            s for s in self._idle()
            if s.owner is not None and now >= self._due_s(s, owned, now) and not spare(s.owner)
        ]  # fmt: skip
        return min(due, key=lambda s: (self.swaps.loss_s(s, now), s.held, s.last_used_s), default=None)

    def _due_s(self, slot: Slot, owned: Counter[str | None], now: float) -> float:
        """Return when (monotonic) others may take an idle slot."""
        if not slot.held:
            return slot.last_used_s
        hold_s = self.spare_hold_s if owned[slot.owner] > 1 else self.hold_s
        if self.swaps.saves:
            hold_s = min(hold_s, self.swaps.loss_s(slot, now))
        return slot.last_used_s + hold_s

    def _owned(self) -> Counter[str | None]:
        return Counter(s.owner for s in self.slots)

    def _idle(self) -> list[Slot]:
        return [s for s in self.slots if s.idle]

    def eligible(self, now: float) -> set[str] | None:
        """Return the workflows that could get a slot now; ``None`` means any."""
        if any(s.owner is None for s in self._idle()) or self._takeable(now) is not None:
            return None
        return {s.owner for s in self.slots if s.owner is not None and (s.idle or (s.ahead and not s.busy))}

    def next_expiry_s(self, now: float) -> float:
        """Return when (monotonic) the first idle holder's favour ends; ``inf`` if none does."""
        owned = self._owned()
        return min((self._due_s(s, owned, now) for s in self._idle() if s.held), default=inf)

    # Calls without a lease

    def strayed(self, call: str) -> None:
        """Note that a call goes without a lease: any slot may hold its tokens from now on."""
        if self.isolated:
            self._strays.add(call)
            self._mix()

    def stray_ended(self, call: str) -> None:
        """Note that a call without a lease ended, if it was one of these slots'."""
        if call in self._strays:
            self._strays.remove(call)
            self._mix()

    def _mix(self) -> None:
        for slot in self.slots:
            slot.mixed = True

    # Swaps

    def swapped(self, swap: Swap, now: float) -> None:
        """Unlock a slot after its swap; a restore that was not even tried has failed."""
        if swap.restore is not None and swap.effect is None:
            self.swaps.restored(swap, self.slots[swap.slot], now, Effect.FAILED)
        self.slots[swap.slot].moving, self.slots[swap.slot].ahead = False, None

    # Releasing

    def release_lease(
        self, lease: SlotLease, prefix: tuple[int, ...], tokens: int, now: float, *, hold: bool
    ) -> None:
        """Note that the call in a slot ended.

        Args:
            lease: The call's.
            prefix: The prompt as chained message hashes.
            tokens: What the call left there; 0 when it did not get as far as the engine.
            now: Monotonic seconds.
            hold: Whether the workflow is still running.
        """
        slot = self.slots[lease.slot]
        slot.busy, slot.held, slot.last_used_s = False, slot.held and hold, now
        if slot.doing is Doing.GENERATING:  # else what the workflow does was noted meanwhile
            slot.doing = Doing.TOOL if hold else None
        if tokens:
            slot.prefix, slot.tokens, slot.flushed = prefix, tokens, False
            slot.mixed = slot.mixed and bool(self._strays)
            if lease.swap is not None:
                self.swaps.answered(lease.swap)
        if slot.flush_when_idle:
            self._flush(slot)

    def recall(self, index: int, workflow: str, prefix: tuple[int, ...], tokens: int, used_s: float) -> None:
        """Note what a slot holds from before this table was made, as its user says.

        Where tenants are isolated, what it holds stays unbelieved, and only whose it is is taken over.
        """
        if not 0 <= index < self.count:
            return
        slot = self.slots[index]
        if not slot.idle or slot.ahead is not None or slot.flush_asked is not None or slot.last_used_s >= used_s:
            return
        slot.owner, slot.held, slot.doing, slot.last_used_s = workflow, True, Doing.TOOL, used_s
        slot.blank, slot.flushed = False, False
        slot.prefix, slot.tokens = ((), 0) if self.isolated else (prefix, tokens)

    def turned(self, workflow: str, doing: Doing) -> None:
        """Note what a workflow does, outside of any model."""
        for slot in self.slots:
            if slot.owner == workflow:
                slot.doing = doing
        if self.swaps.pool is not None:
            self.swaps.pool.turned(workflow, doing)

    def release(self, workflow: str) -> int:
        """Let others take the workflow's slots; returns how many it held. Contents stay."""
        mine = [s for s in self.slots if s.owner == workflow and s.held]
        for slot in mine:
            slot.held = False
        return len(mine)

    def flush(self, workflow: str) -> int:
        """Give up the workflow's slots with their contents, and what is saved; returns how many files that were."""
        for slot in self.slots:
            if slot.owner == workflow and slot.busy:
                slot.flush_when_idle = True
            elif slot.owner == workflow:
                self._flush(slot)
        return 0 if self.swaps.pool is None else self.swaps.pool.drop(workflow)

    def _flush(self, slot: Slot) -> None:
        slot.owner, slot.held, slot.flushed, slot.flush_when_idle = None, False, not slot.blank, False
        slot.prefix, slot.tokens, slot.doing = (), 0, None

    # Tidying, while the engine is quiet

    def start_erasing(self) -> list[int]:
        """Lock the flushed slots that lie idle, for the engine to erase; returns their numbers."""
        dirty = [s for s in self._idle() if s.flushed]
        for slot in dirty:
            slot.moving = True
        return [slot.index for slot in dirty]

    def erased(self, index: int, *, clean: bool) -> None:
        """Unlock a slot after the engine tried to erase it."""
        slot = self.slots[index]
        slot.moving = False
        slot.flushed = slot.flushed and not clean
        slot.blank = clean

    def start_emptying(self, now: float) -> tuple[int, str] | None:
        """Lock an empty slot and return it with a file to overwrite with it; ``None`` without either."""
        pool, blank = self.swaps.pool, next((s for s in self._idle() if s.blank), None)
        if pool is None or blank is None:
            return None
        pool.expire(now)
        name = pool.begin_emptying()
        if name is None:
            return None
        blank.moving = True
        return blank.index, name

    def emptied(self, index: int, name: str, *, ok: bool) -> None:
        """Unlock a slot after the engine tried to overwrite a file with it."""
        assert self.swaps.pool is not None
        self.slots[index].moving = False
        self.swaps.pool.emptied(name, ok=ok)

    def start_saving_ahead(self, now: float) -> list[Swap]:
        """Lock slots that others may soon want, or a night may empty, and return what saves them.

        Those that wait for a human always; where no slot is free, idle threads too.
        """
        crowded = all(slot.owner is not None for slot in self.slots)
        wanted = {Doing.HUMAN, Doing.IDLE} if crowded else {Doing.HUMAN}
        for slot in self._idle():
            if slot.owner is not None and slot.doing in wanted and (entry := self.swaps.begin_saving(slot, now)):
                slot.moving, slot.ahead = True, Swap(slot.index, slot.owner, entry, None)
        return [slot.ahead for slot in self.slots if slot.ahead is not None and not slot.ahead.begun]

    def start_lending(self, slot: Slot, now: float) -> Swap | None:
        """Lock an idle slot, and return what saves it for another engine: the save that is under way, if one is."""
        if slot.ahead is None and slot.idle and slot.owner and (entry := self.swaps.begin_lending(slot, now)):
            slot.moving, slot.ahead = True, Swap(slot.index, slot.owner, entry, None)
        return slot.ahead

    def found_empty(self, index: int, saved: Saved) -> None:
        """Note that a slot held next to nothing of what was to be saved from it."""
        slot = self.slots[index]
        if (slot.owner, slot.prefix) == (saved.owner, saved.prefix):
            slot.prefix, slot.tokens = (), 0

    def lose_contents(self) -> None:
        """Note that the engine may have been restarted. Owners and flush marks stay, in case it did not; files do."""
        for slot in self.slots:
            slot.prefix, slot.tokens, slot.blank = (), 0, False
        if self.swaps.pool is not None:
            self.swaps.pool.unloaded()

    def check_integrity(self) -> None:
        """Assert the invariants."""
        for slot in self.slots:
            assert not slot.held or slot.owner is not None, slot
            assert not slot.flush_when_idle or slot.busy, slot
            assert not (slot.blank and (slot.tokens or slot.flushed or slot.busy)), slot
            assert slot.owner is not None or not slot.tokens, slot
            assert slot.moving or slot.ahead is None, slot
            assert self.isolated or not slot.mixed, slot
        assert self.isolated or not self._strays
        if self.swaps.pool is not None:
            self.swaps.pool.check_integrity()
