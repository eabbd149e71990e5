"""The eight steps in order: the file to read first.

``Serving.steps`` is one call's life as a generator. It decides by itself and *yields* whatever takes time
(waiting for a turn, a pause, the request itself) as an ``Effect``; ``drive`` and ``adrive`` carry effects
out (``effects``) in a thread or in a task. So sync and async callers differ in how they wait and in nothing else.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

from orla_lg.core.backend import Backend, BackendAdapter
from orla_lg.core.background import Background
from orla_lg.core.call import NO_HINTS, Ask, Assignment, Call, Hints
from orla_lg.core.costs import CostBook, Costs
from orla_lg.core.desk import BackendStatistics, Clock, Desk
from orla_lg.core.dispatch import AttemptFailed, RetryPolicy
from orla_lg.core.effects import Send, Sender, Sleep, Steps, Wait
from orla_lg.core.flight import Flight, grants_held
from orla_lg.core.identity import Identity
from orla_lg.core.journal import Journal
from orla_lg.core.learners import Learners
from orla_lg.core.mapping import Consultation, Mapper, assign
from orla_lg.core.memory import CacheEvent, MemoryPolicy
from orla_lg.core.own import Ours, OwnCall
from orla_lg.core.policies import RequestPolicy, StagePolicy
from orla_lg.core.record import CallEvent, Happening, Record, RecordBook
from orla_lg.core.view import BackendView
from orla_lg.core.workflow import Outcome, RunState, WorkflowBook, WorkflowStatistics
from orla_lg.errors import BackendUnavailable, DeadlineExceeded, MappingError, OrlaClosed, did_you_mean

PROBE_PATIENCE_S = 3.0
"""How long a first call waits for its backend to say what it is."""

MAX_REASON_CHARS = 500

CLOSE_PATIENCE_S = 2.0
"""How long ``close`` waits for adapters to close their connections."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """An ``Orla`` at one moment."""

    backends: dict[str, BackendStatistics]
    workflows: WorkflowStatistics
    calls: int
    """Calls ended since the start."""
    records_dropped: int
    external: int
    """Calls that were not ours to place."""
    unidentified: int
    """Calls made while graphs ran whose context was lost on the way."""
    costs: Costs
    unwritten: int
    """Lines that the records file could not take."""


class Serving:
    """One core: what ``wrap``, ``ChatOrla`` and the gateway all hold."""

    def __init__(
        self,
        adapters: Mapping[Backend, BackendAdapter],
        *,
        mapper: Mapper | None,
        stage_policy: StagePolicy,
        request_policy: RequestPolicy,
        memory: MemoryPolicy,
        keep_records: int = 10_000,
        journal: Journal | None = None,
        max_idle_threads: int = 10_000,
        clock: Clock = time.monotonic,
        background: Background | None = None,
    ) -> None:
        self.background = background or Background()
        self.clock = clock
        self.mapper = mapper
        self.memory = memory
        self.book = WorkflowBook(max_idle=max_idle_threads)
        self.records = RecordBook(keep_records)
        self.costs = CostBook()
        self.journal = journal
        self.learners = Learners()
        self.learners.enlist(mapper)
        self.desks = {
            backend.name: Desk(backend, adapter, self.background, clock, stage_policy, request_policy)
            for backend, adapter in adapters.items()
        }
        self.retries = RetryPolicy()
        self.variants: dict[str, Mapper] = {}
        """Sparse overrides of the mapping, by name; replaced as a whole, never changed."""
        self._counts = threading.Lock()
        self._external = 0
        self._unidentified = 0
        self.closed = False
        self._ids = itertools.count(1)
        self._tag = f"{os.getpid():x}{time.time_ns() & 0xFFFFFF:06x}"

    # Step 1 is the edge's: it knows who calls (graph.context) and builds the call from that.

    def new_id(self) -> str:
        """Return an id for a call, unique in this process and unlikely to meet another's."""
        return f"{self._tag}-{next(self._ids)}"

    def call(
        self,
        identity: Identity,
        ask: Ask,
        *,
        call_id: str,
        said: Hints = NO_HINTS,
        hints: Hints = NO_HINTS,
        mappers: Iterable[Mapper] = (),
        may_pass: bool = False,
    ) -> Call:
        """Return a call that arrived now.

        Args:
            identity: Who calls.
            ask: What for.
            call_id: From ``new_id``.
            said: Hints given with the call itself; these win.
            hints: Hints from the run, the node and its configuration.
            mappers: Asked before the shared mapper.
            may_pass: Whether a call that nobody places goes where its code says.
        """
        chain = (*mappers, self.mapper) if self.mapper is not None else tuple(mappers)
        merged = said.over(hints)
        if merged.variant is not None:
            chain = (self._variant(merged.variant), *chain)
        return Call(call_id, identity, ask, said, merged, self.clock(), chain, may_pass)

    def _variant(self, name: str) -> Mapper:
        if name not in self.variants:
            raise MappingError(f"variant {name!r} does not exist{did_you_mean(name, self.variants)}")
        return self.variants[name]

    def steps(self, call: Call, sender: Sender, on_end: Callable[[Record], None] | None = None) -> Steps:
        """Live one call's life; the result is the sender's response.

        When the response is still being streamed, the grant stays with its ``Flight`` until the stream
        ends, breaks, is closed or is dropped.

        Args:
            call: Who calls, and what for.
            sender: Carries the request to the backend that is chosen.
            on_end: Told the record when the call ends.

        Raises:
            MappingError, QueueFull, DeadlineExceeded, OrlaClosed: Nothing was sent.
            BackendUnavailable: No attempt reached an engine.
        """
        flight = Flight(self, call, on_end)
        try:
            if self.closed:
                raise OrlaClosed("this Orla is closed; make a new one to go on")
            yield from self._connect()
            views = self.views(call.identity.workflow)
            ask = Consultation(self.background, partial(self._own_call, call))
            assignment = yield from assign(call, views, ask)  # 2 map
            if assignment is None:
                flight.pass_by()
                return (yield Send(sender, flight))
            return (yield from self._attempts(flight, assignment, sender))
        except BaseException as error:
            flight.finish(error)
            raise

    def _own_call(self, call: Call, backend: str, body: Mapping[str, Any], stage: str, timeout_s: float) -> Steps:
        """Make a call of our own on the way of *call*, in its workflow and with its priority."""
        identity = replace(call.identity, stage=stage)
        own = self.call(
            identity, Ask(backend, body["messages"]), call_id=self.new_id(), said=replace(call.hints, variant=None)
        )
        own.mappers = (Ours(backend, stage),)  # a mapping of its stage must not send it round in a circle
        return (yield from self.steps(own, OwnCall(body, self.background, timeout_s)))

    def pass_by(self, call: Call, sender: Sender, on_end: Callable[[Record], None] | None = None) -> Steps:
        """Let a call that we do not place go where its code says, and record it as external."""
        flight = Flight(self, call, on_end)
        flight.pass_by()
        try:
            return (yield Send(sender, flight))
        except BaseException as error:
            flight.finish(error)
            raise

    def _connect(self) -> Steps:
        """Let backends that were never reached say what they are, for a bounded time."""
        for desk in self.desks.values():
            if (probing := desk.connect()) is not None and desk.fault is None:
                with contextlib.suppress(TimeoutError):  # the attempt itself will say it better
                    yield Wait(probing, PROBE_PATIENCE_S)

    def _attempts(self, flight: Flight, assignment: Assignment, sender: Sender) -> Steps:
        backend, tried = assignment.backend, list[str]()
        while True:
            desk = self.desks[backend]
            tried.append(backend)
            try:
                yield from self._pass_circuit(desk, flight.call)
                yield from self._queue(flight, desk, assignment)  # 3 admit, 4 queue
                flight.depart()  # 5 prepare
                response = yield Send(sender, flight)  # 6 dispatch
            except AttemptFailed as failure:
                flight.missed(failure)
                retry = self.retries.next(failure, assignment, tried, sender.max_attempts)
                if retry is None:
                    self._give_up(failure, tried)
                if retry.delay_s:
                    yield Sleep(retry.delay_s)
                if retry.backend != backend:
                    reason = f"{assignment.reason}; instead of {backend!r}: {failure}"
                    assignment = replace(assignment, reason=reason[:MAX_REASON_CHARS])
                backend = retry.backend
            else:
                flight.hold()
                return response  # 7 account and 8 signal follow when the flight ends

    def _pass_circuit(self, desk: Desk, call: Call) -> Steps:
        """Fail the attempt if the backend is left alone now; wait while another call tries it."""
        try:
            while (patience_s := self._patience_s(call)) > 0 and (trial := desk.admit()) is not None:
                with contextlib.suppress(TimeoutError):
                    yield Wait(trial, min(patience_s, desk.breaker.policy.trial_s))
        except BackendUnavailable as open_circuit:
            raise AttemptFailed(open_circuit, unreachable=True) from open_circuit

    def _queue(self, flight: Flight, desk: Desk, assignment: Assignment) -> Steps:
        call, patience_s = flight.call, self._patience_s(flight.call)
        if patience_s <= 0:
            raise self._too_late(call, desk)
        self._refresh(call)
        flight.enter(desk, assignment, holds_grant=desk.backend.name in grants_held())
        turn = flight.turn
        if turn is None:
            return
        self.tell(Happening.QUEUED, call, backend=desk.backend.name)
        try:
            yield Wait(turn, None if patience_s == math.inf else patience_s)
        except TimeoutError:
            raise self._too_late(call, desk) from None

    def _patience_s(self, call: Call) -> float:
        return math.inf if call.deadline_at_s is None else call.deadline_at_s - self.clock()

    def _too_late(self, call: Call, desk: Desk) -> DeadlineExceeded:
        waited = self.clock() - call.arrived_s
        return DeadlineExceeded(
            f"stage {call.identity.stage!r}: waited {waited:.3f} s for backend {desk.backend.name!r}, the "
            f"deadline was {call.hints.deadline_s} s; {desk.queue.waiting} calls wait there"
        )

    def _give_up(self, failure: AttemptFailed, tried: list[str]) -> NoReturn:
        if not failure.unreachable:
            raise failure.cause from failure.cause.__cause__  # what the engine said, as without us
        where = ", ".join(f"{name!r} ({self.desks[name].backend.url})" for name in dict.fromkeys(tried))
        raise BackendUnavailable(
            f"no engine answered at backend {where} in {len(tried)} attempts: {str(failure.cause).rstrip('.')}; "
            f"is it running? `orla-lg check` probes it"
        ) from failure.cause

    # Step 8, and what the graph tells

    def signal(self, events: Iterable[CacheEvent]) -> None:
        """Ask the memory policy about *events* and have its actions carried out."""
        for event in events:
            for action in self.memory.decide(event):
                for name, desk in self.desks.items():
                    if action.backend in (None, name):
                        desk.apply(action)
            if event.final:
                for desk in self.desks.values():
                    desk.forget(event.workflow)

    def run_started(self, run: str, *, thread: str | None, parent: str | None = None) -> RunState:
        """Open a run of a root graph."""
        state = self.book.run_started(run, thread=thread, parent=parent)
        self._tell(CallEvent(Happening.RUN_STARTED, self.clock(), state.workflow, run))
        return state

    def run_ended(self, run: str, outcome: Outcome) -> None:
        """Close a run; its workflow's cache is released or flushed."""
        state = self.book.run(run)
        if state is None:
            return
        ended = state.ends(outcome)
        self.signal(self.book.run_ended(run, ended))
        self._tell(CallEvent(Happening.RUN_ENDED, self.clock(), state.workflow, run, detail=str(ended)))

    def thread_deleted(self, thread_id: str) -> None:
        """Free what a deleted thread kept."""
        self.signal(self.book.thread_deleted(thread_id))

    def prioritize(self, run: str, priority: float) -> bool:
        """Give a run's later calls, and those already waiting, another priority; False if it is not open."""
        state = self.book.run(run)
        if state is None:
            return False
        state.priority = priority
        for desk in self.desks.values():
            desk.reprioritize(lambda call: call.identity.run == run and self._refresh(call))
        return True

    def _refresh(self, call: Call) -> bool:
        """Give *call* its run's priority of this moment; returns whether that changed it."""
        run = None if call.identity.run is None else self.book.run(call.identity.run)
        if run is None or run.priority in (None, call.hints.priority) or call.said.priority is not None:
            return False
        call.hints = Hints(priority=run.priority).over(call.hints)
        return True

    def account(self, record: Record) -> None:
        """Keep, sum up and write down how a call went, and let mappers learn from it."""
        self.records.add(record)
        self.costs.add(record)
        if self.journal is not None:
            self.journal.record(record)
        if not record.external:
            self.learners.note(record)

    def feedback(self, record_id: str, score: float) -> None:
        """Let mappers learn how good the answer of a call was, 0 to 1.

        Raises:
            RecordUnknown: There is no such record, or it is no longer kept.
        """
        record = self.records.find(record_id)
        self.learners.feedback(record, score)
        if self.journal is not None:
            self.journal.feedback(record_id, score)

    def tell(self, kind: Happening, call: Call, *, backend: str | None = None, detail: str = "") -> None:
        """Tell listeners of a turn in a call's life."""
        if self.records.heard:
            who = call.identity
            self.records.tell(
                CallEvent(kind, self.clock(), who.workflow, who.run, who.stage, call.id, backend, detail)
            )

    def _tell(self, event: CallEvent) -> None:
        if self.records.heard:
            self.records.tell(event)

    def count_lost(self) -> None:
        """Count a call whose graph is not known."""
        with self._counts:
            self._unidentified += 1

    def count_external(self) -> None:
        """Count a call that was not ours to place."""
        with self._counts:
            self._external += 1

    # The state now

    def views(self, workflow: str | None = None) -> list[BackendView]:
        """Return the backends as mappers see them, on behalf of a workflow."""
        return [desk.view(workflow) for desk in self.desks.values()]

    def serves(self, model: str) -> bool:
        """Whether *model* in code means one of our backends."""
        return any(model in view.models for view in self.views())

    def statistics(self) -> Statistics:
        """Return a snapshot."""
        return Statistics(
            backends={name: desk.statistics() for name, desk in self.desks.items()},
            workflows=self.book.statistics(),
            calls=self.records.total,
            records_dropped=self.records.dropped,
            external=self._external,
            unidentified=self._unidentified,
            costs=self.costs.statistics(),
            unwritten=0 if self.journal is None else self.journal.dropped,
        )

    def check_integrity(self) -> None:
        """Assert the invariants of all state."""
        self.book.check_integrity()
        for desk in self.desks.values():
            desk.check_integrity()

    def close(self) -> None:
        """Refuse new calls, end waiting ones with ``OrlaClosed``, stop background work. Idempotent."""
        if self.closed:
            return
        self.closed = True
        for desk in self.desks.values():
            desk.turn_away()
        closing = [self.background.submit(desk.adapter.aclose()) for desk in self.desks.values()]
        concurrent.futures.wait(closing, timeout=CLOSE_PATIENCE_S)
        self.background.close()
        if self.journal is not None:
            self.journal.close()
