"""Structure and experience joined; and that asking is cheap."""

from __future__ import annotations

import time

import pytest

from orla_lg.core.lookahead.estimates import Estimates
from orla_lg.core.lookahead.forecast import MAX_PATIENCE, Forecast, innermost
from orla_lg.core.lookahead.structure import Edge, GraphStructure
from orla_lg.core.lookahead.trace import RunTrace

CHOICE = GraphStructure(
    {
        "__start__": Edge(frozenset("a")),
        "a": Edge(perhaps=frozenset({"b", "c"})),
        "b": Edge(frozenset({"__end__"})),
        "c": Edge(frozenset({"__end__"})),
    }
)


def a_run(estimates: Estimates, structure: GraphStructure, *stages: str, service_s: float = 1.0) -> None:
    """Let a run pass through *stages*, one call in each."""
    trace = RunTrace(structure, "g")
    for number, stage in enumerate(stages):
        trace.entered(f"{stage}:{number}", number, 0.0)
        estimates.enter(trace, stage)
        trace.called(f"{stage}:{number}", service_s)
        estimates.served(trace, stage, service_s, 10, backend="fast" if stage == "b" else "slow")
        trace.left(f"{stage}:{number}", service_s)
    estimates.ended(trace)


def test_a_choice_not_seen_yet_falls_on_all_alike_and_then_as_seen() -> None:
    estimates = Estimates()
    forecast = Forecast("g", CHOICE, {}, estimates)
    assert forecast.next_stages(["a"]) == {"b": 0.5, "c": 0.5}
    for _ in range(9):
        a_run(estimates, CHOICE, "a", "b")
    assert forecast.next_stages(["a"]) == pytest.approx({"b": 0.95, "c": 0.05})
    assert forecast.next_backends(["a"]) == pytest.approx({"fast": 0.95}), "of c nothing is known"


def test_where_nothing_was_seen_the_mapping_says_where_calls_go() -> None:
    forecast = Forecast("g", CHOICE, {"b": "light", "c": "heavy"}, Estimates())
    assert forecast.next_backends(["a"]) == {"light": 0.5, "heavy": 0.5}
    assert forecast.next_backends(["b"]) == {}


def test_where_calls_went_lately_counts() -> None:
    estimates = Estimates()
    for backend in ("old",) * 50 + ("new",) * 50:
        estimates.served(RunTrace(graph="g"), "a", 1.0, 1, backend=backend)
    assert estimates.learned("g", "a").backends == pytest.approx({"new": 1.0}, abs=0.02)


def test_old_turns_count_less() -> None:
    estimates = Estimates()
    forecast = Forecast("g", CHOICE, {}, estimates)
    for _ in range(1000):
        a_run(estimates, CHOICE, "a", "b")
    for _ in range(200):
        a_run(estimates, CHOICE, "a", "c")
    assert forecast.next_stages(["a"])["c"] > 0.6 and estimates.learned("g", "a").turns <= 200


def test_innermost() -> None:
    assert innermost(["sub", "sub|i", "other"]) == ["sub|i", "other"]


def test_asking_is_a_look_into_a_table_and_figures_follow() -> None:
    estimates, forecast = Estimates(), None
    forecast = Forecast("g", CHOICE, {}, estimates)
    a_run(estimates, CHOICE, "a", "b")
    assert forecast.next_stages(["a"]) == {"b": 0.75, "c": 0.25}
    begun = time.thread_time()
    for _ in range(10_000):
        forecast.next_stages(["a"])
    assert (time.thread_time() - begun) / 10_000 < 50e-6
    for _ in range(500):
        a_run(estimates, CHOICE, "a", "b")
    assert forecast.next_stages(["a"])["b"] > 0.9
    computed = forecast._now
    for _ in range(MAX_PATIENCE * 5 + 1):  # four stages and an edge
        a_run(estimates, CHOICE, "a", "b")
    forecast.next_stages(["a"])
    assert forecast._now is not computed
