"""Turns into a table for each place, curves for all, and both into the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from bench.cache.arms import AGAIN, ARMS, EVERYTHING, PER_REQUEST, PER_WORKFLOW, PLAIN
from bench.cache.engines import BLOCK_TOKENS, LLAMACPP, PLACES, SHORT, Place
from bench.lib.calls import Turn, bound, needed_tokens, percentile
from bench.lib.marks import DOCS

PAGE, DRAWING = DOCS / "cache.md", DOCS / "cache.svg"
COLOURS = {PLAIN: "#444", AGAIN: "#999", EVERYTHING: "#e6a23c", PER_REQUEST: "#c33", PER_WORKFLOW: "#3b7dd8"}
COLUMNS = ("TTFT p50, s", "TTFT p95, s", "recomputed tokens", "of the bound", "makespan, s")


def block_tokens(place: Place) -> int:
    """Return what is cached together or not at all: on llama.cpp each token is for itself."""
    return 1 if place.engine == LLAMACPP else BLOCK_TOKENS


def ttfts_s(turn: Turn) -> list[float]:
    """Return how long each call waited for its first token, from the node's call."""
    return [call.first_s - call.called_s for call in turn.calls]


def figures_of(turn: Turn, place: Place) -> tuple[float, ...]:
    """Return a turn's figures, in the order of ``COLUMNS``."""
    waits_s = ttfts_s(turn)
    fresh = sum(call.prompt_tokens - call.cached_tokens for call in turn.calls)
    least = bound(turn.calls, turn.shared_tokens, block_tokens(place))
    makespan_s = max(job.ended_s for job in turn.jobs) - min(job.arrived_s for job in turn.jobs)
    return percentile(waits_s, 0.5), percentile(waits_s, 0.95), fresh, fresh / least, makespan_s


class Figures:
    """What the turns at one place say. Only rounds that every arm has had count.

    Raises:
        SystemExit: There is no such round yet.
    """

    def __init__(self, place: Place, turns: Sequence[Turn]) -> None:
        self.place = place
        self.arms = [arm.name for arm in ARMS if any(turn.arm == arm.name for turn in turns)]
        self._turns = {(turn.arm, turn.seed): turn for turn in turns}
        seeds = sorted({turn.seed for turn in turns})
        self.seeds = [seed for seed in seeds if all((arm, seed) in self._turns for arm in self.arms)]
        if not self.seeds:
            raise SystemExit(f"{place.name}: no round has been measured in every arm yet")

    def turns(self, arm: str) -> list[Turn]:
        """Return an arm's turns, a round each."""
        return [self._turns[arm, seed] for seed in self.seeds]

    def column(self, arm: str, number: int) -> list[float]:
        """Return one figure of an arm for each round."""
        return [figures_of(turn, self.place)[number] for turn in self.turns(arm)]

    def ratio(self, arm: str, other: str, number: int) -> float:
        """Return the median over the rounds of an arm's figure over another arm's."""
        pairs = zip(self.column(arm, number), self.column(other, number), strict=True)
        return median(mine / theirs for mine, theirs in pairs)

    def table(self) -> list[str]:
        """Return a row for each arm: medians over the rounds, with the extremes."""
        lines = [f"| {self.place.title} | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
        for arm in self.arms:
            cells = [_told(self.column(arm, number), 0 if number == 2 else 2) for number in range(len(COLUMNS))]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
        return lines

    def setting(self) -> str:
        """Say what was run, and what it would have needed."""
        first = self.turns(PLAIN)[0]
        busiest = max(turn.others for arm in self.arms for turn in self.turns(arm))
        return (
            f"{self.place.title}: {len(first.jobs)} cases of {len(first.calls) // len(first.jobs)} stages in each of "
            f"{len(self.seeds)} rounds. All together need {needed_tokens(first):,} tokens, the policy counted once. "
            f"Other processes took up to {busiest:.0%} of the machine."
        )

    def verdict(self) -> list[str]:
        """Say what the policy gains over the baselines, and whether more than two equal arms differ by."""
        lines = [
            f"{self.place.title}: {PER_WORKFLOW} has {self.ratio(PER_WORKFLOW, other, 0):.2f} of the median TTFT of "
            f"*{other}*, {self.ratio(PER_WORKFLOW, other, 1):.2f} of its p95, and recomputes "
            f"{self.ratio(PER_WORKFLOW, other, 2):.2f} of its tokens."
            for other in (PER_REQUEST, EVERYTHING, PLAIN)
            if {other, PER_WORKFLOW} <= {*self.arms}
        ]
        if AGAIN in self.arms:
            median_ttft, p95_ttft, tokens = (self.ratio(AGAIN, PLAIN, number) for number in range(3))
            lines.append(
                f"{self.place.title}: the engine's own LRU against itself: {median_ttft:.2f} of the median TTFT, "
                f"{p95_ttft:.2f} of its p95, {tokens:.2f} of the tokens."
            )
        return lines


def _told(values: Sequence[float], places: int) -> str:
    middle, least, most = (f"{value:,.{places}f}" for value in (median(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least} … {most})"


# The page ---------------------------------------------------------------------------------------------------


def draw(found: Sequence[Figures], path: Path = DRAWING) -> None:
    """Draw, for each place, which part of an arm's calls had its first token within so many seconds."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "cache", "font.size": 8})
    import matplotlib.pyplot as plt

    plot, panes = plt.subplots(1, len(found), figsize=(3.2 * len(found), 2.8), squeeze=False)
    for axes, figures in zip(panes[0], found, strict=True):
        for arm in figures.arms:
            waits_s = sorted(wait_s for turn in figures.turns(arm) for wait_s in ttfts_s(turn))
            shares = [(number + 1) / len(waits_s) for number in range(len(waits_s))]
            axes.step(waits_s, shares, where="post", color=COLOURS[arm], lw=1.2, label=arm)
        room = "short of room" if figures.place.pool == SHORT else "room for all"
        axes.set_title(f"{figures.place.title}\n{room}")
        axes.set_xscale("log")
        axes.set_xlabel("time to first token, s")
        axes.set_ylim(0, 1)
        axes.spines[["top", "right"]].set_visible(False)
    panes[0][0].set_ylabel("part of the calls")
    most = max(range(len(found)), key=lambda number: len(found[number].arms))
    handles, labels = panes[0][most].get_legend_handles_labels()
    plot.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    plot.tight_layout(rect=(0, 0.1, 1, 1))
    plot.savefig(path, metadata={"Date": None})


def in_order(found: Mapping[str, Figures]) -> list[Figures]:
    """Return the places that were measured, in the order of ``PLACES``."""
    return [found[place.name] for place in PLACES if place.name in found]
