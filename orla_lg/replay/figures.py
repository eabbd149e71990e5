"""What came of a workload in figures, and how near the simulated ones are to what happened."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from orla_lg.replay.simulation import Played
from orla_lg.replay.workload import PlannedCall, Workload

TOLERANCE = 0.15
"""A figure of the unchanged setting may be so far from what happened, as a part of it."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a workload."""

    name: str
    title: str
    unit: str
    of: Callable[[Sequence[Played]], float | None]
    slack: float = 0.0
    """So far off it may always be: what no user sees."""
    strictness: float = 1.0
    """By this its tolerance is smaller: where most is cached, a little less cached is much more to compute."""


@dataclass(frozen=True, slots=True)
class Match:
    """A figure as it happened and as the unchanged setting has it in virtual time."""

    figure: Figure
    happened: float | None
    simulated: float | None
    tolerance: float

    @property
    def off(self) -> float | None:
        """How far the simulation is off, as a part of what happened; ``None`` where one of them is not known."""
        if self.happened is None or self.simulated is None:
            return None
        if abs(self.simulated - self.happened) <= self.figure.slack:
            return 0.0
        return self.simulated / self.happened - 1 if self.happened else math.inf

    @property
    def holds(self) -> bool:
        """Whether it is near enough to conclude from."""
        return self.off is not None and abs(self.off) <= self.tolerance / self.figure.strictness


def as_seen(workload: Workload) -> list[Played]:
    """Return what happened, as the simulation tells what it saw; times after the first call's arrival."""
    begin_s = min(each.seen.arrived_s for each in workload.calls)
    return [_as_seen(each, begin_s) for each in workload.calls]


def _as_seen(call: PlannedCall, begin_s: float) -> Played:
    seen = call.seen
    first_s = seen.first_s if seen.is_counted else None
    return Played(
        call,
        seen.arrived_s - begin_s,
        seen.ended_s - begin_s,
        None if first_s is None else first_s - begin_s,
        seen.prompt_tokens or 0,
        seen.cached_tokens,
        seen.cost_usd,
        seen.error or "",
    )


def percentile(values: Sequence[float], share: float) -> float:
    """Return a quantile, interpolated between the two values around it."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def run_times(played: Sequence[Played]) -> list[float]:
    """Return how long each run took, from its first call's arrival to its last call's end."""
    began: dict[str, float] = {}
    ended: dict[str, float] = {}
    for each in played:
        run = each.call.run
        began[run] = min(each.arrived_s, began.get(run, each.arrived_s))
        ended[run] = max(each.ended_s, ended.get(run, each.ended_s))
    return [ended[run] - began[run] for run in began]


def first_tokens(played: Sequence[Played]) -> list[float]:
    """Return how long each call waited for its first token, the queue included; of calls that streamed.

    Where it is not known what happened, all are taken.
    """
    known = any(each.call.seen.ttft_s is not None for each in played)
    return [
        each.first_s - each.arrived_s
        for each in played
        if each.first_s is not None and (not known or each.call.seen.ttft_s is not None)
    ]


def _makespan(played: Sequence[Played]) -> float | None:
    return max(each.ended_s for each in played) - min(each.arrived_s for each in played) if played else None


def _cached(played: Sequence[Played]) -> float | None:
    known = [each for each in played if each.cached_tokens is not None and each.prompt_tokens]
    prompt = sum(each.prompt_tokens for each in known)
    return sum(each.cached_tokens or 0 for each in known) / prompt if prompt else None


def _cost(played: Sequence[Played]) -> float | None:
    known = [each.cost_usd for each in played if each.cost_usd is not None]
    return sum(known) if any(known) else None


def _over(
    values: Callable[[Sequence[Played]], Sequence[float]], of: Callable[[Sequence[float]], float]
) -> Callable[[Sequence[Played]], float | None]:
    def figure(played: Sequence[Played]) -> float | None:
        found = values(played)
        return of(found) if found else None

    return figure


MAKESPAN = Figure("makespan_s", "makespan", "s", _makespan, 0.05)
MEAN_RUN = Figure("mean_run_s", "mean run", "s", _over(run_times, fmean), 0.02)
P95_RUN = Figure("p95_run_s", "p95 run", "s", _over(run_times, lambda all_: percentile(all_, 0.95)), 0.02)
MEAN_TTFT = Figure("mean_ttft_s", "mean TTFT", "s", _over(first_tokens, fmean), 0.02)
P95_TTFT = Figure("p95_ttft_s", "p95 TTFT", "s", _over(first_tokens, lambda all_: percentile(all_, 0.95)), 0.02)
CACHED = Figure("cached", "cached", "share", _cached, 0.01, strictness=3.0)
COST = Figure("cost_usd", "cost", "usd", _cost)
FIGURES = (MAKESPAN, MEAN_RUN, P95_RUN, MEAN_TTFT, P95_TTFT, CACHED, COST)
DECISIVE = (MAKESPAN, MEAN_RUN)
"""Where one of these is off, nothing is concluded; where another is, nothing of it."""


def figures_of(played: Sequence[Played]) -> dict[str, float | None]:
    """Return all figures by name."""
    return {figure.name: figure.of(played) for figure in FIGURES}


def matches(
    happened: Mapping[str, float | None], simulated: Mapping[str, float | None], tolerance: float
) -> list[Match]:
    """Return how near the unchanged setting is to what happened, figure by figure, where that is known."""
    return [
        Match(figure, happened[figure.name], simulated[figure.name], tolerance)
        for figure in FIGURES
        if happened[figure.name] is not None
    ]
