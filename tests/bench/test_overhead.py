"""``make check-overhead`` judges the ratio of CPU times, block by block, and nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bench.lib.figures import Rounds
from bench.overhead import __main__ as overhead


def found(**cpu_ms: list[float]) -> Any:
    """Arms whose blocks took what is given."""
    blocks = [
        overhead.Block(arm, seed, [each * 2] * 3, each)
        for arm, row in cpu_ms.items()
        for seed, each in enumerate(row)
    ]
    return {("invoke", "one at a time"): Rounds(blocks)}


def test_the_ratio_is_the_median_of_neighbouring_blocks() -> None:
    bare, wrapped = [4.0, 4.0, 8.0, 4.0, 40.0], [4.4, 4.2, 8.8, 9.0, 44.0]
    made = found(bare=bare, wrapped=wrapped)
    (blocks,) = made.values()
    ratio = blocks.ratio("wrapped", "bare", overhead.cpu_ms)
    assert ratio == pytest.approx(1.10) and overhead.report_cpu(made).count("**1.10**") == 1
    assert len(overhead.beyond_goal(made)) == (ratio > overhead.GOAL_CPU_RATIO["invoke"])
    (missed,) = overhead.beyond_goal(found(bare=bare, wrapped=[each * 1.2 for each in bare]))
    assert "invoke: a wrapped call takes 1.200 times" in missed and "median of 5 blocks" in missed
    row = "| invoke | one at a time | wrapped | 8.00 | **1.60** (0.40 … 10.00) | 8.00 |"
    assert overhead.report(made).splitlines()[2] == row


def test_a_check_makes_enough_blocks_and_forms() -> None:
    assert {form for form, *_ in overhead.loads(quick=True, alone_only=True)} == set(overhead.GOAL_CPU_RATIO)
    assert overhead.LEAST_BLOCKS >= 9

    class Busy(overhead.Arm):  # type: ignore[misc]
        def __init__(self) -> None:
            self.name = "busy"

        async def run(self, *_: Any) -> list[float]:
            sum(range(300_000))
            return [1.0]

    block = asyncio.run(Busy().block("invoke", 10, None, 7))
    assert block[:3] == ("busy", 7, [1.0]) and block.cpu_ms > 0
