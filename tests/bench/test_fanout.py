"""The arithmetic of the fan-out bench, and that its page has a place for the figures."""

from __future__ import annotations

from typing import Any

import pytest

from bench.fanout import __main__ as bench
from bench.lib.calls import CallSeen


def arm(name: str, *prefilled: float) -> Any:
    turns = [bench.Turn(part, 4.0 * part, 2.0 * part, 700.0) for part in prefilled]
    return bench.Arm("two", name, None, turns)


def test_a_turn_is_what_was_not_cached_over_one_prompt() -> None:
    turn = bench.turn_of(
        [CallSeen(0, 0, 0.0, 2.0, 2.0, 700, 0, 5), *[CallSeen(1, 0, 0.0, 1.0, 1.0, 700, 680, 5)] * 7], 3.0
    )
    assert (turn.prefilled, turn.latency_s, turn.wall_s) == (pytest.approx((700 + 7 * 20) / 700), 1.125, 3.0)


def test_the_goal_must_be_met_wrapped_and_missed_bare() -> None:
    def said(bare: float, wrapped: float) -> str:
        (line,) = bench.verdict([arm("bare", bare, 9.0, bare), arm("wrapped", wrapped, 9.0, wrapped)])
        return str(line).rpartition(": ")[2]

    assert (said(8.0, 1.2), said(8.0, 1.4)) == ("met", "MISSED")
    assert said(1.2, 1.2) == "this load shows nothing"


def test_rounds_begin_differently() -> None:
    one, other = bench.prefix_of(1, 50), bench.prefix_of(2, 50)
    assert one.split()[:2] != other.split()[:2] and len(one.split()) == len(other.split())
