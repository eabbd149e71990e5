"""The arms: who decides what stays in the cache, and one turn of each on an engine."""

from __future__ import annotations

from dataclasses import dataclass

import httpx

from bench.cache.engines import SHORT, Place
from bench.cache.workflows import graph_of, opening
from bench.lib.calls import Turn, common
from bench.lib.client import connected, model_at, warm
from bench.lib.engines import VLLM_CPU, Engine
from bench.lib.workflows import Session, play
from orla_lg import Backend

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

    async def turn(self, arm: Arm, cases: list[Session], seed: int) -> Turn:
        """Run one arm from an empty cache."""
        shared, engine = common([self._engine.prompt(opening(case)) for case in cases]), self._engine
        backend = Backend("engine", engine.url, engine.model, engine=self._place.engine)
        options = {} if arm.memory is None else {"memory": arm.memory}
        async with model_at(engine.url, engine.model) as model:
            graph = graph_of(model, cases, self._reset if arm.resets else None)
            with connected([backend], wrapped=arm.memory is not None, **options) as orla:
                served = graph if orla is None else orla.wrap(graph)
                await warm(model)
                engine.empty_cache()
                calls, jobs = await play(served, cases)
        return Turn(arm.name, seed, shared, calls, jobs)

    async def _reset(self) -> None:
        """Have vLLM forget everything, as the paper's baseline does; it refuses while any call holds blocks."""
        async with httpx.AsyncClient(timeout=FORGET_PATIENCE_S, trust_env=False) as http:
            answer = await http.post(self._engine.url.removesuffix("/v1") + "/reset_prefix_cache")
        if not (answer.is_success and answer.json().get("success") is True):
            self.resets_refused += 1
