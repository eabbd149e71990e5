"""Turns into a table for each place, curves for all, and both into the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.cache.arms import AGAIN, ARMS, EVERYTHING, PER_REQUEST, PER_WORKFLOW, PLAIN
from bench.cache.engines import PLACES, SHORT, Place
from bench.lib import plot
from bench.lib.calls import Turn, bound, makespan_s, needed_tokens, recomputed, ttfts_s
from bench.lib.figures import Rounds, percentile, spread, table
from bench.lib.marks import DOCS

PAGE, DRAWING = DOCS / "cache.md", DOCS / "cache.svg"
COLOURS = {PLAIN: "#444", AGAIN: "#999", EVERYTHING: "#e6a23c", PER_REQUEST: "#c33", PER_WORKFLOW: "#3b7dd8"}
COLUMNS = ("TTFT p50, s", "TTFT p95, s", "recomputed tokens", "of the bound", "makespan, s")


def figures_of(turn: Turn, place: Place) -> tuple[float, ...]:
    """Return a turn's figures, in the order of ``COLUMNS``."""
    waits_s, fresh = ttfts_s(turn.calls), recomputed(turn.calls)
    least = bound(turn.calls, turn.shared_tokens, place.block_tokens)
    return percentile(waits_s, 0.5), percentile(waits_s, 0.95), fresh, fresh / least, makespan_s(turn.jobs)


class Figures:
    """What the turns at one place say. Only rounds that every arm has had count.

    Raises:
        SystemExit: There is no such round yet.
    """

    def __init__(self, place: Place, turns: Sequence[Turn]) -> None:
        order = [arm.name for arm in ARMS]
        self.place, self._rounds = place, Rounds(sorted(turns, key=lambda turn: order.index(turn.arm)))
        self.arms, self.seeds, self.turns = self._rounds.arms, self._rounds.seeds, self._rounds.of
        if not self.seeds:
            raise SystemExit(f"{place.name}: no round has been measured in every arm yet")

    def column(self, arm: str, number: int) -> list[float]:
        """Return one figure of an arm for each round."""
        return self._rounds.column(arm, lambda turn: figures_of(turn, self.place)[number])

    def ratio(self, arm: str, other: str, number: int) -> float:
        """Return the median over the rounds of an arm's figure over another arm's."""
        return self._rounds.ratio(arm, other, lambda turn: figures_of(turn, self.place)[number])

    def table(self) -> list[str]:
        """Return a row for each arm: medians over the rounds, with the extremes."""
        forms = [",.0f" if number == 2 else ",.2f" for number in range(len(COLUMNS))]
        rows = [
            [arm, *(spread(self.column(arm, n)).shown(form, always=False) for n, form in enumerate(forms))]
            for arm in self.arms
        ]
        return table([self.place.title, *COLUMNS], rows)

    def setting(self) -> str:
        """Say what was run, and what it would have needed."""
        first = self._rounds.of(PLAIN)[0]
        busiest = max(turn.others for turn in self._rounds.all())
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


# The page ---------------------------------------------------------------------------------------------------


def draw(found: Sequence[Figures], path: Path = DRAWING) -> None:
    """Draw, for each place, which part of an arm's calls had its first token within so many seconds."""
    size = (3.2 * len(found), 2.8)
    figure, panes = plot.pyplot("cache").subplots(1, len(found), figsize=size, squeeze=False)
    for axes, figures in zip(panes[0], found, strict=True):
        for arm in figures.arms:
            waits_s = [wait_s for turn in figures.turns(arm) for wait_s in ttfts_s(turn.calls)]
            plot.shares(axes, waits_s, arm, color=COLOURS[arm], lw=1.2)
        room = "short of room" if figures.place.pool == SHORT else "room for all"
        axes.set(title=f"{figures.place.title}\n{room}", xscale="log", xlabel="time to first token, s", ylim=(0, 1))
    plot.open_axes(*panes[0])
    panes[0][0].set_ylabel("part of the calls")
    most = max(range(len(found)), key=lambda number: len(found[number].arms))
    handles, labels = panes[0][most].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    plot.save(figure, path, tight=(0, 0.1, 1, 1))


def in_order(found: Mapping[str, Figures]) -> list[Figures]:
    """Return the places that were measured, in the order of ``PLACES``."""
    return [found[place.name] for place in PLACES if place.name in found]
