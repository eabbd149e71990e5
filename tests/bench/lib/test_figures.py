"""The arithmetic that every benchmark has in common."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from bench.lib.figures import Column, Rounds, Spread, at_rank, percentile, ratios, rotated, spread, table


@dataclass(frozen=True)
class Turn:
    arm: str
    seed: int
    wall_s: float


def wall_s(turn: Turn) -> float:
    return turn.wall_s


def test_a_percentile_lies_between_its_neighbours() -> None:
    assert percentile([4, 1, 3, 2], 0.5) == 2.5
    assert percentile(range(101), 0.95) == 95
    assert (percentile([7], 0.95), percentile([], 0.5)) == (7, 0.0)


def test_a_rank_is_a_value_that_was_measured() -> None:
    assert at_rank([4, 1, 3, 2], 0.5) == 3
    assert at_rank([4, 1, 3, 2], 1.0) == 4


def test_a_median_stands_with_its_extremes() -> None:
    assert spread([3, 1, 2]) == Spread(2, 1, 3)
    assert spread([3, 1, 2]).shown() == "2.00 (1.00 … 3.00)"
    assert spread([-0.1, -0.3]).shown("+.0%", bold=True) == "**-20%** (-30% … -10%)"
    assert spread([1000.1, 1000.2]).shown(",.0f", always=False) == "1,000", "nothing differs as shown"
    assert spread([5, 5]).shown(".0f") == "5 (5 … 5)"


def test_ratios_are_pair_by_pair() -> None:
    assert ratios([1, 4, 0], [2, 2, 0]) == [0.5, 2.0, 1.0]
    with pytest.raises(ValueError, match="zip"):
        ratios([1], [1, 2])


def test_arms_are_compared_in_rounds_that_all_have_had() -> None:
    turns = [Turn("bare", seed, 2.0 + seed) for seed in (2, 0, 1)] + [Turn("ours", seed, 1.0) for seed in (1, 2)]
    rounds = Rounds(turns)
    assert (rounds.arms, rounds.seeds) == (["bare", "ours"], [1, 2])
    assert rounds.column("bare", wall_s) == [3.0, 4.0] and len(rounds.all()) == 4
    assert rounds.ratios("bare", "ours", wall_s) == [3.0, 4.0]
    assert rounds.ratio("bare", "ours", wall_s) == 3.5
    assert rounds.of("unheard of") == []


def test_a_row_for_each_arm_in_the_order_that_is_wanted() -> None:
    rounds = Rounds(
        [Turn(arm, seed, 2.0 + seed) for arm in ("new", "ours", "bare") for seed in (0, 1)], ["bare", "ours"]
    )
    assert rounds.arms == ["bare", "ours", "new"]
    columns = (Column("wall, s", wall_s), Column("none", lambda turn: 0.0, ".0f"))
    lines = rounds.table("here", columns, heads=["turns"], cells=lambda turns: [str(len(turns))], always=False)
    assert lines[0] == "| here | wall, s | none | turns |"
    assert lines[2] == "| bare | 2.50 (2.00 … 3.00) | 0 | 2 |" and len(lines) == 5


def test_without_the_arm_that_must_be_there_no_round_counts() -> None:
    assert Rounds([Turn("ours", 0, 1.0)], must=["bare"]).seeds == []
    assert Rounds(list[Turn]()).arms == []


def test_each_arm_is_first_once() -> None:
    assert [rotated("abc", number) for number in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_a_table_has_a_cell_for_each_head() -> None:
    assert table(["arm", "s"], [["bare", "1"]]) == ["| arm | s |", "|---|---|", "| bare | 1 |"]
