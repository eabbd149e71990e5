"""The stream of events: what it says, and that it stays within bounds."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Orla
from orla_lg.serve.access.keys import KeyScope, revoke
from orla_lg.serve.page import feed as feed_module
from orla_lg.serve.page import viewer as viewer_module
from orla_lg.serve.page.viewer import PageViewer
from orla_lg.serve.store.store import MemoryStore
from tests.serve.fixtures import bearer, make, until
from tests.serve.in_thread import Running
from tests.serve.page.reading import ask, reading, served
from tests.stub_engine import Gate, Reply, StubEngine

SECRET_WORD = "parsnip"


@pytest.fixture(scope="module")
def engine() -> Iterator[StubEngine]:
    with StubEngine() as engine:
        yield engine


@pytest.fixture(scope="module")
def running(engine: StubEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with served(tmp_path_factory.mktemp("page"), engine) as running:
        yield running


def test_a_call_is_seen_from_its_queue_to_its_end(running: Running, engine: StubEngine) -> None:
    gate = Gate()
    engine.rule = lambda seen: Reply(gate=gate)
    with reading(running.url) as reader:
        hello = reader.until("hello")
        assert hello["control"] and not hello["keyed"]
        caller = threading.Thread(target=ask, args=(running.url, "thread-1", "chat", SECRET_WORD))
        caller.start()
        stages = reader.until("stages", lambda data: any(row[2] for row in data["rows"]))
        assert [stage for _, _, stage in stages["names"]] == ["chat"]
        state = reader.until("state", lambda data: data["backends"][0]["in_flight"] == 1)
        assert [each["name"] for each in state["backends"]] == ["main", "other"] and state["condition"] == "ready"
        gate.open()
        reader.until("stages", lambda data: any(row[6] for row in data["rows"]))
        rows = reader.until("workflows", lambda data: any(row[9] for row in data["rows"]))["rows"]
        (row,) = [row for row in rows if row[1] == "thread-1"]
        caller.join()
        assert SECRET_WORD not in reader.text
    engine.rule = lambda seen: None
    with reading(running.url, f"?workflow={row[0]}") as reader:
        spans = reader.until("spans")
        assert spans["all"] and [(each["stage"], each["timed"]) for each in spans["spans"]] == [("chat", True)]
        ask(running.url)
        seen = reader.until("spans", lambda data: data["spans"][-1]["ended"] is not None)
        assert seen["workflow"] == row[0]


def test_a_linked_graph_its_nodes_and_its_tools_are_seen(running: Running) -> None:
    going, over = threading.Event(), threading.Event()

    @tool
    def look_up() -> str:
        """Look something up."""
        going.set()
        assert over.wait(10.0)
        return "found"

    builder = StateGraph(MessagesState)
    builder.add_node("plan", lambda state: {"messages": [("assistant", look_up.invoke({}))]})
    builder.add_node("write", lambda state: {"messages": [("assistant", "well")]})
    builder.add_edge(START, "plan").add_edge("plan", "write")
    with Orla.remote(running.url) as orla:
        graph = orla.wrap(builder.compile(name="desk"))
        config: Any = {"configurable": {"thread_id": "linked"}}
        caller = threading.Thread(target=graph.invoke, args=({"messages": [("user", "hello")]}, config))
        with reading(running.url) as early:
            caller.start()
            early.until("stages", lambda data: any(row[4] and row[5] for row in data["rows"]))
            assert going.is_set()
        with reading(running.url) as reader:
            (drawn,) = reader.until("graphs")
            assert [each["name"] for each in drawn["stages"]] == ["plan", "write"]
            assert [START, "plan", True] in drawn["arrows"] and ["plan", "write", True] in drawn["arrows"]
            assert ["desk", "plan"] in [each[1:] for each in reader.until("stages")["names"]]
            over.set()
            reader.until("stages", lambda data: any(not (row[4] or row[5]) for row in data["rows"]))
            caller.join()


def test_nobody_looks_nothing_is_heard(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "KEEP_S", 0.0)
    records = running.orla.core.serving.records
    with reading(running.url) as reader:
        reader.until("state")
        assert records.heard
    until(lambda: not records.heard, 5.0)


def test_so_many_pages_and_no_more(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "MOST_VIEWERS", 1)
    with reading(running.url) as reader:
        reader.until("state")
        refused = httpx.get(f"{running.url}/v1/orla/events")
        assert refused.status_code == 503 and "1 pages are open" in refused.text and refused.headers["retry-after"]
    until(lambda: len(running.server.page.feed) == 0, 5.0)


def test_a_viewer_that_does_not_read_is_cut_off(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer_module, "SEND_PATIENCE_S", 0.3)
    page = running.server.page.feed
    with socket.socket() as deaf, reading(running.url) as reader:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        deaf.connect(("127.0.0.1", int(running.url.rpartition(":")[2])))
        deaf.sendall(b"GET /v1/orla/events HTTP/1.1\r\nhost: localhost\r\n\r\n")
        until(lambda: len(page) == 2, 5.0)
        (stuck,) = list(page._viewers)[1:]
        for _ in range(50):  # what the system's buffers hold comes first
            running.call(stuck.put, b": " + b"x" * 500_000 + b"\n\n")
            time.sleep(0.01)
            if stuck.is_stuck:
                break
        assert stuck.is_stuck
        until(lambda: len(page) == 1, 5.0)
        reader.until("state")


async def test_more_than_may_wait_for_a_viewer_cuts_it_off() -> None:
    cuts: list[bool] = []
    viewer = PageViewer(None, None, None, lambda: cuts.append(True))  # type: ignore[arg-type]
    for _ in range(viewer_module.MOST_PENDING_BYTES // 1000 + 2):
        viewer.put(b"x" * 1000)
    assert cuts == [True]
    await viewer.write(None)  # type: ignore[arg-type]


def test_a_key_that_ends_ends_its_stream(engine: StubEngine, tmp_path: Path) -> None:
    store = MemoryStore()
    key, secret = make(store, scopes=(KeyScope.VIEW,))
    (name, value) = bearer(secret)[0]
    with served(tmp_path, engine, store) as running:
        assert httpx.get(f"{running.url}/v1/orla/events").status_code == 401
        with reading(running.url, **{name.decode(): value.decode()}) as reader:
            assert not reader.until("hello")["control"]
            revoke(store, key, time.time())
            assert reader.until("bye")["why"] == "key"


def test_an_open_page_does_not_hold_up_the_end(engine: StubEngine, tmp_path: Path) -> None:
    with served(tmp_path, engine) as running, reading(running.url) as reader:
        reader.until("state")
        begun_s = time.monotonic()
        running.end()
        assert "ends" in reader.until("bye")["why"]
        running.join()
        assert time.monotonic() - begun_s < 2.0 and running.status == 0


def test_a_server_that_drains_says_so_and_still_shows(engine: StubEngine, tmp_path: Path) -> None:
    gate = Gate()
    engine.rule = lambda seen: Reply(gate=gate)
    with served(tmp_path, engine) as running, reading(running.url) as reader:
        caller = threading.Thread(target=ask, args=(running.url,))
        caller.start()
        reader.until("state", lambda data: data["backends"][0]["in_flight"] == 1)
        running.end()
        reader.until("state", lambda data: data["condition"] == "draining")
        assert httpx.get(running.url, headers={"accept": "text/html"}).status_code == 200
        assert httpx.get(f"{running.url}/v1/models").status_code == 503
        gate.open()
        reader.until("bye")
        caller.join()
    engine.rule = lambda seen: None
