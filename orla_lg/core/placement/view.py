"""Backends as mappers see them: what each is, how busy it is, how fast it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from orla_lg.core.call import Call
from orla_lg.core.engine.backend import Backend, Cost, Probe
from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.engine.capabilities import EngineStats
from orla_lg.core.engine.speed import NO_SPEED, Speed
from orla_lg.core.scheduler import BackendScheduler


def nothing() -> int:
    """Return 0, the tokens that a call finds where none are known of."""
    return 0


@dataclass(frozen=True, slots=True)
class BackendView:
    """A backend as mappers see it: what it is, and how busy it is now."""

    name: str
    models: tuple[str, ...]
    """Names in code that mean this backend: its own, its model's, its aliases, what it serves."""
    probe: Probe | None
    """``None`` while the engine has not answered yet."""
    cost: Cost
    quality: float | None
    waiting: int
    in_flight: int
    max_concurrency: int | None
    circuit: Circuit = Circuit.CLOSED
    paused: bool = False
    """Calls for it wait until somebody resumes it (``Orla.pause``)."""
    speed: Speed = NO_SPEED
    load: EngineStats | None = None
    """What the engine said of its own load when it was last asked."""
    waiting_for_prefix: int = 0
    """Of those waiting, who could have a place, but had better wait for a prefix that another call is prefilling."""
    model: str | None = None
    """The one that its configuration names."""
    resident: Callable[[], int] = field(default=nothing, repr=False)
    """Looks ``resident_tokens`` up, which not every mapper wants to know."""

    @property
    def resident_tokens(self) -> int:
        """What of the asking call's prompt is believed to be in this backend's KV cache, or on its way there."""
        return self.resident()

    @property
    def shut(self) -> bool:
        """Whether a call for it would get nowhere now: it is paused, or its circuit is open."""
        return self.paused or self.circuit is Circuit.OPEN


def served_names(backend: Backend, probe: Probe | None) -> tuple[str, ...]:
    """Return the names in code that mean *backend*."""
    own = (backend.name, *((backend.model,) if backend.model else ()), *backend.aliases)
    return own + (probe.models if probe else ())


def names(backends: Sequence[BackendView]) -> list[str]:
    """Return the backends' names, for messages."""
    return [backend.name for backend in backends]


def find(backends: Sequence[BackendView], name: str) -> BackendView | None:
    """Return the backend called *name*."""
    for backend in backends:
        if backend.name == name:
            return backend
    return None


def view_of(scheduler: BackendScheduler, call: Call | None = None) -> BackendView:
    """Return a backend as mappers see it now, on behalf of a call."""
    backend, queue, health = scheduler.backend, scheduler.queue, scheduler.health
    probe = health.probe
    return BackendView(
        name=backend.name,
        models=served_names(backend, probe),
        probe=probe,
        cost=backend.cost,
        quality=backend.quality,
        waiting=queue.waiting,
        in_flight=queue.in_flight,
        max_concurrency=queue.max_concurrency,
        circuit=Circuit.CLOSED if health.breaker.opened_s is None else health.state(),
        paused=queue.paused,
        speed=scheduler.pace.speed,
        load=None if scheduler.load is None else scheduler.load.wanted(probe),
        waiting_for_prefix=scheduler.cache.waiting_for_prefix,
        model=backend.model,
        resident=nothing if call is None else partial(resident_tokens, scheduler, call),
    )


def resident_tokens(scheduler: BackendScheduler, call: Call) -> int:
    """Return how much of a call's prompt it would find in a backend's cache, what others prefill there included."""
    ask = scheduler.isolation.within(call)
    with scheduler.lock:
        return round(scheduler.cache.expected(call, ask))
