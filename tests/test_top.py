"""``orla-lg top`` and the commands that steer, against a process of its own with calls that wait."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orla_lg import cli
from orla_lg.control.client import Client
from orla_lg.control.state import BackendState, Holder, Occupancy, ProcessState
from orla_lg.core.accounting.costs import Spent
from orla_lg.core.cache.verification import VerificationCounts
from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.memory.events import Doing
from orla_lg.core.operation.statistics import Waiting, WaitsFor
from orla_lg.top import commands, view
from tests.waiting_app import CALLS, LIMIT, SECRET

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60.0

App = subprocess.Popen[str]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[App, str]]:
    """A process whose calls wait, and its socket."""
    path = str(tmp_path_factory.mktemp("app") / "orla.sock")
    command = [sys.executable, "-m", "tests.waiting_app", path]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process, path
        if process.poll() is None:
            with Client(path) as client:  # whatever a test left
                assert client.state().backends["light"].waiting == CALLS - LIMIT, "nothing queued is lost"
            assert orla_lg("resume", "light", "--control", path) == 0
            process.stdin.write("open\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{CALLS}\n", "every call came back"


def orla_lg(*args: str) -> int:
    return cli.main(args)


def test_a_look_at_a_process_with_calls_that_wait(app: tuple[App, str], capsys: pytest.CaptureFixture[str]) -> None:
    process, path = app
    assert orla_lg("top", "--once", "--json", "--control", path) == 0
    line = capsys.readouterr().out
    state = json.loads(line)
    assert SECRET not in line and state["pid"] == process.pid and state["runs"] == CALLS
    light, heavy = state["backends"]["light"], state["backends"]["heavy"]
    assert (light["in_flight"], light["max_concurrency"], light["waiting"]) == (LIMIT, LIMIT, CALLS - LIMIT)
    assert light["waiting_by_stage"] == {"draft": CALLS - LIMIT} and heavy["spent"]["calls"] == CALLS
    assert [(each["stage"], each["waits_for"]) for each in light["waits"]] == [("draft", "place")] * (CALLS - LIMIT)
    assert len({each["workflow"] for each in light["waits"]}) == CALLS - LIMIT
    assert all(each["waited_s"] > 0 and each["expected_tokens"] > 0 for each in light["waits"])
    assert heavy["kv"]["capacity_tokens"] and heavy["engine"] == "llamacpp"
    assert {each["state"] for each in heavy["kv"]["workflows"]} <= {"tool", "idle"}
    assert set(heavy["truth"]) == {"claimed_tokens", "verified_tokens", "borne_out", "refuted"}


def test_the_same_for_people(app: tuple[App, str], capsys: pytest.CaptureFixture[str]) -> None:
    process, path = app
    assert orla_lg("top", "--once", "--control", path) == 0
    said = capsys.readouterr().out
    assert f"process {process.pid}   {CALLS} runs open" in said
    (light,) = [line.split() for line in said.splitlines() if line.startswith("light")]
    assert light[:5] == ["light", "openai", "open", f"{LIMIT}/{LIMIT}", str(CALLS - LIMIT)]
    assert said.count("a place") == CALLS - LIMIT and f"draft {CALLS - LIMIT}" in said


def test_pause_drain_and_resume(app: tuple[App, str], capsys: pytest.CaptureFixture[str]) -> None:
    _, path = app
    assert orla_lg("pause", "light", "--control", path) == 0
    assert f"light is paused: {LIMIT} calls go on, {CALLS - LIMIT} calls wait" in capsys.readouterr().out
    assert orla_lg("drain", "light", "--timeout", "0.1", "--control", path) == 1
    assert f"light stays paused: {LIMIT} calls are still in flight" in capsys.readouterr().out
    assert orla_lg("drain", "heavy", "--control", path) == 0
    assert "heavy is drained" in capsys.readouterr().out
    for name in ("light", "heavy"):
        assert orla_lg("resume", name, "--control", path) == 0
    assert f"light goes on: {LIMIT} calls are in flight, {CALLS - LIMIT} calls wait" in capsys.readouterr().out


def test_move(app: tuple[App, str], capsys: pytest.CaptureFixture[str]) -> None:
    _, path = app
    assert orla_lg("move", "t0", "light", "--control", path) == 0
    assert capsys.readouterr().out == "the next calls of t0 go to light\n"
    assert orla_lg("move", "t0", "--back", "--control", path) == 0
    assert capsys.readouterr().out == "the next calls of t0 go where its mapping says\n"
    for words, fault in (
        (("t9", "light"), "no thread 't9', and no open run"), (("t0", "lihgt"), "unknown backend 'lihgt'"),
        (("t0", "light", "--tenant", "acme"), "no thread 't0'"),
    ):  # fmt: skip
        assert orla_lg("move", *words, "--control", path) == 1
        assert fault in capsys.readouterr().err


def test_policies_and_limits(app: tuple[App, str], capsys: pytest.CaptureFixture[str]) -> None:
    _, path = app
    chosen = ("--stage-policy", "edf", "--request-policy", "priority")
    assert orla_lg("set", "policy", *chosen, "--backend", "light", "--control", path) == 0
    assert capsys.readouterr().out == (
        f"light: stages go by edf, calls of one stage by priority (*); {CALLS - LIMIT} calls wait\n"
    )
    with Client(path) as client:
        order = [each.priority for each in client.state().backends["light"].waits]
    assert order == sorted(order, reverse=True)
    assert orla_lg("set", "policy", "--policy", "priority", "--backend", "light", "--control", path) == 0
    assert "stages go by priority, calls of one stage by priority (*)" in capsys.readouterr().out
    assert orla_lg("set", "limit", "heavy", "--max-concurrency", "1", "--capacity", "5", "--control", path) == 0
    assert capsys.readouterr().out == "heavy: at most 1 call in flight (0 now), 5 waiting (0 now)\n"
    assert orla_lg("set", "limit", "heavy", "--max-concurrency", "none", "--control", path) == 0
    assert "heavy: at most 2 calls in flight" in capsys.readouterr().out, "as its slots bound it"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("pause", "hevy"), "unknown backend 'hevy'; did you mean 'heavy'"),
        (("set", "policy", "--stage-policy", "first"), "unknown scheduling policy 'first'"),
        (("set", "policy"), "nothing to change"),
        (("set", "limit", "heavy"), "nothing to change"),
        (("set", "limit", "heavy", "--capacity", "many"), "--capacity: 'many' is not a whole number of 0 or more"),
        (("set", "limit", "heavy", "--max-concurrency", "0"), "--max-concurrency: '0' is not a whole number of 1"),
    ],
)
def test_what_is_wrong_is_said(
    app: tuple[App, str], args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert orla_lg(*args, "--control", app[1]) == 1
    assert message in capsys.readouterr().err


def test_watching_goes_on_until_ctrl_c(app: tuple[App, str]) -> None:
    command = [sys.executable, "-m", "orla_lg", "top", "--json", "--interval", "0.1", "--control", app[1]]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None and watching.stderr is not None
        first, second = (json.loads(watching.stdout.readline()) for _ in range(2))
        assert second["at_s"] > first["at_s"]
        watching.send_signal(signal.SIGINT)
        assert watching.wait(PATIENCE_S) == 0 and watching.stderr.read() == ""


def test_the_process_is_found_by_its_configuration(
    app: tuple[App, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORLA_CONTROL", app[1])
    assert orla_lg("top", "--once", "--json") == 0
    monkeypatch.delenv("ORLA_CONTROL")
    assert orla_lg("top", "--once") == 1
    said = capsys.readouterr().err
    assert "which process?" in said and "control socket. Any of these opens one" in said
    (tmp_path / "orla.toml").write_text('[backends.b]\nurl = "http://127.0.0.1:1/v1"\n')
    assert orla_lg("top", "--once") == 1
    said = capsys.readouterr().err
    assert "names no control socket" in said and "ORLA_CONTROL=" in said and 'control = "orla.sock"' in said
    (tmp_path / "orla.toml").write_text(f'control = "{app[1]}"\n[backends.b]\nurl = "http://127.0.0.1:1/v1"\n')
    assert orla_lg("top", "--once") == 0


def test_no_process_is_said_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert orla_lg("top", "--control", str(tmp_path / "none.sock")) == 1
    said = capsys.readouterr().err
    assert "no running process at" in said and "Orla(backends, control=" in said


def test_a_process_that_ends_is_told(tmp_path: Path) -> None:
    path = str(tmp_path / "orla.sock")
    code = (
        "import sys; from orla_lg import Backend, Orla\n"
        f"with Orla([Backend('b', 'http://127.0.0.1:1/v1')], control={path!r}): print('on', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as served:  # fmt: skip
        assert served.stdin is not None and served.stdout is not None
        assert served.stdout.readline() == "on\n"
        command = [sys.executable, "-m", "orla_lg", "top", "--json", "--interval", "0.1", "--control", path]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=ROOT, **pipes) as watching:  # type: ignore[call-overload]
            seen = watching.stdout.readline()
            served.stdin.write("\n")
            served.stdin.close()
            _, told = watching.communicate(timeout=PATIENCE_S)
    assert json.loads(seen)["pid"] == served.pid
    assert (watching.returncode, told) == (0, "the process has ended\n")


# The view


def a_wait(workflow: str, waits_for: WaitsFor, **rest: Any) -> Waiting:
    return Waiting("c1", workflow, "r", "reply", None, 2.0, 1.25, waits_for, 1200, **rest)


QUIET = BackendState(
    engine="vllm", reachable=True, circuit=Circuit.CLOSED, paused=False, in_flight=0, max_concurrency=None, waiting=0,
    capacity=10, waiting_by_stage={}, stage_policy="edf", request_policies={"*": "fcfs"}, spent=Spent(),
    kv=Occupancy(), cache_effects={}, truth=VerificationCounts(0, 0, {}, {}), waits=(),
)  # fmt: skip


def drawn(state: ProcessState, history: view.History | None = None, rows: int = 50) -> str:
    if history is None:
        history = view.History()
        history.add(state)
    console = Console(file=io.StringIO(), width=160, markup=False, record=True)
    console.print(view.frame(state, history, rows=rows))
    return console.export_text()


def test_each_kind_of_wait_and_of_workflow_is_put_into_words() -> None:
    backend = replace(
        QUIET, waiting=7, waiting_by_stage={"reply": 5, "": 2},
        waits=tuple(a_wait(f"w{n}", kind) for n, kind in enumerate(WaitsFor)),
        kv=Occupancy(10_000, 1_000, 9_000, 5, tuple(Holder(f"h{n}", 9 - n, kind) for n, kind in enumerate(Doing))),
    )  # fmt: skip
    said = drawn(ProcessState(1, 0.0, 3, 2, 1, {"heavy": backend}))
    for part in (
        "a place", "a cache slot", "its cache to fit (1200 tokens)", "its prefix (another branch", "paused",
        "circuit (another call", "generating", "tool", "human", "idle", "and 1 more waits", "and 1 more holds cache",
        "calls that wait", "waits for",
        "workflows whose KV cache is held", "1 thread idle", "3 calls ended",
        "9000 of 10k", "█" * view.BAR, "reply 5 · (no graph) 2", "1.2 s",
    ):  # fmt: skip
        assert part in said, part


def test_odds_stand_where_the_order_goes_by_them() -> None:
    waits = (a_wait("w", WaitsFor.PLACE, final_odds=0.75), a_wait("v", WaitsFor.PLACE))
    said = drawn(ProcessState(1, 0.0, 3, 2, 1, {"heavy": replace(QUIET, waiting=2, waits=waits)}))
    assert "last call" in said and "75%" in said and " 0%" in said
    said = drawn(ProcessState(1, 0.0, 3, 2, 1, {"heavy": replace(QUIET, waiting=1, waits=waits[1:])}))
    assert "last call" not in said


def test_headings_say_what_stands_below_them() -> None:
    waiting = replace(QUIET, waiting=1, waits=(a_wait("w", WaitsFor.PLACE),), cache_effects={"flush:deferred": 2})
    held = replace(waiting, kv=Occupancy(None, 0, 1, 1, (Holder("h", 1, Doing.IDLE),)))
    said = drawn(ProcessState(1, 0.0, 1, 1, 1, {"b": held}))
    assert "1 run open, 1 thread idle   1 call ended" in said and " 1 token " in f"{said} "
    headings = [line.split("  ")[0].strip() for line in said.splitlines() if line and not line[0].isspace()]
    assert [each for each in headings if each in ("found", "for", "resident", "asked", "waiting")] == []
    for title in ("orders to caches", "calls that wait", "workflows whose KV cache is held"):
        assert title in said and title in commands.TOP_EXAMPLES
    assert "flush: 2 deferred" in said and "waits for" in said and "kept" in said


def test_what_was_claimed_of_caches_and_what_calls_found() -> None:
    effects = {f"pin:{each}": n for n, each in enumerate("abcdef")} | {"flush:freed": 40}
    truth = VerificationCounts(1_000, 940, {"kept": 7, "freed": 2}, {"pinned": 1})
    asked = replace(QUIET, cache_effects=effects, truth=truth)
    said = drawn(ProcessState(1, 0.0, 0, 0, 0, {"b": asked, "quiet": QUIET}))
    assert (
        "94 %" in said
        and "flush: 40 freed · pin: 5 f, 4 e" in said
        and " a," not in said
        and "9 of 10 as ordered" in said
    )
    assert "no cache was given an order" in drawn(ProcessState(1, 0.0, 0, 0, 0, {"quiet": QUIET}))
    unjudged = drawn(ProcessState(1, 0.0, 0, 0, 0, {"b": replace(asked, truth=QUIET.truth)}))
    assert "as ordered" not in unjudged and "94 %" not in unjudged


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "open"),
        ({"paused": True, "in_flight": 1}, "paused"),
        ({"paused": True}, "drained"),
        ({"circuit": Circuit.OPEN}, "circuit open"),
        ({"reachable": False}, "gone"),
        ({"reachable": None}, "?"),
    ],
)
def test_conditions(change: dict[str, Any], said: str) -> None:
    assert view.condition(replace(QUIET, **change)) == said


def test_rates_are_of_the_last_ten_seconds() -> None:
    history = view.History()
    for second in range(60):
        spent = Spent(calls=2 * second, completion_tokens=second * second)
        history.add(ProcessState(1, float(second), 0, 0, 0, {"b": replace(QUIET, spent=spent)}))
    calls, tokens = history.rates("b") or (0.0, 0.0)
    assert calls == 2.0 and tokens == (59**2 - 49**2) / 10
    assert history.rates("other") is None


def test_long_lists_are_cut_and_names_are_not_markup() -> None:
    waits = tuple(a_wait(f"[red]{n}[/red]", WaitsFor.PLACE) for n in range(100))
    said = drawn(ProcessState(1, 0.0, 0, 0, 0, {"b": replace(QUIET, waiting=500, waits=waits)}), rows=10)
    assert "[red]0[/red]" in said and said.count("a place") == 10 and "and 490 more wait" in said
