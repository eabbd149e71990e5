"""The arithmetic of the pressure benchmark, and its load; no real engine is needed for it."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.lib.calls import CallSeen, JobSeen, Turn, bound, needed_tokens, peak_tokens, recomputed
from bench.lib.command import DOCS
from bench.lib.figures import percentile
from bench.lib.kept import Kept
from bench.lib.workflows import Session
from bench.pressure import arms, live, simulated, workflows
from orla_lg import Backend, Orla
from orla_lg.errors import EngineRefused
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.text import WordTokenizer
from tests.stub_engine import StubEngine

BLOCK = 32


def call(session: int, number: int, prompt: int, cached: int = 0, at_s: float = 0.0) -> Any:
    return CallSeen(session, number, at_s, at_s + 1, at_s + 3, prompt, cached, answer_tokens=48)


def turn(arm: str, seed: int, ended_s: float, cached: int = 0) -> Any:
    """A turn of one session with one call that ends when its job does."""
    one = CallSeen(0, 0, 0.0, ended_s / 2, ended_s, 1000, cached, 48)
    return Turn(arm, seed, 760, [one], [JobSeen(0, 0.0, ended_s)])


def figures(one: Any) -> dict[str, float]:
    return {name: of(one) for name, of in arms.Figures([one], BLOCK, 100).figures.items()}


def load(sessions: int = 3, seed: int = 0) -> Any:
    words = workflows.LocalWords(WordTokenizer())
    material = workflows.made_up(sessions + 1, 600)
    shape = workflows.Shape(sessions, prefix_tokens=100, history_tokens=500, answer_tokens=16)
    return workflows.load_of(material, shape, words, seed)


# The bound and the metrics ----------------------------------------------------------------------------------


def test_the_bound_counts_the_shared_prefix_once_and_histories_in_whole_blocks() -> None:
    calls = [call(0, 0, 900), call(1, 0, 861, at_s=0.1), call(0, 1, 1083, at_s=5)]
    # 900 anew; 771 in common are 24 blocks (768); 900 + 48 - 1 are known to the second call, 29 blocks (928)
    assert bound(calls, 771, BLOCK) == 900 + (861 - 768) + (1083 - 928)


def test_the_bound_leaves_a_prompts_last_token_to_be_computed() -> None:
    calls = [call(0, 0, 768), call(1, 0, 768, at_s=0.1)]
    assert bound(calls, 768, BLOCK) == 768 + 32


def test_an_engine_that_never_evicts_recomputes_just_the_bound() -> None:
    turns = simulated.SimulatedTurns(EngineParameters(kv_blocks=24), workflows.LocalWords(WordTokenizer()))
    endless, bare = turns.turn(arms.ENDLESS, load()), turns.turn(arms.ARMS[0], load())
    least = bound(endless.calls, endless.shared_tokens, BLOCK)
    assert recomputed(endless.calls) == least > 0
    assert bound(bare.calls, bare.shared_tokens, BLOCK) == least, "the bound is the load's, not the pool's"
    assert recomputed(bare.calls) > 1.1 * least, "a pool of 24 blocks evicts"


def test_metrics_count_from_arrival_and_from_the_nodes_call() -> None:
    calls = [call(0, 0, 800, at_s=1.0), call(1, 0, 800, 768, at_s=2.0)]
    jobs = [JobSeen(0, 1.0, 5.0), JobSeen(1, 2.0, 10.0)]
    found = figures(Turn("bare", 0, 771, calls, jobs))
    assert (found["makespan"], found["mean job"]) == (9.0, 6.0)
    assert (found["p95 job"], found["p95 call"], found["p95 TTFT"]) == (pytest.approx(7.8), 3.0, 1.0)
    assert (found["recomputed"], found["of the bound"]) == (832, 1.0)


def test_who_returns_is_told_apart_from_who_comes_first() -> None:
    seen = [CallSeen(0, n, n, n + wait, n + 9, 900, 0, 24) for n, wait in enumerate((8.0, 1.0, 3.0))]
    found = figures(Turn("bare", 0, 0, seen, [JobSeen(0, 0, 9)]))
    assert found["p95 TTFT, returning"] == pytest.approx(2.9), "between 1 and 3; the first call's 8 do not count"
    assert found["p95 TTFT"] > 7


def test_a_percentile_lies_between_its_neighbours() -> None:
    assert percentile([4, 1, 3, 2], 0.5) == 2.5
    assert percentile(range(101), 0.95) == 95
    assert percentile([7], 0.95) == 7


def test_what_sessions_hold_together_and_at_one_moment() -> None:
    calls = [call(0, 0, 900), call(0, 1, 1100, at_s=4), call(1, 0, 1000, at_s=8)]
    jobs = [JobSeen(0, 0, 7), JobSeen(1, 8, 11)]
    one_by_one = Turn("bare", 0, 760, calls, jobs)
    assert needed_tokens(one_by_one) == 760 + (1148 - 760) + (1048 - 760)
    assert peak_tokens(one_by_one) == 1148
    overlapping = Turn("bare", 0, 760, calls, [JobSeen(0, 0, 9), jobs[1]])
    assert peak_tokens(overlapping) == needed_tokens(overlapping)


# The load ---------------------------------------------------------------------------------------------------


def test_every_seed_has_the_same_length_in_other_shares() -> None:
    words = workflows.LocalWords(WordTokenizer())
    loads = [load(4, seed) for seed in range(3)]
    sizes = [[sum(len(words.tokenizer.encode(said)) for said in one.said) for one in each.sessions] for each in loads]
    assert len({tuple(each) for each in sizes}) == 3
    assert max(map(sum, sizes)) - min(map(sum, sizes)) <= 4 * 5, "rounding only"
    assert all(110 > each.shared_tokens >= 100 for each in loads)
    assert loads[0] == load(4, 0)


def test_a_history_ends_where_it_was_told_to() -> None:
    words, given = workflows.LocalWords(WordTokenizer()), load(4)
    turns = simulated.SimulatedTurns(EngineParameters(), words)
    seen = turns.turn(arms.ARMS[0], given)
    ends = [call.prompt_tokens + call.answer_tokens for call in seen.calls if call.number == 4]
    assert len(seen.calls) == 4 * 5
    assert sum(ends) / 4 == pytest.approx(500, rel=0.02)


def test_tools_take_what_the_quantiles_say_within_bounds() -> None:
    dice = random.Random(0)
    waits = [workflows.wait_s((0.3, 13.6), dice) for _ in range(2000)]
    assert min(waits) == 0.2
    assert max(waits) == 4.0
    assert percentile(waits, 0.5) == pytest.approx(0.3, rel=0.15)
    assert sum(wait == 4.0 for wait in waits) / 2000 == pytest.approx(0.19, abs=0.03)


def test_sessions_of_a_trace_keep_what_user_and_tools_said(tmp_path: Path) -> None:
    said = [[("user", f"question {n} " + "word " * 200), ("assistant", "an answer")] for n in range(5)]
    messages = [{"role": role, "content": text} for pair in said for role, text in pair]
    row = {"prompt_ref": "p", "tools_ref": "t", "messages": messages}
    (tmp_path / "s.jsonl").write_text(
        "\n".join(json.dumps(each) for each in (row, {**row, "messages": messages[:4]}))
    )
    (tmp_path / "p.json").write_text(json.dumps({"prompts": {"p": "policy " * 99}, "tools": {"t": [{"name": "n"}]}}))
    material = workflows.from_trace(tmp_path / "s.jsonl", tmp_path / "p.json")
    assert len(material.sessions) == 1, "one with two calls is too short"
    text, weights = material.sessions[0]
    assert "question 4" in text
    assert "answer" not in text
    assert len(weights) == 5
    with pytest.raises(SystemExit, match="has 1 sessions that are long enough; 2 are needed"):
        workflows.load_of(
            workflows.Material(["policy " * 99, "tools " * 99], material.sessions),
            workflows.Shape(2, 100, 500, 16), workflows.LocalWords(WordTokenizer()), 0,
        )  # fmt: skip


def test_a_wait_at_a_door_is_part_of_the_first_call() -> None:
    turns = simulated.SimulatedTurns(EngineParameters(), workflows.LocalWords(WordTokenizer()))
    seen = turns.turn(arms.Arm("cap1", cap=1), load(2))
    second = next(call for call in seen.calls if (call.session, call.number) == (1, 0))
    first_job = next(job for job in seen.jobs if job.session == 0)
    assert second.called_s == workflows.ARRIVE_EVERY_S
    assert second.first_s > first_job.ended_s


# Figures, and what is kept ----------------------------------------------------------------------------------


def test_ratios_are_seed_by_seed_and_only_whole_seeds_count() -> None:
    ends: dict[str, list[float]] = {"bare": [10, 20, 40], "bare_again": [11, 18, 40], "wrapped": [5, 16]}
    turns = [turn(arm, seed, end) for arm, row in ends.items() for seed, end in enumerate(row)]
    found = arms.Figures(turns, BLOCK, 100)
    assert found.seeds == [0, 1]
    assert found.ratio("wrapped", "makespan") == pytest.approx((0.65, 0.5, 0.8))
    assert found.verdict()[0] == "goal missed: mean job 0.65, wanted ≤ 0.64"
    assert found.table()[-1].startswith("| *goal, wrapped* | ≤ 0.78 |")
    assert found.verdict()[-1].startswith("the bare engine recomputes no more")


def test_without_the_bare_arm_there_is_nothing_to_tell() -> None:
    with pytest.raises(SystemExit, match="no seed has been measured in every arm yet, bare among them"):
        arms.Figures([turn("wrapped", 0, 10.0)], BLOCK, 100)


def test_the_plugin_is_held_against_stock_with_and_without_our_admission() -> None:
    cached = {"bare": 0, "wrapped": 400, "plugin": 100, "plugin+admission": 300}
    turns = [turn(arm, 0, 10.0, found) for arm, found in cached.items()]
    lines = arms.Figures(turns, BLOCK, 100).verdict()
    assert "goal missed: plugin, recomputed of bare's 0.90, wanted ≤ 0.80" in lines
    assert "goal missed: plugin+admission, recomputed of wrapped's 1.17, wanted ≤ 1.00" in lines
    table = arms.Figures(turns, BLOCK, 100).table()
    assert len({row.count("|") for row in table}) == 1, "as many cells in each row"


def test_where_all_fits_the_noise_is_the_measure() -> None:
    ends: dict[str, list[float]] = {"bare": [10, 20], "bare_again": [11, 20], "wrapped": [9.5, 19]}
    turns = [turn(arm, seed, end) for arm, row in ends.items() for seed, end in enumerate(row)]
    assert "goal" not in arms.Figures(turns, BLOCK, 5000).table()[-1]
    assert arms.Figures(turns, BLOCK, 5000).verdict()[0] == "wrapped, makespan: -5.0%, within the noise of ±10.0%"
    late = [each for each in turns if each.arm != "wrapped"] + [turn("wrapped", n, 24.0) for n in (0, 1)]
    assert "goal missed: beyond" in arms.Figures(late, BLOCK, 5000).verdict()[0]


def test_kept_turns_come_back_and_other_settings_are_refused(tmp_path: Path) -> None:
    file, settings = tmp_path / "kept.json", {"blocks": 240, "sessions": 12}
    kept = Kept(file, settings)
    kept.add(turn("bare", 0, 10.0))
    again = Kept(file, settings)
    assert again.turns == kept.turns
    assert again.has("bare", 0)
    assert not again.has("bare", 1)
    with pytest.raises(SystemExit, match=r"another blocks: \{'blocks': 240\}"):
        Kept(file, {**settings, "blocks": 100})


def test_figures_go_where_the_page_has_a_place_for_them(tmp_path: Path) -> None:
    text = (DOCS / "pressure.md").read_text(encoding="utf-8")
    for kind in ("live, 12 sessions", "live, all fit", "simulated, 12 sessions"):
        assert text.count(f"<!-- figures of bench/pressure: {kind} -->") == 1
    turns = [turn(arm, seed, 10.0) for arm in ("bare", "wrapped") for seed in (0, 1)]
    arms.draw(arms.Figures(turns, BLOCK, 100), tmp_path / "drawn.svg")
    assert "<svg" in (tmp_path / "drawn.svg").read_text()


# The graph --------------------------------------------------------------------------------------------------


def test_without_the_plugin_its_arms_are_refused() -> None:
    arm = next(arm for arm in arms.ARMS if arm.name == "plugin")
    engine = SimpleNamespace(url="http://127.0.0.1:1/v1", model="any", has_plugin=False)
    with pytest.raises(SystemExit, match="without the orla_lg plugin, which the arm plugin needs"):
        asyncio.run(live.live_turn(engine, arm, load(2)))


def test_an_arm_without_the_plugin_does_not_see_it() -> None:
    with StubEngine() as stub:
        backend = Backend("engine", stub.url, "any", engine="vllm")
        with live.plugin(seen=False), Orla([backend]) as orla:
            adapter = orla.core.serving.schedulers["engine"].adapter
            assert isinstance(adapter, live.Unplugged)
            with pytest.raises(EngineRefused, match="not there for this arm"):
                asyncio.run(adapter.post("orla/kv/stat", {}))
        assert not [seen for seen in stub.requests if "orla" in seen.path]
        with live.plugin(seen=True), Orla([backend]) as orla:
            assert not isinstance(orla.core.serving.schedulers["engine"].adapter, live.Unplugged)


@pytest.mark.parametrize("name", ["bare", "priority", "cap4", "wrapped"])
def test_each_arm_runs_the_same_graph(name: str) -> None:
    arm = next(arm for arm in arms.ARMS if arm.name == name)
    given = load(2)
    quick = [Session(0.0, each.said, (0.0,) * 4) for each in given.sessions]
    given = workflows.Load(0, given.system, tuple(quick), given.shared_tokens, given.answer_tokens)
    with StubEngine() as stub:
        emptied: list[int] = []
        engine = SimpleNamespace(
            url=stub.url, model="any", block_tokens=BLOCK, empty_cache=lambda: emptied.append(len(stub.requests))
        )
        made = asyncio.run(live.live_turn(engine, arm, given))
        asked = [seen.body for seen in stub.requests[emptied[0] :] if seen.body]
    assert len(made.jobs) == 2
    assert sorted((call.session, call.number) for call in made.calls) == [(s, n) for s in range(2) for n in range(5)]
    assert all(0 <= call.called_s <= call.first_s <= call.ended_s for call in made.calls)
    assert all(body["max_completion_tokens"] == body["min_tokens"] == 16 and body["ignore_eos"] for body in asked)
    assert {body.get("priority", 0) for body in asked} == ({0, 1} if arm.by_arrival else {0})
    last = max(asked, key=lambda body: len(body["messages"]))["messages"]
    assert [message["role"] for message in last] == ["system", *["user", "assistant"] * 4, "user"]
    assert last[1]["content"] in {each.said[0] for each in given.sessions}
    assert all(message["content"] for message in last), "the engine's own answers are in the history"
