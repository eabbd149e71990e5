"""Structures as nodes and arrows."""

from __future__ import annotations

from orla_lg.core.lookahead.structure import END, START, Edge, GraphStructure
from orla_lg.serve.page.drawn_graphs import MOST_NODES, drawn


def edge(*always: str, perhaps: tuple[str, ...] = (), open: bool = False) -> Edge:
    return Edge(frozenset(always), frozenset(perhaps), open)


def test_a_graph_with_a_choice() -> None:
    structure = GraphStructure({START: edge("plan"), "plan": edge(perhaps=("act", END)), "act": edge("plan")})
    found = drawn("agent", structure, {"plan": "light"})
    assert [(each["name"], each["home"]) for each in found["stages"]] == [("plan", "light"), ("act", "")]
    assert found["arrows"] == [
        [START, "plan", True], ["plan", END, False], ["plan", "act", False], ["act", "plan", True]
    ]  # fmt: skip


def test_a_graph_inside_a_stage_takes_its_place() -> None:
    structure = GraphStructure({
        START: edge("team"), "team": edge("write"), "write": edge(END),
        f"team|{START}": edge("team|one"), "team|one": edge(perhaps=("team|two", f"team|{END}")),
        "team|two": edge(f"team|{END}"),
    })  # fmt: skip
    found = drawn("outer", structure, {})
    assert {each["name"] for each in found["stages"]} == {"write", "team|one", "team|two"}
    assert {tuple(each) for each in found["arrows"]} == {
        (START, "team|one", True), ("team|one", "team|two", False), ("team|one", "write", False),
        ("team|two", "write", True), ("write", END, True),
    }  # fmt: skip


def test_a_stage_that_leads_nowhere_ends_its_graph() -> None:
    structure = GraphStructure({
        START: edge("team"), "team": edge("write"), "write": edge(), f"team|{START}": edge("team|one"),
        "team|one": edge(),
    })  # fmt: skip
    assert drawn("g", structure, {})["arrows"] == [
        [START, "team|one", True], ["write", END, True], ["team|one", "write", True]
    ]  # fmt: skip


def test_a_stage_that_may_go_anywhere_draws_no_guesses() -> None:
    structure = GraphStructure({START: edge("a"), "a": edge(perhaps=("a", "b", END), open=True), "b": edge(END)})
    found = drawn("g", structure, {})
    assert found["stages"][0]["open"] and not [each for each in found["arrows"] if each[0] == "a"]


def test_a_large_graph_and_hostile_names() -> None:
    names = [f"<b>{number}" for number in range(MOST_NODES + 5)]
    found = drawn("\u202e", GraphStructure({START: edge(*names), **{name: edge(END) for name in names}}), {})
    assert len(found["stages"]) == MOST_NODES and found["more"] == 5 and found["name"].isprintable()
