"""Turns into tables: each figure against the bare engine's with the same seed, beside the goals; and the drawing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from bench.lib import plot
from bench.lib.calls import Turn, bound, makespan_s, needed_tokens, peak_tokens, recomputed, ttfts_s
from bench.lib.figures import Rounds, Spread, percentile, spread, table
from bench.lib.marks import DOCS
from bench.pressure.arms import AGAIN, BARE, BOTH, OURS, PLUGIN, WRAPPED

PAGE, DRAWING = DOCS / "pressure.md", DOCS / "pressure.svg"
TIMES = ("makespan_s", "job_s", "job_p95_s", "call_p95_s", "ttft_p95_s", "return_p95_s")
GOALS = {"makespan_s": 0.78, "job_s": 0.64, "job_p95_s": 0.72, "call_p95_s": 1.0}
"""Of the wrapped arm, against the bare engine."""

GOAL_OVER_BOUND = 1.05

PLUGIN_GOALS = {
    (PLUGIN, "recomputed", BARE): 0.8,
    (BOTH, "return_p95_s", BARE): 0.5,
    (BOTH, "call_p95_s", WRAPPED): 1.0,
    (BOTH, "recomputed", WRAPPED): 1.0,
}
"""Of an arm, in a figure, against another one."""
LEAST_NOISE = 0.01
"""A smaller difference is none; virtual time has no noise of its own."""

TITLES = {
    "makespan_s": "makespan",
    "job_s": "mean job",
    "job_p95_s": "p95 job",
    "call_p95_s": "p95 call",
    "ttft_p95_s": "p95 TTFT",
    "return_p95_s": "p95 TTFT, returning",
}


@dataclass(frozen=True, slots=True)
class Metrics:
    """A turn in figures."""

    makespan_s: float
    """From the first session's arrival to the last one's end."""
    job_s: float
    """The mean session, from its arrival to its end."""
    job_p95_s: float
    call_p95_s: float
    ttft_p95_s: float
    """From the node's call, too."""
    return_p95_s: float
    """The same of returning workflows: without each session's first call."""
    recomputed: int
    """Prompt tokens not found in the cache."""
    bound: int
    """The same with an infinite cache."""

    @property
    def over_bound(self) -> float:
        return self.recomputed / self.bound


def metrics(turn: Turn, block_tokens: int) -> Metrics:
    jobs_s = [job.ended_s - job.arrived_s for job in turn.jobs]
    return Metrics(
        makespan_s=makespan_s(turn.jobs),
        job_s=fmean(jobs_s),
        job_p95_s=percentile(jobs_s, 0.95),
        call_p95_s=percentile([call.ended_s - call.called_s for call in turn.calls], 0.95),
        ttft_p95_s=percentile(ttfts_s(turn.calls), 0.95),
        return_p95_s=percentile(ttfts_s(call for call in turn.calls if call.number), 0.95),
        recomputed=recomputed(turn.calls),
        bound=bound(turn.calls, turn.shared_tokens, block_tokens),
    )


class Figures:
    """What the turns of an experiment say; only seeds that every arm has had count.

    Raises:
        SystemExit: There is no such seed yet.
    """

    def __init__(self, turns: Sequence[Turn], block_tokens: int) -> None:
        self._rounds = Rounds(turns, must=[BARE])
        self.arms, self.seeds = self._rounds.arms, self._rounds.seeds
        if not self.seeds:
            raise SystemExit("no seed has been measured in every arm yet, bare among them")
        self._metrics = {(turn.arm, turn.seed): metrics(turn, block_tokens) for turn in self._rounds.all()}

    def _figure(self, name: str) -> Callable[[Turn], float]:
        return lambda turn: float(getattr(self._metrics[turn.arm, turn.seed], name))

    def of(self, arm: str, name: str) -> Spread:
        """Return a figure of an arm."""
        return spread(self._rounds.column(arm, self._figure(name)))

    def ratio(self, arm: str, name: str, against: str = BARE) -> Spread:
        """Return a figure of an arm against another one's with the same seed."""
        return spread(self._rounds.ratios(arm, against, self._figure(name)))

    def table(self, pool_tokens: int) -> list[str]:
        """Return a table of all arms, and the goals if there is pressure."""
        names = (*TIMES, "recomputed")
        rows = [
            [arm, *(self._against_bare(arm, name) for name in names), _shown(self.of(arm, "over_bound"))]
            for arm in self.arms
        ]
        if not self.fits(pool_tokens):
            goals = [f"≤ {GOALS[name]:.2f}" if name in GOALS else "" for name in names]
            rows.append(["*goal, wrapped*", *goals, f"≤ {GOAL_OVER_BOUND:.2f}"])
            rows += [
                [f"*goal, {arm}*", *(_plugin_goals(arm, name) for name in names), ""]
                for arm in (PLUGIN, BOTH)
                if arm in self.arms
            ]
        return table(["arm", *TITLES.values(), "recomputed", "of the bound"], rows)

    def _against_bare(self, arm: str, name: str) -> str:
        if arm == BARE:
            unit = "s" if name in TIMES else "tokens"
            return f"{self.of(arm, name).middle:,.{2 if unit == 's' else 0}f} {unit}"
        return _shown(self.ratio(arm, name))

    @property
    def sessions(self) -> int:
        """How many there are in a turn."""
        return len(self._rounds.of(BARE)[0].jobs)

    def setting(self, pool_tokens: int) -> str:
        """Say what was run, and what the sessions need of the pool."""
        busiest = max(turn.others for turn in self._rounds.all())
        beside = f" Other processes took up to {busiest:.0%} of the machine." if busiest else ""
        return f"{self.sessions} sessions, {len(self.seeds)} seeds. {self.pressure(pool_tokens)}{beside}"

    def needs(self, pool_tokens: int) -> list[float]:
        """Return, for each seed, what all sessions hold at their ends, in pools."""
        return [needed_tokens(turn) / pool_tokens for turn in self._rounds.of(BARE)]

    def fits(self, pool_tokens: int) -> bool:
        """Whether nothing need ever be evicted."""
        return max(self.needs(pool_tokens)) <= 1

    def pressure(self, pool_tokens: int) -> str:
        """Say what the sessions need of the pool."""
        needs = self.needs(pool_tokens)
        peaks = [peak_tokens(turn) / pool_tokens for turn in self._rounds.of(BARE)]
        return (
            f"At their ends the sessions hold {min(needs):.2f} to {max(needs):.2f} times the pool of {pool_tokens:,} "
            f"tokens together; those under way at one moment {min(peaks):.2f} to {max(peaks):.2f} times."
        )

    def verdict(self, pool_tokens: int) -> list[str]:
        """Return what our arms do not reach; where everything fits, they must differ in nothing."""
        ours = [arm for arm in self.arms if arm in OURS]
        if not ours:
            return []
        if self.fits(pool_tokens):
            return [self._beside_noise(arm, name) for arm in ours for name in TIMES] if AGAIN in self.arms else []
        found = [*self._reached(), *self._reached_with_plugin()]
        lines = [f"goal missed: {title} {is_:.2f}, wanted ≤ {goal:.2f}" for title, is_, goal in found if is_ > goal]
        if self.of(BARE, "over_bound").middle <= GOAL_OVER_BOUND:
            lines.append("the bare engine recomputes no more than the goal allows: this load shows nothing")
        return lines

    def _reached(self) -> list[tuple[str, float, float]]:
        """Return what the wrapped arm should reach: a title, what it is, what it should be at most."""
        if WRAPPED not in self.arms:
            return []
        found = [(TITLES[name], self.ratio(WRAPPED, name).middle, goal) for name, goal in GOALS.items()]
        return [*found, ("recomputed against the bound", self.of(WRAPPED, "over_bound").middle, GOAL_OVER_BOUND)]

    def _reached_with_plugin(self) -> list[tuple[str, float, float]]:
        """Return the same for the arms with the plugin, as far as they and what they are held against were run."""
        return [
            (f"{arm}, {TITLES.get(name, name)} of {against}'s", self.ratio(arm, name, against).middle, goal)
            for (arm, name, against), goal in PLUGIN_GOALS.items()
            if {arm, against} <= {*self.arms}
        ]

    def _beside_noise(self, arm: str, name: str) -> str:
        """Say whether an arm is further from bare than bare is from itself."""
        mine = self.ratio(arm, name).middle - 1
        noise = max(LEAST_NOISE, *(abs(value - 1) for value in self.ratio(AGAIN, name)))
        word = "within" if abs(mine) <= noise else "goal missed: beyond"
        return f"{arm}, {TITLES[name]}: {mine:+.1%}, {word} the noise of ±{noise:.1%}"


def _shown(values: Spread) -> str:
    return values.shown(always=values.least != values.most)


def _plugin_goals(arm: str, name: str) -> str:
    """Return the goals of an arm with the plugin in a figure."""
    return ", ".join(
        f"≤ {goal:.2f}" if against == BARE else f"≤ {against}'s"
        for (of, what, against), goal in PLUGIN_GOALS.items()
        if (of, what) == (arm, name)
    )


def draw(figures: Figures, path: Path = DRAWING) -> None:
    """Draw each arm's figures against the bare engine's, with the extreme seeds, and the goals."""
    arms = [arm for arm in figures.arms if arm != BARE]
    colours = ["#3b7dd8" if arm in OURS else "#aaa" for arm in arms]
    titles = {**{name: TITLES[name] for name in TIMES}, "over_bound": "recomputed"}
    size = (14, 0.35 * len(arms) + 1.2)
    figure, panes = plot.pyplot("pressure").subplots(1, len(titles), figsize=size, sharey=True)
    for axes, (name, title) in zip(panes, titles.items(), strict=True):
        bound_ = name == "over_bound"
        rows = {arm: figures.of(arm, name) if bound_ else figures.ratio(arm, name) for arm in arms}
        plot.bars(axes, rows, colours, GOAL_OVER_BOUND if bound_ else GOALS.get(name), "#c33")
        axes.set(title=title, xlabel="of the bound" if bound_ else "of bare")
    plot.open_axes(*panes)
    panes[0].invert_yaxis()
    plot.save(figure, path)
