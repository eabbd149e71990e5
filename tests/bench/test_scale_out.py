"""``make bench-scale-out``: what its figures are made of."""

from __future__ import annotations

import cProfile
from itertools import islice
from pathlib import Path

import pytest

from bench.lib.figures import Rounds
from bench.scale_out import caller, cost, waits
from bench.scale_out.waits import Arm, Block


def block(cores: int, replicas: int, seed: int, *wait_ms: float) -> Block:
    return Block(Arm(cores, replicas), seed, wait_ms, 100.0, 400.0 if cores else None)


def turn(messages: int, seed: int, cpu_us: float) -> cost.Turn:
    return cost.Turn(f"{messages} messages", seed, messages, cpu_us, 0.4, 2.0, 3_000.0)


def test_what_cores_add_is_against_as_many_replicas_with_cores_of_their_own() -> None:
    blocks = [
        block(0, 4, 0, 0.1, 0.1, 9.0), block(1, 4, 0, 0.5, 0.4, 0.5), block(2, 4, 0, 0.3),
        block(1, 4, 1, 2.5), block(0, 4, 1, 2.1), block(0, 8, 0, 5.0), block(1, 8, 0, 7.0),
    ]  # fmt: skip
    assert waits.added(blocks, Arm(1, 4)) == pytest.approx([0.4, 0.4])
    assert waits.added(blocks, Arm(1, 8)) == pytest.approx([2.0])
    rows = waits.report(blocks)
    assert rows[2].startswith("| in the process × 4 | ") and rows[2].endswith("|  | 100 (100 … 100) |  |")
    assert rows[3].startswith("| 1 core × 4 replicas | 1.50 (0.50 … 2.50) | 2.5 | **0.40** (0.40 … 0.40) |")
    assert rows[4].startswith("| 2 cores × 4 replicas | 0.30 (0.30 … 0.30) | 0.3 | **0.20** (0.20 … 0.20) |")


def test_a_core_costs_so_much_and_does_not_grow_with_prompts() -> None:
    def rounds(short: float, long: float) -> Rounds[cost.Turn]:
        return Rounds([turn(10, seed, short) for seed in (0, 1)] + [turn(200, seed, long) for seed in (0, 1)])

    assert cost.beyond_goal(rounds(140.0, 150.0)) == []
    dear, grows = cost.beyond_goal(rounds(200.0, 600.0))
    assert "takes 200 µs" in dear and "3.0 times as much" in grows
    assert turn(10, 0, 200.0).capacity == pytest.approx(5_000.0)


def test_the_prompts_of_a_workflow_go_on_from_turn_to_turn() -> None:
    made = list(islice(caller.prompts(10, 1), 2 * caller.TURNS))
    assert [turn for turn, *_ in made] == [*range(caller.TURNS)] * 2
    assert [len(hashes) for *_, hashes, _ in made[: caller.TURNS]] == [6, 8, 10, 12, 14]
    (_, one, first, _), (_, same, second, _), other = made[0], made[1], made[caller.TURNS]
    assert one == same != other[1] and second[:6] == first
    assert first[0] == other[2][0], "all begin with one system prompt"
    said = caller.enter("c", *made[0][1:], "main")
    assert said.prompt_chars == 6 * caller.CHARS and list(said.answers) == [2, 4]


def test_a_profile_names_what_takes_most_by_itself(tmp_path: Path) -> None:
    with cProfile.Profile() as profile:
        sorted(range(1000), key=lambda each: -each)
    profile.dump_stats(path := tmp_path / "profile")
    head, *rows = cost.top(path, 10)
    assert head.split() == ["µs", "times", "function"]
    assert any("test_scale_out.py" in row and "<lambda>" in row and " 100.0 " in row for row in rows)
