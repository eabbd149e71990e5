"""``make check-overhead`` judges the ratio of CPU times, block by block, and nothing else."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

import pytest

from bench.overhead import __main__ as overhead


class Made:
    """An arm whose blocks took what is given."""

    def __init__(self, name: str, cpu_ms: list[float]) -> None:
        self.name = name
        self.cpu_ms = {("invoke", "one at a time"): cpu_ms}
        self.times = {("invoke", "one at a time"): [[each * 2] * 3 for each in cpu_ms]}


def test_the_ratio_is_the_median_of_neighbouring_blocks() -> None:
    bare, wrapped = [4.0, 4.0, 8.0, 4.0, 40.0], [4.4, 4.2, 8.8, 9.0, 44.0]
    rows = overhead.figures([Made("bare", bare), Made("wrapped", wrapped)])
    assert rows[0].cpu_ratio == pytest.approx(1.10) and overhead.report_cpu(rows).count("**1.10**") == 1
    assert len(overhead.beyond_goal(rows)) == (rows[0].cpu_ratio > overhead.GOAL_CPU_RATIO["invoke"])
    slower = overhead.figures([Made("bare", bare), Made("wrapped", [each * 1.2 for each in bare])])
    (missed,) = overhead.beyond_goal(slower)
    assert "invoke: a wrapped call takes 1.200 times" in missed and "median of 5 blocks" in missed


def test_a_check_makes_enough_blocks_and_forms() -> None:
    assert {form for form, *_ in overhead.loads(quick=True, alone_only=True)} == set(overhead.GOAL_CPU_RATIO)
    assert overhead.LEAST_BLOCKS >= 9

    class Busy(overhead.Arm):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times, self.cpu_ms = defaultdict(list), defaultdict(list)

        async def run(self, *_: Any) -> list[float]:
            sum(range(300_000))
            return [1.0]

    arm = Busy()
    asyncio.run(arm.block("invoke", "one at a time", 10, None, 0))
    assert arm.times == {("invoke", "one at a time"): [[1.0]]} and arm.cpu_ms["invoke", "one at a time"][0] > 0
