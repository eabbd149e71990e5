"""The life of a call, in eight steps: the file to read first.

``arrive`` makes the call, ``serve`` lives its life as a generator: it decides by itself and *yields* whatever takes
time (waiting for a turn, a pause, the request itself) as a ``Step``; ``drive`` and ``adrive`` carry steps out
(``steps``) in a thread or in a task. So sync and async callers differ in how they wait and in nothing else.

1. **identify**: the edge finds out where the call comes from (``graph.context``, ``identity``).
2. **map**: stage to backend, model, parameters; validated (``mapping``), and allowed (``guard``).
3. **admit**: every limit sets aside what the call is expected to use, and the backend's circuit lets it try.
4. **queue**: it waits for its grant (``scheduler``, ``queues``, ``policies``).
5. **prepare**: its slot is made its own, on engines with slots.
6. **dispatch**: the edge sends it. An attempt that fails before its first token gives all of that back and begins
   again, here or at an alternative.
7. **account** and 8. **signal**: ``InFlightCall.finish``, when the response has ended, which may be long after
   ``serve`` returned it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any, NamedTuple, Protocol, Required, TypedDict

from orla_lg.core.call import NO_HINTS, Ask, Assignment, Call, CallerTimeout, Hints
from orla_lg.core.engine.retry import AttemptFailed
from orla_lg.core.guard.access import on_behalf
from orla_lg.core.identity import Identity
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.limits.limits import LimitScope
from orla_lg.core.limits.patience import left_of, once_refilled, patience_of, too_late
from orla_lg.core.limits.usage import expected
from orla_lg.core.lookahead.run_share import RunShare
from orla_lg.core.mapping import Consultation, Mapper, assign
from orla_lg.core.placement.attempts import give_up
from orla_lg.core.placement.candidates import BackendCandidates, unplaced
from orla_lg.core.placement.embeddings import beside, naming
from orla_lg.core.placement.internal_call import InternalCall, InternalMapping
from orla_lg.core.record import Record
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.core.services import Services
from orla_lg.core.steps import Sleep, Steps, Wait, WaitForTurn
from orla_lg.core.workflow import of_tenant
from orla_lg.errors import BackendUnavailable, OrlaClosed

log = logging.getLogger("orla_lg")

CLOSED = "this Orla is closed; make a new one to go on"

MAX_REASON_CHARS = 500

LEAST_S = 1e-3
"""Seconds that are left of a deadline that has passed, where there must be some."""

SWAP_PATIENCE_S = 90.0
"""A swap is two orders, each of which waits for the batch that the engine works on; adapters bound them."""


class Sender(Protocol):
    """The edge that carries the bytes: one request, ready to be sent to whichever backend is chosen."""

    max_attempts: int

    def send(self, inflight: InFlightCall) -> Any:
        """Send and return the response.

        Raises:
            AttemptFailed: It failed before its first token and may be tried again.
        """
        ...

    async def asend(self, inflight: InFlightCall) -> Any:
        """``send`` for a running loop."""
        ...


class Send(NamedTuple):
    """Send the request."""

    sender: Sender
    inflight: InFlightCall

    def run(self) -> Any:  # noqa: D102
        return self.sender.send(self.inflight)

    async def arun(self) -> Any:  # noqa: D102
        return await self.sender.asend(self.inflight)


class CallArrival(TypedDict, total=False):
    """What a call arrives with beside where it comes from and what it asks for."""

    call_id: Required[str]  # from ``services.new_id``
    said: Hints  # given with the call itself; these win
    hints: Hints  # from the run, the node and its configuration
    mappers: Iterable[Mapper]  # asked before the shared mapper
    layers: Sequence[LimitScope]  # limits that hold for it beside those for all
    timeout: CallerTimeout | None  # of the client that the code called; ``None`` waits as long as it takes
    may_pass: bool  # whether it goes where its code says if nothing places it


def arrive(
    services: Services,
    identity: Identity,
    ask: Ask,
    *,
    call_id: str,
    said: Hints = NO_HINTS,
    hints: Hints = NO_HINTS,
    mappers: Iterable[Mapper] = (),
    layers: Sequence[LimitScope] = (),
    timeout: CallerTimeout | None = None,
    may_pass: bool = False,
    kind: type[InFlightCall] = InFlightCall,
) -> InFlightCall:
    """Return a call that arrived now, with what ``CallArrival`` has, made as *kind*.

    Raises:
        MappingError: Its hints name a variant that does not exist.
    """
    run = None if identity.run is None else services.book.run(identity.run)
    identity, merged = of_tenant(beside(identity) if ask.embeds else identity, said.over(hints), run)
    if run is not None and (not run.settled or identity.workflow != run.workflow):
        services.memory.signal(services.book.joined(run, identity.workflow))
    chain, now = services.mappings.chain(mappers, merged.variant), services.clock()
    chain = naming(chain, identity.stage) if ask.embeds else chain
    standing = RunShare(now) if run is None else run.standing
    call = Call(call_id, identity, ask, said, merged, now, standing, timeout=timeout, may_pass=may_pass)
    if run is not None:
        services.lookahead.expect(call, run)
    return kind(services, call, chain, layers)


def serve(inflight: InFlightCall, sender: Sender, on_end: Callable[[Record], None] | None = None) -> Steps:
    """Live one call's life; the result is the sender's response.

    When the response is still being streamed, the grant stays with *inflight* until the stream ends, breaks, is
    closed or is dropped.

    Args:
        inflight: From ``arrive``.
        sender: Carries the request to the backend that is chosen.
        on_end: Called with the record when the call ends.

    Raises:
        MappingError, AccessDenied, BudgetExceeded, QueueFull, DeadlineExceeded, OrlaClosed: Nothing was sent.
        BackendUnavailable: No attempt reached an engine.
    """
    inflight.on_end, inflight.max_attempts = on_end, sender.max_attempts
    call, services = inflight.call, inflight.services
    try:
        if services.closed:
            raise OrlaClosed(CLOSED)
        if services.guard is not None:
            services.guard.look_at(call)
        assignment = yield from _map(inflight)  # 2 map
        if assignment is None:
            inflight.external = True
            return (yield Send(sender, inflight))
        backend = assignment.backend
        while True:
            scheduler = services.schedulers[backend]
            inflight.tried.append(backend)
            try:
                if inflight.layers or services.limits.concern_all:  # 3 admit
                    yield from once_refilled(reserve, inflight, scheduler, assignment)
                if scheduler.health.breaker.failures:
                    yield from _pass_circuit(inflight, scheduler)
                if (patience_s := patience_of(inflight)) <= 0:  # 4 queue
                    raise too_late(inflight, scheduler)
                services.book.refresh(call)
                turn = inflight.enter(scheduler, assignment)
                if turn is not None:
                    try:
                        yield WaitForTurn(turn, None if patience_s == inf else patience_s)
                    except TimeoutError:
                        raise too_late(inflight, scheduler) from None
                inflight.depart()
                if inflight.slot_lease is not None and inflight.slot_lease.swap is not None:  # 5 prepare
                    yield from _prepare(inflight, scheduler)
                response = yield Send(sender, inflight)  # 6 dispatch
            except AttemptFailed as failure:
                inflight.missed(failure)
                if failure.moved and (moved := (yield from _map(inflight))) is not None:
                    inflight.tried.pop()
                    assignment, backend = moved, moved.backend
                    continue
                retry = services.retries.next(
                    failure, assignment, inflight.tried, sender.max_attempts, patience_of(inflight)
                )
                if retry is None:
                    give_up(inflight, failure)
                if retry.delay_s:
                    with services.pauses.one() as turn:
                        yield Sleep(retry.delay_s, turn)
                if retry.backend != backend:
                    reason = f"{assignment.reason}; instead of {backend!r}: {failure}"
                    assignment = replace(assignment, reason=reason[:MAX_REASON_CHARS])
                backend = retry.backend
            else:
                inflight.hold()
                return response  # 7 account and 8 signal follow: ``InFlightCall.finish``
    except BaseException as error:
        inflight.finish(error)
        raise


def pass_by(inflight: InFlightCall, sender: Sender, on_end: Callable[[Record], None] | None = None) -> Steps:
    """Let a call that the core does not place go where its code says, and record it as external."""
    inflight.on_end, inflight.external = on_end, True
    try:
        if inflight.services.guard is not None:
            inflight.services.guard.narrowed(inflight.call, None)
        return (yield Send(sender, inflight))
    except BaseException as error:
        inflight.finish(error)
        raise


# 2 map


def _map(inflight: InFlightCall) -> Steps:
    """Return the backends that a call may go to as an assignment; ``None``: it goes where its code says."""
    # Of its own, so that a call that waits for its turn does not keep what its mapper was shown.
    services, call, moving = inflight.services, inflight.call, inflight.services.mappings.moving
    candidates = BackendCandidates(services.schedulers, call, services.clock)
    ask = Consultation(services.background, partial(_internal_call, inflight))
    mappers = inflight.mappers if moving is None else moving(inflight.mappers)
    assignment: Assignment | None = yield from assign(call, mappers, candidates, ask)
    if assignment is None:
        inflight.why_external = unplaced(services, call)
    elif inflight.fit is not None:
        assignment = inflight.fit(assignment)
    return assignment if services.guard is None else services.guard.narrowed(call, assignment)


def _internal_call(
    inflight: InFlightCall, backend: str, body: Mapping[str, Any], stage: str, timeout_s: float
) -> Steps:
    """Make an internal call on the way of another one, in its workflow and with its priority."""
    services, call = inflight.services, inflight.call
    identity, left_s = replace(call.identity, stage=stage), left_of(inflight, services.clock())
    deadline_s = None if call.hints.deadline_s is None else max(left_s, LEAST_S)
    said = replace(call.hints, variant=None, deadline_s=deadline_s)
    internal = arrive(
        services, identity, Ask(backend, body["messages"]), call_id=services.new_id(), said=said,
        layers=inflight.layers, timeout=call.timeout,
    )  # fmt: skip
    internal.call.access = on_behalf(call.access, call.identity.stage)
    internal.mappers = (InternalMapping(backend, stage),)  # a mapping of its stage must not send it round in a circle
    sender = InternalCall(body, services.background, min(timeout_s, max(left_s, LEAST_S)))
    return (yield from serve(internal, sender))


# 3 admit


def reserve(
    inflight: InFlightCall, scheduler: BackendScheduler, assignment: Assignment, *, refuses: bool = True
) -> None:
    """Have every limit that the call is under set aside what it is expected to use on this backend."""
    services, call = inflight.services, inflight.call
    run = None if call.identity.run is None else services.book.run(call.identity.run)
    service_s = None
    if run is not None:
        service_s = services.lookahead.estimates.service_s(run.trace.graph, call.identity.stage)
    asked = expected(call, assignment, scheduler.backend.cost, service_s)
    inflight.reservation = services.limits.promise(
        call, inflight.layers, run, asked, inflight.reservation, refuses=refuses
    )


def _pass_circuit(inflight: InFlightCall, scheduler: BackendScheduler) -> Steps:
    """Fail the attempt if the backend is left alone now; wait while another call tries it."""
    health, pauses = scheduler.health, inflight.services.pauses
    try:
        while (patience_s := patience_of(inflight)) > 0 and (trial := health.admit()) is not None:
            with health.at_circuit(inflight.call), pauses.one() as turn, contextlib.suppress(TimeoutError):
                yield Wait(trial, min(patience_s, health.breaker.policy.trial_s), turn)
    except BackendUnavailable as open_circuit:
        raise AttemptFailed(open_circuit, unreachable=True) from open_circuit


# 5 prepare


def _prepare(inflight: InFlightCall, scheduler: BackendScheduler) -> Steps:
    """Wait until the call's slot is its own: what lay there saved, what the workflow left restored."""
    assert inflight.slot_lease is not None and inflight.slot_lease.swap is not None
    # After a time-out it goes on: an engine that answers no order will not answer the call either.
    began_s = inflight.services.clock()
    with contextlib.suppress(TimeoutError), inflight.services.pauses.one() as turn:
        yield Wait(inflight.slot_lease.swap.ended, min(SWAP_PATIENCE_S, patience_of(inflight)), turn)
    inflight.swap_s = inflight.services.clock() - began_s
    if patience_of(inflight) <= 0:
        raise too_late(inflight, scheduler)
