"""Stage mapping on two real engines: the same requests sent all to the heavy model, or each where it belongs.

    make bench-mapping BENCH='--prompts prompts.jsonl'     starts its own engines: vLLM on the CPU, some minutes
    python -m bench.mapping --prompts prompts.jsonl --light-url http://127.0.0.1:8131/v1 \\
        --heavy-url http://127.0.0.1:8132/v1               engines that run already
    python -m bench.mapping --help

The data is what ``orla-lg mapper fit`` reads: prompts labelled simple or complex. All requests of a block arrive at
once, as a data set does, through a wrapped graph with one node. Every arm of a block gets the same prompts, makes
answers of the same length and starts with an empty prefix cache; the order of the arms turns from block to block.
An arm is a variant of the mapping of one ``Orla``; times and costs are read from its records.

The cores are the same in every arm. *wide* is the heavy model on all of them, the baseline. In the mapped arms the
light engine has one of them and shares it (``shared``: beside *wide*, as two engines share one GPU) or has it for
itself (``split``: beside *heavy*, the heavy model on the other core).

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
from bench.lib.command import DOCS, ended, parser, tell
from bench.lib.core import Cost, Record
from bench.lib.figures import Rounds, rotated
from bench.lib.flags import above_zero, count, whole
from bench.mapping import arms as mapping
from bench.mapping.arms import HEAVY, LIGHT, WIDE, Arm, Request, Run
from orla_lg import Backend, Orla
from orla_lg.engines import EngineOptions, running_engine
from orla_lg.mappers.commands import read_rows

WARM_REQUESTS = 4
TURN = 3
"""By so many places the order of the arms turns from block to block."""


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
        made = await model.ainvoke(request.text, max_tokens=request.max_tokens, temperature=0, extra_body=extra)
        return {"answer": str(made.content)}

    return StateGraph(State).add_node("answer", answer).add_edge(START, "answer").compile()


async def run(orla: Orla, graph: Any, arm: Arm, block: list[Request], number: int) -> Run:
    """Let all requests of a block through an arm and read the records."""
    salt = uuid.uuid4().hex  # no arm finds in a cache what another has left there
    runs = {str(uuid.uuid4()): request for request in block}

    async def one(run_id: str, request: Request) -> None:
        config: RunnableConfig = {"configurable": {"orla": {"variant": arm.name}}, "run_id": uuid.UUID(run_id)}
        await graph.ainvoke({"request": request, "salt": salt, "answer": ""}, config)

    gc.collect()
    before = {record.id for record in orla.records()}
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for run_id, request in runs.items():
            group.create_task(one(run_id, request))
    wall_s = time.perf_counter() - start
    records = [record for record in orla.records() if record.id not in before]
    return run_of(arm.name, number, wall_s, records, runs)


def run_of(arm: str, number: int, wall_s: float, records: Sequence[Record], requests: Mapping[str, Request]) -> Run:
    """Return the figures of an arm's turn; *requests* are by the run that made them."""
    answers = [(record, requests[record.run or ""]) for record in records if record.stage == "answer"]
    assert len(answers) == len(requests), f"{len(answers)} records of {len(requests)} requests"
    for record, _ in answers:
        assert record.error is None, record.error
    went_light = [(record.backend == LIGHT, request.is_complex) for record, request in answers]
    return Run(
        arm,
        number,
        wall_s,
        completion_s=statistics.fmean(record.duration_s for record, _ in answers),
        cost_usd=sum(record.cost_usd or 0.0 for record in records),  # the judge's calls too
        score=sum(not (light and is_complex) for light, is_complex in went_light) / len(answers),
        light_share=sum(light for light, _ in went_light) / len(answers),
        answer_tokens=sum(record.completion_tokens or 0 for record, _ in answers),
        cached_tokens=sum(record.cached_tokens or 0 for record, _ in answers),
    )


async def measure(orla: Orla, arms: list[Arm], blocks: list[list[Request]], minutes: float) -> Rounds[Run]:
    """Run every arm on every block; the order turns, so that a slow minute is no arm's own."""
    graph = orla.wrap(graph_of())
    for arm in arms:
        orla.variant(arm.name, arm.mapper)
    for arm in arms:  # warm: connections, code, the engines' first steps
        tell(f"warming: {arm.name}")
        await run(orla, graph, arm, blocks[0][:WARM_REQUESTS], -1)
    began, longest_s, made = time.perf_counter(), 0.0, list[Run]()
    for number, block in enumerate(blocks):
        before_s = time.perf_counter() - began
        if before_s + longest_s > minutes * 60:
            tell(f"{number} of {len(blocks)} blocks: another one would take longer than --minutes allows", last=True)
            break
        for arm in rotated(arms, number * TURN):
            tell(f"block {number + 1}/{len(blocks)}, {time.perf_counter() - began:4.0f} s: {arm.name}")
            made.append(await run(orla, graph, arm, block, number))
        longest_s = max(longest_s, time.perf_counter() - began - before_s)
    tell(f"measured in {time.perf_counter() - began:.0f} s", last=True)
    return Rounds(made, [arm.name for arm in arms])


@contextlib.contextmanager
def engines(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Give the engines' URLs by backend: those that were named, else engines of our own, ended afterwards."""
    if args.light_url:
        yield {LIGHT: args.light_url, WIDE: args.heavy_url}
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two engines side by side need two cores")
    places = {LIGHT: (args.light_model, cores[1:2]), WIDE: (args.heavy_model, cores[:2])}
    if args.layout == "split":
        places[HEAVY] = (args.heavy_model, cores[:1])
    with contextlib.ExitStack() as stack:
        given = {}
        for name, (model, where) in places.items():
            tell(f"starting {model} on cores {where}", last=True)
            os.sched_setaffinity(0, where)  # an engine's threads go where its parent may go
            try:
                options = EngineOptions("vllm-cpu", model=model, threads=len(where), slots=args.slots)
                given[name] = stack.enter_context(running_engine(options)).url
            finally:
                os.sched_setaffinity(0, cores)
        yield given


def backend_of(name: str, url: str, args: argparse.Namespace) -> Backend:
    kind = "light" if name == LIGHT else "heavy"
    price = mapping.USD_PER_MTOKEN_PER_BILLION * getattr(args, f"{kind}_billions")
    return Backend(name, url, getattr(args, f"{kind}_model"), max_concurrency=args.slots, cost=Cost(price, price))


def options() -> argparse.Namespace:
    options = parser("mapping", __doc__)
    add = options.add_argument
    add("--prompts", type=Path, required=True, metavar="FILE", help="labelled prompts, JSONL")
    add("--blocks", type=count, default=None, metavar="N", help="blocks per arm (default: all there are prompts for)")
    add("--minutes", type=above_zero, default=6.0, metavar="M", help="begin no block that would end later (6)")
    add("--size", type=count, default=None, metavar="N", help="requests in a block (default 40, quick 12)")
    add("--tokens", type=count, nargs=2, default=(16, 16), metavar=("SIMPLE", "COMPLEX"), help="lengths of answers")
    add("--layout", choices=("shared", "split"), default="shared", help="of the mapped arms (see above)")
    add("--judge", action="store_true", help="with the one-bit judge too, on the light engine")
    for kind, model, where in (("light", "smollm2", ""), ("heavy", "dummy-1b", " on all cores")):
        add(f"--{kind}-url", metavar="URL", help=f"an engine with the {kind} model{where}; give both or none")
        add(f"--{kind}-model", default=model, metavar="NAME")
        add(f"--{kind}-billions", type=above_zero, metavar="P", help="parameters, for the price (known for our own)")
    add("--slots", type=count, default=16, metavar="N", help="requests that an engine serves at once (16)")
    add("--seed", type=whole, default=0)
    add("--quick", action="store_true", help="one small block")
    add("--draw", action="store_true", help="draw docs/mapping-experiment.svg")
    args = options.parse_args()
    if bool(args.light_url) != bool(args.heavy_url):
        options.error("give --light-url and --heavy-url, or none of them")
    if args.light_url and args.layout == "split":
        options.error("--layout split is for engines that this starts")
    args.blocks = args.blocks or (1 if args.quick else None)
    args.size = args.size or (12 if args.quick else 40)
    for kind in ("light", "heavy"):
        model, billions = getattr(args, f"{kind}_model"), getattr(args, f"{kind}_billions")
        if billions is None and model not in mapping.BILLIONS:
            options.error(f"--{kind}-billions: how many parameters has {model}?")
        setattr(args, f"{kind}_billions", billions or mapping.BILLIONS[model])
    return args


async def compare(urls: Mapping[str, str], args: argparse.Namespace) -> tuple[list[Arm], Rounds[Run]]:
    rows = read_rows(args.prompts)
    blocks = mapping.blocks_of(rows, args.blocks, args.size, tuple(args.tokens), random.Random(args.seed))
    arms = mapping.arms_of(args, rows, blocks)
    with connected([backend_of(name, url, args) for name, url in urls.items()], keep_records=100_000) as orla:
        assert orla is not None
        return arms, await measure(orla, arms, blocks, args.minutes)


def main() -> int:
    args = options()
    with engines(args) as urls:
        arms, runs = asyncio.run(compare(urls, args))
    lengths = f"answers of {args.tokens[0]} (simple) and {args.tokens[1]} (complex) tokens"
    print(f"{args.light_model}, {args.heavy_model}; {len(runs.seeds)} blocks of {args.size} requests; {lengths}")
    print("\n".join(mapping.report(runs)))
    cached, made = sum(run.cached_tokens for run in runs.all()), {run.answer_tokens for run in runs.all()}
    print(f"answers in a block: {min(made)} to {max(made)} tokens; prompt tokens found in a cache: {cached}")
    print("\n".join([*mapping.on_all_prompts(arms, read_rows(args.prompts)), *mapping.misses(runs)]))
    if args.draw:
        mapping.draw(runs, DOCS / "mapping-experiment.svg")
    return 0


if __name__ == "__main__":
    sys.exit(ended(main, "its engines are ended"))
