from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langgraph.graph import END, START, MessagesState, StateGraph

from orla_lg import Backend, Cost, Effect, Orla, cli
from orla_lg import explain as explaining
from orla_lg.core.accounting import journal
from orla_lg.core.accounting.journal import Appended, Journal
from orla_lg.core.call import Considered
from orla_lg.core.record import CacheFollowUp
from tests.conftest import at, chat
from tests.mappers.test_cost_quality import record
from tests.stub_engine import MODEL, StubEngine

TOLD = (
    Considered("home", {"expected_s": 3.5, "waiting": 4}, "home"),
    Considered("away", {"expected_s": 1.25, "engine_waiting": 0}, "chosen"),
)
MOVED = record(
    "sub|reply", "away", id="abc-1", mapper="load+explicit", reason="'home' expected 3.50 s, 'away' 1.25 s",
    considered=TOLD, model="m", run="r1", step=2, tenant="acme", queue_wait_s=0.25, ttft_s=0.5, duration_s=1.5,
    prompt_tokens=100, cached_tokens=60, completion_tokens=7, cost_usd=0.00012, attempts=2,
)  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    written = Journal(path)
    for each in (record("classify", "home", id="abd-2"), MOVED, record("other", None, id="x", error="QueueFull: no")):
        written.record(each)
    written.feedback("abc-1", 0.5)
    written.close()
    return path


def explain(*args: str | Path) -> int:
    return cli.main(["explain", *map(str, args)])


def test_a_record_is_told_whole(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain("abc-1", "--records", file) == 0
    said = capsys.readouterr().out
    for part in (
        "record abc-1  ended 20", "stage 'sub|reply', step 2: workflow", "run r1 (tenant acme)",
        "ran on 'away', model 'm'",
        "decided by load+explicit: 'home' expected 3.50 s", "it waited 0.250 s",
        "first token 0.500 s later, 1.500 s in all",
        "100 prompt tokens (60 cached), 7 answered tokens, 0.000120 US dollars", "2 attempts; KV cache: ",
        "scored 0.5",
    ):  # fmt: skip
        assert part in said, part
    table = [line.split() for line in said.splitlines() if line.startswith(("considered", "home", "away"))]
    assert table == [
        ["considered", "expected_s", "waiting", "engine_waiting"],
        ["home", "3.5", "4", "-", "home"],
        ["away", "1.25", "-", "0", "chosen"],
    ]


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (["last"], "x"),
        ([], "x"),
        (["abd"], "abd-2"),
        (["--stage", "reply"], "abc-1"),
        (["--stage", "sub|reply"], "abc-1"),
        (["a", "--stage", "classify"], "abd-2"),
    ],
)
def test_which_record_is_meant(file: Path, args: list[str], found: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(*args, "--records", file, "--json") == 0
    assert json.loads(capsys.readouterr().out)["id"] == found


@pytest.mark.parametrize(
    ("args", "message", "status"),
    [
        (["ab"], "2 records begin with 'ab'", 1),
        (["zzz"], "no record whose id begins with 'zzz'", 1),
        (["--stage", "reeply"], "no record of stage 'reeply'", 1),
        (["last", "--records", "not-there.jsonl"], "not-there.jsonl", 2),
    ],
)
def test_what_cannot_be_told(
    file: Path, args: list[str], message: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [] if "--records" in args else ["--records", file]
    assert explain(*args, *where) == status
    assert message in capsys.readouterr().err


def test_an_exact_id_wins_over_longer_ones_and_a_torn_line_is_passed_over(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with file.open("a") as more:
        more.write(json.dumps(record("late", id="abc-17").asdict()) + '\n[1]\n{"id": "abc-1')
    assert explain("abc-1", "--records", file, "--json") == 0
    assert json.loads(capsys.readouterr().out)["stage"] == "sub|reply"


def test_without_prices_no_cost_is_said(
    tmp_path: Path, engine: StubEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "records.jsonl"
    for cost in (Cost(), Cost(input_per_mtoken=5.0)):
        backend = Backend("main", engine.url, model=MODEL, cost=cost)
        with Orla([backend], {"*": "main"}, records_file=path) as orla:
            ask(orla, engine)
    costs = [json.loads(line)["cost_usd"] for line in path.read_text().splitlines() if '"cost_usd"' in line]
    assert costs[0] == 0 and costs[-1] > 0
    said = []
    for line in path.read_text().splitlines():
        if '"cost_usd"' in line:
            assert explain(json.loads(line)["id"], "--records", path) == 0
            said.append(capsys.readouterr().out)
    assert "US dollars" not in said[0] and "US dollars" in said[-1]


@pytest.mark.parametrize("action", [*explaining.CACHE_ACTIONS, "unheard of"])
def test_every_cache_action_has_its_words(action: str) -> None:
    said = explaining.text({**MOVED.asdict(), "cache_action": action, "attempts": 1, "prompt_tokens": 1})
    assert (
        f"1 attempt; KV cache: {explaining.CACHE_ACTIONS.get(action, action)}" in said and "1 prompt token (" in said
    )


def test_calls_that_were_not_placed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain("x", "--records", file) == 0
    assert "no backend was chosen for this call: QueueFull: no" in capsys.readouterr().out
    with file.open("a") as more:
        more.write(json.dumps(record("", None, id="y", external=True).asdict()) + "\n")
    assert explain("y", "--records", file) == 0
    assert (
        "a call outside any graph" in (said := capsys.readouterr().out) and "orla_lg did not place this call" in said
    )


# What became of its cache


def amended(*orders: str, borne_out: bool | None = None, **said: Any) -> str:
    """What is said of the cache of a record that was amended so."""
    known = record("reply", "away", id="k", **said)
    row = {**known.asdict(), "cache_orders": orders, "cache_borne_out": borne_out}
    return explaining.text(row).rpartition("\n\n")[2]


@pytest.mark.parametrize("effect", Effect)
def test_every_effect_has_its_words(effect: Effect) -> None:
    assert f"afterwards: orla_lg ordered flush; {explaining.EFFECTS[str(effect)]}" in amended(f"flush:{effect}")


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (
            amended("flush:freed", borne_out=True),
            "flush; the engine freed it\nthe workflow's next call there bore that",
        ),
        (amended("pin:pinned", borne_out=False), "the workflow's next call there did not bear that out"),
        (amended(borne_out=True), "the workflow's next call there found it still there"),
        (amended(borne_out=False), "the workflow's next call there did not find it there any more"),
        (
            amended(prompt_tokens=100, cached_tokens=60, expected_cached_tokens=80),
            "orla_lg expected 80 cached tokens when the call left the queue; the engine found 60",
        ),
        (
            amended(prompt_tokens=9, expected_cached_tokens=4),
            "4 cached tokens when the call left the queue; the engine does not say how many were",
        ),
        (amended(cache_hint="preserve"), "a hint asked to preserve its workflow's cache; no order came of that"),
        (
            amended("flush:freed", cache_hint="flush"),
            "a hint asked to flush its workflow's cache\nits workflow's cache afterwards: orla_lg",
        ),
    ],
)
def test_what_was_asked_and_whether_it_was_true_is_said_in_words(told: str, said: str) -> None:
    assert said in told


def test_what_became_known_later_is_joined_to_its_record(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    late = Journal(file)
    late.amended("abc-1", CacheFollowUp("w", ("pin:pinned",), None))
    late.amended("abc-1", CacheFollowUp("w", ("pin:pinned", "flush:freed"), True))
    late.amended("gone", CacheFollowUp("w", ("flush:failed",), False))
    late.close()
    assert explain("abc-1", "--records", file, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["cache_orders"], found["cache_borne_out"]) == (["pin:pinned", "flush:freed"], True)
    assert (found["at"], found["scores"]) < ("3", [1]) and "amends" not in found
    assert explain("abd-2", "--records", file) == 0
    assert "asked" not in capsys.readouterr().out, "that was another's"


# The file


def ask(orla: Orla, engine: StubEngine) -> None:
    llm = chat(engine)

    def node(state: MessagesState) -> dict[str, Any]:
        return {"messages": [llm.invoke(state["messages"])]}

    graph = orla.wrap(StateGraph(MessagesState).add_node("ask", node).add_edge(START, "ask"))
    graph.invoke({"messages": [("user", "hi")]})


def test_from_a_configuration_to_an_explanation(
    engine: StubEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "orla.toml"
    config.write_text(
        f'records_file = "logs/records.jsonl"\nload_aware = true\n[backends.main]\nurl = "{engine.url}"\n'
        '[mapping]\nask = {prefer = "cheapest"}\n'
    )
    with Orla.from_config(config) as orla:
        ask(orla, engine)
        (ended,) = orla.records()
        orla.feedback(ended.id, 1)
    assert (tmp_path / "logs" / "records.jsonl").is_file(), "beside the configuration, wherever we run"
    assert explain(ended.id, "--config", config) == 0
    assert "needs nothing; cheapest of 1" in (said := capsys.readouterr().out) and "scored 1" in said
    monkeypatch.setenv("ORLA_CONFIG", str(config))
    assert explain("last") == 0


@pytest.mark.parametrize(
    "args", [["last", "FILE"], ["FILE"], ["last", "--records", "FILE"], ["--records", "FILE", "last"]]
)
def test_the_file_may_be_named_either_way(
    file: Path, capsys: pytest.CaptureFixture[str], args: list[str], tmp_path: Path
) -> None:
    (tmp_path / "orla.toml").write_text('[backends.b]\nurl = "http://x/v1"\n')  # which names none
    assert explain(*(file if arg == "FILE" else arg for arg in args)) == 0
    assert "record x" in capsys.readouterr().out


def test_without_a_configuration_the_file_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert explain("last") == 2
    assert "which records? Name the file, as in `orla-lg explain last --records" in capsys.readouterr().err


def test_without_a_records_file_it_says_how_to_have_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "orla.toml"
    config.write_text('[backends.main]\nurl = "http://127.0.0.1:1/v1"\n')
    assert explain("last", "--config", config) == 2
    assert 'add records_file = "records.jsonl"' in capsys.readouterr().err


def test_what_the_file_holds_is_what_the_process_saw(
    engine: StubEngine, make_orla: Callable[..., Orla], tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    orla = make_orla(at(engine), mapper={"*": "main"}, records_file=path)
    for _ in range(3):
        ask(orla, engine)
    orla.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row.pop("at").endswith("+00:00") for row in rows)
    known = {row["id"]: row for row in rows if "id" in row}
    late = [row for row in rows if "amends" in row]
    for row in late:
        known[row.pop("amends")].update(row)
    for row, ended in zip(known.values(), orla.records(), strict=True):
        assert row.pop("shape")["key"]
        assert row == json.loads(json.dumps(ended.asdict())) and row["cache_orders"] == ["flush:unsupported"]
    assert len(late) == 3 and orla.statistics().unwritten == 0


def test_a_run_writes_a_line_for_each_call_and_at_most_one_for_its_cache(
    engine: StubEngine, make_orla: Callable[..., Orla], tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    orla = make_orla(at(engine, engine="llamacpp"), mapper={"*": "main"}, records_file=path)
    llm = chat(engine)

    def turn(state: MessagesState) -> dict[str, Any]:
        return {"messages": [llm.invoke(state["messages"])]}

    agent = StateGraph(MessagesState).add_node("turn", turn).add_edge(START, "turn")
    agent.add_conditional_edges("turn", lambda state: "turn" if len(state["messages"]) < 7 else END)
    orla.wrap(agent).invoke({"messages": [("user", "hi " * 2_000)]})
    orla.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    calls = [row["id"] for row in rows if "id" in row]
    late = [row["amends"] for row in rows if "amends" in row]
    assert len(calls) == 6 and len(late) == len(set(late)) <= 6 and set(late) <= set(calls)


def test_closing_writes_what_waits(
    engine: StubEngine, make_orla: Callable[..., Orla], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = Appended._open
    monkeypatch.setattr(Appended, "_open", lambda self: time.sleep(0.3) or really(self))
    orla = make_orla(at(engine), mapper={"*": "main"}, records_file=tmp_path / "r")
    ask(orla, engine)
    orla.close()
    rows = [json.loads(line) for line in (tmp_path / "r").read_text().splitlines()]
    assert [row.get("id", row.get("amends")) for row in rows] == [orla.records()[0].id] * 2


def test_a_slow_disk_delays_nobody_and_what_does_not_fit_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, may_open = threading.Event(), threading.Event()

    really = Appended._open

    def slow(self: Appended) -> int:
        opened.set()
        assert may_open.wait(10)
        return really(self)

    monkeypatch.setattr(Appended, "_open", slow)
    written = Journal(tmp_path / "r", capacity=5)
    written.record(MOVED)
    assert opened.wait(10)
    for _ in range(20):
        written.record(MOVED)
    assert written.dropped == 15
    may_open.set()
    written.close()
    written.close()
    assert len((tmp_path / "r").read_text().splitlines()) == 6
    written.record(MOVED)
    assert len((tmp_path / "r").read_text().splitlines()) == 6, "closed"
    assert written.dropped == 16


def test_a_disk_that_refuses_is_told_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    written = Journal(tmp_path / "file" / "r.jsonl")
    for _ in range(3):
        written.record(MOVED)
    written.close()
    assert written.dropped == 3 and caplog.text.count("records cannot be written") == 1


def test_a_journal_that_hangs_does_not_hang_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "CLOSE_PATIENCE_S", 0.05)
    hangs = threading.Event()
    really = Appended._open
    monkeypatch.setattr(Appended, "_open", lambda self: hangs.wait(10) and really(self))
    written = Journal(tmp_path / "r", capacity=1)
    for _ in range(3):
        written.record(MOVED)
    written.close()
    assert written.dropped == 3, "none of them is on the disk"
    hangs.set()
    written.close()
    assert written.dropped == 3 - len((tmp_path / "r").read_text().splitlines())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_writes_its_own_records(tmp_path: Path) -> None:
    written = Journal(tmp_path / "r")
    written.record(MOVED)
    child = os.fork()
    if child == 0:
        written.record(record(id="child"))
        written.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    written.close()
    assert {json.loads(line)["id"] for line in (tmp_path / "r").read_text().splitlines()} == {"abc-1", "child"}


@pytest.mark.parametrize(
    "command", [["explain", "last", "records.jsonl"], ["explain", "--run", "last", "records.jsonl", "--json"],
                ["clients"], ["--help"]]
)  # fmt: skip
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_pipe_without_a_reader_ends_a_command_in_silence(file: Path, command: list[str], unbuffered: str) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    ended = subprocess.run(
        [sys.executable, "-m", "orla_lg", *command], stdout=writes, stderr=subprocess.PIPE, cwd=file.parent,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": os.pathsep.join(sys.path)}, timeout=60,
    )  # fmt: skip
    os.close(writes)
    assert (ended.returncode, ended.stderr.decode()) == (0, "")
