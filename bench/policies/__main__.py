"""How long workflows take under each policy, on the simulated engine in virtual time.

    make bench-policies                                     all of it, some minutes on one core
    make bench-policies BENCH='--quick'                     one seed, two loads
    make bench-policies BENCH='--arrivals trace.csv.gz'     arrivals of a public trace instead of generated ones

docs/policies.md has the load. The real core (its steps, queues, policies, estimates) runs in front of ``SimEngine``;
only the bytes and the waiting are left out. Every policy sees the same workflows at the same times. ``clairvoyant``
knows what each run will really need and serves the one with least left: no learned estimate can be expected to do
better. Completion is from a run's arrival to its end, tools' time included.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from bench.lib import plot
from bench.lib.command import DOCS, finish, parser, tell, usual
from bench.lib.core import Hints
from bench.lib.figures import Rounds, at_rank, spread, table
from bench.lib.flags import count
from bench.policies.study import Plan, arrange, gaps, plans, play, throughput
from orla_lg_sim.parameters import EngineParameters, load

NAMED = ("fcfs", "workflow_fcfs", "priority", "sjf", "las", "edf", "shortest_remaining", "final_first", "fair")
LOADS = (0.6, 0.7, 0.8, 0.9, 0.95)
FAIR_LOADS = (0.7, 0.99)
GOAL_GAIN, GOAL_GAP, GOAL_FAIR = 0.34, 0.5, 1.5
WARM = 0.2
"""The part of the runs, the first ones, that fills the system and is not counted."""


class Cell(NamedTuple):
    """One policy under one load with one seed: what each run took that counts, in seconds."""

    arm: str
    seed: int
    completion_s: Sequence[float]


Cells = Mapping[float, Rounds[Cell]]
"""By load."""
FIGURES: Mapping[str, Callable[[Cell], float]] = {
    "mean": lambda cell: fmean(cell.completion_s),
    "p95": lambda cell: at_rank(cell.completion_s, 0.95),
    "p99": lambda cell: at_rank(cell.completion_s, 0.99),
}


def study(
    engine: EngineParameters, arms: Sequence[str], loads: Sequence[float], seeds: int, runs: int, trace: Path | None
) -> Cells:
    """Play every policy under every load with every seed; those of one load and seed see the same runs."""
    capacity, cells = throughput(engine, random.Random(0)), dict[float, list[Cell]]()
    for seed in range(1, seeds + 1):
        dice = random.Random(seed)
        drawn = plans(runs, dice)
        between = gaps(runs, dice, trace, engine)
        for offered in loads:
            work = arrange(drawn, between, offered, engine, capacity)
            for policy in arms:
                tell(f"load {offered:.0%} seed {seed} {policy}")
                ended = play(engine, policy, work)
                counted = [each.completion_s for each in ended[int(len(ended) * WARM) :]]
                cells.setdefault(offered, []).append(Cell(policy, seed, counted))
    return {offered: Rounds(found, arms) for offered, found in sorted(cells.items())}


def changes(cells: Rounds[Cell], policy: str, figure: str) -> list[float]:
    """Return, seed by seed, by how much a figure differs from plain FCFS's; -0.3 is 30 % less."""
    return [ratio - 1 for ratio in cells.ratios(policy, "fcfs", FIGURES[figure])]


def gap_closed(cells: Rounds[Cell], policy: str, figure: str) -> float:
    """Return which part of the way from FCFS to the clairvoyant a policy comes, at the median of the seeds."""
    way = median(changes(cells, "clairvoyant", figure))
    return median(changes(cells, policy, figure)) / way if way else 0.0


def fairness(engine: EngineParameters, runs: int, seed: int, offered: float) -> dict[str, float]:
    """Return a light tenant's p95 in seconds: alone, and under two policies beside one with ten times its work."""
    dice = random.Random(seed)
    capacity = throughput(engine, dice)
    light = [Plan(plan.kind, plan.steps, Hints(tenant="light")) for plan in plans(runs, dice)]
    heavy = [Plan(plan.kind, plan.steps, Hints(tenant="heavy")) for plan in plans(runs * 10, dice)]
    own = arrange(light, gaps(runs, dice, None, engine), offered / 11, engine, capacity)
    others = arrange(heavy, gaps(runs * 10, dice, None, engine), offered * 10 / 11, engine, capacity)
    both = sorted(own + others, key=lambda each: each[0])

    def p95_s(policy: str, work: Sequence[tuple[float, Plan]]) -> float:
        ended = play(engine, policy, work)
        return at_rank([each.completion_s for each in ended if each.tenant == "light"], 0.95)

    found = {"alone": p95_s("fair", own), "fair": p95_s("fair", both), "fcfs": p95_s("fcfs", both)}
    return {"load": offered, **found}


def rows(cells: Cells) -> list[str]:
    def shown(found: Rounds[Cell], policy: str, figure: str) -> str:
        if policy == "fcfs":
            return f"{median(found.column(policy, FIGURES[figure])):.1f} s"
        return spread(changes(found, policy, figure)).shown("+.0%", bold=True)

    made = [
        [f"{load:.0%}", policy, *(shown(found, policy, figure) for figure in FIGURES)]
        for load, found in cells.items()
        for policy in found.arms
    ]
    return table(["load", "policy", *FIGURES], made)


def verdicts(cells: Cells, fair: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the goals and what came of them."""
    found: list[list[str]] = []
    for (at, each), figure in itertools.product(cells.items(), FIGURES):
        closed, most = gap_closed(each, "shortest_remaining", figure), median(changes(each, "clairvoyant", figure))
        said = f"{closed:.0%}" + ("" if closed >= GOAL_GAP else " (missed)")
        said = f"nothing to gain: the clairvoyant has {most:+.0%}" if most >= -0.02 else said
        found.append(["half of the gap to the clairvoyant, learned", f"{at:.0%}", figure, said])
    top, each = max(cells.items(), key=lambda item: item[0])
    for figure in ("p95", "p99"):
        others = sorted({*each.arms} - {"fcfs", "clairvoyant"})
        gain, best = min((median(changes(each, policy, figure)), policy) for policy in others)
        missed = "" if -gain >= GOAL_GAIN else " (missed)"
        found.append([f"{figure} at least 34 % less than FCFS", f"{top:.0%}", best, f"{gain:+.0%}{missed}"])
    for offered, policy in itertools.product(sorted({each["load"] for each in fair}), ("fair", "fcfs")):
        times = median(each[policy] / each["alone"] for each in fair if each["load"] == offered)
        said = f"{times:.2f}×" + (" (missed)" if policy == "fair" and times > GOAL_FAIR else "")
        found.append(["light tenant's p95 within 1.5× of running alone", f"{offered:.0%}", policy, said])
    return table(["goal", "at load", "figure", "reached"], found)


def draw(cells: Cells, path: Path) -> None:
    """Draw mean, p95 and p99 over the load for each policy."""
    pyplot = plot.pyplot("orla_lg", 9, text=True)
    drawn, axes = pyplot.subplots(1, len(FIGURES), figsize=(10, 3.6), layout="constrained")
    for axis, (figure, of) in zip(axes, FIGURES.items(), strict=True):
        for policy in dict.fromkeys(policy for found in cells.values() for policy in found.arms):
            values = [median(found.column(policy, of)) for found in cells.values()]
            style = {"fcfs": "k-", "clairvoyant": "k:"}.get(policy, "-")
            axis.plot([load * 100 for load in cells], values, style, marker=".", label=policy)
        axis.set(title=f"completion, {figure}", xlabel="load, %", ylabel="seconds", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=7)
    plot.save(drawn, path, tight=None)


def options() -> argparse.Namespace:
    options = parser("policies", __doc__)
    add = options.add_argument
    add("--quick", action="store_true", help="one seed, loads of 80 and 95 %%, 600 runs")
    add("--seeds", type=count, default=3, help="workloads drawn (3)")
    add("--runs", type=count, default=1500, help="runs of each (1500)")
    add("--arrivals", type=Path, help="a trace whose gaps between arrivals are taken, .gz or not")
    add("--parameters", type=Path, help="what `orla-lg sim calibrate` wrote; without it the defaults")
    add("--only", nargs="+", choices=NAMED, help="beside fcfs and the clairvoyant")
    usual(options, writes="docs/policies.md and its figure")
    return options.parse_args()


def main() -> None:
    args = options()
    engine = EngineParameters() if args.parameters is None else load(args.parameters)
    loads, seeds, runs = ((0.8, 0.95), 1, 600) if args.quick else (LOADS, args.seeds, args.runs)
    arms = list(dict.fromkeys(["fcfs", *(args.only or NAMED), "shortest_remaining", "clairvoyant"]))
    cells = study(engine, arms, loads, seeds, runs, args.arrivals)
    light = 60 if args.quick else 150
    fair = [fairness(engine, light, seed, offered) for seed in range(1, seeds + 1) for offered in FAIR_LOADS]
    where = "generated arrivals" if args.arrivals is None else f"arrivals of {args.arrivals.name}"
    lines = [f"{runs} runs, {seeds} seeds, {where}.", "", *verdicts(cells, fair), "", *rows(cells)]
    if args.write:
        draw(cells, DOCS / "policies.svg")
    finish(lines, "policies", DOCS / "policies.md" if args.write else None)


if __name__ == "__main__":
    main()
