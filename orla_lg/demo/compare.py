"""Bare against wrapped: one line, three bars, and a table of the stages.

Times are taken at the nodes, with one instrument in both arms; which tokens were cached is the engine's word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from orla_lg.demo.board import STAGES
from orla_lg.demo.stopwatch import TimedCall
from orla_lg.timeline import Line, Piece

BARE, WRAPPED = "bare", "wrapped"
ARMS = (BARE, WRAPPED)

BAR_COLUMNS = 40
EQUAL = 0.05
"""Less than that, as a share, is no difference worth a word: two runs of one arm differ by more."""

_STYLES = {BARE: "queued", WRAPPED: "decode"}


@dataclass(frozen=True, slots=True)
class Figures:
    """What one arm came to."""

    arm: str
    calls: int
    first_s: float | None
    """Median over the calls, from a node's asking to its first token; ``None`` where nothing was streamed."""
    whole_s: float
    prompt_tokens: int
    computed_tokens: int | None
    """Of these, not found in the engine's cache; ``None`` where an engine does not say."""

    @classmethod
    def of(cls, arm: str, calls: Sequence[TimedCall], whole_s: float = 0.0) -> Figures:
        """Return the figures of some calls of an arm."""
        first = [call.first_s - call.asked_s for call in calls if call.first_s is not None]
        counted = [call for call in calls if call.prompt_tokens is not None]
        said = bool(counted) and all(call.cached_tokens is not None for call in counted)
        prompt = sum(call.prompt_tokens or 0 for call in counted)
        cached = sum(call.cached_tokens or 0 for call in counted)
        return cls(
            arm, len(calls), median(first) if first else None, whole_s, prompt, prompt - cached if said else None
        )


def sentence(bare: Figures, wrapped: Figures) -> str:
    """Return in one line what wrapping changed, for better or worse."""
    parts = [f"all done {_times(bare.whole_s, wrapped.whole_s)}"]
    if bare.first_s is not None and wrapped.first_s is not None:
        parts.insert(0, f"first token {_times(bare.first_s, wrapped.first_s)}")
    if bare.computed_tokens and wrapped.computed_tokens is not None:
        parts.append(f"{_fewer(bare.computed_tokens, wrapped.computed_tokens)} computed")
    return f"Wrapped: {', '.join(parts)}."


def _times(before: float, after: float) -> str:
    if before <= 0 or after <= 0 or abs(before - after) <= EQUAL * max(before, after):
        return "as soon as bare"
    return f"{before / after:.1f}× sooner" if after < before else f"{after / before:.1f}× later"


def _fewer(before: int, after: int) -> str:
    change = round(100 * (before - after) / before)
    if abs(change) <= 100 * EQUAL:
        return "as much"
    return f"{abs(change)} % {'less' if change > 0 else 'more'}"


def bars(bare: Figures, wrapped: Figures) -> list[Line]:
    """Return two bars, bare and wrapped, for each of the three figures."""
    both = (bare, wrapped)
    lines = _pair(
        f"first token: what half of the {bare.calls} calls waited for it", both, lambda arm: arm.first_s, _s
    )
    lines += _pair("whole time: until the last letter was written", both, lambda arm: arm.whole_s, _s)
    computed = "prompt tokens computed again: the engine's cache did not have them"
    return [*lines, *_pair(computed, both, lambda arm: arm.computed_tokens, _tokens)]


def _s(arm: Figures, value: float) -> str:
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s"


def _tokens(arm: Figures, value: float) -> str:
    return f"{value:,.0f} of {arm.prompt_tokens:,}"


def _pair(
    heading: str,
    arms: Sequence[Figures],
    value: Callable[[Figures], float | None],
    said: Callable[[Figures, float], str],
) -> list[Line]:
    longest = max((value(arm) or 0.0 for arm in arms), default=0.0)
    lines: list[Line] = [((heading, "bold"),)]
    for arm in arms:
        name: Piece = (f"  {arm.arm:<9}", "")
        found = value(arm)
        if found is None:
            lines.append((name, ("the engine does not say", "dim")))
            continue
        columns = max(1, round(BAR_COLUMNS * found / longest)) if longest > 0 else 1
        lines.append((name, ("█" * columns, _STYLES[arm.arm]), (f" {said(arm, found)}", "")))
    return lines


# The table


def table(arms: Sequence[tuple[str, Sequence[TimedCall]]]) -> list[Line]:
    """Return the stages as rows: calls, first token and computed prompt tokens of each arm."""
    stages = list(dict.fromkeys([*STAGES, *(call.stage for _, calls in arms for call in calls)]))
    rows = [["stage", "calls", *(f"{arm} first" for arm, _ in arms), *(f"{arm} computed" for arm, _ in arms)]]
    for stage in [*stages, "all"]:
        of_stage = [
            Figures.of(arm, [call for call in calls if stage in (call.stage, "all")]) for arm, calls in arms
        ]  # fmt: skip
        if not any(figures.calls for figures in of_stage):
            continue
        first = ["-" if each.first_s is None else f"{each.first_s:.2f} s" for each in of_stage]
        computed = ["-" if each.computed_tokens is None else f"{each.computed_tokens:,}" for each in of_stage]
        rows.append([stage, str(max(each.calls for each in of_stage)), *first, *computed])
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    styles = ["dim", *[""] * (len(rows) - 2), "bold"]
    return [
        (("  ".join(cell.rjust(width) if at else cell.ljust(width)
                    for at, (cell, width) in enumerate(zip(row, widths, strict=True))), style),)
        for row, style in zip(rows, styles, strict=True)
    ]  # fmt: skip
