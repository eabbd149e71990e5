"""The slices of a server's core, looked after in the background of its loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from orla_lg.core.serving import Serving
from orla_lg.serve.pools.gone import LEASE_S
from orla_lg.serve.pools.held import EVERY_S
from orla_lg.serve.pools.slices import SliceBook
from orla_lg.serve.store.lease import CoreLease
from orla_lg.serve.store.store import Store

log = logging.getLogger("orla_lg")


class SliceKeeper:
    """Has a core's slices looked after: soon after a call found too little, and now and then.

    Args:
        serving: The core.
        store: The whole, not the pool's part.
        pool: The core's.
        lease: Of the core.
        is_recovered: Whether it is known what the core before has granted.
        go_on: Called on the loop when calls may go again that were held back.
        ends_s: After so long without a core all requests of its replicas have ended.
    """

    def __init__(
        self,
        serving: Serving,
        store: Store,
        pool: str,
        lease: CoreLease,
        *,
        is_recovered: Callable[[], bool],
        go_on: Callable[[], None],
        ends_s: float,
    ) -> None:
        self.book = SliceBook(
            store, pool, lock=serving.limits.lock, epoch=lambda: lease.epoch,
            may_take=lambda: is_recovered() and lease.holds(), is_open=lambda run: serving.book.run(run) is not None,
            wake=self._wake, clock=serving.clock, ends_s=ends_s,
        )  # fmt: skip
        serving.limits.sliced = self.book.slice_of
        self._go_on = go_on
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._working: asyncio.Future[None] | None = None
        self._held_back = self._is_woken = self._is_closed = self._is_given_back = False

    def start(self) -> None:
        """Begin, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._work()

    def _wake(self) -> None:
        """Look soon; called in any thread, under the lock of the accounts."""
        if not self._is_woken and self._loop is not None:
            self._is_woken = True
            with contextlib.suppress(RuntimeError):  # the loop was closed
                self._loop.call_soon_threadsafe(self._work)

    def _work(self) -> None:
        assert self._loop is not None
        if self._is_closed or (self._working is not None and not self._working.done()):
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._is_woken = False
        self._working = self._loop.run_in_executor(None, self.book.work)
        self._working.add_done_callback(self._worked)

    def _worked(self, done: asyncio.Future[None]) -> None:
        assert self._loop is not None
        if self._is_closed or done.cancelled():
            return
        if (fault := done.exception()) is not None:  # calls wait for the next look, whatever this one met
            log.error("slices of limits were not looked after this time", exc_info=fault)
        held_back = not self.book.may_grant()
        if self._held_back and not held_back:
            self._go_on()
        self._held_back = held_back
        if self._is_woken:
            self._work()
        else:
            self._timer = self._loop.call_later(EVERY_S if self.book.is_busy else LEASE_S / 8, self._work)

    async def close(self) -> None:
        """Give back what is free, once a look that is under way has ended. Idempotent."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._working is not None:
            await asyncio.wait([self._working])
        if not self._is_given_back and self._loop is not None:
            self._is_given_back = True
            self.book.close()
