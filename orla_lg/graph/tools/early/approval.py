"""Which tools' calls are approved before they run: what a human, or a guard, may still refuse never starts early.

LangChain's middleware for that, and LangGraph's own stops, show in a compiled graph. A ``wrap_tool_call`` of a user's
own that refuses calls does not: a tool that it guards is not to be declared safe.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import MethodType
from typing import Any

from langgraph.prebuilt import ToolNode
from langgraph.pregel import Pregel

from orla_lg.graph.reached import reached_by
from orla_lg.graph.structure import AnyPregel, unbound


def approved_in(graph: AnyPregel) -> set[str]:
    """Return the names of the tools whose calls are approved in a graph, or in a graph inside it."""
    found, seen, waiting = set[str](), set[int](), list[Any]([graph])
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Pregel):
            bound = [unbound(node.bound) for node in thing.nodes.values()]
            found |= approved_by(bound)
            waiting += bound
        else:
            waiting += reached_by(thing)
    return found


def approved_by(nodes: Collection[Any]) -> set[str]:
    """Return the names of the tools whose calls the middleware among a graph's nodes approves, edits or rejects."""
    found = set[str]()
    for bound in nodes:
        for function in (getattr(bound, "func", None), getattr(bound, "afunc", None)):
            asks = getattr(getattr(function, "__self__", None), "interrupt_on", None)  # HumanInTheLoopMiddleware
            if isinstance(asks, Mapping):
                found.update(name for name in asks if isinstance(name, str))
        if isinstance(bound, ToolNode):
            found.update(*map(_guarded_by, _around_calls(bound)))
    return found


def _around_calls(node: ToolNode) -> Iterator[object]:
    """Yield the middleware that a tool node runs its calls through."""
    waiting: list[Any] = [getattr(node, name, None) for name in ("_wrap_tool_call", "_awrap_tool_call")]
    seen = set[int]()
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        if isinstance(function, MethodType):
            yield function.__self__
        for cell in getattr(function, "__closure__", None) or ():
            try:
                held = cell.cell_contents
            except ValueError:  # not yet bound
                continue
            if callable(held):
                waiting.append(held)


def _guarded_by(middleware: object) -> Collection[str]:
    """Return the names of the tools that an ``AutoModeMiddleware`` lets a model approve."""
    if not any(kind.__name__ == "AutoModeMiddleware" for kind in type(middleware).__mro__):
        return ()
    tools = getattr(getattr(middleware, "config", None), "tools", ())
    return [(tool if isinstance(tool, str) else tool.name).strip() for tool in tools]


def halts(graph: AnyPregel, nodes: Mapping[str, Any]) -> str | None:
    """Return why all tools of a graph wait for a human: it is compiled to stop after the nodes that call models."""
    after = graph.interrupt_after_nodes
    stops = after == "*" or any(name in nodes and not isinstance(nodes[name], ToolNode) for name in after)
    return "the graph is compiled with interrupt_after, so that a human sees its calls first" if stops else None


def before(graph: AnyPregel, node: str) -> str | None:
    """Return why the tools of a node wait for a human: the graph is compiled to stop before it."""
    before = graph.interrupt_before_nodes
    stops = before == "*" or node in before
    return "its node is compiled with interrupt_before, so that a human sees its calls first" if stops else None
