"""What we believe one backend's KV cache holds, for whom, and what came of what was asked of it.

Two kinds of engines, two accounts: a prefix cache shared by all (``residency``: pieces of prompts; ``claims``: who
counts on which), or numbered slots with one owner each (``slots``). What was asked, and whether the next call bore it
out, is kept the same way for both (``orders``). Under the backend's lock, like the queue.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from orla_lg.core.cache.prefix.nodes import in_common
from orla_lg.core.cache.prefix.references import Claims
from orla_lg.core.cache.prefix.tree import Residency
from orla_lg.core.cache.slots.swap import Slot, Swaps
from orla_lg.core.cache.slots.table import Seat, SlotTable
from orla_lg.core.cache.verification import Claimed, Order, OrderBook, Trail, Truth
from orla_lg.core.call import CHARS_PER_TOKEN, Ask, Call
from orla_lg.core.engine.backend import Effect
from orla_lg.core.memory.events import CacheAction, Doing, Holding, Verb

FORGET_AFTER_S = 86_400.0
"""What nobody used or turned to for a day is believed to be gone."""

SWEEP_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class MemoryStatistics:
    """A backend's ledger at one moment."""

    workflows: int
    """Workflows believed to hold cache there."""
    tokens: int
    """What we believe they hold, in tokens; what they share counts once."""
    slots: int | None
    slots_held: int
    effects: dict[str, int]
    """Per ``verb:effect``, and ``linger:effect`` where a model was told how long to stay, how often."""
    saved: int
    """Slots' contents kept on the engine's disk."""
    truth: Truth
    """What was claimed, against what ``cached_tokens`` verified."""


class Ledger:
    """What we believe one backend holds."""

    def __init__(self, *, isolated: bool = False) -> None:
        self._isolated = isolated
        """No slot's tokens are reused for another tenant."""
        self.cache = Residency()
        self.claims = Claims(self.cache)
        self.slots: SlotTable | None = None
        self.orders = OrderBook()
        self._sweep_at_s = 0.0
        self._leaving: dict[str, Trail] = {}
        """Workflows that are forgotten once the orders on their way have come to an end."""
        self._flushing: dict[Slot, Trail] = {}
        """Flushed slots that are not erased yet, and after which call that was asked."""

    def seats(self, count: int | None, swaps: Swaps) -> None:
        """Follow how many slots the engine has; ``None`` or 0: a prefix cache, shared by all."""
        if (0 if self.slots is None else self.slots.count) != (count or 0):
            self.slots = SlotTable(count, swaps=swaps, isolated=self._isolated) if count else None
            for trail in self._flushing.values():
                self.orders.note(Order(Verb.FLUSH, Effect.FAILED), trail)
            self._flushing.clear()

    # Calls

    def prepare(self, call: Call, now: float, *, running: bool, extra: bool = False) -> Seat | None:
        """Seat a call that is about to be granted.

        ``None`` where the engine has no slots, or has none left for a call granted beyond the bound (*extra*): the
        engine then places it itself.
        """
        if self.slots is None:
            return None
        seat = self.slots.seat(call.identity.workflow, call.ask.prefix, now, hold=running, must=extra)
        if seat is None:
            self.slots.strayed(call.id)
        elif seat.fresh and not seat.strange:
            asked_after = self._flushing.pop(self.slots.slots[seat.slot], None)
            self.orders.note(Order(Verb.FLUSH, Effect.DEFERRED), asked_after)
        return seat

    def claim(self, call: Call, seat: Seat | None, now: float) -> Claimed:
        """Return what a call that goes now should find; to be asked before it counts as in flight."""
        workflow = call.identity.workflow
        if self.slots is None:
            found = [piece for piece in self.cache.find(call.ask, call.identity.voice) if piece.filled]
            shared = sum(piece.there_tokens for piece in found if self.claims.is_shared(piece, workflow))
            there = sum(piece.there_tokens for piece in found)
            return self.orders.claim(workflow, round(there), round(shared), now)
        return self.orders.claim(workflow, self._in_seat(call.ask, seat), 0, now)

    def _in_seat(self, ask: Ask, seat: Seat | None) -> int:
        """Return the tokens of a prompt that its slot holds: as the engine counted, or by length if that is less."""
        if seat is None or self.slots is None or (seat.fresh and seat.swap is None):
            return 0
        slot = self.slots.slots[seat.slot]
        there = slot if seat.swap is None or seat.swap.restore is None else seat.swap.restore
        common = in_common(there.prefix, ask.prefix)
        return min(there.tokens, sum(chars for _, chars in ask.pieces[:common]) // CHARS_PER_TOKEN)

    def settle(self, call: Call, seat: Seat | None, tokens: int, now: float, *, followed: bool) -> None:
        """Note what a call left in the cache, in tokens; only ``followed`` workflows keep a place."""
        if tokens:
            self.orders.called(call.identity.workflow, call.id)
        self.claims.expire(now)
        if now >= self._sweep_at_s:
            self._sweep_at_s = now + SWEEP_EVERY_S
            self.claims.forget_older_than(now - FORGET_AFTER_S)
        if self.slots is not None and seat is not None:
            self.slots.vacate(seat, call.ask.prefix, tokens, now, hold=followed)
        elif self.slots is not None:
            self.slots.stray_ended(call.id)

    # Orders

    def apply(self, action: CacheAction) -> Trail | None:
        """Carry out what a policy asked for; returns the trail in which the engine's answer is to be noted.

        On an engine with slots that is ours alone: a flush gives the slots up at once, and ``start_erasing`` has them
        erased; a release lets others take them. On others only the engine can do it; ``None`` if it need not be told.
        """
        if self.slots is None:
            return self.orders.asks(action.workflow, action.verb)
        trail = self.orders.trails.get(action.workflow)
        if action.verb is Verb.FLUSH:
            if trail is not None:
                self._flushing |= {slot: trail for slot in self.slots.slots if slot.owner == action.workflow}
            for _ in range(self.slots.flush(action.workflow)):
                self.orders.note(Order(action.verb, Effect.DEFERRED), trail)  # a file is emptied in a quiet moment
        elif action.verb is Verb.RELEASE and self.slots.release(action.workflow):
            self.orders.note(Order(action.verb, Effect.DEMOTED), trail)
        return None

    def note(self, verb: Verb, effect: Effect, workflow: str = "") -> None:
        """Note an order of our own, and what came of it, for a workflow if it was for one."""
        self.orders.note(Order(verb, effect), self.orders.trails.get(workflow))

    def took_effect(self, action: CacheAction, trail: Trail, effect: Effect, now: float) -> None:
        """Believe what the engine says it did."""
        workflow, until_s = action.workflow, now + (inf if action.ttl_s is None else action.ttl_s)
        self.orders.answered(trail, Order(action.verb, effect, until_s))
        newest = self.orders.trails.get(workflow) or self._leaving.get(workflow)
        if newest in (trail, None):  # else a later call says more of what is there
            match effect:
                case Effect.FREED:
                    self.claims.freed(workflow)
                case Effect.DEMOTED:
                    self.claims.demoted(workflow)
                case Effect.PINNED:
                    self.claims.pinned(workflow, until_s)
        if not trail.waits and self._leaving.get(workflow) is trail:
            del self._leaving[workflow]
            if self.orders.trails.get(workflow) is None:  # else it came back meanwhile, under the same name
                self.claims.forget(workflow)

    def erased(self, table: SlotTable, slot: int, effect: Effect) -> None:
        """Note how the engine's erasing of a flushed slot of *table* went."""
        table.erased(slot, clean=effect is Effect.FREED)
        self.orders.note(Order(Verb.FLUSH, effect), self._flushing.pop(table.slots[slot], None))

    def turned(self, workflow: str, doing: Doing, now: float) -> None:
        """Note what a workflow waits for, outside of any model."""
        self.claims.turned(workflow, doing, now)
        if self.slots is not None:
            self.slots.turned(workflow, doing)

    def forget(self, workflow: str) -> None:
        """Drop all that is known of a workflow that will not come back.

        What it holds is known until the orders on their way have come to an end: an engine that frees it then must
        be believed.
        """
        trail = self.orders.forget(workflow)
        if trail is not None and trail.waits:
            self.claims.release(workflow)
            self._leaving[workflow] = trail
        elif workflow not in self._leaving:
            self.claims.forget(workflow)

    def engine_lost(self) -> None:
        """Believe no contents any more: the engine may come back empty."""
        self.claims.forget_all()
        self.cache.clear()
        if self.slots is not None:
            self.slots.lose_contents()

    # Looking

    def tokens_of(self, workflow: str) -> int:
        """Return how many tokens of a workflow are believed to be there."""
        if self.slots is None:
            return self.claims.tokens_of(workflow)
        return sum(slot.tokens for slot in self.slots.slots if slot.owner == workflow)

    def workflows(self) -> dict[str, int]:
        """Return who is believed to hold how many tokens."""
        if self.slots is None:
            return {name: self.claims.tokens_of(name) for name in self.claims.by_workflow}
        owners = {slot.owner for slot in self.slots.slots} - {None}
        return {name: self.tokens_of(name) for name in owners if name is not None}

    def holdings(self) -> list[Holding]:
        """Return who could give up what, on engines without slots: those without a call in flight."""
        if self.slots is not None:
            return []
        return [each for each in self.claims.holdings() if each.doing is not Doing.GENERATING]

    def statistics(self) -> MemoryStatistics:
        """Return a snapshot."""
        held, truth = self.workflows(), self.orders.truth()
        effects = dict(self.orders.counts)
        if self.slots is None:
            return MemoryStatistics(len(held), round(self.cache.tokens), None, 0, effects, 0, truth)
        slots = self.slots.slots
        return MemoryStatistics(
            workflows=len(held),
            tokens=sum(slot.tokens for slot in slots),
            slots=len(slots),
            slots_held=sum(slot.held for slot in slots),
            effects=effects,
            saved=0 if self.slots.swaps.pool is None else len(self.slots.swaps.pool),
            truth=truth,
        )

    def check_integrity(self) -> None:
        """Assert the invariants of orders and of who is forgotten later."""
        self.orders.check_integrity()
        assert all(trail.waits for trail in self._leaving.values()), self._leaving
        if self.slots is not None:
            assert set(self._flushing) <= set(self.slots.slots), "of another table"
            assert all(slot.flushed or slot.flush_when_idle for slot in self._flushing), self._flushing
