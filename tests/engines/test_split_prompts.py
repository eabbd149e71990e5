"""Split prompts on real engines: what the next call finds of them, and what that saves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.tools import BaseTool, tool
from langchain_openai import ChatOpenAI

from orla_lg import Backend, Orla, Record
from orla_lg.engines import EngineOptions, running_engine
from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings
from orla_lg_sim.text import prose
from tests.engines.relay import Relay
from tests.tools.prefill_engine import calls

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

PATIENCE_S = 60.0
RESULT = 250
"""Tokens of each result."""
ANSWER = calls(*((name, {"query": "foxes"}) for name in ("first", "second", "slow")))


@pytest.fixture(scope="module", params=["llamacpp", "vllm"])
def engine(request: pytest.FixtureRequest) -> Iterator[tuple[str, str, str]]:
    """Return an engine's kind, URL and model."""
    if request.param == "llamacpp":
        embedded = EmbeddedEngine(EngineSettings(slots=2, context_tokens=3000, threads=2))
        try:
            yield "llamacpp", embedded.url, embedded.settings.name
        finally:
            embedded.close()
        return
    with running_engine(EngineOptions("vllm-cpu", kv_tokens=8192, context_tokens=3072)) as running:
        yield "vllm", running.url, running.name


class Round:
    """A run of one round of tools: two that end at once, and one that is slow."""

    def __init__(self, orla: Orla, relay: Relay, model: str, *, seed: int, splits: bool) -> None:
        self.orla, self.relay, self.seed = orla, relay, seed
        llm = ChatOpenAI(
            base_url=relay.url,
            model=model,
            api_key="none",
            max_tokens=4,
            max_retries=0,
            temperature=0,  # type: ignore[arg-type, call-arg]
        )
        tools = [self._tool(nth, name) for nth, name in enumerate(("first", "second", "slow"))]
        agent = create_agent(llm, tools, system_prompt="".join(prose(Random(seed), RESULT)))
        self.graph = orla.wrap(agent, split_prompts=splits)
        self.splits = splits

    def _tool(self, nth: int, name: str) -> BaseTool:
        def run(query: str) -> str:
            if name == "slow":
                time.sleep(1.0)
                if self.splits:
                    self._wait()
            return "".join(prose(Random(self.seed * 10 + nth), RESULT if name != "slow" else 30))

        run.__name__, run.__doc__ = name, f"Look up {name}."
        return tool(run)

    def _wait(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not (self.said.done or self.said.failed or self.said.refused) and time.monotonic() < deadline:
            time.sleep(0.02)

    @property
    def said(self) -> Any:
        return self.orla.statistics().backends["main"].warm_ups

    def run(self) -> Record:
        """Return the record of the last call."""
        self.graph.invoke({"messages": [HumanMessage("Tell me of foxes.")]})
        return self.orla.records()[-1]


def test_the_next_call_finds_the_results_that_were_there(
    engine: tuple[str, str, str], make_orla: Callable[..., Orla], capsys: pytest.CaptureFixture[str]
) -> None:
    kind, url, model = engine
    took: dict[bool, Record] = {}
    for splits in (False, True):
        with Relay(url, ANSWER) as relay:
            orla = make_orla(Backend("main", relay.url, model=model, engine=kind), mapper={"*": "main"})
            orla.connect()
            work = Round(orla, relay, model, seed=7 + splits, splits=splits)
            took[splits] = work.run()
            said, predictions = work.said, orla.statistics().split_prompts
            if splits:
                assert (predictions.predicted, predictions.held) == (1, 1)
                assert said.split_started >= 1 and said.split_used_tokens > 0.8 * said.split_warmed_tokens > 0
            else:
                assert said.split_started == 0
            orla.close()
    plain, split = took[False], took[True]
    with capsys.disabled():
        print(
            f"\n{kind}: next call of {split.prompt_tokens} tokens: {plain.duration_s:.2f} s, {plain.cached_tokens} "
            f"cached; split {split.duration_s:.2f} s, {split.cached_tokens} cached; used {said.split_used_tokens} of "
            f"{said.split_warmed_tokens} tokens"
        )  # fmt: skip
    assert plain.cached_tokens is not None and split.cached_tokens is not None and split.prompt_tokens is not None
    assert split.cached_tokens > plain.cached_tokens + 1.5 * RESULT
    assert split.duration_s < plain.duration_s
