"""The arithmetic of the warm-up bench, its loads, and one turn of each situation on stub engines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.lib.calls import CallSeen, JobSeen, Turn, makespan_s, ttfts_s
from bench.lib.figures import Rounds
from bench.warm import __main__ as warm
from bench.warm import arms, situations, texts
from tests.stub_engine import StubEngine


def turn(arm: str, *returns_s: float, seed: int = 0, cached: int = 500, **more: Any) -> Any:
    """A workflow's first call, and those that count; each has a prompt of 600 tokens."""
    calls = [CallSeen(0, 0, 0.0, 90.0, 91.0, 500, 0, 4)]
    calls += [CallSeen(0, n, 9.0, 9.0 + s, 99.0, 600, cached, 4) for n, s in enumerate(returns_s, 1)]
    warm_ups = {**dict.fromkeys(arms.SHOWN, 0), "refused": {}, **more}
    return Turn(arm, seed, 0, calls, [JobSeen(0, 0.0, 100.0 + seed)], place="tool waits, llama.cpp", more=warm_ups)


# The figures ------------------------------------------------------------------------------------------------


def test_only_calls_that_something_could_be_warmed_for_count() -> None:
    seen = turn("bare", 0.2, 0.4, cached=150)
    assert ttfts_s(seen.returning) == [pytest.approx(0.2), pytest.approx(0.4)]
    assert arms.p50(seen) == pytest.approx(0.3)
    assert arms.COLUMNS[2].of(seen) == 900


def test_rounds_are_compared_with_their_own_load_and_broken_ones_not_at_all() -> None:
    bare, warmed = arms.BARE.name, arms.WARM.name
    turns = [turn(bare, 2.0), turn(bare, 4.0, seed=1), turn(bare, 9.0, seed=2)]
    turns += [turn(warmed, 1.0, seed=1), turn(warmed, 1.0)]
    ((where, group),) = arms.groups(turns).items()
    assert group.seeds == [0, 1]
    assert group.ratio(warmed, bare, arms.p50) == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert "p50 is 0.38 of that of *bare*" in arms.verdict(where, group)[0]


def test_two_equal_arms_tell_the_noise_and_refusals_their_reasons() -> None:
    names = (arms.BARE.name, arms.AGAIN.name)
    turns = [turn(name, wait_s) for name, wait_s in zip(names, (2.0, 2.2), strict=True)]
    turns.append(turn(arms.WARM.name, 1.0, refused={"late": 2, "busy": 1}))
    lines = arms.verdict("here", Rounds(turns, [*arms.ARMS]))
    assert "*bare again* against *bare*: p50 1.10" in lines[1]
    assert lines[2].endswith("late 2, busy 1")


def test_tokens_of_warm_ups_are_summed_over_the_rounds() -> None:
    told = {"done": 2, "given_up": 1, "warmed_tokens": 1000, "used_tokens": 900, "wasted_tokens": 100}
    turns = [turn(arms.WARM.name, 1.0, seed=seed, **told) for seed in range(2)]
    row = arms.rows("here", Rounds(turns))[-1]
    assert row.endswith("| 2,000 | 1,800 | 200 | 4, 2 |")
    assert "100.5 (100.0 … 101.0)" in row
    assert arms.rows("here", Rounds([turn("bare", 1.0)]))[-1].endswith("| – | – | – | – |")


def test_what_is_told_has_every_situation_and_is_drawn(tmp_path: Path) -> None:
    turns = [turn(arm, 1.0) for arm in ("bare", "orla, warm-ups")]
    turns += [replace(each, place="the night, llama.cpp", others=0.25) for each in turns]
    lines = arms.report(turns)
    assert [line.split("|")[1].strip() for line in lines if "TTFT p50, s" in line] == [
        "tool waits, llama.cpp",
        "the night, llama.cpp",
    ]
    assert lines[-1] == "Other processes took up to 25% of the machine."
    arms.draw(turns, tmp_path / "drawn.svg")
    assert "<svg" in (tmp_path / "drawn.svg").read_text(encoding="utf-8")


# The loads --------------------------------------------------------------------------------------------------


def test_all_arms_of_a_round_get_the_same_jobs_and_no_two_jobs_begin_alike() -> None:
    tools = situations.ToolWaits(workflows=6)
    one = tools.jobs(600, 1)
    assert one == tools.jobs(600, 1) != tools.jobs(600, 2)
    assert len({job.said[0][:12] for job in one}) == 6
    assert all(0.75 * 12 <= wait_s <= 1.25 * 12 for job in one for wait_s in job.waits_s)
    words = [len(job.said[0].split()) * texts.TOKENS_PER_WORD for job in one]
    assert all(500 < count < 720 for count in words)


def test_only_llama_cpp_saves_slots() -> None:
    args = SimpleNamespace(
        workflows=4, calls=5, wait=12.0, runs=6, threads=3, prepare=4.0, situation=["tools", "stages", "night"]
    )
    found = dict(zip(args.situation, warm.situations(args), strict=True))
    every = [*arms.ARMS]

    def names(situation: str, place: str) -> list[str]:
        return [arm.name for arm in found[situation].arms_at(arms.PLACES[place], every)]

    assert names("night", "llamacpp") == ["bare", "orla, no warm-ups", "orla, slots saved", "orla, warm-ups"]
    assert names("night", "vllm") == ["bare", "orla, no warm-ups", "orla, warm-ups"]
    assert names("tools", "vllm") == ["bare", "bare again", "orla, no warm-ups", "orla, warm-ups"]


# The situations ---------------------------------------------------------------------------------------------


class Stubbed:
    """A stub in the place of a real engine."""

    def __init__(self, stub: StubEngine, model: str) -> None:
        self.url, self.model = stub.url, model
        self.emptied = self.restarts = 0

    def empty_cache(self) -> None:
        self.emptied += 1

    def restart(self) -> None:
        self.restarts += 1


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stubbed]:
    from orla_lg import Backend
    from tests.stub_engine import MODEL

    def backend_at(place: Any, url: str, model: str, max_saved: int) -> Backend:
        return Backend("worker", url, model)

    monkeypatch.setattr(situations, "backend_at", backend_at)
    monkeypatch.setattr(situations, "NIGHT_S", 0.0)
    with StubEngine() as stub:
        yield Stubbed(stub, MODEL)


@pytest.mark.parametrize("arm", ["bare", "orla, no warm-ups"])
def test_each_situation_has_its_calls_in_every_arm(stubbed: Stubbed, arm: str) -> None:
    ticks: list[int] = []
    place, chosen = arms.PLACES["vllm"], arms.ARMS[arm]
    tools = situations.ToolWaits(workflows=2, calls=2, wait_s=0.05)
    turns = [
        asyncio.run(situation.turn(place, stubbed, chosen, 1, lambda: ticks.append(1)))
        for situation in (tools, situations.NextStage(runs=2), situations.Night(runs=2, prepare_s=0.0))
    ]
    assert [(len(each.calls), len(each.returning)) for each in turns] == [(4, 2), (10, 2), (4, 2)]
    assert (stubbed.emptied, stubbed.restarts, len(ticks)) == (2, 1, 4 + 5 + 2)
    assert all(0 <= call.called_s <= call.first_s <= call.ended_s for call in turns[0].calls)
    assert all(each.arm == arm and each.seed == 1 and makespan_s(each.jobs) > 0 for each in turns)
