"""From records of one policy to what another one would have done, against what it did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from bench.lib.calls import makespan_s
from bench.pressure.arms import ARMS, BARE, WRAPPED
from bench.pressure.arms import recorded as recorded_arm
from bench.pressure.simulated import SimulatedTurns
from bench.pressure.workflows import LocalWords, Shape, load_of, made_up
from bench.replay.turns import POLICIES
from orla_lg.errors import ConfigError
from orla_lg.replay.figures import CACHED, MAKESPAN, MEAN_RUN, MEAN_TTFT, P95_RUN, TOLERANCE
from orla_lg.replay.reading import read
from orla_lg.replay.report import ReplayReport
from orla_lg.replay.study import Study, WhatIf
from orla_lg.replay.workload import workload_of
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.text import WordTokenizer
from tests.replay.conftest import BLOCK_TOKENS, BLOCKS, CAP, SESSIONS


def quiet(what: str) -> Callable[[int, int], None]:
    return lambda done, total: None


def replayed(path: Path, *whats: WhatIf, **given: Any) -> ReplayReport:
    study = Study(workload_of(read(path)), **given)
    study.check(whats)
    study.begin(quiet)
    for what in whats:
        study.play(what, quiet(""))
    return study.report


def changed(path: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Return a copy of a records file with each line changed in place."""
    made = folder / "changed.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if "id" in line:
            change(line)
    made.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return made


def without_shape(row: dict[str, Any], at_s: float = 0.0) -> None:
    shape = row.pop("shape")
    end_s = shape["arrived_s"] + row["duration_s"]
    row["at"] = f"2026-01-01T00:{int(end_s // 60):02}:{end_s % 60:06.3f}+00:00"


def test_the_records_say_what_they_need_to(recorded: dict[str, Path]) -> None:
    seen = read(recorded["las"])
    assert not seen.broken and not seen.without_shape and not seen.lost_beginnings
    assert {call.run for call in seen.calls} == {f"run-{n}" for n in range(SESSIONS)}
    assert seen.setting is not None and not seen.setting.admission
    backend = seen.setting.backends["engine"]
    assert (backend.kv_tokens, backend.max_concurrency) == (BLOCKS * BLOCK_TOKENS, CAP)
    assert backend.stage_policy == backend.request_policy["*"] == "las"
    text = recorded["las"].read_text()
    assert "http" not in text and len(text) < 2_000 * len(seen.calls)


@pytest.mark.parametrize("policy", POLICIES)
def test_each_policys_records_match_and_tell_of_the_others(recorded: dict[str, Path], policy: str) -> None:
    others = [WhatIf(other, policy=other) for other in POLICIES if other != policy]
    report = replayed(recorded[policy], *others)
    assert report.verdict is not None and report.verdict.concludes and not report.verdict.withheld
    happened = {other: replayed(recorded[other]).happened for other in POLICIES}
    found = {policy: report.unchanged, **report.others}
    for other in POLICIES:
        for figure in (MAKESPAN, MEAN_RUN, P95_RUN, MEAN_TTFT):
            mine, theirs = found[other][figure.name], happened[other][figure.name]
            assert mine == pytest.approx(theirs, rel=TOLERANCE), (policy, other, figure.name)
    by = MEAN_RUN.name
    assert sorted(POLICIES, key=lambda each: found[each][by] or 0) == sorted(
        POLICIES, key=lambda each: happened[each][by] or 0
    )


def test_a_turn_of_bench_pressure_tells_what_it_would_have_been_without_admission(tmp_path: Path) -> None:
    words, sessions = LocalWords(WordTokenizer()), 8
    load = load_of(made_up(sessions, 2100), Shape(sessions), words, 0)
    turns = SimulatedTurns(EngineParameters(kv_blocks=160, block_tokens=BLOCK_TOKENS), words)
    arms = {arm.name: arm for arm in ARMS}
    turns.turn(recorded_arm(arms[WRAPPED], tmp_path, 0), load)
    bare = turns.turn(arms[BARE], load)
    report = replayed(tmp_path / f"{WRAPPED}-0.jsonl", WhatIf("off", admission=False))
    assert report.verdict is not None and report.verdict.concludes and not report.verdict.withheld
    found, jobs = report.others["off"], [job.ended_s - job.arrived_s for job in bare.jobs]
    assert found[MAKESPAN.name] == pytest.approx(makespan_s(bare.jobs), rel=TOLERANCE)
    assert found[MEAN_RUN.name] == pytest.approx(fmean(jobs), rel=TOLERANCE)
    assert (found[MEAN_RUN.name] or 0) > 1.1 * (report.unchanged[MEAN_RUN.name] or 0)


def test_other_engines_change_what_they_should(recorded: dict[str, Path]) -> None:
    report = replayed(
        recorded["fcfs"], WhatIf("fast", speed=4.0), WhatIf("two", engines=2), WhatIf("small", pool=2_600),
        WhatIf("one", cap=1), WhatIf("admitted", admission=True), WhatIf("both", policy="las", cap=2),
    )  # fmt: skip
    mean, cached = (
        {name: found[of.name] or 0.0 for name, found in report.others.items()} for of in (MEAN_RUN, CACHED)
    )
    unchanged = report.unchanged[MEAN_RUN.name] or 0.0
    assert mean["fast"] < 0.6 * unchanged and mean["two"] < 0.9 * unchanged and mean["one"] > unchanged
    assert cached["small"] < (report.unchanged[CACHED.name] or 0.0)
    assert mean["both"] > unchanged and mean["admitted"] != unchanged


def test_a_cache_that_was_another_is_seen_and_nothing_is_concluded_of_it(recorded: dict[str, Path]) -> None:
    report = replayed(recorded["fcfs"], kv_tokens={"engine": 3000}, tolerance=0.1)
    assert report.verdict is not None and CACHED.name in report.verdict.withheld
    unknown = replayed(recorded["fcfs"], kv_tokens={"*": 1_000_000}, tolerance=0.1)
    assert unknown.verdict is not None and CACHED.name in unknown.verdict.withheld
    assert any("less than its size allows" in reason for reason in unknown.verdict.reasons)


def test_a_cache_of_unknown_size_is_asked_for(recorded: dict[str, Path], tmp_path: Path) -> None:
    def forget(row: dict[str, Any]) -> None:
        row["shape"].pop("setting", None)

    report = replayed(changed(recorded["fcfs"], tmp_path, forget), tolerance=0.1)
    assert report.verdict is not None and not report.verdict.concludes
    assert any("give --kv-tokens" in reason for reason in report.verdict.reasons)
    assert any("defaults are taken" in note for note in report.notes)


def test_an_engine_that_something_else_slowed_is_refused_with_the_reason(
    recorded: dict[str, Path], tmp_path: Path
) -> None:
    half = len(read(recorded["fcfs"]).calls) // 2
    count = iter(range(10_000))

    def slow(row: dict[str, Any]) -> None:
        if next(count) > half:
            row["duration_s"] += 8 * (row["duration_s"] - row["queue_wait_s"] - row["ttft_s"])

    report = replayed(changed(recorded["fcfs"], tmp_path, slow), tolerance=0.02)
    assert report.verdict is not None and report.verdict.withheld
    assert any("something else took the engine's time" in reason for reason in report.verdict.reasons)


def test_an_older_file_tells_of_policies_and_not_of_caches(recorded: dict[str, Path], tmp_path: Path) -> None:
    path = changed(recorded["fcfs"], tmp_path, without_shape)
    config = tmp_path / "orla.toml"
    config.write_text(
        f'policy = "fcfs"\nadmission = false\n[backends.engine]\nurl = "http://127.0.0.1:1/v1"\n'
        f'max_concurrency = {CAP}\n[mapping]\n"*" = "engine"\n'
    )
    report = replayed(path, WhatIf("las", policy="las"), config=config)
    assert report.verdict is not None and report.verdict.concludes
    assert any("nothing is concluded about caches" in note for note in report.notes)
    assert report.others["las"][MEAN_RUN.name] != report.unchanged[MEAN_RUN.name]
    for what in (WhatIf("pool", pool=10), WhatIf("engines", engines=2), WhatIf("admission", admission=True)):
        with pytest.raises(ConfigError, match="it says nothing about caches"):
            replayed(path, what, config=config)


def test_calls_that_did_not_stream_tell_enough_of_their_engine(recorded: dict[str, Path], tmp_path: Path) -> None:
    def unstreamed(row: dict[str, Any]) -> None:
        row["ttft_s"] = None

    report = replayed(changed(recorded["fcfs"], tmp_path, unstreamed), WhatIf("las", policy="las"))
    assert report.verdict is not None and report.verdict.concludes
    happened = replayed(recorded["las"]).happened
    assert report.others["las"][MEAN_RUN.name] == pytest.approx(happened[MEAN_RUN.name], rel=TOLERANCE)
    assert (
        report.happened[MEAN_TTFT.name] is None
        and report.withheld(MEAN_TTFT)
        and any("did not stream" in note for note in report.notes)
    )


def test_a_policy_of_the_users_own_is_named_and_not_replayed(recorded: dict[str, Path], tmp_path: Path) -> None:
    def other(row: dict[str, Any]) -> None:
        for each in row["shape"].get("setting", {}).get("backends", {}).values():
            each |= {"stage_policy": "ImpatientFirst", "request_policy": {"*": "las", "agent": "\x1b[31m"}}

    report = replayed(changed(recorded["fcfs"], tmp_path, other))
    assert any("'ImpatientFirst'" in note and "no policy of orla_lg's" in note for note in report.notes)
    assert not any("\x1b" in note for note in report.notes)


def test_calls_that_failed_are_counted_and_doubted(recorded: dict[str, Path], tmp_path: Path) -> None:
    count = iter(range(10_000))

    def fail(row: dict[str, Any]) -> None:
        if next(count) % 2:
            row["error"] = "ValueError: no"

    report = replayed(changed(recorded["fcfs"], tmp_path, fail), tolerance=1e-9)
    assert report.verdict is not None and "calls cannot be simulated" in report.verdict.reasons[0]
    assert any("failed, went elsewhere" in note for note in report.notes)


def test_what_cannot_be_replayed_says_why(recorded: dict[str, Path], tmp_path: Path) -> None:
    def lose(row: dict[str, Any]) -> None:
        row["completion_tokens"] = None

    with pytest.raises(ConfigError, match="can be simulated: each failed"):
        replayed(changed(recorded["fcfs"], tmp_path, lose))

    few = iter(range(10_000))

    def most_failed(row: dict[str, Any]) -> None:
        row["error"] = "ValueError: no" if next(few) > 5 else None

    with pytest.raises(ConfigError, match=r"at least 8 are needed.*--parameters FILE"):
        replayed(changed(recorded["fcfs"], tmp_path, most_failed))
    with pytest.raises(ConfigError, match=r"no backend of .* is called 'engin'; did you mean 'engine'"):
        replayed(recorded["fcfs"], kv_tokens={"engin": 3})
    with pytest.raises(ConfigError, match="the file has no backend 'light'"):
        replayed(recorded["fcfs"], WhatIf("m", mapping={"agent": "light"}))
