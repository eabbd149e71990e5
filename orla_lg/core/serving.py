"""The eight steps in order: the file to read first.

``Serving.steps`` is one call's life as a generator. It decides by itself and *yields* whatever takes time
(waiting for a turn, a pause, the request itself) as an ``Effect``; ``drive`` and ``adrive`` carry effects
out (``effects``) in a thread or in a task. So sync and async callers differ in how they wait and in nothing else.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from orla_lg.core.amendments import RecordUpdates
from orla_lg.core.attempts import Attempts
from orla_lg.core.background import Background, Clock
from orla_lg.core.cache.isolation import Salts
from orla_lg.core.cache.verification import Order, Verification
from orla_lg.core.call import NO_HINTS, Ask, Call, Hints
from orla_lg.core.candidates import BackendCandidates
from orla_lg.core.dispatch import RetryPolicy
from orla_lg.core.engine.backend import Backend, BackendAdapter
from orla_lg.core.identity import Identity
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.internal_call import InternalCall, InternalMapping
from orla_lg.core.journal import Journal
from orla_lg.core.learners import Learners
from orla_lg.core.limits.book import LimitBook, LimitStatistics
from orla_lg.core.limits.costs import CostBook, Costs
from orla_lg.core.limits.limits import NO_LIMITS, Limits, LimitScope
from orla_lg.core.lookahead.lookahead import Lookahead
from orla_lg.core.mapping import Consultation, Mapper, assign
from orla_lg.core.memory.events import CacheEvent, MemoryPolicy
from orla_lg.core.memory.manager import MemoryManager
from orla_lg.core.memory.returns import ReturnBook
from orla_lg.core.policies import DEFAULT_REQUEST, DEFAULT_STAGE, RequestChoice, StageChoice, policies
from orla_lg.core.prefetch.book import WarmUp
from orla_lg.core.progress import GraphProgress
from orla_lg.core.queues import Policies
from orla_lg.core.record import CallEvent, Happening, Record, RecordBook
from orla_lg.core.resources import hold, was_closed
from orla_lg.core.scheduler import BackendScheduler, BackendStatistics
from orla_lg.core.standing import RunShare
from orla_lg.core.steering import Steering
from orla_lg.core.steps import Send, Sender, Steps
from orla_lg.core.turn import Pauses
from orla_lg.core.view import BackendView
from orla_lg.core.workflow import WorkflowBook, WorkflowStatistics, of_tenant
from orla_lg.errors import MappingError, OrlaClosed, did_you_mean

log = logging.getLogger("orla_lg")

MANY_MODELS = 100

LEAST_S = 1e-3
"""Seconds that are left of a deadline that has passed, where there must be some."""

CLOSED = "this Orla is closed; make a new one to go on"

CLOSE_PATIENCE_S = 2.0
"""How long ``close`` waits for orders on their way, and then for adapters to close their connections."""


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
    limits: list[LimitStatistics] = field(default_factory=list)
    """How far limits are used up: of stages and tenants seen lately, and of the runs that are open."""


class Serving:
    """One core: what ``wrap``, ``ChatOrla`` and the gateway all hold."""

    def __init__(
        self,
        adapters: Mapping[Backend, BackendAdapter],
        *,
        mapper: Mapper | None,
        stage_policy: StageChoice = DEFAULT_STAGE,
        request_policy: RequestChoice = DEFAULT_REQUEST,
        memory: MemoryPolicy,
        admission: bool = True,
        keep_records: int = 10_000,
        journal: Journal | None = None,
        limits: Limits = NO_LIMITS,
        estimates_file: str | Path | None = None,
        max_idle_threads: int = 10_000,
        warm_up: WarmUp | None = None,
        clock: Clock = time.monotonic,
        background: Background | None = None,
    ) -> None:
        self.background = background or Background()
        self.clock = clock
        self.mapper = mapper
        self.book = WorkflowBook(max_idle=max_idle_threads)
        self.records = RecordBook(keep_records)
        self.costs = CostBook()
        self.journal = journal
        self.amendments = RecordUpdates(self.records, journal, self.book.is_running)
        self.limits = LimitBook(limits, clock)
        self.foresight = Lookahead(self.background, clock, estimates_file)
        self.estimates = self.foresight.estimates
        self.warm_up = warm_up
        """What warm-ups may take; ``None``: there are none."""
        self.learners = Learners()
        self.learners.enlist(mapper)
        self._admission = admission
        self._salts = Salts()
        self._returns = ReturnBook()
        self.schedulers = {
            backend.name: self._scheduler(backend, adapter, policies(backend.name, stage_policy, request_policy))
            for backend, adapter in adapters.items()
        }
        """In the order of the configuration."""
        self.steering = Steering(self.schedulers)
        self.memory = MemoryManager(memory, self.schedulers, self.background, clock, self._returns)
        self.progress = GraphProgress(
            self.book, self.foresight, self.memory, self.records, self.amendments, clock,
            looks_ahead=warm_up is not None,
        )  # fmt: skip
        self.retries = RetryPolicy()
        self.variants: dict[str, Mapper] = {}
        """Sparse overrides of the mapping, by name; replaced as a whole, never changed."""
        self._counts = threading.Lock()
        self._external = 0
        self._unidentified = 0
        self._unplaced: set[str] = set()
        """Models of calls that were let pass, as far as that was told."""
        self.pauses = Pauses()
        self.closed = False
        self._ids = itertools.count(1)
        self._tag = f"{os.getpid():x}{time.time_ns() & 0xFFFFFF:06x}"
        self.resources = hold(self, adapters, owned=background is None)

    def _scheduler(self, backend: Backend, adapter: BackendAdapter, ordered_by: Policies) -> BackendScheduler:
        return BackendScheduler(
            backend, adapter, self.background, self.clock, ordered_by, self.estimates, self,
            admission=self._admission, warm_up=self.warm_up, returns=self._returns, salts=self._salts,
        )  # fmt: skip

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
        layers: tuple[LimitScope, ...] = (),
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
            layers: Limits that hold for it beside those for all.
            may_pass: Whether a call that nobody places goes where its code says.
        """
        chain = (*mappers, self.mapper) if self.mapper is not None else tuple(mappers)
        run = None if identity.run is None else self.book.run(identity.run)
        identity, merged = of_tenant(identity, said.over(hints), run)
        if run is not None and (not run.settled or identity.workflow != run.workflow):
            self.progress.joined(run, identity.workflow)
        if merged.variant is not None:
            chain = (self._variant(merged.variant), *chain)
        now = self.clock()
        standing = RunShare(now) if run is None else run.standing
        call = Call(call_id, identity, ask, said, merged, now, chain, standing, may_pass=may_pass, layers=layers)
        if run is not None:
            self.foresight.expect(call, run)
        return call

    def _variant(self, name: str) -> Mapper:
        if name not in self.variants:
            raise MappingError(f"variant {name!r} does not exist{did_you_mean(name, self.variants)}")
        return self.variants[name]

    def steps(self, call: Call, sender: Sender, on_end: Callable[[Record], None] | None = None) -> Steps:
        """Live one call's life; the result is the sender's response.

        When the response is still being streamed, the grant stays with its ``InFlightCall`` until the stream
        ends, breaks, is closed or is dropped.

        Args:
            call: Who calls, and what for.
            sender: Carries the request to the backend that is chosen.
            on_end: Told the record when the call ends.

        Raises:
            MappingError, BudgetExceeded, QueueFull, DeadlineExceeded, OrlaClosed: Nothing was sent.
            BackendUnavailable: No attempt reached an engine.
        """
        inflight = InFlightCall(self, call, on_end)
        try:
            if self.closed:
                raise OrlaClosed(CLOSED)
            assignment = yield from self._map(call)  # 2 map
            if assignment is None:
                self._tell_unplaced(call)
                inflight.pass_by()
                return (yield Send(sender, inflight))
            return (yield from Attempts(self, inflight, assignment).steps(sender))  # 3 admit … 6 dispatch
        except BaseException as error:
            inflight.finish(error)
            raise

    def _tell_unplaced(self, call: Call) -> None:
        """Warn, once for each model, that calls in a wrapped graph go past us: their user may not mean that."""
        model = call.ask.model
        if model not in self._unplaced and len(self._unplaced) < MANY_MODELS:
            self._unplaced.add(model)
            log.warning(
                "stage %r calls model %r, which is no backend of ours, and no mapping names the stage: such calls go "
                "where their code says, past queues and limits; mapper={'*': %r} would serve them here",
                call.identity.stage, model, next(iter(self.schedulers)),
            )  # fmt: skip

    def _map(self, call: Call) -> Steps:
        # Of its own, so that a call that waits for its turn does not keep what its mapper was shown.
        ask = Consultation(self.background, partial(self._own_call, call))
        return (yield from assign(call, BackendCandidates(self.schedulers, call, self.clock), ask))

    def _own_call(self, call: Call, backend: str, body: Mapping[str, Any], stage: str, timeout_s: float) -> Steps:
        """Make a call of our own on the way of *call*, in its workflow and with its priority."""
        identity, left_s = replace(call.identity, stage=stage), call.left_s(self.clock())
        deadline_s = None if call.hints.deadline_s is None else max(left_s, LEAST_S)
        said = replace(call.hints, variant=None, deadline_s=deadline_s)
        own = self.call(identity, Ask(backend, body["messages"]), call_id=self.new_id(), said=said)
        own.layers = call.layers
        own.timeout = call.timeout
        own.mappers = (InternalMapping(backend, stage),)  # a mapping of its stage must not send it round in a circle
        return (yield from self.steps(own, InternalCall(body, self.background, min(timeout_s, max(left_s, LEAST_S)))))

    def pass_by(self, call: Call, sender: Sender, on_end: Callable[[Record], None] | None = None) -> Steps:
        """Let a call that we do not place go where its code says, and record it as external."""
        inflight = InFlightCall(self, call, on_end)
        inflight.pass_by()
        try:
            return (yield Send(sender, inflight))
        except BaseException as error:
            inflight.finish(error)
            raise

    # Step 8, and what follows it

    def signal(self, events: Iterable[CacheEvent]) -> None:
        """Have the memory manager do what should be done after *events*."""
        self.memory.signal(events)

    def pressed(self, event: CacheEvent) -> None:
        """Hear from a desk that its backend is full."""
        self.memory.signal([event])

    def ordered(self, call_id: str, order: Order) -> None:
        """Put an order that followed a call down in its record."""
        self.amendments.ordered(call_id, order)

    def judged(self, call_id: str, verdict: Verification) -> None:
        """Put down in a call's record whether the next one bore out what was promised after it."""
        self.amendments.judged(call_id, verdict)

    def prioritize(self, run: str, priority: float, tenant: str | None = None) -> bool:
        """Give the calls of a run, or of a thread's open runs, another priority; False if no such run is open."""
        found = self.book.open_on(run, tenant)
        for state in found:
            state.priority = priority
            touched = partial(self._touched, state.id)
            for scheduler in self.schedulers.values():
                for workflow in state.workflows:
                    scheduler.reprioritize(workflow, touched)
        return bool(found)

    def _touched(self, run: str, call: Call) -> bool:
        return call.identity.run == run and self.refresh(call)

    def refresh(self, call: Call) -> bool:
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
                CallEvent(
                    kind, self.clock(), who.name, who.run, who.stage, call.id, backend, detail,
                    tenant=call.hints.tenant or None,
                )
            )  # fmt: skip

    def count_lost(self) -> None:
        """Count a call whose graph is not known."""
        with self._counts:
            self._unidentified += 1

    def count_external(self) -> None:
        """Count a call that was not ours to place."""
        with self._counts:
            self._external += 1

    # The state now

    def views(self, call: Call | None = None) -> list[BackendView]:
        """Return the backends as mappers see them, on behalf of a call."""
        return [scheduler.view(call) for scheduler in self.schedulers.values()]

    def serves(self, model: str) -> bool:
        """Whether *model* in code means one of our backends."""
        return any(model in view.models for view in self.views())

    def statistics(self) -> Statistics:
        """Return a snapshot."""
        return Statistics(
            backends={name: scheduler.statistics() for name, scheduler in self.schedulers.items()},
            workflows=self.book.statistics(),
            calls=self.records.total,
            records_dropped=self.records.dropped,
            external=self._external,
            unidentified=self._unidentified,
            costs=self.costs.statistics(),
            unwritten=0 if self.journal is None else self.journal.dropped,
            limits=self.limits.statistics(self.book.runs()),
        )

    def check_integrity(self) -> None:
        """Assert the invariants of all state."""
        self.book.check_integrity()
        self.limits.check_integrity(self.book.runs())
        self.memory.check_integrity()
        for scheduler in self.schedulers.values():
            scheduler.check_integrity()

    def close(self) -> None:
        """Refuse new calls, end waiting ones with ``OrlaClosed``, stop background work. Idempotent.

        Orders on their way to engines are waited for; what came of one that is cut off all the same is ``unknown``.
        """
        if self.closed:
            return
        self.closed = True
        was_closed(self)
        for scheduler in self.schedulers.values():
            scheduler.turn_away()
        self.pauses.end(OrlaClosed(CLOSED))
        self.background.finish_errands(CLOSE_PATIENCE_S)
        closing = [self.background.submit(scheduler.adapter.aclose()) for scheduler in self.schedulers.values()]
        concurrent.futures.wait(closing, timeout=CLOSE_PATIENCE_S)
        self.foresight.close()
        self.background.close()
        self.amendments.close()
        if self.journal is not None:
            self.journal.close()
