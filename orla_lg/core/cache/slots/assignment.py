"""Step 3 on engines with slots: a call goes when its workflow can sit down, unless it had better wait for a slot.

The counterpart of ``admission``, which asks whether a cache that all share has room. Here each workflow has slots of
its own (``slots``): who may sit down is known by the table, which slot is taken from whom by ``swaps``, and who waits
for another call's prefill by ``fanout``. This joins them, and remembers who sits where.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from orla_lg.core.cache.gate import Held
from orla_lg.core.cache.slots import fanout

if TYPE_CHECKING:
    from orla_lg.core.cache.ledger import Ledger
    from orla_lg.core.cache.slots.orders import Mover
    from orla_lg.core.cache.slots.swap import Swaps
    from orla_lg.core.cache.slots.table import Seat, SlotTable
    from orla_lg.core.call import Ask
    from orla_lg.core.engine.speed import Speed
    from orla_lg.core.queues import BackendQueue, Queued


class Seating:
    """Who sits in which of one backend's slots. Under the backend's lock; without slots it has nothing to do.

    Args:
        ledger: Whose table it follows: the engine may be started anew with more slots, fewer or none.
        swaps: How slots change hands.
        mover: Has the engine do so; ``None`` where it cannot be told.
    """

    def __init__(self, ledger: Ledger, swaps: Swaps, mover: Mover | None) -> None:
        self.swaps = swaps
        self.seats: dict[Queued, Seat] = {}
        self.again_at_s = inf
        """When to choose again if nothing happens before; monotonic."""
        self.waiting_for_prefix = 0
        """How many calls were seen to wait for another one's prefill when it was last chosen."""
        self._ledger = ledger
        self._mover = mover

    @property
    def _table(self) -> SlotTable:
        table = self._ledger.slots
        assert table is not None, "asked of an engine without slots"
        return table

    def follow(self, count: int | None, *, can_save: bool, weights: str) -> None:
        """Follow what the engine said of itself: how many slots it has, if any, and what can be done with them."""
        before = self._ledger.slots
        self._ledger.seats(count, self.swaps)
        if self._ledger.slots is not before:
            self.seats.clear()  # of a table that is no more
        self.swaps.learned(able=can_save, weights=weights)

    def choose(self, queue: BackendQueue, now: float, speed: Speed) -> Queued | None:
        """Return the call that sits down next, or ``None``; ``again_at_s`` then says when to look again."""
        table = self._table
        held = fanout.better_waiting(table, self.seats, queue, speed, now)
        for each in queue if held or self.waiting_for_prefix else ():
            each.held = Held.PREFIX if each in held else ""
        self.waiting_for_prefix = len(held)
        self.again_at_s = min(table.next_expiry_s(now), *held.values(), inf)
        return queue.next(now, table.eligible(now), held)

    def enter(self, queued: Queued, seat: Seat | None) -> None:
        """Let a call sit down; what its slot held is saved first, and what was saved of it is restored."""
        if seat is None:
            return
        self.seats[queued] = seat
        if seat.swap is not None and self._mover is not None:
            self._mover.swap(self._table, seat.swap)

    def leave(self, queued: Queued) -> Seat | None:
        """Return where a call sat that stands up; ``None`` if nowhere. Idempotent."""
        return self.seats.pop(queued, None)

    def resident_tokens(self, workflow: str, ask: Ask) -> float:
        """Return how much of a prompt its workflow's slots hold, what is being prefilled there included."""
        return fanout.resident_tokens(self._table, self.seats, workflow, ask)

    def tidy(self) -> None:
        """Erase, empty and save ahead while the engine has nothing else to do."""
        if self._ledger.slots is not None and self._mover is not None:
            self._mover.tidy(self._ledger.slots)

    def check_integrity(self, warmed: int) -> None:
        """Assert that seats belong to granted calls, and that all busy slots are theirs or of *warmed* warm-ups."""
        assert all(queued.granted for queued in self.seats)
        if self._ledger.slots is not None:
            self._ledger.slots.check_integrity()
            assert sum(slot.busy for slot in self._ledger.slots.slots) == len(self.seats) + warmed
