"""Microseconds: of the times that were taken, and of work on one thing after another."""

from __future__ import annotations

import gc

import pytest

from bench.lib.timing import taken, timed


def test_times_are_microseconds_with_their_tail() -> None:
    found = taken([n / 1e6 for n in range(1, 101)])
    assert found == (pytest.approx(50.5), pytest.approx(100.0), pytest.approx(100.0), 100)


def test_work_is_timed_once_on_each_without_the_collector() -> None:
    seen: list[tuple[int, bool]] = []
    found = timed(lambda each: seen.append((each, gc.isenabled())), range(5))
    assert seen == [(n, False) for n in range(5)] and gc.isenabled()
    assert found.count == 5 and 0 <= found.median <= found.most
