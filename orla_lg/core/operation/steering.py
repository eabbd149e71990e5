"""What may be changed while calls run and wait: backends paused, drained, resumed; policies and limits.

Everything is checked before anything is changed, and no waiting call loses its place: calls keep their arrival
numbers, deadlines go on, and a call that may go after a change goes at once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import Enum
from functools import partial

from orla_lg.core.call import Call
from orla_lg.core.engine.backend import concurrency_of
from orla_lg.core.operation.unread_hints import UnreadHints
from orla_lg.core.placement.moves import Moves
from orla_lg.core.policies import ANY_BACKEND, RequestChoice, StageChoice, changed
from orla_lg.core.queues import Policies
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.core.steps import Steps, Waiter, WaitForTurn
from orla_lg.core.workflow import WorkflowBook
from orla_lg.errors import ConfigError, PolicyError, did_you_mean


class Keep(Enum):
    """Stands for a limit that stays as it is, where ``None`` means that there is none."""

    KEEP = "keep"


KEEP = Keep.KEEP


class Steering:
    """The levers of one core; any thread may pull them."""

    def __init__(
        self,
        schedulers: Mapping[str, BackendScheduler],
        book: WorkflowBook,
        unread_hints: UnreadHints | None = None,
        moves: Moves | None = None,
    ) -> None:
        self.moves = moves
        """``None``: nothing is moved."""
        self._schedulers = schedulers
        self._book = book
        self._unread_hints = unread_hints or UnreadHints(both_levels_meant=True)
        self._policies = threading.Lock()
        """Held while policies change: a change that must be undone is undone to what it found."""

    def _scheduler(self, backend: str) -> BackendScheduler:
        if backend not in self._schedulers:
            raise ConfigError(f"unknown backend {backend!r}{did_you_mean(backend, self._schedulers)}")
        return self._schedulers[backend]

    # Whether calls go to a backend

    def pause(self, backend: str) -> None:
        """Grant nothing more there: what is in flight goes on, what comes waits. Idempotent.

        Raises:
            ConfigError: There is no such backend.
        """
        scheduler = self._scheduler(backend)
        with scheduler.lock:
            _pause(scheduler)

    def resume(self, backend: str) -> None:
        """Let calls go there again. Idempotent.

        Raises:
            ConfigError: There is no such backend.
        """
        scheduler = self._scheduler(backend)
        with scheduler.changing():
            scheduler.queue.paused = False
        scheduler.drains.end()
        if self.moves is not None:
            self.moves.resumed(backend)

    def drain(self, backend: str, timeout_s: float | None) -> Steps:
        """Pause a backend and wait until nothing is in flight there; the result is whether that is so.

        Its workflows are moved to others that serve its model, those of calls that wait included. It stays paused
        when the time is up. The wait ends early, with ``False``, when the backend is resumed.

        Raises:
            ConfigError: There is no such backend, or *timeout_s* is negative.
            OrlaClosed: ``Orla.close`` was called meanwhile.
        """
        if timeout_s is not None and not timeout_s >= 0:
            raise ConfigError(f"timeout_s must be 0 or more seconds, or None: for ever; got {timeout_s}")
        scheduler = self._scheduler(backend)
        drained = begin_drain(scheduler)
        if self.moves is not None:
            self.moves.drain(backend)
        try:
            with contextlib.suppress(TimeoutError):
                yield WaitForTurn(drained, timeout_s)
        finally:
            scheduler.drains.leave(drained)
        with scheduler.lock:
            return scheduler.queue.paused and not scheduler.queue.in_flight

    # Where the calls of one workflow go

    def move(self, workflow: str, backend: str | None, tenant: str | None = None) -> bool:
        """Have a workflow's next calls go to a backend, with its cache; False if there is no such workflow.

        Raises:
            ConfigError: There is no such backend.
        """
        return self.moves is not None and self.moves.move(workflow, backend, tenant)

    # The order of calls, and limits

    def prioritize(self, run: str, priority: float, tenant: str | None = None) -> bool:
        """Give the calls of a run, or of a thread's open runs, another priority; False if no such run is open."""
        found = self._book.open_on(run, tenant)
        for state in found:
            state.priority = priority
            for scheduler in self._schedulers.values():
                changed: list[Call] = []
                touched = partial(self._touched, state.id, changed)
                for workflow in state.workflows:
                    reprioritize(scheduler, workflow, touched)
                for call in changed:
                    self._unread_hints.look(call, scheduler, waits=True)
        return bool(found)

    def _touched(self, run: str, changed: list[Call], call: Call) -> bool:
        if call.identity.run != run or not self._book.refresh(call):
            return False
        changed.append(call)
        return True

    def set_policy(
        self, stage_policy: StageChoice | None, request_policy: RequestChoice | None, backend: str | None
    ) -> None:
        """Order calls by other policies, those that wait as well; on one backend, or on all (``None``).

        Raises:
            ConfigError: A name is unknown, an object is no policy, or it cannot order the calls that wait. Nothing
                is changed then.
        """
        if stage_policy is None and request_policy is None:
            raise ConfigError("nothing to change: give a stage_policy, a request_policy, or both")
        schedulers = self._schedulers if backend is None else {backend: self._scheduler(backend)}
        for name in stage_policy if isinstance(stage_policy, Mapping) else ():
            if name != ANY_BACKEND:
                self._scheduler(name)
        with self._policies:
            before = {name: scheduler.queue.policies for name, scheduler in schedulers.items()}
            after = {name: changed(before[name], name, stage_policy, request_policy) for name in schedulers}
            self._exchange(before, after)

    def _exchange(self, before: Mapping[str, Policies], after: Mapping[str, Policies]) -> None:
        done: list[str] = []
        try:
            for name, policies in after.items():
                self._change_policies(name, policies)
                done.append(name)
        except Exception as error:  # a policy is the user's code
            for undone in done:
                self._change_policies(undone, before[undone])
            fault = error.__cause__ if isinstance(error, PolicyError) else error
            raise ConfigError(f"backend {name!r}: the policy cannot order the calls that wait: {fault!r}") from error

    def _change_policies(self, backend: str, policies: Policies) -> None:
        """Order by other policies, waiting calls as well. What a policy raises on one of them changes nothing."""
        scheduler = self._schedulers[backend]
        with scheduler.changing():
            scheduler.queue.change_policies(policies, scheduler.clock())

    def set_limit(self, backend: str, max_concurrency: int | Keep | None, capacity: int | Keep) -> None:
        """Bound a backend's calls in flight (``None``: as the engine bounds them), and those that may wait.

        A bound below what is in flight, or waits, ends nothing: it counts for those that come.

        Raises:
            ConfigError: There is no such backend, or a limit is not a whole number in its range. Nothing is changed
                then.
        """
        scheduler = self._scheduler(backend)
        limits = {"max_concurrency": max_concurrency, "capacity": capacity}
        given = {name: limit for name, limit in limits.items() if not isinstance(limit, Keep)}
        if not given:
            raise ConfigError("nothing to change: give max_concurrency, capacity, or both")
        for name, limit in given.items():
            if isinstance(limit, bool) or not isinstance(limit, int | None) or (name, limit) == ("capacity", None):
                raise ConfigError(f"backend {backend!r}: {name} must be a whole number, got {limit!r}")
        with scheduler.changing():
            # They become the backend's own, so that what the engine says of itself later is held against them.
            scheduler.backend = replace(scheduler.backend, **given)  # type: ignore[arg-type]  # checked above
            scheduler.queue.capacity = scheduler.backend.capacity
            scheduler.queue.max_concurrency = concurrency_of(scheduler.backend, scheduler.health.probe)


def reprioritize(scheduler: BackendScheduler, workflow: str, touched: Callable[[Call], bool]) -> None:
    """Order a workflow's waiting calls again after their hints changed."""
    with scheduler.changing():
        scheduler.queue.reorder(scheduler.clock(), workflow, touched)


def begin_drain(scheduler: BackendScheduler) -> Waiter:
    """Pause a backend, and return what comes when nothing is in flight any more, or the backend is resumed."""
    with scheduler.lock:
        _pause(scheduler)
        drained = scheduler.drains.begin()
    if not scheduler.queue.in_flight:  # without the lock, as in ``BackendScheduler.leave``
        scheduler.drains.end()
    return drained


def _pause(scheduler: BackendScheduler) -> None:
    """Grant nothing more, but to a call whose caller holds a grant already: its run could not end otherwise."""
    scheduler.queue.paused = True
    scheduler.prefetcher.give_up()
