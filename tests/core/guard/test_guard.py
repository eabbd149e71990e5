"""What the guard decides of one call, and what it keeps calls of our own from."""

from __future__ import annotations

from typing import Any

import pytest

from orla_lg import AccessDenied, AccessPolicy, Orla
from orla_lg.core.call import NO_HINTS, Ask, Assignment, Call
from orla_lg.core.guard.access import CallAccess, on_behalf, tool_names
from orla_lg.core.guard.guard import Guard
from orla_lg.core.identity import Identity
from orla_lg.core.lookahead.structure import END, START, Edge, GraphStructure
from orla_lg.core.workflow import RunState
from tests.conftest import at
from tests.stub_engine import StubEngine

PII = frozenset({"pii"})
NO_PII = AccessPolicy("no pii", ["backend:weak"], ["data:pii"], "deny")
ROUND = {"model": frozenset({"tools"}), "tools": frozenset({"model", END}), START: frozenset({"model"})}
LOOP = GraphStructure({stage: Edge(following) for stage, following in ROUND.items()}, {}, {"tools": PII})


def call(access: CallAccess | None = None, stage: str = "stage", **ask: Any) -> Call:
    return Call(
        "id", Identity("workflow", None, stage), Ask("auto", (), **ask), NO_HINTS, NO_HINTS, 0.0, access=access
    )


def guarded(*policies: AccessPolicy, **runs: RunState) -> Guard:
    guard = Guard(runs.get)
    guard.set_policies(policies, "code")
    return guard


def test_an_assignment_keeps_what_is_allowed_of_it() -> None:
    guard = guarded(AccessPolicy("most", ["*"], ["backend:[^x]*"]))
    whole = Assignment("a", alternatives=("b", "c"))
    assert guard.narrowed(call(), whole) is whole
    left = guard.narrowed(call(), Assignment("x", alternatives=("b", "xx", "c"), reason="mapped"))
    assert left is not None and (left.backend, left.alternatives) == ("b", ("c",))
    assert left.reason.startswith("mapped; not 'x': policy 'most'")
    with pytest.raises(AccessDenied) as found:
        guard.narrowed(call(), Assignment("x", alternatives=("xx",)))
    assert found.value.rule == "most"
    assert guard.narrowed(call(), None) is None  # ``external`` begins with no x


def test_the_names_of_tools_in_every_wire() -> None:
    schemas = [{"type": "function", "function": {"name": "a"}}, {"name": "b"}, {"type": "web_search"}, "no tool"]
    assert tool_names(schemas) == ["a", "b", "web_search"]
    guard = guarded(AccessPolicy("no b", ["*"], ["tool:b"], "deny"))
    with pytest.raises(AccessDenied, match="tool:b"):
        guard.narrowed(call(schemas=schemas[1:]), Assignment("a"))
    with pytest.raises(AccessDenied, match="tool:b"):
        guard.narrowed(call(CallAccess(tools=["b"])), Assignment("a"))


def test_a_skill_is_checked_where_one_is_named() -> None:
    guard = guarded(AccessPolicy("no writing", ["*"], ["skill:writing"], "deny"))
    guard.narrowed(call(), Assignment("a"))
    with pytest.raises(AccessDenied, match="skill:writing"):
        guard.narrowed(call(CallAccess(skill="writing")), Assignment("a"))


def test_a_call_on_the_way_of_another_carries_its_labels() -> None:
    guard = guarded(NO_PII)
    outer = CallAccess(labels=PII)
    for access in (outer, on_behalf(outer, "answer"), on_behalf(on_behalf(outer, "answer"), "judge")):
        with pytest.raises(AccessDenied, match="data:pii"):
            guard.narrowed(call(access, "judge"), Assignment("weak"))
    inner = on_behalf(on_behalf(None, "answer"), "judge")
    assert inner.stage == "answer" and inner.tools == ()


def test_what_follows_on_a_call_is_not_prefilled_with_labels_that_policies_speak_of() -> None:
    run = RunState("run", "run")
    run.trace.graph, run.trace.structure = "graph", LOOP
    guard = guarded(run=run)
    guard.heed(LOOP)
    guard.flow.entered(run, "model")
    assert guard.may_extend(run, "model")
    guard.flow.entered(run, "tools")
    assert guard.may_extend(run, "model")  # no policy speaks of labels
    guard.set_policies([NO_PII])
    assert not guard.may_extend(run, "model")


def test_prompts_that_are_kept_go_when_policies_change(engine: StubEngine, make_orla: Any) -> None:
    orla: Orla = make_orla(at(engine, engine="llamacpp"))
    warming = orla.core.serving.schedulers["main"].prefetcher
    kept = warming.prompts
    orla.policies = []
    assert warming.prompts is kept  # nothing changed
    orla.policies = [NO_PII]
    assert warming.prompts is not kept


def test_what_is_not_asked_elsewhere_is_denied() -> None:
    guard, here = Guard(), list[Guard | None]()
    guard.installed_by(here.append)
    guard.set_elsewhere(True)
    assert here == [None, guard]
    with pytest.raises(AccessDenied, match="server"):
        guard.narrowed(call(), None)
    looked = call()
    guard.look_at(looked)
    assert looked.access is not None and not looked.access.may_leave
    guard.set_elsewhere(False)
    assert here[-1] is None
