"""What is saved and restored when a slot changes hands, and what taking it away is expected to cost.

A ``Swap`` is decided and reserved with the lease, under the lock; ``orders`` has the engine carry it out and notes
its effect. Without a pool nothing is ever saved, and what is taken is lost.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from math import inf

from orla_lg.core.cache.slots.files import Saved, SavedPool, covered
from orla_lg.core.cache.slots.worth import Prices
from orla_lg.core.cache.verification import OrderLog
from orla_lg.core.call import in_common
from orla_lg.core.engine.backend import Effect
from orla_lg.core.memory.events import Doing
from orla_lg.core.memory.returns import Odds, ReturnBook


@dataclass(eq=False, slots=True)
class Swap:
    """What the engine does with a slot before the call that leases it is sent."""

    slot: int
    workflow: str
    """The one that gets the slot; for a save ahead of need, the one that had it."""
    save: Saved | None
    """First: what the slot holds goes there."""
    restore: Saved | None
    """Then: the slot is filled with that."""
    begun: bool = False
    """The orders are on their way to the engine."""
    effect: Effect | None = None
    """Of the restore; ``None`` before it ended."""
    ended: Future[None] = field(default_factory=Future)
    """Ends when the slot is the call's, and never badly."""

    def __post_init__(self) -> None:
        self.ended.set_running_or_notify_cancel()  # a waiter's cancellation is not the engine's


@dataclass(eq=False, slots=True)
class Slot:
    """One place on the engine; ``held`` implies an owner."""

    index: int
    owner: str | None = None
    held: bool = False
    busy: bool = False
    moving: bool = False
    """An order of ours to the engine is under way: to erase, save or restore it."""
    flushed: bool = False
    """May hold tokens that were flushed or taken away: they must not be reused before another call replaced them."""
    flush_when_idle: bool = False
    """A flush came while the slot was busy."""
    flush_asked: OrderLog | None = None
    """After which call the flush was asked for that the engine has not carried out yet."""
    ahead: Swap | None = None
    """It is being saved ahead of need; its owner may lease it nevertheless, and waits for that."""
    blank: bool = False
    """The engine emptied it, and no call used it since."""
    mixed: bool = False
    """It may hold tokens of another tenant than its owner's: where tenants are isolated they must not be reused."""
    doing: Doing | None = None
    """What its owner does; ``None``: nothing more, as a call outside any run."""
    prefix: tuple[int, ...] = ()
    """Chained message hashes of the last prompt (``Ask.prefix``)."""
    tokens: int = 0
    last_used_s: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether a call could have it."""
        return not (self.busy or self.moving)

    def take_flush(self) -> OrderLog | None:
        """Return after which call the slot's flush was asked for, once."""
        order_log, self.flush_asked = self.flush_asked, None
        return order_log

    def common(self, prefix: tuple[int, ...]) -> int:
        """Return how many leading messages of *prefix* the slot still holds."""
        return in_common(self.prefix, prefix)


@dataclass(eq=False)
class Swaps:
    """Decides about saving and restoring on one backend."""

    pool: SavedPool | None = None
    """``None`` where nothing is ever saved."""
    able: bool = True
    """Whether the engine can save, as it was started."""
    prices: Prices = field(default_factory=Prices)
    odds: Odds = field(default_factory=lambda: ReturnBook().chance)
    """Of return; the default is that of workflows of which nothing is known."""
    _least_at: tuple[float, int] = field(default=(-inf, 0), init=False)
    _least_value_s: float = field(default=inf, init=False)

    @property
    def saves(self) -> bool:
        """Whether what is taken is saved, where that pays."""
        return self.able and self.pool is not None

    def learned(self, *, able: bool, weights: str) -> None:
        """Follow the probe: whether the engine can save, and which weights it serves."""
        self.able = able
        if self.pool is not None:
            self.pool.fits(weights)

    # What a slot is worth

    def loss_s(self, slot: Slot, now: float) -> float:
        """Return the seconds that taking a slot from its owner now is expected to cost in all."""
        chance = self._chance(slot, now)
        lost_s = chance * self.prices.recompute_s(slot.tokens)
        if self.pool is None or not self.able or slot.owner is None or not slot.tokens:
            return lost_s
        back_s = chance * self.prices.back_s(slot.tokens)
        if self.pool.copy_of(slot.owner, slot.prefix) is not None:
            return back_s
        saved_s = self.prices.save_s + back_s
        if saved_s < lost_s and self.pool.can_take(slot.owner, slot.prefix, lost_s, self._least_s(self.pool, now)):
            return saved_s
        return lost_s

    def _chance(self, slot: Slot, now: float) -> float:
        return 0.0 if slot.owner is None else self.odds(slot.owner, slot.doing, slot.last_used_s, now)

    def _value_s(self, now: float, entry: Saved) -> float:
        """Return what forgetting a saved one is expected to cost."""
        return self.odds(entry.owner, entry.doing, entry.used_s, now) * self.prices.recompute_s(entry.tokens)

    def _least_s(self, pool: SavedPool, now: float) -> float:
        """Return what forgetting the least of all that is saved is expected to cost: looked for once at a moment,
        since every slot that is weighed then asks."""
        moment = (now, pool.changes)
        if self._least_at != moment:
            self._least_at, self._least_value_s = moment, pool.least_value(partial(self._value_s, now))
        return self._least_value_s

    # Swapping

    def begin(self, slot: Slot, workflow: str, prefix: tuple[int, ...], now: float) -> Swap | None:
        """Reserve what is to be saved and restored before *workflow* uses the slot; ``None``: nothing is."""
        if self.pool is None or not self.able:
            return None
        restore = self.to_restore(slot, workflow, prefix)
        if restore is not None:
            self.pool.begin_reading(restore)  # first, or the save below might be given its name
        overwrites = restore is not None and in_common(slot.prefix, restore.prefix) < len(slot.prefix)
        save = self.begin_saving(slot, now) if slot.owner != workflow or overwrites else None
        if save is None and restore is None:
            return None
        return Swap(slot.index, workflow, save, restore)

    def to_restore(self, slot: Slot | None, workflow: str, prefix: tuple[int, ...]) -> Saved | None:
        """Return what is saved of the workflow if it has more of the prompt than the slot, by more than it takes.

        Args:
            slot: The one that the workflow gets; ``None``: one with nothing of its prompt.
            workflow: The call's.
            prefix: The prompt as chained message hashes.
        """
        if self.pool is None or not self.able:
            return None
        best = self.pool.find(workflow, lambda entry: entry.covers(prefix))
        if best is None:
            return None
        there = 0.0 if slot is None or slot.flushed or slot.mixed else covered(slot.prefix, slot.tokens, prefix)
        gain_s = self.prices.recompute_s(best.covers(prefix) - there)
        return best if gain_s > self.prices.restore_s else None

    def begin_saving(self, slot: Slot, now: float) -> Saved | None:
        """Reserve a name for what the slot holds, if that is worth a save and not saved already."""
        if self.pool is None or not self.able or slot.owner is None or not slot.tokens or slot.mixed:
            return None
        self.pool.unloaded(slot.owner)
        chance = self._chance(slot, now)
        lost_s = chance * self.prices.recompute_s(slot.tokens)
        saved_s = self.prices.save_s + chance * self.prices.back_s(slot.tokens)
        if self.pool.copy_of(slot.owner, slot.prefix) is not None or saved_s >= lost_s:
            return None
        return self.pool.begin_writing(
            slot.owner, slot.prefix, slot.tokens, slot.doing, lost_s, partial(self._value_s, now)
        )

    def begin_lending(self, slot: Slot, now: float) -> Saved | None:
        """Reserve a name for what another engine is to restore, if that is sooner than a prefill there."""
        if self.pool is None or not self.able or slot.owner is None or not slot.tokens or slot.mixed:
            return None
        lost_s = self.prices.recompute_s(slot.tokens)
        if self.prices.save_s + self.prices.restore_s >= lost_s:
            return None
        return self.pool.begin_writing(
            slot.owner, slot.prefix, slot.tokens, slot.doing, lost_s, partial(self._value_s, now)
        )

    def saved(self, entry: Saved, now: float, effect: Effect, took_s: float | None = None) -> None:
        """Note how saving went, and what it took in seconds; what could not be saved is lost."""
        assert self.pool is not None
        self.pool.written(entry, now, ok=effect is Effect.SAVED)
        if effect is Effect.SAVED and took_s is not None:
            self.prices.saved(took_s)

    def restored(self, swap: Swap, slot: Slot, now: float, effect: Effect, took_s: float | None = None) -> None:
        """Note how the swap's restore went, and what the slot holds thereafter."""
        assert self.pool is not None and swap.restore is not None
        ok, entry = effect is Effect.RESTORED, swap.restore
        swap.effect = effect
        self.pool.read(entry, now, ok=ok)
        if ok and took_s is not None:
            self.prices.restored(took_s)
        theirs = ok and slot.owner == swap.workflow
        # A restore that fails leaves an empty slot, or, if it did not get there, what was there before; one that
        # comes after its workflow was flushed fills the slot with tokens that must not be reused.
        slot.prefix, slot.tokens = (entry.prefix, entry.tokens) if theirs else ((), 0)
        slot.flushed = not theirs and (ok or slot.flushed)

    def answered(self, swap: Swap) -> None:
        """Note that the engine answered the call: if it was there and could not restore, it never will."""
        if self.pool is not None and swap.restore is not None and swap.effect is not Effect.RESTORED:
            self.pool.drop_one(swap.restore)
