"""Registered graphs as labels follow them, and manifests of skills."""

from __future__ import annotations

import pytest

from orla_lg.core.call import Assignment
from orla_lg.core.lookahead.structure import START, GraphStructure
from orla_lg.serve.access.access import Denied
from orla_lg.serve.api.v1.skills import SkillBounds, bounds_of
from orla_lg.serve.api.v1.workflows import DONE, RegisteredGraphs, structure_of
from orla_lg.serve.posted.book import PostedItems
from orla_lg.serve.posted.items import PostedSkill, PostedWorkflow, read_item

GRAPH = {
    "workflow_id": "w", "edges": [{"from": "a", "to": "b b"}, {"from": "a", "to": "c"}, {"from": "b b", "to": "c"}],
    "declassifications": [{"stage_id": "c", "labels": ["x"]}, {"stage_id": "c", "labels": ["y"]}],
}  # fmt: skip


def test_a_graph_leads_along_its_edges_and_nowhere_else() -> None:
    found = structure_of(read_item(PostedWorkflow, GRAPH))
    (odd,) = found.edges["a"].perhaps - {"c"}
    assert odd.startswith("b-b~") and found.edges[odd].perhaps == {"c"}
    assert found.edges["c"].perhaps == {DONE} == found.edges[DONE].perhaps
    assert found.edges[START].perhaps == {"a", odd, "c"}
    assert not any(edge.open or edge.always for edge in found.edges.values())
    assert found.declassifies == {"c": {"x", "y"}} and not found.labels


def test_graphs_are_handed_on_as_they_change() -> None:
    handed = list[tuple[str, GraphStructure]]()
    graphs = RegisteredGraphs(lambda key, name, structure: handed.append((key, structure)))
    items = PostedItems().with_item(read_item(PostedWorkflow, GRAPH), version=1)
    graphs.follow(items)
    graphs.follow(items)
    assert [key for key, _ in handed] == ["w"]
    graphs.follow(items.with_item(read_item(PostedWorkflow, {**GRAPH, "edges": []}), version=2))
    assert len(handed) == 2 and set(handed[1][1].edges) == {START, "c", DONE}
    graphs.follow(PostedItems())
    graphs.follow(items)
    assert len(handed) == 3


def test_a_manifest_bounds_what_it_names() -> None:
    manifest = read_item(PostedSkill, {"name": "mail", "requires_backends": ["light", "heavy"]})
    bounds = bounds_of("mail", PostedItems().with_item(manifest))
    assert bounds == SkillBounds("mail", ("light", "heavy")) and bounds_of("x", PostedItems()) is None
    assert bounds.fault(backend="light", tools=["any"], labels=["any"]) is None
    assert bounds.fault(backend="other") == "skill 'mail' names no backend 'other' in its manifest"
    chosen = bounds.narrow(Assignment("other", alternatives=("heavy", "more", "light")))
    assert (chosen.backend, chosen.alternatives) == ("heavy", ("light",))
    with pytest.raises(Denied, match="names no backend 'other'"):
        bounds.narrow(Assignment("other"))
