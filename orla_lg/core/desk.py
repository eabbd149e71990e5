"""One backend's desk: its queue, its ledger and what is known of its engine, under one short lock.

The desk joins the rules of ``queues`` and ``memory``: a call is granted when the queue has room *and* its
workflow can sit down. It starts no I/O by itself except on the background loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from dataclasses import dataclass

from orla_lg.core.backend import Backend, BackendAdapter, Capability, Effect, Probe
from orla_lg.core.background import Background
from orla_lg.core.breaker import Breaker, Circuit
from orla_lg.core.call import Call
from orla_lg.core.control import KVControl, Observable, SlotStore, WorkflowCache
from orla_lg.core.load import LoadWatch
from orla_lg.core.memory import CacheAction, Ledger, MemoryStatistics, Verb
from orla_lg.core.pace import Pace
from orla_lg.core.policies import RequestPolicy, StagePolicy
from orla_lg.core.queues import BackendQueue, Queued, QueueStatistics
from orla_lg.core.slots import Seat, SlotTable
from orla_lg.core.view import BackendView, served_names
from orla_lg.errors import BackendUnavailable, OrlaClosed

log = logging.getLogger("orla_lg")

PROBE_PAUSE_S = 0.5
"""An engine that does not answer is asked again at most this often."""

PROBE_INTEREST_S = 60.0
"""So long after the last call for it, a silent engine is asked again without a new call."""

PROBE_AGAIN_S = 30.0
"""What an engine said of itself is asked anew after this time: it may have been restarted with other flags."""

PROBE_LIMIT_S = 40.0
"""A probe that takes longer has failed, whatever the adapter waits for."""

CLOSED = "this Orla was closed while the call waited"

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class BackendStatistics:
    """A backend at one moment."""

    queue: QueueStatistics
    memory: MemoryStatistics
    reachable: bool | None
    """``None`` before the first probe ended."""
    circuit: Circuit = Circuit.CLOSED
    trips: int = 0
    """How often the circuit opened."""


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
        self.breaker = Breaker()
        self.pace = Pace()
        self.probe: Probe | None = None
        self.fault: BackendUnavailable | None = None
        self.load = LoadWatch(adapter, background, clock) if isinstance(adapter, Observable) else None
        self._eraser = adapter if isinstance(adapter, SlotStore) else None
        self._control = adapter if isinstance(adapter, KVControl) else None
        self._background = background
        self._clock = clock
        self._probing: Future[None] | None = None
        self._trial: Future[None] | None = None
        self._probed_s = float("-inf")
        self._wanted_s = float("-inf")
        self._seats: dict[Queued, Seat] = {}
        self._timer_set = False
        self._closed = False

    # What the engine is

    @property
    def known(self) -> bool:
        """Whether the engine answered when it was last asked."""
        return self.probe is not None and self.fault is None

    def connect(self) -> Future[None] | None:
        """Start probing the engine if it is not known; returns a future for the end of the probe under way.

        An engine that is known is asked anew from time to time, and nobody waits for that.

        That future only ever ends well, and only when what was learned is in place. One waiter's cancellation
        does not reach it, so it is nobody else's.
        """
        now = self._wanted_s = self._clock()
        known = self.known
        if known and now < self._probe_due_s:
            return None
        probing = self._probe_once(now)
        return None if known else probing

    @property
    def _probe_due_s(self) -> float:
        return self._probed_s + (PROBE_AGAIN_S if self.known else PROBE_PAUSE_S)

    def _probe_once(self, now: float) -> Future[None] | None:
        with self.lock:
            if self._probing is not None or now < self._probe_due_s:
                return self._probing
            self._probed_s = now
            asked = self._background.submit(self._ask())
            ended: Future[None] = Future()
            self._probing = ended
            ended.set_running_or_notify_cancel()
        asked.add_done_callback(self._probed)  # not under the lock: a probe that has ended calls back at once
        return ended

    async def _ask(self) -> Probe:
        async with asyncio.timeout(PROBE_LIMIT_S):
            return await self.adapter.probe()

    def _probed(self, asked: Future[Probe]) -> None:
        error = CancelledError() if asked.cancelled() else asked.exception()
        with self.lock:
            ended, self._probing = self._probing, None
            if error is None:
                self._learn(asked.result())
            elif isinstance(error, BackendUnavailable):
                self.fault = error
            else:
                self.fault = BackendUnavailable(f"probing backend {self.backend.name!r} failed: {error!r}")
            if self.fault is not None and self._clock() - self._wanted_s < PROBE_INTEREST_S:
                self._background.call_later(PROBE_PAUSE_S, self._probe_again)
            granted = self._pump()
        wake(granted)
        assert ended is not None, "set before the probe could end"
        ended.set_result(None)
        if not isinstance(error, BackendUnavailable | CancelledError | TimeoutError | None):
            log.error("probing backend %r failed", self.backend.name, exc_info=error)

    def _probe_again(self) -> None:
        if self.fault is not None:
            with contextlib.suppress(OrlaClosed):
                self._probe_once(self._clock())

    def _learn(self, probe: Probe) -> None:
        if self.probe is not None and probe.incarnation != self.probe.incarnation:
            self.ledger.engine_lost()
        if self.fault is not None:  # it was gone and is back: as good a sign as a trial call
            self._close_circuit()
        self.probe, self.fault = probe, None
        table = self.ledger.slots
        if (0 if table is None else table.count) != (probe.slots or 0):
            self.ledger.slots = SlotTable(probe.slots) if probe.slots else None
            self._seats.clear()  # seats in a table that is no more
        self.queue.max_concurrency = min(filter(None, (self.backend.max_concurrency, probe.slots)), default=None)

    # Whether it is well

    def lost(self, fault: BackendUnavailable) -> None:
        """Note that no engine answered: what it held may be gone, and it must be probed again.

        What it said of itself is kept until it says something else. If it can tell its incarnation, the
        next probe decides whether its cache is gone; else we believe nothing any more.
        """
        with self.lock:
            self.fault = fault
            if self.probe is None or not self.probe.incarnation:
                self.ledger.engine_lost()
        self._background.call_later(PROBE_PAUSE_S, self._probe_again)

    def failed(self, fault: BackendUnavailable, *, unreachable: bool) -> None:
        """Note that an attempt failed through the engine's fault."""
        with self.lock:
            was_closed = self.breaker.opened_s is None
            if self.breaker.failed(self._clock(), str(fault), unreachable=unreachable):
                said = "backend %r: circuit open after %d failures in a row, the last: %s"
                level = logging.WARNING if was_closed else logging.DEBUG  # an outage is told once
                log.log(level, said, self.backend.name, self.breaker.failures, fault)
                self._end_trial()
        if unreachable:
            self.lost(fault)

    def answered(self) -> None:
        """Note a sign of life."""
        if self.breaker.failures:
            with self.lock:
                self._close_circuit()

    def doubt(self, said: str) -> None:
        """Note that the engine is not what it said it was (a model is gone): it is asked anew."""
        served = ", ".join(self.probe.models) if self.probe and self.probe.models else "models it does not list"
        log.warning("backend %r at %s does not know the model or the path (it served %s): %s",
                    self.backend.name, self.backend.url, served, said)  # fmt: skip
        self._probed_s = float("-inf")
        self.connect()

    def admit(self) -> Future[None] | None:
        """Let a call go (``None``), or return what to wait for while another call tries the engine.

        Raises:
            BackendUnavailable: The circuit is open.
        """
        if not self.breaker.failures:
            return None
        with self.lock:
            now = self._clock()
            if self.breaker.admit(now):
                return None
            if self.breaker.state(now) is Circuit.OPEN:
                raise BackendUnavailable(
                    f"the circuit of backend {self.backend.name!r} is open for another "
                    f"{self.breaker.retry_at_s - now:.1f} s after {self.breaker.failures} failures in a row, "
                    f"the last: {self.breaker.reason}"
                )
            if self._trial is None:
                self._trial = Future()
                self._trial.set_running_or_notify_cancel()  # one waiter's cancellation is nobody else's
            return self._trial

    def _close_circuit(self) -> None:
        if self.breaker.succeeded():
            log.warning("backend %r: circuit closed, it answers again", self.backend.name)
        self._end_trial()

    def _end_trial(self) -> None:
        trial, self._trial = self._trial, None
        if trial is not None:
            # Its waiters only wake up and ask again; none of them runs in here.
            self._background.call_later(0.0, lambda: trial.set_result(None))

    def view(self, workflow: str | None = None) -> BackendView:
        """Return the backend as mappers see it, on behalf of a workflow."""
        return BackendView(
            name=self.backend.name,
            models=served_names(self.backend, self.probe),
            probe=self.probe,
            cost=self.backend.cost,
            quality=self.backend.quality,
            waiting=self.queue.waiting,
            in_flight=self.queue.in_flight,
            max_concurrency=self.queue.max_concurrency,
            circuit=self.breaker.state(self._clock()),
            speed=self.pace.speed,
            load=None if self.load is None else self.load.wanted(self.probe),
            resident_tokens=0 if workflow is None else self.ledger.tokens_of(workflow),
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
            OrlaClosed: Nobody waits here any more.
        """
        with self.lock:
            if self._closed:
                raise OrlaClosed(CLOSED)
            now = self._clock()
            queued = self.queue.enter(call, now, order=order)
            queued.running = running
            granted = self._pump()
            if queued.waiting and holds_grant:
                self._grant(queued, now, extra=True)
            elif queued.waiting:
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
            if self.ledger.apply(action):
                self._tell_engine(action)
            granted = self._pump()
            self._erase_when_quiet()
        wake(granted)

    def _tell_engine(self, action: CacheAction) -> None:
        capability = Capability.FLUSH_WORKFLOW if action.verb is Verb.FLUSH else Capability.RELEASE
        said = self.probe.capabilities.get(capability) if self.probe is not None else None
        if self._control is not None and said is not None and said.usable and self.fault is None:
            with contextlib.suppress(OrlaClosed):
                self._background.submit(self._order(self._control, action))
        elif action.verb is Verb.FLUSH:
            self.ledger.note(action.verb, Effect.UNSUPPORTED)

    async def _order(self, control: KVControl, action: CacheAction) -> None:
        do = control.flush if action.verb is Verb.FLUSH else control.release
        effect = Effect.FAILED
        try:
            effect = await do(WorkflowCache(action.workflow))
        finally:
            with self.lock:
                self.ledger.note(action.verb, effect)

    def forget(self, workflow: str) -> None:
        """Drop the ledger's entry of a workflow that will not come back."""
        with self.lock:
            self.ledger.resident.pop(workflow, None)

    def _erase_when_quiet(self) -> None:
        # An engine's erase waits for its current batch (seconds of prefill), and would then hit whoever
        # sits in the slot by that time. So slots are erased only while nothing is in flight, locked; one
        # that is needed earlier is told not to reuse its tokens (``Seat.fresh``).
        if self.queue.in_flight or self.ledger.slots is None or self._eraser is None or self.fault is not None:
            return
        if self.probe is None or not self.probe.can(Capability.FLUSH_WORKFLOW):
            return
        for slot in self.ledger.slots.start_erasing():
            with contextlib.suppress(OrlaClosed):
                self._background.submit(self._erase(self._eraser, self.ledger.slots, slot))

    async def _erase(self, adapter: SlotStore, table: SlotTable, slot: int) -> None:
        effect = Effect.FAILED
        try:
            effect = await adapter.erase(slot)
        finally:
            with self.lock:
                self.ledger.erased(table, slot, effect)
                granted = self._pump()
            wake(granted)

    # The rest

    def reprioritize(self, touched: Callable[[Call], bool]) -> None:
        """Order waiting calls anew after their hints changed."""
        with self.lock:
            self.queue.reorder(self._clock(), touched)
            granted = self._pump()
        wake(granted)

    def turn_away(self) -> None:
        """End every wait with ``OrlaClosed``, and let nobody wait any more."""
        with self.lock:
            self._closed = True
            waiting = [q for mine in self.queue.by_workflow.values() for q in mine.values()]
        for queued in waiting:
            assert queued.turn is not None, "who waits has something to wait for"
            with contextlib.suppress(InvalidStateError):  # granted or cancelled at this moment
                queued.turn.set_exception(OrlaClosed(CLOSED))

    def statistics(self) -> BackendStatistics:
        """Return a snapshot."""
        with self.lock:
            reachable = False if self.fault else True if self.probe else None
            circuit = self.breaker.state(self._clock())
            return BackendStatistics(
                self.queue.statistics(), self.ledger.statistics(), reachable, circuit, self.breaker.trips
            )

    def check_integrity(self) -> None:
        """Assert the invariants of queue and slots, and that seats belong to granted calls."""
        with self.lock:
            self.queue.check_integrity()
            self.breaker.check_integrity()
            assert all(queued.granted for queued in self._seats)
            if self.ledger.slots is not None:
                self.ledger.slots.check_integrity()
                assert sum(slot.busy for slot in self.ledger.slots.slots) == len(self._seats)


def wake(granted: Sequence[Queued]) -> None:
    """Tell waiting callers that it is their turn; never called under a lock."""
    for queued in granted:
        if queued.turn is not None:
            with contextlib.suppress(InvalidStateError):  # cancelled at this moment: its caller leaves by itself
                queued.turn.set_result(None)
