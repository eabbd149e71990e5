"""Drawings as SVG files that are the same bytes for the same figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.lib.figures import Rounds, Spread


def pyplot(salt: str, size: float = 8, *, text: bool = False) -> Any:
    """Return matplotlib's pyplot; *salt* makes the names within the file, *text* leaves letters letters."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    plt.rcdefaults()
    plt.rcParams.update({"svg.hashsalt": salt, "font.size": size, "svg.fonttype": "none" if text else "path"})
    return plt


def save(plot: Any, path: Path, *, tight: tuple[float, float, float, float] | None = (0, 0, 1, 1)) -> None:
    """Write a figure; *tight* is the part of it that its panes may take, ``None`` where its layout is set."""
    if tight is not None:
        plot.tight_layout(rect=tight)
    plot.savefig(path, metadata={"Date": None})


def shares(axes: Any, values: Sequence[float], label: str, **style: Any) -> None:
    """Draw which part of *values* does not exceed a value."""
    ordered = sorted(values)
    parts = [(number + 1) / len(ordered) for number in range(len(ordered))]
    axes.step(ordered, parts, where="post", label=label, **style)


def bars(axes: Any, rows: Mapping[str, Spread], colours: Sequence[str], goal: float | None, colour: str) -> None:
    """Draw a bar for each row with its extremes, and the goal as a line."""
    errors = [[row.middle - row.least for row in rows.values()], [row.most - row.middle for row in rows.values()]]
    middles = [row.middle for row in rows.values()]
    axes.barh([*rows], middles, xerr=errors, color=colours, height=0.6, error_kw={"lw": 1})
    if goal is not None:
        axes.axvline(goal, color=colour, ls="--", lw=1)


def open_axes(*panes: Any) -> None:
    """Leave the upper and the right line of every pane away."""
    for axes in panes:
        axes.spines[["top", "right"]].set_visible(False)


def curves(
    name: str, path: Path, panes: Mapping[str, Rounds[Any]], values: Callable[[Any], Sequence[float]],
    colours: Mapping[str, str] | None = None, wide: int = 4,
) -> None:  # fmt: skip
    """Draw, in a pane for each title, which part of an arm's calls had its first token within so many seconds."""
    high, across = -(-len(panes) // wide), min(wide, len(panes))
    figure, drawn = pyplot(name).subplots(high, across, figsize=(3.2 * across, 2.8 * high), squeeze=False)
    for axes in drawn.flat[len(panes) :]:
        axes.set_axis_off()
    for axes, (title, rounds) in zip(drawn.flat, panes.items(), strict=False):
        for arm in rounds.arms:
            style = {"color": colours[arm]} if colours else {}
            shares(axes, [value for turn in rounds.of(arm) for value in values(turn)], arm, lw=1.2, **style)
        axes.set(title=title, xscale="log", xlabel="time to first token, s", ylabel="part of the calls", ylim=(0, 1))
    open_axes(*drawn.flat)
    named = {
        label: line for axes in drawn.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="lower center", ncols=len(named), frameon=False)
    save(figure, path, tight=(0, 0.27 / (2.8 * high), 1, 1))
