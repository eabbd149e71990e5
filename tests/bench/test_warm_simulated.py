"""Warm-ups in virtual time: the study compares equal loads, and shows what it says."""

from __future__ import annotations

from bench.warm import simulated


def test_after_a_night_a_warm_up_spares_the_call_its_prefill() -> None:
    without, with_them = (
        simulated.turn("night", "gpu", 4.0, 0.0, 0, warm_up=warm_up, foreign=False) for warm_up in (False, True)
    )
    assert [record.prompt_tokens for record in without.counted] == [each.prompt_tokens for each in with_them.counted]
    assert without.warmed == 0 and simulated.lost(without) > 40_000 > 10 * simulated.lost(with_them)
    plain, warmed = simulated.rows(["night", "gpu", "4 s", "0%"], [without], [with_them])
    assert plain[-1] == "–" and warmed[5].startswith("0.013 ×0.04")


def test_what_others_push_out_unseen_is_warmed_once_calls_missed_it() -> None:
    unseen = simulated.turn("stages", "gpu", 6.0, 0.3, 0, warm_up=True, foreign=True)
    assert unseen.warmed > 2 * 6000 and unseen.used > 0.7 * unseen.warmed
