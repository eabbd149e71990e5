"""What ``orla-lg check`` says of pools: which there are, and which mapping chooses freely among several of them."""

from __future__ import annotations

from orla_lg.config_pools import faults_of_pools, free_choices, moved_backends
from orla_lg.mappers import OneBitStageMapper
from orla_lg.mappers.load import LoadAware
from orla_lg.mappers.table import stage_mapper

POOLS = {"fast": ("a", "b"), "large": ("c",)}


def test_no_pools_no_faults() -> None:
    assert not faults_of_pools({}, ["a"]) and not faults_of_pools(POOLS, ["a", "b", "c"])


def test_tables_choose_nothing_freely() -> None:
    table = stage_mapper({"draft": ["a", "c"], "*": "c"})
    assert not list(free_choices(POOLS, {"the mapping": table, "none": None}))


def test_a_mapper_over_two_pools_is_named() -> None:
    (said,) = free_choices(POOLS, {"the mapping": stage_mapper({"*": OneBitStageMapper("a", "c")})})
    assert said.startswith("pools: the mapping chooses freely among backends of fast and large (OneBitStageMapper)")
    assert not list(free_choices(POOLS, {"": OneBitStageMapper("a", "b")})), "of one pool"
    (said,) = free_choices(POOLS, {"variant 'v'": LoadAware({"*": ["a", "c"], "x": ["a", "b"]})})
    assert "variant 'v'" in said and "LoadAware" in said
    assert not list(free_choices(POOLS, {"": LoadAware({"*": ["a", "b"], "x": "c"})}))


def test_a_backend_may_come_or_go_and_not_move() -> None:
    assert not moved_backends(POOLS, {"fast": ("a",), "large": ("c", "d")})
    (said,) = moved_backends(POOLS, {"fast": ("a",), "large": ("c", "b")})
    assert "'b' moves from fast to large" in said
