"""One turn of an arm on a real engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_openai import ChatOpenAI

from bench.lib.calls import Turn
from bench.lib.client import connected, model_at, warm, wrapped
from bench.lib.workflows import play
from orla_lg import Backend, Orla


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to serve a graph."""

    name: str
    orla: Mapping[str, Any] | None = None
    """What the ``Orla`` around the graph is given beside its backends; ``None``: the graph stays bare."""


async def turn_of(
    arm: Any, engine: Any, backend: Backend, sessions: Sequence[Any], graph: Callable[[ChatOpenAI], Any], *,
    seed: int, shared: int = 0, place: str = "", mapper: Mapping[str, Any] | None = None, fresh: bool = False,
    showing: Callable[[Orla | None], dict[str, Any]] = lambda orla: {}, **how: Any,
) -> Turn:  # fmt: skip
    """Play sessions on an engine in an arm's way, from an empty cache.

    A *fresh* engine has just been started: it is neither warmed nor emptied. *showing* says what only this experiment
    wants to know of the arm's ``Orla``; for *how* see ``play``.
    """
    async with model_at(engine.url, engine.model) as model:
        built = graph(model)
        with connected([backend], mapper, wrapped=arm.orla is not None, **(arm.orla or {})) as orla:
            if not fresh:
                await warm(model)
                engine.empty_cache()
            calls, jobs = await play(wrapped(orla, built), sessions, **how)
            return Turn(arm.name, seed, shared, calls, jobs, place=place, more=showing(orla))
