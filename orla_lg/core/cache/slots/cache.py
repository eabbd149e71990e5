"""``EngineCache`` for engines with slots: the table says which slot a call gets, its swap what is saved and restored.

A call goes when its workflow can have a slot (``table``), unless waiting for a busy one of its own is better
(``fanout``). ``orders`` has the engine erase, save and restore.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf

from orla_lg.core.boundary.complete import complete
from orla_lg.core.cache.engine_cache import AdmissionStatistics, Loan, MemoryStatistics, PrefetchLease
from orla_lg.core.cache.gate import Held
from orla_lg.core.cache.slots import fanout
from orla_lg.core.cache.slots.files import Saved
from orla_lg.core.cache.slots.orders import SlotOrders
from orla_lg.core.cache.slots.swap import Swaps
from orla_lg.core.cache.slots.table import SlotLease, SlotTable
from orla_lg.core.cache.verification import Order, OrderBook, OrderLog
from orla_lg.core.call import CHARS_PER_TOKEN, Ask, Call, Usage, in_common
from orla_lg.core.engine.backend import Capability, Effect, Probe
from orla_lg.core.engine.speed import Speed
from orla_lg.core.memory.events import CacheAction, Doing, Holding, Verb
from orla_lg.core.queues import BackendQueue, Queued


class SlotCache:
    """Numbered slots, each of one workflow.

    Args:
        count: How many the engine has.
        orders: What was asked of the engine.
        swaps: How slots change hands.
        slot_orders: Carries the swaps out; ``None`` where the engine takes no such orders.
        isolated: No slot's tokens are reused for another tenant.
        folder: Where the engine saves, as it is named for all engines that save there; empty: it is not.
    """

    prefetches_alone = True
    lets_all = False
    """Which call may enter depends on the slots."""

    def __init__(
        self, count: int, orders: OrderBook, swaps: Swaps, slot_orders: SlotOrders | None, *, isolated: bool = False,
        folder: str = "",
    ) -> None:  # fmt: skip
        self.slots = count
        self.orders = orders
        self.swaps = swaps
        self.table = SlotTable(count, swaps=swaps, isolated=isolated)
        self.leases: dict[Queued, SlotLease] = {}
        self.again_at_s = inf
        self.waiting_for_prefix = 0
        self._slot_orders, self._folder = slot_orders, folder
        self._prefetching: dict[PrefetchLease, SlotLease] = {}

    def learned(self, probe: Probe, offers: Callable[[Capability], bool]) -> None:
        """Follow whether the engine can save slots, and which weights it serves."""
        self.swaps.learned(able=offers(Capability.SAVE_RESTORE), weights=probe.weights)

    # Calls

    def choose(self, queue: BackendQueue, now: float, speed: Speed) -> Queued | None:
        """Return the call that gets a slot next, or ``None`` if none can have one now."""
        held = fanout.better_waiting(self.table, self.leases, queue, speed, now)
        for each in queue if held or self.waiting_for_prefix else ():
            each.held = Held.PREFIX if each in held else ""
        self.waiting_for_prefix = len(held)
        self.again_at_s = min(self.table.next_expiry_s(now), *held.values(), inf)
        return queue.next(now, self.table.eligible(now), held)

    def enter(self, queued: Queued, now: float, speed: Speed) -> float:
        """Give a call its slot; what that held is saved first, and what was saved of the workflow is restored.

        A call granted beyond the bound may find no slot left: the engine then places it itself.
        """
        call, workflow = queued.call, queued.call.identity.workflow
        lease = self.table.acquire(workflow, call.ask.prefix, now, hold=queued.running, must=queued.extra)
        if lease is None:
            self.table.strayed(call.id)
        elif lease.fresh and not lease.strange:
            self.orders.note(Order(Verb.FLUSH, Effect.DEFERRED), self.table.slots[lease.slot].take_flush())
        queued.expected = self.orders.claim(workflow, self._in_slot(call.ask, lease), 0, now)
        queued.lease = lease
        if lease is not None:
            self.leases[queued] = lease
            if lease.swap is not None and self._slot_orders is not None:
                self._slot_orders.swap(self.table, lease.swap)
        return 0.0

    def _in_slot(self, ask: Ask, lease: SlotLease | None) -> int:
        """Return the tokens of a prompt that its slot holds: as the engine counted, or by length if that is less."""
        if lease is None or (lease.fresh and lease.swap is None):
            return 0
        slot = self.table.slots[lease.slot]
        there = slot if lease.swap is None or lease.swap.restore is None else lease.swap.restore
        common = in_common(there.prefix, ask.prefix)
        return min(there.tokens, sum(chars for _, chars in ask.pieces[:common]) // CHARS_PER_TOKEN)

    def first_token(self, queued: Queued) -> bool:
        """Return False: a call waits for a slot of its workflow, which is free only when the call in it ends."""
        return False

    def leave(self, queued: Queued, usage: Usage | None, now: float, *, tokens: int, followed: bool) -> None:
        """Give a call's slot back; the workflow holds it while it goes on."""
        if tokens:
            self.orders.called(queued.call.identity.workflow, queued.call.id)
        if (lease := self.leases.pop(queued, None)) is not None:
            self.table.release_lease(lease, queued.call.ask.prefix, tokens, now, hold=followed)
        else:
            self.table.stray_ended(queued.call.id)

    def expected(self, call: Call, ask: Ask) -> float:
        """Return how many tokens of a call's prompt its workflow's slots hold, those being prefilled included."""
        return fanout.resident_tokens(self.table, self.leases, call.identity.workflow, ask)

    # Workflows

    def apply(self, action: CacheAction) -> OrderLog | None:
        """Give a workflow's slots up at once, or let others take them; the engine erases in a quiet moment."""
        if (carry_out := _CARRIES_OUT[action.verb]) is not None:
            carry_out(self, action, self.orders.order_logs.get(action.workflow))
        return None

    def flush(self, action: CacheAction, order_log: OrderLog | None) -> None:
        """Give a workflow's slots up, and have them erased and its files emptied in a quiet moment."""
        for slot in self.table.slots:
            if slot.owner == action.workflow and order_log is not None:
                slot.flush_asked = order_log
        for _ in range(self.table.flush(action.workflow)):
            self.orders.note(Order(action.verb, Effect.DEFERRED), order_log)

    def release(self, action: CacheAction, order_log: OrderLog | None) -> None:
        """Let others take a workflow's slots."""
        if self.table.release(action.workflow):
            self.orders.note(Order(action.verb, Effect.DEMOTED), order_log)

    def took_effect(self, action: CacheAction, order_log: OrderLog, effect: Effect, now: float) -> None:
        """Note what came of an order that was given before the engine had slots."""
        self.orders.answered(order_log, Order(action.verb, effect))

    def turned(self, workflow: str, doing: Doing, now: float) -> None:
        """Note what a workflow waits for, outside of any model."""
        self.table.turned(workflow, doing)

    def forget(self, workflow: str) -> None:
        """Drop the order log of a workflow that will not come back."""
        self.orders.forget(workflow)

    def lose(self) -> None:
        """Expect no contents any more: the engine may have been restarted."""
        self.table.lose_contents()

    def close(self) -> None:
        """Give up slots that the engine does not have any more: what was to be erased was not."""
        for slot in self.table.slots:
            if slot.flush_asked is not None:
                self.orders.note(Order(Verb.FLUSH, Effect.FAILED), slot.take_flush())

    def tidy(self) -> None:
        """Erase, empty and save ahead while the engine has nothing else to do."""
        if self._slot_orders is not None:
            self._slot_orders.tidy(self.table)

    # Moves

    @property
    def shelf(self) -> str:
        """Names the folder and the weights, where slots are saved and the folder is said."""
        pool = self.swaps.pool
        if not self._folder or pool is None or not pool.weights or not self.swaps.saves or self._slot_orders is None:
            return ""
        return f"{self._folder} {pool.weights} {self.table.isolated}"

    def lend(self, workflow: str, now: float, lent: Callable[[Loan | None], None]) -> bool:
        """Have the slot that holds most of a workflow saved, unless it is; without one, lend what is saved."""
        pool, swap = self.swaps.pool, None
        if not self.shelf or pool is None or self._slot_orders is None:
            return False
        own = [slot for slot in self.table.slots if slot.owner == workflow and slot.tokens and not slot.busy]
        slot = max(own, key=lambda each: each.tokens, default=None)
        if slot is None:
            entry = pool.find(workflow, lambda each: each.tokens)
        elif (entry := pool.copy_of(workflow, slot.prefix)) is None:
            swap = self.table.start_lending(slot, now)
            entry = None if swap is None else swap.save
        if entry is None:
            return False
        self._slot_orders.lend(self.table, entry, swap, lent)
        return True

    def borrow(self, loan: Loan, now: float) -> None:
        """Have it restored into the slot that the workflow's next call gets, as what was saved here is."""
        pool = self.swaps.pool
        if pool is None or self._slot_orders is None:
            loan.ended()
            return
        entry = Saved(loan.name, loan.workflow, loan.prefix, loan.tokens, Doing.TOOL, used_s=now, ready=True)
        pool.borrow(entry, loan.ended)
        self._slot_orders.expires(pool, entry)

    # Prefetches

    def missing(self, workflow: str, ask: Ask, tokens: int) -> float:
        """Return the tokens of a prompt that neither its workflow's slots nor its saved files hold."""
        return tokens - _of_messages(ask, tokens, self.table.reusable(workflow, ask.prefix))

    def evicts(
        self, workflow: str, ask: Ask, tokens: int, missing: float, now: float, spared: Callable[[str], bool]
    ) -> float | None:
        """Return the tokens that a prefetch would drive out; ``None`` where it finds no slot."""
        slot = self.table.slot_for_prefetch(workflow, ask.prefix, now, spared)
        return None if slot is None else max(0.0, slot.tokens - _of_messages(ask, tokens, slot.common(ask.prefix)))

    def acquire_prefetch(
        self, workflow: str, ask: Ask, tokens: int, now: float, spared: Callable[[str], bool]
    ) -> PrefetchLease:
        """Give a prefetch its slot, which is believed to hold no more than what both have in common."""
        slot = self.table.slot_for_prefetch(workflow, ask.prefix, now, spared)
        assert slot is not None, "a place was found under the same lock"
        lease = self.table.acquire_for_prefetch(workflow, slot, now)
        if lease.fresh and not lease.strange:
            self.orders.note(Order(Verb.FLUSH, Effect.DEFERRED), slot.take_flush())
        common = slot.common(ask.prefix)
        slot.prefix = slot.prefix[:common]
        slot.tokens = min(slot.tokens, round(_of_messages(ask, tokens, common)))
        prefetch = PrefetchLease(ask, lease.slot, lease.fresh)
        self._prefetching[prefetch] = lease
        return prefetch

    def release_prefetch(self, prefetch: PrefetchLease, tokens: int) -> None:
        """End a prefetch; its workflow goes on holding the slot."""
        lease = self._prefetching.pop(prefetch)
        since_s = self.table.slots[lease.slot].last_used_s
        self.table.release_lease(lease, prefetch.ask.prefix, tokens, since_s, hold=True)

    def recall(self, slot: int, workflow: str, prefix: tuple[int, ...], tokens: int, used_s: float) -> None:
        """Let a workflow own the slot that it had under a core before this one."""
        self.table.recall(slot, workflow, prefix, tokens, used_s)

    def next_expiry_s(self, now: float) -> float:
        """Return when (monotonic) the first slot may be taken that is held now."""
        return self.table.next_expiry_s(now)

    # Looking

    def tokens_of(self, workflow: str) -> int:
        """Return how many tokens of a workflow are believed to be there."""
        return sum(slot.tokens for slot in self.table.slots if slot.owner == workflow)

    def workflows(self) -> dict[str, int]:
        """Return the workflows that own slots, and how many tokens these are believed to hold."""
        owners = {slot.owner for slot in self.table.slots}
        return {name: self.tokens_of(name) for name in owners if name is not None}

    def interrupted(self) -> set[str]:
        """Return the workflows that own a slot and wait for a human."""
        return {slot.owner for slot in self.table.slots if slot.owner is not None and slot.doing is Doing.HUMAN}

    def holdings(self) -> list[Holding]:
        """Return nothing: room is made by taking slots."""
        return []

    def statistics(self) -> MemoryStatistics:
        """Return a snapshot."""
        slots = self.table.slots
        return MemoryStatistics(
            workflows=len({slot.owner for slot in slots} - {None}),
            tokens=sum(slot.tokens for slot in slots),
            slots=len(slots),
            slots_held=sum(slot.held for slot in slots),
            effects=dict(self.orders.counts),
            saved=0 if self.swaps.pool is None else len(self.swaps.pool),
            truth=self.orders.truth(),
        )

    def admission_statistics(self) -> AdmissionStatistics | None:
        """Return ``None``: a call is admitted by finding a slot."""
        return None

    def check_integrity(self) -> None:
        """Assert that leases belong to granted calls, and that all busy slots are theirs or a prefetch's."""
        self.orders.check_integrity()
        self.table.check_integrity()
        assert all(queued.granted for queued in self.leases)
        assert sum(slot.busy for slot in self.table.slots) == len(self.leases) + len(self._prefetching)
        for slot in self.table.slots:
            assert slot.flush_asked is None or slot.flushed or slot.flush_when_idle, slot


_CARRIES_OUT: Mapping[Verb, Callable[[SlotCache, CacheAction, OrderLog | None], None] | None] = complete(
    Verb,
    {
        Verb.WARM: None,
        Verb.PIN: None,
        Verb.RELEASE: SlotCache.release,
        Verb.FLUSH: SlotCache.flush,
        Verb.SAVE: None,
        Verb.RESTORE: None,
    },
    "_CARRIES_OUT in orla_lg.core.cache.slots.cache",
)
"""What is done with a workflow's slots for a verb. ``None``: nothing; a workflow that runs holds its slot anyway, a
warm-up goes by ``core.prefetch``, and what is saved and restored the table decides itself."""


def _of_messages(ask: Ask, tokens: int, messages: int) -> float:
    """Return the tokens of a prompt's first *messages* messages, by their length."""
    every = sum(chars for _, chars in ask.pieces)
    return tokens * sum(chars for _, chars in ask.pieces[:messages]) / every if every else 0.0
