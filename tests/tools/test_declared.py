"""Which tools of a graph may start early: what declares them safe, what leaves them out, and what is said of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import Callbacks
from langchain_core.tools import BaseTool, InjectedToolArg, StructuredTool, Tool, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import InjectedState, InjectedStore, ToolNode, ToolRuntime

from orla_lg import ConfigError
from orla_lg.graph.tools.declared import DeclaredTools, SafeTools, safe_tools
from orla_lg.graph.tools.early.fitness import needs_its_place
from orla_lg.graph.tools.early.reasons import LeftOut
from tests.tools.conftest import Lab


@tool
def look(x: int) -> str:
    """Look at x."""
    return f"seen {x}"


@tool
def send(x: int) -> str:
    """Send x."""
    return f"sent {x}"


def named(name: str, **settings: Any) -> StructuredTool:
    def run(x: int) -> str:
        return f"{name} {x}"

    return StructuredTool.from_function(run, name=name, description=name, **settings)


def declared(*names: str, mcp: bool = False, splits: bool = False) -> DeclaredTools:
    return DeclaredTools.of(names, believes_mcp=mcp, splits=splits)


@pytest.mark.parametrize(
    ("metadata", "names", "mcp", "safe"),
    [
        (None, (), False, False),
        (None, ("search",), False, True),
        (None, ("other",), True, False),
        ({"orla": {"safe": True}}, (), False, True),
        ({"orla": {"safe": False}, "readOnlyHint": True}, ("search",), True, False),
        ({"orla": "safe"}, (), False, False),
        ({"readOnlyHint": True}, (), False, False),
        ({"readOnlyHint": True}, (), True, True),
        ({"readOnlyHint": "yes"}, (), True, False),
        ({"readOnlyHint": False, "idempotentHint": True}, (), True, False),
    ],
)
def test_what_declares_a_tool_safe(metadata: Any, names: tuple[str, ...], mcp: bool, safe: bool) -> None:
    assert declared(*names, mcp=mcp).safe(named("search", metadata=metadata)) is safe


@pytest.mark.parametrize("names", ["search", {"search": True}, [1], [""], [None], 7, look])
def test_names_are_a_collection_of_texts(lab: Lab, served: Callable[..., Any], names: Any) -> None:
    with pytest.raises(ConfigError, match="tools_safe"):
        served(create_agent(lab.model(), [look]), tools_safe=names)


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"safe": "yes"}, "metadata['orla']['safe'] must be true or false, got 'yes'"),
        ({"safe": 1}, "metadata['orla']['safe'] must be true or false, got 1"),
        ({"final_prefix": None}, "metadata['orla']['final_prefix'] must be true or false, got None"),
        ({"safe": True, "save": True}, "metadata['orla']: unknown key 'save'; did you mean 'safe'?"),
        (True, "metadata['orla'] must be a dict such as {'safe': True}, got True"),
        ("safe", "metadata['orla'] must be a dict such as {'safe': True}, got 'safe'"),
    ],
)
def test_what_a_tool_says_wrongly_of_itself_is_refused(
    lab: Lab, served: Callable[..., Any], caplog: pytest.LogCaptureFixture, own: Any, says: str
) -> None:
    wrong = named("search", metadata={"orla": own})
    with pytest.raises(ConfigError) as refused:
        served(create_agent(lab.model(), [wrong]))
    assert str(refused.value).startswith(f"tool 'search': {says}")
    tools = SafeTools(declared("look"))
    for _ in range(2):  # one that only shows when it runs is left out
        tools.used(wrong, "act:1")
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        f"tool 'search': {says}".partition(";")[0]
    ]
    assert not tools.names


@pytest.mark.parametrize("given", [[look], (look, "send"), {"look"}, ["look"], {"look": 1}.keys(), None, []])
def test_tools_are_taken_for_their_names(lab: Lab, served: Callable[..., Any], given: Any) -> None:
    wanted = {"look", "send"} if isinstance(given, tuple) else {"look"} if given else set()
    assert DeclaredTools.of(given, believes_mcp=False, splits=False).names == wanted
    served(create_agent(lab.model(), [look, send]), tools_safe=given)


def of(graph: Any, *names: str, **how: Any) -> SafeTools | None:
    return safe_tools(graph, declared(*names, **how))


def known(graph: Any, *names: str, **how: Any) -> set[str]:
    found = of(graph, *names, **how)
    return set() if found is None else set(found.names)


def test_nothing_declared_is_nothing(lab: Lab) -> None:
    agent = create_agent(lab.model(), [look, named("read", metadata={"readOnlyHint": True})])
    assert of(agent) is None
    assert known(agent, mcp=True) == {"read"}
    assert known(create_agent(lab.model(), [named("own", metadata={"orla": {"safe": True}})])) == {"own"}
    splitting = of(agent, splits=True)
    assert splitting is not None and splitting.splits and not splitting.names


def _in_a_subgraph(lab: Lab) -> Any:
    graph = StateGraph(MessagesState)
    graph.add_node("inner", create_agent(lab.model(), [look]))
    graph.add_edge(START, "inner")
    return graph.compile()


def _in_a_tools_graph(lab: Lab) -> Any:
    inner = create_agent(lab.model(), [look], name="finder")

    @tool
    def find(x: int) -> str:
        """Find."""
        return str(inner.invoke({"messages": [("user", str(x))]})["messages"][-1].content)

    return create_agent(lab.model(), [find])


def _in_a_task(lab: Lab) -> Any:
    @task
    def act(call: Any) -> Any:
        return look.invoke(call)

    @entrypoint()
    def work(given: Any) -> Any:
        return act(given).result()

    return work


@pytest.mark.parametrize(
    ("build", "within", "node"),
    [
        (lambda lab: create_agent(lab.model(), [look]), "", "tools"),
        (_in_a_subgraph, "inner", "tools"),
        (_in_a_tools_graph, "tools|finder", "tools"),
        (_in_a_task, "work", "act"),
    ],
)
def test_tools_are_found_where_they_run(lab: Lab, build: Callable[[Lab], Any], within: str, node: str) -> None:
    tools = of(build(lab), "look")
    assert tools is not None
    place = tools.place("look", f"{within}|model" if within else "model")
    assert place is not None and (place.tool, place.within, place.node) == (look, within, node)


def test_a_name_means_the_tool_of_the_models_own_graph_or_of_none(lab: Lab) -> None:
    one, other = named("search"), named("search")
    graph = StateGraph(MessagesState)
    graph.add_node("a", create_agent(lab.model(), [one]))
    graph.add_node("b", create_agent(lab.model(), [other]))
    graph.add_node("c", lambda state: state)
    graph.add_edge(START, "a")
    tools = of(graph.compile(), "search")
    assert tools is not None
    found = [tools.place("search", stage) for stage in ("a|model", "b|model", "c")]
    assert [None if place is None else place.tool for place in found] == [one, other, None]
    body = {"tools": [{"type": "function", "function": {"name": "search"}}, {"name": "search"}, {"type": "web"}, 7]}
    assert (list(tools.offered(body, "a|model")), list(tools.offered(body, "c"))) == (["search", "search"], [])
    assert not tools.offered({}, "a|model") and not tools.offered({"tools": "search"}, "a|model")


@pytest.mark.parametrize(
    "how", [{"interrupt_before": ["tools"]}, {"interrupt_before": "*"}, {"interrupt_after": ["think"]}]
)
def test_what_a_graph_stops_before_waits_for_its_human(lab: Lab, how: Any, caplog: pytest.LogCaptureFixture) -> None:
    graph = StateGraph(MessagesState)
    graph.add_node("think", lambda state: state)
    graph.add_node("tools", ToolNode([look, send]))
    graph.add_edge(START, "think")
    graph.add_edge("think", "tools")
    assert known(graph.compile(checkpointer=InMemorySaver(), **how), "look") == set()
    assert "'look' of graph 'LangGraph' is declared safe and does not start early" in caplog.text
    assert "'send'" not in caplog.text
    assert known(graph.compile(), "look") == {"look"}


def test_a_tool_that_denies_what_wrap_says_of_it_is_warned_of(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    own = named("own", metadata={"orla": {"safe": False}})
    safe = safe_tools(create_agent(lab.model(), [own, look]), declared("own", "look"))
    assert safe is not None and safe.names == {"look"}
    (said,) = [record.message for record in caplog.records]
    assert "'own'" in said and "not safe" in said


def test_a_name_that_no_tool_has_is_said_once_with_the_nearest(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    tools = of(create_agent(lab.model(), [look, send]), "lok", "send")
    assert tools is not None and tools.names == {"send"}
    assert "tools_safe names 'lok', which no tool of graph 'LangGraph' has" in caplog.text
    assert "did you mean 'look'?" in caplog.text
    assert len(caplog.records) == 1
    caplog.clear()

    @entrypoint()
    def work(given: Any) -> Any:
        return given

    assert of(work, "later") is not None and not caplog.records, "what shows no tools may run any"


def test_a_tool_is_learned_where_it_runs_and_left_out_when_it_needs_its_place() -> None:
    tools = SafeTools(declared("look"))
    tools.used(send, "act:1")
    assert not tools.names
    tools.used(look, "work:1|act:2")
    place = tools.place("look", "work|think")
    assert place is not None and (place.within, place.node) == ("work", "act")
    tools.leave_out(look, LeftOut.NEEDS_ITS_PLACE)
    assert tools.place("look", "work|think") is None
    tools.used(look, "work:1|act:2")
    assert tools.place("look", "work|think") is None


# What a tool needs of its place


@tool
def with_state(x: int, state: Annotated[dict[str, Any], InjectedState]) -> str:
    """Do."""
    return ""


@tool
def with_store(x: int, store: Annotated[Any, InjectedStore()]) -> str:
    """Do."""
    return ""


@tool
def with_runtime(x: int, runtime: ToolRuntime) -> str:
    """Do."""
    return ""


@tool
def with_secret(x: int, user: Annotated[str, InjectedToolArg]) -> str:
    """Do."""
    return ""


@tool
def with_callbacks(x: int, callbacks: Callbacks = None) -> str:
    """Do."""
    return ""


class Own(BaseTool):
    name: str = "own"
    description: str = "Own."

    def _run(self, x: int) -> str:
        return ""


SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "title": "t", "description": "d"}


def _takes_a_runtime(x: int, runtime: Any = None) -> str:
    return ""


def _takes_all(**arguments: Any) -> str:
    return ""


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (look, None),
        (named("direct", return_direct=True), None),
        (Tool("one", lambda text: text, "One."), None),
        (Tool("two", lambda text, callbacks=None: text, "Two."), "'callbacks'"),
        (StructuredTool(name="json", description="j", args_schema=SCHEMA, func=_takes_all), None),
        (StructuredTool(name="json", description="j", args_schema=SCHEMA, func=_takes_a_runtime), "'runtime'"),
        (with_state, "'state'"), (with_store, "'store'"), (with_runtime, "'runtime'"), (with_secret, "'user'"),
        (with_callbacks, "'callbacks'"),
        (Own(), "a way of its own"),
        (StructuredTool(name="none", description="n", args_schema=SCHEMA), "no function"),
    ],
)  # fmt: skip
def test_what_needs_its_place_stays_there(made: BaseTool, why: str | None) -> None:
    found = needs_its_place(made)
    assert found is None if why is None else found is not None and why in found
