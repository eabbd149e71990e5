"""The arms on a real engine: each session is a run of one LangGraph graph.

What user and tools say comes from the load and is the same in every arm. The answers in a history are those that
the engine gave, as in a real agent, so that what it generated is found in its cache; of fixed length, they differ in
words only. Nothing here knows of orla_lg but the lines that wrap the graph.
"""

from __future__ import annotations

from typing import Any

from bench.lib.calls import Turn
from bench.lib.client import connected, model_at, warm
from bench.lib.engines import VLLM
from bench.lib.workflows import agent, play
from bench.pressure.arms import Arm
from bench.pressure.unplugged import plugin
from bench.pressure.workflows import Load
from orla_lg import Backend


async def live_turn(engine: VLLM, arm: Arm, load: Load) -> Turn:
    """Run one arm from an empty cache.

    Raises:
        SystemExit: The arm needs the plugin, and the engine has none.
    """
    if arm.plugin and not engine.has_plugin:
        raise SystemExit(f"{engine.url} was started without the orla_lg plugin, which the arm {arm.name} needs")

    def extra(session: int) -> dict[str, Any]:
        fields = {"ignore_eos": True, "min_tokens": load.answer_tokens}
        return {
            "max_tokens": load.answer_tokens,
            "extra_body": fields | ({"priority": session} if arm.by_arrival else {}),
        }

    backend = Backend("engine", engine.url, engine.model, engine="vllm")
    async with model_at(engine.url, engine.model) as model:
        graph: Any = agent(load.sessions, model, system=load.system, extra=extra).compile()
        with (
            plugin(seen=arm.plugin or not arm.wrapped),
            connected([backend], wrapped=arm.wrapped, admission=arm.admission) as orla,
        ):
            await warm(model)
            engine.empty_cache()
            served = graph if orla is None else orla.wrap(graph)
            calls, jobs = await play(served, load.sessions, door=arm.door())
    return Turn(arm.name, load.seed, load.shared_tokens, calls, jobs)
