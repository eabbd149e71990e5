"""What a running process shows of itself: statistics and a little more, small enough to be sent every second."""

from __future__ import annotations

import heapq
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from orla_lg.core.accounting.costs import Spent
from orla_lg.core.cache.verification import VerificationCounts
from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.identity import tenant_of, workflow_name
from orla_lg.core.memory.events import Doing
from orla_lg.core.operation.statistics import BackendStatistics, Waiting
from orla_lg.core.policies import name_of
from orla_lg.core.queues import Policies
from orla_lg.core.serving import Serving
from orla_lg.core.workflow import WorkflowBook

SHOWN = 100
"""Of the workflows that hold cache on a backend, so many are shown: those that hold most."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A workflow that is believed to hold KV cache on a backend."""

    workflow: str
    tokens: int
    state: Doing
    tenant: str | None = None


@dataclass(frozen=True, slots=True)
class Occupancy:
    """A backend's KV cache, as we believe it to be; in tokens."""

    capacity_tokens: int | None = None
    """``None`` where the engine does not say."""
    promised_tokens: int = 0
    """Of calls under way, beyond what is resident."""
    resident_tokens: int = 0
    holders: int = 0
    workflows: tuple[Holder, ...] = ()
    """Those that hold most; at most ``SHOWN``."""


@dataclass(frozen=True, slots=True)
class BackendState:
    """A backend at one moment."""

    engine: str
    reachable: bool | None
    circuit: Circuit
    paused: bool
    in_flight: int
    max_concurrency: int | None
    waiting: int
    capacity: int
    waiting_by_stage: Mapping[str, int]
    stage_policy: str
    request_policies: Mapping[str, str]
    """By stage; ``"*"`` is any other."""
    spent: Spent
    """By its calls since the start; rates are differences of these."""
    kv: Occupancy
    cache_effects: Mapping[str, int]
    """What came of orders about caches, per ``verb:effect``."""
    truth: VerificationCounts
    waits: tuple[Waiting, ...]


@dataclass(frozen=True, slots=True)
class ProcessState:
    """A process at one moment."""

    pid: int
    at_s: float
    """Monotonic seconds, to be compared with another state of the same process."""
    calls: int
    """Ended since the start."""
    runs: int
    """Open now."""
    idle: int
    """Threads without an open run."""
    backends: Mapping[str, BackendState] = field(default_factory=dict)


def state(serving: Serving) -> ProcessState:
    """Return the state of a core."""
    now = serving.statistics()
    return ProcessState(
        pid=os.getpid(),
        at_s=serving.clock(),
        calls=now.calls,
        runs=now.workflows.runs,
        idle=now.workflows.idle,
        backends={
            name: _backend(serving, name, each, now.costs.backends.get(name, Spent()))
            for name, each in now.backends.items()
            if name in serving.schedulers  # a replica may not reach all of its core's
        },
    )


def _backend(serving: Serving, name: str, now: BackendStatistics, spent: Spent) -> BackendState:
    scheduler, queue = serving.schedulers[name], now.queue
    policies = scheduler.queue.policies
    return BackendState(
        engine=scheduler.backend.engine,
        reachable=now.reachable,
        circuit=now.circuit,
        paused=queue.paused,
        in_flight=queue.in_flight,
        max_concurrency=queue.max_concurrency,
        waiting=queue.waiting,
        capacity=queue.capacity,
        waiting_by_stage=queue.waiting_by_stage,
        stage_policy=name_of(policies.stage),
        request_policies=_requests(policies),
        spent=spent,
        kv=occupancy(serving, name, now),
        cache_effects=now.memory.effects,
        truth=now.memory.truth,
        waits=now.waiting,
    )


def _requests(policies: Policies) -> dict[str, str]:
    return {stage: name_of(policy) for stage, policy in policies.requests.items()}


def occupancy(serving: Serving, name: str, now: BackendStatistics) -> Occupancy:
    """Return how full a backend's KV cache is: by admission's account, else by what the ledger knows."""
    if (admission := now.admission) is not None:
        held = [Holder(each.workflow, each.tokens, each.doing, each.tenant) for each in admission.workflows]
        capacity, resident, promised = admission.limit_tokens, admission.wanted_tokens, admission.growth_tokens
    else:
        scheduler, book, probe = serving.schedulers[name], serving.book, serving.schedulers[name].health.probe
        with scheduler.lock:
            tokens, interrupted = Counter(scheduler.cache.workflows()), scheduler.cache.interrupted()
        held = [
            Holder(
                workflow_name(key),
                size,
                _activity(book, key, name, interrupted=key in interrupted),
                tenant_of(key) or None,
            )
            for key, size in tokens.items()
        ]
        capacity, promised, resident = probe.kv_tokens if probe is not None else None, 0, tokens.total()
    most = heapq.nlargest(SHOWN, held, key=lambda each: each.tokens)
    return Occupancy(capacity, promised, resident, len(held), tuple(most))


def _activity(book: WorkflowBook, workflow: str, backend: str, *, interrupted: bool) -> Doing:
    if book.calls_open(workflow, backend):
        return Doing.GENERATING
    if book.is_running(workflow):
        return Doing.TOOL
    return Doing.HUMAN if interrupted else Doing.IDLE
