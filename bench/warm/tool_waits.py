"""Tool waits: workflows ask, wait for a tool that takes seconds, and ask again, while others push their cache out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from langchain_core.tools import tool

from bench.lib.client import model_at, warm
from bench.lib.engines import Engine
from bench.lib.workflows import Session, agent, play
from bench.warm.arms import Arm, Measured, orla_of, warm_ups_of
from bench.warm.engines import BACKEND, Place, backend_at
from bench.warm.texts import job_file, text

SITUATION = "tool waits"
ANSWER_TOKENS = 16
GROW_TOKENS = 50


@dataclass(frozen=True, slots=True)
class Shape:
    """The load: as many workflows as two places hold, and as many again."""

    workflows: int = 4
    calls: int = 5
    wait_s: float = 12.0
    """Of the tool, on the mean; a quarter more or less."""


def jobs_of(shape: Shape, tokens: int, seed: int) -> list[Session]:
    """Make up the jobs of a round; they arrive evenly over one wait."""
    dice, made = Random(seed), []
    for number in range(shape.workflows):
        first = job_file(100 * seed + number, dice, round(tokens * dice.uniform(0.9, 1.1)))
        later = [text(dice, GROW_TOKENS) for _ in range(shape.calls - 1)]
        waits_s = tuple(shape.wait_s * dice.uniform(0.75, 1.25) for _ in range(shape.calls))
        made.append(Session(number * shape.wait_s / shape.workflows, (first, *later), waits_s[:-1]))
    return made


@tool
async def look_up(job: int, seconds: float) -> str:
    """Look a job up in the yard's papers, which takes its time."""
    await asyncio.sleep(seconds)
    return f"job {job}: found"


async def looks_up(number: int, wait_s: float) -> None:
    await look_up.ainvoke({"job": number, "seconds": wait_s})


async def turn(place: Place, engine: Engine, arm: Arm, seed: int, shape: Shape, tick: Callable[[], None]) -> Measured:
    """Run one arm from an empty cache."""
    jobs = jobs_of(shape, place.tokens, seed)
    backend = backend_at(place, engine.url, engine.model, arm.max_saved)
    async with model_at(engine.url, engine.model) as model:
        await warm(model)
        engine.empty_cache()
        with orla_of(arm, [backend], {"*": BACKEND}) as orla:
            asked = model.bind(max_tokens=ANSWER_TOKENS)
            graph: Any = agent(jobs, asked, tool=looks_up, tick=tick).compile()
            begin_s = time.perf_counter()
            calls, _ = await play(graph if orla is None else orla.wrap(graph), jobs)
            makespan_s = time.perf_counter() - begin_s
            return Measured(SITUATION, place.title, arm.name, seed, calls, makespan_s, warm_ups_of(orla, BACKEND))
