"""The arithmetic of the warm-up bench, its loads, and one turn of each situation on stub engines."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.stub_engine import StubEngine

BENCH = Path(__file__).resolve().parent.parent / "bench"
PARTS = ("arms", "figures", "next_stage", "night", "places", "tool_waits", "yard")
PACKAGES = ("warm_returns", "paper_cache", "under_pressure", "more_than_slots")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The benchmark's modules, by name."""
    sys.path.insert(0, str(BENCH))
    found = {part: import_module(f"warm_returns.{part}") for part in PARTS}
    yield SimpleNamespace(**found, seen=import_module("under_pressure.seen"), warm=import_module("warm"))
    sys.path.remove(str(BENCH))
    for name in [
        name
        for name in sys.modules
        if name.partition(".")[0] in (*PACKAGES, "warm", "others", "ending", "flags", "marks")
    ]:
        del sys.modules[name]


def turn(bench: Any, arm: str, *returns_s: float, seed: int = 0, cached: int = 500, **more: Any) -> Any:
    """A workflow's first call, and those that count; each has a prompt of 600 tokens."""
    calls = [bench.seen.CallSeen(0, 0, 0.0, 90.0, 91.0, 500, 0, 4)]
    calls += [bench.seen.CallSeen(0, n, 9.0, 9.0 + s, 99.0, 600, cached, 4) for n, s in enumerate(returns_s, 1)]
    warm_ups = bench.arms.WarmUps(**more)
    return bench.arms.Measured("tool waits", "llama.cpp", arm, seed, calls, 100.0 + seed, warm_ups)


# The figures ------------------------------------------------------------------------------------------------


def test_only_calls_that_something_could_be_warmed_for_count(bench: Any) -> None:
    seen = turn(bench, "bare", 0.2, 0.4, cached=150)
    assert bench.figures.waits_s(seen) == [pytest.approx(0.2), pytest.approx(0.4)]
    assert bench.figures.p50(seen) == pytest.approx(0.3)
    assert bench.figures.recomputed(seen) == 900


def test_rounds_are_compared_with_their_own_load_and_broken_ones_not_at_all(bench: Any) -> None:
    bare, warm = bench.arms.BARE.name, bench.arms.WARM.name
    turns = [turn(bench, bare, 2.0), turn(bench, bare, 4.0, seed=1), turn(bench, bare, 9.0, seed=2)]
    turns += [turn(bench, warm, 1.0, seed=1), turn(bench, warm, 1.0)]
    (group,) = bench.figures.groups(turns)
    assert {each.seed for each in group} == {0, 1}
    assert bench.figures.ratio(group, warm, bare, bench.figures.p50) == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert "p50 is 0.38 of that of *bare*" in bench.figures.verdict(group)[0]


def test_two_equal_arms_tell_the_noise_and_refusals_their_reasons(bench: Any) -> None:
    names = (bench.arms.BARE.name, bench.arms.AGAIN.name)
    turns = [turn(bench, name, wait_s) for name, wait_s in zip(names, (2.0, 2.2), strict=True)]
    turns.append(turn(bench, bench.arms.WARM.name, 1.0, refused={"late": 2, "busy": 1}))
    lines = bench.figures.verdict(turns)
    assert "*bare again* against *bare*: p50 1.10" in lines[1]
    assert lines[2].endswith("late 2, busy 1")


def test_tokens_of_warm_ups_are_summed_over_the_rounds(bench: Any) -> None:
    told = {"done": 2, "given_up": 1, "warmed_tokens": 1000, "used_tokens": 900, "wasted_tokens": 100}
    turns = [turn(bench, bench.arms.WARM.name, 1.0, seed=seed, **told) for seed in range(2)]
    row = bench.figures.table(turns)[-1]
    assert row.endswith("| 2,000 | 1,800 | 200 | 4, 2 |")
    assert "100.5 (100.0 … 101.0)" in row
    assert bench.figures.table([turn(bench, "bare", 1.0)])[-1].endswith("| – | – | – | – |")


def test_what_is_told_has_every_situation_and_is_drawn(bench: Any, tmp_path: Path) -> None:
    turns = [turn(bench, arm, 1.0) for arm in ("bare", "orla, warm-ups")]
    turns += [replace(each, situation="the night", others=0.25) for each in turns]
    lines = bench.figures.report(turns)
    assert [line.split("|")[1].strip() for line in lines if "TTFT p50, s" in line] == [
        "tool waits, llama.cpp",
        "the night, llama.cpp",
    ]
    assert lines[-1] == "Other processes took up to 25% of the machine."
    bench.figures.draw(turns, tmp_path / "drawn.svg")
    assert "<svg" in (tmp_path / "drawn.svg").read_text(encoding="utf-8")


# The loads --------------------------------------------------------------------------------------------------


def test_all_arms_of_a_round_get_the_same_jobs_and_no_two_jobs_begin_alike(bench: Any) -> None:
    shape = bench.tool_waits.Shape(workflows=6)
    one = bench.tool_waits.jobs_of(shape, 600, 1)
    assert one == bench.tool_waits.jobs_of(shape, 600, 1) != bench.tool_waits.jobs_of(shape, 600, 2)
    assert len({job.said[0][:12] for job in one}) == 6
    assert all(0.75 * 12 <= wait_s <= 1.25 * 12 for job in one for wait_s in job.waits_s)
    words = [len(job.said[0].split()) * bench.yard.TOKENS_PER_WORD for job in one]
    assert all(500 < count < 720 for count in words)


def test_only_llama_cpp_saves_slots(bench: Any) -> None:
    args = SimpleNamespace(
        workflows=4, calls=5, wait=12.0, runs=6, threads=3, prepare=4.0, situation=["tools", "stages", "night"]
    )
    found = bench.warm.situations(args)
    every = [*bench.arms.ARMS]

    def names(situation: str, place: str) -> list[str]:
        arms = bench.warm.arms_of(found[situation], bench.places.PLACES[place], every)
        return [arm.name for arm in arms]

    assert names("night", "llamacpp") == ["bare", "orla, no warm-ups", "orla, slots saved", "orla, warm-ups"]
    assert names("night", "vllm") == ["bare", "orla, no warm-ups", "orla, warm-ups"]
    assert names("tools", "vllm") == ["bare", "bare again", "orla, no warm-ups", "orla, warm-ups"]


# The situations ---------------------------------------------------------------------------------------------


class Stubbed:
    """A stub in the place of a real engine."""

    def __init__(self, stub: StubEngine, model: str) -> None:
        self.url, self.model, self.name = stub.url, model, model
        self.emptied = self.restarts = 0

    def empty_cache(self) -> None:
        self.emptied += 1

    async def restart(self) -> None:
        self.restarts += 1


@pytest.fixture
def stubbed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stubbed]:
    from orla_lg import Backend
    from tests.stub_engine import MODEL

    def backend_at(place: Any, url: str, model: str, max_saved: int) -> Backend:
        return Backend("worker", url, model)

    for part in (bench.tool_waits, bench.next_stage, bench.night):
        monkeypatch.setattr(part, "backend_at", backend_at)
    monkeypatch.setattr(bench.night, "NIGHT_S", 0.0)
    with StubEngine() as stub:
        yield Stubbed(stub, MODEL)


@pytest.mark.parametrize("arm", ["bare", "orla, no warm-ups"])
def test_each_situation_has_its_calls_in_every_arm(bench: Any, stubbed: Stubbed, arm: str) -> None:
    ticks: list[int] = []
    place, chosen = bench.places.PLACES["vllm"], bench.arms.ARMS[arm]
    tools = bench.tool_waits.Shape(workflows=2, calls=2, wait_s=0.05)
    stages, night = bench.next_stage.Shape(runs=2), bench.night.Shape(runs=2, prepare_s=0.0)
    turns = [
        asyncio.run(part.turn(place, stubbed, chosen, 1, shape, lambda: ticks.append(1)))
        for part, shape in ((bench.tool_waits, tools), (bench.next_stage, stages), (bench.night, night))
    ]
    assert [(len(each.calls), len(each.counted)) for each in turns] == [(4, 2), (10, 2), (4, 2)]
    assert (stubbed.emptied, stubbed.restarts, len(ticks)) == (2, 1, 4 + 5 + 2)
    assert all(0 <= call.called_s <= call.first_s <= call.ended_s for call in turns[0].calls)
    assert all(each.arm == arm and each.seed == 1 and each.makespan_s > 0 for each in turns)
