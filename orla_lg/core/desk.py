"""One backend's desk: its queue, its ledger and what is known of its engine, under one short lock.

The desk joins the rules of ``queues`` and ``memory``: a call is granted when the queue has room *and* its
workflow can sit down. It starts no I/O by itself except on the background loop.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any

from orla_lg.core.backend import (
    Backend,
    BackendAdapter,
    BackendView,
    Capability,
    Effect,
    Probe,
    SlotControl,
    served_names,
)
from orla_lg.core.background import Background
from orla_lg.core.call import Call
from orla_lg.core.memory import CacheAction, Ledger, MemoryStatistics
from orla_lg.core.policies import RequestPolicy, StagePolicy
from orla_lg.core.queues import BackendQueue, Queued, QueueStatistics
from orla_lg.core.slots import Seat, SlotTable
from orla_lg.errors import BackendUnavailable, OrlaClosed

log = logging.getLogger("orla_lg")

PROBE_PAUSE_S = 1.0
"""An engine that does not answer is asked again at most this often."""

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class BackendStatistics:
    """A backend at one moment."""

    queue: QueueStatistics
    memory: MemoryStatistics
    reachable: bool | None
    """``None`` before the first probe ended."""


class Desk:
    """Queue, ledger and probe of one backend."""

    def __init__(
        self,
        backend: Backend,
        adapter: BackendAdapter,
        background: Background,
        clock: Clock,
        stage_policy: StagePolicy,
        request_policy: RequestPolicy,
    ) -> None:
        self.backend = backend
        self.adapter = adapter
        self.lock = threading.Lock()
        self.queue = BackendQueue(
            backend.name, stage_policy, request_policy, backend.capacity, backend.max_concurrency
        )
        self.ledger = Ledger()
        self.probe: Probe | None = None
        self.fault: BackendUnavailable | None = None
        self._background = background
        self._clock = clock
        self._probing: Future[Probe] | None = None
        self._probe_again_s = float("-inf")
        self._seats: dict[Queued, Seat] = {}
        self._timer_set = False

    # What the engine is

    def connect(self) -> Future[Probe] | None:
        """Start probing the engine if it is not known; returns the probe under way, if any."""
        with self.lock:
            if self._probing is None and self.probe is None and self._clock() >= self._probe_again_s:
                self._probe_again_s = self._clock() + PROBE_PAUSE_S
                self._probing = self._background.submit(self.adapter.probe())
                self._probing.add_done_callback(self._probed)
            return self._probing

    def _probed(self, probing: Future[Probe]) -> None:
        with self.lock:
            self._probing = None
            if probing.cancelled():
                return
            error = probing.exception()
            if error is None:
                self._learn(probing.result())
            elif isinstance(error, BackendUnavailable):
                self.fault = error
            granted = self._pump()
        wake(granted)
        if error is not None and not isinstance(error, BackendUnavailable):
            log.error("probing backend %r failed", self.backend.name, exc_info=error)

    def _learn(self, probe: Probe) -> None:
        self.probe, self.fault = probe, None
        if not probe.slots:
            return
        if self.ledger.slots is None or (self.ledger.slots.count != probe.slots and not self.queue.in_flight):
            self.ledger.slots = SlotTable(probe.slots)
        bound = self.backend.max_concurrency
        self.queue.max_concurrency = probe.slots if bound is None else min(bound, probe.slots)

    def lost(self, fault: BackendUnavailable) -> None:
        """Note that no engine answered: what it held is gone, and it must be probed again."""
        with self.lock:
            self.probe, self.fault = None, fault
            self.ledger.engine_lost()

    def view(self) -> BackendView:
        """Return the backend as mappers see it."""
        return BackendView(
            name=self.backend.name,
            models=served_names(self.backend, self.probe),
            probe=self.probe,
            cost=self.backend.cost,
            quality=self.backend.quality,
            waiting=self.queue.waiting,
            in_flight=self.queue.in_flight,
            max_concurrency=self.queue.max_concurrency,
        )

    # Who may go

    def enter(self, call: Call, *, order: int | None, running: bool, holds_grant: bool) -> Queued:
        """Queue a call, and grant whoever may go now; the returned entry may be granted already.

        Args:
            call: The call.
            order: Its arrival number, when it comes back after a failed attempt.
            running: Whether its workflow runs, and so keeps its slot.
            holds_grant: The caller already holds a grant here: to let it wait for itself would deadlock.

        Raises:
            QueueFull: Too many calls wait.
        """
        with self.lock:
            now = self._clock()
            queued = self.queue.enter(call, now, order=order)
            queued.running = running
            if holds_grant and not self.queue.has_room():
                self._grant(queued, now, extra=True)
            granted = self._pump()
            if queued.waiting:
                queued.turn = Future()
        wake(granted)
        return queued

    def _pump(self) -> list[Queued]:
        """Grant every call that may go; the caller wakes them once the lock is free."""
        granted: list[Queued] = []
        now = self._clock()
        while self.queue.waiting and self.queue.has_room():
            eligible = None if self.ledger.slots is None else self.ledger.slots.eligible(now)
            queued = self.queue.next(now, eligible)
            if queued is None:
                self._wait_for_expiry(now)
                break
            granted.append(self._grant(queued, now))
        return granted

    def _grant(self, queued: Queued, now: float, *, extra: bool = False) -> Queued:
        seat = self.ledger.prepare(queued.call, now, running=queued.running)
        if seat is not None:
            self._seats[queued] = seat
        return self.queue.grant(queued, extra=extra)

    def _wait_for_expiry(self, now: float) -> None:
        expiry = self.ledger.slots.next_expiry_s() if self.ledger.slots is not None else None
        if expiry is None or self._timer_set:
            return
        self._timer_set = True
        self._background.call_later(expiry - now, self._expired)

    def _expired(self) -> None:
        with self.lock:
            self._timer_set = False
            granted = self._pump()
        wake(granted)

    def seat(self, queued: Queued) -> Seat | None:
        """Return the slot given with the grant, on engines with slots."""
        return self._seats.get(queued)

    def leave(self, queued: Queued, *, tokens: int, followed: Callable[[], bool]) -> None:
        """Give the place or the grant back and let the next ones go. Idempotent.

        Args:
            queued: The entry from ``enter``.
            tokens: What the call left in the engine's cache; an estimate where the engine did not say.
            followed: Whether the workflow is still known, asked under the lock so that a run that ends
                at this moment either is seen here or cleans up after us.
        """
        with self.lock:
            was_granted = queued.granted
            if self.queue.leave(queued) and was_granted:
                self._settle(queued, tokens, keep=followed())
            granted = self._pump()
            self._erase_when_quiet()
        wake(granted)

    def _settle(self, queued: Queued, tokens: int, *, keep: bool) -> None:
        seat = self._seats.pop(queued, None)
        self.ledger.settle(queued.call, seat, tokens, self._clock(), followed=keep)

    # What stays cached

    def apply(self, action: CacheAction) -> None:
        """Carry out what the memory policy asked for."""
        with self.lock:
            self.ledger.apply(action)
            granted = self._pump()
            self._erase_when_quiet()
        wake(granted)

    def forget(self, workflow: str) -> None:
        """Drop the ledger's entry of a workflow that will not come back."""
        with self.lock:
            self.ledger.resident.pop(workflow, None)

    def _erase_when_quiet(self) -> None:
        # An engine's erase waits for its current batch (seconds of prefill), and would then hit whoever
        # sits in the slot by that time. So slots are erased only while nothing is in flight, locked; one
        # that is needed earlier is told not to reuse its tokens (``Seat.fresh``).
        if self.queue.in_flight or self.ledger.slots is None or not isinstance(self.adapter, SlotControl):
            return
        if self.probe is None or not self.probe.can(Capability.FLUSH_WORKFLOW):
            return
        for slot in self.ledger.slots.start_erasing():
            self._submit_quietly(self._erase(self.adapter, slot))

    async def _erase(self, adapter: SlotControl, slot: int) -> None:
        effect = Effect.FAILED
        try:
            effect = await adapter.erase(slot)
        finally:
            with self.lock:
                self.ledger.erased(slot, effect)
                granted = self._pump()
            wake(granted)

    def _submit_quietly(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            self._background.submit(work)
        except OrlaClosed:
            log.debug("backend %r: not erased, Orla is closed", self.backend.name)

    # The rest

    def reprioritize(self, touched: Callable[[Call], bool]) -> None:
        """Order waiting calls anew after their hints changed."""
        with self.lock:
            self.queue.reorder(self._clock(), touched)
            granted = self._pump()
        wake(granted)

    def turn_away(self, error: Exception) -> None:
        """End every wait with *error*: Orla closes."""
        with self.lock:
            waiting = [q for mine in self.queue.by_workflow.values() for q in mine.values()]
        for queued in waiting:
            if queued.turn is not None and not queued.turn.done():
                queued.turn.set_exception(error)

    def statistics(self) -> BackendStatistics:
        """Return a snapshot."""
        with self.lock:
            reachable = True if self.probe else False if self.fault else None
            return BackendStatistics(self.queue.statistics(), self.ledger.statistics(), reachable)

    def check_integrity(self) -> None:
        """Assert the invariants of queue and slots, and that seats belong to granted calls."""
        with self.lock:
            self.queue.check_integrity()
            assert all(queued.granted for queued in self._seats)
            if self.ledger.slots is not None:
                self.ledger.slots.check_integrity()
                assert sum(slot.busy for slot in self.ledger.slots.slots) == len(self._seats)


def wake(granted: Sequence[Queued]) -> None:
    """Tell waiting callers that it is their turn; never called under a lock."""
    for queued in granted:
        if queued.turn is None:
            continue
        try:
            queued.turn.set_result(None)
        except InvalidStateError:
            continue  # its caller was cancelled at this moment; it gives the grant back itself
