"""Arms in figures, each against all heavy in the same block."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.lib import plot
from bench.lib.figures import Spread, ratios, spread, table
from bench.lib.marks import ROOT
from bench.mapping.arms import Arm

GOALS = {"wall_s": -0.38, "completion_s": -0.60, "cost_usd": -0.35}
"""Of the mapped arms against all heavy: the paper's figures."""


@dataclass(frozen=True)
class Figure:
    """An arm's medians over blocks; *change* is against all heavy in the same block, with the extreme blocks."""

    name: str
    medians: dict[str, float]
    change: dict[str, Spread]
    light_share: float
    score: float


def baseline_of(arms: Sequence[Arm]) -> Arm:
    """Return the all-heavy arm that took less time."""
    return min(
        (arm for arm in arms if arm.is_baseline), key=lambda arm: statistics.median(r.wall_s for r in arm.runs)
    )


def figures(arms: Sequence[Arm]) -> list[Figure]:
    base = baseline_of(arms).runs
    rows = []
    for arm in arms:
        medians, change = {}, {}
        for name in GOALS:
            mine, theirs = [[getattr(one, name) for one in runs] for runs in (arm.runs, base)]
            changes = [ratio - 1 for ratio in ratios(mine, theirs)]
            medians[name] = statistics.median(mine)
            change[name] = spread(changes)
        light, score = (statistics.fmean(getattr(one, name) for one in arm.runs) for name in ("light_share", "score"))
        rows.append(Figure(arm.name, medians, change, light, score))
    return rows


def report(rows: Sequence[Figure], base: str) -> str:
    head = (
        "arm",
        "to light",
        "wall-clock, s",
        "change",
        "mean completion, s",
        "change",
        "cost, µ$",
        "change",
        "score",
    )
    lines = []
    for row in rows:
        cells = []
        for name, scale in (("wall_s", 1), ("completion_s", 1), ("cost_usd", 1e6)):
            change = "baseline" if row.name == base else row.change[name].shown("+.0%", bold=True)
            cells += [f"{row.medians[name] * scale:.1f}", change]
        lines.append([row.name, f"{row.light_share:.0%}", *cells, f"{row.score:.2f}"])
    return "\n".join(table(head, lines))


def draw(rows: Sequence[Figure], base: str, path: Path) -> None:
    """Draw the changes against all heavy with the extreme blocks, and the score."""
    titles = {"wall_s": "wall-clock", "completion_s": "mean completion time", "cost_usd": "cost"}
    size = (11, 0.4 * len(rows) + 1.3)
    figure, panes = plot.pyplot("mapping", 8).subplots(1, 4, figsize=size, sharey=True)
    colours = ["#999" if row.name == base else "#e08a3c" if row.score < 1 else "#3b7dd8" for row in rows]
    for axes, (name, title) in zip(panes, titles.items(), strict=False):
        changed = {row.name: Spread(*(1 + value for value in row.change[name])) for row in rows}
        plot.bars(axes, changed, colours, 1 + GOALS[name], "#777")
        axes.set(title=title, xlabel="of all heavy (dashed: goal)")
    panes[3].barh([row.name for row in rows], [row.score for row in rows], color=colours, height=0.6)
    panes[3].set(title="score", xlabel="answered by a model that can")
    panes[0].invert_yaxis()
    plot.open_axes(*panes)
    plot.save(figure, path)
    print(f"drawn: {path.relative_to(ROOT)}")


def misses(rows: Sequence[Figure], goals: Mapping[str, float] = GOALS) -> list[str]:
    """Return what the mapped arms with the full score, or learned, do not reach."""
    mapped = [row for row in rows if row.name.startswith(("labels", "learned"))]
    return [
        f"goal missed: {row.name}: {name.rpartition('_')[0]} {row.change[name][0]:+.0%}, wanted {goal:+.0%}"
        for row in mapped
        for name, goal in goals.items()
        if row.change[name][0] > goal
    ]
