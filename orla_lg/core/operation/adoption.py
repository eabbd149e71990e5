"""A call that an engine runs already, by a grant of a core that is gone: taken over, then like any other."""

from __future__ import annotations

from collections.abc import Callable

from orla_lg.core.call import Assignment
from orla_lg.core.engine.retry import AttemptFailed
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.lifecycle import Send, Sender, reserve, serve
from orla_lg.core.placement.attempts import give_up
from orla_lg.core.record import Record
from orla_lg.core.steps import Steps


def adopt(
    inflight: InFlightCall, sender: Sender, assignment: Assignment, on_end: Callable[[Record], None] | None = None
) -> Steps:
    """Take over a call whose request an engine runs already, by a grant of a core before this one.

    Neither limits nor the queue refuse it or let it wait: what it uses it uses. When its attempt fails before its
    first token it is a call like any other.

    Args:
        inflight: From ``arrive``.
        sender: Has sent the request.
        assignment: Where it runs.
        on_end: Called with the record when the call ends.
    """
    inflight.on_end, inflight.max_attempts = on_end, sender.max_attempts
    scheduler, holds = inflight.services.schedulers[assignment.backend], inflight.holds
    try:
        if inflight.layers or inflight.services.limits.concern_all:
            reserve(inflight, scheduler, assignment, refuses=False)
        inflight.holds = {assignment.backend}
        inflight.enter(scheduler, assignment)
        inflight.depart()
        inflight.holds = holds
        inflight.tried.append(assignment.backend)
        return (yield Send(sender, inflight))
    except AttemptFailed as failure:
        inflight.missed(failure)
        if len(inflight.tried) >= sender.max_attempts:
            inflight.finish(failure.cause)
            give_up(inflight, failure)
    except BaseException as error:
        inflight.finish(error)
        raise
    return (yield from serve(inflight, sender, on_end))
