"""Who followed whom, as read from steps."""

from __future__ import annotations

from orla_lg.core.lookahead.structure import Edge, GraphStructure
from orla_lg.core.lookahead.trace import RunTrace, Visit


def edges(**always: str) -> GraphStructure:
    return GraphStructure({stage: Edge(frozenset(targets.split())) for stage, targets in always.items()})


def step(trace: RunTrace, number: int | None, *namespaces: str, at_s: float = 0.0) -> None:
    for namespace in namespaces:
        trace.entered(namespace, number, at_s)
    for namespace in namespaces:
        trace.left(namespace, at_s)


def test_steps_in_a_row() -> None:
    trace = RunTrace(GraphStructure())
    for number, stage in enumerate("aba"):
        step(trace, number, f"{stage}:{number}")
    assert trace.path().moves == {("__start__", "a"): 1, ("a", "b"): 1, ("b", "a"): 1}
    assert trace.path().turns == {"__start__": 1, "a": 2, "b": 1} and trace.path().latest == ("a",)


def test_of_several_the_structure_says_which_led_on() -> None:
    trace = RunTrace(edges(a="b c", b="d"))
    step(trace, 1, "a:1")
    step(trace, 2, "b:1", "c:1")
    step(trace, 3, "d:1")
    assert trace.path().moves["b", "d"] == 1 and trace.path().moves["c", "d"] == 0
    free = RunTrace(GraphStructure())
    step(free, 1, "b:1", "c:1")
    step(free, 2, "d:1")
    assert free.path().moves["b", "d"] == free.path().moves["c", "d"] == 1


def test_the_same_stage_many_times_in_a_step_is_one_turn() -> None:
    trace = RunTrace(GraphStructure())
    step(trace, 1, "plan:1")
    step(trace, 2, "work:1", "work:2", "work:3")
    step(trace, 3, "sum:1")
    path = trace.path()
    assert (path.turns["work"], path.moves["plan", "work"], path.moves["work", "sum"]) == (1, 1, 1)
    assert len(path.visits) == 5


def test_graphs_inside_have_steps_of_their_own() -> None:
    trace = RunTrace(GraphStructure())
    trace.entered("sub:1", 1, 0.0)
    step(trace, 1, "sub:1|i:1")
    step(trace, 2, "sub:1|j:1")
    step(trace, 1, "sub:1|1|i:2")  # called once more in the same node
    trace.left("sub:1", 9.0)
    step(trace, 2, "z:1")
    assert set(trace.path().moves) == {
        ("__start__", "sub"), ("sub|__start__", "sub|i"), ("sub|i", "sub|j"), ("sub|j", "sub|i"), ("sub", "z"),
    }  # fmt: skip
    assert Visit("sub", 0, None) in trace.path().visits, "its seconds are those of the nodes inside"


def test_tasks_that_run_side_by_side_are_a_step() -> None:
    trace = RunTrace(GraphStructure())
    trace.entered("e:1", 0, 0.0)
    step(trace, None, "e:1|a:1", "e:1|b:1")
    step(trace, None, "e:1|c:1")
    moves = trace.path().moves
    assert moves["e|a", "e|c"] == moves["e|b", "e|c"] == 1 and moves["e|a", "e|b"] == 0


def test_what_calls_do_not_take_is_the_nodes_own() -> None:
    trace = RunTrace(GraphStructure())
    trace.entered("a:1", 1, 10.0)
    trace.called("a:1", 2.0)
    trace.called("a:1", 1.0)
    trace.called("gone:1", 1.0)
    trace.left("a:1", 15.0)
    trace.left("a:1", 99.0)
    assert trace.path().visits == [Visit("a", 2, 2.0)]
