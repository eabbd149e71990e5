"""What turns showed: a table, a verdict, a drawing, and their place in the documentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.lib import plot
from bench.lib.calls import CallSeen, recomputed, ttfts_s
from bench.lib.figures import Rounds, percentile, spread, table
from bench.lib.marks import DOCS

PAGE, DRAWING = DOCS / "slots.md", DOCS / "slots.svg"
GOAL_P95 = 3.0
STOCK, AGAIN, ORLA = "stock", "stock again", "orla"
HEAD = (
    "arm", "TTFT p50, s", "TTFT p95, s", "recomputed, tokens", "makespan, s", "engine, MiB", "files, MiB"
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A turn in figures; of its calls those count that are not a workflow's first."""

    arm: str
    seed: int
    calls: list[CallSeen]
    peak_mib: float | None
    files_mib: float

    @property
    def returns_s(self) -> list[float]:
        """The times to the first token."""
        return ttfts_s(call for call in self.calls if call.number)

    @property
    def recomputed(self) -> int:
        return recomputed(call for call in self.calls if call.number)

    @property
    def makespan_s(self) -> float:
        return max(call.ended_s for call in self.calls)


def p50(turn: Measured) -> float:
    return percentile(turn.returns_s, 0.5)


def p95(turn: Measured) -> float:
    return percentile(turn.returns_s, 0.95)


COLUMNS: tuple[tuple[Callable[[Measured], float], str], ...] = (
    (p50, ".2f"), (p95, ".2f"), (lambda turn: turn.recomputed, ".0f"), (lambda turn: turn.makespan_s, ".0f"),
)  # fmt: skip


def report(turns: Rounds[Measured]) -> list[str]:
    """Return a row for each arm."""
    rows = []
    for arm in turns.arms:
        own = turns.of(arm)
        several = len(own) > 1
        cells = [spread(turns.column(arm, of)).shown(form, bold=True, always=several) for of, form in COLUMNS]
        peaks = [turn.peak_mib for turn in own if turn.peak_mib is not None]
        cells += [f"{max(peaks):.0f}" if peaks else "not told", f"{max(turn.files_mib for turn in own):.0f}"]
        rows.append([arm, *cells])
    return table(HEAD, rows)


def verdict(turns: Rounds[Measured]) -> list[str]:
    """Say whether the goals are met, and how far two equal arms differ."""
    lines = []
    if {STOCK, ORLA} <= {*turns.arms}:
        less = turns.ratio(STOCK, ORLA, p95)
        lines.append(f"p95 of those that return, {less:.1f} times shorter: {'met' if less >= GOAL_P95 else 'MISSED'}")
        same = turns.ratio(STOCK, ORLA, p50)
        lines.append(f"p50 of those that return, {same:.1f} times shorter: {'met' if same >= 1 else 'MISSED'}")
    if {STOCK, AGAIN} <= {*turns.arms}:
        noise = turns.ratios(STOCK, AGAIN, p95)
        lines.append(f"two equal arms differ in p95 by a factor of {min(noise):.2f} … {max(noise):.2f}")
    return lines


def draw(turns: Rounds[Measured], path: Path = DRAWING) -> None:
    """Draw which part of the returning calls had its first token by when."""
    figure, axes = plot.pyplot("slots").subplots(figsize=(6, 3))
    for arm in turns.arms:
        plot.shares(axes, [time_s for turn in turns.of(arm) for time_s in turn.returns_s], arm)
    axes.set(xscale="log", xlabel="seconds from a returning call to its first token", ylabel="part of the calls")
    axes.axhline(0.95, color="0.8", lw=0.8, zorder=0)
    axes.legend(frameon=False)
    plot.save(figure, path)
