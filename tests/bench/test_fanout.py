"""The arithmetic of the fan-out bench, and that its page has a place for the figures."""

from __future__ import annotations

from typing import Any

import pytest

from bench.fanout import __main__ as bench
from bench.lib.calls import CallSeen, JobSeen, Turn
from bench.lib.figures import Rounds


def turns(name: str, *prefilled: float) -> list[Turn]:
    """Turns of one call of 1,000 tokens."""
    calls = [[CallSeen(0, 0, 0.0, 1.0, 1.0, 1000, round(1000 * (1 - part)), 5)] for part in prefilled]
    return [Turn(name, seed, 0, each, [JobSeen(0, 0.0, 1.0)]) for seed, each in enumerate(calls)]


def test_a_turn_is_what_was_not_cached_over_one_prompt() -> None:
    calls = [CallSeen(0, 0, 0.0, 2.0, 2.0, 700, 0, 5), *[CallSeen(1, 0, 0.0, 1.0, 1.0, 700, 680, 5)] * 7]
    turn: Any = Turn("bare", 0, 0, calls, [JobSeen(0, 0.0, 3.0)])
    assert [column.of(turn) for column in bench.COLUMNS] == [pytest.approx((700 + 7 * 20) / 700), 3.0, 1.125]


def test_the_goal_must_be_met_wrapped_and_missed_bare() -> None:
    def said(bare: float, wrapped: float) -> str:
        found = Rounds([*turns("bare", bare, 9.0, bare), *turns("wrapped", wrapped, 9.0, wrapped)])
        return str(bench.verdict("two", found)).rpartition(": ")[2]

    assert (said(8.0, 1.2), said(8.0, 1.4)) == ("met", "MISSED")
    assert said(1.2, 1.2) == "this load shows nothing"


def test_rounds_begin_differently() -> None:
    one, other = bench.prefix_of(1, 50), bench.prefix_of(2, 50)
    assert one.split()[:2] != other.split()[:2] and len(one.split()) == len(other.split())
