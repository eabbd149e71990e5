"""Has an engine erase, save and restore slots: on the background loop, each slot locked until the engine answers.

Orders run to their end whatever becomes of the call they are for: an engine does not take them back, and a slot
with unknown contents can be given to no call. So a call waits for its ``Swap``, and does not carry it out.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from functools import partial

from orla_lg.core.background import Background, Clock
from orla_lg.core.cache.engine_cache import Loan
from orla_lg.core.cache.slots.files import Saved, SavedPool
from orla_lg.core.cache.slots.swap import Swap
from orla_lg.core.cache.slots.table import SlotTable
from orla_lg.core.cache.verification import Order, OrderBook
from orla_lg.core.engine.backend import Effect
from orla_lg.core.engine.capabilities import Copied, SlotStore
from orla_lg.core.memory.events import Verb
from orla_lg.errors import OrlaClosed

LOAN_S = 600.0
"""A file that another engine is to restore is kept for that so long, in seconds."""


class SlotOrders:
    """Carries out what the slot table of one backend decided.

    Args:
        store: The engine's side.
        background: Where orders run.
        lock: The backend's; held by callers of ``swap`` and ``tidy``.
        orders: Every order's effect is noted there.
        clock: Monotonic seconds.
        quiet: Whether the engine has nothing to do and can erase; asked under the lock.
        tell: Called without the lock when an order's effect is noted.
        go_on: Called without the lock when a slot may be given away again.
        doubt: Called without the lock when a slot held next to nothing of what it should.
    """

    def __init__(
        self,
        store: SlotStore,
        background: Background,
        lock: threading.Lock,
        orders: OrderBook,
        clock: Clock,
        *,
        quiet: Callable[[], bool],
        tell: Callable[[], None],
        go_on: Callable[[], None],
        doubt: Callable[[], None],
    ) -> None:
        self._store = store
        self._background = background
        self._lock = lock
        self._orders = orders
        self._clock = clock
        self._quiet = quiet
        self._tell = tell
        self._go_on = go_on
        self._doubt = doubt

    # Swaps

    def swap(self, table: SlotTable, swap: Swap) -> None:
        """Start a swap, unless it is under way; ``swap.ended`` ends when its slot may be used."""
        if swap.begun:
            return
        swap.begun = True
        try:
            self._background.errand(self._swap(table, swap))
        except OrlaClosed:  # nothing was ordered, and nothing will be
            if swap.save is not None:
                table.swaps.saved(swap.save, self._clock(), Effect.FAILED)
            table.swapped(swap, self._clock())
            swap.ended.set_result(None)

    async def _swap(self, table: SlotTable, swap: Swap) -> None:
        try:
            if swap.save is not None:
                await self._save(table, swap.slot, swap.save)
            if swap.restore is not None:
                await self._restore(table, swap)
        finally:
            with self._lock:
                table.swapped(swap, self._clock())
                left = table.slots[swap.slot].idle  # its call did not wait for it
            swap.ended.set_result(None)
            if left:
                self._go_on()

    async def _save(self, table: SlotTable, slot: int, entry: Saved) -> None:
        copied, began_s = Copied(Effect.UNKNOWN), self._clock()
        try:
            copied = await self._store.save(slot, entry.name)
        finally:
            # A restarted engine saves its empty slot without complaint.
            whole = entry.is_whole(copied.tokens)
            effect = copied.effect if whole else Effect.FAILED
            with self._lock:
                now = self._clock()
                table.swaps.saved(entry, now, effect, now - began_s)
                if not whole:
                    table.found_empty(slot, entry)
                self._note(Verb.SAVE, effect, entry.owner)
            self._tell()
            if not whole:
                self._doubt()

    async def _restore(self, table: SlotTable, swap: Swap) -> None:
        assert swap.restore is not None
        effect, began_s = Effect.UNKNOWN, self._clock()
        try:
            effect = await self._store.restore(swap.slot, swap.restore.name)
        finally:
            with self._lock:
                now = self._clock()
                table.swaps.restored(swap, table.slots[swap.slot], now, effect, now - began_s)
                self._note(Verb.RESTORE, effect, swap.workflow)
            self._tell()

    def _note(self, verb: Verb, effect: Effect, workflow: str = "") -> None:
        """Note an order and its effect, in the log of a workflow if the order was for one."""
        self._orders.note(Order(verb, effect), self._orders.order_logs.get(workflow))

    # For other engines of the same folder

    def lend(self, table: SlotTable, entry: Saved, swap: Swap | None, lent: Callable[[Loan | None], None]) -> None:
        """Have *lent* called, without the lock, with a file once it is written; *swap* may have to write it."""
        go = partial(self._background.call_later, 0.0, partial(self._lent, table, entry, lent))
        if swap is None:
            go()
        else:
            self.swap(table, swap)
            swap.ended.add_done_callback(lambda _: go())

    def _lent(self, table: SlotTable, entry: Saved, lent: Callable[[Loan | None], None]) -> None:
        pool, loan = table.swaps.pool, None
        with self._lock:
            if pool is not None and pool.has(entry) and entry.ready and not entry.dropped:
                pool.begin_reading(entry)
                ended = partial(self._background.call_later, 0.0, partial(self._returned, pool, entry))
                loan = Loan(entry.owner, entry.name, entry.prefix, entry.tokens, ended)
        lent(loan)

    def _returned(self, pool: SavedPool, entry: Saved) -> None:
        with self._lock:
            pool.read(entry, self._clock(), ok=False)

    def expires(self, pool: SavedPool, entry: Saved) -> None:
        """Give a borrowed file back that is not of use for ``LOAN_S``: its name is wanted where it comes from."""
        self._background.call_later(LOAN_S, partial(self._expired, pool, entry))

    def _expired(self, pool: SavedPool, entry: Saved) -> None:
        with self._lock:
            pool.drop_one(entry)

    # While the engine is quiet

    def tidy(self, table: SlotTable) -> None:
        """Erase flushed slots, empty flushed files, and save ahead what will hardly be wanted soon."""
        # An engine's erase waits for its current batch (seconds of prefill), and would then hit the call
        # that has the slot by that time. So slots are erased only while nothing is in flight, locked; one
        # that is needed earlier goes with the order not to reuse its tokens (``SlotLease.fresh``).
        if not self._quiet():
            return
        with contextlib.suppress(OrlaClosed):
            for slot in table.start_erasing():
                self._background.errand(self._erase(table, slot))
            if (emptying := table.start_emptying(self._clock())) is not None:
                self._background.errand(self._empty(table, *emptying))
        for swap in table.start_saving_ahead(self._clock()):
            self.swap(table, swap)

    async def _erase(self, table: SlotTable, slot: int) -> None:
        effect = Effect.UNKNOWN
        try:
            effect = await self._store.erase(slot)
        finally:
            with self._lock:
                table.erased(slot, clean=effect is Effect.FREED)
                self._orders.note(Order(Verb.FLUSH, effect), table.slots[slot].take_flush())
            self._tell()
            self._again(table, effect is Effect.FREED)

    async def _empty(self, table: SlotTable, slot: int, name: str) -> None:
        """Overwrite a file with an empty slot: the nearest to deleting it that there is."""
        effect = Effect.UNKNOWN
        try:
            copied = await self._store.save(slot, name)
            effect = Effect.FAILED if copied.tokens else copied.effect
        finally:
            with self._lock:
                table.emptied(slot, name, ok=effect is Effect.SAVED)
                self._note(Verb.FLUSH, Effect.FREED if effect is Effect.SAVED else effect)
            self._again(table, effect is Effect.SAVED)

    def _again(self, table: SlotTable, well: bool) -> None:
        """Let calls go, and go on tidying unless the engine failed."""
        self._go_on()
        if well:
            with self._lock:
                self.tidy(table)
