"""What ``final_first`` gains: time to the first token of the final answer, and completion, in virtual time.

    python -m bench.policies.final              three loads, three seeds, some minutes on one core
    python -m bench.policies.final --quick      one seed, few runs

As ``bench.policies``, with runs of an agent whose one stage calls tools for 1 to 4 rounds and then answers: alone,
with as many of its runs that answer at once, and beside as many runs of a graph with a single call. The time to the
first token of the final answer (FTR) is counted from the run's arrival. All figures are against ``workflow_fcfs``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from bench.lib.command import finish, parser, tell
from bench.lib.core import Hints
from bench.lib.figures import Rounds, at_rank, spread, table
from bench.lib.flags import count
from bench.policies.study import Ended, Plan, Step, arrange, chat, gaps, play, rounds, throughput
from orla_lg_sim.parameters import EngineParameters

ARMS = ("workflow_fcfs", "final_first", "shortest_remaining", "las", "fcfs", "clairvoyant")
OFFERED = (0.7, 0.8)
WARM = 0.2
"""The part of the runs, the first ones, that fills the system and is not counted."""


def agents(dice: random.Random) -> Plan:
    return Plan("rounds", rounds(dice), Hints())


def some_at_once(dice: random.Random) -> Plan:
    drawn: list[Step] = rounds(dice, 0, 0) if dice.random() < 0.5 else rounds(dice)
    return Plan("rounds", drawn, Hints())


def beside_single_calls(dice: random.Random) -> Plan:
    return Plan("chat", chat(dice), Hints()) if dice.random() < 0.5 else agents(dice)


MIXTURES: Mapping[str, Callable[[random.Random], Plan]] = {
    "1 to 4 rounds": agents,
    "half answer at once": some_at_once,
    "half are single calls": beside_single_calls,
}


class Cell(NamedTuple):
    """One policy under one load with one seed."""

    arm: str
    seed: int
    ended: Sequence[Ended]


def _figure(of: Callable[[Ended], float], share: float) -> Callable[[Cell], float]:
    return lambda cell: at_rank([of(each) for each in cell.ended], share)


FIGURES: Mapping[str, Callable[[Cell], float]] = {
    "FTR p50": _figure(lambda each: each.first_token_s, 0.5),
    "FTR p95": _figure(lambda each: each.first_token_s, 0.95),
    "completion p50": _figure(lambda each: each.completion_s, 0.5),
    "completion p95": _figure(lambda each: each.completion_s, 0.95),
}


def study(mixture: str, offered: float, seeds: int, runs: int) -> Rounds[Cell]:
    """Play every policy with every seed; those of one seed see the same runs."""
    engine, cells = EngineParameters(), list[Cell]()
    capacity = throughput(engine, random.Random(0))
    for seed in range(1, seeds + 1):
        dice = random.Random(seed)
        drawn = [MIXTURES[mixture](dice) for _ in range(runs)]
        work = arrange(drawn, gaps(runs, dice, None, engine), offered, engine, capacity)
        for arm in ARMS:
            tell(f"{mixture}, load {offered:.0%}, seed {seed}, {arm}")
            cells.append(Cell(arm, seed, play(engine, arm, work)[int(runs * WARM) :]))
    return Rounds(cells, ARMS)


def rows(mixture: str, offered: float, found: Rounds[Cell]) -> list[list[str]]:
    """Return a row for each policy; the first has its seconds, the others what they differ by."""

    def shown(arm: str, figure: Callable[[Cell], float]) -> str:
        if arm == ARMS[0]:
            return f"{median(found.column(arm, figure)):.1f} s"
        return spread([ratio - 1 for ratio in found.ratios(arm, ARMS[0], figure)]).shown("+.0%")

    return [[mixture, f"{offered:.0%}", f"`{arm}`", *(shown(arm, each) for each in FIGURES.values())] for arm in ARMS]


def main() -> None:
    options = parser("policies.final", __doc__)
    options.add_argument("--quick", action="store_true", help="one seed, a load of 80 %%, 150 runs")
    options.add_argument("--seeds", type=count, default=3, help="workloads drawn (3)")
    options.add_argument("--runs", type=count, default=600, help="runs of each (600)")
    args = options.parse_args()
    loads, seeds, runs = ((0.8,), 1, 150) if args.quick else (OFFERED, args.seeds, args.runs)
    each = [(mixture, load, study(mixture, load, seeds, runs)) for mixture in MIXTURES for load in loads]
    found = [row for mixture, load, cells in each for row in rows(mixture, load, cells)]
    finish([f"{runs} runs, {seeds} seeds.", "", *table(["runs", "load", "policy", *FIGURES], found)], "final", None)


if __name__ == "__main__":
    main()
