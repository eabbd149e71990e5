"""The arithmetic of ``make bench-scale-paper``, and its simulation in small."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from bench.scale import paper
from bench.scale.arithmetic import (
    Demand,
    PerCall,
    StoreLoad,
    calls_per_core,
    ceilings,
    core_load,
    cores_needed,
    first_limit,
)
from bench.scale.pools import Shape

DEMAND = Demand(10_000, 4, 64)


def test_cores_at_half_load() -> None:
    assert DEMAND.calls_per_s == 40_000
    assert calls_per_core(250.0) == pytest.approx(2_000)
    assert cores_needed(DEMAND, 250.0) == 20
    assert cores_needed(DEMAND, 250.1) == 21
    assert core_load(DEMAND, 250.0) == pytest.approx(625 * 250e-6)


def test_what_the_store_is_asked() -> None:
    store = StoreLoad(per_core_s=3.0, per_run=2.0, per_account_s=0.5, capacity_s=50_000)
    assert store.ops_per_s(DEMAND) == 64 * 3 + 20_000
    assert store.ops_per_s(DEMAND, accounts=20) == 64 * (3 + 10) + 20_000


def test_the_part_that_ends_first() -> None:
    call = PerCall(core_us=150.0, socket_us=100.0, bytes=1_000.0)
    store = StoreLoad(per_core_s=3.0, per_run=2.0)
    found = ceilings(DEMAND, call, store)
    assert found["a pool's core"] == pytest.approx(2_000 * 64 / 4)
    assert found["the store"] == pytest.approx((25_000 - 192) / 2)
    assert found["the network at a core"] == pytest.approx(0.5 * 1.25e9 / 1_000 * 64 / 4)
    assert first_limit(found) == ("the store", pytest.approx(12_404))
    assert ceilings(DEMAND, call, replace(store, per_run=0.0))["the store"] == math.inf
    assert ceilings(DEMAND, call, replace(store, per_run=0.0, per_core_s=1e3))["the store"] == 0.0


def a_row(what: str, ops_s: float = 0.0, functions: float = 1_000.0, **shape: Any) -> paper.Row:
    given = {"pools": 4, "keys": 0, **shape}
    return paper.Row(
        what, given, 10.0, 4_000, 1_000, {"calls": 300.0}, functions, 9.0, 900.0, {"put spent": ops_s}, 10.0
    )


def test_what_a_run_and_a_key_ask_is_a_difference_of_loads() -> None:
    rows = [
        a_row("no keys", 12.0), a_row("limits of runs", 212.0), a_row("4 pools", 52.0, keys=10),
        a_row("10 messages", functions=600), a_row("64 pools", functions=700, pools=64, keys=10),
    ]  # fmt: skip
    load = paper.store_load(rows, 50_000)
    assert (load.per_core_s, load.per_run, load.per_account_s) == (3.0, 2.0, 1.0)
    lines = "\n".join(paper.report(rows, 60, 50_000))
    assert "| a core's CPU for a call | 200 µs |" in lines and "| cores of CPU at half load | 16 |" in lines
    assert "The first limit: a pool's core, at 40,000 workflows/s" in lines
    assert "limits of its own: the store, at" in lines
    assert "A call with ten messages takes 180 µs of its core; the goal is 150." in lines


def test_two_pools_in_small() -> None:
    shape = Shape(pools=2, workflows_per_s=8.0, backends=2, replicas=1, keys=1, two_pools=0.5, run_limits=True)
    row = paper.measure("small", shape, 2.0)
    assert row.calls >= 20 and row.workflows >= 5
    assert 5 <= row.messages <= 60 and row.core_us > 0
    assert row.asked["lease core"] == pytest.approx(4.0, abs=1.0) and row.asked["put slices"] > 0


def test_every_group_of_loads_changes_one_figure() -> None:
    names = [what for what, _, _ in paper.loads(quick=False)]
    assert {"64 pools", "256 replicas", "10000 waiting", "200 messages", "no keys", "limits of runs"} <= {*names}
    assert len(names) == len({*names})
