"""When a tool began early, and what that hid, as explain, the records file and LangSmith show it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_core.tracers.langchain import wait_for_all_tracers
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import InjectedState, ToolNode
from langsmith import utils

from orla_lg import Orla, cli, explain_tools
from orla_lg.graph.tools.early import watch
from orla_lg.graph.tools.early.reasons import DropReason, NotBegun
from orla_lg.graph.tools.early.starts import AskingCall, EarlyStart
from orla_lg.openai_api.agreement import engine_of
from orla_lg.wires.watching import Late
from tests.langsmith_collector import Collector
from tests.tools.conftest import PATIENCE_S, Lab
from tests.tools.planned_engine import Answer

HELLO = {"messages": [HumanMessage("Hello")]}


def agent(lab: Lab) -> Any:
    @tool
    def look(x: int) -> str:
        """Look at x."""
        time.sleep(0.03)
        return f"seen {x}"

    lab.plan = [Answer((("look", {"x": 1}),), after={0: lambda: (lab.wait_for_starts(1), time.sleep(0.06))})]
    return create_agent(lab.model(), [look])


def test_explain_shows_the_tools_of_an_answer_and_of_a_run(
    lab: Lab, make_orla: Callable[..., Orla], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "records.jsonl"
    lab.orla = make_orla(lab.backend(), mapper={"*": "main"}, records_file=file)
    lab.orla.wrap(agent(lab), tools_safe={"look"}).invoke(HELLO)
    lab.orla.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    (early,) = [line for line in lines if "early_tool" in line]
    first = next(line for line in lines if "id" in line)
    assert (early["early_tool"], early["stage"], early["call"]) == ("look", "tools", first["id"])
    assert 0.02 < early["hidden_s"] <= early["began_before_s"] and early["waited_s"] == 0.0

    assert cli.main(["explain", first["id"], str(file)]) == 0
    assert "tool 'look' began while the answer came, which hid 0.0" in capsys.readouterr().out
    assert cli.main(["explain", "--run", "last", str(file)]) == 0
    out = capsys.readouterr().out
    assert "2 calls of 1 stage" in out and "1 tool began early, which hid 0.0" in out
    assert "tools: look" in out and "○ early tool" in out
    assert cli.main(["explain", "--run", "last", str(file), "--json"]) == 0
    assert [("early_tool" in json.loads(line)) for line in capsys.readouterr().out.splitlines()].count(True) == 1


def explained(file: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Return what ``explain`` says of the first call and of its run."""
    first = next(row for row in map(json.loads, file.read_text().splitlines()) if "id" in row)
    capsys.readouterr()
    assert cli.main(["explain", first["id"], str(file)]) == 0
    of_call = capsys.readouterr().out
    assert cli.main(["explain", "--run", "last", str(file)]) == 0
    return of_call, capsys.readouterr().out


@tool
def look(x: int) -> str:
    """Look at x."""
    return f"seen {x}"


@tool
def bound(x: int, state: Annotated[Any, InjectedState]) -> str:
    """Look at x and the state."""
    return f"seen {x}"


@tool
def other(x: int) -> str:
    """Look elsewhere."""
    return f"seen {x}"


def differs(orla: Orla) -> None:
    agreement = orla.core.clients["main"].agreement
    assert orla.connect(PATIENCE_S) == {"main": None}
    engine = engine_of(orla.core.serving.schedulers["main"].health.probe)
    agreement.begins(engine)
    agreement.conclude(engine, ["content is 'a' in one piece, 'b' streamed"])


@pytest.mark.parametrize(
    ("calls", "how", "why"),
    [
        ((("look", {"x": 1}), ("other", {"x": 1})), {}, "'other' did not begin early: it is not declared safe"),
        ((("bound", {"x": 1}),), {}, "'bound' did not begin early: it needs what is there in its place only"),
        ((("look", {"x": "no"}),), {}, "'look' did not begin early: its arguments are not valid"),
        ((("look", {"x": 1}),), {"early_tools": False}, "the backend has early_tools=False"),
        ((("look", {"x": 1}),), {"assemble": False}, "the backend has assemble=False"),
        ((("look", {"x": 1}),), {"assemble": None, "before": differs}, "otherwise when it is streamed"),
        ((("look", {"x": 1}),), {"interrupt_before": ["tools"]}, "its calls are approved first"),
        ((("other", {"x": 1}),), {"tools": [other]}, "'other' did not begin early: it is not declared safe"),
    ],
)
def test_explain_says_why_a_tool_did_not_begin_early(
    lab: Lab, make_orla: Callable[..., Orla], tmp_path: Path, capsys: pytest.CaptureFixture[str], calls: Any,
    how: Any, why: str,
) -> None:  # fmt: skip
    file, how = tmp_path / "records.jsonl", {**how}
    tools, stops = how.pop("tools", [look, bound, other]), how.pop("interrupt_before", None)
    before = how.pop("before", None)
    lab.plan = [Answer(calls)]
    lab.orla = make_orla(lab.backend(**how), mapper={"*": "main"}, records_file=file)
    if before is not None:
        before(lab.orla)
    made = create_agent(lab.model(), tools, interrupt_before=stops, checkpointer=InMemorySaver())
    lab.orla.wrap(made, tools_safe={"look", "bound"}).invoke(HELLO, {"configurable": {"thread_id": "t"}})
    lab.orla.close()
    of_call, of_run = explained(file, capsys)
    assert why in of_call and why.partition("early: ")[2] in of_run and "1 tool did not begin early" in of_run
    if tools == [other]:
        assert not any(body.get("stream") for body in lab.engine.bodies), "it is only noted"


def test_without_a_records_file_an_answer_that_offers_no_safe_tool_is_not_watched(
    lab: Lab, served: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "ToolWatch", None)
    lab.plan = [Answer((("other", {"x": 1}),))]
    assert (
        served(create_agent(lab.model(), [other]), tools_safe={"look"}).invoke(HELLO)["messages"][-1].content
        == "done"
    )


def test_explain_draws_the_starts_that_came_to_nothing_and_says_why(
    lab: Lab, make_orla: Callable[..., Orla], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "records.jsonl"
    lab.plan, lab.awaits = [Answer((("look", {"x": 1}),))], 1
    lab.orla = make_orla(lab.backend(), mapper={"*": "main"}, records_file=file)
    model = lab.model().bind_tools([look])
    graph = StateGraph(MessagesState).add_node("think", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_node("act", lambda state: {"messages": [look.func(1)]})  # type: ignore[attr-defined]
    lab.orla.wrap(graph.add_edge(START, "think").add_edge("think", "act").compile(), tools_safe={"look"}).invoke(
        HELLO
    )
    lab.orla.close()
    of_call, of_run = explained(file, capsys)
    assert "tool 'look' began early in vain, 0.00" in of_call
    assert "1 tool began early in vain: the run ended, and no call had taken the result" in of_run
    assert "act: look" in of_run and "× dropped tool" in of_run
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    (row,) = [row for row in rows if "early_tool" in row]
    assert row["dropped"] == "run_ended" and row["began_before_s"] >= row["ran_s"] > 0


def test_a_start_that_fails_and_one_that_comes_too_late_are_said_too(
    lab: Lab, make_orla: Callable[..., Orla], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @tool
    def look(x: int) -> str:
        """Look at x."""
        raise ValueError("no")

    file = tmp_path / "records.jsonl"
    lab.plan, lab.awaits = [Answer((("look", {"x": 1}),))], 1
    lab.orla = make_orla(lab.backend(), mapper={"*": "main"}, records_file=file)
    graph = StateGraph(MessagesState)
    model = lab.model().bind_tools([look])
    graph.add_node("think", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode([look], handle_tool_errors=True))
    graph.add_edge(START, "think").add_edge("think", "tools")
    lab.orla.wrap(graph.compile(), tools_safe={"look"}).invoke(HELLO)
    lab.orla.core.early.ran_again(EarlyStart(AskingCall("c", "r", "s", "", 1), look, ((), {}), {}, "tools"))
    lab.orla.close()
    assert "ran again when its turn came" in explained(file, capsys)[0]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["dropped"] for row in rows if "early_tool" in row] == ["failed", "not_begun"]


def test_all_reasons_have_words() -> None:
    assert set(explain_tools.NOT_BEGUN) == {*map(str, NotBegun), *map(str, Late)}
    assert set(explain_tools.DROPPED) == {*map(str, DropReason), "failed"}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as running:
        monkeypatch.delenv("LANGCHAIN_TRACING_V2", raising=False)
        monkeypatch.setenv("LANGSMITH_TRACING", "true")
        monkeypatch.setenv("LANGSMITH_ENDPOINT", running.url)
        monkeypatch.setenv("LANGSMITH_API_KEY", "any")
        utils.get_env_var.cache_clear()
        yield running
        wait_for_all_tracers()
        utils.get_env_var.cache_clear()


def test_langsmiths_run_of_the_tool_says_when_it_began(
    lab: Lab, served: Callable[..., Any], collector: Collector
) -> None:
    from langchain_core.tracers.langchain import LangChainTracer
    from langsmith import Client

    client = Client(api_url=collector.url, api_key="any")
    graph = served(agent(lab), tools_safe={"look"})
    graph.invoke(HELLO, {"callbacks": [LangChainTracer(client=client)]})
    wait_for_all_tracers()
    client.flush()
    (traced,) = collector.of_type("tool")
    shown = traced["extra"]["metadata"]
    assert 0.02 < shown["orla_hidden_s"] < 1.0
    assert shown["orla_began_early"] < traced["start_time"] + "Z"
