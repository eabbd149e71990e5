"""What is open, as events tell it, against a naive count."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from orla_lg.core.identity import workflow_key
from orla_lg.core.record import CallEvent, Happening, Record
from orla_lg.core.workflow import RunState
from orla_lg.serve.page import live_calls
from orla_lg.serve.page.live_calls import LiveCalls

H = Happening


def record(call: str, workflow: str = "w", stage: str = "s", **more: Any) -> Record:
    plain: dict[str, Any] = {
        "id": call, "workflow": workflow, "run": None, "stage": stage, "step": None, "backend": "main", "model": None,
        "mapper": None, "reason": "", "priority": 0.0, "tenant": None, "queue_wait_s": 1.0, "ttft_s": 0.5,
        "duration_s": 2.0, "prompt_tokens": 7, "cached_tokens": 3, "completion_tokens": 5, "cache_action": "engine",
        "attempts": 1, "cost_usd": None, "error": None, "external": False,
    }  # fmt: skip
    return Record(**{**plain, **more})


def event(kind: Happening, at_s: float, call: str | None = None, **more: Any) -> CallEvent:
    plain: dict[str, Any] = {"workflow": "w", "stage": "s", "backend": "main", "call": call}
    return CallEvent(kind, at_s, **{**plain, **more})


def ended(at_s: float, call: str, **more: Any) -> CallEvent:
    return event(H.FINISHED, at_s, call, record=record(call, **more))


def run_of(*runs: RunState) -> Any:
    return {run.id: run for run in runs}.get


def the(live: LiveCalls) -> dict[str, list[int]]:
    return {stage.stage: stage.row()[1:] for stage in live.all_now()[0]}


def test_a_call_is_counted_where_it_is() -> None:
    live = LiveCalls(run_of())
    seen = []
    for each in (
        event(H.QUEUED, 1.0, "a"), event(H.DISPATCHED, 2.0, "a"), event(H.FIRST_TOKEN, 2.5, "a"), ended(3.0, "a"),
    ):  # fmt: skip
        live.heard(each)
        seen.append(the(live)["s"])
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0]
    ]  # fmt: skip
    live.heard(event(H.DISPATCHED, 4.0, "a"))
    assert the(live)["s"] == seen[-1], "an event that comes late opens no call again"


def test_counts_are_those_of_a_naive_model_whatever_comes() -> None:
    rng = random.Random(7)
    live, phase, done = LiveCalls(run_of()), dict[str, tuple[str, str]](), Counter[str]()
    for number in range(3000):
        call = rng.choice([f"c{number}", *phase])
        stage = phase[call][0] if call in phase else rng.choice("abc")
        kind = rng.choice([H.QUEUED, H.DISPATCHED, H.FIRST_TOKEN, H.FINISHED])
        if kind is H.FINISHED:
            live.heard(event(kind, number, call, stage=stage, record=record(call, stage=stage)))
            phase.pop(call, None)
            done[stage] += 1
        else:
            live.heard(event(kind, number, call, stage=stage))
            phase[call] = stage, {H.QUEUED: "waiting", H.DISPATCHED: "prefill", H.FIRST_TOKEN: "decode"}[kind]
    expected = Counter(phase.values())
    for stage, (waiting, prefill, decode, _, _, ends, _) in the(live).items():
        assert [waiting, prefill, decode, ends] == [
            *(expected[stage, each] for each in ("waiting", "prefill", "decode")), done[stage],
        ]  # fmt: skip
    (workflow,) = live.all_now()[1]
    assert workflow.waiting == sum(count for (_, where), count in expected.items() if where == "waiting")


def test_only_what_changed_is_told_and_once() -> None:
    live = LiveCalls(run_of())
    live.heard(event(H.QUEUED, 1.0, "a"))
    live.heard(event(H.QUEUED, 1.0, "b", stage="t", workflow="v"))
    first = live.take(workflows=False)
    assert [stage.stage for stage in first.stages] == [stage.stage for stage in first.new] == ["s", "t"]
    assert not first.workflows
    live.heard(event(H.DISPATCHED, 2.0, "a"))
    second = live.take()
    assert [stage.stage for stage in second.stages] == ["s"] and not second.new
    assert [each.key for each in second.workflows] == ["w", "v"]
    assert not live.take().workflows


def test_runs_nodes_and_tools_end_with_their_run() -> None:
    run = RunState("r", "w")
    run.trace.graph = "desk"
    live = LiveCalls(run_of(run))
    live.heard(event(H.RUN_STARTED, 0.0, run="r", stage=""))
    for entered, kind in ((1, H.NODE_ENTERED), (2, H.NODE_ENTERED), (1, H.NODE_LEFT)):
        run.now_in["s"] = entered
        live.heard(event(kind, 0.1, run="r"))
    live.heard(event(H.TOOL_STARTED, 0.3, run="r", detail="search"))
    live.heard(event(H.TOOL_STARTED, 0.3, run="r", detail="fetch"))
    live.heard(event(H.TOOL_ENDED, 0.4, run="r", detail="fetch"))
    stages, (workflow,) = live.all_now()
    assert [(each.graph, each.inside, each.tools) for each in stages] == [("desk", 1, 1)]
    assert workflow.row()[4] == ["r"]
    live.heard(event(H.RUN_ENDED, 1.0, run="r", stage=""))
    assert [(each.inside, each.tools) for each in stages] == [(0, 0)] and not workflow.is_open
    tools = live.spans(workflow.number, [])
    assert tools is not None
    assert [(each["tool"], each["ended"]) for each in tools] == [("search", 1.0), ("fetch", 0.4)]


def test_nodes_that_are_told_again_count_once() -> None:
    run = RunState("r", "w")
    run.now_in.update(s=1, t=1)
    live = LiveCalls(run_of(run))
    live.seed([run], [], [])
    run.now_in.clear()  # its process has another connection
    run.now_in["s"] = 1
    live.heard(event(H.NODE_ENTERED, 1.0, run="r"))
    assert {stage: row[4] for stage, row in the(live).items()} == {"s": 1, "t": 0}


def test_a_run_is_of_the_tenant_that_its_first_call_names() -> None:
    run = RunState("r", "w")
    live = LiveCalls(run_of(run))
    live.heard(event(H.RUN_STARTED, 0.0, run="r"))
    live.take()
    live.heard(event(H.QUEUED, 0.1, "a", run="r", tenant="acme"))
    (workflow,) = live.all_now()[1]
    assert workflow.key == workflow_key("w", "acme") and list(workflow.runs) == ["r"]
    assert len(live.take().gone) == 1


def test_spans_of_the_workflow_that_is_watched() -> None:
    live = LiveCalls(run_of())
    live.seed([], [], [record("old")])
    (workflow,) = live.all_now()[1]
    live.watch([workflow.number])
    live.heard(event(H.QUEUED, 1.0, "a"))
    live.heard(event(H.QUEUED, 1.0, "b", workflow="other"))
    assert [each["id"] for each in live.take().spans[workflow.number]] == ["a"]
    live.heard(ended(4.0, "a"))
    (span,) = live.take().spans[workflow.number]
    assert (span["began"], span["sent"], span["first"], span["ended"]) == (2.0, 3.0, 3.5, 4.0) and span["timed"]
    kept = live.spans(workflow.number, [record("old"), record("a"), record("x", workflow="other")])
    assert kept is not None and [(each["id"], each["timed"]) for each in kept] == [("old", False), ("a", True)]
    assert live.spans(99, []) is None


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOST_CALLS", "MOST_WORKFLOWS", "MOST_STAGES"):
        monkeypatch.setattr(live_calls, name, 10)
    live = LiveCalls(run_of())
    for number in range(50):
        live.heard(event(H.QUEUED, number, f"c{number}", workflow=f"w{number}", stage=f"s{number}"))
        live.heard(ended(number, f"d{number}", workflow=f"v{number}", stage=f"s{number}"))
    stages, workflows = live.all_now()
    assert len(stages) <= 11 and len(workflows) == 10 and stages[-1].stage == live_calls.OTHERS
    assert live.waiting()["main"] == 10


def test_calls_that_no_longer_wait_are_let_go() -> None:
    live = LiveCalls(run_of())
    for call in "abc":
        live.heard(event(H.QUEUED, 1.0, call))
    live.keep_waiting("other", set())
    live.keep_waiting("main", {"b"})
    assert the(live)["s"][0] == 1 == live.waiting()["main"]


@pytest.mark.parametrize(
    "name", ["<img src=x onerror=alert(1)>", "\u202egnp.exe", "a\x1b[2Jb", "\ud800", "x" * 10**6]
)
def test_names_of_users_are_bounded_text(name: str) -> None:
    live = LiveCalls(run_of())
    live.heard(event(H.QUEUED, 1.0, "a", workflow=name, stage=name, tenant=name))
    (stage,), (workflow,) = live.all_now()
    for shown in (stage.stage, workflow.row()[1], workflow.row()[2]):
        assert len(shown) < 200 and shown.isprintable() and shown.encode()
