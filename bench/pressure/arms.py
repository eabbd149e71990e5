"""The arms: the same sessions, let through in different ways; their figures against the bare ones; the goals."""

from __future__ import annotations

from asyncio import Semaphore
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from bench.lib import plot, workflows
from bench.lib.calls import Turn, bound, every, makespan_s, needed_tokens, peak_tokens, recomputed, returning, ttft_s
from bench.lib.figures import Rounds, Spread, percentile, spread, table


@dataclass(frozen=True, slots=True)
class Arm(workflows.Arm):
    """One way to serve the sessions; with admission, calls wait until their cache fits."""

    cap: int | None = None
    """Sessions under way at once; ``None`` lets all in."""
    by_arrival: bool = False
    """Calls carry the engine's own priority: an earlier session's go first."""
    plugin: bool = False
    """Wrapped, the engine's plugin hears of workflows; without it, it is as if it were not there."""
    endless: bool = False
    """The pool is so large that nothing is evicted (simulated only)."""

    def door(self) -> AbstractAsyncContextManager[object]:
        """Return what a session passes before its first call; one for all sessions of a turn."""
        return nullcontext() if self.cap is None else Semaphore(self.cap)


def recorded(arm: Arm, folder: Path | None, seed: int) -> Arm:
    """Return an arm that writes the records of a seed's turn into a folder; a bare one has none."""
    if folder is None or arm.orla is None:
        return arm
    path = folder / f"{arm.name}-{seed}.jsonl"
    path.unlink(missing_ok=True)
    return replace(arm, orla={**arm.orla, "records_file": path})


BARE, AGAIN, WRAPPED = "bare", "bare_again", "wrapped"
PLUGIN, BOTH = "plugin", "plugin+admission"
ARMS = (
    Arm(BARE),
    Arm(AGAIN),
    Arm("priority", by_arrival=True),
    *(Arm(f"cap{most}", cap=most) for most in (4, 6, 8)),
    Arm(WRAPPED, {"admission": True}),
    Arm(PLUGIN, {"admission": False}, plugin=True),
    Arm(BOTH, {"admission": True}, plugin=True),
)
OURS = tuple(arm.name for arm in ARMS if arm.orla is not None)
ENDLESS = Arm("no eviction", endless=True)


def _jobs_s(turn: Turn) -> list[float]:
    return [job.ended_s - job.arrived_s for job in turn.jobs]


TIMES: dict[str, Callable[[Turn], float]] = {
    "makespan": lambda turn: makespan_s(turn.jobs),
    "mean job": lambda turn: fmean(_jobs_s(turn)),
    "p95 job": lambda turn: percentile(_jobs_s(turn), 0.95),
    "p95 call": lambda turn: percentile([call.ended_s - call.called_s for call in turn.calls], 0.95),
    "p95 TTFT": ttft_s(0.95),
    "p95 TTFT, returning": ttft_s(0.95, returning),
}
RECOMPUTED, OVER_BOUND = "recomputed", "of the bound"
GOALS = {"makespan": 0.78, "mean job": 0.64, "p95 job": 0.72, "p95 call": 1.0}
"""Of the wrapped arm, against the bare engine."""
GOAL_OVER_BOUND = 1.05
PLUGIN_GOALS = {
    (PLUGIN, RECOMPUTED, BARE): 0.8,
    (BOTH, "p95 TTFT, returning", BARE): 0.5,
    (BOTH, "p95 call", WRAPPED): 1.0,
    (BOTH, RECOMPUTED, WRAPPED): 1.0,
}
"""Of an arm, in a figure, against another one."""
LEAST_NOISE = 0.01
"""A smaller difference is none; virtual time has no noise of its own."""


class Figures:
    """What the turns of an experiment say; only seeds that every arm has had count."""

    def __init__(self, turns: Sequence[Turn], block_tokens: int, pool_tokens: int, order: Sequence[str] = ()) -> None:
        self._rounds = Rounds(turns, order, must=[BARE])
        self.arms, self.seeds, self.pool_tokens = self._rounds.arms, self._rounds.seeds, pool_tokens
        if not self.seeds:
            raise SystemExit("no seed has been measured in every arm yet, bare among them")
        self.figures: dict[str, Callable[[Turn], float]] = {
            **TIMES,
            RECOMPUTED: lambda turn: recomputed(every(turn)),
            OVER_BOUND: lambda turn: recomputed(turn.calls) / bound(turn.calls, turn.shared_tokens, block_tokens),
        }
        self.sessions = len(self._rounds.of(BARE)[0].jobs)
        self.needs = [needed_tokens(turn) / pool_tokens for turn in self._rounds.of(BARE)]
        """For each seed, what all sessions hold at their ends, in pools."""
        self.fits = max(self.needs) <= 1
        """Nothing need ever be evicted."""

    def of(self, arm: str, name: str) -> Spread:
        """Return a figure of an arm."""
        return spread(self._rounds.column(arm, self.figures[name]))

    def ratio(self, arm: str, name: str, against: str = BARE) -> Spread:
        """Return a figure of an arm against another one's with the same seed."""
        return spread(self._rounds.ratios(arm, against, self.figures[name]))

    def table(self) -> list[str]:
        """Return a table of all arms, and the goals if there is pressure."""
        names = (*TIMES, RECOMPUTED)
        rows = [
            [arm, *(self._against_bare(arm, name) for name in names), _shown(self.of(arm, OVER_BOUND))]
            for arm in self.arms
        ]
        if not self.fits:
            goals = [f"≤ {GOALS[name]:.2f}" if name in GOALS else "" for name in names]
            rows.append(["*goal, wrapped*", *goals, f"≤ {GOAL_OVER_BOUND:.2f}"])
            ours = [arm for arm in (PLUGIN, BOTH) if arm in self.arms]
            rows += [[f"*goal, {arm}*", *(_plugin_goals(arm, name) for name in names), ""] for arm in ours]
        return table(["arm", *names, OVER_BOUND], rows)

    def _against_bare(self, arm: str, name: str) -> str:
        if arm != BARE:
            return _shown(self.ratio(arm, name))
        middle = self.of(arm, name).middle
        return f"{middle:,.2f} s" if name in TIMES else f"{middle:,.0f} tokens"

    def setting(self) -> str:
        """Say what was run, and what the sessions need of the pool."""
        busiest = max(turn.others for turn in self._rounds.all())
        beside = f" Other processes took up to {busiest:.0%} of the machine." if busiest else ""
        peaks = [peak_tokens(turn) / self.pool_tokens for turn in self._rounds.of(BARE)]
        return (
            f"{self.sessions} sessions, {len(self.seeds)} seeds. At their ends the sessions hold "
            f"{min(self.needs):.2f} to {max(self.needs):.2f} times the pool of {self.pool_tokens:,} tokens together; "
            f"those under way at one moment {min(peaks):.2f} to {max(peaks):.2f} times.{beside}"
        )

    def verdict(self) -> list[str]:
        """Return what our arms do not reach; where everything fits, they must differ in nothing."""
        ours = [arm for arm in self.arms if arm in OURS]
        if not ours:
            return []
        if self.fits:
            return [self._beside_noise(arm, name) for arm in ours for name in TIMES] if AGAIN in self.arms else []
        found = [*self._reached(), *self._reached_with_plugin()]
        lines = [f"goal missed: {title} {is_:.2f}, wanted ≤ {goal:.2f}" for title, is_, goal in found if is_ > goal]
        if self.of(BARE, OVER_BOUND).middle <= GOAL_OVER_BOUND:
            lines.append("the bare engine recomputes no more than the goal allows: this load shows nothing")
        return lines

    def _reached(self) -> Iterator[tuple[str, float, float]]:
        """Yield what the wrapped arm should reach: a title, what it is, what it should be at most."""
        if WRAPPED in self.arms:
            yield from ((name, self.ratio(WRAPPED, name).middle, goal) for name, goal in GOALS.items())
            yield "recomputed against the bound", self.of(WRAPPED, OVER_BOUND).middle, GOAL_OVER_BOUND

    def _reached_with_plugin(self) -> Iterator[tuple[str, float, float]]:
        """Yield the same for the arms with the plugin, as far as they and what they are held against were run."""
        for (arm, name, against), goal in PLUGIN_GOALS.items():
            if {arm, against} <= {*self.arms}:
                yield f"{arm}, {name} of {against}'s", self.ratio(arm, name, against).middle, goal

    def _beside_noise(self, arm: str, name: str) -> str:
        """Say whether an arm is further from bare than bare is from itself."""
        mine = self.ratio(arm, name).middle - 1
        noise = max(LEAST_NOISE, *(abs(value - 1) for value in self.ratio(AGAIN, name)))
        word = "within" if abs(mine) <= noise else "goal missed: beyond"
        return f"{arm}, {name}: {mine:+.1%}, {word} the noise of ±{noise:.1%}"


def _shown(values: Spread) -> str:
    return values.shown(always=values.least != values.most)


def _plugin_goals(arm: str, name: str) -> str:
    """Return the goals of an arm with the plugin in a figure."""
    return ", ".join(
        f"≤ {goal:.2f}" if against == BARE else f"≤ {against}'s"
        for (of, what, against), goal in PLUGIN_GOALS.items()
        if (of, what) == (arm, name)
    )


def draw(figures: Figures, path: Path) -> None:
    """Draw each arm's figures against the bare engine's, with the extreme seeds, and the goals."""
    arms = [arm for arm in figures.arms if arm != BARE]
    colours = ["#3b7dd8" if arm in OURS else "#aaa" for arm in arms]
    titles = {**{name: name for name in TIMES}, OVER_BOUND: RECOMPUTED}
    size = (14, 0.35 * len(arms) + 1.2)
    figure, panes = plot.pyplot("pressure").subplots(1, len(titles), figsize=size, sharey=True)
    for axes, (name, title) in zip(panes, titles.items(), strict=True):
        against = name != OVER_BOUND
        rows = {arm: figures.ratio(arm, name) if against else figures.of(arm, name) for arm in arms}
        plot.bars(axes, rows, colours, GOALS.get(name) if against else GOAL_OVER_BOUND, "#c33")
        axes.set(title=title, xlabel="of bare" if against else name)
    plot.open_axes(*panes)
    panes[0].invert_yaxis()
    plot.save(figure, path)
