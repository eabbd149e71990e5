"""The graph as written: which stages it has, before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from langchain_core.runnables.base import RunnableBindingBase
from langgraph.func import _TaskFunction
from langgraph.graph.state import CompiledStateGraph
from langgraph.prebuilt import ToolNode
from langgraph.pregel import Pregel

from orla_lg.core.boundary.stage_keys import graph_part, inner_key
from orla_lg.graph.reached import Reached, reached_by
from orla_lg.mappers.stages import KnownStages

AnyPregel = Pregel[Any, Any, Any, Any]

_HIDDEN = frozenset({"__start__", "__end__"})

MADE_BY = "ls_integration"
"""Under this key of a graph's metadata LangChain says what made it."""

AGENT_NAME = "lc_agent_name"
"""And under this one, which agent it is, if it has a name."""

UNNAMED = "LangGraph"
"""What LangGraph calls a graph without a name."""

Kind = Literal["graph", "agent", "node", "tool"]


@dataclass(frozen=True, slots=True)
class GraphPlace:
    """A place in a graph: the graph itself, a node, a tool, or a graph in one of these."""

    name: str
    kind: Kind
    key: str
    """The stage of the calls made there; of a graph or tool in a node, that of the node; of a named graph in a tool,
    the node's with that name. Empty: the whole graph."""
    calls: bool = False
    """It is a node with code of its own, which may call models: a stage."""
    runs_tools: bool = False
    """Its code runs tools, which may run graphs that cannot be seen."""
    is_node: bool = False
    """It is a node, or a task, which runs as one; one whose kind is ``graph`` or ``agent`` is nothing else."""
    inside: tuple[GraphPlace, ...] = ()

    def walk(self) -> Iterator[GraphPlace]:
        """Yield the place and all in it, each before what is inside."""
        yield self
        for each in self.inside:
            yield from each.walk()


def places_of(graph: AnyPregel) -> GraphPlace:
    """Return a graph with its nodes, and the graphs and tools in these, as far as they are visible.

    What code makes, looks up or imports only when it runs cannot be seen from outside.
    """
    return GraphPlace(graph.get_name(), _kind(graph), "", inside=_nodes(graph, "", (graph,)))


def name_in_tool(graph: AnyPregel) -> str:
    """Return the part of a key by which a graph that runs inside a tool is known; empty for one without a name.

    It is the name that the graph's runs bear wherever they are traced: the agent's, or what the graph was bound to or
    compiled with.
    """
    config = graph.config or {}
    name = (config.get("metadata") or {}).get(AGENT_NAME) or config.get("run_name") or graph.get_name()
    return "" if name == UNNAMED else graph_part(str(name))


def stages_of(graph: AnyPregel) -> KnownStages:
    """Return the stages of a graph and of the graphs inside it, by key (``subgraph|node``)."""
    places = list(places_of(graph).walk())
    callers = dict.fromkeys(each.key for each in places if each.calls)
    groups = dict.fromkeys(each.key for each in places if each.is_node and each.key not in callers)
    return KnownStages(tuple(callers), tuple(groups), tuple(each.key for each in places if each.runs_tools))


def title(graph: AnyPregel) -> str:
    """Return what to call a graph in a message."""
    kind = "graph" if isinstance(graph, CompiledStateGraph) else "entrypoint"
    return f"{kind} {graph.get_name()!r}"


def _nodes(graph: AnyPregel, outer: str, around: tuple[object, ...]) -> tuple[GraphPlace, ...]:
    """Return the places of a graph's nodes; *around* are the graphs and tasks being read: each may hold itself."""
    nodes = {name: node.bound for name, node in graph.nodes.items() if name not in _HIDDEN}
    tools = {
        id(tool) for each in nodes.values() if isinstance(each, ToolNode) for tool in each.tools_by_name.values()
    }
    return tuple(_node(name, inner_key(outer, name), bound, around, tools) for name, bound in nodes.items())


def _node(name: str, key: str, bound: Any, around: tuple[object, ...], tools: Collection[int]) -> GraphPlace:
    whole = unbound(bound)
    if isinstance(whole, Pregel):
        return GraphPlace(name, _kind(whole), key, is_node=True, inside=_inner(whole, key, around))
    found = reached_by(bound)
    if not isinstance(bound, ToolNode):  # a model is told of the tools that the graph's tool node runs
        found = [each for each in found if id(each) not in tools]
    inside = tuple(_part(each, key, around) for each in found)
    runs_tools = isinstance(bound, ToolNode)
    return GraphPlace(name, "node", key, calls=True, runs_tools=runs_tools, is_node=True, inside=inside)


def _part(part: Reached, key: str, around: tuple[object, ...]) -> GraphPlace:
    """Return the place of a graph, a tool or a task that the code of node *key* runs."""
    if isinstance(part, _TaskFunction):
        name = str(getattr(part.func, "__name__", "task"))
        key = inner_key(key, name)
        if any(part is each for each in around):
            return GraphPlace(name, "node", key, calls=True, is_node=True)
        return _node(name, key, part, (*around, part), frozenset())
    if isinstance(part, Pregel):
        return GraphPlace(part.get_name(), _kind(part), key, inside=_inner(part, key, around))
    graphs = (each for each in reached_by(part) if isinstance(each, Pregel))
    return GraphPlace(part.name, "tool", key, inside=tuple(_in_tool(each, key, around) for each in graphs))


def _in_tool(graph: AnyPregel, key: str, around: tuple[object, ...]) -> GraphPlace:
    """Return the place of a graph that a tool of node *key* runs: by its name, if it has one."""
    if name := name_in_tool(graph):
        key = inner_key(key, name, is_graph=True)
    return GraphPlace(name or graph.get_name(), _kind(graph), key, inside=_inner(graph, key, around))


def _inner(graph: AnyPregel, key: str, around: tuple[object, ...]) -> tuple[GraphPlace, ...]:
    if any(graph is each for each in around):
        return ()
    return _nodes(graph, key, (*around, graph))


def unbound(runnable: Any) -> Any:
    """Return what a runnable binds, at whatever depth."""
    while isinstance(runnable, RunnableBindingBase):
        runnable = runnable.bound
    return runnable


def _kind(graph: AnyPregel) -> Kind:
    """Whether a graph is an agent: LangChain says so of its own; else a model and its tools are its nodes."""
    made_by = str(((graph.config or {}).get("metadata") or {}).get(MADE_BY, ""))
    has_tools = any(isinstance(node.bound, ToolNode) for node in graph.nodes.values())
    return "agent" if "agent" in made_by or (has_tools and {"agent", "model"} & set(graph.nodes)) else "graph"
