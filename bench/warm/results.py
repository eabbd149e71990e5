"""What turns showed: a table for each situation and place, what it says, and a drawing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from bench.lib.calls import percentile
from bench.lib.marks import DOCS
from bench.warm.arms import AGAIN, ARMS, BARE, COLD, SAVED, WARM, Measured

PAGE, DRAWING = DOCS / "warm-up.md", DOCS / "warm-up.svg"
COLOURS = {BARE.name: "#444", AGAIN.name: "#999", COLD.name: "#c33", SAVED.name: "#4a4", WARM.name: "#3b7dd8"}
HEAD = "| {} | TTFT p50, s | TTFT p95, s | recomputed | makespan, s | warmed | used | wasted | done, given up |"

Figure = Callable[[Measured], float]


def waits_s(turn: Measured) -> list[float]:
    """Return how long each call that counts waited for its first token, from the node's call."""
    return [call.first_s - call.called_s for call in turn.counted]


def p50(turn: Measured) -> float:
    return percentile(waits_s(turn), 0.5)


def p95(turn: Measured) -> float:
    return percentile(waits_s(turn), 0.95)


def recomputed(turn: Measured) -> float:
    """Return the prompt tokens of those calls that were not in the cache when they came."""
    return sum(call.prompt_tokens - call.cached_tokens for call in turn.counted)


def makespan(turn: Measured) -> float:
    return turn.makespan_s


def whole(turns: Sequence[Measured]) -> list[Measured]:
    """Return the turns of rounds that every arm has had; a round that was broken off compares nothing."""
    arms = {turn.arm for turn in turns}
    had = {seed: {turn.arm for turn in turns if turn.seed == seed} for seed in {turn.seed for turn in turns}}
    return [turn for turn in turns if had[turn.seed] == arms]


def groups(turns: Sequence[Measured]) -> list[list[Measured]]:
    """Return the turns of each situation and place, in the order in which they were measured."""
    keys = dict.fromkeys((turn.situation, turn.place) for turn in turns)
    return [whole([turn for turn in turns if (turn.situation, turn.place) == key]) for key in keys]


def of(turns: Sequence[Measured], arm: str) -> list[Measured]:
    return sorted((turn for turn in turns if turn.arm == arm), key=lambda turn: turn.seed)


def ratio(turns: Sequence[Measured], arm: str, other: str, figure: Figure) -> float:
    """Return the median over the rounds of an arm's figure over another arm's."""
    pairs = zip(of(turns, arm), of(turns, other), strict=True)
    return median(figure(mine) / max(1e-9, figure(theirs)) for mine, theirs in pairs)


def table(turns: Sequence[Measured]) -> list[str]:
    """Return a row for each arm: medians over the rounds, with the extremes; tokens of warm-ups are sums."""
    lines = [HEAD.format(f"{turns[0].situation}, {turns[0].place}"), "|---" * 9 + "|"]
    for arm in (name for name in ARMS if of(turns, name)):
        own = of(turns, arm)
        columns: tuple[tuple[Figure, int], ...] = ((p50, 2), (p95, 2), (recomputed, 0), (makespan, 1))
        cells = [_told([figure(turn) for turn in own], places) for figure, places in columns]
        lines.append(f"| {arm} | {' | '.join([*cells, *_warmed(own)])} |")
    return lines


def _warmed(own: Sequence[Measured]) -> list[str]:
    if own[0].arm != WARM.name:
        return ["–"] * 4
    said = [turn.warm_ups for turn in own]
    tokens = [sum(getattr(each, name) for each in said) for name in ("warmed_tokens", "used_tokens", "wasted_tokens")]
    ended = f"{sum(each.done for each in said)}, {sum(each.given_up for each in said)}"
    return [*(f"{count:,}" for count in tokens), ended]


def _told(values: Sequence[float], places: int) -> str:
    middle, least, most = (f"{value:,.{places}f}" for value in (median(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least} … {most})"


def verdict(turns: Sequence[Measured]) -> list[str]:
    """Say what warm-ups gain over the other arms, and how far two equal arms differ."""
    arms, where = {turn.arm for turn in turns}, f"{turns[0].situation}, {turns[0].place}"
    lines = [
        f"{where}: with warm-ups p50 is {ratio(turns, WARM.name, other, p50):.2f} of that of *{other}*, p95 "
        f"{ratio(turns, WARM.name, other, p95):.2f}, the makespan {ratio(turns, WARM.name, other, makespan):.2f}"
        for other in (BARE.name, COLD.name, SAVED.name)
        if {other, WARM.name} <= arms
    ]
    if {AGAIN.name, BARE.name} <= arms:
        again = [ratio(turns, AGAIN.name, BARE.name, figure) for figure in (p50, p95, makespan)]
        lines.append(
            f"{where}: *bare again* against *bare*: p50 {again[0]:.2f}, p95 {again[1]:.2f}, makespan {again[2]:.2f}"
        )
    if refused := _refused(of(turns, WARM.name)):
        lines.append(f"{where}: wishes that came to nothing, by reason: {refused}")
    return lines


def _refused(own: Sequence[Measured]) -> str:
    reasons = dict.fromkeys(reason for turn in own for reason in turn.warm_ups.refused)
    return ", ".join(f"{reason} {sum(turn.warm_ups.refused.get(reason, 0) for turn in own)}" for reason in reasons)


def report(turns: Sequence[Measured]) -> list[str]:
    """Return all that is to be told."""
    lines = list[str]()
    for group in filter(None, groups(turns)):
        lines += [*table(group), "", *(f"* {line}" for line in verdict(group)), ""]
    busiest = max((turn.others for turn in turns), default=0.0)
    return [*lines, f"Other processes took up to {busiest:.0%} of the machine."]


# The drawing ------------------------------------------------------------------------------------------------


def draw(turns: Sequence[Measured], path: Path = DRAWING) -> None:
    """Draw, for each situation and place, which part of the calls had its first token within so many seconds."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "warm", "font.size": 8})
    import matplotlib.pyplot as plt

    found = list(filter(None, groups(turns)))
    rows = -(-len(found) // 3)
    plot, panes = plt.subplots(
        rows, min(3, len(found)), figsize=(3.2 * min(3, len(found)), 2.6 * rows), squeeze=False
    )
    for axes in panes.flat[len(found) :]:
        axes.set_axis_off()
    for axes, group in zip(panes.flat, found, strict=False):
        for arm in (name for name in ARMS if of(group, name)):
            times = sorted(wait_s for turn in of(group, arm) for wait_s in waits_s(turn))
            shares = [(number + 1) / len(times) for number in range(len(times))]
            axes.step(times, shares, where="post", color=COLOURS[arm], lw=1.2, label=arm)
        axes.set(title=f"{group[0].situation}, {group[0].place}", xscale="log", ylim=(0, 1))
        axes.set_xlabel("time to first token, s")
        axes.spines[["top", "right"]].set_visible(False)
    named = {
        label: line for axes in panes.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    plot.legend(named.values(), named.keys(), loc="lower center", ncols=len(named), frameon=False)
    plot.tight_layout(rect=(0, 0.25 / (2.6 * rows), 1, 1))
    plot.savefig(path, metadata={"Date": None})
