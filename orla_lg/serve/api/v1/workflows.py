"""The graphs of workflows that v1's clients register, as data labels flow along them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from orla_lg.core.lookahead.structure import START, Edge, GraphStructure
from orla_lg.serve.gateway.identity import safe_name
from orla_lg.serve.posted.book import PostedItems
from orla_lg.serve.posted.items import PostedWorkflow

DONE = "__done__"
"""What a workflow's last stages lead to. Nothing follows it: to its client, a workflow is one pass."""

SetGraph = Callable[[str, str, GraphStructure], None]
"""Lets a workflow, by its key, have a graph of a name."""


class RegisteredGraphs:
    """Hands the graphs of registered workflows on as they come.

    Args:
        set_graph: To what labels follow.
    """

    def __init__(self, set_graph: SetGraph) -> None:
        self._set_graph = set_graph
        self._versions = dict[str, int]()

    def follow(self, items: PostedItems) -> None:
        """Hand on those that changed."""
        known, self._versions = self._versions, {}
        for key, stored in items.of(PostedWorkflow).items():
            self._versions[key] = stored.version
            if known.get(key) != stored.version:
                self._set_graph(key, f"workflow {key}", structure_of(stored.item))


def structure_of(workflow: PostedWorkflow) -> GraphStructure:
    """Return a registered graph: any stage of it may be the first, and all of a stage's edges may be taken."""
    onward: defaultdict[str, set[str]] = defaultdict(set)
    stages = dict[str, None]()
    for edge in workflow.edges:
        begin, end = named(edge.from_), named(edge.to)
        onward[begin].add(end)
        stages |= {begin: None, end: None}
    declassifies: defaultdict[str, frozenset[str]] = defaultdict(frozenset)
    for each in workflow.declassifications:
        stages.setdefault(named(each.stage_id))
        declassifies[named(each.stage_id)] |= frozenset(each.labels)
    edges = {stage: _edge(onward[stage] or {DONE}) for stage in stages}
    return GraphStructure({START: _edge(stages), **edges, DONE: _edge([DONE])}, declassifies=dict(declassifies))


def _edge(ends: Iterable[str]) -> Edge:
    return Edge(perhaps=frozenset(ends))


def named(stage: str) -> str:
    """Return a stage as its calls name it."""
    found = safe_name(stage)
    assert found is not None, "a stage in a workflow has a name"
    return found
