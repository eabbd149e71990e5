"""The graph ahead: what is read of every kind of graph, what runs teach, and the order that comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.channels import LastValue
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.pregel import NodeBuilder, Pregel
from langgraph.types import Command, Send
from pydantic import SecretStr

from orla_lg import Ahead, ConfigError, Orla, StageOutlook
from orla_lg.core.lookahead.estimates import Estimates
from orla_lg.core.lookahead.forecast import Forecast
from orla_lg.core.lookahead.structure import Edge, GraphStructure
from orla_lg.graph.lookahead import look_ahead, name_of
from tests.conftest import at, chat
from tests.stub_engine import Reply, StubEngine

TOOL_S = 0.2
QUESTION: Any = {"messages": [("user", "hello")]}


def nothing(state: Any) -> Any:
    return {}


def graph_of(*nodes: str) -> Any:
    graph = StateGraph(MessagesState)
    for name in nodes:
        graph.add_node(name, nothing)
    return graph


def way(always: str = "", perhaps: str = "", *, anywhere: bool = False) -> Edge:
    return Edge(frozenset(always.split()), frozenset(perhaps.split()), anywhere)


# ── what is read ─────────────────────────────────────────────────────────────────────────────────────


def linear() -> Any:
    return graph_of("a", "b").add_edge(START, "a").add_edge("a", "b").add_edge("b", END)


def fan_out() -> Any:
    graph = graph_of("a", "b", "c", "d").add_edge(START, "a").add_edge("a", "b").add_edge("a", "c")
    return graph.add_edge(["b", "c"], "d")


def declared() -> Any:
    def route(state: MessagesState) -> Literal["b", "__end__"]:
        return "b"

    return graph_of("a", "b").add_edge(START, "a").add_conditional_edges("a", route).add_edge("b", "a")


def undeclared() -> Any:
    return graph_of("a", "b").add_edge(START, "a").add_conditional_edges("a", lambda state: "b")


def sending() -> Any:
    def scatter(state: MessagesState) -> list[Send]:
        return [Send("work", state), Send("work", state)]

    graph = graph_of("plan", "work", "sum").add_edge(START, "plan")
    return graph.add_conditional_edges("plan", scatter, ["work"]).add_edge("work", "sum")


def commanding() -> Any:
    def choose(state: MessagesState) -> Command[Literal["b", "c"]]:
        return Command(goto="b")

    graph = StateGraph(MessagesState).add_node("a", choose).add_node("b", nothing).add_node("c", nothing)
    return graph.add_edge(START, "a").add_edge("b", END)


def nested() -> Any:
    inner = graph_of("i", "j").add_edge(START, "i").add_edge("i", "j").compile()
    graph = StateGraph(MessagesState).add_node("sub", inner).add_node("z", nothing)
    return graph.add_edge(START, "sub").add_edge("sub", "z")


@tool
def look_up(word: str) -> str:
    """Look a word up."""
    time.sleep(TOOL_S)
    return f"{word} is a word"


def agent() -> Any:
    return create_agent(ChatOpenAI(model="m", api_key=SecretStr("k")), [look_up])


def functional() -> Any:
    @entrypoint()
    def whole(words: Any) -> str:
        return str(words)

    return whole


KINDS: list[tuple[Callable[[], Any], dict[str, Edge]]] = [
    (linear, {START: way("a"), "a": way("b"), "b": way("__end__")}),
    (fan_out, {START: way("a"), "a": way("b c"), "b": way("d"), "c": way("d"), "d": way()}),
    (declared, {START: way("a"), "a": way(perhaps="b __end__"), "b": way("a")}),
    (undeclared, {START: way("a"), "a": way(perhaps="a b __end__", anywhere=True), "b": way()}),
    (sending, {START: way("plan"), "plan": way(perhaps="work"), "work": way("sum"), "sum": way()}),
    (commanding, {START: way("a"), "a": way(perhaps="b c"), "b": way("__end__"), "c": way()}),
    (
        nested,
        {
            START: way("sub"),
            "sub": way("z"),
            "sub|__start__": way("sub|i"),
            "sub|i": way("sub|j"),
            "sub|j": way(),
            "z": way(),
        },
    ),
    (agent, {START: way("model"), "model": way(perhaps="tools __end__"), "tools": way(perhaps="model")}),
    (functional, {START: way("whole"), "whole": way()}),
]


@pytest.mark.parametrize(("make", "ways"), KINDS, ids=lambda each: getattr(each, "__name__", ""))
def test_what_is_written_is_read(make: Callable[[], Any], ways: dict[str, Edge]) -> None:
    made = make()
    graph = made.compile() if isinstance(made, StateGraph) else made
    assert dict(look_ahead(graph).edges) == ways
    assert look_ahead(graph).stages == [stage for stage in ways if "__" not in stage]


def test_channels_tell_of_a_graph_without_a_builder() -> None:
    first = NodeBuilder().subscribe_only("in").do(str.upper).write_to("between")
    second = NodeBuilder().subscribe_only("between").do(str.lower).write_to("out")
    channels: Any = {"in": LastValue(str), "between": LastValue(str), "out": LastValue(str)}
    graph = Pregel(
        nodes={"one": first, "two": second}, channels=channels, input_channels=["in"], output_channels=["out"]
    )
    ways = look_ahead(graph).edges
    assert (ways[START], ways["one"], ways["two"]) == (way("one"), way(perhaps="two __end__"), way())


def test_joins_and_loops() -> None:
    assert look_ahead(fan_out().compile()).joins == {"d": {"b", "c"}}
    assert look_ahead(fan_out().compile()).looping() == set()
    assert look_ahead(declared().compile()).looping() == {"a", "b"}
    assert look_ahead(undeclared().compile()).looping() == set(), "that code may name any stage makes no loop"


def test_a_graph_that_cannot_be_read_is_wrapped_all_the_same(
    engine: StubEngine, orla: Orla, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    graph = linear().compile()
    monkeypatch.setattr(graph.builder, "edges", 3)
    assert look_ahead(graph) == GraphStructure({"a": Edge(), "b": Edge()})
    assert "structure of graph 'LangGraph' cannot be read" in caplog.text
    assert set(orla.wrap(graph).invoke(QUESTION)) == {"messages"}
    assert {each.stage: dict(each.next) for each in orla.outlook(graph)}["a"] == {"b": 0.5, "__end__": 0.5}


def test_graphs_without_a_name_do_not_learn_from_each_other() -> None:
    one, other, named = linear().compile(), fan_out().compile(), linear().compile(name="support")
    names = [name_of(each, look_ahead(each)) for each in (one, other, named)]
    assert names[2] == "support" and len(set(names)) == 3
    assert name_of(linear().compile(), look_ahead(linear().compile())) == names[0]


# ── what runs teach ──────────────────────────────────────────────────────────────────────────────────


def by_stage(orla: Orla, graph: Any) -> dict[str, StageOutlook]:
    return {each.stage: each for each in orla.outlook(graph)}


def test_a_loop_and_its_exit_are_learned(engine: StubEngine, orla: Orla) -> None:
    llm = chat(engine)

    def ask(state: MessagesState) -> Any:
        return {"messages": [llm.invoke(state["messages"])]}

    def enough(state: MessagesState) -> str:
        return END if len(state["messages"]) > 3 else "check"

    graph = StateGraph(MessagesState).add_node("ask", ask).add_node("check", nothing).add_node("never", nothing)
    made = graph.add_edge(START, "ask").add_conditional_edges("ask", enough).add_edge("check", "ask").compile()
    before = by_stage(orla, made)
    assert before["ask"].next == {"ask": 0.25, "check": 0.25, "never": 0.25, "__end__": 0.25}
    wrapped = orla.wrap(made)
    for _ in range(5):
        wrapped.invoke(QUESTION)
    after = by_stage(orla, made)
    assert (after["ask"].learned.visits, after["ask"].learned.calls, after["ask"].learned.turns) == (3, 1, 15)
    assert (after["check"].learned.visits, after["check"].learned.calls) == (2, 0)
    assert after["ask"].next["check"] == pytest.approx(10 / 16, abs=0.02)
    assert after["ask"].next["never"] < 0.02 and after["ask"].next["__end__"] == pytest.approx(1 / 3, abs=0.05)
    assert after["ask"].looping is False and by_stage(orla, declared().compile())["a"].looping


def test_nothing_is_computed_ahead_until_something_asks(
    engine: StubEngine, orla: Orla, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default no policy reads what lies ahead, and an engine like this one is not warmed."""
    computed, learned = list[str](), list[object]()
    compute, learn = Forecast._compute, Estimates._learn_path
    monkeypatch.setattr(Forecast, "_compute", lambda self: computed.append(self.graph) or compute(self))
    monkeypatch.setattr(Estimates, "_learn_path", lambda *args: learned.append(args) or learn(*args))
    made = create_agent(chat(engine), [look_up], name="agent")
    wrapped = orla.wrap(made)
    for _ in range(3):
        wrapped.invoke(QUESTION)
    assert (computed, learned) == ([], [])
    assert by_stage(orla, made)["model"].learned.visits == 2
    assert computed == ["agent"] and len(learned) == 3


def test_an_agents_tools_are_timed(engine: StubEngine, orla: Orla) -> None:
    made = create_agent(chat(engine), [look_up], name="agent")
    began_s = time.monotonic()
    orla.wrap(made).invoke(QUESTION)
    took_s = time.monotonic() - began_s
    learned = {stage: each.learned for stage, each in by_stage(orla, made).items()}
    assert (learned["model"].calls, learned["model"].visits, learned["tools"].calls) == (1, 2, 0)
    assert learned["tools"].tool_s is not None and TOOL_S <= learned["tools"].tool_s < took_s
    assert learned["tools"].other_s is not None and learned["tools"].other_s >= TOOL_S
    assert learned["model"].other_s is not None and learned["model"].other_s <= took_s - TOOL_S
    assert learned["model"].moves == {"tools": 1} and learned["tools"].moves == {"model": 1}
    assert learned["model"].backends == {"main": 1.0} and learned["tools"].backends == {}


def test_a_graph_inside_is_passed_through(engine: StubEngine, orla: Orla) -> None:
    llm = chat(engine)

    def ask(state: MessagesState) -> Any:
        return {"messages": [llm.invoke(state["messages"])]}

    inner = StateGraph(MessagesState).add_node("i", ask).add_node("j", ask)
    graph = StateGraph(MessagesState).add_node("z", ask)
    graph.add_node("sub", inner.add_edge(START, "i").add_edge("i", "j").compile())
    made = graph.add_edge(START, "sub").add_edge("sub", "z").compile()
    orla.wrap(made).invoke(QUESTION)
    seen = by_stage(orla, made)
    assert {stage: each.next for stage, each in seen.items()} == {
        "z": {"__end__": 1.0}, "sub": {"sub|i": 1.0}, "sub|i": {"sub|j": 1.0}, "sub|j": {"z": 1.0},
    }  # fmt: skip
    assert seen["sub"].learned.other_s is None, "its time is that of the stages inside"


def test_a_graph_that_is_only_called_shows_at_run_time(engine: StubEngine, orla: Orla) -> None:
    llm, hidden = chat(engine), {}
    hidden["graph"] = nested().compile()

    def ask(state: MessagesState) -> Any:
        hidden["graph"].invoke(state)
        return {"messages": [llm.invoke(state["messages"])]}

    made = StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask").compile()
    assert list(by_stage(orla, made)) == ["ask"]
    orla.wrap(made).invoke(QUESTION)
    seen = by_stage(orla, made)
    assert set(seen) == {"ask", "ask|sub", "ask|z", "ask|sub|i", "ask|sub|j"}
    assert seen["ask|sub|j"].next["ask|z"] == pytest.approx(0.5), "seen once, and not written"


def test_tasks_are_stages(engine: StubEngine, orla: Orla) -> None:
    engine.rule = lambda seen: Reply(before_s=0.1)  # so that the two drafts run side by side
    llm = chat(engine)

    @task
    def draft(word: str) -> str:
        return str(llm.invoke(word).content)

    @task
    def polish(word: str) -> str:
        return str(llm.invoke(word).content)

    @entrypoint()
    def write(word: str) -> str:
        drafts = [draft(word), draft(word)]
        return polish(" ".join(each.result() for each in drafts)).result()

    wrapped = orla.wrap(write)
    for _ in range(4):
        wrapped.invoke("hello")
    seen = by_stage(orla, write)
    assert set(seen) == {"write", "write|draft", "write|polish"}
    assert seen["write|draft"].learned.visits == 2 and seen["write|draft"].next["write|polish"] == 0.8


def test_an_undeclared_command_is_learned(engine: StubEngine, orla: Orla) -> None:
    graph = StateGraph(MessagesState).add_node("a", lambda state: Command(goto="b")).add_node("b", nothing)
    made = graph.add_edge(START, "a").compile()
    assert by_stage(orla, made)["a"].next == {"__end__": 1.0}
    wrapped = orla.wrap(made)
    for _ in range(9):
        wrapped.invoke(QUESTION)
    assert by_stage(orla, made)["a"].next["b"] == pytest.approx(0.9)


def test_a_run_that_fails_teaches_no_way(engine: StubEngine, orla: Orla) -> None:
    def fail(state: MessagesState) -> Any:
        raise KeyError("a mistake")

    made = StateGraph(MessagesState).add_node("a", nothing).add_node("b", fail).add_edge(START, "a")
    whole = made.add_edge("a", "b").compile()
    with pytest.raises(KeyError):
        orla.wrap(whole).invoke(QUESTION)
    assert [each.learned.turns for each in orla.outlook(whole)] == [0, 0]


def test_a_run_knows_what_comes_next(engine: StubEngine, other_engine: StubEngine, make_orla: Any) -> None:
    mapping = {"model": "main", "reply": "other", "tools": "other"}
    orla: Orla = make_orla(at(engine), at(other_engine, "other"), mapper=mapping)
    llm, seen = chat(engine), dict[str, Ahead | None]()

    def note(name: str, *, asks: bool) -> Callable[[MessagesState], Any]:
        def node(state: MessagesState) -> Any:
            seen[name] = orla.ahead()
            return {"messages": [llm.invoke(state["messages"])]} if asks else {}

        return node

    graph = StateGraph(MessagesState).add_node("model", note("model", asks=True))
    graph.add_node("tools", note("tools", asks=False)).add_node("reply", note("reply", asks=True))
    graph.add_edge(START, "model").add_edge("model", "tools").add_edge("tools", "reply")
    wrapped = orla.wrap(graph.compile())
    wrapped.invoke(QUESTION)
    assert seen["model"] == Ahead({"tools": 1.0}, {"other": 1.0}, None), "by structure and mapping alone"
    assert seen["reply"] is not None and seen["reply"].remaining_s is None, "no run ended yet"
    wrapped.invoke(QUESTION)
    tools = seen["tools"]
    assert tools is not None and (tools.stages, tools.backends) == ({"reply": 1.0}, {"other": 1.0})
    model = seen["model"]
    assert model is not None and model.backends == {"other": 1.0}, "through the stage that makes no call"
    assert model.remaining_s > tools.remaining_s > 0  # type: ignore[operator]
    assert orla.ahead() is None and orla.ahead("unknown") is None


def graph_of_one(engine: StubEngine, **metadata: Any) -> Any:
    llm = chat(engine)

    def ask(state: MessagesState) -> Any:
        return {"messages": [llm.invoke(state["messages"])]}

    return StateGraph(MessagesState).add_node("ask", ask, metadata=metadata).add_edge(START, "ask").compile()


# ── over restarts ────────────────────────────────────────────────────────────────────────────────────


def test_what_was_learned_outlives_the_process(engine: StubEngine, make_orla: Any, tmp_path: Path) -> None:
    file, graph = tmp_path / "estimates.json", graph_of_one(engine)
    first: Orla = make_orla(at(engine), estimates_file=file)
    first.wrap(graph).invoke(QUESTION)
    learned = first.outlook(graph)
    assert learned[0].learned.calls == 1 and not file.exists()
    first.close()
    second: Orla = make_orla(at(engine), estimates_file=file)
    (again,) = second.outlook(graph)
    assert again.learned.service_s == pytest.approx(learned[0].learned.service_s, abs=1e-5)
    assert (again.learned.moves, again.learned.backends) == (learned[0].learned.moves, {"main": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["estimates.json"], "no half-written file is left"


@pytest.mark.parametrize("held", ["", "[]", "{}", '{"format": "x", "version": 1}', "null"])
def test_a_broken_file_is_set_aside_and_learning_begins_anew(
    engine: StubEngine, make_orla: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, held: str
) -> None:
    file, graph = tmp_path / "notes.json", graph_of_one(engine)
    file.write_text(held)
    orla: Orla = make_orla(at(engine), estimates_file=file)
    (warned,) = [record.getMessage() for record in caplog.records]
    assert "notes.json does not hold estimates of ours" in warned and "it is now notes.json.broken" in warned
    assert orla.outlook(graph)[0].learned.calls is None
    orla.wrap(graph).invoke(QUESTION)
    orla.close()
    assert (tmp_path / "notes.json.broken").read_text() == held
    assert Estimates().load(file), "what was learned since"


def test_a_file_in_a_folder_that_is_not_there(engine: StubEngine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder '.*nowhere'"):
        Orla([at(engine)], estimates_file=tmp_path / "nowhere" / "e.json")
