"""One call from its arrival to its end: what travels with it, the grant that it holds, what comes back for it.

The response may outlive the function that asked for it (a stream is read later, closed early, or simply
dropped), so the grant lives here and not in a ``with`` block. The edge that carries the bytes reports
``first_token``, ``saw`` and ``finish``; any thread may, and only the first ``finish`` counts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

from orla_lg.core.background import is_collecting
from orla_lg.core.cache.slots.table import SlotLease
from orla_lg.core.cache.verification import recomputed
from orla_lg.core.call import CHARS_PER_TOKEN, NO_HINTS, Assignment, Call, Usage
from orla_lg.core.engine.backend import Capability, Directions, model_asked, price
from orla_lg.core.engine.retry import AttemptFailed
from orla_lg.core.identity import workflow_name
from orla_lg.core.limits.book import BudgetReservation
from orla_lg.core.limits.limits import LimitScope
from orla_lg.core.limits.usage import NOTHING, Amount, used
from orla_lg.core.mapping import Mapper
from orla_lg.core.memory.events import CacheEvent
from orla_lg.core.placement.embeddings import alone
from orla_lg.core.placement.view import several
from orla_lg.core.queues import Queued
from orla_lg.core.record import CallEvent, Happening, Record
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.core.services import Services
from orla_lg.core.steps import Waiter
from orla_lg.errors import BackendUnavailable, MappingError

MAX_ERROR_CHARS = 500
MAX_MASKED_CHARS = 4 * MAX_ERROR_CHARS
"""So much is looked through for keys, so that none is cut in two and then not known."""

ABANDONED = "abandoned"
"""The error of a stream that is not read to its end."""


@dataclass(eq=False, slots=True)
class _Holding:
    backend: str
    open: bool = True


HOLDINGS: ContextVar[tuple[_Holding, ...]] = ContextVar("orla_holdings", default=())


def grants_held() -> set[str]:
    """Return the backends on which this task or thread holds a grant (it reads a stream from there)."""
    held = HOLDINGS.get()
    return {holding.backend for holding in held if holding.open} if held else set()


class InFlightCall:
    """One call from its arrival to its end.

    Args:
        services: Of its core.
        call: The call.
        mappers: Asked in order where it goes; the first answer counts.
        layers: Limits of its graph and its run, beside those for all.
    """

    __slots__ = (
        "__weakref__", "_booked", "_first_s", "_holding", "_keep_s", "_lock", "_open", "_queued", "_record",
        "_wait_s", "assignment", "attempts", "backend", "began_s", "call", "cut", "departed_s", "entered_s",
        "external", "fit", "holder", "holds", "layers", "mappers", "max_attempts", "model", "on_end", "place",
        "reservation", "scheduler", "services", "slot_lease", "swap_s", "tried", "usage", "why_external",
    )  # fmt: skip

    def __init__(
        self, services: Services, call: Call, mappers: Sequence[Mapper] = (), layers: Sequence[LimitScope] = ()
    ) -> None:
        self.services = services
        self.call = call
        self.mappers = mappers
        self.layers = layers
        self.on_end: Callable[[Record], None] | None = None
        """Called with the record when the call ends."""
        self.external, self.why_external = False, ""
        """Whether the call goes where its code says, past the core; and why, as far as that is known."""
        self.fit: Callable[[Assignment], Assignment | None] | None = None
        """Takes out of an assignment where the edge cannot send the request; ``None``: it cannot be sent at all."""
        self.holder: object = None
        """What must live as long as the call: a stream may be all that is left of its core."""
        self.holds: Collection[str] | None = None
        """The backends on which its caller holds a grant; ``None``: this context tells. Of a caller elsewhere (the
        link, the gateway) it does not, and such a call leaves nothing in it either."""
        self.cut = ""
        """Why its request was ended from here, where it was: its caller is to know that instead of what broke."""
        self.place: tuple[str, int] | None = None
        """A backend and its arrival number there (``Queued.order``), if it waited there before."""
        self.reservation: BudgetReservation | None = None
        """What limits set aside for it."""
        self.assignment: Assignment | None = None
        """Where its newest attempt runs."""
        self.backend: str | None = None
        """The backend's name; ``None`` for an external call."""
        self.model: str | None = None
        """The model to ask the backend for."""
        self.scheduler: BackendScheduler | None = None
        self.slot_lease: SlotLease | None = None
        self.max_attempts = 1
        self.tried: list[str] = []
        """The backends of its attempts so far, one entry an attempt."""
        self.began_s = call.arrived_s
        """When the attempt under way began: the call arrived, or the last attempt failed."""
        self.attempts = 0
        """How many attempts left a queue."""
        self.usage: Usage | None = None
        self._lock = threading.Lock()
        self._open, self._booked = True, False
        self._queued: Queued | None = None
        self._record: Record | None = None
        self._holding: _Holding | None = None
        self.entered_s = call.arrived_s
        self.departed_s: float | None = None
        self._first_s: float | None = None
        self._wait_s = self.swap_s = 0.0
        self._keep_s: float | None = None
        """For how long its cache is expected to be of use, as its engine knows."""

    # Before the engine

    def enter(self, scheduler: BackendScheduler, assignment: Assignment) -> Waiter | None:
        """Take a place in a backend's queue; a call that comes back keeps its arrival number there.

        Returns what to wait for; ``None`` when the call may go at once.

        Raises:
            MappingError: It shows only now that the backend serves several models, and none is named.
        """
        call, services, backend = self.call, self.services, scheduler.backend
        call = alone(call) if call.ask.embeds else call
        if assignment.parameters:
            call.mapped_max_tokens = call.ask.given(assignment.parameters).max_tokens
        probe, workflow = scheduler.health.probe, call.identity.workflow
        model = model_asked(assignment.model or backend.model, probe, call.ask.model)
        if probe is not None and model is None:
            where = f"stage {call.identity.stage!r} on backend {backend.name!r}"
            raise MappingError(f"{where}: {several(probe, call.ask.model)}")
        if self._queued is not None and self.scheduler is not None:
            self.place = self.scheduler.backend.name, self._queued.order
        known = self.place[1] if self.place is not None and self.place[0] == backend.name else None
        self.assignment, self.scheduler, self.entered_s = assignment, scheduler, services.clock()
        self.backend, self.model = backend.name, model
        self._booked = True
        services.memory.called(workflow)
        if left := services.book.call_started(call, backend.name):
            services.memory.signal(left)
        running = services.book.is_running(workflow)
        holds = self.holds if self.holds is not None else grants_held() if HOLDINGS.get() else ()
        self._queued = scheduler.enter(call, order=known, running=running, holds_grant=backend.name in holds)
        if call.hints is not NO_HINTS:
            services.unread_hints.look(call, scheduler, waits=self._queued.turn is not None)
        if self._queued.turn is not None and services.records.heard:
            self._tell(Happening.QUEUED)
        return self._queued.turn

    def depart(self) -> None:
        """Note that the call left the queue with a grant."""
        assert self._queued is not None and self.scheduler is not None and self.assignment is not None
        in_code, own = self.call.ask.model, self.assignment.model or self.scheduler.backend.model
        self.model = model_asked(own, self.scheduler.health.probe, in_code) or in_code  # known by now, if it was not
        self.departed_s = self.services.clock()
        self._wait_s += self.departed_s - self.entered_s
        self.slot_lease = self._queued.lease
        self.attempts += 1
        if self.services.records.heard:
            self._tell(Happening.DISPATCHED)
        if not self.call.ask.embeds and self.services.memory.heeds_stages():
            self.services.progress.stage_busy(self.call)

    # What the edge needs to build the request

    @property
    def counts_streams(self) -> bool:
        """Whether the engine reports usage at the end of a stream when asked."""
        probe = None if self.scheduler is None else self.scheduler.health.probe
        return probe is not None and probe.can(Capability.STREAM_USAGE)

    @property
    def queue_wait_s(self) -> float:
        """Seconds that it waited for grants so far."""
        return self._wait_s

    def request_fields(self) -> dict[str, Any]:
        """Return the extra body fields that this engine wants for this call."""
        assert self.scheduler is not None
        call, slot_lease, isolation = self.call, self.slot_lease, self.scheduler.isolation
        directions = Directions(
            call_id=f"{call.id}.{self.attempts}",
            workflow=call.identity.workflow,
            stage=call.identity.stage,
            keep_s=self.services.memory.keep_s(call),
            priority=call.hints.priority or 0.0,
            slot=None if slot_lease is None else slot_lease.slot,
            fresh=slot_lease is not None and not slot_lease.reuses,
            cache_salt=isolation.salt(call.identity.tenant) if isolation.on else "",
        )
        self._keep_s = directions.keep_s
        return self.scheduler.adapter.request_fields(call.ask, directions)

    def sends(self, body: Mapping[str, Any]) -> None:
        """Note the request's body before ``request_fields`` are added: what it begins with may be warmed later."""
        listener = None if self.scheduler is None else self.scheduler.listener
        if listener is not None and self._queued is not None:
            listener.sending(self._queued, body)

    # What comes back

    def missed(self, failure: AttemptFailed) -> None:
        """Give the grant back after a failed attempt: no call holds one while pausing."""
        self.began_s = self.services.clock()
        if not self._booked:  # refused before it had one
            return
        assert self.scheduler is not None
        self._first_s, self.usage, self.swap_s = None, None, 0.0  # of an answer that no caller got
        health = self.scheduler.health
        if failure.overloaded or failure.elsewhere:
            health.answered()
            if failure.elsewhere:
                health.doubt(str(failure.cause))
        elif not failure.moved:
            health.failed(BackendUnavailable(str(failure.cause)), unreachable=failure.unreachable)
        self.services.memory.signal(self._give_back(failed=True))

    def hold(self) -> None:
        """Note in this context that the grant stays out while the response is read."""
        if self.holds is not None:
            return
        with self._lock:
            if not self._open or self.scheduler is None:
                return
            self._holding = _Holding(self.scheduler.backend.name)
            if (run := self.services.book.run(self.call.identity.run or "")) is not None:
                run.unread[self.call.id] = (self.call.identity.namespace, self.finish)
        HOLDINGS.set((*(held for held in HOLDINGS.get() if held.open), self._holding))

    def first_token(self) -> None:
        """Note the first chunk of a stream."""
        if self._first_s is None:
            self._first_s = self.services.clock()
            self.answered()
            if self.scheduler is not None and self._queued is not None:
                self.scheduler.first_token(self._queued)
            if self.services.records.heard:
                self._tell(Happening.FIRST_TOKEN)

    def saw(self, usage: Usage) -> None:
        """Note the token counts that the engine reported."""
        self.usage = usage

    def answered(self) -> None:
        """Note that the engine is alive, whatever it answered."""
        if self.scheduler is not None:
            self.scheduler.health.answered()

    def broke(self, error: BaseException) -> None:
        """End the call because the engine's answer broke off: the caller already has a part of it."""
        if is_collecting():
            self.services.background.hand_over(partial(self.broke, error))
            return
        if self.scheduler is not None:
            fault = BackendUnavailable(_name(error)[:MAX_ERROR_CHARS])
            self.scheduler.health.failed(fault, unreachable=True)
        self.finish(error)

    def finish(self, error: BaseException | str | None = None) -> None:
        """End the call: account, give the grant back, signal. The first call counts, in any thread."""
        if is_collecting():  # a stream that was dropped, in a thread that may hold the scheduler's lock
            self.services.background.hand_over(partial(self.finish, error))
            return
        with self._lock:
            if not self._open:
                return
            self._open = False
            if self._holding is not None:
                self._holding.open = False
                if (run := self.services.book.run(self.call.identity.run or "")) is not None:
                    run.unread.pop(self.call.id, None)
        services, now = self.services, self.services.clock()
        try:
            if self.reservation is not None:
                services.limits.settle(self.reservation, self._spent(now, failed=error is not None))
            record = self._record = self._recorded(error, now)
        except BaseException:
            services.memory.signal(self._give_back(failed=error is not None))
            raise
        events = self._give_back(failed=error is not None)
        if error is None and self.scheduler is not None:
            self.scheduler.health.answered()
            self._teach(self.scheduler, record, now)
        services.records.add(record, self.call)  # 7 account
        services.memory.signal(events)  # 8 signal
        if services.records.heard:
            self._tell(Happening.FINISHED, self.record)
        if self.on_end is not None:
            self.on_end(services.records.latest(record))
        self.holder = self.fit = None

    @property
    def record(self) -> Record | None:
        """What was decided and what happened, with what was asked about its cache since; ``None`` until it ended."""
        return None if self._record is None else self.services.records.latest(self._record)

    def _spent(self, now: float, *, failed: bool) -> Amount:
        """Return what the call used; what was set aside stands where an engine answered without a count."""
        assert self.reservation is not None
        if self.scheduler is not None and self.usage is not None:
            service_s = now - (self.departed_s or self.call.arrived_s)
            return used(self.usage, self.scheduler.backend.cost, service_s)
        return self.reservation.amount if self._first_s is not None or not failed else NOTHING

    def _teach(self, scheduler: BackendScheduler, record: Record, now: float) -> None:
        """Let the backend's pace and the estimates see how the call went."""
        if self.departed_s is None:
            return
        service_s, prompt, swap_s = now - self.departed_s, record.prompt_tokens, self.swap_s
        ttft_s = None if record.ttft_s is None else record.ttft_s - swap_s  # a swap is no prefill
        run = None if record.run is None else self.services.book.run(record.run)
        if run is not None and not self.call.ask.embeds:
            self.services.lookahead.served(run, self.call, record, service_s)
        scheduler.speed_meter.note(
            service_s=service_s - swap_s,
            prefill_s=ttft_s if self.usage is None else self.usage.prefill_s or ttft_s,
            fresh_tokens=None if prompt is None else prompt - (record.cached_tokens or 0),
            completion_tokens=record.completion_tokens,
        )

    def _give_back(self, *, failed: bool) -> list[CacheEvent]:
        """Give the grant back; returns what the memory manager should hear."""
        scheduler, queued = self.scheduler, self._queued
        if scheduler is None or not self._booked:
            return []
        self._booked = False
        call, book = self.call, self.services.book
        workflow, usage = call.identity.workflow, self.usage
        if queued is not None:
            if usage is not None:  # what the engine computed, as far as it said
                fresh_tokens = usage.prompt_tokens - (usage.cached_tokens or 0)
                call.standing.serve(fresh_tokens + usage.completion_tokens, self.services.clock())
            if call.ask.embeds:
                scheduler.leave(queued, usage=None, tokens=0, followed=bool)
                return []
            scheduler.leave(
                queued, usage=usage, tokens=self._cached_after(failed=failed),
                followed=partial(book.is_running, workflow),
            )  # fmt: skip
        if self._keep_s is not None and not failed and scheduler.cache_orders.lingers:
            scheduler.cache_orders.linger(self._keep_s)
        return book.call_ended(call, scheduler.backend.name, usage, self.services.memory.away)

    def _cached_after(self, *, failed: bool) -> int:
        """Return the tokens left in the engine's cache; 0 where the call may never have reached it."""
        if self.usage is not None:
            return self.usage.prompt_tokens + self.usage.completion_tokens
        if failed and self._first_s is None:
            return 0
        return self.call.ask.prompt_chars // CHARS_PER_TOKEN + 1

    def _recorded(self, error: BaseException | str | None, now: float) -> Record:
        call, usage, chosen, scheduler = self.call, self.usage, self.assignment, self.scheduler
        who = call.identity
        waited = self._wait_s if self.departed_s is not None else now - call.arrived_s
        expected = None if self._queued is None else self._queued.expected
        expected_tokens = None if expected is None else expected.tokens
        reason, lease = self.why_external if chosen is None else chosen.reason, self.slot_lease
        return Record(
            id=call.id,
            workflow=workflow_name(who.workflow),
            run=who.run,
            stage=who.stage,
            step=who.step,
            backend=self.backend,
            model=self.model or call.ask.model,
            mapper=None if chosen is None else chosen.mapper,
            reason=self._masked(reason) if self.attempts > 1 else reason,
            priority=call.hints.priority or 0.0,
            tenant=call.hints.tenant or None,
            queue_wait_s=0.0 if scheduler is None else waited,
            ttft_s=None if self._first_s is None else self._first_s - (self.departed_s or call.arrived_s),
            duration_s=now - call.arrived_s,
            prompt_tokens=None if usage is None else usage.prompt_tokens,
            cached_tokens=None if usage is None else usage.cached_tokens,
            completion_tokens=None if usage is None else usage.completion_tokens,
            cache_action="engine" if lease is None else self._cache_action(lease.action, expected_tokens),
            attempts=self.attempts,
            cost_usd=None if usage is None or scheduler is None else price(usage, scheduler.backend.cost),
            error=None if error is None else self._masked(_name(error)),
            external=self.external,
            variant=call.hints.variant,
            considered=() if chosen is None else chosen.considered,
            expected_cached_tokens=expected_tokens,
            cache_hint=call.hints.cache,
            final_odds=call.final_odds,
        )

    def _cache_action(self, planned: str, expected_tokens: int | None) -> str:
        """Return what became of the slot's contents: planned with the lease, corrected by what the engine found."""
        cached_tokens = None if self.usage is None else self.usage.cached_tokens
        if cached_tokens is None or planned not in ("reused", "restored"):
            return planned
        return "recomputed" if recomputed(expected_tokens or 0, cached_tokens) else planned

    def _masked(self, text: str) -> str:
        """Return an engine's words as they may be recorded."""
        return self.services.masking.mask(text[:MAX_MASKED_CHARS])[:MAX_ERROR_CHARS]

    def _tell(self, kind: Happening, record: Record | None = None) -> None:
        """Have listeners hear of a turn in the call's life."""
        call, who = self.call, self.call.identity
        self.services.records.tell(
            CallEvent(
                kind, self.services.clock(), who.name, who.run, who.stage, call.id, self.backend, record=record,
                tenant=call.hints.tenant or None,
            )
        )  # fmt: skip


def _name(error: BaseException | str) -> str:
    return error if isinstance(error, str) else f"{type(error).__name__}: {error}"
