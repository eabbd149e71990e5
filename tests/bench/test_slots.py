"""The arithmetic of the slots bench, and that its page has a place for the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.lib.calls import CallSeen, JobSeen, Turn, recomputed, ttfts_s
from bench.lib.figures import Rounds
from bench.slots import workflows


def turn(arm: str, *returns_s: float, seed: int = 0) -> Any:
    calls = [CallSeen(0, 0, 0.0, 90.0, 91.0, 500, 0, 4)]
    calls += [CallSeen(0, n, 100.0, 100.0 + s, 101.0 + s, 600, 550, 4) for n, s in enumerate(returns_s, 1)]
    jobs = [JobSeen(0, 0.0, 101.0 + max(returns_s))]
    return Turn(arm, seed, 0, calls, jobs, more={"peak_mib": 300.0, "files_mib": 40.0})


def test_only_calls_that_return_count() -> None:
    seen = turn("orla", 0.2, 0.4)
    assert ttfts_s(seen.returning) == [pytest.approx(0.2), pytest.approx(0.4)]
    assert recomputed(seen.returning) == 100
    row = workflows.report(Rounds([seen]))[2]
    assert row == "| orla | **0.30** | **0.39** | **100** | **101** | 300 | 40 |"


def test_the_goals_need_a_third_of_stocks_tail_and_no_worse_a_middle() -> None:
    def said(*orla_s: float) -> list[str]:
        lines = workflows.verdict(Rounds([turn("stock", 1.0, 3.0), turn("orla", *orla_s)]))
        return [line.rpartition(": ")[2] for line in lines]

    assert said(0.5, 0.5) == ["met", "met"]
    assert said(0.5, 2.0) == ["MISSED", "met"]
    assert said(2.5, 2.5) == ["MISSED", "MISSED"]


def test_rounds_are_compared_with_their_own_load() -> None:
    turns = [turn(arm, s, seed=seed) for seed in (0, 1) for arm, s in (("stock", 4.0 + seed), ("orla", 1.0))]
    assert "4.5 times shorter: met" in workflows.verdict(Rounds(turns))[0]


def test_the_bounded_arm_keeps_no_more_bytes_than_stocks_cache() -> None:
    shape = workflows.Shape(
        workflows=16, slots=4, calls=4, tokens=700, grow=80, answer_tokens=24, wait=6.0, arrive=3.0, cache_ram=128,
        threads=2, port=0,
    )  # fmt: skip
    assert shape.cached_workflows * shape.longest_tokens * 23 * 1024 <= 128 * 2**20
    assert 2 <= shape.cached_workflows < 12, "some of those without a slot, not all"
    one, again = workflows.sessions_of(shape, 0), workflows.sessions_of(shape, 0)
    assert one == again != workflows.sessions_of(shape, 1), "all arms of a round are given the same"


def test_curves_are_drawn(tmp_path: Path) -> None:
    workflows.draw(Rounds([turn("stock", 1.0, 2.0), turn("orla", 0.5, 0.6)]), tmp_path / "drawn.svg")
    assert (tmp_path / "drawn.svg").read_text(encoding="utf-8").startswith("<?xml")
