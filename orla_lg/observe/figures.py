"""What is read off a core's statistics when it is scraped: a table of names, meanings, and where each stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Generic, Literal, TypeVar

from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.operation.statistics import BackendStatistics, Statistics

CIRCUITS = {Circuit.CLOSED: 0, Circuit.HALF_OPEN: 1, Circuit.OPEN: 2}

Value = float | Mapping[str, float] | None
"""By the values of the figure's own label, where it has one; ``None``: not known, and left out."""
Of = TypeVar("Of")


@dataclass(frozen=True, slots=True)
class ScrapedFigure(Generic[Of]):
    """A metric."""

    kind: Literal["gauge", "counter"]
    name: str
    """Of a counter without its ``_total``."""
    help: str
    of: Callable[[Of], Value]
    by: tuple[str, ...] = ()
    """Its own labels; several are joined by colons in the keys of its values."""


def _gauge(name: str, text: str, of: Callable[[Of], Value], *by: str) -> ScrapedFigure[Of]:
    return ScrapedFigure("gauge", name, text, of, by)


def _counter(name: str, text: str, of: Callable[[Of], Value], *by: str) -> ScrapedFigure[Of]:
    return ScrapedFigure("counter", name, text, of, by)


def _yes(said: bool | None) -> float | None:
    return None if said is None else float(said)


def _admission(name: str) -> Callable[[BackendStatistics], Value]:
    return lambda now: None if now.admission is None else getattr(now.admission, name)


def _warm_ups(now: BackendStatistics) -> Mapping[str, float]:
    warm = now.warm_ups
    return {
        "done": warm.done, "given_up": warm.given_up, "failed": warm.failed, "refused": sum(warm.refused.values())
    }  # fmt: skip


OF_BACKENDS: tuple[ScrapedFigure[BackendStatistics], ...] = (
    _gauge("orla_scheduler_queue_depth", "Calls that wait at a backend.", lambda now: now.queue.waiting),
    _gauge("orla_scheduler_in_flight", "Calls in flight at a backend.", lambda now: now.queue.in_flight),
    _gauge(
        "orla_scheduler_capacity", "Calls that may be in flight at a backend at once; +Inf: no bound.",
        lambda now: inf if now.queue.max_concurrency is None else now.queue.max_concurrency,
    ),
    _gauge("orla_scheduler_queue_limit", "Calls that may wait at a backend.", lambda now: now.queue.capacity),
    _counter("orla_scheduler_dispatched", "Grants given at a backend.", lambda now: now.queue.granted),
    _counter(
        "orla_scheduler_rejections", "Calls refused because a backend's queue was full.",
        lambda now: now.queue.refused,
    ),
    _gauge(
        "orla_circuit_breaker_state", "The circuit of a backend: 0 closed, 1 half open, 2 open.",
        lambda now: CIRCUITS[now.circuit],
    ),
    _counter("orla_circuit_breaker_trips", "How often a backend's circuit opened.", lambda now: now.trips),
    _gauge(
        "orla_backend_reachable", "Whether a backend answered lately (1) or not (0).", lambda now: _yes(now.reachable)
    ),
    _gauge("orla_backend_paused", "Whether a backend is paused (1) or not (0).", lambda now: _yes(now.queue.paused)),
    # Caches
    _gauge("orla_cache_tokens", "Tokens believed to be in an engine's KV cache.", lambda now: now.memory.tokens),
    _gauge(
        "orla_cache_workflows", "Workflows believed to hold KV cache at an engine.", lambda now: now.memory.workflows
    ),
    _gauge("orla_cache_slots", "Slots of an engine that has some.", lambda now: now.memory.slots),
    _gauge(
        "orla_cache_slots_held", "Of an engine's slots, those that workflows hold.",
        lambda now: None if now.memory.slots is None else now.memory.slots_held,
    ),
    _gauge("orla_cache_saved_slots", "Slots' contents on an engine's disk.", lambda now: now.memory.saved),
    _counter(
        "orla_cache_orders", "Orders to an engine's cache, and what came of them.",
        lambda now: now.memory.effects, "order", "effect",
    ),
    _counter(
        "orla_cache_expected_tokens", "Prompt tokens expected to be cached, of prompts that the engine counts.",
        lambda now: now.memory.truth.claimed_tokens,
    ),
    _counter(
        "orla_cache_kept_tokens", "Of the tokens expected to be cached, those that the engine found.",
        lambda now: now.memory.truth.verified_tokens,
    ),
    # Admission
    _gauge(
        "orla_admission_limit_tokens", "KV cache that calls and claims may want at once.", _admission("limit_tokens")
    ),
    _gauge("orla_admission_in_use_tokens", "KV cache of calls in flight.", _admission("in_use_tokens")),
    _gauge("orla_admission_wanted_tokens", "KV cache in use or counted on.", _admission("wanted_tokens")),
    _gauge("orla_admission_growth_tokens", "What all these are expected to grow by.", _admission("growth_tokens")),
    _counter("orla_admission_losses", "Answers that found much less cached than expected.", _admission("losses")),
    _counter("orla_admission_lapsed", "Claims given up for others.", _admission("lapsed")),
    # Warm-ups
    _counter("orla_warm_ups", "Prompts prefilled before their calls, by what came of it.", _warm_ups, "outcome"),
    _counter(
        "orla_warm_up_tokens", "Tokens computed by warm-ups, as far as their calls came: found by them, or wasted.",
        lambda now: {"used": now.warm_ups.used_tokens, "wasted": now.warm_ups.wasted_tokens}, "outcome",
    ),
    _counter(
        "orla_cost_warm_ups_usd", "US dollars spent on warm-ups, by the backends' prices.",
        lambda now: now.warm_ups.cost_usd,
    ),
)  # fmt: skip

OF_ALL: tuple[ScrapedFigure[Statistics], ...] = (
    _gauge("orla_backends", "Backends of this core.", lambda now: len(now.backends)),
    _counter("orla_external_calls", "Calls that were not this core's to place.", lambda now: now.external),
    _counter("orla_unidentified_calls", "Calls whose graph's context was lost.", lambda now: now.unidentified),
    _counter("orla_records_dropped", "Records that are no longer kept in memory.", lambda now: now.records_dropped),
    _counter("orla_records_unwritten", "Lines that the records file could not take.", lambda now: now.unwritten),
)  # fmt: skip

OF_PROCESS: tuple[ScrapedFigure[Statistics], ...] = (
    _gauge("orla_runs_open", "Runs that are open.", lambda now: now.workflows.runs),
    _gauge("orla_workflows_running", "Workflows with an open run.", lambda now: now.workflows.running),
    _gauge("orla_threads_idle", "Threads without an open run that are remembered.", lambda now: now.workflows.idle),
    _counter("orla_runs_ended", "Runs that ended, by how.", lambda now: now.workflows.outcomes, "outcome"),
    _counter("orla_early_tools_started", "Tools started before their turn.", lambda now: now.early_tools.started),
    _counter("orla_early_tools_used", "Of these, those whose result was used.", lambda now: now.early_tools.used),
    _counter("orla_early_tools_failed", "Of these, those that failed.", lambda now: now.early_tools.failed),
    _counter(
        "orla_early_tools_dropped", "Of these, those whose result no call got, by reason.",
        lambda now: now.early_tools.dropped, "reason",
    ),
    _counter(
        "orla_early_tools_hidden_seconds", "Of the time of tools that were used, what passed before their turn.",
        lambda now: now.early_tools.hidden_s,
    ),
    _gauge("orla_early_tools_waiting", "Early tools that await their turn.", lambda now: now.early_tools.waiting),
)  # fmt: skip
"""Of the graphs of a process, whether its core is in it or elsewhere."""
