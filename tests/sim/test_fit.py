"""Least squares, without negative costs."""

from __future__ import annotations

import pytest

from orla_lg_sim.fit import Sample, errors, fit


def samples(noise: float = 0.0) -> list[Sample]:
    made = []
    for number in range(12):
        terms = {"fixed": 1.0, "token": float(number * number * 100), "pair": float(number * 1e6 * (number % 3))}
        exact = 0.02 * terms["fixed"] + 3e-5 * terms["token"] + 2e-9 * terms["pair"]
        made.append(Sample("a" if number % 2 else "b", exact * (1 + noise * (-1) ** number), terms))
    return made


def test_it_finds_costs_that_differ_by_many_orders_of_magnitude() -> None:
    found = fit(samples())
    assert found == pytest.approx({"fixed": 0.02, "token": 3e-5, "pair": 2e-9}, rel=1e-3)
    assert max(errors(samples(), found).values()) < 1e-3


def test_noise_shows_as_error_of_each_kind() -> None:
    noisy = samples(0.05)
    assert errors(noisy, fit(noisy)) == {"a": pytest.approx(0.05, abs=0.02), "b": pytest.approx(0.05, abs=0.02)}


def test_no_cost_is_negative() -> None:
    falling = [Sample("a", 2.0 - number / 10, {"fixed": 1.0, "token": float(number)}) for number in range(10)]
    assert fit(falling)["token"] == 0.0


def test_a_term_that_is_never_seen_costs_nothing() -> None:
    assert fit([Sample("a", 1.0, {"fixed": 1.0, "never": 0.0})]) == pytest.approx({"fixed": 1.0, "never": 0.0})
