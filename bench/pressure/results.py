"""Turns into tables: each figure against the bare engine's with the same seed, beside the goals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from bench.lib.calls import TIMES, Metrics, Turn, metrics, needed_tokens, peak_tokens
from bench.pressure.arms import AGAIN, BARE, BOTH, OURS, PLUGIN, WRAPPED

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

Spread = tuple[float, float, float]
"""Median, least, most over the seeds."""


def spread(values: Sequence[float]) -> Spread:
    return median(values), min(values), max(values)


class Figures:
    """What the turns of an experiment say; only seeds that every arm has had count."""

    def __init__(self, turns: Sequence[Turn], block_tokens: int) -> None:
        self.arms = list(dict.fromkeys(turn.arm for turn in turns))
        found = {(turn.arm, turn.seed): turn for turn in turns}
        self.seeds = [
            seed
            for seed in sorted({turn.seed for turn in turns})
            if all((arm, seed) in found for arm in {BARE, *self.arms})
        ]
        if not self.seeds:
            raise SystemExit("no seed has been measured in every arm yet, bare among them")
        self._turns = found
        self._metrics: Mapping[tuple[str, int], Metrics] = {
            (arm, seed): metrics(found[arm, seed], block_tokens) for arm in self.arms for seed in self.seeds
        }

    def of(self, arm: str, name: str) -> Spread:
        """Return a figure of an arm."""
        return spread([getattr(self._metrics[arm, seed], name) for seed in self.seeds])

    def ratio(self, arm: str, name: str, against: str = BARE) -> Spread:
        """Return a figure of an arm against another one's with the same seed."""
        mine, other = [[getattr(self._metrics[one, seed], name) for seed in self.seeds] for one in (arm, against)]
        return spread([a / b if b else 1.0 for a, b in zip(mine, other, strict=True)])

    def table(self, pool_tokens: int) -> list[str]:
        """Return a table of all arms, and the goals if there is pressure."""
        titles = [*TITLES.values(), "recomputed", "of the bound"]
        lines = [f"| arm | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
        for arm in self.arms:
            cells = [self._against_bare(arm, name) for name in (*TIMES, "recomputed")]
            lines.append(f"| {arm} | {' | '.join(cells)} | {_told(self.of(arm, 'over_bound'))} |")
        if self.fits(pool_tokens):
            return lines
        goals = [f"≤ {GOALS[name]:.2f}" if name in GOALS else "" for name in (*TIMES, "recomputed")]
        lines.append(f"| *goal, wrapped* | {' | '.join(goals)} | ≤ {GOAL_OVER_BOUND:.2f} |")
        return [*lines, *self._plugin_goals()]

    def _plugin_goals(self) -> list[str]:
        """Return the goals of the arms with the plugin, as rows of the table."""
        return [
            f"| *goal, {arm}* | "
            + " | ".join(
                ", ".join(
                    f"≤ {goal:.2f}" if against == BARE else f"≤ {against}'s"
                    for (who, what, against), goal in PLUGIN_GOALS.items()
                    if (who, what) == (arm, name)
                )
                for name in (*TIMES, "recomputed")
            )
            + " |  |"
            for arm in (PLUGIN, BOTH)
            if arm in self.arms
        ]

    def _against_bare(self, arm: str, name: str) -> str:
        if arm == BARE:
            unit = "s" if name in TIMES else "tokens"
            return f"{self.of(arm, name)[0]:,.{2 if unit == 's' else 0}f} {unit}"
        return _told(self.ratio(arm, name))

    @property
    def sessions(self) -> int:
        """How many there are in a turn."""
        return len(self._turns[BARE, self.seeds[0]].jobs)

    def setting(self, pool_tokens: int) -> str:
        """Say what was run, and what the sessions need of the pool."""
        busiest = max(self._turns[arm, seed].others for arm in self.arms for seed in self.seeds)
        beside = f" Other processes took up to {busiest:.0%} of the machine." if busiest else ""
        return f"{self.sessions} sessions, {len(self.seeds)} seeds. {self.pressure(pool_tokens)}{beside}"

    def needs(self, pool_tokens: int) -> list[float]:
        """Return, for each seed, what all sessions hold at their ends, in pools."""
        return [needed_tokens(self._turns[BARE, seed]) / pool_tokens for seed in self.seeds]

    def fits(self, pool_tokens: int) -> bool:
        """Whether nothing need ever be evicted."""
        return max(self.needs(pool_tokens)) <= 1

    def pressure(self, pool_tokens: int) -> str:
        """Say what the sessions need of the pool."""
        needs = self.needs(pool_tokens)
        peaks = [peak_tokens(self._turns[BARE, seed]) / pool_tokens for seed in self.seeds]
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
        if self.of(BARE, "over_bound")[0] <= GOAL_OVER_BOUND:
            lines.append("the bare engine recomputes no more than the goal allows: this load shows nothing")
        return lines

    def _reached(self) -> list[tuple[str, float, float]]:
        """Return what the wrapped arm should reach: a title, what it is, what it should be at most."""
        if WRAPPED not in self.arms:
            return []
        found = [(TITLES[name], self.ratio(WRAPPED, name)[0], goal) for name, goal in GOALS.items()]
        return [*found, ("recomputed against the bound", self.of(WRAPPED, "over_bound")[0], GOAL_OVER_BOUND)]

    def _reached_with_plugin(self) -> list[tuple[str, float, float]]:
        """Return the same for the arms with the plugin, as far as they and what they are held against were run."""
        return [
            (f"{arm}, {TITLES.get(name, name)} of {against}'s", self.ratio(arm, name, against)[0], goal)
            for (arm, name, against), goal in PLUGIN_GOALS.items()
            if {arm, against} <= {*self.arms}
        ]

    def _beside_noise(self, arm: str, name: str) -> str:
        """Say whether an arm is further from bare than bare is from itself."""
        mine = self.ratio(arm, name)[0] - 1
        noise = max(LEAST_NOISE, *(abs(value - 1) for value in self.ratio(AGAIN, name)))
        word = "within" if abs(mine) <= noise else "goal missed: beyond"
        return f"{arm}, {TITLES[name]}: {mine:+.1%}, {word} the noise of ±{noise:.1%}"


def _told(values: Spread) -> str:
    middle, least, most = values
    return f"{middle:.2f}" if least == most else f"{middle:.2f} ({least:.2f} … {most:.2f})"
