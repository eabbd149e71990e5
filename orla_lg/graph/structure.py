"""The graph as written: which stages it has, before anything runs."""

from __future__ import annotations

from typing import Any

from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel

from orla_lg.core.identity import NAMESPACE_SEPARATOR

AnyPregel = Pregel[Any, Any, Any, Any]

_HIDDEN = frozenset({"__start__", "__end__"})


def stages_of(graph: AnyPregel) -> list[str]:
    """Return the stage keys of a graph and its subgraphs (``subgraph|node``), as far as they are visible.

    A graph that is only called inside a node's function cannot be seen from outside.
    """
    stages = []
    for name, node in graph.nodes.items():
        if name in _HIDDEN:
            continue
        stages.append(name)
        for inner in node.subgraphs:
            if isinstance(inner, Pregel):
                stages += [f"{name}{NAMESPACE_SEPARATOR}{stage}" for stage in stages_of(inner)]
    return stages


def title(graph: AnyPregel) -> str:
    """Return what to call a graph in a message."""
    kind = "graph" if isinstance(graph, CompiledStateGraph) else "entrypoint"
    return f"{kind} {graph.get_name()!r}"
