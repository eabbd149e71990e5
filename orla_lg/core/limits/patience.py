"""How long a call may wait: until its deadline, the end of its run's time, its caller's time-out; and for a slice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from math import inf
from typing import Any

from orla_lg.core.boundary.plain import counted
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.limits.usage import RunDeadline, SliceSpent
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.core.steps import Steps, Wait
from orla_lg.errors import DeadlineExceeded

SLICE_WAIT_S = 1.0
"""A call waits so long at most for a slice of a limit that several cores share."""


def wall_of(inflight: InFlightCall) -> RunDeadline | None:
    """Return the end of its run's time, once limits let the call in."""
    return None if inflight.reservation is None else inflight.reservation.wall


def left_of(inflight: InFlightCall, now: float) -> float:
    """Return the seconds until its deadline or the end of its run's time; infinity where it has neither."""
    deadline_s, wall = inflight.call.deadline_at_s, wall_of(inflight)
    if deadline_s is None and wall is None:
        return inf
    return min(inf if deadline_s is None else deadline_s, inf if wall is None else wall.until_s) - now


def patience_of(inflight: InFlightCall) -> float:
    """Return for how many seconds the call may wait from now."""
    call, now = inflight.call, inflight.services.clock()
    unbound = call.hints.deadline_s is None and inflight.reservation is None
    left_s = inf if unbound else left_of(inflight, now)
    return left_s if call.timeout is None else min(left_s, _timeout_at_s(inflight) - now)


def _timeout_at_s(inflight: InFlightCall) -> float:
    """Return when the caller's client would have given up, waiting at an engine: it would try as often."""
    timeout = inflight.call.timeout
    if timeout is None:
        return inf
    return inflight.began_s + timeout.seconds * max(1, inflight.max_attempts - len(inflight.tried) + 1)


def too_late(inflight: InFlightCall, scheduler: BackendScheduler) -> Exception:
    """Return the error of a call that may wait no longer for a backend."""
    call, now, wall = inflight.call, inflight.services.clock(), wall_of(inflight)
    waited, paused = now - call.arrived_s, scheduler.queue.paused
    if call.timeout is not None and _timeout_at_s(inflight) - now < left_of(inflight, now):
        return call.timeout.error(f"stage {call.identity.stage!r} waited {waited:.3f} s for backend "
                                  f"{scheduler.backend.name!r}{', which is paused' if paused else ''}")  # fmt: skip
    if wall is not None and wall.until_s < (call.deadline_at_s or inf):
        return wall.exceeded(now, f", and this call waited {waited:.3f} s for {scheduler.backend.name!r}")
    return DeadlineExceeded(
        f"stage {call.identity.stage!r}: waited {waited:.3f} s for backend {scheduler.backend.name!r}, the "
        f"deadline was {call.hints.deadline_s} s; {counted(scheduler.queue.waiting, 'call')} in the queue there"
        f"{', and it is paused' if paused else ''}"
    )


def once_refilled(reserve: Callable[..., None], inflight: InFlightCall, *more: Any) -> Steps:
    """Have *reserve* set aside what a call needs; wait for the next slice where this core's slice does not suffice.

    Raises:
        BudgetExceeded: A limit is spent, or no slice came.
    """
    clock, pauses, until_s = inflight.services.clock, inflight.services.pauses, inf
    while True:
        try:
            reserve(inflight, *more)
        except SliceSpent as short:
            until_s = min(until_s, clock() + SLICE_WAIT_S)
            if (left_s := min(until_s - clock(), patience_of(inflight))) <= 0:
                raise short.fault from None
            refilled = short.refilled
        else:
            return
        with pauses.one() as turn, contextlib.suppress(TimeoutError):
            yield Wait(refilled, left_s, turn)
