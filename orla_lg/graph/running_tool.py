"""The running tool, held in the context it runs in: what graphs inside tools get their names from.

LangGraph's namespaces name nodes, so graphs that the tools of one node run would all have the same stages. A graph
that starts right inside a tool is therefore known by its own name; one without a name is a part of the node.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from orla_lg.core.boundary.stage_keys import graph_part
from orla_lg.graph.running_node import RunningNode, current
from orla_lg.graph.structure import AGENT_NAME, UNNAMED, AnyPregel, name_in_tool

RUN_NAME = "run_name"


@dataclass(eq=False, slots=True)
class RunningTool:
    """One execution of a tool. It is inert once over, wherever its context lingers."""

    run: UUID
    node: RunningNode | None
    """The node that runs it."""
    outer: RunningTool | None
    names: dict[UUID, str] = field(default_factory=dict)
    """Of the chains right inside it."""
    over: bool = False

    def hear(self, chain: UUID, run_name: str, metadata: Mapping[str, Any], here: RunningNode) -> None:
        """Note that a chain starts in node *here*; it may be a graph."""
        if self.node is not None and self.node.chain == here.chain:  # else it is in a node of such a graph
            agent, own = metadata.get(AGENT_NAME), _OWN_NAME.get()
            if agent is not None and agent != here.metadata.get(AGENT_NAME):  # inherited by what runs inside
                name = str(agent)
            else:
                name = own[1] if own is not None and own[0] == run_name else run_name
            self.names[chain] = "" if name == UNNAMED else graph_part(name)


TOOL: ContextVar[RunningTool | None] = ContextVar("orla_running_tool", default=None)

_OWN_NAME: ContextVar[tuple[str, str] | None] = ContextVar("orla_graph_name", default=None)
"""The name under which the graph that starts next is traced, and its own."""


def begin(run: UUID) -> RunningTool | None:
    """Note in this context that a tool starts; ``None`` where another handler did."""
    held = TOOL.get()
    if held is not None and held.run == run:
        return None
    tool = RunningTool(run, current(), running())  # those that are over would pile up in a node that runs many
    TOOL.set(tool)
    return tool


def running() -> RunningTool | None:
    """Return the innermost running tool of this context."""
    tool = TOOL.get()
    while tool is not None and tool.over:
        tool = tool.outer
    return tool


def graph_name(chain: UUID | None) -> str:
    """Return the name of the graph whose chain is *chain*, if it runs right inside a tool of this context."""
    tool = TOOL.get()
    while tool is not None and chain is not None:
        if (name := tool.names.get(chain)) is not None:
            return name
        tool = tool.outer
    return ""


def starts(graph: AnyPregel, config: Mapping[str, Any]) -> None:
    """Note that *graph* is about to start, whose caller may give the run a name: it may differ from run to run."""
    if RUN_NAME in config:
        _OWN_NAME.set((str(config[RUN_NAME]), name_in_tool(graph) or UNNAMED))
