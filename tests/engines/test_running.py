"""Who runs is known by a lock, and whoever is ended is gone with all that it started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orla_lg.engines import running
from orla_lg.engines.running import Running, claimed, find, kill, kill_group, members, stop
from orla_lg.errors import EngineError

PORT = 50_011
LIMIT_S = 30.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process groups are listed in /proc")

# Publishes an engine that has a child of its own, and is killed itself, as a launcher may be. The engine says
# that it is up by making a file; with "stubborn", it will not be asked to end.
LAUNCH = """
import os, signal, subprocess, sys, time
from orla_lg.engines.running import Running, claimed
ENGINE = '''
import pathlib, signal, subprocess, sys, time
if sys.argv[1] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[3] == "1":
    worker = subprocess.Popen(["sleep", "600"])
pathlib.Path(sys.argv[2]).touch()
time.sleep(600)
'''
with claimed(int(sys.argv[1])) as claim:
    words = [sys.executable, "-c", ENGINE, *sys.argv[2:]]
    child = subprocess.Popen(words, start_new_session=True, pass_fds=(claim.descriptor,))
    group = child.pid if sys.argv[4] == "1" else 0
    claim.publish(Running(int(sys.argv[1]), child.pid, "http://127.0.0.1:1/v1", "tiny", "vllm-cpu", group))
    while not os.path.exists(sys.argv[3]):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ORLA_CACHE_DIR", str(tmp_path))
    yield tmp_path
    for path in (tmp_path / "run").glob("*.json"):
        kill_group(json.loads(path.read_text()).get("group", 0))


def launch(home: Path, temper: str = "tame", grouped: bool = True) -> Running:
    words = [str(PORT), temper, str(home / "up"), str(int(grouped))]
    done = subprocess.run([sys.executable, "-c", LAUNCH, *words], timeout=LIMIT_S)
    assert done.returncode == -signal.SIGKILL
    engine = find(PORT)
    assert engine and engine.name == "tiny", "the engine holds the lock by itself"
    assert len(members(engine.group)) == 2 * grouped
    return engine


def run_folder(home: Path) -> list[str]:
    return [path.name for path in (home / "run").iterdir()]


@pytest.mark.parametrize("temper", ["tame", "stubborn"])
def test_an_engine_whose_launcher_was_killed_is_ended_with_all_its_processes(home: Path, temper: str) -> None:
    engine = launch(home, temper)
    began = time.monotonic()
    stop(engine, patience_s=1.0)
    assert (time.monotonic() - began > 1.0) == (temper == "stubborn")
    assert (members(engine.group), find(PORT), run_folder(home)) == ([], None, [])


def test_one_without_a_group_that_does_not_end_when_asked_is_killed(home: Path) -> None:
    engine = launch(home, "stubborn", grouped=False)
    stop(engine, patience_s=0.5)
    assert (find(PORT), run_folder(home)) == (None, [])


def test_killing_does_not_ask(home: Path) -> None:
    engine = launch(home, "stubborn")
    kill(engine)
    assert (members(engine.group), find(PORT), run_folder(home)) == ([], None, [])


def test_what_a_crashed_engine_left_running_is_ended_when_it_is_missed(home: Path) -> None:
    engine = launch(home)
    os.kill(engine.pid, signal.SIGKILL)
    deadline = time.monotonic() + LIMIT_S
    while engine.pid in members(engine.group):
        assert time.monotonic() < deadline
    assert len(members(engine.group)) == 1, "its worker lives on"
    assert find(PORT) is None
    assert (members(engine.group), run_folder(home)) == ([], [])


def test_a_group_that_has_its_leader_is_somebody_elses(home: Path) -> None:
    other = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        with claimed(PORT) as claim:
            claim.publish(Running(PORT, 1, "http://127.0.0.1:1/v1", "tiny", "vllm-cpu", other.pid))
            record = (home / "run" / f"engine-{PORT}.json").read_text()
        (home / "run" / f"engine-{PORT}.json").write_text(record)  # as if it had been killed
        assert find(PORT) is None
        assert members(other.pid) == [other.pid]
    finally:
        other.kill()
    deadline = time.monotonic() + LIMIT_S
    while members(other.pid):  # a zombie by now, since nobody waited for it
        assert time.monotonic() < deadline
    other.wait()


def test_no_group_has_no_members() -> None:
    assert members(0) == []


def test_a_port_has_one_engine_at_a_time(home: Path) -> None:
    with claimed(PORT) as claim:
        with pytest.raises(EngineError, match=f"another engine is being started on port {PORT}"), claimed(PORT):
            pass
        claim.publish(Running(PORT, os.getpid(), "http://127.0.0.1:1/v1", "tiny", "llamacpp"))
        with (
            pytest.raises(EngineError, match=rf"already runs on port {PORT} \(process {os.getpid()}\)"),
            claimed(PORT),
        ):
            pass
        assert [engine.port for engine in running.all_running()] == [PORT]
    assert run_folder(home) == []


def test_a_file_that_is_not_an_engines_is_named(home: Path) -> None:
    (home / "run").mkdir()
    (home / "run" / f"engine-{PORT}.json").write_text('{"port": 1}')
    with pytest.raises(EngineError, match=rf"engine-{PORT}.json is not an engine's file: .*remove it"):
        find(PORT)
