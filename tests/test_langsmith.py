"""A traced run shows on each model run what was decided, against a collector that speaks the protocol."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import openai
import pytest
from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnablePassthrough
from langchain_core.tools import tool
from langchain_core.tracers.langchain import wait_for_all_tracers
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langsmith import utils
from pydantic import SecretStr

from orla_lg import Backend, ChatOrla, Orla
from tests.conftest import BACKEND_KEY, CALLER_KEY, at, chat
from tests.langsmith_collector import Collector
from tests.stub_engine import MODEL, StubEngine
from tests.tools.planned_engine import MODEL as PLANNED
from tests.tools.planned_engine import Answer, PlannedEngine


@pytest.fixture(scope="module")
def _running() -> Iterator[Collector]:
    # One for the module: LangChain keeps its first client, with the first endpoint.
    with Collector() as running:
        yield running
        wait_for_all_tracers()


@pytest.fixture
def collector(_running: Collector, monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.delenv("LANGCHAIN_TRACING_V2", raising=False)
    monkeypatch.setenv("LANGSMITH_TRACING", "true")
    monkeypatch.setenv("LANGSMITH_ENDPOINT", _running.url)
    monkeypatch.setenv("LANGSMITH_API_KEY", "any")
    utils.get_env_var.cache_clear()
    _running.runs.clear()
    yield _running
    utils.get_env_var.cache_clear()


def _graph(model: Any) -> StateGraph[MessagesState]:
    async def speak(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    def listen(state: MessagesState) -> dict[str, Any]:
        return {"messages": list(model.stream(state["messages"]))[:1]}

    graph = StateGraph(MessagesState)
    graph.add_node("speak", speak)
    graph.add_node("listen", listen)
    graph.add_edge(START, "speak")
    graph.add_edge("speak", "listen")
    return graph


def _when(written: str) -> datetime:
    """Return a time; the protocol's are UTC, with or without saying so."""
    return datetime.fromisoformat(written).replace(tzinfo=UTC)


@pytest.mark.parametrize("way_in", ["intercepted", "ChatOrla"])
async def test_each_model_run_shows_its_record(
    collector: Collector, engine: StubEngine, make_orla: Callable[..., Orla], way_in: str
) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"})
    model = chat(engine) if way_in == "intercepted" else ChatOrla(orla=orla, model="main")
    await orla.wrap(_graph(model)).ainvoke({"messages": ["Hello"]})
    wait_for_all_tracers()

    runs = sorted(collector.of_type("llm"), key=lambda run: run["start_time"])
    assert len(runs) == 2
    for run, record in zip(runs, orla.records(), strict=True):
        shown = run["extra"]["metadata"]
        for name in (
            "id",
            "workflow",
            "stage",
            "backend",
            "model",
            "queue_wait_s",
            "cached_tokens",
            "expected_cached_tokens",
        ):
            assert shown[f"orla_{name}"] == record.asdict()[name], name
        assert shown["orla_cache_action"] == record.cache_action
        assert shown["orla_cost_usd"] == record.cost_usd
        assert shown["orla_stage"] == shown["langgraph_node"]
        assert shown.get("orla_ttft_s") == record.ttft_s
        (left,) = [event for event in run["events"] if event["name"] == "orla_left_queue"]
        assert _when(run["start_time"]) <= _when(left["time"]) <= _when(run["end_time"])
        assert left["kwargs"]["backend"] == "main"
    assert runs[1]["extra"]["metadata"]["orla_ttft_s"] >= 0


async def test_a_failed_call_shows_its_error(
    collector: Collector, engine: StubEngine, make_orla: Callable[..., Orla]
) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"})
    engine.refuse()
    with pytest.raises(ConnectionError):
        await orla.wrap(_graph(chat(engine))).ainvoke({"messages": ["Hello"]})
    wait_for_all_tracers()
    (run,) = collector.of_type("llm")
    assert "BackendUnavailable" in run["extra"]["metadata"]["orla_error"]


def test_a_tool_that_began_early_shows_when_and_what_that_hid(
    collector: Collector, make_orla: Callable[..., Orla]
) -> None:
    """Its own run is where and when it is without us; in its metadata is when its body began."""
    began, engine_waits = threading.Event(), iter([True])

    @tool
    def look(x: int) -> str:
        """Look at x."""
        began.set()
        time.sleep(0.05)
        return f"seen {x}"

    def wait() -> None:
        if next(engine_waits, False):
            began.wait(5.0)
            time.sleep(0.1)

    with PlannedEngine([Answer((("look", {"x": 1}),), after={0: wait})]) as planned:
        orla = make_orla(Backend("main", planned.url, model=PLANNED, assemble=True), mapper={"*": "main"})
        model = ChatOpenAI(base_url=planned.url, model=PLANNED, api_key=SecretStr("none"), max_retries=0)
        state = orla.wrap(create_agent(model, [look]), tools_safe={"look"}).invoke({"messages": ["Hello"]})
        assert state["messages"][2].content == "seen 1" and orla.statistics().early_tools.used == 1
    wait_for_all_tracers()
    (run,) = collector.of_type("tool")
    asking, answering = sorted(collector.of_type("llm"), key=lambda each: each["start_time"])
    shown = run["extra"]["metadata"]
    assert 0.04 <= shown["orla_hidden_s"] < 5.0
    assert _when(asking["start_time"]) < _when(shown["orla_began_early"]) < _when(asking["end_time"])
    assert _when(asking["end_time"]) <= _when(run["start_time"]) <= _when(run["end_time"])
    assert _when(run["end_time"]) <= _when(answering["start_time"])
    assert run["outputs"]["output"]["content"] == "seen 1" and run["parent_run_id"] in collector.runs


async def test_no_key_is_traced(collector: Collector, engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"})
    await orla.wrap(_graph(chat(engine))).ainvoke({"messages": ["Hello"]})
    wait_for_all_tracers()
    text = repr(collector.runs)
    assert collector.runs
    assert BACKEND_KEY not in text
    assert CALLER_KEY not in text


@pytest.mark.parametrize("named", [None, "another"])
@pytest.mark.parametrize("form", ["open stream", "ended"])
async def test_a_record_is_not_put_on_the_run_of_a_model_that_passes_by(
    collector: Collector, engine: StubEngine, make_orla: Callable[..., Orla], form: str, named: str | None
) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"})
    sdk = openai.OpenAI(base_url=engine.url, api_key=CALLER_KEY, max_retries=0)
    passing = GenericFakeChatModel(messages=iter([AIMessage("first second third")]), metadata=_named(named))

    def speak(state: MessagesState) -> None:
        stream = passing.stream("hello")
        next(stream)
        if form == "ended":
            list(stream)
        sdk.chat.completions.create(model="gpt-x", messages=[{"role": "user", "content": "hi"}])
        list(stream)

    graph = StateGraph(MessagesState).add_node("speak", speak).add_edge(START, "speak")
    await orla.wrap(graph).ainvoke({"messages": ["Hello"]}, {"configurable": {"thread_id": "t"}})
    wait_for_all_tracers()
    (run,) = collector.of_type("llm")
    assert not [key for key in run["extra"]["metadata"] if key.startswith("orla_")]
    assert run["extra"]["metadata"].get("ls_model_name") == named
    passed, record = sorted(orla.records(), key=lambda record: not record.external)
    assert (record.workflow, record.stage) == ("t", "speak") == (passed.workflow, passed.stage)
    assert passed.external and not record.external


def _named(model: str | None) -> dict[str, Any]:
    return {} if model is None else {"ls_model_name": model}


async def test_the_model_that_answered_is_the_runs_model(
    collector: Collector, engine: StubEngine, make_orla: Callable[..., Orla]
) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"})
    await orla.wrap(_graph(chat(engine, model="gpt-x"))).ainvoke({"messages": ["Hello"]})
    wait_for_all_tracers()
    for run in collector.of_type("llm"):
        assert run["extra"]["metadata"]["ls_model_name"] == MODEL
        assert run["extra"]["invocation_params"]["model"] == "gpt-x", "what the code asked for"


async def test_a_call_that_passes_by_keeps_the_codes_model(
    collector: Collector, engine: StubEngine, make_orla: Callable[..., Orla]
) -> None:
    orla = make_orla(at(engine), mapper={"another": "main"})
    await orla.wrap(_graph(chat(engine, model="gpt-x"))).ainvoke({"messages": ["Hello"]})
    wait_for_all_tracers()
    assert {run["extra"]["metadata"]["ls_model_name"] for run in collector.of_type("llm")} == {"gpt-x"}


@pytest.mark.parametrize("callbacks", [None, []])
async def test_a_model_in_a_chain_with_callbacks_of_its_own_shows_its_record(
    collector: Collector, engine: StubEngine, make_orla: Callable[..., Orla], callbacks: Any
) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"})
    chain = RunnablePassthrough() | chat(engine)
    graph = StateGraph(MessagesState)
    graph.add_node("speak", lambda state: {"messages": [chain.invoke("hello", {"callbacks": callbacks})]})
    await orla.wrap(graph.add_edge(START, "speak")).ainvoke({"messages": ["Hello"]})
    wait_for_all_tracers()
    (run,) = collector.of_type("llm")
    assert run["extra"]["metadata"]["orla_stage"] == "speak"
