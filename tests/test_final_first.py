"""Policy ``final_first`` in whole graphs: what runs taught orders those that wait, here and at a server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langgraph.graph import END, START, MessagesState, StateGraph

from orla_lg import Orla, explain
from tests.conftest import BACKEND_KEY, at, chat
from tests.link.conftest import ENGINE_KEY
from tests.link.real import RealCore
from tests.link.scripted import eventually
from tests.link.test_reconnect import Run
from tests.stub_engine import StubEngine

LESSONS = 6


def looping(engine: StubEngine, rounds: int, name: str) -> Any:
    """Return a graph with one stage that asks so often."""
    llm = chat(engine)

    def ask(state: MessagesState) -> Any:
        return {"messages": [llm.invoke([("user", name)])]}

    graph = StateGraph(MessagesState).add_node("model", ask).add_edge(START, "model")
    graph.add_conditional_edges("model", lambda state: "model" if len(state["messages"]) <= rounds else END)
    return graph.compile(name=name)


@pytest.fixture(params=["local", "remote"])
def orla(engine: StubEngine, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Orla]:
    monkeypatch.setenv(ENGINE_KEY, BACKEND_KEY)
    backend = at(engine, max_concurrency=1)
    if request.param == "local":
        with Orla([backend], policy="final_first") as made:
            yield made
        return
    with RealCore(backend, key_envs={backend.name: ENGINE_KEY}, policy="final_first") as core:
        made = Orla.remote(core.url)
        yield made
        made.close()


def asked(engine: StubEngine) -> list[str]:
    return [seen.body["messages"][0]["content"] for seen in engine.chats]


def queued_behind_each_other(orla: Orla, *graphs: Any) -> list[Run]:
    """Let a run of each graph begin and wait, one after the other."""
    runs: list[Run] = []
    orla.pause("main")
    for number, each in enumerate(graphs, start=1):
        runs.append(Run(each))
        eventually(lambda number=number: orla.statistics().backends["main"].queue.waiting == number)
    return runs


def test_a_run_that_is_at_its_last_call_goes_before_one_that_came_earlier(orla: Orla, engine: StubEngine) -> None:
    long, short = orla.wrap(looping(engine, 3, "long")), orla.wrap(looping(engine, 1, "short"))
    runs = queued_behind_each_other(orla, long, short)
    orla.resume("main")
    assert all(run.result() for run in runs)
    assert asked(engine)[0] == "long", "nothing was learned yet: the run that came first"
    for _ in range(LESSONS):
        assert Run(long).result() and Run(short).result()
    before = len(engine.chats)
    runs = queued_behind_each_other(orla, long, short)
    waiting = orla.statistics().backends["main"].waiting
    assert [each.final_odds for each in waiting] == [pytest.approx(0.75, abs=0.05), 0.0]
    orla.resume("main")
    assert all(run.result() for run in runs)
    assert asked(engine)[before:] == ["short", "long", "long", "long"]
    odds = [each.final_odds for each in orla.records()[-4:]]
    assert odds == pytest.approx([0.75, 0.0, 0.0, 0.75], abs=0.05), "of the first round, the second and the third"
    assert "the odds that it was its run's last call: 7" in explain.text(orla.records()[-1].asdict())


def test_another_policy_asks_for_no_odds(orla: Orla, engine: StubEngine) -> None:
    graph = orla.wrap(looping(engine, 2, "any"))
    orla.set_policy(policy="fcfs")
    assert Run(graph).result()
    assert [each.final_odds for each in orla.records()] == [None, None]
    assert "last call" not in explain.text(orla.records()[-1].asdict())
