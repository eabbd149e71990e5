"""Tool waits: workflows ask, wait for a tool that takes seconds, and ask again, while others push their cache out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from langchain_core.tools import tool

from bench.lib.calls import Turn
from bench.lib.engines import Engine
from bench.lib.turns import turn_of
from bench.lib.workflows import Session, agent
from bench.warm.arms import BACKEND, Arm, Place, backend_at, warm_ups_of
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


async def turn(place: Place, engine: Engine, arm: Arm, seed: int, shape: Shape, tick: Callable[[], None]) -> Turn:
    """Run one arm from an empty cache."""
    jobs, backend = jobs_of(shape, place.tokens, seed), backend_at(place, engine.url, engine.model, arm.max_saved)

    def graph(model: Any) -> Any:
        return agent(jobs, model.bind(max_tokens=ANSWER_TOKENS), tool=looks_up, tick=tick).compile()

    return await turn_of(
        arm, engine, backend, jobs, graph, seed=seed, place=f"{SITUATION}, {place.title}", mapper={"*": BACKEND},
        showing=warm_ups_of,
    )  # fmt: skip
