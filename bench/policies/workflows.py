"""The runs: five kinds with a heavy tail, three with branches of unequal length, and when they arrive."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path

from bench.lib.core import START, Edge, GraphStructure, Hints
from orla_lg_sim import arrivals as traces
from orla_lg_sim.parameters import EngineParameters

CONCURRENCY = 8
"""Calls that the engine runs at once, so that queues are ours."""


@dataclass(frozen=True, slots=True)
class Size:
    """One call: what it takes."""

    prompt_tokens: int
    output_tokens: int

    def service_s(self, engine: EngineParameters) -> float:
        """Return its part of a full engine's time."""
        decode_s = engine.step_s / CONCURRENCY + engine.decode_sequence_s
        return self.prompt_tokens * engine.prefill_token_s + self.output_tokens * decode_s


Chain = tuple[tuple[str, Size], ...]
"""Calls that follow each other, by stage."""


@dataclass(frozen=True, slots=True)
class Step:
    """Branches of one superstep, and the tool that runs after them."""

    calls: Chain
    """Each in a node of its own, side by side."""
    tool_s: float = 0.0
    inside: tuple[tuple[str, Chain], ...] = ()
    """Beside them nodes that hold a graph, with the calls in it, one after the other."""

    @property
    def branches(self) -> list[tuple[str, Chain]]:
        """All nodes of the step, with the calls in each."""
        held = [(node, tuple((f"{node}|{stage}", size) for stage, size in chain)) for node, chain in self.inside]
        return [*((stage, ((stage, size),)) for stage, size in self.calls), *held]

    @property
    def sizes(self) -> list[Size]:
        """Of all its calls."""
        return [size for _, chain in self.branches for _, size in chain]


@dataclass(frozen=True, slots=True)
class Plan:
    """One run: what will happen in it, which nobody but the clairvoyant knows."""

    kind: str
    steps: tuple[Step, ...]
    hints: Hints

    def service_s(self, engine: EngineParameters) -> float:
        return sum(size.service_s(engine) for step in self.steps for size in step.sizes)


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


def brief(dice: random.Random) -> tuple[Step, ...]:
    """Two short calls beside a graph of three long ones."""
    facts = tuple((stage, _size(dice, 500, 120)) for stage in ("search", "read", "sum up"))
    short = (("mood", _size(dice, 150, 10)), ("style", _size(dice, 150, 20)))
    return (
        Step((("plan", _size(dice, 200, 60)),)),
        Step(short, inside=(("facts", facts),)),
        Step((("write", _size(dice, 600, 150)),)),
    )


def audit(dice: random.Random) -> tuple[Step, ...]:
    """Four quick looks beside a graph that goes round for long."""
    deep = tuple(("look", _size(dice, 400, 60)) for _ in range(_rounds(dice, 3, 1.5, 12)))
    quick = tuple((f"quick {n}", _size(dice, 300, 20)) for n in range(4))
    return (Step(quick, inside=(("deep", deep),)), Step((("merge", _size(dice, 500, 80)),)))


def compare(dice: random.Random) -> tuple[Step, ...]:
    """One call for each of two things, of which one has a far longer answer."""
    sides = (("table", _size(dice, 300, 20)), ("essay", _size(dice, 300, 300)))
    return (Step((("plan", _size(dice, 200, 40)),)), Step(sides), Step((("merge", _size(dice, 700, 60)),)))


Kinds = dict[Callable[[random.Random], tuple[Step, ...]], tuple[float, float, float]]

KINDS: Kinds = {
    chat: (0.50, 3, 3000.0),
    lookup: (0.25, 2, 6000.0),
    review: (0.12, 1, 9000.0),
    agent: (0.10, 0, 12000.0),
    research: (0.03, 0, 18000.0),
}
"""By kind of workflow: its share, the priority its user gives it, and the deadline of its calls in seconds, which
lies far enough off that none is missed."""

BRANCHING: Kinds = {brief: (0.4, 1, 9000.0), audit: (0.3, 0, 12000.0), compare: (0.3, 1, 9000.0)}
"""Those in which a join waits for branches of unequal length, which are known to be so beforehand."""


GRAPHS: dict[str, dict[str, tuple[Sequence[str], Sequence[str]]]] = {
    "chat": {START: (["answer"], [])},
    "lookup": {START: (["rewrite"], []), "rewrite": (["answer"], []), "answer": (["check"], [])},
    "review": {
        START: (["plan"], []),
        "plan": ([], [f"reader {n}" for n in range(5)]),
        **{f"reader {n}": (["merge"], []) for n in range(5)},
    },
    "agent": {START: (["think"], []), "think": ([], ["think", "report"])},
    "research": {
        START: (["plan"], []),
        "plan": ([f"search {n}" for n in range(3)], []),
        **{f"search {n}": (["judge"], []) for n in range(3)},
        "judge": ([], [*(f"search {n}" for n in range(3)), "write"]),
    },
    "brief": {
        START: (["plan"], []),
        "plan": (["facts", "mood", "style"], []),
        **{stage: (["write"], []) for stage in ("facts", "mood", "style")},
        f"facts|{START}": (["facts|search"], []),
        "facts|search": (["facts|read"], []),
        "facts|read": (["facts|sum up"], []),
    },
    "audit": {
        START: (["deep", *(f"quick {n}" for n in range(4))], []),
        **{stage: (["merge"], []) for stage in ("deep", *(f"quick {n}" for n in range(4)))},
        f"deep|{START}": (["deep|look"], []),
        "deep|look": ([], ["deep|look", "deep|__end__"]),
    },
    "compare": {
        START: (["plan"], []),
        "plan": (["table", "essay"], []),
        **{stage: (["merge"], []) for stage in ("table", "essay")},
    },
}
"""By kind and stage, what always follows it, and what perhaps does: what ``wrap`` reads of a graph."""


def structure_of(kind: str) -> GraphStructure:
    """Return a kind's graph as ``Orla.wrap`` would see it."""
    found = {stage: Edge(frozenset(always), frozenset(perhaps)) for stage, (always, perhaps) in GRAPHS[kind].items()}
    targets = {each for edge in found.values() for each in (*edge.always, *edge.perhaps)}
    return GraphStructure(
        found | {stage: Edge() for stage in targets - found.keys() if not stage.endswith("__end__")}
    )


def plans(count: int, dice: random.Random, kinds: Kinds = KINDS) -> list[Plan]:
    """Draw runs from a mixture."""
    shares = [share for share, _, _ in kinds.values()]
    made = []
    for kind in dice.choices(list(kinds), shares, k=count):
        _, priority, deadline_s = kinds[kind]
        hints = Hints(priority=priority, deadline_s=deadline_s, tenant=f"tenant {dice.randrange(4)}")
        made.append(Plan(kind.__name__, kind(dice), hints))
    return made


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
