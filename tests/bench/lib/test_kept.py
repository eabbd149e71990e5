"""Every turn is run once; what is kept is not run again, and a turn beside others once more."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.lib.calls import Turn
from bench.lib.kept import Kept

ARMS = [SimpleNamespace(name="bare"), SimpleNamespace(name="wrapped")]
FAR = "http://far.example/v1"


async def test_only_what_is_not_kept_is_run_and_all_arms_of_a_round_get_the_same_load(tmp_path: Path) -> None:
    ran: list[tuple[str, int, int]] = []

    async def turn(arm: SimpleNamespace, load: int, seed: int) -> Turn:
        ran.append((arm.name, load, seed))
        return Turn(arm.name, seed, 0, [], [])

    kept = Kept(tmp_path / "kept.json", {})
    kept.add(Turn("bare", 1, 0, [], []))
    loads: list[int] = []
    await kept.measure(FAR, ARMS, 2, lambda seed: loads.append(seed) or 10 + seed, turn)
    assert sorted(ran) == [("bare", 10, 0), ("wrapped", 10, 0), ("wrapped", 11, 1)]
    again = Kept(tmp_path / "kept.json", {})
    await again.measure(FAR, ARMS, 2, lambda seed: loads.append(seed) or 10 + seed, turn)
    assert len(ran) == 3 and loads == [0, 1]


@pytest.mark.parametrize(("others", "kept_others", "runs"), [([0.05], 0.05, 1), ([0.5, 0.3], 0.3, 2)])
async def test_a_turn_beside_others_is_run_once_more(
    tmp_path: Path, others: list[float], kept_others: float, runs: int
) -> None:
    left = list(others)

    async def turn(arm: SimpleNamespace, load: int, seed: int) -> Turn:
        return Turn(arm.name, seed, 0, [], [], left.pop(0))

    kept = Kept(tmp_path / "kept.json", {})
    await kept.measure(FAR, ARMS[:1], 1, lambda seed: seed, turn, quiet=0.1)
    assert [each.others for each in kept.turns] == [kept_others]
    assert len(others) - len(left) == runs


async def test_without_a_file_turns_are_kept_in_memory_each_at_its_place() -> None:
    async def turn(arm: SimpleNamespace, load: str, seed: int) -> Turn:
        return Turn(arm.name, seed, 0, [], [], place=load)

    kept = Kept(None, {})
    for place in ("here", "there", "here"):
        await kept.measure(None, ARMS, 1, lambda seed, place=place: place, turn, place=place)
    assert sorted((each.place, each.arm) for each in kept.turns) == [
        ("here", "bare"), ("here", "wrapped"), ("there", "bare"), ("there", "wrapped"),
    ]  # fmt: skip
