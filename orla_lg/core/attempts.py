"""Steps 3 to 6: one call's way to an engine, as often as it takes until one answers.

Each attempt is admitted, waits for its turn, and is sent; one that fails before its first token gives all of that
back and tries again, here or at an alternative.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from orla_lg.core.call import Assignment, Call
from orla_lg.core.dispatch import AttemptFailed
from orla_lg.core.inflight import InFlightCall, grants_held
from orla_lg.core.limits.usage import expected
from orla_lg.core.record import Happening
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.core.steps import Send, Sender, Sleep, Steps, Wait, WaitForTurn
from orla_lg.errors import BackendUnavailable, DeadlineExceeded

if TYPE_CHECKING:
    from orla_lg.core.serving import Serving

MAX_REASON_CHARS = 500


class Attempts:
    """A call's attempts, one after the other.

    Args:
        serving: Whose desks, limits and retries.
        flight: The call.
        assignment: Where it was mapped.
    """

    __slots__ = ("_assignment", "_began_s", "_inflight", "_sender", "_serving", "_tried")

    def __init__(self, serving: Serving, inflight: InFlightCall, assignment: Assignment) -> None:
        self._serving = serving
        self._inflight = inflight
        self._assignment = assignment
        self._tried: list[str] = []
        self._began_s = inflight.call.arrived_s
        """When the attempt under way began: the call arrived, or the last attempt failed."""
        self._sender: Sender | None = None

    def steps(self, sender: Sender) -> Steps:
        """Try until an engine answers; the result is the sender's response.

        Raises:
            BudgetExceeded, QueueFull, DeadlineExceeded, OrlaClosed: Nothing was sent.
            BackendUnavailable: No attempt reached an engine.
        """
        inflight, backend = self._inflight, self._assignment.backend
        self._sender = sender
        while True:
            scheduler = self._serving.schedulers[backend]
            self._tried.append(backend)
            try:
                self._promise(scheduler)  # 3 admit
                yield from self._pass_circuit(scheduler)
                yield from self._queue(scheduler)  # 4 queue
                inflight.depart()
                if inflight.swaps:
                    yield from self._prepare(scheduler)  # 5 prepare
                response = yield Send(sender, inflight)  # 6 dispatch
            except AttemptFailed as failure:
                inflight.missed(failure)
                self._began_s = self._serving.clock()
                retry = self._serving.retries.next(
                    failure, self._assignment, self._tried, sender.max_attempts, self._patience_s(inflight.call)
                )
                if retry is None:
                    self._give_up(failure)
                if retry.delay_s:
                    with self._serving.pauses.one() as turn:
                        yield Sleep(retry.delay_s, turn)
                if retry.backend != backend:
                    reason = f"{self._assignment.reason}; instead of {backend!r}: {failure}"
                    self._assignment = replace(self._assignment, reason=reason[:MAX_REASON_CHARS])
                backend = retry.backend
            else:
                inflight.hold()
                return response  # 7 account and 8 signal follow when the flight ends

    def _promise(self, scheduler: BackendScheduler) -> None:
        """Have every limit that the call is under set aside what it is expected to use on this backend."""
        serving, inflight, call = self._serving, self._inflight, self._inflight.call
        if serving.limits.concern(call.layers):
            run = None if call.identity.run is None else serving.book.run(call.identity.run)
            service_s = None if run is None else serving.estimates.service_s(run.course.graph, call.identity.stage)
            asked = expected(call, self._assignment, scheduler.backend.cost, service_s)
            inflight.promise = serving.limits.promise(call, run, asked, inflight.promise)
            call.wall = inflight.promise.wall

    def _pass_circuit(self, scheduler: BackendScheduler) -> Steps:
        """Fail the attempt if the backend is left alone now; wait while another call tries it."""
        call = self._inflight.call
        try:
            while (patience_s := self._patience_s(call)) > 0 and (trial := scheduler.health.admit()) is not None:
                with (
                    scheduler.at_circuit(call),
                    self._serving.pauses.one() as turn,
                    contextlib.suppress(TimeoutError),
                ):
                    yield Wait(trial, min(patience_s, scheduler.health.breaker.policy.trial_s), turn)
        except BackendUnavailable as open_circuit:
            raise AttemptFailed(open_circuit, unreachable=True) from open_circuit

    def _queue(self, scheduler: BackendScheduler) -> Steps:
        inflight, call = self._inflight, self._inflight.call
        patience_s = self._patience_s(call)
        if patience_s <= 0:
            raise self._too_late(call, scheduler)
        self._serving.refresh(call)
        inflight.enter(scheduler, self._assignment, holds_grant=scheduler.backend.name in grants_held())
        turn = inflight.turn
        if turn is None:
            return
        self._serving.tell(Happening.QUEUED, call, backend=scheduler.backend.name)
        try:
            yield WaitForTurn(turn, None if patience_s == math.inf else patience_s)
        except TimeoutError:
            raise self._too_late(call, scheduler) from None

    def _prepare(self, scheduler: BackendScheduler) -> Steps:
        inflight = self._inflight
        yield from inflight.prepare(self._patience_s(inflight.call))
        if self._patience_s(inflight.call) <= 0:
            raise self._too_late(inflight.call, scheduler)

    def _patience_s(self, call: Call) -> float:
        """Return for how long the call may wait: until its deadline, its run's end, its caller's time-out."""
        now = self._serving.clock()
        return min(call.left_s(now), self._timeout_at_s(call) - now)

    def _timeout_at_s(self, call: Call) -> float:
        """Return when the caller's client would have given up, waiting at an engine: it would try as often."""
        if call.timeout is None:
            return math.inf
        assert self._sender is not None, "set before the first wait"
        return self._began_s + call.timeout.seconds * max(1, self._sender.max_attempts - len(self._tried) + 1)

    def _too_late(self, call: Call, scheduler: BackendScheduler) -> Exception:
        now = self._serving.clock()
        waited = now - call.arrived_s
        if call.timeout is not None and self._timeout_at_s(call) - now < call.left_s(now):
            paused = ", which is paused" if scheduler.queue.paused else ""
            return call.timeout.error(f"stage {call.identity.stage!r} waited {waited:.3f} s for backend "
                                      f"{scheduler.backend.name!r}{paused}")  # fmt: skip
        if call.wall is not None and call.wall.until_s < (call.deadline_at_s or math.inf):
            return call.wall.exceeded(
                self._serving.clock(), f", and this call waited {waited:.3f} s for {scheduler.backend.name!r}"
            )
        return DeadlineExceeded(
            f"stage {call.identity.stage!r}: waited {waited:.3f} s for backend {scheduler.backend.name!r}, the "
            f"deadline was {call.hints.deadline_s} s; {scheduler.queue.waiting} calls wait there"
            f"{', and it is paused' if scheduler.queue.paused else ''}"
        )

    def _give_up(self, failure: AttemptFailed) -> NoReturn:
        if not failure.unreachable:
            raise failure.cause from failure.cause.__cause__  # what the engine said, as without us
        schedulers, tried = self._serving.schedulers, self._tried
        where = ", ".join(f"{name!r} ({schedulers[name].backend.url})" for name in dict.fromkeys(tried))
        raise BackendUnavailable(
            f"no engine answered at backend {where} in {len(tried)} attempts: {str(failure.cause).rstrip('.')}; "
            f"is it running? `orla-lg check` probes it"
        ) from failure.cause
