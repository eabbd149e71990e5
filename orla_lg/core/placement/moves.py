"""Moves of workflows to other backends: by name (``Orla.move``), and all of a backend that is drained.

What a mapper says stands first. Where a moved workflow's call would go to a backend that serves the same model as the
one it was moved to, it goes there instead; a stage that gets another model is not touched. What must hold for a call
holds as ever: abilities, access policies and keys are looked at after the move, and where the new backend cannot take
the call it goes where it was mapped to.

Calls at an engine end there; those that wait are mapped again. With the last of them the cache changes hands
(``_carry``): restored where both engines share a folder, else prefilled ahead of the next call, and released where it
was. A move is kept for as long as its workflow is known, so it ends with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from orla_lg.core.background import Clock
from orla_lg.core.cache.engine_cache import Loan
from orla_lg.core.call import Assignment, Call
from orla_lg.core.engine.backend import model_asked
from orla_lg.core.engine.retry import AttemptFailed
from orla_lg.core.identity import tenant_of, workflow_key
from orla_lg.core.mapping import Consultation, Mapper, Mappings, named_in_code
from orla_lg.core.memory.events import CacheEvent, EventKind
from orla_lg.core.memory.manager import MemoryManager
from orla_lg.core.placement.view import BackendView
from orla_lg.core.queues import Queued
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.core.steps import Steps
from orla_lg.core.workflow import WorkflowBook
from orla_lg.errors import BackendUnavailable, ConfigError, did_you_mean

USUAL_CALLS = 16
"""Taken to be what a backend without a bound has at once, where backends are compared by their load."""


@dataclass(frozen=True, slots=True)
class Move:
    """Where a workflow's calls go."""

    to: str
    source: str | None = None
    """Only calls that would go to this backend, which was drained; ``None``: to any that serves the same model."""


class Moves:
    """The moves of one core; any thread may ask. Costs a call nothing while there are none.

    Args:
        schedulers: Of the backends.
        book: Which workflows are known.
        memory: Has caches released, and says what happens to workflows.
        mappings: Where moves are heeded.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        schedulers: Mapping[str, BackendScheduler],
        book: WorkflowBook,
        memory: MemoryManager,
        mappings: Mappings,
        clock: Clock,
    ) -> None:
        self._schedulers = schedulers
        self._book = book
        self._memory = memory
        self._mappings = mappings
        self._clock = clock
        self._to: dict[str, Move] = {}
        """By workflow; each is known to the book."""
        self._drained: dict[str, None] = {}
        """Backends that were drained and not resumed."""
        self._carried_later: dict[str, str] = {}
        """By workflow, the backend on which calls of it are still open; its cache goes along with the last one."""

    def __len__(self) -> int:
        return len(self._to)

    # What moves

    def move(self, name: str, backend: str | None, tenant: str | None = None) -> bool:
        """Have the next calls of a workflow go to a backend; returns whether there is such a workflow.

        Args:
            name: A thread's id, or a run's.
            backend: ``None``: where its mapping says, again.
            tenant: Whose it is.

        Raises:
            ConfigError: There is no such backend.
        """
        if backend is not None and backend not in self._schedulers:
            raise ConfigError(f"unknown backend {backend!r}{did_you_mean(backend, self._schedulers)}")
        workflows = self._named(name, tenant)
        for workflow in workflows:
            if backend is None:
                self._forget(workflow)
            else:
                self._set(workflow, Move(backend))
                self._begin(workflow, self._schedulers[backend])
        return bool(workflows)

    def _named(self, name: str, tenant: str | None) -> list[str]:
        if (run := self._book.run(name)) is not None:
            return [each for each in run.workflows if tenant is None or tenant_of(each) == tenant]
        key = workflow_key(name, tenant)
        return [] if self._book.known(key) is None else [key]

    def _set(self, workflow: str, move: Move) -> None:
        self._to[workflow] = move
        self._heed()
        if self._book.known(workflow) is None:  # it ended at this moment, and its end was heard before
            self._forget(workflow)

    def _heed(self) -> None:
        """Be asked where calls go, and hear of workflows, as long as there is anything to say."""
        moving = bool(self._to or self._drained)
        self._mappings.moving = self._moved if moving else None
        self._memory.follower = self._heard if moving else None
        if not moving and (self._to or self._drained):  # another thread moved one meanwhile
            self._heed()

    def _forget(self, workflow: str) -> None:
        self._carried_later.pop(workflow, None)
        if self._to.pop(workflow, None) is not None:
            self._heed()

    def _begin(self, workflow: str, to: BackendScheduler) -> None:
        """Take a workflow's cache along, from where it has most, and have its waiting calls mapped again."""
        state, held = self._book.known(workflow), list[tuple[int, BackendScheduler, list[Queued]]]()
        for name, scheduler in self._schedulers.items():
            with scheduler.lock:
                tokens, waiting = scheduler.cache.tokens_of(workflow), scheduler.queue.waiting_of([workflow])
            has_any = bool(tokens or waiting) or (state is not None and name in state.backends)
            if has_any and scheduler is not to and alike(scheduler, to):
                held.append((tokens, scheduler, waiting))
        self._carried_later.pop(workflow, None)
        held.sort(key=lambda each: -each[0])
        for _, scheduler, waiting in held[:1]:
            self._take_along(workflow, scheduler, to, waiting, ahead=True)
        for _, scheduler, waiting in held[1:]:
            displace(scheduler, waiting)
            self._release(workflow, scheduler)

    # Drains

    def drain(self, backend: str) -> None:
        """Have the workflows of a backend go to others that serve its model, until it is resumed."""
        source = self._schedulers[backend]
        self._drained[backend] = None
        self._heed()
        with source.lock:
            waiting = list(source.queue)
            holding = source.cache.workflows()
        by_workflow: dict[str, list[Queued]] = {workflow: [] for workflow in holding}
        for queued in waiting:
            by_workflow.setdefault(queued.call.identity.workflow, []).append(queued)
        models, given = models_of(source), dict[str, int]()
        for workflow, calls in by_workflow.items():
            to = self._best(workflow, source, models, given)
            if to is None:
                return
            name = to.backend.name
            given[name] = given.get(name, 0) + 1
            known = self._book.known(workflow) is not None
            if known and self._to.get(workflow, Move(backend)).to == backend:
                self._set(workflow, Move(name, backend))
                self._take_along(workflow, source, to, calls, ahead=self._book.is_running(workflow))
            else:
                displace(source, calls)

    def resumed(self, backend: str) -> None:
        """Note that a backend takes calls again. What was moved stays where its cache is, until it is idle."""
        if backend in self._drained:
            del self._drained[backend]
            self._heed()

    def _best(
        self, workflow: str, source: BackendScheduler, models: Sequence[str], given: Mapping[str, int] | None = None
    ) -> BackendScheduler | None:
        """Return the backend in the place of a drained one: one that holds the workflow, else the least busy one.

        Args:
            workflow: Its calls go there.
            source: The drained backend.
            models: What is asked for there.
            given: By backend, how many workflows were sent there just now.
        """
        best: tuple[bool, float] = (True, inf)
        found: BackendScheduler | None = None
        for name, scheduler in self._schedulers.items():
            queue = scheduler.queue
            if scheduler is source or queue.paused or scheduler.health.breaker.opened_s is not None:
                continue
            if not shares_alias(source, scheduler) and not (
                models and all(serves(scheduler, each) for each in models)
            ):
                continue
            with scheduler.lock:
                holds = scheduler.cache.tokens_of(workflow) > 0
            calls = queue.in_flight + queue.waiting + (given or {}).get(name, 0)
            if (rank := (not holds, calls / (queue.max_concurrency or USUAL_CALLS))) < best:
                best, found = rank, scheduler
        return found

    # Where calls go

    def _moved(self, mappers: Sequence[Mapper]) -> Sequence[Mapper]:
        return (MovedMapper(self, mappers),)

    def placed(self, call: Call, chosen: Assignment) -> Assignment:
        """Return where a call goes that was mapped."""
        home, workflow = self._schedulers.get(chosen.backend), call.identity.workflow
        if home is None:  # what does not exist is said by the mapping's own check
            return chosen
        move = self._to.get(workflow)
        asked = chosen.model or model_asked(home.backend.model, home.health.probe, call.ask.model)
        if asked is None:
            return chosen
        if chosen.backend in self._drained and (move is None or move.to == chosen.backend):
            if (best := self._best(workflow, home, [asked])) is None:
                return chosen
            move = Move(best.backend.name, chosen.backend)
            if self._book.known(workflow) is not None:
                self._set(workflow, move)
        if move is None or move.to == chosen.backend or move.source not in (None, chosen.backend):
            return chosen
        to = self._schedulers.get(move.to)
        if to is None or not (serves(to, asked) or shares_alias(home, to)):
            return chosen
        probe = to.health.probe
        named = asked if to.backend.model is None and probe is not None and asked in probe.models else chosen.model
        others = tuple(name for name in dict.fromkeys((chosen.backend, *chosen.alternatives)) if name != move.to)
        reason = f"moved from {chosen.backend!r}; {chosen.reason}"
        return replace(chosen, backend=move.to, model=named, alternatives=others, reason=reason)

    # What becomes of the cache

    def _heard(self, event: CacheEvent) -> None:
        """Follow a workflow that was moved (``MemoryManager.follower``)."""
        workflow = event.workflow
        move = self._to.get(workflow)
        if move is None:
            return
        drain_is_over = move.source is not None and move.source not in self._drained
        if event.final or (event.kind is EventKind.IDLE and drain_is_over):
            self._forget(workflow)
        elif event.kind is EventKind.CALL_DONE and event.backend is not None:
            source, to = self._schedulers.get(event.backend), self._schedulers.get(move.to)
            if self._carried_later.get(workflow) != event.backend or self._book.calls_open(workflow, event.backend):
                return
            self._carried_later.pop(workflow, None)
            if source is not None and to is not None:
                self._carry(workflow, source, to, (), ahead=True)

    def _take_along(
        self, workflow: str, source: BackendScheduler, to: BackendScheduler, waiting: Sequence[Queued], *, ahead: bool
    ) -> None:
        """Take a workflow's cache along from a backend: now, or when its last call at the engine there has ended.

        Args:
            workflow: With a move.
            source: Where its cache is.
            to: Where it was moved to.
            waiting: Its calls that wait at the source, which are mapped again.
            ahead: Whether to prefill, where nothing can be restored.
        """
        name, state = source.backend.name, self._book.known(workflow)
        opened = set[str]() if state is None else state.backends.get(name, set())
        if not opened - {each.call.id for each in waiting}:
            self._carry(workflow, source, to, waiting, ahead=ahead)
            return
        self._carried_later[workflow] = name
        if workflow not in self._to:  # it ended at this moment
            self._carried_later.pop(workflow, None)
        displace(source, waiting)

    def _carry(
        self, workflow: str, source: BackendScheduler, to: BackendScheduler, waiting: Sequence[Queued], *, ahead: bool
    ) -> None:
        def lent(loan: Loan | None) -> None:
            if loan is not None and self._to.get(workflow, _NOWHERE).to == to.backend.name:
                with to.lock:
                    to.cache.borrow(loan, self._clock())
            elif loan is not None:
                loan.ended()
            elif ahead:
                self._prefill(workflow, source, to)
            displace(source, waiting)  # where they go they find it now
            self._release(workflow, source)

        with source.lock:
            shelf = source.cache.shelf
            lends = shelf != "" and shelf == to.cache.shelf and source.cache.lend(workflow, self._clock(), lent)
        if not lends:
            lent(None)

    def _release(self, workflow: str, source: BackendScheduler) -> None:
        """Have the cache let go that a workflow left; where it has calls yet, its next one elsewhere does that."""
        name = source.backend.name
        if self._book.known(workflow) is not None and not self._book.calls_open(workflow, name):
            self._memory.signal([CacheEvent(EventKind.SWITCHED, workflow, name)])

    def _prefill(self, workflow: str, source: BackendScheduler, to: BackendScheduler) -> None:
        """Have the last known prompt of a workflow prefilled before its next call comes."""
        prompt = source.prefetcher.last_prompt(workflow)
        if prompt is None or source.isolation.on is not to.isolation.on:  # its hashes would be others there
            return
        model = model_asked(to.backend.model, to.health.probe, prompt.ask.model)
        if model is not None:
            to.prefetcher.receive(workflow, prompt.elsewhere(to.backend.name, model))

    def check_integrity(self) -> None:
        """Assert that moves are of workflows that are known, and are heeded exactly while there are any."""
        assert all(self._book.known(workflow) is not None for workflow in self._to), "a move outlives its workflow"
        assert self._carried_later.keys() <= self._to.keys()
        assert (self._mappings.moving is not None) == bool(self._to or self._drained)


_NOWHERE = Move("")


class MovedMapper:
    """Asks the mappers of a call, and heeds the move of its workflow.

    Args:
        moves: Of the core.
        mappers: Asked in order, as without moves.
    """

    def __init__(self, moves: Moves, mappers: Sequence[Mapper]) -> None:
        self._moves, self._mappers = moves, mappers

    def consult(self, call: Call, backends: Sequence[BackendView], ask: Consultation) -> Steps:  # noqa: D102
        chosen: Assignment | None = None
        for mapper in self._mappers:
            chosen = yield from ask.mapper(mapper, call, backends)
            if chosen is not None:
                break
        else:
            chosen = None if call.ask.embeds else named_in_code(call.ask.model, backends)
        return None if chosen is None else self._moves.placed(call, chosen)


def displace(scheduler: BackendScheduler, waiting: Iterable[Queued]) -> None:
    """Have waiting calls mapped again; one that is granted at this moment gives its grant back."""
    backend = scheduler.backend.name
    for queued in waiting:
        if queued.turn is not None:
            gone = BackendUnavailable(f"the call waited for backend {backend!r}, and its workflow was moved")
            queued.turn.fail(AttemptFailed(gone, moved=True))


# Whether backends serve the same model


def models_of(scheduler: BackendScheduler) -> list[str]:
    """Return the models that a backend may be asked for, as far as is known."""
    if scheduler.backend.model:
        return [scheduler.backend.model]
    return [] if scheduler.health.probe is None else list(scheduler.health.probe.distinct)


def serves(scheduler: BackendScheduler, model: str) -> bool:
    """Whether a call that asks for a model gets that same one from a backend."""
    backend, probe = scheduler.backend, scheduler.health.probe
    there = model_asked(backend.model, probe, model)
    if there is None:
        return False
    aliases = {} if probe is None else probe.aliases
    return model in (there, aliases.get(there)) or aliases.get(model) == there or model in backend.aliases


def shares_alias(one: BackendScheduler, other: BackendScheduler) -> bool:
    """Whether the configuration has a name for a model that means both backends."""
    return bool(set(one.backend.aliases) & set(other.backend.aliases))


def alike(one: BackendScheduler, other: BackendScheduler) -> bool:
    """Whether a backend serves all models of another one, as far as these are known."""
    return shares_alias(one, other) or all(serves(other, model) for model in models_of(one))
