"""``orla-lg replay`` as it is typed."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from orla_lg.cli import main
from orla_lg.replay import report
from orla_lg.replay.simulation import Simulation
from orla_lg.replay.study import Study


def replay(*words: object) -> int:
    return main(["replay", *map(str, words)])


def test_a_table_of_policies(recorded: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "p.svg"
    assert replay(recorded["fcfs"], "--policy", "all", "--plot", picture) == 0
    said = capsys.readouterr()
    assert "the unchanged setting matches what happened within 15%" in said.out and not said.err
    rows = {line.split("  ")[0]: line for line in said.out.splitlines()}
    assert {"happened", "unchanged, simulated", "policy las", "policy sjf"} <= {*rows}
    assert "no call of the file has what it orders by" in said.out
    assert picture.read_text().startswith("<?xml") and "Date" not in picture.read_text()[:3000]


def test_json(recorded: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--cap", "2", "--policy", "las", "--pool", "9000", "--speed", "2", "--together", "--json"]
    assert replay(recorded["fcfs"], *words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["concludes"] and [*said["others"]] == ["policy las, cap 2, pool 9,000, speed 2.0"]
    assert said["engines"]["engine"]["block_tokens"] == 32 and said["engines"]["engine"]["fitted_to"] == said["calls"]
    assert {row["figure"] for row in said["match"]} >= {"makespan_s", "mean_run_s", "p95_run_s", "cached"}


def test_what_does_not_match_is_refused_unless_it_is_wanted_anyway(
    recorded: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [recorded["fcfs"], "--kv-tokens", "engine=1,000", "--policy", "las", "--tolerance", "0.05"]
    assert replay(*words) == 3
    said = capsys.readouterr().out
    assert "does not match what happened (makespan" in said and "policy las" not in said and "likely: " in said
    assert replay(*words, "--anyway") == 0
    assert "policy las" in (said := capsys.readouterr().out) and "DOES NOT MATCH" in said


def test_what_goes_elsewhere_than_it_went(recorded: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--admission", "on", "--memory", "release_only", "--engines", "2", "--mapping", "agent=engine"]
    assert replay(recorded["fcfs"], *words) == 0
    said = capsys.readouterr().out
    assert all(
        f"\n{name} " in said for name in ("admission on", "memory release_only", "engines 2", "mapping agent=engine")
    )


@pytest.mark.parametrize(
    ("words", "status", "why"),
    [
        (["--policy", "fifo"], 1, "unknown scheduling policy 'fifo'"),
        (["--mapping", "agent"], 1, "expected STAGE=BACKEND"),
        (["--mapping", "agent=heavy"], 1, "the file has no backend 'heavy'"),
        (["--memory", "all"], 1, "unknown memory policy"),
        (["--cap", "0"], 2, "is no whole number from 1"),
        (["--speed", "-1"], 2, "is no number above 0"),
        (["--kv-tokens", "engine=many"], 1, "--kv-tokens engine=many: 'many' is no whole number"),
        (["--parameters", "none.toml"], 1, "engine parameters cannot be read from none.toml"),
        (["--config", "none.toml"], 1, "none.toml: cannot be read"),
        (["--together", "--cap", "2", "--cap", "3"], 1, "--together: one --cap only, got 2 and 3"),
        (["--format", "mooncake"], 1, "holds no arrival of the form mooncake"),
        (["--plot", "picture.doc"], 1, "--plot picture.doc: Format 'doc' is not supported"),
    ],
)
def test_a_wrong_word_says_what_is_right(
    recorded: dict[str, Path], words: list[str], status: int, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = replay(recorded["fcfs"], *words)
    except SystemExit as ended:
        found = int(ended.code or 0)
    assert found == status and why in capsys.readouterr().err


def test_without_matplotlib_it_says_how_to_get_it(
    recorded: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert replay(recorded["fcfs"], "--plot", "x.svg") == 1
    assert "pip install matplotlib" in capsys.readouterr().err


def test_broken_lines_are_named(
    recorded: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.gz"
    path.write_bytes(gzip.compress(b"{\n" + recorded["fcfs"].read_bytes() + b'{"id": 1}\n'))
    assert replay(path) == 0
    said = capsys.readouterr().out
    assert f"note: 2 lines of {path} could not be read: line 1 is no JSON" in said


def test_a_public_trace_is_replayed_on_a_given_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, engine = tmp_path / "t.jsonl", tmp_path / "engine.toml"
    rows = [{"timestamp": 50 * n, "input_length": 900, "output_length": 20, "hash_ids": [1, n]} for n in range(12)]
    trace.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert replay(trace, "--format", "mooncake") == 1
    assert "says nothing of an engine; give --parameters FILE" in capsys.readouterr().err
    engine.write_text("prefill_token_s = 0.001\n")
    assert replay(trace, "--format", "mooncake", "--parameters", engine, "--policy", "sjf", "--cap", "1") == 0
    said = capsys.readouterr().out
    assert "says what came and not what happened" in said and "cap 1" in said


class Stopping:
    """Interrupts the simulation of that number."""

    def __init__(self, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self._play = at, Study.play
        monkeypatch.setattr(Study, "play", lambda *args: self(*args))

    def __call__(self, *args: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        self._play(*args)


def test_ctrl_c_shows_what_was_finished(
    recorded: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Stopping(1, monkeypatch)
    assert replay(recorded["fcfs"], "--policy", "las", "--policy", "sjf") == 130
    said = capsys.readouterr()
    assert "policy las" in said.out and "policy sjf" not in said.out
    assert "stopped; 1 of 2 other settings were simulated" in said.err


def test_ctrl_c_before_anything_is_known(
    recorded: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(simulation: Simulation) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Simulation, "run", stop)
    assert replay(recorded["fcfs"]) == 130
    said = capsys.readouterr()
    assert not said.out and "stopped before the unchanged setting was simulated" in said.err


def test_on_a_terminal_it_says_how_far_it_is(
    recorded: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert replay(recorded["fcfs"], "--policy", "las") == 0
    said = capsys.readouterr().err
    assert "calls, finding the engine's numbers" in said and said.endswith("\r")
    assert replay(recorded["fcfs"], "--quiet") == 0 and not capsys.readouterr().err
