"""What turns showed: a table, a verdict, a drawing, and their place in the documentation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.lib.calls import percentile
from bench.lib.marks import DOCS
from bench.slots.workflows import Seen

PAGE, DRAWING = DOCS / "slots.md", DOCS / "slots.svg"
GOAL_P95 = 3.0
STOCK, AGAIN, ORLA = "stock", "stock again", "orla"


@dataclass(frozen=True)
class Measured:
    """A turn in figures."""

    arm: str
    seed: int
    calls: list[Seen]
    peak_mib: float | None
    files_mib: float

    @property
    def returns_s(self) -> list[float]:
        """The times to the first token of calls that are not a workflow's first."""
        return [call.first_s - call.called_s for call in self.calls if call.number]

    @property
    def recomputed(self) -> int:
        """Prompt tokens of those calls that were not found in a cache."""
        return sum(call.prompt_tokens - call.cached_tokens for call in self.calls if call.number)

    @property
    def makespan_s(self) -> float:
        return max(call.ended_s for call in self.calls)


def of(turns: Sequence[Measured], arm: str) -> list[Measured]:
    return [turn for turn in turns if turn.arm == arm]


def p50(turn: Measured) -> float:
    return percentile(turn.returns_s, 0.5)


def p95(turn: Measured) -> float:
    return percentile(turn.returns_s, 0.95)


def middle(figures: Sequence[float], digits: int = 2) -> str:
    """Return a median, with the extremes where there are several."""
    around = f" ({min(figures):.{digits}f} … {max(figures):.{digits}f})" if len(figures) > 1 else ""
    return f"**{statistics.median(figures):.{digits}f}**{around}"


def table(turns: Sequence[Measured]) -> list[str]:
    lines = ["| arm | TTFT p50, s | TTFT p95, s | recomputed, tokens | makespan, s | engine, MiB | files, MiB |"]
    lines.append("|---|---|---|---|---|---|---|")
    for arm in dict.fromkeys(turn.arm for turn in turns):
        own = of(turns, arm)
        figures = [
            [p50(t) for t in own],
            [p95(t) for t in own],
            [t.recomputed for t in own],
            [t.makespan_s for t in own],
        ]
        cells = [middle(row, digits) for row, digits in zip(figures, (2, 2, 0, 0), strict=True)]
        peaks = [turn.peak_mib for turn in own if turn.peak_mib is not None]
        cells += [f"{max(peaks):.0f}" if peaks else "not told", f"{max(turn.files_mib for turn in own):.0f}"]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def ratios(turns: Sequence[Measured], arm: str, figure: Any) -> list[float]:
    """Return stock's figure over an arm's, round by round."""
    other = {turn.seed: figure(turn) for turn in of(turns, STOCK)}
    return [other[turn.seed] / max(1e-9, figure(turn)) for turn in of(turns, arm) if turn.seed in other]


def verdict(turns: Sequence[Measured]) -> list[str]:
    """Say whether the goals are met, and how far two equal arms differ."""
    lines = []
    if short := ratios(turns, ORLA, p95):
        less = statistics.median(short)
        lines.append(f"p95 of those that return, {less:.1f} times shorter: {'met' if less >= GOAL_P95 else 'MISSED'}")
        same = statistics.median(ratios(turns, ORLA, p50))
        lines.append(f"p50 of those that return, {same:.1f} times shorter: {'met' if same >= 1 else 'MISSED'}")
    if noise := ratios(turns, AGAIN, p95):
        lines.append(f"two equal arms differ in p95 by a factor of {min(noise):.2f} … {max(noise):.2f}")
    return lines


def draw(turns: Sequence[Measured], path: Path = DRAWING) -> None:
    """Draw which part of the returning calls had its first token by when."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "slots", "font.size": 8})
    import matplotlib.pyplot as plt

    plot, axes = plt.subplots(figsize=(6, 3))
    for arm in dict.fromkeys(turn.arm for turn in turns):
        times = sorted(time_s for turn in of(turns, arm) for time_s in turn.returns_s)
        axes.step(times, [(n + 1) / len(times) for n in range(len(times))], where="post", label=arm)
    axes.set(xscale="log", xlabel="seconds from a returning call to its first token", ylabel="part of the calls")
    axes.axhline(0.95, color="0.8", lw=0.8, zorder=0)
    axes.legend(frameon=False)
    plot.tight_layout()
    plot.savefig(path, metadata={"Date": None})
