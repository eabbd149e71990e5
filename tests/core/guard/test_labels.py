"""Labels along the graph, against a naive reading of the rule; what is kept, bounded and forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg.core.guard import entered
from orla_lg.core.guard import labels as module
from orla_lg.core.guard.entered import ForgottenNames
from orla_lg.core.guard.flow import StageLabels
from orla_lg.core.guard.labels import LabelFlow, label_names
from orla_lg.core.guard.policies import ANY_LABEL
from orla_lg.core.lookahead.structure import END, START, Edge, GraphStructure
from orla_lg.core.workflow import Outcome, RunState
from orla_lg.errors import ConfigError

PII = frozenset({"pii"})
NONE: frozenset[str] = frozenset()


def graph(
    edges: Mapping[str, str],
    *,
    labels: str = "",
    takes_off: str = "",
    open: str = "",
    more: Mapping[str, Any] | None = None,
) -> GraphStructure:
    """Return a graph of stages with names of one letter; ``>`` is the end."""
    made = {
        START if stage == "<" else stage: Edge(frozenset(END if each == ">" else each for each in following),
                                               open=stage in open)
        for stage, following in edges.items()
    }  # fmt: skip
    return GraphStructure({**made, **(more or {})}, {}, dict.fromkeys(labels, PII), dict.fromkeys(takes_off, PII))


class Thread:
    """Runs of a graph on one thread, as a core hears of them."""

    def __init__(self, structure: GraphStructure, flow: LabelFlow | None = None, name: str = "thread") -> None:
        self.flow, self.structure, self.name, self.runs = flow or LabelFlow(), structure, name, 0
        self.steps = 0
        self.flow.heed(structure)

    def run(self, graph: str = "graph", structure: GraphStructure | None = None, id: str = "") -> RunState:
        self.runs += 1
        run = RunState(id or f"{self.name}-{self.runs}", self.name)
        run.trace.graph, run.trace.structure = graph, structure or self.structure
        return run

    def enter(self, run: RunState, *stages: str) -> None:
        for stage in stages:
            self.steps += 1
            step = self.steps
            run.trace.entered(f"{stage}:{step}", step, 0.0)
            self.flow.entered(run, stage)
            run.trace.left(f"{stage}:{step}", 0.0)

    def end(self, run: RunState, outcome: Outcome = Outcome.DONE) -> None:
        self.flow.run_ended(run, outcome)
        self.flow.check_integrity()

    def carried(self, run: RunState | None, stage: str, claimed: frozenset[str] = NONE) -> frozenset[str]:
        return self.flow.carried(self.name, run, stage, claimed)


CHAIN = graph({"<": "a", "a": "b", "b": "c", "c": "d", "d": ">"}, labels="b", takes_off="c")


def test_downstream_carries_what_upstream_entered_and_not_behind_what_takes_it_off() -> None:
    thread = Thread(CHAIN)
    run = thread.run()
    assert not thread.carried(run, "d") and not thread.carried(run, "c")  # nothing was entered yet
    thread.enter(run, "a", "b")
    assert [thread.carried(run, stage) for stage in "abcd"] == [NONE, PII, PII, NONE]


def test_the_next_run_of_a_thread_begins_with_what_the_last_one_left() -> None:
    plain = graph({"<": "a", "a": "b", "b": ">"}, labels="b")
    thread = Thread(plain)
    thread.enter(first := thread.run(), "a", "b")
    thread.end(first)
    assert thread.carried(thread.run(), "a") == PII
    thread = Thread(CHAIN)
    thread.enter(first := thread.run(), "a", "b", "c", "d")
    thread.end(first)
    assert not thread.carried(thread.run(), "a")  # it was taken off before the end


@pytest.mark.parametrize("outcome", list(Outcome))
def test_a_run_that_did_not_come_to_its_end_left_its_labels_in_the_state(outcome: Outcome) -> None:
    thread = Thread(CHAIN)
    thread.enter(first := thread.run(), "a", "b")
    thread.end(first, outcome)
    run = thread.run()
    assert thread.carried(run, "a") == (NONE if outcome is Outcome.DONE else PII)
    assert not thread.carried(run, "d")
    thread.enter(run, "b", "c", "d")
    thread.end(run)
    assert not thread.carried(thread.run(), "a")  # a whole run has taken it off


@pytest.mark.parametrize(("stages", "clean"), [("abcd", True), ("abc", False), ("abcdbd", False)])
def test_what_a_run_took_off_before_it_was_cut_is_off(stages: str, clean: bool) -> None:
    thread = Thread(CHAIN)
    thread.enter(first := thread.run(), *stages)
    thread.end(first, Outcome.INTERRUPTED)  # in its last stage
    assert thread.carried(thread.run(), "a") == (NONE if clean else PII)


def test_two_runs_of_one_thread_at_once() -> None:
    thread = Thread(CHAIN)
    one, other = thread.run(), thread.run()
    thread.enter(one, "a", "b")
    assert thread.carried(other, "a") == PII and not thread.carried(other, "d")
    thread.end(one)
    assert not thread.carried(other, "a")


def test_a_workflow_without_a_thread_is_over_with_its_run() -> None:
    flow = LabelFlow()
    thread = Thread(graph({"<": "a", "a": "b", "b": ">"}, labels="b"), flow, "lone")
    run = thread.run(id="lone")
    thread.enter(run, "b")
    assert not thread.carried(run, "a") and thread.carried(run, "b") == PII
    thread.end(run)
    assert not flow._workflows


@pytest.mark.parametrize("stage", ["a", "c"])
def test_an_open_edge_leads_everywhere(stage: str) -> None:
    thread = Thread(graph({"<": "a", "a": ">", "b": ">", "c": ">"}, labels="b", open="b"))
    run = thread.run(id="thread")
    thread.enter(run, "b")
    assert thread.carried(run, stage) == PII


def test_a_stage_that_leads_nowhere_may_lead_everywhere() -> None:
    thread = Thread(graph({"<": "ab", "a": ">", "b": ""}, labels="b"))
    thread.enter(run := thread.run(id="thread"), "b")
    assert thread.carried(run, "a") == PII


def test_a_move_that_is_not_written_is_followed() -> None:
    thread = Thread(graph({"<": "a", "a": ">", "b": ">", "c": "d", "d": ">"}, labels="a"))
    run = thread.run(id="thread")
    thread.enter(run, "a")
    assert not thread.carried(run, "d")
    thread.enter(run, "c")
    assert thread.carried(run, "c") == PII and thread.carried(run, "d") == PII


def test_a_graph_that_is_not_known_takes_nothing_off() -> None:
    thread = Thread(GraphStructure({"b": Edge(), "d": Edge()}, {}, {"b": PII}, {"c": PII}))
    thread.enter(run := thread.run(), "b", "c")
    assert thread.carried(run, "d") == PII and thread.carried(run, "elsewhere") == PII


INNER = {
    "s|__start__": Edge(frozenset({"s|x"})), "s|x": Edge(frozenset({"s|y"})), "s|y": Edge(frozenset({"s|__end__"})),
}  # fmt: skip


def test_labels_go_into_a_graph_in_a_node_and_out_of_it() -> None:
    edges = {"<": "a", "a": "s", "s": "b", "b": ">"}
    thread = Thread(graph(edges, labels="a", more=INNER))
    thread.enter(run := thread.run(id="thread"), "a")
    assert [thread.carried(run, stage) for stage in ("s|x", "s|y", "b")] == [PII] * 3
    structure = graph(edges, more=INNER)
    thread = Thread(GraphStructure(structure.edges, {}, {"s|x": PII}))
    thread.enter(run := thread.run(id="thread"), "a", "s", "s|x")
    assert [thread.carried(run, stage) for stage in ("a", "s|y", "b")] == [NONE, PII, PII]


def test_what_is_said_of_a_node_holds_for_the_graph_in_it() -> None:
    edges = {"<": "a", "a": "s", "s": "b", "b": ">"}
    thread = Thread(graph(edges, labels="s", more=INNER))
    run = thread.run(id="thread")
    assert thread.carried(run, "s|x") == PII
    thread = Thread(graph(edges, labels="a", takes_off="s", more=INNER))
    thread.enter(run := thread.run(id="thread"), "a", "s", "s|x")
    assert [thread.carried(run, stage) for stage in ("s|x", "s|y", "b")] == [PII, PII, NONE]


def test_stages_that_are_not_written_count_as_the_node_around_them() -> None:
    thread = Thread(graph({"<": "a", "a": "b", "b": "c", "c": ">"}))
    run = thread.run(id="thread")
    thread.flow.entered(run, "b|inner|x", PII)  # a graph that the code of b calls
    assert [thread.carried(run, stage) for stage in ("a", "b", "b|other", "c")] == [NONE, PII, PII, PII]


def test_embeddings_are_of_their_node() -> None:
    thread = Thread(CHAIN)
    thread.enter(run := thread.run(), "b")
    assert thread.carried(run, "b:embeddings") == PII and thread.carried(run, "c:embeddings") == PII


def test_another_graph_on_the_same_thread_begins_with_what_the_first_one_left() -> None:
    flow = LabelFlow()
    thread = Thread(CHAIN, flow)
    thread.enter(one := thread.run(), "a", "b", "c", "d")
    thread.end(one)
    plain = graph({"<": "x", "x": ">"}, labels="")
    assert not thread.carried(thread.run("other", plain), "x")
    keeps = graph({"<": "a", "a": "b", "b": ">"}, labels="b")
    thread = Thread(keeps, flow, "second")
    thread.enter(one := thread.run("keeps"), "a", "b")
    thread.end(one)
    assert thread.carried(thread.run("other", plain), "x") == PII


def test_a_run_in_a_node_of_another_workflow_carries_its_labels_and_brings_its_own() -> None:
    flow = LabelFlow()
    outer = Thread(graph({"<": "a", "a": "b", "b": ">"}, labels="a"), flow, "outer")
    outer.enter(run := outer.run(), "a", "b")
    inner = Thread(graph({"<": "i", "i": ">"}), flow, "inner")
    within = inner.run("inner")
    within.parent = "outer"
    assert inner.carried(within, "i") == PII
    flow.entered(within, "i", frozenset({"secret"}))
    assert "secret" in outer.carried(run, "b")


def test_claimed_labels_add_and_flow() -> None:
    thread = Thread(graph({"<": "a", "a": "b", "b": ">"}))
    run = thread.run(id="thread")
    assert thread.carried(run, "a", frozenset({"secret"})) == {"secret"} == thread.carried(run, "b")


def test_calls_without_a_graph_carry_all_that_their_workflow_entered() -> None:
    flow = LabelFlow()
    flow.set_table({"intake": StageLabels(PII), "clean": StageLabels(NONE, PII)})
    assert flow.follows
    for stage in ("intake", "clean", "answer"):
        assert flow.carried("session", None, stage) == PII
    assert not flow.carried("other", None, "answer")
    flow.set_graph("known", "posted", graph({"<": "i", "i": "c", "c": "d", "d": ">"}, labels="i", takes_off="c"))
    assert [flow.carried("known", None, stage) for stage in "icd"] == [PII, PII, NONE]


def test_a_run_whose_tenant_shows_later_brings_what_it_entered() -> None:
    thread = Thread(CHAIN)
    thread.enter(run := thread.run(), "b")
    run.workflow = "tenant=1:xthread"
    assert thread.flow.carried(run.workflow, run, "c") == PII
    thread.end(run)
    assert not thread.flow._workflows["thread"].open


# The rule, read naively


STAGES = "abcde"


@st.composite
def graphs(draw: Any) -> GraphStructure:
    edges = {stage: "".join(draw(st.sets(st.sampled_from(STAGES + ">"), min_size=1, max_size=3))) for stage in STAGES}
    edges["<"] = "".join(draw(st.sets(st.sampled_from(STAGES), min_size=1, max_size=2)))
    subset = st.sets(st.sampled_from(STAGES), max_size=2).map("".join)
    return graph(edges, labels=draw(subset), takes_off=draw(subset))


def lies_behind(structure: GraphStructure, source: str, target: str, *, wraps: bool) -> bool:
    """Whether some way leads from one stage to another on which nothing takes the label off, the source included."""

    def walk(at: str, passed: frozenset[str]) -> bool:
        if at in structure.declassifies:
            return False
        following = set(structure.edges[at].always) if at in structure.edges else set()
        if at == END and wraps:
            following = {START}
        return target in following or any(walk(each, passed | {each}) for each in following - passed)

    return walk(source, frozenset())


@given(graphs(), st.lists(st.lists(st.sampled_from(STAGES), max_size=3), max_size=3), st.booleans())
def test_as_the_rule_says(structure: GraphStructure, runs: list[list[str]], on_thread: bool) -> None:
    runs = runs if on_thread else runs[:1]
    thread, entered = Thread(structure), list[str]()
    run = thread.run(id="" if on_thread else "thread")
    for number, stages in enumerate(runs):
        for stage in stages:  # outside the trace: only what is written counts
            thread.flow.entered(run, stage)
            entered.append(stage)
        for stage in STAGES:
            sources = [each for each in entered if each in structure.labels]
            expected = stage in structure.labels or any(
                lies_behind(structure, each, stage, wraps=on_thread) for each in sources
            )
            if not expected:
                assert thread.carried(run, stage) == NONE
            elif stage not in structure.labels:  # asking for one with a label of its own would enter it
                assert thread.carried(run, stage) == PII
        if number + 1 < len(runs):
            thread.end(run)
            run = thread.run()


# Kept, and forgotten


class Kept:
    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.forgotten: bytes | None = None

    def keep(self, workflow: str, value: bytes | None) -> None:
        if value is None:
            self.values.pop(workflow, None)
        else:
            self.values[workflow] = value

    def keep_forgotten(self, value: bytes) -> None:
        self.forgotten = value


def test_what_is_kept_is_known_after_a_restart_and_an_open_run_counts_as_cut() -> None:
    kept, thread = Kept(), Thread(CHAIN)
    thread.flow.store = kept
    thread.enter(one := thread.run(), "a", "b", "c", "d")
    thread.end(one)
    thread.enter(thread.run(), "a", "b")
    again = LabelFlow()
    again.restore(kept.values, kept.forgotten)
    later = Thread(CHAIN, again)
    run = later.run()
    assert [later.carried(run, stage) for stage in "abcd"] == [PII, PII, PII, NONE]
    again.store = kept
    again.over("thread")
    assert not kept.values and not later.carried(later.run(), "a")


def test_what_cannot_be_read_counts_as_any_label() -> None:
    flow = LabelFlow()
    flow.restore({"thread": b"{"})
    assert flow.follows and flow.carried("thread", None, "a") == {ANY_LABEL}


def test_what_is_forgotten_for_want_of_room_carries_any_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_WORKFLOWS", 8)
    kept, flow = Kept(), LabelFlow()
    flow.store = kept
    for number in range(20):
        flow.carried(f"w{number}", None, "stage", PII)
    assert len(flow._workflows) <= 8 and len(kept.values) <= 8
    assert flow.carried("w0", None, "other") == {ANY_LABEL} and flow.carried("w19", None, "other") == PII
    assert not flow.carried("never", None, "other")
    again = LabelFlow()
    again.restore(kept.values, kept.forgotten)
    assert again.carried("w0", None, "other") == {ANY_LABEL} and again.carried("w19", None, "other") == PII
    assert again.carried("w0", None, "stage", frozenset({"x"})) == {ANY_LABEL, "x"}


def test_a_workflow_with_too_many_stages_carries_any_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entered, "MOST_ENTRIES", 3)
    thread = Thread(graph({"<": "abcde", **dict.fromkeys("abcde", ">")}, labels="abcde"))
    thread.enter(run := thread.run(), *"abcde")
    assert ANY_LABEL in thread.carried(run, "a")


def test_a_stage_with_too_many_labels_carries_any(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, flow = Kept(), LabelFlow()
    flow.store = kept
    for number in range(entered.MOST_KEPT + 2):
        flow.carried("w", None, "stage", frozenset({f"l{number}"}))
    assert flow.carried("w", None, "other") == {ANY_LABEL}
    before = dict(kept.values)
    flow.carried("w", None, "stage", frozenset({"one more"}))
    assert kept.values == before and len(before["w"]) < 200


@given(st.lists(st.text(max_size=5), max_size=50))
def test_a_forgotten_name_is_always_found(names: list[str]) -> None:
    forgotten = ForgottenNames()
    assert "x" not in forgotten
    for name in names:
        forgotten.add(name)
    assert all(name in ForgottenNames(bytes(forgotten.bits)) for name in names)
    assert "anything" in ForgottenNames(b"of another size")


@pytest.mark.parametrize(
    "wrong", ["pii", ["*"], ["a/b"], [""], [3], [" a"], ["x" * 101], [f"l{n}" for n in range(65)]]
)
def test_what_is_no_list_of_labels_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="here"):
        label_names("here", wrong)
