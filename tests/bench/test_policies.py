"""The arithmetic of the two scheduling benches; small studies show that they measure what they say."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from bench.lib.core import Hints
from bench.lib.figures import Rounds
from bench.policies import __main__ as bench
from bench.policies import final, study
from bench.scale import __main__ as scale
from orla_lg_sim.parameters import EngineParameters

ENGINE = EngineParameters()


def cells(**completion_s: list[float]) -> Any:
    """Policies of which each seed had one run."""
    made = [bench.Cell(policy, seed, [each]) for policy, row in completion_s.items() for seed, each in enumerate(row)]
    return Rounds(made)


def test_load_is_what_arrives_over_what_the_engine_does() -> None:
    drawn = study.plans(200, random.Random(1))
    work = study.arrange(drawn, [1.0] * 200, 0.5, ENGINE, 2.0)
    offered_s = sum(plan.service_s(ENGINE) for plan in drawn)
    assert work[-1][0] == pytest.approx(offered_s / (0.5 * 2.0))
    assert [plan for _, plan in work] == drawn


def test_the_mixture_is_heavy_tailed() -> None:
    services = sorted(plan.service_s(ENGINE) for plan in study.plans(4000, random.Random(1)))
    assert sum(services[-400:]) > 0.4 * sum(services), "a tenth of the runs does nearly half of the work"
    assert services[2000] < sum(services) / 4000 / 1.5


def test_gaps_have_a_mean_of_one_and_may_come_from_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    lines = [f"{at_ms},10,10" for at_ms in (0, 1000, 2000, 6000)]
    trace.write_text("\n".join(["timestamp_ms,input_tokens,output_tokens", *lines]))
    drawn = study.gaps(6, random.Random(1), trace, ENGINE)
    assert sorted(drawn) == pytest.approx([0.5] * 4 + [2.0] * 2)
    assert sum(study.gaps(50, random.Random(1), None, ENGINE)) == pytest.approx(50)


def test_changes_are_seed_by_seed() -> None:
    found = cells(fcfs=[100, 10], las=[50, 9])
    assert bench.changes(found, "las", "p95") == pytest.approx([-0.5, -0.1])


def test_the_gap_is_measured_from_fcfs_to_the_clairvoyant() -> None:
    found = cells(fcfs=[100], shortest_remaining=[70], clairvoyant=[60])
    assert bench.gap_closed(found, "shortest_remaining", "p95") == pytest.approx(0.75)
    fair = [{"load": 0.99, "alone": 2.0, "fair": 3.4, "fcfs": 9.0}]
    lines = "\n".join(bench.verdicts({0.9: found}, fair))
    assert "| 90% | p95 | 75% |" in lines and "1.70× (missed)" in lines and "4.50×" in lines
    assert "shortest_remaining | -30% (missed)" in lines
    rows = bench.rows({0.9: found})
    assert rows[2:4] == [
        "| 90% | fcfs | 100.0 s | 100.0 s | 100.0 s |",
        "| 90% | shortest_remaining |" + 3 * " **-30%** (-30% … -30%) |",
    ]


def test_the_clairvoyant_does_better_than_fcfs_on_the_same_runs() -> None:
    drawn = study.plans(60, random.Random(3))
    work = study.arrange(drawn, study.gaps(60, random.Random(3), None, ENGINE), 1.5, ENGINE, 0.93)
    ended = {policy: study.play(ENGINE, policy, work) for policy in ("fcfs", "clairvoyant")}
    assert all([each.kind for each in runs] == [plan.kind for plan in drawn] for runs in ended.values())
    means = {policy: sum(each.completion_s for each in runs[12:]) for policy, runs in ended.items()}
    assert means["clairvoyant"] < 0.8 * means["fcfs"]


def test_the_first_token_of_the_last_call_is_what_counts() -> None:
    answer = study.Step((("model", study.Size(300, 100)),))
    asks = study.Step((("model", study.Size(300, 100)),), 2.0)
    for steps, waits_s in (([answer], 0.0), ([asks, answer], 2.0)):
        (ended,) = study.play(ENGINE, "final_first", [(0.0, study.Plan("rounds", steps, Hints()))])
        call_s = (ended.completion_s - waits_s) / len(steps)
        assert ended.completion_s - call_s < ended.first_token_s < ended.completion_s


def test_a_row_says_what_a_policy_differs_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(final, "ARMS", ("workflow_fcfs", "final_first"))
    found = final.study("half are single calls", 1.5, 1, 40)
    first, other = final.rows("mixed", 1.5, found)
    assert (
        first[:3] == ["mixed", "150%", "`workflow_fcfs`"]
        and first[3].endswith(" s")
        and other[3].startswith(("+", "-"))
    )


@pytest.mark.parametrize("way", ["scheduler", "steps"])
def test_a_queue_stays_full_while_calls_come_and_go(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale.gc, "freeze", lambda: None)
    row = scale.measure(way, "workflow_fcfs", 200, 300)
    assert (row.way, row.outstanding, row.frozen) == (way, 200, False)
    assert 0 < row.median_us <= row.p99_us <= row.pause_ms * 1e3 + 1e-6
    assert row.rate == pytest.approx(300 / (300 * 2 * row.median_us / 1e6), rel=3)


def test_what_misses_a_goal_is_named() -> None:
    row = scale.Row("scheduler", "fcfs", 1000, False, 40_000.0, 10.0, 50.0, 10.0, 900.0)
    assert scale.missed(row) == []
    slow = scale.Row("scheduler", "fcfs", 1000, False, 29_000.0, 10.0, 1100.0, 51.0, 2100.0)
    assert scale.missed(slow) == ["rate", "p99", "pause", "memory"]


def test_the_line_through_the_growth_is_found() -> None:
    rows = [scale.Row("scheduler", "fcfs", 2**n, False, 1e6 / (3 + 0.5 * n), 1, 1, 1, 1) for n in (10, 13, 20)]
    assert scale.slope(rows) == pytest.approx((3.0, 0.5))
