"""The arms on a real engine: each session is a run of one LangGraph graph.

What user and tools say comes from the load and is the same in every arm. The answers in a history are those that
the engine gave, as in a real agent, so that what it generated is found in its cache; of fixed length, they differ in
words only.

One engine serves all arms; for those without the plugin it is as if the plugin were not there. Two engines would
share the cores, or be measured at different times. One is fair because the plugin evicts least recently used first,
as vLLM does, as long as calls carry no owner.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import httpx

from bench.lib.calls import Turn
from bench.lib.engines import VLLM
from bench.lib.workflows import agent, turn_of
from bench.pressure.arms import Arm
from bench.pressure.workflows import Load
from orla_lg import Backend
from orla_lg.errors import EngineRefused
from orla_lg.openai_api.adapter import TIMEOUT_S
from orla_lg_vllm import VLLMAdapter

PLUGIN_ROUTES = "orla/kv/"


class Unplugged(VLLMAdapter):
    """vLLM's adapter before an engine without the plugin: it gets no answer from its routes."""

    async def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float = TIMEOUT_S
    ) -> httpx.Response:
        """Send one short request, unless it is for the plugin."""
        if PLUGIN_ROUTES in path:
            raise EngineRefused(f"{path} is not there for this arm", status=404)
        return await super().ask(method, path, body, timeout_s=timeout_s)


@contextlib.contextmanager
def plugin(*, seen: bool) -> Iterator[None]:
    """Let an ``Orla`` that is made meanwhile see the engine's plugin, or not."""
    with contextlib.nullcontext() if seen else mock.patch("orla_lg.opening.adapter_of", Unplugged):
        yield


async def live_turn(engine: VLLM, arm: Arm, load: Load) -> Turn:
    """Run one arm from an empty cache."""
    if arm.plugin and not engine.has_plugin:
        raise SystemExit(f"{engine.url} was started without the orla_lg plugin, which the arm {arm.name} needs")

    def extra(session: int) -> dict[str, Any]:
        fields = {"ignore_eos": True, "min_tokens": load.answer_tokens}
        return {
            "max_tokens": load.answer_tokens,
            "extra_body": fields | ({"priority": session} if arm.by_arrival else {}),
        }

    def graph(model: Any) -> Any:
        return agent(load.sessions, model, system=load.system, extra=extra).compile()

    backend = Backend("engine", engine.url, engine.model, engine="vllm")
    with plugin(seen=arm.plugin or arm.orla is None):
        return await turn_of(
            arm, engine, backend, load.sessions, graph, seed=load.seed, shared=load.shared_tokens, door=arm.door()
        )
