from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg.core.lookahead.estimates import Estimates
from orla_lg.core.lookahead.stage_estimates import MAX_VISITS, OLD_WEIGHT, Mean
from orla_lg.core.lookahead.trace import RunTrace
from orla_lg.errors import ConfigError


def live(estimates: Estimates, stages: list[tuple[str, float]], graph: str = "g") -> RunTrace:
    """Let a run enter stages one after another, each with one call of so many seconds, and end."""
    run = RunTrace(graph=graph)
    for stage, service_s in stages:
        estimates.enter(run, stage)
        estimates.served(run, stage, service_s, 10)
    estimates.ended(run)
    return run


def at(estimates: Estimates, *stages: str, graph: str = "g") -> float | None:
    """Return what a run needs that has come through *stages* and is in the last of them."""
    run = RunTrace(graph=graph)
    for stage in stages:
        estimates.enter(run, stage)
    return estimates.remaining_s(run, [stages[-1]])


def test_nothing_is_known_of_what_never_ran() -> None:
    estimates = Estimates()
    live(estimates, [("a", 1.0)])
    assert at(estimates, "a", graph="another") is None and at(estimates, "b") is None
    assert estimates.answer_tokens("g", "b") is None and estimates.service_s("another", "a") is None


def test_each_stage_knows_what_comes_after_it() -> None:
    estimates = Estimates()
    live(estimates, [("a", 1.0), ("b", 2.0), ("c", 4.0)])
    assert (at(estimates, "a"), at(estimates, "b"), at(estimates, "c")) == (7.0, 6.0, 4.0)
    assert estimates.service_s("g", "b") == 2.0 and estimates.answer_tokens("g", "b") == 10


def test_a_loop_is_known_by_visit() -> None:
    """Half of the runs go round once, half five times: whoever is in the second round has three more to come."""
    estimates = Estimates()
    for rounds in (1, 5) * 10:
        live(estimates, [("think", 1.0)] * rounds)
    assert at(estimates, "think") == pytest.approx(3.0, abs=0.2)
    assert at(estimates, "think", "think") == 4.0


def test_visits_beyond_the_last_one_kept_count_as_that_one() -> None:
    estimates = Estimates()
    live(estimates, [("think", 1.0)] * (MAX_VISITS + 3))
    assert at(estimates, *["think"] * (MAX_VISITS + 9)) == (4 + 3 + 2 + 1) / 4


def test_a_visit_never_seen_is_taken_for_the_nearest_one() -> None:
    estimates = Estimates()
    live(estimates, [("think", 1.0)] * 3)
    assert at(estimates, *["think"] * 6) == 1.0


def test_the_longest_of_parallel_branches_counts() -> None:
    estimates = Estimates()
    live(estimates, [("short", 1.0)])
    live(estimates, [("long", 5.0)])
    run = RunTrace(graph="g")
    assert estimates.remaining_s(run, ["short", "long", "unknown"]) == 5.0
    assert estimates.remaining_s(run, []) is None


def test_a_run_that_did_not_end_teaches_nothing_of_what_comes_after() -> None:
    estimates = Estimates()
    run = RunTrace(graph="g")
    estimates.enter(run, "a")
    estimates.served(run, "a", 1.0, None)
    assert at(estimates, "a") is None
    assert estimates.service_s("g", "a") == 1.0 and estimates.answer_tokens("g", "a") is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=OLD_WEIGHT))
def test_a_young_mean_is_the_mean(values: list[float]) -> None:
    mean = Mean()
    for value in values:
        mean.learn(value)
    assert mean.value == pytest.approx(sum(values) / len(values), abs=1e-3) and mean.seen == len(values)


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_an_old_mean_follows_a_change(before: float, after: float) -> None:
    mean = Mean()
    for value in [before] * 1000 + [after] * 5 * OLD_WEIGHT:
        mean.learn(value)
    assert abs(mean.value - after) <= 0.01 * abs(after - before) + 1e-6


def test_stages_untouched_longest_are_forgotten() -> None:
    estimates = Estimates(keep=3)
    for stage in "abcd":
        live(estimates, [(stage, 1.0)])
    assert [stage for stage in "abcd" if at(estimates, stage) is None] == ["a"]
    for number in range(100):
        live(estimates, [(f"stage {number}", 1.0)])
    assert sum(at(estimates, f"stage {number}") is not None for number in range(100)) == 3


@given(
    st.lists(
        st.tuples(st.sampled_from("gh"), st.lists(st.tuples(st.sampled_from(["a", "b|c", "ü"]), st.floats(0, 1e4)))),
        max_size=6,
    )
)
def test_a_file_gives_back_what_was_saved(runs: list[tuple[str, list[tuple[str, float]]]]) -> None:
    estimates, again = Estimates(), Estimates()
    for graph, stages in runs:
        live(estimates, stages, graph)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "estimates.json"
        estimates.save(file)
        assert again.load(file) and list(Path(folder).iterdir()) == [file]
    for graph, stages in runs:
        for stage, _ in stages:
            assert at(again, stage, graph=graph) == pytest.approx(at(estimates, stage, graph=graph), abs=1e-5)
            assert again.answer_tokens(graph, stage) == estimates.answer_tokens(graph, stage)


def test_what_was_loaded_goes_on_learning(tmp_path: Path) -> None:
    estimates, again = Estimates(), Estimates()
    live(estimates, [("a", 1.0)])
    estimates.save(tmp_path / "e")
    again.load(tmp_path / "e")
    live(again, [("a", 2.0)])
    assert at(again, "a") == 1.5


def test_a_file_that_is_not_there_is_no_mistake(tmp_path: Path) -> None:
    assert not Estimates().load(tmp_path / "none")


def valid() -> dict[str, Any]:
    return {
        "format": "orla-lg estimates", "version": 2,
        "stages": [{
            "graph": "g", "stage": "a", "answer_tokens": [1.0, 1], "service_s": [1.0, 1], "calls": [1.0, 1],
            "other_s": [0.5, 1], "tool_s": [0.0, 0], "visits": [1.0, 1],
            "remaining_s": {"1": [9.0, 1]}, "growth_tokens": {"2": [7.0, 1]}, "final": {"1": [0.5, 4]},
            "turns": 3.0, "moves": {"b": 2.0}, "backends": {"main": 1.0},
        }],
    }  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to everything in plain data."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from places(each, (*path, key))


def changed(path: tuple[Any, ...], to: str) -> str:
    """Return the valid file with something else at *path*, as it stands in JSON; ``""``: with nothing there."""
    made = [valid()]
    within: Any = made
    for key in (whole := (0, *path))[:-1]:
        within = within[key]
    if not to:
        del within[whole[-1]]
        return json.dumps(made[0]) if made else ""
    within[whole[-1]] = "here"
    return json.dumps(made[0]).replace('"here"', to)


DEEP = "[" * 100_000 + "]" * 100_000
PLACES = list(places(valid()))
WRONG = [
    "not json", "{}", '"text"', DEEP, "9" * 5_000,
    *(json.dumps(valid() | {"version": version}) for version in (3, 0, 1.5)),
    json.dumps(valid()).replace('"1":', '"0":'), json.dumps(valid()).replace('"1":', '"first":'),
    json.dumps(valid()).replace('"1":', '"99999999999999999999":'),
    json.dumps(valid()).replace("[9.0, 1]", "[9.0, 1.5]"),
    *(changed(path, "") for path in PLACES if path and not isinstance(path[-1], int) and len(path) < 4),
    *(changed(path, to) for path in PLACES
      for to in ("Infinity", "-Infinity", "NaN", "1e999", "-1e20", "null", "true", "9" * 400, '{"x": {}}', DEEP)),
]  # fmt: skip


def test_a_wrong_file_is_refused_and_does_no_harm(tmp_path: Path) -> None:
    file, estimates = tmp_path / "estimates.json", Estimates()
    live(estimates, [("a", 1.0)])
    file.write_text(json.dumps(valid()))
    assert Estimates().load(file), "else nothing is shown below"
    for wrong in WRONG:
        file.write_text(wrong)
        with pytest.raises(ConfigError, match="does not hold estimates of ours") as fault:
            estimates.load(file)
        assert len(str(fault.value)) < 500, wrong[:100]
    assert at(estimates, "a") == 1.0 and at(estimates, "b") is None


@pytest.mark.parametrize(
    ("path", "to", "said"),
    [
        (("stages", 0, "turns"), "Infinity", r"stages\[0\].turns is Infinity, not a number from 0 to 1e\+15"),
        (("stages", 0, "calls", 1), "Infinity", r"stages\[0\].calls\[1\] is Infinity"),
        (("stages", 0, "calls", 1), "-1", r"stages\[0\].calls\[1\] is -1"),
        (("stages", 0, "moves", "b"), '"many"', r'stages\[0\].moves.b is "many"'),
        (("stages", 0, "remaining_s", "1"), "3", r"stages\[0\].remaining_s.1 is 3, not an average and a count"),
        (("stages", 0, "service_s"), "", r"stages\[0\].service_s is missing"),
        (("stages", 0), DEEP, "nested too deep"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(path: tuple[Any, ...], to: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "e").write_text(changed(path, to))
    with pytest.raises(ConfigError, match=said):
        Estimates().load(tmp_path / "e")


def test_names_that_no_encoding_takes_come_back(tmp_path: Path) -> None:
    estimates, again = Estimates(), Estimates()
    live(estimates, [("\ud800\n\0", 1.0)], "\udfff")
    estimates.save(tmp_path / "e")
    assert again.load(tmp_path / "e") and at(again, "\ud800\n\0", graph="\udfff") == 1.0


def test_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "e").write_bytes(random.Random(0).randbytes(200))
    with pytest.raises(ConfigError):
        Estimates().load(tmp_path / "e")


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be kept in"):
        Estimates().save(tmp_path / "none" / "e")
