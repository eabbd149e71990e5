"""What turns showed: a table for each situation and place, what it says, and a drawing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bench.lib import calls, plot
from bench.lib.figures import Rounds, percentile, spread, table
from bench.lib.marks import DOCS
from bench.warm.arms import AGAIN, ARMS, BARE, COLD, SAVED, WARM, Measured

PAGE, DRAWING = DOCS / "warm-up.md", DOCS / "warm-up.svg"
COLOURS = {BARE.name: "#444", AGAIN.name: "#999", COLD.name: "#c33", SAVED.name: "#4a4", WARM.name: "#3b7dd8"}
HEAD = (
    "TTFT p50, s", "TTFT p95, s", "recomputed", "makespan, s", "warmed", "used", "wasted", "done, given up",
)  # fmt: skip


def waits_s(turn: Measured) -> list[float]:
    """Return how long each call that counts waited for its first token, from the node's call."""
    return calls.ttfts_s(turn.counted)


def p50(turn: Measured) -> float:
    return percentile(waits_s(turn), 0.5)


def p95(turn: Measured) -> float:
    return percentile(waits_s(turn), 0.95)


def recomputed(turn: Measured) -> float:
    """Return the prompt tokens of those calls that were not in the cache when they came."""
    return calls.recomputed(turn.counted)


def makespan(turn: Measured) -> float:
    return turn.makespan_s


COLUMNS: tuple[tuple[Callable[[Measured], float], str], ...] = (
    (p50, ",.2f"), (p95, ",.2f"), (recomputed, ",.0f"), (makespan, ",.1f"),
)  # fmt: skip


def groups(turns: Sequence[Measured]) -> list[Rounds[Measured]]:
    """Return the whole rounds of each situation and place, in the order in which they were measured."""
    order = [*ARMS]
    keys = dict.fromkeys((turn.situation, turn.place) for turn in turns)
    ordered = sorted(turns, key=lambda turn: order.index(turn.arm))
    return [Rounds(turn for turn in ordered if (turn.situation, turn.place) == key) for key in keys]


def where(turns: Rounds[Measured]) -> str:
    first = turns.all()[0]
    return f"{first.situation}, {first.place}"


def rows(turns: Rounds[Measured]) -> list[str]:
    """Return a row for each arm: medians over the rounds, with the extremes; tokens of warm-ups are sums."""
    made = []
    for arm in turns.arms:
        cells = [spread(turns.column(arm, figure)).shown(form, always=False) for figure, form in COLUMNS]
        made.append([arm, *cells, *_warmed(turns.of(arm))])
    return table([where(turns), *HEAD], made)


def _warmed(own: Sequence[Measured]) -> list[str]:
    if own[0].arm != WARM.name:
        return ["–"] * 4
    said = [turn.warm_ups for turn in own]
    tokens = [sum(getattr(each, name) for each in said) for name in ("warmed_tokens", "used_tokens", "wasted_tokens")]
    ended = f"{sum(each.done for each in said)}, {sum(each.given_up for each in said)}"
    return [*(f"{count:,}" for count in tokens), ended]


def verdict(turns: Rounds[Measured]) -> list[str]:
    """Say what warm-ups gain over the other arms, and how far two equal arms differ."""
    arms, at = {*turns.arms}, where(turns)
    lines = [
        f"{at}: with warm-ups p50 is {turns.ratio(WARM.name, other, p50):.2f} of that of *{other}*, p95 "
        f"{turns.ratio(WARM.name, other, p95):.2f}, the makespan {turns.ratio(WARM.name, other, makespan):.2f}"
        for other in (BARE.name, COLD.name, SAVED.name)
        if {other, WARM.name} <= arms
    ]
    if {AGAIN.name, BARE.name} <= arms:
        again = [turns.ratio(AGAIN.name, BARE.name, figure) for figure in (p50, p95, makespan)]
        lines.append(
            f"{at}: *bare again* against *bare*: p50 {again[0]:.2f}, p95 {again[1]:.2f}, makespan {again[2]:.2f}"
        )
    if refused := _refused(turns.of(WARM.name)):
        lines.append(f"{at}: wishes that came to nothing, by reason: {refused}")
    return lines


def _refused(own: Sequence[Measured]) -> str:
    reasons = dict.fromkeys(reason for turn in own for reason in turn.warm_ups.refused)
    return ", ".join(f"{reason} {sum(turn.warm_ups.refused.get(reason, 0) for turn in own)}" for reason in reasons)


def report(turns: Sequence[Measured]) -> list[str]:
    """Return all that is to be told."""
    lines = list[str]()
    for group in (each for each in groups(turns) if each.seeds):
        lines += [*rows(group), "", *(f"* {line}" for line in verdict(group)), ""]
    busiest = max((turn.others for turn in turns), default=0.0)
    return [*lines, f"Other processes took up to {busiest:.0%} of the machine."]


# The drawing ------------------------------------------------------------------------------------------------


def draw(turns: Sequence[Measured], path: Path = DRAWING) -> None:
    """Draw, for each situation and place, which part of the calls had its first token within so many seconds."""
    found = [group for group in groups(turns) if group.seeds]
    high, wide = -(-len(found) // 3), min(3, len(found))
    figure, panes = plot.pyplot("warm").subplots(high, wide, figsize=(3.2 * wide, 2.6 * high), squeeze=False)
    for axes in panes.flat[len(found) :]:
        axes.set_axis_off()
    for axes, group in zip(panes.flat, found, strict=False):
        for arm in group.arms:
            times = [wait_s for turn in group.of(arm) for wait_s in waits_s(turn)]
            plot.shares(axes, times, arm, color=COLOURS[arm], lw=1.2)
        axes.set(title=where(group), xscale="log", ylim=(0, 1), xlabel="time to first token, s")
    plot.open_axes(*panes.flat)
    named = {
        label: line for axes in panes.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="lower center", ncols=len(named), frameon=False)
    plot.save(figure, path, tight=(0, 0.25 / (2.6 * high), 1, 1))
