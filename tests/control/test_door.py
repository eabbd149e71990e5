"""The control socket of a process, from both sides: its protocol, and what no client can do to it."""

from __future__ import annotations

import io
import json
import logging
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langgraph.graph import START, MessagesState, StateGraph
from rich.console import Console

from orla_lg import Backend, ChatOrla, ConfigError, MappingError, Orla
from orla_lg.control import protocol, server
from orla_lg.control.client import Client
from orla_lg.control.state import ProcessState
from orla_lg.core.operation.statistics import WaitsFor
from orla_lg.core.record import Happening
from orla_lg.top import view
from tests.conftest import BACKEND_KEY, at, chat
from tests.stub_engine import Gate, Reply, StubEngine

MakeOrla = Callable[..., Orla]
PATIENCE_S = 60.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "orla.sock"


@pytest.fixture
def watched(engine: StubEngine, make_orla: MakeOrla, path: Path) -> Orla:
    return make_orla(at(engine, max_concurrency=1), control=path)


class Clients(set[Any]):
    """The door's clients, whose coming and going can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.came = 0
        self._changed = threading.Condition()

    def add(self, client: Any) -> None:
        with self._changed:
            super().add(client)
            self.came += 1
            self._changed.notify_all()

    def discard(self, client: Any) -> None:
        with self._changed:
            super().discard(client)
            self._changed.notify_all()

    def wait(self, for_: Callable[[], bool], otherwise: str) -> None:
        with self._changed:
            assert self._changed.wait_for(for_, PATIENCE_S), otherwise


@pytest.fixture
def served(watched: Orla) -> Clients:
    """Who is connected, from now on."""
    assert watched._control is not None
    watched._control._clients = clients = Clients()
    return clients


@pytest.fixture
def raw(watched: Orla, path: Path) -> Iterator[socket.socket]:
    """A client that says what it likes."""
    with socket.socket(socket.AF_UNIX) as connected:
        connected.settimeout(PATIENCE_S)
        connected.connect(str(path))
        yield connected


def answers(connected: socket.socket, count: int = 1) -> list[dict[str, Any]]:
    read = b""
    while read.count(b"\n") < count and (more := connected.recv(65536)):
        read += more
    return [json.loads(line) for line in read.splitlines()]


def ask(connected: socket.socket, **said: Any) -> dict[str, Any]:
    connected.sendall(json.dumps(said).encode() + b"\n")
    (answer,) = answers(connected)
    return answer


# What is said


def test_what_is_asked_for_is_done(watched: Orla, raw: socket.socket) -> None:
    scheduler = watched.core.serving.schedulers["main"]
    assert ask(raw, do="pause", backend="main") == {"ok": True} and scheduler.queue.paused
    assert ask(raw, do="resume", backend="main") == {"ok": True} and not scheduler.queue.paused
    assert (
        ask(raw, do="drain", backend="main", timeout_s=0) == {"ok": True, "drained": True} and scheduler.queue.paused
    )
    assert ask(raw, do="limit", backend="main", max_concurrency=7) == {"ok": True}
    assert (scheduler.queue.max_concurrency, scheduler.queue.capacity) == (7, 10_000), "what is left out stays"
    assert ask(raw, do="limit", backend="main", max_concurrency=None, capacity=3) == {"ok": True}
    assert (scheduler.queue.max_concurrency, scheduler.queue.capacity) == (None, 3)
    assert ask(raw, do="policy", stage_policy={"main": "edf"}, request_policy="sjf") == {"ok": True}
    told = ask(raw, do="state")["state"]["backends"]["main"]
    assert (told["stage_policy"], told["request_policies"], told["paused"]) == ("edf", {"*": "sjf"}, True)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"", "Invalid JSON"),
        (b"\xff\xfe", "Invalid JSON"),
        (b"[1, 2]", "should be an object"),
        (b"{}", "discriminator 'do'"),
        (b'{"do": "shutdown"}', "'shutdown'"),
        (b'{"do": "pause"}', "pause.backend: Field required"),
        (b'{"do": "pause", "backend": 3}', "pause.backend"),
        (b'{"do": "pause", "backend": "main", "extra": 1}', "pause.extra"),
        (b'{"do": "pause", "backend": "mani"}', "unknown backend 'mani'; did you mean 'main'"),
        (b'{"do": "drain", "backend": "main", "timeout_s": -1}', "drain.timeout_s"),
        (b'{"do": "drain", "backend": "main", "timeout_s": NaN}', "drain.timeout_s"),
        (b'{"do": "limit", "backend": "main", "max_concurrency": 0}', "limit.max_concurrency"),
        (b'{"do": "limit", "backend": "main", "max_concurrency": "3"}', "limit.max_concurrency"),
        (b'{"do": "limit", "backend": "main"}', "nothing to change"),
        (b'{"do": "policy"}', "nothing to change"),
        (b'{"do": "policy", "stage_policy": "edff"}', "did you mean 'edf'"),
        (b'{"do": "policy", "stage_policy": ["edf"]}', "policy.stage_policy"),
        (b'{"do": "watch", "interval_s": 0}', "watch.interval_s"),
        (b"[" * 5_000, "Invalid JSON"),
    ],
)
def test_what_cannot_be_done_is_refused_and_harms_nothing(
    watched: Orla, raw: socket.socket, line: bytes, said: str
) -> None:
    raw.sendall(line + b"\n")
    (refused,) = answers(raw)
    assert refused["ok"] is False and said in refused["error"]
    queue = watched.statistics().backends["main"].queue
    assert (queue.paused, queue.max_concurrency, queue.capacity) == (False, 1, 10_000)
    assert ask(raw, do="state")["ok"], "and the next line is read"


def test_a_request_beyond_all_measure_ends_the_talk(watched: Orla, raw: socket.socket, path: Path) -> None:
    raw.sendall(b"x" * (protocol.MAX_LINE_BYTES + 1) + b"\n")
    (refused,) = answers(raw)
    assert "longer than 65536 bytes" in refused["error"]
    with Client(path) as another:
        assert another.state().calls == 0


def test_several_requests_at_once_are_answered_in_order(raw: socket.socket) -> None:
    raw.sendall(b'{"do": "pause", "backend": "main"}\nnonsense\n{"do": "state"}\n')
    first, second, third = answers(raw, 3)
    assert (first["ok"], second["ok"], third["state"]["backends"]["main"]["paused"]) == (True, False, True)


@pytest.mark.parametrize(
    "request_",
    [
        protocol.Look(), protocol.Watch(interval_s=2), protocol.Pause(backend="b"), protocol.Resume(backend="b"),
        protocol.Drain(backend="b", timeout_s=3), protocol.Policy(request_policy={"x": "edf"}),
        protocol.SetLimit(backend="b", max_concurrency=None), protocol.SetLimit(backend="b", capacity=0),
    ],
    ids=lambda request: request.do,
)  # fmt: skip
def test_a_request_comes_through_as_it_was_meant(request_: Any) -> None:
    read = protocol.parse(protocol.encode(request_))
    assert read == request_ and read.model_fields_set >= request_.model_fields_set - {"do"}
    assert ("capacity" in read.model_fields_set) == ("capacity" in request_.model_fields_set), "left out is not 0"


# What is seen


def test_the_state_says_who_waits_and_nothing_of_what_they_say(engine: StubEngine, watched: Orla, path: Path) -> None:
    gate, secret = Gate(), "an unlikely prompt"
    engine.rule = lambda seen: Reply(gate=gate)
    queued = threading.Semaphore(0)
    unsubscribe = watched.subscribe(lambda event: queued.release() if event.kind is Happening.QUEUED else None)
    llm = ChatOrla(orla=watched, model="main", api_key="key-in-the-code")
    with ThreadPoolExecutor(3) as pool, Client(path) as client:
        calls = [pool.submit(llm.invoke, secret) for _ in range(3)]
        engine.wait(lambda e: e.in_flight == 1)
        for _ in range(2):
            assert queued.acquire(timeout=PATIENCE_S)
        now = client.state()
        main = now.backends["main"]
        assert (main.in_flight, main.max_concurrency, main.engine) == (1, 1, "openai")
        assert [each.waits_for for each in main.waits] == [WaitsFor.PLACE] * 2
        assert all(each.waited_s >= 0 and each.workflow.startswith("call-") for each in main.waits)
        said = json.dumps(ask_raw(path, b'{"do": "state"}\n'))
        for word in (secret, BACKEND_KEY, "key-in-the-code", engine.url):
            assert word not in said
        gate.open()
        for call in calls:
            call.result(PATIENCE_S)
        assert client.state().backends["main"].spent.calls == 3
    unsubscribe()


NASTY = ("\ud800", "nul\0", "a\nb", "\x1b[2J", "\u202e", "x" * 1_000_000, "\udfff\ud800")


def test_whatever_a_users_id_holds_the_door_answers(engine: StubEngine, watched: Orla, path: Path) -> None:
    """Threads, stages and tenants that no encoding takes, and one of a megabyte; some hold cache, some wait."""

    def app(stage: str) -> Any:
        llm = chat(engine)

        def node(state: MessagesState) -> dict[str, Any]:
            return {"messages": [llm.invoke(state["messages"])]}

        made = StateGraph(MessagesState).add_node(stage, node).add_edge(START, stage)
        return watched.wrap(made, mapper={"*": "main"})

    for each in NASTY:
        app("odd\x1b").invoke({"messages": [("user", "hi")]}, {"configurable": {"thread_id": each}})
    line = ask_raw(path, b'{"do": "state"}\n')[0]
    held = line["state"]["backends"]["main"]["kv"]["workflows"]
    assert len(held) == len(NASTY) and all(len(each["workflow"]) < 1_100 for each in held)
    assert {"\\ud800", "nul\\u0000", "a\\u000ab", "\\u001b[2J", "\\u202e", "\\udfff\\ud800"} < {
        each["workflow"] for each in held
    }
    with Client(path) as client:
        state = client.state()
    console = Console(file=io.StringIO(), width=200)
    console.print(view.frame(state, a_history(state), rows=50))
    drawn = console.file.getvalue()
    assert drawn.encode() and "\x1b" not in drawn and "\u202e" not in drawn and "\\ud800" in drawn


def a_history(state: ProcessState) -> view.History:
    history = view.History()
    history.add(state)
    return history


def test_a_sticky_folder_of_ours_may_be_open_to_others(engine: StubEngine, tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    with Orla([at(engine)], control=tmp_path / "door"), Client(tmp_path / "door") as client:
        assert client.state().pid


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "d" * 300])
def test_where_no_process_can_be_is_said(path: str) -> None:
    with pytest.raises(ConfigError, match="no running process at"):
        Client(path)


def ask_raw(path: Path, line: bytes) -> list[dict[str, Any]]:
    with socket.socket(socket.AF_UNIX) as connected:
        connected.connect(str(path))
        connected.sendall(line)
        return answers(connected)


def test_a_watcher_sees_what_changes_until_the_end(
    watched: Orla, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Client(path) as client:
        seen = client.watch(0.1)
        assert not next(seen).backends["main"].paused
        watched.pause("main")
        next(seen)
        assert next(seen).backends["main"].paused
        watched.close()
        assert all(state.backends["main"].paused for state in seen), "what was sent before; then the process hung up"
    assert not caplog.records, "and nothing broke in it"


# Clients that are no good


def test_clients_that_die_or_say_half_leave_nothing_behind(served: Clients, path: Path) -> None:
    for said in (
        b"",
        b'{"do": "sta',
        b'{"do": "watch", "interval_s": 0.1}\n',
        b'{"do": "drain", "backend": "main"}\n',
    ):
        with socket.socket(socket.AF_UNIX) as dying:
            dying.connect(str(path))
            dying.sendall(said)
    served.wait(lambda: served.came == 4 and not served, "a dead client is still served")


def test_a_client_that_reads_nothing_stalls_nobody(
    watched: Orla, served: Clients, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "STALL_S", 0.3)
    with socket.socket(socket.AF_UNIX) as stalling:
        stalling.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        stalling.connect(str(path))
        stalling.sendall(b'{"do": "state"}\n' * 4_000)
        served.wait(lambda: served.came == 1, "it was never served")
        ChatOrla(orla=watched, model="main").invoke("hello")
        with Client(path) as another:
            another.state()
        served.wait(lambda: not served, "it was never hung up on")


def test_more_clients_than_are_served_are_told_so(watched: Orla, path: Path) -> None:
    watching = [Client(path) for _ in range(server.MAX_CLIENTS)]
    try:
        for client in watching:
            client.state()
        with Client(path) as one_more, pytest.raises(ConfigError, match="16 clients are being served already"):
            one_more.state()
    finally:
        for client in watching:
            client.close()


def test_a_silent_client_is_hung_up_on(watched: Orla, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "IDLE_S", 0.1)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.settimeout(PATIENCE_S)
        silent.connect(str(path))
        assert silent.recv(1) == b""


# The socket itself


def test_it_is_the_users_alone_and_goes_with_its_orla(watched: Orla, path: Path) -> None:
    found = path.stat()
    assert stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600
    watched.close()
    watched.close()
    assert not path.exists()
    with pytest.raises(ConfigError, match=r"no running process at (?s:.*)ORLA_CONTROL=(?s:.*)orla.toml"):
        Client(path)


def test_what_a_dead_process_left_is_replaced(engine: StubEngine, make_orla: MakeOrla, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
        left.listen()
    assert path.exists()
    make_orla(at(engine), control=path)
    with Client(path) as client:
        assert client.state().backends.keys() == {"main"}


def test_a_second_process_leaves_the_firsts_door_alone(
    engine: StubEngine, watched: Orla, make_orla: MakeOrla, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    second = make_orla(at(engine, "other"), control=path)
    assert second._control is None and "another process is served at" in caplog.text
    second.close()
    with Client(path) as client:
        assert client.state().backends.keys() == {"main"}


def test_what_is_another_process_socket_by_now_is_not_removed(watched: Orla, path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as another:
        another.bind(str(path))
        watched.close()
        assert path.exists()


def test_a_forked_child_takes_nothing_away(watched: Orla, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched._control is not None
    with monkeypatch.context() as child:
        child.setattr(server.os, "getpid", lambda: -1)
        child.setattr(watched._control, "_listening", watched._control._listening.dup())  # a child has its own
        watched._control.close()
    with Client(path) as client:
        assert client.state().pid


@pytest.mark.parametrize(
    "how",
    ["file", "missing", "open to all", "open to a group", "too long", "a name too long", "NUL", "half a pair",
     "below a file", "no unix sockets"],
)  # fmt: skip
def test_where_no_door_can_be_is_said(
    engine: StubEngine, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "door"
    message = {
        "file": "there is a file that is no socket",
        "missing": "the folder .* cannot be used",
        "open to all": "others may write to the folder .*chmod go-w",
        "open to a group": "others may write to the folder .*mode 0770",
        "too long": "no socket can be made there, the path is too long: .* 107 at most",
        "a name too long": "is no path of a file: File name too long",
        "NUL": "no path holds NUL",
        "half a pair": "surrogates not allowed",
        "below a file": "what is there cannot be looked at",
        "no unix sockets": "this platform has no Unix sockets",
    }[how]
    if how == "file":
        path.write_text("precious")
    if how == "missing":
        path = tmp_path / "no" / "door"
    if how == "open to all":
        tmp_path.chmod(0o777)
    if how == "open to a group":
        tmp_path.chmod(0o770)
    if how == "too long":
        path = tmp_path / ("d" * 120)
    if how == "a name too long":
        path = tmp_path / ("d" * 300)
    if how == "NUL":
        path = tmp_path / "a\0b"
    if how == "half a pair":
        path = tmp_path / "\ud800"
    if how == "below a file":
        (tmp_path / "file").write_text("precious")
        path = tmp_path / "file" / "door"
    if how == "no unix sockets":
        monkeypatch.delattr(socket, "AF_UNIX")
    with pytest.raises(ConfigError, match=message):
        Orla([Backend("main", engine.url)], control=path)
    assert how != "file" or path.read_text() == "precious"


def test_the_environment_and_the_configuration_open_it_too(
    engine: StubEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORLA_CONTROL", str(tmp_path / "env.sock"))
    with Orla([at(engine)]), Client(tmp_path / "env.sock") as client:
        assert client.state().pid
    with Orla([at(engine)], control=False):
        assert not (tmp_path / "env.sock").exists()
    (tmp_path / "orla.toml").write_text(f'control = "toml.sock"\n[backends.main]\nurl = "{engine.url}"\n')
    with Orla.from_config(tmp_path / "orla.toml"), Client(tmp_path / "toml.sock") as client:
        assert client.state().backends.keys() == {"main"}
    assert not (tmp_path / "toml.sock").exists()
    with (tmp_path / "orla.toml").open("a") as more:
        more.write('[mapping]\n"*" = "main"\n[variants.v]\n"*" = "nobody"\n')
    with pytest.raises(MappingError, match="nobody"):
        Orla.from_config(tmp_path / "orla.toml")
    assert not (tmp_path / "toml.sock").exists(), "what was not built has no socket"
    monkeypatch.setenv("ORLA_DISABLED", "1")
    with Orla([at(engine)]):
        assert not (tmp_path / "env.sock").exists(), "who steps aside has nothing to show"


def test_what_answers_must_be_orla_lg(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other, ThreadPoolExecutor(1) as pool:
        other.bind(str(path))
        other.listen()

        def answer(line: bytes) -> None:
            connected, _ = other.accept()
            with connected:
                connected.recv(100)
                connected.sendall(line)

        for line, message in ((b"220 mail ready\n", "not one of orla_lg's"), (b"", "hung up"),
                              (b'{"ok": true}\n', "no state in it")):  # fmt: skip
            served = pool.submit(answer, line)
            with Client(path) as client, pytest.raises(ConfigError, match=message):
                client.state()
            served.result(PATIENCE_S)
        with Client(path, patience_s=0.05) as client, pytest.raises(ConfigError, match=r"no answer in 0\.05 s"):
            client.state()
