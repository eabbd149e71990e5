"""The life of a linked call, as steps: its graph's own mapper, the core's word, the request, and again.

Retries, other backends, pauses and limits are the core's (``core.lifecycle``, over there): here a call waits for a
grant, sends, and reports. It waits no longer than its deadline and its caller's own time-out, whether there is a core
or not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from math import inf
from typing import Any, Protocol

from orla_lg.core import lifecycle
from orla_lg.core.call import Assignment, Call
from orla_lg.core.engine.retry import AttemptFailed
from orla_lg.core.inflight import grants_held
from orla_lg.core.lifecycle import CLOSED, Send, Sender
from orla_lg.core.mapping import Consultation, foretold
from orla_lg.core.placement.candidates import unplaced
from orla_lg.core.placement.internal_call import InternalCall
from orla_lg.core.placement.view import BackendView
from orla_lg.core.record import Record
from orla_lg.core.steps import Steps, WaitForTurn
from orla_lg.errors import BackendUnavailable, DeadlineExceeded, OrlaClosed
from orla_lg.link.call import LinkedCall
from orla_lg.link.requests import error_of

LATE_S = 0.1
"""So much later than the core a replica gives a call up by itself: the core knows more of what it waited for."""


class ReplicaSide(Protocol):
    """What the steps of a call need of its replica (``serving.LinkedServing``)."""

    def enter(self, call: LinkedCall) -> None:
        """Let a call wait for the core's word, or end, or go on alone."""
        ...

    def leaves(self, call: LinkedCall) -> bool:
        """Let a call go as it was granted; returns whether it may, or waits again."""
        ...

    def views(self, call: Call | None = None) -> list[BackendView]:
        """Return the backends as the core saw them last, on behalf of a call."""
        ...

    def sendable(self) -> Collection[str] | None:
        """Return the backends that calls can be sent to from here; ``None``: all."""
        ...

    def goes_alone(self, call: LinkedCall) -> None:
        """Prepare a call that goes on without its core."""
        ...

    def internal(self, outer: LinkedCall, backend: str, body: Mapping[str, Any], stage: str) -> LinkedCall:
        """Return a call that a mapper needs on the way of another one."""
        ...


def serve(
    replica: ReplicaSide, inflight: LinkedCall, sender: Sender, on_end: Callable[[Record], None] | None = None
) -> Steps:
    """Live one call's life; the result is the sender's response.

    Args:
        replica: Where it is made.
        inflight: From ``LinkedServing.arrive``.
        sender: Carries the request to the backend that is granted.
        on_end: Called with the record when the call ends.

    Raises:
        MappingError, BudgetExceeded, QueueFull, DeadlineExceeded, OrlaClosed: Nothing was sent.
        BackendUnavailable: No attempt reached an engine, or there is no core.
    """
    inflight.on_end, inflight.max_attempts = on_end, sender.max_attempts
    try:
        if inflight.services.closed:
            raise OrlaClosed(CLOSED)
        if inflight.services.guard is not None:
            inflight.services.guard.look_at(inflight.call)
        if inflight.mine:
            inflight.own = yield from _own(replica, inflight)
        inflight.held = tuple(grants_held() if inflight.holds is None else inflight.holds)
        inflight.able = _able(replica, inflight)
        replica.enter(inflight)
        while (yield from _answered(inflight)):
            if inflight.refusal is not None:
                error = _refusal(inflight)
                raise error from error.__cause__
            if not replica.leaves(inflight):
                continue
            try:
                if inflight.backend is None:
                    _goes_past(inflight)
                    return (yield Send(sender, inflight))
                response = yield Send(sender, inflight)
            except AttemptFailed as failure:
                if inflight.cut:
                    raise BackendUnavailable(inflight.cut) from failure.cause
                inflight.missed(failure)
            else:
                inflight.hold()
                return response
    except BaseException as error:
        inflight.finish(error)
        raise
    replica.goes_alone(inflight)
    return (yield from lifecycle.serve(inflight, sender, on_end))


# Before the core


def _own(replica: ReplicaSide, inflight: LinkedCall) -> Steps:
    """Ask the mappers of the call's graph, as long as they have a say: a variant that surely answers goes first."""
    services, call = inflight.services, inflight.call
    variant = services.mappings.variants.get(call.hints.variant or "")
    if variant is not None and (planned := foretold(variant, call.identity.stage)) is not None and not planned.open:
        return None
    ask = Consultation(services.background, partial(_internal_call, replica, inflight))
    views = replica.views(call)
    for mapper in inflight.mine:
        chosen: Assignment | None = yield from ask.mapper(mapper, call, views)
        if chosen is not None:
            return chosen
    return None


def _internal_call(
    replica: ReplicaSide, outer: LinkedCall, backend: str, body: Mapping[str, Any], stage: str, timeout_s: float
) -> Steps:
    """Make an internal call on the way of another one; as in ``lifecycle``, and by the core's grant."""
    internal = replica.internal(outer, backend, body, stage)
    deadline_s = internal.call.hints.deadline_s
    patience_s = timeout_s if deadline_s is None else min(timeout_s, deadline_s)
    return (yield from serve(replica, internal, InternalCall(body, outer.services.background, patience_s)))


def _able(replica: ReplicaSide, inflight: LinkedCall) -> Collection[str] | None:
    """Return the backends that the request can be sent to from here; ``None``: all."""
    able: Callable[[], Collection[str] | None] | None = getattr(inflight.fit, "able", None)
    sendable = None if able is None else able()
    known = replica.sendable()
    if known is None or sendable is None:
        return sendable if known is None else known
    return [name for name in sendable if name in known]


# Its answer


def _answered(inflight: LinkedCall) -> Steps:
    """Wait for the core's word, for as long as the call may; the result is whether it waits for the core at all."""
    left_s = _left_s(inflight)
    try:
        yield WaitForTurn(inflight.turn, None if left_s == inf else max(0.0, left_s) + LATE_S)
    except TimeoutError:
        raise _too_late(inflight) from None
    return not inflight.alone


def _left_s(inflight: LinkedCall) -> float:
    call, now = inflight.call, inflight.services.clock()
    left_s = inf if call.deadline_at_s is None else call.deadline_at_s - now
    return left_s if call.timeout is None else min(left_s, _timeout_at_s(inflight) - now)


def _timeout_at_s(inflight: LinkedCall) -> float:
    """Return when the caller's client would have given up, waiting at an engine: it would try as often."""
    timeout = inflight.call.timeout
    left = max(1, inflight.max_attempts - inflight.attempts)
    return inf if timeout is None else inflight.began_s + timeout.seconds * left


def _too_late(inflight: LinkedCall) -> Exception:
    call, link = inflight.call, inflight.core.link
    waited_s = inflight.services.clock() - call.arrived_s
    waited = f"stage {call.identity.stage!r} waited {waited_s:.3f} s for the core"
    waited += "" if link.up else f", which is lost ({link.fault})"
    if call.timeout is not None and _timeout_at_s(inflight) < (call.deadline_at_s or inf):
        return call.timeout.error(waited)
    return DeadlineExceeded(f"{waited}, the deadline was {call.hints.deadline_s} s")


def _refusal(inflight: LinkedCall) -> BaseException:
    """Return the error that the call ends with."""
    refusal, failure = inflight.refusal, inflight.failure
    assert refusal is not None
    if refusal.kind == "cause" and failure is not None:
        return failure.cause
    if refusal.kind == "timeout" and inflight.call.timeout is not None:
        return inflight.call.timeout.error(refusal.text)
    error = error_of({"timeout": "DeadlineExceeded", "cause": "BackendUnavailable"}.get(refusal.kind, refusal.kind),
                     refusal.text, refusal.more)  # fmt: skip
    if failure is not None:
        error.__cause__ = failure.cause
    return error


def _goes_past(inflight: LinkedCall) -> None:
    """Let a call go where its code says, or end it where that is not wanted.

    Raises:
        MappingError: It is mapped to backends that its request cannot be said to, and is not to pass.
    """
    services, schedulers = inflight.services, inflight.services.schedulers
    if inflight.able is not None and not inflight.able and inflight.fit is not None and schedulers:
        first, *others = schedulers
        inflight.fit(Assignment(first, alternatives=tuple(others)))
    inflight.external = True
    inflight.why_external = inflight.why_external or unplaced(services, inflight.call)
