"""The arms: who decides what stays in the cache, and one turn of each on an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import httpx
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from bench.cache.engines import LLAMACPP, SHORT, VLLM_CPU, Engine, Place
from bench.cache.workflows import Ticket, graph_of, opening
from bench.lib.calls import CallSeen, JobSeen, Turn
from bench.pressure.workflows import common
from orla_lg import Backend, Orla

WARM_TOKENS = 8
CONNECT_PATIENCE_S = 30.0
FORGET_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to keep the cache."""

    name: str
    memory: str | None = None
    """Of the ``Orla`` that wraps the graph; ``None``: the graph stays bare."""
    resets: bool = False
    """Bare, with the engine's whole cache reset after each call."""


PLAIN, AGAIN, EVERYTHING = "engine's own LRU", "the same again", "reset of everything per request"
PER_REQUEST, PER_WORKFLOW = "flush per request", "flush per workflow"
ARMS = (
    Arm(PLAIN),
    Arm(AGAIN),
    Arm(EVERYTHING, resets=True),
    Arm(PER_REQUEST, memory="flush_per_request"),
    Arm(PER_WORKFLOW, memory="default"),
)


def arms_at(place: Place, engine: Engine) -> list[Arm]:
    """Return the arms that make sense at a place.

    Where there is room for everything the baselines that flush say nothing new: only whether the policy costs
    anything is asked. A reset of everything is vLLM's; a workflow's flush takes its plugin there.
    """
    wanted = [PLAIN, AGAIN, PER_WORKFLOW]
    if place.pool == SHORT:
        wanted += [PER_REQUEST, *([EVERYTHING] if place.engine == VLLM_CPU else [])]
    return [arm for arm in ARMS if arm.name in wanted and (arm.memory is None or engine.has_plugin)]


class Turns:
    """Runs arms on one engine."""

    def __init__(self, place: Place, engine: Engine) -> None:
        self._place = place
        self._engine = engine
        self.resets_refused = 0
        """How often the engine would not forget everything, because calls ran."""

    async def turn(self, arm: Arm, cases: list[Ticket], seed: int) -> Turn:
        """Run one arm from an empty cache."""
        shared = common([self._engine.prompt(opening(case)) for case in cases])
        made = Turn(arm.name, seed, shared, [], [])
        async with self._model() as model:
            graph = graph_of(model, cases, self._reset if arm.resets else None)
            with self._orla(arm) as orla:
                served = graph if orla is None else orla.wrap(graph)
                await self._from_empty(model)
                begin_s = time.perf_counter()
                async with asyncio.TaskGroup() as group:
                    for number in range(len(cases)):
                        group.create_task(_case(served, cases, number, begin_s, made))
        return made

    def _orla(self, arm: Arm) -> Any:
        if arm.memory is None:
            return nullcontext()
        engine = "llamacpp" if self._place.engine == LLAMACPP else "vllm"
        orla = Orla([Backend("engine", self._engine.url, self._engine.model, engine=engine)], memory=arm.memory)
        if faults := [str(fault) for fault in orla.connect(CONNECT_PATIENCE_S).values() if fault is not None]:
            raise SystemExit("; ".join(faults))
        return orla

    async def _from_empty(self, model: ChatOpenAI) -> None:
        for _ in range(2):  # the first calls after a pause are slower
            await model.ainvoke("hello", max_tokens=WARM_TOKENS)
        self._engine.empty_cache()

    @asynccontextmanager
    async def _model(self) -> AsyncIterator[ChatOpenAI]:
        # llama.cpp breaks connections that are used again after a stream. No retries: a call that failed is no
        # figure. Streaming shows the first token.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(limits=limits, timeout=600, trust_env=False) as http:
            yield ChatOpenAI(
                model=self._engine.model,
                base_url=self._engine.url,
                api_key=SecretStr("any"),
                http_async_client=http,
                max_retries=0,
                temperature=0,
                stream_usage=True,
            )

    async def _reset(self) -> None:
        """Have vLLM forget everything, as the paper's baseline does; it refuses while any call holds blocks."""
        async with httpx.AsyncClient(timeout=FORGET_PATIENCE_S, trust_env=False) as http:
            answer = await http.post(self._engine.url.removesuffix("/v1") + "/reset_prefix_cache")
        if not (answer.is_success and answer.json().get("success") is True):
            self.resets_refused += 1


async def _case(graph: Any, cases: list[Ticket], number: int, begin_s: float, made: Turn) -> None:
    await asyncio.sleep(cases[number].begin_s)
    arrived_s = time.perf_counter()
    ended = await graph.ainvoke({"case": number, "history": [], "seen": []})
    made.jobs.append(JobSeen(number, arrived_s - begin_s, time.perf_counter() - begin_s))
    seen: list[CallSeen] = ended["seen"]
    made.calls.extend(call.since(begin_s) for call in seen)
