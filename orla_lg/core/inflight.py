"""A call under way: it holds the grant, notes what comes, and ends exactly once.

The response may outlive the function that asked for it (a stream is read later, closed early, or simply
dropped), so the grant lives here and not in a ``with`` block. Whoever carries the bytes reports
``first_token``, ``saw`` and ``finish``; any thread may, and only the first ``finish`` counts.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any

from orla_lg.core.call import CHARS_PER_TOKEN, Assignment, Call, Usage
from orla_lg.core.dispatch import AttemptFailed
from orla_lg.core.engine.backend import BackendAdapter, Capability, Directions, model_asked, price
from orla_lg.core.limits.usage import NOTHING, used
from orla_lg.core.mapping import several
from orla_lg.core.memory.events import CacheEvent
from orla_lg.core.record import CallEvent, Happening, Record
from orla_lg.core.steps import Steps, Wait
from orla_lg.errors import BackendUnavailable, MappingError

if TYPE_CHECKING:
    from orla_lg.core.cache.slots.table import SlotLease
    from orla_lg.core.limits.book import BudgetReservation
    from orla_lg.core.queues import Queued
    from orla_lg.core.scheduler import BackendScheduler
    from orla_lg.core.serving import Serving
    from orla_lg.core.turn import Waiter

SWAP_PATIENCE_S = 90.0
"""A swap is two orders, each of which waits for the batch that the engine works on; adapters bound them."""

MAX_ERROR_CHARS = 500
MAX_MASKED_CHARS = 4 * MAX_ERROR_CHARS
"""So much is looked through for keys, so that none is cut in two and then not known."""

ABANDONED = "abandoned"
"""The error of a stream that nobody read to its end."""


@dataclass(eq=False, slots=True)
class _Holding:
    backend: str
    open: bool = True


_HOLDINGS: ContextVar[tuple[_Holding, ...]] = ContextVar("orla_holdings", default=())


def grants_held() -> set[str]:
    """Return the backends on which this task or thread holds a grant (it reads a stream from there)."""
    return {holding.backend for holding in _HOLDINGS.get() if holding.open}


class InFlightCall:
    """One call from its arrival to its end."""

    __slots__ = (
        "__weakref__",
        "_assignment",
        "_booked",
        "_departed_s",
        "_entered_s",
        "_first_s",
        "_holding",
        "_keep_s",
        "_lock",
        "_on_end",
        "_open",
        "_passes",
        "_queued",
        "_scheduler",
        "_seat",
        "_serving",
        "_wait_s",
        "attempts",
        "call",
        "promise",
        "record",
        "usage",
    )  # fmt: skip

    def __init__(self, serving: Serving, call: Call, on_end: Callable[[Record], None] | None) -> None:
        self.call = call
        self.record: Record | None = None
        self.attempts = 0
        self.usage: Usage | None = None
        self.promise: BudgetReservation | None = None
        """What limits set aside for it."""
        self._serving = serving
        self._on_end = on_end
        self._lock = threading.Lock()
        self._open = True
        self._assignment: Assignment | None = None
        self._scheduler: BackendScheduler | None = None
        self._queued: Queued | None = None
        self._seat: SlotLease | None = None
        self._departed_s: float | None = None
        self._wait_s = 0.0
        self._entered_s = call.arrived_s
        self._first_s: float | None = None
        self._holding: _Holding | None = None
        self._booked = False
        self._passes = False
        self._keep_s: float | None = None
        """For how long its cache was said to be of use."""

    # Before the engine

    def enter(self, scheduler: BackendScheduler, assignment: Assignment, *, holds_grant: bool) -> None:
        """Take a place in the desk's queue; a call that comes back keeps its arrival number there.

        Raises:
            MappingError: It shows only now that the backend serves several models, and none was named.
        """
        probe, model = scheduler.health.probe, assignment.model or scheduler.backend.model
        if probe is not None and model_asked(model, probe, self.call.ask.model) is None:
            where = f"stage {self.call.identity.stage!r} on backend {scheduler.backend.name!r}"
            raise MappingError(f"{where}: {several(probe, self.call.ask.model)}")
        known = self._queued.order if self._queued is not None and self._scheduler is scheduler else None
        self._assignment, self._scheduler, self._entered_s = assignment, scheduler, self._serving.clock()
        self._booked = True
        self._serving.memory.called(self.call.identity.workflow)
        self._serving.signal(self._serving.book.call_started(self.call, scheduler.backend.name))
        running = self._serving.book.is_running(self.call.identity.workflow)
        self._queued = scheduler.enter(self.call, order=known, running=running, holds_grant=holds_grant)

    @property
    def turn(self) -> Waiter | None:
        """What to wait for; ``None`` when the call may go at once."""
        return None if self._queued is None else self._queued.turn

    def pass_by(self) -> None:
        """Note that the call is not ours to place and goes where its code says."""
        self._passes = True

    def depart(self) -> None:
        """Note that the call left the queue with a grant."""
        assert self._scheduler is not None and self._queued is not None
        self._departed_s = self._serving.clock()
        self._wait_s += self._departed_s - self._entered_s
        self._seat = self._queued.seat
        self.attempts += 1
        self._serving.tell(Happening.DISPATCHED, self.call, backend=self.backend)
        self._serving.progress.stage_busy(self.call)

    def prepare(self, patience_s: float = inf) -> Steps:
        """Wait until the call's slot is its own: what lay there saved, what the workflow left restored."""
        if self._seat is not None and self._seat.swap is not None:
            # After a time-out it goes on: an engine that answers no order will not answer the call either.
            with contextlib.suppress(TimeoutError), self._serving.pauses.one() as turn:
                yield Wait(self._seat.swap.ended, min(SWAP_PATIENCE_S, patience_s), turn)

    @property
    def swaps(self) -> bool:
        """Whether there is something to prepare."""
        return self._seat is not None and self._seat.swap is not None

    # What the edge needs to build the request

    @property
    def external(self) -> bool:
        """Whether the call goes where its code says, past us."""
        return self._passes

    @property
    def backend(self) -> str | None:
        """The backend's name; ``None`` for an external call."""
        return None if self._scheduler is None else self._scheduler.backend.name

    @property
    def model(self) -> str | None:
        """The model to ask the backend for."""
        if self._scheduler is None or self._assignment is None:
            return None
        in_code, own = self.call.ask.model, self._assignment.model or self._scheduler.backend.model
        return model_asked(own, self._scheduler.health.probe, in_code) or in_code

    @property
    def counts_streams(self) -> bool:
        """Whether the engine reports usage at the end of a stream when asked."""
        probe = None if self._scheduler is None else self._scheduler.health.probe
        return probe is not None and probe.can(Capability.STREAM_USAGE)

    @property
    def adapter(self) -> BackendAdapter:
        """The adapter of the backend that was chosen."""
        assert self._scheduler is not None
        return self._scheduler.adapter

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Body fields that the mapping sets where the caller says nothing of them."""
        return {} if self._assignment is None else self._assignment.parameters

    def request_fields(self) -> dict[str, Any]:
        """Return the extra body fields that this engine wants for this call."""
        assert self._scheduler is not None
        seat = self._seat
        told = Directions(
            call_id=f"{self.call.id}.{self.attempts}",
            workflow=self.call.identity.workflow,
            stage=self.call.identity.stage,
            keep_s=self._serving.memory.keep_s(self.call),
            priority=self.call.priority,
            slot=None if seat is None else seat.slot,
            fresh=seat is not None and not seat.reuses,
            cache_salt=self._scheduler.isolation.salt(self.call.identity.tenant),
        )
        self._keep_s = told.keep_s
        return self._scheduler.adapter.request_fields(self.call.ask, told)

    def sends(self, body: Mapping[str, Any]) -> None:
        """Note the request's body before ``request_fields`` are added: what it begins with may be warmed later."""
        if self._scheduler is not None and self._queued is not None:
            self._scheduler.warming.sends(self._queued, body)

    # What comes back

    def missed(self, failure: AttemptFailed) -> None:
        """Give the grant back after a failed attempt: nobody holds one while pausing."""
        if not self._booked:  # refused before it had one
            return
        assert self._scheduler is not None
        self._first_s = self.usage = None  # of an answer that no caller got
        if failure.overloaded or failure.elsewhere:
            self._scheduler.health.answered()
            if failure.elsewhere:
                self._scheduler.health.doubt(str(failure.cause))
        else:
            self._scheduler.health.failed(BackendUnavailable(str(failure.cause)), unreachable=failure.unreachable)
        self._serving.signal(self._give_back(failed=True))

    def hold(self) -> None:
        """Note in this context that the grant stays out while the response is read."""
        with self._lock:
            if not self._open or self._scheduler is None:
                return
            self._holding = _Holding(self._scheduler.backend.name)
            if (run := self._serving.book.run(self.call.identity.run or "")) is not None:
                run.unread[self.call.id] = (self.call.identity.namespace, self.finish)
        _HOLDINGS.set((*(held for held in _HOLDINGS.get() if held.open), self._holding))

    def first_token(self) -> None:
        """Note the first chunk of a stream."""
        if self._first_s is None:
            self._first_s = self._serving.clock()
            self.answered()
            if self._scheduler is not None and self._queued is not None:
                self._scheduler.first_token(self._queued)
            self._serving.tell(Happening.FIRST_TOKEN, self.call, backend=self.backend)

    def saw(self, usage: Usage) -> None:
        """Note the token counts that the engine reported."""
        self.usage = usage

    def answered(self) -> None:
        """Note that the engine is alive, whatever it answered."""
        if self._scheduler is not None:
            self._scheduler.health.answered()

    def broke(self, error: BaseException) -> None:
        """End the call because the engine's answer broke off: the caller already has a part of it."""
        if self._scheduler is not None:
            self._scheduler.health.failed(BackendUnavailable(_name(error)[:MAX_ERROR_CHARS]), unreachable=True)
        self.finish(error)

    def finish(self, error: BaseException | str | None = None) -> None:
        """End the call: account, give the grant back, signal. The first call counts, in any thread."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            if self._holding is not None:
                self._holding.open = False
                if (run := self._serving.book.run(self.call.identity.run or "")) is not None:
                    run.unread.pop(self.call.id, None)
        serving = self._serving
        try:
            self._settle(failed=error is not None)
            self.record = self._make_record(error)
        finally:
            events = self._give_back(failed=error is not None)
            if self.record is None:
                serving.signal(events)
        if self.record.external:
            serving.count_external()
        elif error is None:
            self.answered()
            self._teach(self.record)
        serving.account(self.record)
        serving.signal(events)
        self.record = serving.records.latest(self.record)  # with what was asked about its cache
        if serving.records.heard:
            who = self.call.identity
            serving.records.tell(
                CallEvent(
                    Happening.FINISHED, serving.clock(), who.name, who.run, who.stage, self.call.id,
                    self.backend, record=self.record, tenant=self.record.tenant,
                )
            )  # fmt: skip
        if self._on_end is not None:
            self._on_end(self.record)

    def _settle(self, *, failed: bool) -> None:
        """Tell the limits what the call used; what was promised stands where an engine answered without a count."""
        if self.promise is None:
            return
        spent = NOTHING
        if self._scheduler is not None and self.usage is not None:
            service_s = self._serving.clock() - (self._departed_s or self.call.arrived_s)
            spent = used(self.usage, self._scheduler.backend.cost, service_s)
        elif self._first_s is not None or not failed:
            spent = self.promise.amount
        self._serving.limits.settle(self.promise, spent)

    def _teach(self, record: Record) -> None:
        """Let the backend's pace and the estimates see how the call went."""
        if self._scheduler is not None and self._departed_s is not None:
            prompt, cached = record.prompt_tokens, record.cached_tokens
            service_s = self._serving.clock() - self._departed_s
            run = None if record.run is None else self._serving.book.run(record.run)
            if run is not None:
                self._serving.foresight.served(run, self.call, record, service_s)
            self._scheduler.pace.note(
                service_s=service_s,
                prefill_s=record.ttft_s if self.usage is None else self.usage.prefill_s or record.ttft_s,
                fresh_tokens=None if prompt is None else prompt - (cached or 0),
                completion_tokens=record.completion_tokens,
            )

    def _give_back(self, *, failed: bool) -> list[CacheEvent]:
        """Give the grant back; returns what the memory manager should hear."""
        if self._scheduler is None or not self._booked:
            return []
        self._booked = False
        workflow = self.call.identity.workflow
        if self._queued is not None:
            book = self._serving.book
            tokens = self._cached_after(failed=failed)
            self.call.standing.serve(self._worked(), self._serving.clock())
            self._scheduler.leave(
                self._queued, usage=self.usage, tokens=tokens, followed=lambda: book.is_running(workflow)
            )
        if self._keep_s is not None and not failed:
            self._scheduler.messenger.linger(self._keep_s)
        return self._serving.book.call_ended(self.call, self._scheduler.backend.name, self.usage)

    def _worked(self) -> int:
        """Return the tokens that the engine computed for this call, as far as it said."""
        usage = self.usage
        return 0 if usage is None else usage.prompt_tokens - (usage.cached_tokens or 0) + usage.completion_tokens

    def _cached_after(self, *, failed: bool) -> int:
        """Return the tokens left in the engine's cache; 0 where the call may never have reached it."""
        if self.usage is not None:
            return self.usage.prompt_tokens + self.usage.completion_tokens
        if failed and self._first_s is None:
            return 0
        return self.call.ask.prompt_chars // CHARS_PER_TOKEN + 1

    @property
    def _expected_cached_tokens(self) -> int | None:
        claimed = None if self._queued is None else self._queued.claimed
        return None if claimed is None else claimed.tokens

    @property
    def _cache_action(self) -> str:
        """What became of the slot's contents: planned with the seat, and corrected by what the engine found."""
        planned = "engine" if self._seat is None else self._seat.action
        cached_tokens = None if self.usage is None else self.usage.cached_tokens
        if cached_tokens is None or planned not in ("reused", "restored"):
            return planned
        missed = cached_tokens == 0 or cached_tokens < (self._expected_cached_tokens or 0) / 2
        return "recomputed" if missed else planned

    def _masked(self, text: str) -> str:
        """Return an engine's words as they may be recorded."""
        return self._serving.resources.masking.mask(text[:MAX_MASKED_CHARS])[:MAX_ERROR_CHARS]

    def _make_record(self, error: BaseException | str | None) -> Record:
        now, call, usage = self._serving.clock(), self.call, self.usage
        who, chosen, scheduler = call.identity, self._assignment, self._scheduler
        waited = self._wait_s if self._departed_s is not None else now - call.arrived_s
        return Record(
            id=call.id,
            workflow=who.name,
            run=who.run,
            stage=who.stage,
            step=who.step,
            backend=self.backend,
            model=self.model or call.ask.model,
            mapper=None if chosen is None else chosen.mapper,
            reason="" if chosen is None else self._masked(chosen.reason) if self.attempts > 1 else chosen.reason,
            priority=call.priority,
            tenant=call.hints.tenant or None,
            queue_wait_s=0.0 if scheduler is None else waited,
            ttft_s=None if self._first_s is None else self._first_s - (self._departed_s or call.arrived_s),
            duration_s=now - call.arrived_s,
            prompt_tokens=None if usage is None else usage.prompt_tokens,
            cached_tokens=None if usage is None else usage.cached_tokens,
            completion_tokens=None if usage is None else usage.completion_tokens,
            cache_action=self._cache_action,
            attempts=self.attempts,
            cost_usd=None if scheduler is None else price(usage, scheduler.backend.cost),
            error=None if error is None else self._masked(_name(error)),
            external=self._passes,
            variant=call.hints.variant,
            considered=() if chosen is None else chosen.considered,
            expected_cached_tokens=self._expected_cached_tokens,
            cache_hint=call.hints.cache,
        )


def _name(error: BaseException | str) -> str:
    return error if isinstance(error, str) else f"{type(error).__name__}: {error}"
