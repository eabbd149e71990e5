"""How many calls of a key may be in all pools' servers at once: slices that come back when calls end."""

from __future__ import annotations

from concurrent.futures import Future

from orla_lg.core.limits.limits import Limit
from orla_lg.core.limits.usage import NOTHING, Amount, Bound, Scope, SliceSpent, UsageAccount, figures_of
from orla_lg.errors import BudgetExceeded
from orla_lg.serve.access.budgets import HeldSlot
from orla_lg.serve.pools.held import HeldSlice
from orla_lg.serve.pools.shares import AT_ONCE
from orla_lg.serve.pools.slices import SliceBook

ONE = Amount(calls=1)


class PooledSlots:
    """Calls of keys, counted over pools (``budgets.AtOnce``).

    Args:
        book: The slices of this core.
    """

    def __init__(self, book: SliceBook) -> None:
        self._book = book
        self._held: dict[str, HeldSlice] = {}

    def take(self, key_id: str, most: int, refuses: bool = True) -> HeldSlot | None:
        """Count a call in; ``None`` where as many are in as may be, and one more is to be refused."""
        with self._book.lock:
            held, bound = self._of(key_id, most)
            if refuses and not self._fits(held, bound):
                return None
            held.account.promise(ONE)
            if not refuses:
                self._book.look_after(held)
        return HeldSlot(lambda: self._left(held))

    def pending(self, key_id: str, most: int) -> Future[None] | None:
        """Return what a call should wait for before it is counted in; ``None``: nothing."""
        with self._book.lock:
            held, bound = self._of(key_id, most)
            if held.account.open >= most or self._fits(held, bound):
                return None
            return None if self._book.clock() < held.dry_until_s else held.refilled

    def _of(self, key_id: str, most: int) -> tuple[HeldSlice, Bound]:
        held = self._held.get(key_id)
        if held is None:
            held = HeldSlice(self._book, AT_ONCE + key_id, UsageAccount(), is_at_once=True)
            self._held[key_id] = held
        bound = Bound(Scope.KEY, key_id, Limit(calls=most))
        held.under(bound)
        return held, bound

    def _fits(self, held: HeldSlice, bound: Bound) -> bool:
        try:
            held.check(bound, ONE, self._book.clock())
        except (SliceSpent, BudgetExceeded):
            return False
        return True

    def _left(self, held: HeldSlice) -> None:
        with self._book.lock:
            now = self._book.clock()
            held.account.settle(ONE, NOTHING, now)
            if held.waiting and held.has(figures_of(held.account.total.plus(ONE)), now):
                held.notify()
