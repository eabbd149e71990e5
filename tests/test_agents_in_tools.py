"""Agents and graphs that run inside tools: each is a stage by its name, and told apart by one mapping."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelRequest
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import BaseTool, StructuredTool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode

from orla_lg import BudgetExceeded, Hints, Limit, Limits, MappingError, Orla
from orla_lg.core.boundary.stage_keys import StageKey
from orla_lg.core.lookahead.stage_estimates import StageEstimates
from tests.conftest import at, chat
from tests.stub_engine import StubEngine

HI: Any = {"messages": [("user", "hi 3")]}
MakeOrla = Callable[..., Orla]
OTHER = {"configurable": {"thread_id": "own"}}


def two(make_orla: MakeOrla, engine: StubEngine, **settings: Any) -> Orla:
    return make_orla(at(engine, "light"), at(engine, "heavy"), **{"mapper": {"*": "light"}, **settings})


def went(orla: Orla) -> dict[str, str | None]:
    return {record.stage: record.backend for record in orla.records()}


def speaks(llm: Any, name: str | None = None) -> Any:
    """A plain graph whose one node calls a model."""

    def say(state: MessagesState) -> Any:
        return {"messages": [llm.invoke("hi")]}

    return StateGraph(MessagesState).add_node("say", say).add_edge(START, "say").compile(name=name)


def asking(graph: Any, name: str, config: Any = None) -> BaseTool:
    """A tool made by hand that runs a graph."""

    def ask(question: str) -> str:
        """Ask."""
        return str(graph.invoke(HI, config)["messages"][-1].text)

    async def aask(question: str) -> str:
        """Ask."""
        return str((await graph.ainvoke(HI, config))["messages"][-1].text)

    return StructuredTool.from_function(ask, aask, name=name)


def calling(*tools: BaseTool, node: str = "tools", name: str | None = None) -> Any:
    """A graph that runs all its tools at once."""
    calls: Any = [{"name": each.name, "args": {"question": "?"}, "id": each.name} for each in tools]
    builder = StateGraph(MessagesState).add_node(
        "first", lambda state: {"messages": [AIMessage("", tool_calls=calls)]}
    )
    return builder.add_node(node, ToolNode(tools)).add_edge(START, "first").add_edge("first", node).compile(name=name)


def sync(graph: Any) -> Any:
    return graph.invoke(HI)


def asynchronous(graph: Any) -> Any:
    return asyncio.run(graph.ainvoke(HI))


BOTH = pytest.mark.parametrize("run", [sync, asynchronous])


class Delegates(AgentMiddleware):
    """Has the model hand its first message to both subagents, as a stub would not of itself."""

    async def awrap_model_call(self, request: ModelRequest, handler: Callable[[ModelRequest], Any]) -> Any:
        answer = self.wrap_model_call(request, handler)
        return answer if isinstance(answer, AIMessage) else await answer

    def wrap_model_call(self, request: ModelRequest, handler: Callable[[ModelRequest], Any]) -> Any:
        if request.messages[-1].type != "human":
            return handler(request)
        tasks = [{"description": "do", "subagent_type": each} for each in ("researcher", "critic")]
        return AIMessage(
            "", tool_calls=[{"name": "task", "args": each, "id": each["subagent_type"]} for each in tasks]
        )


def deep(llm: Any) -> Any:
    made = pytest.importorskip("deepagents", reason="needs the package deepagents")
    agents = [
        {"name": name, "description": "works", "system_prompt": "work", "tools": []}
        for name in ("researcher", "critic")
    ]
    return made.create_deep_agent(llm, subagents=agents, middleware=[Delegates()])


def by_hand(llm: Any) -> Any:
    names = ("researcher", "critic")
    return calling(*(asking(create_agent(llm, name=name), f"ask_{name}") for name in names))


def compiled_with_a_name(llm: Any) -> Any:
    return calling(asking(speaks(llm, "researcher"), "a"), asking(speaks(llm, "critic"), "b"))


def bound_to_a_name(llm: Any) -> Any:
    named = (speaks(llm).with_config(run_name=name) for name in ("researcher", "critic"))
    return calling(*(asking(each, f"t{n}") for n, each in enumerate(named)))


def on_threads_of_their_own(llm: Any) -> Any:
    return calling(*(asking(speaks(llm, name), name, OTHER) for name in ("researcher", "critic")))


def traced_under_other_names(llm: Any) -> Any:
    return calling(
        *(asking(speaks(llm, name), name, {"run_name": f"{name} 17"}) for name in ("researcher", "critic"))
    )


def with_callbacks_of_their_own(llm: Any) -> Any:
    return calling(*(asking(speaks(llm, name), name, {"callbacks": []}) for name in ("researcher", "critic")))


SHAPES = [
    deep, by_hand, compiled_with_a_name, bound_to_a_name, on_threads_of_their_own, traced_under_other_names,
    with_callbacks_of_their_own,
]  # fmt: skip


@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=lambda each: each.__name__)
def test_two_agents_in_tools_are_told_apart(engine: StubEngine, make_orla: MakeOrla, shape: Any, run: Any) -> None:
    if shape is deep and run is asynchronous:
        pytest.skip("slow to make, and made as the others are")
    orla = two(make_orla, engine)
    graph = shape(chat(engine))
    node = "model" if shape in (deep, by_hand) else "say"
    seen = {each.stage for each in orla.stages(graph).walk()}
    assert {f"tools|researcher|{node}", f"tools|critic|{node}"} <= seen, "they show before anything runs"
    run(orla.wrap(graph, mapper={"researcher": "heavy", f"tools|critic|{node}": "light", "*": "light"}))
    ran = went(orla)
    assert (ran[f"tools|researcher|{node}"], ran[f"tools|critic|{node}"]) == ("heavy", "light")
    assert set(ran) <= seen
    calls = len(orla.records())
    run(orla.wrap(graph, mapper={f"tools|{node}": "heavy", "*": "light"}))  # as configurations had it
    later = {record.stage: record.backend for record in orla.records()[calls:]}
    assert (later[f"tools|researcher|{node}"], later[f"tools|critic|{node}"]) == ("heavy", "heavy")


def supervisor(llm: Any) -> Any:
    made = pytest.importorskip("langgraph_supervisor", reason="needs the package langgraph-supervisor")
    return made.create_supervisor(
        [create_agent(llm, name="orders"), create_agent(llm, name="poet")], model=llm
    ).compile()


def swarm(llm: Any) -> Any:
    made = pytest.importorskip("langgraph_swarm", reason="needs the package langgraph-swarm")
    orders = create_agent(llm, [made.create_handoff_tool(agent_name="poet")], name="orders")
    return made.create_swarm([orders, create_agent(llm, name="poet")], default_active_agent="orders").compile()


@pytest.mark.filterwarnings("ignore:create_react_agent has been moved")
@pytest.mark.parametrize("shape", [supervisor, swarm], ids=lambda each: each.__name__)
def test_the_agents_of_a_team_are_told_apart(engine: StubEngine, make_orla: MakeOrla, shape: Any) -> None:
    orla = two(make_orla, engine)
    graph = orla.wrap(shape(chat(engine)), mapper={"orders": "heavy", "poet": "light", "*": "light"})
    for _ in range(6):  # a supervisor's tools come in any order: one of both agents at a time
        graph.invoke(HI)
        if shape is swarm or {"orders|model", "poet|model"} <= set(went(orla)):
            break
    ran = went(orla)
    assert ran.get("orders|model", "heavy") == "heavy" and ran.get("poet|model", "light") == "light"
    assert shape is supervisor or {"orders|model", "poet|model"} <= set(ran)


# ── names ────────────────────────────────────────────────────────────────────────────────────────────


@BOTH
def test_a_graph_without_a_name_stays_a_part_of_the_node(engine: StubEngine, make_orla: MakeOrla, run: Any) -> None:
    orla, llm = two(make_orla, engine), chat(engine)
    graph = calling(asking(speaks(llm), "a"), asking(create_agent(llm, name="critic"), "b"), name="outer")
    assert {"tools|say", "tools|critic|model"} <= {each.stage for each in orla.stages(graph).walk()}
    run(orla.wrap(graph, mapper={"tools|say": "heavy", "*": "light"}))
    assert went(orla) == {"tools|say": "heavy", "tools|critic|model": "light"}


def test_an_agent_without_a_name_has_not_that_of_the_agent_around_it(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla, llm = two(make_orla, engine), chat(engine)
    outer = create_agent(llm, [asking(create_agent(llm), "a")], name="boss")
    orla.wrap(outer).invoke(HI)
    assert set(went(orla)) == {"model", "tools|model"}


def test_two_graphs_of_one_name_are_one_stage(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla, llm = two(make_orla, engine), chat(engine)
    graph = calling(asking(speaks(llm, "same"), "a"), asking(create_agent(llm, name="same"), "b"))
    orla.wrap(graph, mapper={"same": "heavy", "same|say": "light", "*": "light"}).invoke(HI)
    assert went(orla) == {"tools|same|say": "light", "tools|same|model": "heavy"}


@BOTH
def test_graphs_in_tools_of_graphs_in_tools(engine: StubEngine, make_orla: MakeOrla, run: Any) -> None:
    orla, llm = two(make_orla, engine), chat(engine)
    inner = calling(asking(speaks(llm, "critic"), "a"), name="researcher")
    graph = calling(asking(inner, "b"))
    stage = "tools|researcher|tools|critic|say"
    assert stage in {each.stage for each in orla.stages(graph).walk()}
    for name in (stage, "researcher", "critic", "critic|say", "tools|tools|say", "tools|critic|say", "say",
                 "researcher|tools|say", "tools|researcher"):  # fmt: skip
        run(orla.wrap(graph, mapper={name: "heavy", "*": "light"}))
        assert went(orla) == {stage: "heavy"}, name
    run(orla.wrap(graph, mapper={"researcher": "light", "tools|tools|say": "light", "critic|say": "heavy"}))
    assert went(orla) == {stage: "heavy"}, "what names the nearest graph is most specific"


def test_a_name_with_what_a_key_gives_a_meaning(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla, llm = two(make_orla, engine), chat(engine)
    graph = calling(asking(speaks(llm, "a|b: c"), "a"), asking(speaks(llm, "7"), "b"))
    known = {each.stage for each in orla.stages(graph).walk() if each.stage}
    orla.wrap(graph).invoke(HI)
    assert set(went(orla)) == {"tools|a_b_ c|say", "tools|_7|say"} == known - {"first", "tools"}


def test_a_graph_beside_a_tool_is_not_in_it(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla, llm = two(make_orla, engine), chat(engine)
    inside, beside = speaks(llm, "inside"), speaks(llm, "beside")
    ask = asking(inside, "ask")

    def work(state: MessagesState) -> Any:
        ask.invoke({"question": "?"})
        return beside.invoke(HI)

    orla.wrap(StateGraph(MessagesState).add_node("work", work).add_edge(START, "work")).invoke(HI)
    assert [record.stage for record in orla.records()] == ["work|inside|say", "work|say"]


def test_a_subgraph_in_a_graph_in_a_tool_has_the_nodes_name(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla, llm = two(make_orla, engine), chat(engine)
    desk = StateGraph(MessagesState).add_node("desk", speaks(llm, "unused")).add_edge(START, "desk")
    graph = calling(asking(RunnableLambda(lambda state: state) | desk.compile(name="office"), "a"))
    assert "tools|office|desk|say" in {each.stage for each in orla.stages(graph).walk()}
    orla.wrap(graph).invoke(HI)
    assert set(went(orla)) == {"tools|office|desk|say"}


def test_names_below_a_tool_node_are_not_refused(
    engine: StubEngine, make_orla: MakeOrla, caplog: pytest.LogCaptureFixture
) -> None:
    orla, llm = two(make_orla, engine), chat(engine)
    graph = calling(asking(speaks(llm, "researcher"), "a"))
    orla.wrap(graph, mapper={"tools|critic|model": "heavy", "tools|researcher|say": "heavy", "*": "light"})
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "orla_lg"):
        orla.wrap(graph, mapper={"tools|reseacher|say": "heavy", "*": "light"})
        orla.wrap(graph, limits=Limits(stages={"tools|researcher|sey": Limit(1)}))
    near = [record.getMessage().partition(";")[2] for record in caplog.records]
    assert len(near) == 2 and all("'tools|researcher|say' is the nearest" in each for each in near)
    with pytest.raises(MappingError, match=r"did you mean 'tools\|researcher\|say'"):
        orla.wrap(graph, mapper={"toools|researcher|say": "heavy", "*": "light"})


# ── what else is said by stage ───────────────────────────────────────────────────────────────────────


def test_limits_of_all_and_of_one(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = two(make_orla, engine)
    graph = compiled_with_a_name(chat(engine))
    orla.wrap(graph, limits=Limits(stages={"tools|say": Limit(calls=2)})).invoke(HI)
    (state,) = orla.statistics().limits
    assert (state.name, state.spent.calls) == ("tools|say", 2), "both together"
    limited = orla.wrap(graph, limits=Limits(stages={"critic": Limit(calls=0), "tools|say": Limit(calls=9)}))
    with pytest.raises(BudgetExceeded, match=r"'tools\|critic'"):
        limited.invoke(HI)


def test_hints_of_all_and_of_one(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = two(make_orla, engine)
    said = {"tools|say": Hints(priority=3, tenant="acme"), "tools|critic|say": Hints(priority=7)}
    orla.wrap(compiled_with_a_name(chat(engine)), hints=lambda stage, state: said.get(stage)).invoke(HI)
    assert {record.stage: (record.priority, record.tenant) for record in orla.records()} == {
        "tools|researcher|say": (3, "acme"), "tools|critic|say": (7, "acme"),
    }  # fmt: skip


def test_policies_of_all_and_of_one(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = two(make_orla, engine, request_policy={"tools|model": "edf", "critic": "sjf"})
    policies = orla.core.serving.schedulers["light"].queue.policies
    stages = [StageKey(f"tools|{name}|model", (1,)) for name in ("researcher", "critic")]
    assert [type(policies.of(stage)).__name__ for stage in stages] == ["EarliestDeadline", "ShortestJob"]


def test_what_was_learned_of_all_is_where_each_begins(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = two(make_orla, engine)
    graph = orla.wrap(compiled_with_a_name(chat(engine)))
    estimates, name = orla.core.serving.estimates, next(iter(orla.core.serving.lookahead._forecasts))
    common = StageEstimates()
    for _ in range(40):
        common.answer_tokens.learn(1000.0)
    estimates._stages.set((name, "tools|say"), common)
    stage = StageKey("tools|critic|say", (1,))
    assert estimates.answer_tokens(name, stage) == 1000.0
    graph.invoke(HI)
    learned = estimates.answer_tokens(name, stage)
    assert learned is not None and 0 < learned < 1000.0, "its own count more than what it began with"
    assert estimates.answer_tokens(name, "tools|say") == 1000.0


def test_what_comes_next_is_seen_through_a_tool(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla, llm = two(make_orla, engine), chat(engine)
    builder = StateGraph(MessagesState).add_node("work", calling(asking(speaks(llm, "critic"), "a")))
    builder.add_node("reply", lambda state: {"messages": [llm.invoke("hi")]})
    graph = orla.wrap(builder.add_edge(START, "work").add_edge("work", "reply"))
    for _ in range(3):
        graph.invoke(HI)
    forecast = next(
        each for each in orla.core.serving.lookahead._forecasts.values() if "reply" in each.structure.edges
    )
    chances = forecast.next_calls(["work|tools"])
    assert chances[("work|tools|critic|say", "light")] > chances.get(("reply", "light"), 0.0)
    assert set(forecast.next_calls(["work|tools|critic|say"])) == {("reply", "light")}
