"""Prompts stay in the replica; the core has them warmed by name."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Orla
from orla_lg.core.call import Usage
from orla_lg.core.engine.backend import Effect
from orla_lg.core.engine.capabilities import Warmed
from orla_lg.link.messages import End, Enter, Graph, Keeps, StopWarm, Warm, WarmEnded
from orla_lg.openai_api.adapter import OpenAIAdapter
from tests.conftest import chat
from tests.link.scripted import ScriptedCore, eventually
from tests.link.test_calls import hi
from tests.link.test_reconnect import Run
from tests.stub_engine import StubEngine

Replica = Callable[..., Orla]


class Warmable:
    """What the adapter's ``warm`` is replaced by."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.answer: Warmed | None = Warmed(Effect.WARMED, Usage(12, 4))
        self.cancelled = threading.Event()

    async def warm(self, adapter: Any, body: Any) -> Warmed:
        import asyncio

        self.bodies.append(body)
        if self.answer is not None:
            return self.answer
        try:
            await asyncio.sleep(60.0)
        finally:
            self.cancelled.set()
        raise AssertionError


@pytest.fixture
def warmable(monkeypatch: pytest.MonkeyPatch) -> Warmable:
    made = Warmable()

    async def warm(self: Any, body: Any) -> Warmed:
        return await made.warm(self, body)

    monkeypatch.setattr(OpenAIAdapter, "warm", warm, raising=False)
    return made


def two_steps(engine: StubEngine, gate: threading.Event) -> Any:
    """Return a graph that calls, waits, and ends."""
    llm = chat(engine)

    def one(state: MessagesState) -> dict[str, Any]:
        return {"messages": [llm.invoke(state["messages"])]}

    def two(state: MessagesState) -> dict[str, Any]:
        gate.wait(10.0)
        return {}

    built = StateGraph(MessagesState).add_node("one", one).add_node("two", two)
    return built.add_edge(START, "one").add_edge("one", "two").compile()


def test_a_kept_prompt_is_warmed_and_given_up(
    core: ScriptedCore, engine: StubEngine, replica: Replica, warmable: Warmable
) -> None:
    core.warms = True
    gate = threading.Event()
    run = Run(replica().wrap(two_steps(engine, gate)), {"configurable": {"thread_id": "t"}})
    kept, entered = core.wait(Keeps), core.wait(Enter)
    assert kept.call == entered.call and kept.chars >= len("hello there") and kept.frame
    core.wait(End)
    kinds = [type(each) for each in core.heard]
    assert kinds.index(Keeps) < kinds.index(End)

    core.line.send(Warm("w1", "t", "main", {"id_slot": 3}, prefix=entered.hashes[-1]))
    ended = core.wait(WarmEnded)
    assert (ended.order, ended.error, ended.prompt_tokens, ended.cached_tokens) == ("w1", None, 12, 4)
    assert warmable.bodies[0]["messages"][0]["content"] == "hello there" and warmable.bodies[0]["id_slot"] == 3

    core.line.send(Warm("w2", "t", "main", {}, prefix=1))
    assert "no such prompt" in str(core.wait(WarmEnded, 2).error), "it begins otherwise"
    name = core.all(Graph)[0].name
    core.line.send(Warm("w3", "other", "main", {}, "one", name, messages=1, prefix=entered.hashes[0]))
    assert core.wait(WarmEnded, 3).error is None

    warmable.answer = None
    core.line.send(Warm("w4", "t", "main", {}, prefix=entered.hashes[-1]))
    eventually(lambda: len(warmable.bodies) == 3)
    core.line.send(StopWarm("w4"))
    assert warmable.cancelled.wait(5.0)
    gate.set()
    run.result()


def test_a_prompt_goes_with_its_workflow(
    core: ScriptedCore, engine: StubEngine, replica: Replica, warmable: Warmable
) -> None:
    core.warms = True
    gate = threading.Event()
    gate.set()
    replica().wrap(two_steps(engine, gate)).invoke(hi())
    (entered,) = core.all(Enter)
    core.line.send(Warm("w1", entered.workflow, "main", {}, prefix=entered.hashes[-1]))
    assert "no such prompt" in str(core.wait(WarmEnded).error)


def test_another_tenants_prompt_is_not_sent(
    core: ScriptedCore, engine: StubEngine, replica: Replica, warmable: Warmable
) -> None:
    core.warms, core.tenants = True, ("acme",)
    gate = threading.Event()
    run = Run(replica().wrap(two_steps(engine, gate)), {"configurable": {"thread_id": "t"}})
    core.wait(Keeps)
    core.line.send(Warm("w1", "tenant=4:acmet", "main", {}), Warm("w2", "tenant=5:othert", "main", {}))
    assert core.wait(WarmEnded, 2)
    assert {each.order: each.error for each in core.all(WarmEnded)} == {"w1": None, "w2": "no such prompt is kept"}
    gate.set()
    run.result()


def test_without_warm_ups_nothing_is_kept(core: ScriptedCore, engine: StubEngine, replica: Replica) -> None:
    gate = threading.Event()
    gate.set()
    replica().wrap(two_steps(engine, gate)).invoke(hi())
    core.wait(End)
    assert not core.all(Keeps)
