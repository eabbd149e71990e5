"""What runs showed: what an arm takes less than bare, request by request, beside what the law gives for the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

from bench.lib import plot
from bench.lib.figures import Rounds, Spread, percentile, table
from bench.tools.arms import BARE, Run

GOAL_BARE, GOAL_POINTS = 0.02, 3.0
COLOURS = {"wrapped": "#999", "early": "#3b7dd8", "split": "#e08a3c", "both": "#4a4"}
LAW = "#c33"
Figure = Callable[[Run], float]
ftr_s, law_ftr_s, end_s, law_end_s = map(attrgetter, ("found.ftr_s", "law.ftr_s", "found.end_s", "law.end_s"))


def quartiles(values: Sequence[float]) -> Spread:
    return Spread(median(values), percentile(values, 0.25), percentile(values, 0.75))


def less(runs: Rounds[Run], arm: str, figure: Figure) -> list[float]:
    """Return how much less than bare an arm takes, request by request, in percent."""
    return [100 * (1 - ratio) for ratio in runs.ratios(arm, BARE, figure)]


def of_medians(runs: Rounds[Run], arm: str, figure: Figure) -> float:
    """Return how much less than bare's an arm's median is, in percent."""
    return 100 * (1 - median(runs.column(arm, figure)) / median(runs.column(BARE, figure)))


def report(places: Mapping[str, Rounds[Run]]) -> list[str]:
    """Return a table for each place: gains request by request, and of the medians; spreads are quartiles."""
    heads = (
        "FTR, s", "law", "FTR less, pairs, %", "law", "medians, %", "law", "end to end, s", "less, medians, %", "law",
    )  # fmt: skip
    lines = list[str]()
    for place, runs in places.items():
        rows = []
        for arm in runs.arms:
            row = [arm, quartiles(runs.column(arm, ftr_s)).shown(".1f"), f"{median(runs.column(arm, law_ftr_s)):.1f}"]
            ends = quartiles(runs.column(arm, end_s)).shown(".1f")
            if arm == BARE:
                rows.append([*row, "", "", "", "", ends, "", ""])
                continue
            rows.append([
                *row, quartiles(less(runs, arm, ftr_s)).shown(".1f", bold=True),
                f"{median(less(runs, arm, law_ftr_s)):.1f}",
                f"{of_medians(runs, arm, ftr_s):.1f}", f"{of_medians(runs, arm, law_ftr_s):.1f}",
                ends, f"{of_medians(runs, arm, end_s):.1f}", f"{of_medians(runs, arm, law_end_s):.1f}",
            ])  # fmt: skip
        lines += [*table((place, *heads), rows), ""]
    return lines


def short(runs: Rounds[Run], arm: str) -> float:
    """Return by how many points an arm gains less than the law gives: the median of the pairs, or of the medians."""
    middle = median(less(runs, arm, law_ftr_s)) - median(less(runs, arm, ftr_s))
    return max(middle, of_medians(runs, arm, law_ftr_s) - of_medians(runs, arm, ftr_s))


def verdict(places: Mapping[str, Rounds[Run]]) -> list[str]:
    """Say whether bare keeps its law, and what the arms lack of theirs."""
    lines = []
    for place, runs in places.items():
        beyond = median(run.found.ftr_s / run.law.ftr_s - 1 for run in runs.of(BARE))
        lines.append(f"{place}: bare is {beyond:+.1%} of its law: {'met' if abs(beyond) <= GOAL_BARE else 'MISSED'}")
        for arm in runs.arms:
            if arm not in (BARE, "wrapped"):
                points = short(runs, arm)
                said = "met" if points <= GOAL_POINTS else "MISSED"
                lines.append(f"{place}: {arm} is {points:.1f} points below the law: {said}")
    return lines


def draw(places: Mapping[str, Rounds[Run]], path: Path) -> None:
    """Draw what each arm gains, with the law as a mark."""
    figure, panes = plot.pyplot("tools").subplots(1, len(places), figsize=(2.6 * len(places), 2.0), squeeze=False)
    for axes, (place, runs) in zip(panes.flat, places.items(), strict=True):
        arms = [arm for arm in reversed(runs.arms) if arm != BARE]
        bars: dict[str, Any] = {arm: quartiles(less(runs, arm, ftr_s)) for arm in arms}
        plot.bars(axes, bars, [COLOURS[arm] for arm in arms], None, LAW)
        axes.plot([median(less(runs, arm, law_ftr_s)) for arm in arms], arms, "|", color=LAW, ms=12, mew=2)
        axes.set_title(place, fontsize=8)
        axes.set_xlabel("FTR less than bare, % (red: law)", fontsize=7)
    plot.open_axes(*panes.flat)
    plot.save(figure, path)
