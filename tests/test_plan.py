"""The tree of stages, as ``orla.stages`` returns and ``orla-lg plan`` prints it: agents, subgraphs, tools."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelRequest
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import BaseTool, tool
from langgraph.func import entrypoint, task
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode

from orla_lg import Limit, Limits, Orla, StageTree
from orla_lg.cli import main
from orla_lg.graph.stage_tree import picture
from tests.conftest import at, chat
from tests.stub_engine import StubEngine

ROOT = Path(__file__).parents[1]
HI: Any = {"messages": [("user", "critic")]}


@tool
def look_up(order: str) -> str:
    """Return what is known of an order."""
    return f"order {order}: shipped"


@tool
def weigh(order: str) -> str:
    """Return what an order weighs."""
    return "2 kg"


def agent(llm: Any, *tools: Any, name: str = "agent") -> Any:
    return create_agent(llm, [look_up, *tools], name=name)


def expert_in_a_tool(llm: Any) -> Any:
    expert = agent(llm, name="expert")

    @tool
    def ask(question: str) -> str:
        """Ask an expert."""
        return str(expert.invoke(HI)["messages"][-1].text)

    return create_agent(llm, [ask, look_up], name="asking")


def alone(llm: Any) -> Any:
    return agent(llm)


def as_a_node(llm: Any) -> Any:
    return StateGraph(MessagesState).add_node("support", agent(llm)).add_edge(START, "support").compile()


def supervisor(llm: Any) -> Any:
    made = pytest.importorskip("langgraph_supervisor", reason="needs the package langgraph-supervisor")
    team = [agent(llm, name="orders"), create_agent(llm, [], name="poet")]
    return made.create_supervisor(team, model=llm).compile()


def swarm(llm: Any) -> Any:
    made = pytest.importorskip("langgraph_swarm", reason="needs the package langgraph-swarm")
    orders = create_agent(llm, [made.create_handoff_tool(agent_name="poet"), look_up], name="orders")
    poet = create_agent(llm, [made.create_handoff_tool(agent_name="orders")], name="poet")
    return made.create_swarm([orders, poet], default_active_agent="orders").compile()


class AsksForTheTask(AgentMiddleware):
    """Lets the model hand its first message to a subagent, as the stub would not of itself."""

    def wrap_model_call(self, request: ModelRequest, handler: Callable[[ModelRequest], Any]) -> Any:
        return handler(request.override(tool_choice={"type": "function", "function": {"name": "task"}}))


def deep(llm: Any) -> Any:
    made = pytest.importorskip("deepagents", reason="needs the package deepagents")
    critic = {"name": "critic", "description": "judges", "system_prompt": "judge", "tools": [look_up]}
    return made.create_deep_agent(llm, tools=[look_up], subagents=[critic], middleware=[AsksForTheTask()])


SHAPES: dict[Callable[[Any], Any], list[str]] = {
    alone: ["agent (agent)", "model model", "tools tools", "look_up (tool)"],
    as_a_node: [
        "LangGraph (graph)", "support (agent)", "model support|model", "tools support|tools", "look_up (tool)",
    ],
    expert_in_a_tool: [
        "asking (agent)", "model model", "tools tools", "ask (tool)", "expert (agent)", "model tools|expert|model",
        "tools tools|expert|tools", "look_up (tool)", "look_up (tool)",
    ],
    supervisor: [
        "LangGraph (graph)", "supervisor (agent)", "agent supervisor|agent", "tools supervisor|tools",
        "transfer_to_orders (tool)", "transfer_to_poet (tool)", "orders orders", "orders (agent)",
        "model orders|model", "tools orders|tools", "look_up (tool)", "poet poet", "poet (agent)", "model poet|model",
    ],
    swarm: [
        "LangGraph (graph)", "orders (agent)", "model orders|model", "tools orders|tools", "transfer_to_poet (tool)",
        "look_up (tool)", "poet (agent)", "model poet|model", "tools poet|tools", "transfer_to_orders (tool)",
    ],
    deep: [
        "LangGraph (agent)", "model model", "tools tools", "task (tool)", "critic (agent)",
        "model tools|critic|model", "tools tools|critic|tools",
    ],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:create_react_agent has been moved")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_the_tree_is_what_runs(engine: StubEngine, orla: Orla, shape: Callable[[Any], Any]) -> None:
    graph = shape(chat(engine))
    tree = orla.stages(graph)
    drawn = [f"{each.title} {each.stage}".strip() for each in tree.walk()]
    if shape is deep:  # it brings tools of its own
        assert [line for line in drawn if line in SHAPES[deep]][:3] == SHAPES[deep][:3]
        assert set(SHAPES[deep]) <= set(drawn)
    else:
        if shape is supervisor:  # which makes its tools from a set of names: their order differs between processes
            drawn[4:6] = sorted(drawn[4:6])
        assert drawn == SHAPES[shape]
    orla.wrap(graph).invoke(HI)
    ran = {record.stage for record in orla.records()}
    assert ran <= {each.stage for each in tree.walk() if each.stage}
    assert shape is not deep or "tools|critic|model" in ran
    assert all(each.by == "mapping['*']" for each in tree.walk() if each.stage)


# What a node's code reaches


class Desk:
    """A node that is a method, and holds its agent."""

    def __init__(self, llm: Any) -> None:
        self._experts = {"first": agent(llm, name="held")}

    def run(self, state: MessagesState) -> Any:
        return self._experts["first"].invoke(HI)


class Asks(BaseTool):
    """A tool that is a class, and holds its agent."""

    name: str = "asks"
    description: str = "Asks."
    expert: Any = None

    def _run(self, question: str) -> str:
        return str(self.expert.invoke(HI))


def by_a_method(llm: Any) -> Any:
    return Desk(llm).run


def by_a_helper(llm: Any) -> Any:
    inner = agent(llm, name="held")

    def helper(state: Any) -> Any:
        return inner.invoke(state)

    def run(state: MessagesState) -> Any:
        return helper(state)

    return run


def by_a_sequence(llm: Any) -> Any:
    return RunnableLambda(lambda state: state) | agent(llm, name="held") | RunnableLambda(lambda state: {})


def by_one_of_two(llm: Any) -> Any:
    first, second = agent(llm, name="other"), agent(llm, name="held")

    def run(state: MessagesState) -> Any:
        return (first if state["messages"] else second).invoke(HI)

    return run


def by_retries(llm: Any) -> Any:
    inner = agent(llm, name="held").with_retry()

    async def run(state: MessagesState) -> Any:
        return await inner.ainvoke(HI)

    return run


def by_a_tool_that_is_a_class(llm: Any) -> Any:
    return ToolNode([Asks(expert=agent(llm, name="held"))])


def by_a_graph_as_a_tool(llm: Any) -> Any:
    return ToolNode([agent(llm, name="held").as_tool(name="held", description="held")])


REACHED = [
    by_a_method, by_a_helper, by_a_sequence, by_one_of_two, by_retries, by_a_tool_that_is_a_class,
    by_a_graph_as_a_tool,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:This API is in beta")
@pytest.mark.parametrize("reached", REACHED, ids=lambda each: each.__name__)
def test_an_agent_in_a_nodes_code_is_found(engine: StubEngine, orla: Orla, reached: Callable[[Any], Any]) -> None:
    builder = StateGraph(MessagesState).add_node("ask", reached(chat(engine))).add_edge(START, "ask")
    found = {each.name: each for each in orla.stages(builder).walk()}
    inside = "ask|held" if reached in (by_a_tool_that_is_a_class, by_a_graph_as_a_tool) else "ask"
    assert [each.stage for each in found["held"].walk() if each.stage] == [f"{inside}|model", f"{inside}|tools"]


def test_a_graph_that_holds_itself_ends(engine: StubEngine, orla: Orla) -> None:
    held: dict[str, Any] = {}

    def again(state: MessagesState) -> Any:
        return held["graph"].invoke(state)

    held["graph"] = StateGraph(MessagesState).add_node("again", again).add_edge(START, "again").compile()
    assert [each.stage for each in orla.stages(held["graph"]).walk()] == ["", "again", ""]


def test_tasks_that_call_each_other_end(engine: StubEngine, orla: Orla) -> None:
    @task
    def ping(n: int) -> int:
        return pong(n).result()

    @task
    def pong(n: int) -> int:
        return n or ping(n - 1).result()

    @entrypoint()
    def flow(n: int) -> int:
        return ping(n).result()

    found = [each.stage for each in orla.stages(flow).walk() if each.stage]
    assert found == ["flow", "flow|ping", "flow|ping|pong", "flow|ping|pong|ping"]
    orla.wrap(flow).invoke(2)


def test_the_tasks_of_an_entrypoint_are_stages(engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    llm = chat(engine)
    polishing = create_agent(llm, [], name="polishing")

    @task
    def draft(text: str) -> str:
        return str(llm.invoke(text).text)

    @task
    def polish(text: str) -> str:
        return str(polishing.invoke(HI)["messages"][-1].text)

    @entrypoint()
    def flow(text: str) -> str:
        return polish(draft(text).result()).result()

    orla = make_orla(at(engine, "light"), at(engine, "heavy"), mapper={"*": "light"})
    drawn = [f"{each.title} {each.stage}".strip() for each in orla.stages(flow).walk()]
    assert drawn == [
        "LangGraph (graph)", "flow flow", "draft flow|draft", "polish flow|polish", "polishing (agent)",
        "model flow|polish|model",
    ]  # fmt: skip
    orla.wrap(flow, mapper={"polish": "heavy"}).invoke("hi")
    assert [(each.stage, each.backend) for each in orla.records()] == [
        ("flow|draft", "light"), ("flow|polish|model", "heavy"),
    ]  # fmt: skip


# What decides


def test_each_stage_has_the_entries_that_hold_for_it(engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    orla = make_orla(
        at(engine, "light"), at(engine, "heavy"), mapper={"support": ["heavy", "light"], "*": "light"},
        limits=Limits(stages={"support": Limit(calls=9)}), request_policy={"tools": "edf"},
    )  # fmt: skip
    inner = expert_in_a_tool(chat(engine))
    builder = StateGraph(MessagesState).add_node("support", inner).add_node("reply", lambda state: {})
    graph = orla.wrap(builder.add_edge(START, "support"), limits=Limits(stages={"support|model": Limit(calls=5)}))
    found = {each.stage: each for each in orla.stages(graph).walk()}
    one = found["support|model"]
    assert (one.backends, one.by, one.open) == (("heavy", "light"), "mapping['support']", False)
    shared = "limits.stages['support']"
    assert one.under == (shared, "limits.stages['support|model'] of graph 'LangGraph'")
    assert found["support|tools|expert|model"].under == (shared, "request_policy['tools']")
    assert (found["reply"].by, found["reply"].under) == ("mapping['*']", ())
    assert [each.stage for each in orla.plan(graph)] == [stage for stage in found if stage], "plan lists the same"
    other = {each.stage: each.by for each in orla.stages(graph, mapper={"model": "light"}).walk()}
    assert (other["support|model"], other["support|tools"]) == ("mapping['model']", "mapping['support']")


def test_text_data_and_picture_show_the_same(engine: StubEngine, orla: Orla) -> None:
    tree = orla.stages(expert_in_a_tool(chat(engine)))
    assert str(tree) == "\n".join([
        "                               stage               runs on  decided by",
        "asking (agent)",
        "├─ model                       model               main     mapping['*']",
        "└─ tools                       tools               main     mapping['*']",
        "   ├─ ask (tool)",
        "   │  └─ expert (agent)",
        "   │     ├─ model              tools|expert|model  main     mapping['*']",
        "   │     └─ tools              tools|expert|tools  main     mapping['*']",
        "   │        └─ look_up (tool)",
        "   └─ look_up (tool)",
    ])  # fmt: skip
    data = json.loads(json.dumps(tree.as_dict()))
    assert data["inside"][0] == {
        "name": "model", "kind": "node", "stage": "model", "backends": ["main"], "decided_by": "mapping['*']",
        "open": False, "under": [],
    }  # fmt: skip
    assert data["inside"][1]["inside"][0]["inside"][0]["name"] == "expert"
    drawn = ET.fromstring(picture(tree))
    texts = [each.text or "" for each in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {each.title for each in tree.walk()} | {each.stage for each in tree.walk() if each.stage} <= set(texts)
    assert "a stage that runs on main" in texts
    escaped = picture(StageTree("a<b", "graph", inside=(StageTree("x&y", "node", "x&y"),)))
    assert ET.fromstring(escaped).find("{http://www.w3.org/2000/svg}title") is not None


def test_many_tools_take_one_line(engine: StubEngine, orla: Orla) -> None:
    def one(n: int) -> BaseTool:
        return look_up.model_copy(update={"name": f"t{n}"})

    few, many = (str(orla.stages(create_agent(chat(engine), [one(n) for n in range(count)]))) for count in (2, 9))
    assert "└─ t0, t1 (tools)" in few and "└─ t0, t1, t2, t3 and 5 more (tools)" in many


# The command

APP = """
from langchain_core.tools import tool
from langgraph.func import entrypoint, task
from langgraph.graph import START, MessagesState, StateGraph

builder = StateGraph(MessagesState).add_node("triage", lambda state: {}).add_edge(START, "triage")
graph = builder.compile(name="desk")
bound = graph.with_retry()
number = 3
"""

CONFIG = """
[backends.light]
url = "http://127.0.0.1:1/v1"

[mapping]
triage = "light"
suport = "light"
"*" = "light"

[limits.stages.triage]
calls = 5
"""


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "desk_app.py").write_text(APP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("desk_app", None)


@pytest.mark.parametrize("named", ["desk_app:graph", "desk_app:builder", "desk_app:bound", "desk_app.py:graph"])
def test_the_command_shows_a_graph(app: Path, capsys: pytest.CaptureFixture[str], named: str) -> None:
    (app / "orla.toml").write_text(CONFIG)
    assert main(["plan", named]) == 0
    shown = capsys.readouterr().out
    (row,) = [line.split() for line in shown.splitlines() if "└─" in line]
    assert row == ["└─", "triage", "triage", "light", "mapping['triage']", "limits.stages['triage']"]
    assert "note: the shared mapping names stage 'suport', which the graph does not have" in shown


def test_the_command_without_a_configuration_shows_the_stages(app: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "desk_app:graph", "--svg", "stages.svg"]) == 0
    shown = capsys.readouterr().out
    assert "└─ triage" in shown and "no orla.toml is here or above" in shown and "runs on" not in shown
    assert ET.fromstring((app / "stages.svg").read_text()).tag.endswith("svg")
    (app / "other.toml").write_text(CONFIG)
    assert main(["plan", "desk_app:graph", "--config", "other.toml", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["inside"][0]["decided_by"] == "mapping['triage']" and "suport" in told["notes"][0]


@pytest.mark.parametrize(
    ("named", "fault"),
    [
        ("desk_app", "expected MODULE:NAME"), (":graph", "expected MODULE:NAME"),
        ("desk_ap:graph", "graph 'desk_ap:graph': desk_ap cannot be imported from"),
        ("desk_app:grap", "has no 'grap'; did you mean 'graph'? known: bound, builder, graph"),
        ("desk_app:number", "expected a StateGraph or a compiled LangGraph graph, got int"),
    ],
)  # fmt: skip
def test_the_command_says_what_is_no_graph(
    app: Path, capsys: pytest.CaptureFixture[str], named: str, fault: str
) -> None:
    assert main(["plan", named]) == 2
    assert fault in capsys.readouterr().err
    (app / "orla.toml").write_text("[backends")
    assert main(["plan", "desk_app:graph"]) == 2 and "not valid TOML" in capsys.readouterr().err


def test_a_terminal_gets_a_table(
    app: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["plan", "desk_app:graph"]) == 0 and "└─ triage" in capsys.readouterr().out


def test_the_pages_picture_and_tree_are_what_the_command_makes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["plan", "examples.stages:graph", "--svg", str(tmp_path / "stages.svg")]) == 0
    sys.modules["examples.stages"].orla.close()
    assert (tmp_path / "stages.svg").read_text() == (ROOT / "docs" / "stages.svg").read_text()
    tree = capsys.readouterr().out.partition("\n\n")[0]
    assert tree in (ROOT / "docs" / "mapping.md").read_text()
