"""What a node is told covers what runs inside it: agents, subgraphs, graphs called in functions and in tools."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import (
    Assignment,
    BackendView,
    BudgetExceeded,
    Call,
    ConfigError,
    Hints,
    Limit,
    Limits,
    MappingError,
    Orla,
)
from orla_lg.core.policies import EarliestDeadline
from orla_lg.graph.structure import stages_of
from orla_lg.mappers import CostQualityMapper, ExplicitMapper, First
from orla_lg.mappers.stages import check_stages
from tests.conftest import at, chat
from tests.stub_engine import StubEngine

HI: Any = {"messages": [("user", "hi 3")]}
MakeOrla = Callable[..., Orla]


@tool
def look_up(order: str) -> str:
    """Return what is known of an order."""
    return f"order {order}: shipped"


def agent_in(llm: Any) -> Any:
    """An agent: a model, its tool, and the model again."""
    return create_agent(llm, [look_up], name="agent")


def as_a_node(llm: Any) -> Any:
    return agent_in(llm)


def in_a_function(llm: Any) -> Any:
    agent = agent_in(llm)

    def run(state: MessagesState) -> Any:
        return {"messages": agent.invoke(HI)["messages"][-1:]}

    async def arun(state: MessagesState) -> Any:
        return {"messages": (await agent.ainvoke(HI))["messages"][-1:]}

    return either(run, arun)


def on_its_own_thread(llm: Any) -> Any:
    agent, thread = agent_in(llm), {"configurable": {"thread_id": "own"}}

    def run(state: MessagesState) -> Any:
        return {"messages": agent.invoke(HI, thread)["messages"][-1:]}

    async def arun(state: MessagesState) -> Any:
        return {"messages": (await agent.ainvoke(HI, thread))["messages"][-1:]}

    return either(run, arun)


def in_a_tool(llm: Any) -> Any:
    agent = agent_in(llm)

    @tool
    def ask(question: str) -> str:
        """Ask another agent."""
        return str(agent.invoke(HI)["messages"][-1].text)

    return create_agent(llm, [ask], name="outer")


def in_a_subgraph(llm: Any) -> Any:
    return StateGraph(MessagesState).add_node("desk", agent_in(llm)).add_edge(START, "desk").compile()


def unseen(llm: Any) -> Any:
    made = {}

    def run(state: MessagesState) -> Any:
        return {"messages": made.setdefault("agent", agent_in(llm)).invoke(HI)["messages"][-1:]}

    return run


def either(run: Callable[[Any], Any], arun: Callable[[Any], Any]) -> Any:
    return RunnableLambda(run, afunc=arun)


def sync(graph: Any) -> Any:
    return graph.invoke(HI)


def asynchronous(graph: Any) -> Any:
    return asyncio.run(graph.ainvoke(HI))


TWICE = ["support|model"] * 2
SHAPES = pytest.mark.parametrize(
    ("shape", "stages", "run"),
    [
        *((shape, TWICE, run) for shape in (as_a_node, in_a_function) for run in (sync, asynchronous)),
        (on_its_own_thread, TWICE, asynchronous),
        (in_a_tool, ["support|model", *["support|tools|agent|model"] * 2, "support|model"], sync),
        (in_a_subgraph, ["support|desk|model"] * 2, sync),
        (unseen, TWICE, sync),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)


NOWHERE: Any = SimpleNamespace(url="http://127.0.0.1:1/v1")


def desk(engine: StubEngine, shape: Callable[[Any], Any] = as_a_node, **settings: Any) -> Any:
    """``triage`` → ``support``, in which something runs that calls models."""
    llm = chat(engine)

    def triage(state: MessagesState) -> Any:
        return {"messages": [("user", str(llm.invoke(state["messages"]).text))]}

    builder = StateGraph(MessagesState).add_node("triage", triage).add_node("support", shape(llm), **settings)
    return builder.add_edge(START, "triage").add_edge("triage", "support").compile(name="desk")


def two(make_orla: MakeOrla, engine: StubEngine, **settings: Any) -> Orla:
    return make_orla(at(engine, "light"), at(engine, "heavy"), **{"mapper": {"*": "light"}, **settings})


def went(orla: Orla) -> list[tuple[str, str | None]]:
    return [(record.stage, record.backend) for record in orla.records()]


# ── mapping ──────────────────────────────────────────────────────────────────────────────────────────


@SHAPES
def test_a_nodes_mapping_is_that_of_what_runs_inside(
    engine: StubEngine, make_orla: MakeOrla, shape: Any, stages: list[str], run: Any
) -> None:
    orla = two(make_orla, engine)
    table = {"triage": "light", "support": "heavy", "*": "light"}
    graph = orla.wrap(desk(engine, shape), mapper=table)
    run(graph)
    assert went(orla) == [("triage", "light"), *((stage, "heavy") for stage in stages)]
    if shape is not unseen:  # what the tree shows is what runs
        known = {each.stage: each.backends for each in orla.plan(graph)}
        assert all(known[stage] == ("heavy",) for stage in stages)


def test_a_nearer_name_decides(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = two(make_orla, engine, mapper={"support": "heavy", "tools": "light", "*": "light"})
    orla.wrap(desk(engine, in_a_tool)).invoke(HI)
    assert [backend for _, backend in went(orla)] == ["light", "heavy", "light", "light", "heavy"]
    orla.variant("other", {"support|tools": "heavy", "support|tools|model": "light", "model": "heavy"})
    orla.wrap(desk(engine, in_a_tool)).invoke(HI, {"configurable": {"orla": {"variant": "other"}}})
    assert [backend for _, backend in went(orla)[5:]] == ["light", "heavy", "light", "light", "heavy"]


def test_a_graph_in_a_graph_is_found_by_its_own_names(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = two(make_orla, engine, mapper={"support|model": "heavy", "*": "light"})
    inner = orla.wrap(desk(engine), mapper={"support|model": "heavy", "triage": "light"})
    outer = StateGraph(MessagesState).add_node("all", inner).add_edge(START, "all")
    orla.wrap(outer).invoke(HI)
    assert went(orla) == [("all|triage", "light"), ("all|support|model", "heavy"), ("all|support|model", "heavy")]


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────


@SHAPES
def test_a_nodes_limit_is_for_all_that_runs_inside_together(
    engine: StubEngine, make_orla: MakeOrla, shape: Any, stages: list[str], run: Any
) -> None:
    few = len(stages) - 1
    orla = two(make_orla, engine)
    with pytest.raises(BudgetExceeded, match="'support'") as spent:
        run(orla.wrap(desk(engine, shape), limits=Limits(stages={"support": Limit(calls=few)})))
    assert (spent.value.scope, spent.value.name) == ("stage", "support")
    assert len(engine.chats) == 1 + few, "triage, and what the limit leaves"
    (state,) = orla.statistics().limits
    assert (state.name, state.spent.calls, state.refused) == ("support", few, 1)


def test_a_nearer_limit_takes_its_calls_out_of_the_nodes(engine: StubEngine, make_orla: MakeOrla) -> None:
    limits = Limits(stages={"support": Limit(calls=0), "support|model": Limit(calls=9), "*": Limit(calls=2)})
    orla = two(make_orla, engine, limits=limits)
    orla.wrap(desk(engine)).invoke(HI)
    spent = {each.name: each.spent.calls for each in orla.statistics().limits}
    assert spent == {"triage": 1, "support|model": 2}
    with pytest.raises(BudgetExceeded, match=r"stage 'support' may use 0 calls \(limits.stages.support.calls\)"):
        orla.wrap(desk(engine, in_a_tool)).invoke(HI)
    with pytest.raises(BudgetExceeded, match=r"stage 'triage' may use 2 calls \(limits.stages.\*.calls\)"):
        orla.wrap(desk(engine)).invoke(HI)
    orla.limits = Limits(stages={"support": Limit(calls=1)})
    assert not [each for each in orla.statistics().limits if each.name == "support|model"], "another limit covers it"


# ── hints ────────────────────────────────────────────────────────────────────────────────────────────

SAID = Hints(priority=9, tenant="acme", deadline_s=50, cache="preserve", variant="spare")


class Listening:
    """A mapper that keeps the hints of each call."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Hints]] = []

    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:
        self.heard.append((call.identity.stage, call.hints))
        return None

    def of(self, stage: str) -> Hints:
        (said,) = {hints for each, hints in self.heard if each == stage}
        return said


@SHAPES
def test_a_nodes_hints_are_those_of_what_runs_inside(
    engine: StubEngine, make_orla: MakeOrla, shape: Any, stages: list[str], run: Any
) -> None:
    orla = two(make_orla, engine)
    orla.variant("spare", {"*": "heavy"})
    run(orla.wrap(desk(engine, shape), hints=lambda stage, state: SAID if stage == "support" else None))
    are_as_said(orla, stages)


def test_a_nodes_metadata_is_that_of_what_runs_inside(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = two(make_orla, engine)
    orla.variant("spare", {"*": "heavy"})
    metadata = {"orla": {name: value for name, value in asdict(SAID).items() if value is not None}}
    orla.wrap(desk(engine, on_its_own_thread, metadata=metadata)).invoke(HI)
    are_as_said(orla, TWICE)


def are_as_said(orla: Orla, stages: list[str]) -> None:
    assert went(orla) == [("triage", "light"), *((stage, "heavy") for stage in stages)], "the variant too"
    triage, *inner = orla.records()
    assert (triage.priority, triage.tenant, triage.cache_hint) == (0, None, None)
    assert {(each.priority, each.tenant, each.cache_hint) for each in inner} == {(9, "acme", "preserve")}


def test_hints_inherit_field_by_field(engine: StubEngine, make_orla: MakeOrla) -> None:
    said = {
        "support": Hints(priority=9, deadline_s=50, tenant="acme"),
        "support|model": {"priority": 3},
        "support|tools": {"cache": "flush", "tenant": ""},
        "support|tools|model": Hints(deadline_s=5),
    }
    listening = Listening()
    orla = two(make_orla, engine)
    wrapped = orla.wrap(desk(engine, in_a_tool), hints=lambda stage, state: said.get(stage), mapper=listening)
    wrapped.invoke(HI)
    assert listening.of("triage") == Hints()
    assert listening.of("support|model") == Hints(priority=3, deadline_s=50, tenant="acme")
    assert listening.of("support|tools|agent|model") == Hints(priority=9, deadline_s=5, tenant="", cache="flush")


def test_an_inner_nodes_metadata_is_nearer_than_an_outer_nodes_function(
    engine: StubEngine, make_orla: MakeOrla
) -> None:
    llm, listening = chat(engine), Listening()

    def speak(state: MessagesState) -> Any:
        return {"messages": [llm.invoke("hi")]}

    def louder(state: MessagesState) -> Any:
        return {"messages": [llm.invoke("hi", {"metadata": {"orla": {"priority": 5}}})]}

    inner = StateGraph(MessagesState).add_node("plain", speak).add_node("call", louder).add_edge(START, "plain")
    inner.add_node("own", speak, metadata={"orla": {"priority": 2}}).add_edge("plain", "own").add_edge("own", "call")
    outer = StateGraph(MessagesState).add_edge(START, "sub")
    outer.add_node("sub", inner.compile(), metadata={"orla": {"priority": 1, "tenant": "acme"}})
    hints = {"sub": Hints(priority=9)}
    two(make_orla, engine).wrap(outer, hints=lambda stage, state: hints.get(stage), mapper=listening).invoke(HI)
    assert listening.of("sub|plain") == Hints(priority=9, tenant="acme"), "of one node the function is stronger"
    assert listening.of("sub|own") == Hints(priority=2, tenant="acme")
    assert listening.of("sub|call") == Hints(priority=5, tenant="acme"), "what the call itself says is nearer still"


def test_a_run_of_its_own_inside_a_node_inherits_hints(engine: StubEngine, make_orla: MakeOrla) -> None:
    agent = agent_in(chat(engine))

    def run(state: MessagesState) -> Any:
        agent.invoke(HI, {"configurable": {"thread_id": "other"}})

    graph = StateGraph(MessagesState).add_node("support", run).add_edge(START, "support")
    hints = lambda stage, state: SAID if stage == "support" else None  # noqa: E731
    orla = two(make_orla, engine, mapper={"*": "light"})
    orla.variant("spare", {"*": "heavy"})
    orla.wrap(graph, hints=hints).invoke(HI)
    assert {(each.workflow, each.priority, each.tenant) for each in orla.records()} == {("other", 9, "acme")}
    assert went(orla) == [("support|model", "heavy")] * 2


def test_what_configurable_and_prioritize_say_stays_stronger(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = two(make_orla, engine)
    graph = orla.wrap(desk(engine), hints=lambda stage, state: Hints(priority=9) if stage == "support" else None)
    graph.invoke(HI, {"configurable": {"orla": {"priority": 4}}})
    assert {record.priority for record in orla.records()} == {4}


# ── policies ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_nodes_request_policy_orders_what_waits_inside(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = two(make_orla, engine, request_policy={"support": "edf", "support|tools": "sjf"})
    policies = orla.core.serving.schedulers["light"].queue.policies
    kinds = {stage: type(policies.of(stage)).__name__ for stage in ("support|model", "support|tools|model", "x", "")}
    assert kinds == {
        "support|model": "EarliestDeadline", "support|tools|model": "ShortestJob",
        "x": "WorkflowFcfs", "": "WorkflowFcfs",
    }  # fmt: skip
    orla.set_policy(request_policy={"*": "fcfs"})
    assert type(orla.core.serving.schedulers["light"].queue.policies.of("support|model")).__name__ == "Fcfs"
    orla.set_policy(request_policy={"model": EarliestDeadline()})
    orla.wrap(desk(engine)).invoke(HI)
    assert len(orla.records()) == 3


def test_strictness_covers_too(engine: StubEngine) -> None:
    mapper = CostQualityMapper(stages={"support": "strict", "tools": "prefer"})
    assert [mapper.strictness(stage) for stage in ("support|model", "support|tools|model", "x")] == [
        "strict", "prefer", "prefer",
    ]  # fmt: skip


# ── names ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        (as_a_node, "support"), (as_a_node, "support|model"), (as_a_node, "model"), (as_a_node, "triage"),
        (as_a_node, "triage|anything"), (as_a_node, "support|tools|model"), (as_a_node, "tools|critic|model"),
        (in_a_tool, "support|tools|model"), (in_a_tool, "tools|model"), (in_a_tool, "support|tools|agent|model"),
        (in_a_tool, "agent"), (in_a_tool, "agent|model"), (in_a_tool, "tools|anything"),
        (in_a_function, "support|model"), (unseen, "support|model"), (unseen, "support|tools|model"),
        (in_a_subgraph, "desk"), (in_a_subgraph, "desk|model"), (in_a_subgraph, "support|desk"),
    ],
    ids=lambda each: getattr(each, "__name__", each),
)  # fmt: skip
def test_what_decides_or_may_decide_a_stage_is_taken(shape: Any, name: str) -> None:
    assert check_stages({name: "heavy", "*": "light"}, stages_of(desk(NOWHERE, shape))) == []


@pytest.mark.parametrize(
    ("shape", "name", "meant"),
    [
        (as_a_node, "suport", "support"), (as_a_node, "support|modle", "support|model"),
        (as_a_node, "support|anything", None), (as_a_node, "suport|model", "support|model"),
        (as_a_node, "modle", "model"), (as_a_node, "anything", None), (as_a_node, "anything|model", None),
        (in_a_function, "support|modle", "support|model"), (in_a_tool, "agent|modle", "agent|model"),
        (unseen, "model", None), (in_a_subgraph, "support|dsk", "support|desk"), (as_a_node, "model|", "model"),
    ],
    ids=lambda each: getattr(each, "__name__", each),
)  # fmt: skip
def test_what_can_decide_nothing_is_refused(shape: Any, name: str, meant: str | None) -> None:
    (fault,) = check_stages({name: "heavy", "*": "light"}, stages_of(desk(NOWHERE, shape)))
    assert "which the graph does not have" in fault
    assert meant is None or f"did you mean {meant!r}" in fault


def test_wrap_refuses_names_in_every_table(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla, graph = two(make_orla, engine), desk(engine)
    tables: list[Any] = [{"suport": "heavy"}, First(CostQualityMapper(stages={"suport": "strict"}), {"*": "heavy"})]
    for table in tables:
        with pytest.raises(MappingError, match="which the graph does not have; did you mean 'support'"):
            orla.wrap(graph, mapper=table)
    with pytest.raises(ConfigError, match="which the graph does not have; did you mean 'support'"):
        orla.wrap(graph, limits=Limits(stages={"suport": Limit(1)}))
    orla.wrap(graph, mapper={"support": "heavy"}, limits=Limits(stages={"support": Limit(1)}))


def test_a_name_whose_stages_all_have_nearer_ones_decides_nothing(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla, graph = two(make_orla, engine), desk(engine)
    table = {"support": "heavy", "model": "light", "support|tools": "light"}
    with pytest.raises(MappingError, match="names stage 'support', which decides nothing") as found:
        orla.wrap(graph, mapper=table)
    assert "'support|model' is decided by 'model', 'support|tools' is decided by 'support|tools'" in str(found.value)
    orla.wrap(graph, mapper={"support": "heavy", "model": "light"})  # its tools, which may call models, remain


def test_the_shared_table_may_name_what_other_graphs_have(
    engine: StubEngine, make_orla: MakeOrla, caplog: pytest.LogCaptureFixture
) -> None:
    orla = two(make_orla, engine, mapper={"elsewhere": "light", "support|modle": "light", "triage|ask": "light"})
    orla.wrap(desk(engine))
    (warned,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "'support|modle'" in warned and "'support|model' is the nearest" in warned


def test_a_table_is_a_snapshot(engine: StubEngine) -> None:
    table = {"support": "heavy"}
    mapper = ExplicitMapper(table)
    assert mapper.foretell("support|model") is not None
    table["support|model"] = "light"
    found = mapper.foretell("support|model")
    assert found is not None and found.backends == ("heavy",)
    assert not stages_of(desk(engine)).may_be("")
