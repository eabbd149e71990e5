"""How likely a call is its run's last: counted from runs, against the same counted plainly."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg.core.lookahead.estimates import Estimates
from orla_lg.core.lookahead.run_share import RunShare
from orla_lg.core.lookahead.stage_estimates import DOUBT, OLD_WEIGHT, round_of
from orla_lg.core.lookahead.trace import RunTrace
from orla_lg.core.policies import FinalFirst, policies
from orla_lg.core.queues import BackendQueue
from orla_lg.errors import ConfigError
from tests.core.fakes import a_call

Happened = list[tuple[str, int]]
"""What happened in a run: ``+stage`` a call began; ``-`` the open call at that place ended."""


def live(estimates: Estimates, *stages: str, graph: str = "g", ends: bool = True) -> RunTrace:
    """Let a run make calls one after another."""
    run = RunTrace(graph=graph)
    for stage in stages:
        nth, _ = estimates.begins(run, stage)
        estimates.served(run, stage, 1.0, 10, nth=nth)
    if ends:
        estimates.ended(run)
    return run


def test_nothing_known_is_no_odds() -> None:
    estimates = Estimates()
    live(estimates, "a", "a", ends=False)
    assert estimates.final_odds("g", "a", 1) == estimates.final_odds("other", "a", 1) == 0.0
    assert RunShare().final_odds("a", 1) == 0.0, "of a call outside any run"
    live(estimates, "a")
    assert estimates.final_odds("g", "b", 1) == 0.0 < estimates.final_odds("g", "a", 1)
    run = RunShare(ends=lambda stage, nth: 1.0)
    assert (run.final_odds("a", 0), run.final_odds("a", 1)) == (0.0, 1.0), "0: its number is not known"


def test_odds_grow_with_rounds_where_runs_show_that() -> None:
    estimates = Estimates()
    for rounds in (1, 2, 3, 4) * 20:
        live(estimates, *["model"] * rounds)
    odds = [estimates.final_odds("g", "model", nth) for nth in (1, 2, 3, 4)]
    assert odds == sorted(odds) and odds == pytest.approx([0.25, 0.33, 0.5, 1.0], abs=0.1)
    assert estimates.final_odds("g", "model", 9) == odds[-1], "a round never seen is taken for the nearest one"
    assert list(estimates.learned("g", "model").final_odds.values()) == odds


def test_a_stage_that_always_ends_runs_does_and_few_runs_say_little() -> None:
    estimates = Estimates()
    shown = []
    for _ in range(30):
        live(estimates, "plan", "answer")
        shown.append(estimates.final_odds("g", "answer", 1))
    assert shown[0] == 1 / (1 + DOUBT) and shown == sorted(shown) and shown[-1] > 0.9
    assert estimates.final_odds("g", "plan", 1) == 0.0


def test_branches_that_end_together_are_all_final() -> None:
    estimates = Estimates()
    for _ in range(10):
        run = RunTrace(graph="g")
        begun = [(stage, estimates.begins(run, stage)[0]) for stage in ("a", "b", "b")]
        for stage, nth in reversed(begun):
            estimates.served(run, stage, 1.0, 10, nth=nth)
        estimates.ended(run)
    found = [estimates.final_odds("g", *call) for call in (("a", 1), ("b", 1), ("b", 2))]
    assert found == [10 / (10 + DOUBT)] * 3


def test_a_call_that_failed_is_no_answer_but_was_made() -> None:
    estimates = Estimates()
    for _ in range(10):
        run = live(estimates, "a", ends=False)
        estimates.begins(run, "b")  # the answer before it was not the last word, so far as that shows
        estimates.ended(run)
    assert estimates.final_odds("g", "a", 1) == estimates.final_odds("g", "b", 1) == 0.0


@given(st.lists(st.lists(st.tuples(st.sampled_from("+-"), st.sampled_from("ab"), st.integers(0, 3)), max_size=30)))
def test_odds_are_the_share_of_calls_that_no_other_followed(runs: list[list[tuple[str, str, int]]]) -> None:
    """Naively: of all calls that went well, those after whose end no call of their run began."""
    estimates, plain = Estimates(), defaultdict[tuple[str, int], list[bool]](list)
    for happened in runs:
        run, open_calls, moment = RunTrace(graph="g"), list[tuple[str, int]](), 0
        began, ended, made = list[int](), list[tuple[int, str, int]](), {"a": 0, "b": 0}
        for moment, (kind, stage, at) in enumerate(happened):
            if kind == "+":
                made[stage] += 1
                assert estimates.begins(run, stage)[0] == made[stage]
                open_calls.append((stage, made[stage]))
                began.append(moment)
            elif at < len(open_calls):
                stage, nth = open_calls.pop(at)
                estimates.served(run, stage, 1.0, 10, nth=nth)
                ended.append((moment, stage, nth))
        estimates.ended(run)
        for when, stage, nth in ended:
            plain[stage, round_of(nth)].append(not any(moment > when for moment in began))
    for (stage, round_), lasts in plain.items():
        if len(lasts) < OLD_WEIGHT:
            expected = sum(lasts) / (len(lasts) + DOUBT)
            assert estimates.final_odds("g", stage, round_) == pytest.approx(expected, abs=1e-9)


def test_rounds_far_apart_count_together() -> None:
    assert [round_of(nth) for nth in (1, 2, 3, 4, 5, 8, 9, 16, 17, 10**6)] == [1, 2, 3, 4, 8, 8, 16, 16, 16, 16]


def test_a_file_keeps_odds_and_one_of_an_earlier_version_has_none(tmp_path: Path) -> None:
    estimates, again, old = Estimates(), Estimates(), Estimates()
    for _ in range(5):
        live(estimates, "plan", "answer")
    estimates.save(file := tmp_path / "estimates.json")
    assert again.load(file)
    assert again.final_odds("g", "answer", 1) == estimates.final_odds("g", "answer", 1) > 0.5
    held = json.loads(file.read_text())
    for stage in held["stages"]:
        del stage["final"]
    file.write_text(json.dumps(held | {"version": 1}))
    assert old.load(file) and old.final_odds("g", "answer", 1) == 0.0
    assert old.answer_tokens("g", "answer") == 10.0, "all else is kept"
    live(old, "plan", "answer")
    old.save(file)
    assert json.loads(file.read_text())["version"] == 2
    file.write_text(json.dumps(held))
    with pytest.raises(ConfigError, match=r"stages\[0\].final is missing"):
        old.load(file)


# The policy


@given(st.permutations(range(6)), st.floats(0, 500))
def test_without_knowledge_the_order_is_that_of_workflow_fcfs(order: list[int], head_start: float) -> None:
    runs = [RunShare() for _ in range(3)]
    calls = [a_call(f"w{number % 3}", f"s{number % 2}") for number in order]
    for call, number in zip(calls, order, strict=True):
        call.standing, call.nth = runs[number % 3], 1

    def served(policy: object) -> list[str]:
        queue = BackendQueue("b", policies("b", policy, policy), 10)  # type: ignore[arg-type]
        for call in calls:
            queue.enter(call, 0.0)
        return [queue.grant(queue.next(0.0)).call.id for _ in calls]  # type: ignore[arg-type]

    assert served(FinalFirst(head_start)) == served("workflow_fcfs")


@given(st.integers(0, 20), st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=1, max_size=60))
def test_a_call_is_passed_by_those_of_the_next_runs_alone(head_start: int, odds: list[float]) -> None:
    """A stream of calls with better odds never ends; the first one waits for so many runs and no longer."""
    queue = BackendQueue("b", policies("b", mine := FinalFirst(head_start), mine), 1000)
    patient = queue.enter(a_call("patient", "s"), 0.0)
    passed = 0
    for each in odds:
        call = a_call("eager", "s")
        call.standing, call.nth = RunShare(ends=lambda stage, nth, each=each: each), 1  # type: ignore[misc]
        queue.enter(call, 0.0)
        chosen = queue.grant(queue.next(0.0))  # type: ignore[arg-type]
        if chosen is patient:
            break
        passed += 1
    assert passed <= head_start


def test_a_head_start_is_a_number_of_runs() -> None:
    with pytest.raises(ConfigError, match=r"head_start \(runs\) must not be negative, got -1"):
        FinalFirst(-1)
