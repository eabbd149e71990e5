"""The figures in docs/: a table between marks in the page, and the drawing."""

from __future__ import annotations

from pathlib import Path

from bench.lib.calls import TIMES
from bench.lib.marks import DOCS
from bench.pressure.arms import BARE, OURS
from bench.pressure.results import GOAL_OVER_BOUND, GOALS, TITLES, Figures

PAGE, DRAWING = DOCS / "pressure.md", DOCS / "pressure.svg"


def draw(figures: Figures, path: Path = DRAWING) -> None:
    """Draw each arm's figures against the bare engine's, with the extreme seeds, and the goals."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "pressure", "font.size": 8})
    import matplotlib.pyplot as plt

    arms = [arm for arm in figures.arms if arm != BARE]
    plot, panes = plt.subplots(1, len(TIMES) + 1, figsize=(14, 0.35 * len(arms) + 1.2), sharey=True)
    for axes, name in zip(panes, (*TIMES, "over_bound"), strict=True):
        rows = [figures.of(arm, name) if name == "over_bound" else figures.ratio(arm, name) for arm in arms]
        middles = [row[0] for row in rows]
        errors = [[row[0] - row[1] for row in rows], [row[2] - row[0] for row in rows]]
        colours = ["#3b7dd8" if arm in OURS else "#aaa" for arm in arms]
        axes.barh(arms, middles, xerr=errors, color=colours, height=0.6, error_kw={"lw": 1})
        goal = GOALS.get(name, GOAL_OVER_BOUND if name == "over_bound" else None)
        if goal is not None:
            axes.axvline(goal, color="#c33", ls="--", lw=1)
        axes.set_title("recomputed" if name == "over_bound" else TITLES[name])
        axes.set_xlabel("of the bound" if name == "over_bound" else "of bare")
        axes.spines[["top", "right"]].set_visible(False)
    panes[0].invert_yaxis()
    plot.tight_layout()
    plot.savefig(path, metadata={"Date": None})
