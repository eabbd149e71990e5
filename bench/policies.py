"""How long workflows take under each policy, on the simulated engine in virtual time.

    make bench-policies                                     all of it, some minutes on one core
    make bench-policies BENCH='--quick'                     one seed, two loads
    make bench-policies BENCH='--arrivals trace.csv.gz'     arrivals of a public trace instead of generated ones

The real core (``lifecycle``, queues, policies, estimates) runs in front of ``SimEngine``; only the bytes and the
waiting are left out. Workflows are of five kinds, from one call to hundreds, so that their total service is
heavy-tailed; most are short, and most of the work is in a few. The engine runs eight calls at once, so queues are
ours. Load is the service that arrives over the engine's throughput when it is never idle, which is measured first.

Every policy sees the same workflows at the same times. ``clairvoyant`` knows what each run will really need and
serves the one with least left: no learned estimate can be expected to do better. Completion is from a run's arrival
to its end, tools' time included.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path
from statistics import median

from flags import count
from marks import DOCS, put

from orla_lg.core.call import Ask, Hints
from orla_lg.core.engine.backend import Backend
from orla_lg.core.identity import Identity
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.lifecycle import arrive
from orla_lg.core.policies import RequestChoice, StageChoice
from orla_lg.core.queues import Queued, Sortable
from orla_lg.core.workflow import Outcome
from orla_lg.testing.virtual import VirtualServing
from orla_lg_sim import arrivals as traces
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.parameters import EngineParameters, load
from orla_lg_sim.request import SimRequest

PAGE, FIGURE = DOCS / "policies.md", DOCS / "policies.svg"
CONCURRENCY = 8
NAMED = (
    "fcfs", "workflow_fcfs", "priority", "sjf", "las", "edf", "shortest_remaining", "critical_path", "fair",
)  # fmt: skip
LOADS = (0.6, 0.7, 0.8, 0.9, 0.95)
FAIR_LOADS = (0.7, 0.99)
GOAL_GAIN, GOAL_GAP, GOAL_FAIR = 0.34, 0.5, 1.5
WARM = 0.2
"""The part of the runs, the first ones, that fills the system and is not counted."""
TEXT = "x" * 40_000


@dataclass(frozen=True, slots=True)
class Size:
    """One call: what it takes."""

    prompt_tokens: int
    output_tokens: int

    def service_s(self, engine: EngineParameters) -> float:
        """Return its part of a full engine's time."""
        decode_s = engine.step_s / CONCURRENCY + engine.decode_sequence_s
        return self.prompt_tokens * engine.prefill_token_s + self.output_tokens * decode_s


@dataclass(frozen=True, slots=True)
class Step:
    """Calls of one superstep, each in a stage of its own, and the tool that runs after them."""

    calls: tuple[tuple[str, Size], ...]
    tool_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One run: what will happen in it, which nobody but the clairvoyant knows."""

    kind: str
    steps: tuple[Step, ...]
    hints: Hints

    def service_s(self, engine: EngineParameters) -> float:
        return sum(size.service_s(engine) for step in self.steps for _, size in step.calls)


def _size(dice: random.Random, prompt_tokens: float, output_tokens: float) -> Size:
    """Draw lengths around these medians."""
    prompt, output = prompt_tokens * dice.lognormvariate(0, 0.5), output_tokens * dice.lognormvariate(0, 0.7)
    return Size(min(4000, max(16, int(prompt))), min(1000, max(4, int(output))))


def _tool_s(dice: random.Random) -> float:
    return min(10.0, dice.lognormvariate(log(0.4), 1.0))


def _rounds(dice: random.Random, least: int, shape: float, most: int) -> int:
    """Draw from a Pareto distribution: the longer it went on, the longer it will."""
    return min(most, int(least * dice.paretovariate(shape)))


def chat(dice: random.Random) -> tuple[Step, ...]:
    return (Step((("answer", _size(dice, 150, 50)),)),)


def lookup(dice: random.Random) -> tuple[Step, ...]:
    return (
        Step((("rewrite", _size(dice, 100, 15)),), _tool_s(dice)),
        Step((("answer", _size(dice, 500, 80)),)),
        Step((("check", _size(dice, 300, 8)),)),
    )


def review(dice: random.Random) -> tuple[Step, ...]:
    branches = tuple((f"reader {n}", _size(dice, 400, 50)) for n in range(dice.randint(2, 5)))
    return (
        Step((("plan", _size(dice, 200, 60)),)),
        Step(branches),
        Step((("merge", _size(dice, 600, 120)),)),
    )


def agent(dice: random.Random) -> tuple[Step, ...]:
    rounds = _rounds(dice, 3, 1.5, 24)
    loop = [Step((("think", _size(dice, 300, 40)),), _tool_s(dice)) for _ in range(rounds)]
    return (*loop, Step((("report", _size(dice, 400, 150)),)))


def research(dice: random.Random) -> tuple[Step, ...]:
    loop: list[Step] = []
    for _ in range(_rounds(dice, 2, 1.3, 12)):
        loop.append(Step(tuple((f"search {n}", _size(dice, 300, 50)) for n in range(3)), _tool_s(dice)))
        loop.append(Step((("judge", _size(dice, 500, 30)),)))
    return (Step((("plan", _size(dice, 300, 150)),)), *loop, Step((("write", _size(dice, 1000, 400)),)))


KINDS: dict[Callable[[random.Random], tuple[Step, ...]], tuple[float, float, float]] = {
    chat: (0.50, 3, 3000.0),
    lookup: (0.25, 2, 6000.0),
    review: (0.12, 1, 9000.0),
    agent: (0.10, 0, 12000.0),
    research: (0.03, 0, 18000.0),
}
"""By kind of workflow: its share, the priority its user gives it, and the deadline of its calls in seconds, which
lies far enough off that none is missed."""


def plans(count: int, dice: random.Random) -> list[Plan]:
    """Draw runs from the mixture."""
    shares = [share for share, _, _ in KINDS.values()]
    made = []
    for kind in dice.choices(list(KINDS), shares, k=count):
        _, priority, deadline_s = KINDS[kind]
        hints = Hints(priority=priority, deadline_s=deadline_s, tenant=f"tenant {dice.randrange(4)}")
        made.append(Plan(kind.__name__, kind(dice), hints))
    return made


class Clairvoyant:
    """Least remaining service first, which it is told."""

    steady = True

    def __init__(self) -> None:
        self.remaining_s: dict[str, float] = {}
        """By call: what its run needs from there to its end, the call included."""

    def key(self, head: Queued, now: float) -> Sortable:
        return (self.remaining_s[head.call.id], head.order)


@dataclass(frozen=True, slots=True)
class Ended:
    """One run as its user saw it."""

    kind: str
    tenant: str
    completion_s: float


class Study:
    """One policy, one sequence of runs, one engine."""

    def __init__(self, engine: EngineParameters, stage: StageChoice, request: RequestChoice) -> None:
        self._parameters = engine
        self._sizes: dict[str, Size] = {}
        self._clairvoyant = stage if isinstance(stage, Clairvoyant) else None
        backend = Backend("sim", "http://sim/v1", max_concurrency=CONCURRENCY, capacity=1_000_000)
        self._virtual = VirtualServing[SimRequest](
            {backend: SimEngine(engine)}, self._request, stage_policy=stage, request_policy=request, keep_records=10
        )
        self._ended: list[tuple[int, Ended]] = []

    def _request(self, inflight: InFlightCall) -> SimRequest:
        size = self._sizes.pop(inflight.call.id)
        return SimRequest(inflight.call.id, size.prompt_tokens, size.output_tokens)

    def run(self, work: Sequence[tuple[float, Plan]]) -> list[Ended]:
        """Return how the runs ended, in order of their arrival."""
        with self._virtual as virtual:
            virtual.run(self._all(work))
        return [ended for _, ended in sorted(self._ended, key=lambda each: each[0])]

    async def _all(self, work: Sequence[tuple[float, Plan]]) -> None:
        async with asyncio.TaskGroup() as group:
            for number, (at_s, plan) in enumerate(work):
                await asyncio.sleep(at_s - self._virtual.clock())
                group.create_task(self._play(number, plan))

    async def _play(self, number: int, plan: Plan) -> None:
        serving, clock, run = self._virtual.serving, self._virtual.clock, f"run {number}"
        began_s, left_s = clock(), plan.service_s(self._parameters)
        state = serving.progress.run_started(run, thread=None, graph=plan.kind)
        for step in plan.steps:
            for stage, _ in step.calls:
                serving.progress.node_entered(state, stage)
            async with asyncio.TaskGroup() as group:
                for stage, size in step.calls:
                    group.create_task(self._call(Identity(run, run, stage), size, plan.hints, left_s))
            for stage, size in step.calls:
                serving.progress.node_left(state, stage)
                left_s -= size.service_s(self._parameters)
            await asyncio.sleep(step.tool_s)
        serving.progress.run_ended(run, Outcome.DONE)
        self._ended.append((number, Ended(plan.kind, plan.hints.tenant or "", clock() - began_s)))

    async def _call(self, identity: Identity, size: Size, hints: Hints, left_s: float) -> None:
        serving = self._virtual.serving
        ask = Ask("sim", [{"role": "user", "content": TEXT[: 4 * size.prompt_tokens]}])
        inflight = arrive(serving.services, identity, ask, call_id=serving.new_id(), said=hints)
        self._sizes[inflight.call.id] = size
        if self._clairvoyant is not None:
            self._clairvoyant.remaining_s[inflight.call.id] = left_s
        await self._virtual.serve(inflight)


def play(engine: EngineParameters, policy: str, work: Sequence[tuple[float, Plan]]) -> list[Ended]:
    """Run one arm."""
    chosen = Clairvoyant() if policy == "clairvoyant" else policy
    return Study(engine, chosen, chosen).run(work)


def throughput(engine: EngineParameters, dice: random.Random) -> float:
    """Return how much service (``Plan.service_s``) a second the engine does when it is never idle."""
    calls = [call for plan in plans(300, dice) for step in plan.steps for call in step.calls]
    dice.shuffle(calls)
    single = [Plan("single", (Step((call,)),), Hints()) for call in calls]
    study = Study(engine, "fcfs", "fcfs")
    study.run([(0.0, plan) for plan in single])
    return sum(plan.service_s(engine) for plan in single) / study._virtual.clock()


def gaps(count: int, dice: random.Random, trace: Path | None, engine: EngineParameters) -> list[float]:
    """Return gaps between arrivals with a mean of one: a trace's, or generated with a heavy tail."""
    if trace is None:
        drawn = [dice.lognormvariate(0, 1.0) for _ in range(count)]
    else:
        times = [arrival.at_s for arrival in traces.read(trace, engine).arrivals]
        between = [after - before for before, after in itertools.pairwise(times)]
        begin = dice.randrange(len(between))
        drawn = [between[(begin + n) % len(between)] for n in range(count)]
    mean = sum(drawn) / count
    return [gap / mean for gap in drawn]


def arrange(
    drawn: Sequence[Plan], between: Sequence[float], offered: float, engine: EngineParameters, capacity: float
) -> list[tuple[float, Plan]]:
    """Return runs with their arrivals, so that what arrives is *offered* of the engine's *capacity*."""
    total_s = sum(plan.service_s(engine) for plan in drawn)
    gap_s = total_s / (capacity * offered) / len(drawn)
    return list(zip(itertools.accumulate(gap * gap_s for gap in between), drawn, strict=True))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of *values* does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


FIGURES: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda values: sum(values) / len(values),
    "p95": lambda values: percentile(values, 0.95),
    "p99": lambda values: percentile(values, 0.99),
}


def figures(ended: Sequence[Ended]) -> dict[str, float]:
    """Return mean, p95 and p99 of the runs that count, in seconds."""
    counted = [each.completion_s for each in ended[int(len(ended) * WARM) :]]
    return {name: of(counted) for name, of in FIGURES.items()}


@dataclass(frozen=True)
class Cell:
    """One policy under one load with one seed: its figures, in seconds."""

    load: float
    seed: int
    policy: str
    figures: dict[str, float]


def study(
    engine: EngineParameters, arms: Sequence[str], loads: Sequence[float], seeds: int, runs: int, trace: Path | None
) -> list[Cell]:
    """Play every policy under every load with every seed; those of one load and seed see the same runs."""
    capacity = throughput(engine, random.Random(0))
    cells = []
    for seed in range(1, seeds + 1):
        dice = random.Random(seed)
        drawn = plans(runs, dice)
        between = gaps(runs, dice, trace, engine)
        for offered in loads:
            work = arrange(drawn, between, offered, engine, capacity)
            for policy in arms:
                began = time.perf_counter()
                cells.append(Cell(offered, seed, policy, figures(play(engine, policy, work))))
                took = f"{time.perf_counter() - began:.1f} s"
                print(f"load {offered:.0%} seed {seed} {policy}: {took}", file=sys.stderr, flush=True)
    return cells


def changes(cells: Sequence[Cell], load: float, policy: str, figure: str) -> list[float]:
    """Return, seed by seed, by how much a figure differs from plain FCFS's; -0.3 is 30 % less."""
    base = {cell.seed: cell.figures[figure] for cell in cells if (cell.load, cell.policy) == (load, "fcfs")}
    mine = [cell for cell in cells if (cell.load, cell.policy) == (load, policy)]
    return [cell.figures[figure] / base[cell.seed] - 1 for cell in mine]


def gap_closed(cells: Sequence[Cell], load: float, policy: str, figure: str) -> float:
    """Return which part of the way from FCFS to the clairvoyant a policy comes, at the median of the seeds."""
    way = median(changes(cells, load, "clairvoyant", figure))
    return median(changes(cells, load, policy, figure)) / way if way else 0.0


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
        return percentile([each.completion_s for each in ended if each.tenant == "light"], 0.95)

    found = {"alone": p95_s("fair", own), "fair": p95_s("fair", both), "fcfs": p95_s("fcfs", both)}
    return {"load": offered, **found}


def rows(cells: Sequence[Cell]) -> list[str]:
    loads = sorted({cell.load for cell in cells})
    arms = list(dict.fromkeys(cell.policy for cell in cells))
    lines = ["| load | policy | mean | p95 | p99 |", "|---|---|---|---|---|"]
    for offered in loads:
        for policy in arms:
            told = [_told(cells, offered, policy, figure) for figure in FIGURES]
            lines.append(f"| {offered:.0%} | {policy} | {' | '.join(told)} |")
    return lines


def _told(cells: Sequence[Cell], load: float, policy: str, figure: str) -> str:
    if policy == "fcfs":
        values = [cell.figures[figure] for cell in cells if (cell.load, cell.policy) == (load, policy)]
        return f"{median(values):.1f} s"
    found = changes(cells, load, policy, figure)
    return f"**{median(found):+.0%}** ({min(found):+.0%} … {max(found):+.0%})"


def verdicts(cells: Sequence[Cell], fair: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the goals and what came of them."""
    lines = ["| goal | at load | figure | reached |", "|---|---|---|---|"]
    for at in sorted({cell.load for cell in cells}):
        for figure in FIGURES:
            closed = gap_closed(cells, at, "shortest_remaining", figure)
            most = median(changes(cells, at, "clairvoyant", figure))
            if most >= -0.02:
                said = f"nothing to gain: the clairvoyant has {most:+.0%}"
            else:
                said = f"{closed:.0%}" + ("" if closed >= GOAL_GAP else " (missed)")
            lines.append(f"| half of the gap to the clairvoyant, learned | {at:.0%} | {figure} | {said} |")
    top = max(cell.load for cell in cells)
    for figure in ("p95", "p99"):
        best = min({cell.policy for cell in cells} - {"fcfs", "clairvoyant"}, key=_by(cells, top, figure))
        gain = median(changes(cells, top, best, figure))
        missed = "" if -gain >= GOAL_GAIN else " (missed)"
        lines.append(f"| {figure} at least 34 % less than FCFS | {top:.0%} | {best} | {gain:+.0%}{missed} |")
    for offered, policy in itertools.product(sorted({each["load"] for each in fair}), ("fair", "fcfs")):
        times = median(each[policy] / each["alone"] for each in fair if each["load"] == offered)
        said = f"{times:.2f}×" + (" (missed)" if policy == "fair" and times > GOAL_FAIR else "")
        lines.append(f"| light tenant's p95 within 1.5× of running alone | {offered:.0%} | {policy} | {said} |")
    return lines


def _by(cells: Sequence[Cell], load: float, figure: str) -> Callable[[str], float]:
    return lambda policy: median(changes(cells, load, policy, figure))


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Draw mean, p95 and p99 over the load for each policy."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "orla_lg", "svg.fonttype": "none", "font.size": 9})
    plot, axes = plt.subplots(1, len(FIGURES), figsize=(10, 3.6), layout="constrained")
    loads = sorted({cell.load for cell in cells})
    for axis, figure in zip(axes, FIGURES, strict=True):
        for policy in dict.fromkeys(cell.policy for cell in cells):
            values = [
                median(cell.figures[figure] for cell in cells if (cell.load, cell.policy) == (load, policy))
                for load in loads
            ]
            style = {"fcfs": "k-", "clairvoyant": "k:"}.get(policy, "-")
            axis.plot([load * 100 for load in loads], values, style, marker=".", label=policy)
        axis.set(title=f"completion, {figure}", xlabel="load, %", ylabel="seconds", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=7)
    plot.savefig(path, metadata={"Date": None})


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="one seed, loads of 80 and 95 %%, 600 runs")
    add("--seeds", type=count, default=3, help="workloads drawn (3)")
    add("--runs", type=count, default=1500, help="runs of each (1500)")
    add("--arrivals", type=Path, help="a trace whose gaps between arrivals are taken, .gz or not")
    add("--parameters", type=Path, help="what `orla-lg sim calibrate` wrote; without it the defaults")
    add("--only", nargs="+", choices=[*NAMED, "clairvoyant"], help="beside fcfs and the clairvoyant")
    add("--json", type=Path, help="keep all figures there")
    add("--write", action="store_true", help="write docs/policies.md and its figure")
    return parser.parse_args()


def main() -> None:
    args = options()
    engine = EngineParameters() if args.parameters is None else load(args.parameters)
    loads, seeds, runs = ((0.8, 0.95), 1, 600) if args.quick else (LOADS, args.seeds, args.runs)
    arms = list(dict.fromkeys(["fcfs", *(args.only or NAMED), "shortest_remaining", "clairvoyant"]))
    cells = study(engine, arms, loads, seeds, runs, args.arrivals)
    light = 60 if args.quick else 150
    fair = [fairness(engine, light, seed, offered) for seed in range(1, seeds + 1) for offered in FAIR_LOADS]
    if args.json is not None:
        args.json.write_text(json.dumps({"cells": [asdict(cell) for cell in cells], "fair": fair}, indent=1))
    where = "generated arrivals" if args.arrivals is None else f"arrivals of {args.arrivals.name}"
    lines = [f"{runs} runs, {seeds} seeds, {where}.", "", *verdicts(cells, fair), "", *rows(cells)]
    print("\n".join(lines))
    if args.write:
        put(PAGE, "policies.py", lines)
        draw(cells, FIGURE)


if __name__ == "__main__":
    main()
