"""A moved workflow in virtual time: what is prefilled ahead is found by its next call, on the simulated engine."""

from __future__ import annotations

from bench.move.simulated import COLD, STAYS, WARMED, turn


def test_the_next_call_finds_what_was_prefilled() -> None:
    stays, warmed, cold = (turn(arm, "gpu", 2.0, 0) for arm in (STAYS, WARMED, COLD))
    assert [record.backend for record in (stays, warmed, cold)] == ["old", "new", "new"]
    assert (cold.cached_tokens or 0) == 0 and (warmed.cached_tokens or 0) > 5000
    assert abs((warmed.ttft_s or 0) - (stays.ttft_s or 0)) < 0.05 < 0.2 < (cold.ttft_s or 0)


def test_what_comes_too_soon_waits_for_no_prefill() -> None:
    soon, cold = (turn(arm, "gpu", 0.05, 0) for arm in (WARMED, COLD))
    assert (soon.ttft_s or 0) <= 1.2 * (cold.ttft_s or 0)
