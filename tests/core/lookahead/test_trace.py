"""Who followed whom, as read from steps."""

from __future__ import annotations

from orla_lg.core.lookahead.structure import Edge, GraphStructure
from orla_lg.core.lookahead.trace import RunTrace, Visit


def ways(**always: str) -> GraphStructure:
    return GraphStructure({stage: Edge(frozenset(targets.split())) for stage, targets in always.items()})


def step(walk: RunTrace, number: int | None, *namespaces: str, at_s: float = 0.0) -> None:
    for namespace in namespaces:
        walk.entered(namespace, number, at_s)
    for namespace in namespaces:
        walk.left(namespace, at_s)


def test_steps_in_a_row() -> None:
    walk = RunTrace(GraphStructure())
    for number, stage in enumerate("aba"):
        step(walk, number, f"{stage}:{number}")
    assert walk.moves == {("__start__", "a"): 1, ("a", "b"): 1, ("b", "a"): 1}
    assert walk.turns == {"__start__": 1, "a": 2, "b": 1} and walk.latest == ("a",)


def test_of_several_the_structure_says_which_led_on() -> None:
    walk = RunTrace(ways(a="b c", b="d"))
    step(walk, 1, "a:1")
    step(walk, 2, "b:1", "c:1")
    step(walk, 3, "d:1")
    assert walk.moves["b", "d"] == 1 and walk.moves["c", "d"] == 0
    free = RunTrace(GraphStructure())
    step(free, 1, "b:1", "c:1")
    step(free, 2, "d:1")
    assert free.moves["b", "d"] == free.moves["c", "d"] == 1


def test_the_same_stage_many_times_in_a_step_is_one_turn() -> None:
    walk = RunTrace(GraphStructure())
    step(walk, 1, "plan:1")
    step(walk, 2, "work:1", "work:2", "work:3")
    step(walk, 3, "sum:1")
    assert (walk.turns["work"], walk.moves["plan", "work"], walk.moves["work", "sum"]) == (1, 1, 1)
    assert len(walk.visits) == 5


def test_graphs_inside_have_steps_of_their_own() -> None:
    walk = RunTrace(GraphStructure())
    walk.entered("sub:1", 1, 0.0)
    step(walk, 1, "sub:1|i:1")
    step(walk, 2, "sub:1|j:1")
    step(walk, 1, "sub:1|1|i:2")  # called once more in the same node
    walk.left("sub:1", 9.0)
    step(walk, 2, "z:1")
    assert set(walk.moves) == {
        ("__start__", "sub"), ("sub|__start__", "sub|i"), ("sub|i", "sub|j"), ("sub|j", "sub|i"), ("sub", "z"),
    }  # fmt: skip
    assert Visit("sub", 0, None) in walk.visits, "its seconds are those of the nodes inside"


def test_tasks_that_run_side_by_side_are_a_step() -> None:
    walk = RunTrace(GraphStructure())
    walk.entered("e:1", 0, 0.0)
    step(walk, None, "e:1|a:1", "e:1|b:1")
    step(walk, None, "e:1|c:1")
    assert walk.moves["e|a", "e|c"] == walk.moves["e|b", "e|c"] == 1 and walk.moves["e|a", "e|b"] == 0


def test_what_calls_do_not_take_is_the_nodes_own() -> None:
    walk = RunTrace(GraphStructure())
    walk.entered("a:1", 1, 10.0)
    walk.called("a:1", 2.0)
    walk.called("a:1", 1.0)
    walk.called("gone:1", 1.0)
    walk.left("a:1", 15.0)
    walk.left("a:1", 99.0)
    assert walk.visits == [Visit("a", 2, 2.0)]
