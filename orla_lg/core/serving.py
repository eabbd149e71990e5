"""One core: its parts made and joined, seen in one snapshot, and closed. The life of a call is in ``lifecycle``."""

from __future__ import annotations

import concurrent.futures
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Unpack

from orla_lg.core.accounting.costs import CostBook
from orla_lg.core.accounting.journal import Journal
from orla_lg.core.accounting.learners import Learners
from orla_lg.core.accounting.setting import setting_of
from orla_lg.core.accounting.updates import RecordUpdates
from orla_lg.core.background import Background, Clock
from orla_lg.core.boundary.call_ids import call_ids
from orla_lg.core.cache.isolation import Salts
from orla_lg.core.cache.parts import Shared
from orla_lg.core.call import Ask, Call
from orla_lg.core.engine.backend import Backend, BackendAdapter
from orla_lg.core.guard.guard import Guard
from orla_lg.core.identity import Identity
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.lifecycle import CLOSED, CallArrival, Sender, arrive, serve
from orla_lg.core.limits.book import LimitBook
from orla_lg.core.limits.limits import NO_LIMITS, Limits
from orla_lg.core.lookahead.lookahead import Lookahead
from orla_lg.core.mapping import Mapper, Mappings
from orla_lg.core.memory.events import MemoryPolicy
from orla_lg.core.memory.manager import MemoryManager
from orla_lg.core.memory.progress import GraphProgress
from orla_lg.core.memory.returns import ReturnBook
from orla_lg.core.operation.backends import Schedulers
from orla_lg.core.operation.policy_choice import PolicyChoice, refined
from orla_lg.core.operation.resources import hold, was_closed
from orla_lg.core.operation.statistics import Statistics
from orla_lg.core.operation.steering import Steering
from orla_lg.core.operation.unread_hints import UnreadHints
from orla_lg.core.placement.moves import Moves
from orla_lg.core.placement.view import BackendView
from orla_lg.core.policies import DEFAULT_REQUEST, DEFAULT_STAGE, RequestChoice, StageChoice, policies
from orla_lg.core.prefetch.book import WarmUp
from orla_lg.core.queues import Policies
from orla_lg.core.record import Record, RecordBook
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.core.services import Services
from orla_lg.core.steps import Steps
from orla_lg.core.workflow import WorkflowBook
from orla_lg.errors import OrlaClosed

CLOSE_PATIENCE_S = 2.0
"""How long ``close`` waits for orders on their way, and then for adapters to close their connections."""


class Serving:
    """One core: what ``wrap``, ``ChatOrla`` and the gateway all hold."""

    def __init__(
        self,
        adapters: Mapping[Backend, BackendAdapter],
        *,
        mapper: Mapper | None,
        policy: PolicyChoice | None = None,
        stage_policy: StageChoice | None = None,
        request_policy: RequestChoice | None = None,
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
        self.mappings = Mappings(mapper)
        self.book = WorkflowBook(max_idle=max_idle_threads)
        self.guard = Guard(self.book.run)
        self.costs = CostBook()
        self.journal = journal
        self.records = RecordBook(keep_records, (self.costs.add,))
        self.learners = Learners(self.records.followers.append)
        self.learners.enlist(mapper)
        self.updates = RecordUpdates(self.records, journal, self.book.is_running)
        self.limits = LimitBook(limits, clock)
        self.lookahead = Lookahead(self.background, clock, estimates_file)
        self.estimates = self.lookahead.estimates
        self.warm_up = warm_up
        """What warm-ups may take; ``None``: there are none."""
        self.schedulers = Schedulers()
        returns = ReturnBook()
        self.memory = MemoryManager(memory, self.schedulers, self.background, clock, returns)
        self._shared = Shared(self.estimates, self.updates, self.memory.signal, admission, warm_up, returns, Salts())
        if journal is not None:
            self.records.written = journal.record
            journal.setting = partial(setting_of, weakref.ref(self.schedulers), admission=admission, memory=memory)
        stages, requests = refined(policy, stage_policy, request_policy)
        self._stages = DEFAULT_STAGE if stages is None else stages
        self._requests = DEFAULT_REQUEST if requests is None else requests
        for backend, adapter in adapters.items():
            self.schedulers[backend.name] = self.scheduler_of(backend, adapter)
        both_levels_meant = (stages is None) == (requests is None) and stages is not None
        unread_hints = UnreadHints(both_levels_meant=both_levels_meant)
        moves = self.moves = Moves(self.schedulers, self.book, self.memory, self.mappings, clock)
        self.steering = Steering(self.schedulers, self.book, unread_hints, moves)
        self.progress = GraphProgress(
            self.book, self.lookahead, self.memory, self.records, self.updates, clock, self.guard,
            looks_ahead=warm_up is not None,
        )  # fmt: skip
        self.new_id = call_ids()
        self.resources = hold(self, adapters, owned=background is None)
        self.services = Services(
            clock, self.background, self.new_id, self.book, self.records, self.limits, self.lookahead, self.memory,
            self.progress, self.schedulers, self.mappings, self.resources.masking,
            unread_hints,
        )  # fmt: skip
        self.guard.installed_by(partial(setattr, self.services, "guard"))

    def scheduler_of(
        self, backend: Backend, adapter: BackendAdapter, ordered_by: Policies | None = None
    ) -> BackendScheduler:
        """Return a scheduler for a backend, with other policies than those of the beginning if given."""
        ordered_by = ordered_by or policies(backend.name, self._stages, self._requests)
        return BackendScheduler(backend, adapter, self.background, self.clock, ordered_by, self._shared)

    # The ways of a call, as edges ask for them; a core behind a link (``link.serving``) goes others

    def arrive(self, identity: Identity, ask: Ask, **given: Unpack[CallArrival]) -> InFlightCall:
        """Return a call that arrived now (``lifecycle.arrive``)."""
        return arrive(self.services, identity, ask, **given)

    def serve(self, inflight: InFlightCall, sender: Sender, on_end: Callable[[Record], None] | None = None) -> Steps:
        """Return the steps of one call's life (``lifecycle.serve``)."""
        if (tracer := self.services.tracer) is not None:
            tracer.arrived(inflight.call)
        return serve(inflight, sender, on_end)

    def lost(self) -> None:
        """Count a call whose run is not known."""
        self.book.lost()

    def variant(self, name: str, mapper: Mapper) -> None:
        """Name a sparse override of the mapping; the same name again replaces it."""
        self.learners.enlist(mapper)
        self.mappings.variants = {**self.mappings.variants, name: mapper}

    def feedback(self, record_id: str, score: float) -> None:
        """Let mappers learn how good the answer of a call was, 0 to 1.

        Raises:
            RecordUnknown: There is no such record, or it is no longer kept.
        """
        record = self.records.find(record_id)
        self.learners.feedback(record, score)
        if self.journal is not None:
            self.journal.feedback(record_id, score)

    def views(self, call: Call | None = None) -> list[BackendView]:
        """Return the backends as mappers see them, on behalf of a call."""
        return self.schedulers.views(call)

    def statistics(self) -> Statistics:
        """Return a snapshot."""
        return Statistics(
            backends={name: scheduler.statistics() for name, scheduler in self.schedulers.items()},
            workflows=self.book.statistics(),
            calls=self.records.total,
            records_dropped=self.records.dropped,
            external=self.records.external,
            unidentified=self.book.unidentified,
            costs=self.costs.statistics(),
            unwritten=0 if self.journal is None else self.journal.dropped,
            limits=self.limits.statistics(self.book.runs()),
        )

    def check_integrity(self) -> None:
        """Assert the invariants of all state."""
        self.book.check_integrity()
        self.limits.check_integrity(self.book.runs())
        self.memory.check_integrity()
        self.moves.check_integrity()
        for scheduler in self.schedulers.values():
            scheduler.check_integrity()

    def close(self) -> None:
        """Refuse new calls, end waiting ones with ``OrlaClosed``, stop background work. Idempotent.

        Orders on their way to engines are waited for; what came of one that is cut off all the same is ``unknown``.
        """
        if self.services.closed:
            return
        self.services.closed = True
        was_closed(self)
        for scheduler in self.schedulers.values():
            scheduler.turn_away()
        self.services.pauses.end(OrlaClosed(CLOSED))
        self.background.finish_errands(CLOSE_PATIENCE_S)
        closing = [self.background.submit(scheduler.adapter.aclose()) for scheduler in self.schedulers.values()]
        concurrent.futures.wait(closing, timeout=CLOSE_PATIENCE_S)
        self.lookahead.close()
        self.background.close()
        self.updates.close()
        if self.journal is not None:
            self.journal.close()
