"""Backends as mappers see them: what each is, how busy it is, how fast it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orla_lg.core.backend import Backend, Cost, Probe
from orla_lg.core.breaker import Circuit
from orla_lg.core.control import EngineStats
from orla_lg.core.pace import NO_SPEED, Speed


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
    speed: Speed = NO_SPEED
    load: EngineStats | None = None
    """What the engine said of its own load when it was last asked."""
    resident_tokens: int = 0
    """What the ledger believes the asking workflow has in this backend's KV cache."""


def served_names(backend: Backend, probe: Probe | None) -> tuple[str, ...]:
    """Return the names in code that mean *backend*."""
    own = (backend.name, *((backend.model,) if backend.model else ()), *backend.aliases)
    return own + (probe.models if probe else ())


def names(backends: Sequence[BackendView]) -> list[str]:
    """Return the backends' names, for messages."""
    return [backend.name for backend in backends]
