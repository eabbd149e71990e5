"""The cache experiment's load, its arms and its figures; no real engine is needed for them."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.cache import arms, workflows
from bench.lib.calls import CallSeen, JobSeen, Turn
from bench.lib.workflows import Session
from orla_lg_sim.text import WordTokenizer
from tests.stub_engine import StubEngine


def place(name: str) -> Any:
    return next(each for each in arms.PLACES if each.name == name)


def engine(url: str = "", emptied: list[str] | None = None, *, has_plugin: bool = True) -> SimpleNamespace:
    def empty_cache() -> None:
        if emptied is not None:
            emptied.append("emptied")

    prompt = WordTokenizer().prompt
    return SimpleNamespace(url=url, model="any", has_plugin=has_plugin, prompt=prompt, empty_cache=empty_cache)


def turn(arm: str, seed: int, wait_s: float, cached: int) -> Any:
    """One case of two calls, of which the second finds so many tokens."""
    calls = [CallSeen(0, n, n * 10.0, n * 10 + wait_s, n * 10 + 5.0, 700 + 100 * n, cached * n, 24) for n in range(2)]
    return Turn(arm, seed, 640, calls, [JobSeen(0, 0.0, 15.0)])


# The load ---------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_cases_and_another_one_others() -> None:
    cases = workflows.tickets(8, 4.0, 3)
    assert cases == workflows.tickets(8, 4.0, 3)
    assert not {each.said for each in cases} & {each.said for each in workflows.tickets(8, 4.0, 4)}
    assert all(len(each.said) == len(each.waits_s) == len(workflows.STAGES) for each in cases)
    assert all(0.2 <= wait_s <= 3.0 for each in cases for wait_s in each.waits_s[1:])
    assert [each.waits_s[0] for each in cases] == [0.0] * 8, "nothing is looked up before the first stage"


def test_cases_arrive_as_a_poisson_process() -> None:
    begins_s = [each.begin_s for each in workflows.tickets(2000, 1.5, 0)]
    gaps_s = [after - before for before, after in pairwise(begins_s)]
    mean_s = sum(gaps_s) / len(gaps_s)
    variance = sum((gap_s - mean_s) ** 2 for gap_s in gaps_s) / len(gaps_s)
    assert mean_s == pytest.approx(1.5, rel=0.1)
    assert variance == pytest.approx(mean_s**2, rel=0.2), "an exponential's deviation is its mean"


def test_all_cases_begin_alike_and_soon_differ() -> None:
    words = WordTokenizer()
    first, second = (words.prompt(workflows.opening(each)) for each in workflows.tickets(2, 1.0, 0))
    policy = len(words.encode(workflows.POLICY))
    assert first[:policy] == second[:policy]
    assert first[policy : policy + 12] != second[policy : policy + 12]


# The arms ---------------------------------------------------------------------------------------------------


def test_what_makes_no_sense_at_a_place_is_not_run_there() -> None:
    def names(where: str, *, has_plugin: bool = True) -> list[str]:
        return [arm.name for arm in arms.arms_at(place(where), engine(has_plugin=has_plugin))]

    plain = ["engine's own LRU", "the same again"]
    assert names("llamacpp-short") == [*plain, "flush per request", "flush per workflow"]
    assert names("llamacpp-room") == names("vllm-room") == [*plain, "flush per workflow"]
    whole = "reset of everything per request"
    assert names("vllm-short") == [*plain, whole, "flush per request", "flush per workflow"]
    assert names("vllm-short", has_plugin=False) == [*plain, whole]


@pytest.mark.parametrize("name", ["engine's own LRU", "reset of everything per request", "flush per workflow"])
def test_each_arm_runs_the_same_five_stages_from_an_empty_cache(name: str) -> None:
    arm = next(arm for arm in arms.ARMS if arm.name == name)
    said = [each.said for each in workflows.tickets(2, 1.0, 0)]
    cases = [Session(0.0, words, (0.0,) * 5) for words in said]
    emptied: list[str] = []
    with StubEngine() as stub:
        turns = arms.Turns(place("vllm-short"), engine(stub.url, emptied))
        made = asyncio.run(turns.turn(arm, cases, 7))
        asked = [seen.body for seen in stub.requests if seen.body and "ignore_eos" in seen.body]
    assert emptied == ["emptied"]
    assert made.seed == 7 and len(made.jobs) == 2
    assert sorted((call.session, call.number) for call in made.calls) == [(c, n) for c in range(2) for n in range(5)]
    assert all(0 <= call.called_s <= call.first_s <= call.ended_s for call in made.calls)
    assert turns.resets_refused == (10 if arm.resets else 0), "this engine has no such route: every reset is refused"
    last = max(asked, key=lambda body: len(body["messages"]))["messages"]
    assert [message["role"] for message in last] == ["system", *["user", "assistant"] * 4, "user"]
    assert [message["content"] for message in last if message["role"] == "user"] in [list(words) for words in said]
    assert last[0]["content"] == workflows.POLICY


# The figures ------------------------------------------------------------------------------------------------


def test_figures_are_medians_of_rounds_that_all_arms_have_had() -> None:
    rows = {"engine's own LRU": [(1.0, 0), (3.0, 0), (9.0, 0)], "flush per workflow": [(0.5, 600), (1.5, 600)]}
    turns = [turn(arm, seed, *each) for arm, row in rows.items() for seed, each in enumerate(row)]
    where = place("llamacpp-short")
    found, over_bound = arms.rounds_of(where, turns), arms.over_bound(where).of
    assert found.seeds == [0, 1]
    assert found.column("engine's own LRU", arms.P50.of) == [1.0, 3.0]
    assert found.ratio("flush per workflow", "engine's own LRU", arms.P50.of) == 0.5
    # 700 anew; the second call of 800 finds what 700 + 24 - 1 left, token by token
    assert found.column("flush per workflow", over_bound) == [(700 + 200) / (700 + 800 - 723)] * 2
    assert "| 2.00 (1.00 … 3.00) |" in arms.report(where, found)[4]
    assert "has 0.50 of the median TTFT of *engine's own LRU*" in arms.verdict(where, found)[0]
    with pytest.raises(SystemExit, match="no round has been measured in every arm"):
        arms.rounds_of(where, [turns[2], turns[3]])


def test_whole_blocks_are_the_bound_of_an_engine_with_blocks() -> None:
    only = [turn("engine's own LRU", 0, 1.0, 704)]
    where = place("vllm-short")
    found = arms.rounds_of(where, only)
    assert found.column("engine's own LRU", arms.over_bound(where).of) == [1.0], (
        "of 723 tokens 22 blocks of 32 are whole"
    )


def test_curves_are_drawn(tmp_path: Path) -> None:
    names = ("engine's own LRU", "flush per workflow")
    found = {each: arms.rounds_of(each, [turn(arm, 0, 1.0, 0) for arm in names]) for each in arms.PLACES}
    arms.draw(found, tmp_path / "drawn.svg")
    assert "<svg" in (tmp_path / "drawn.svg").read_text(encoding="utf-8")
