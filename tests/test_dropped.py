"""An ``Orla`` that is dropped without ``close`` leaves nothing behind, and one in use is not dropped."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from httpcore2._sync.connection_pool import PoolByteStream
from langchain_core.runnables import RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Backend, ChatOrla, Orla, OrlaSaver
from orla_lg.core import background as backgrounds
from orla_lg.core.record import CallEvent
from tests.conftest import SDK_AREQUEST, SDK_REQUEST, at, chat
from tests.stub_engine import Gate, Reply, StubEngine

PATIENCE_S = 20.0
ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors cannot be counted here")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names, not paths


OTHERS: set[threading.Thread] = set()
"""Threads of cores that tests before kept alive, a failed one by its traceback."""


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("orla") and thread not in OTHERS]


def collected(threads: int = 0) -> None:
    """Collect, and wait until so many of our threads are left."""
    deadline = time.monotonic() + PATIENCE_S
    gc.collect()
    for thread in ours() if not threads else ():
        thread.join(max(0.0, deadline - time.monotonic()))
    assert len(ours()) == threads, ours()


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    gc.collect()
    OTHERS.update(ours())
    before = descriptors()
    yield
    if ours() or descriptors() > before + 2:
        collected()
    assert descriptors() <= before + 2, "beside the stub's own connections"
    assert openai.OpenAI.request is SDK_REQUEST and openai.AsyncOpenAI.request is SDK_AREQUEST


def graph(engine: StubEngine) -> Any:
    llm = chat(engine)

    async def anode(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await llm.ainvoke(state["messages"])]}

    def node(state: MessagesState) -> dict[str, Any]:
        return {"messages": [llm.invoke(state["messages"])]}

    return StateGraph(MessagesState).add_node("a", RunnableLambda(node, anode)).add_edge(START, "a").compile()


ASKED = {"messages": [("user", "hi")]}


def everything(engine: StubEngine, folder: Path, name: str = "o") -> Orla:
    """An Orla with all that may hold a thread or a descriptor."""
    return Orla(
        [at(engine)], {"*": "main"}, records_file=folder / "records", estimates_file=folder / "estimates",
        control=folder / f"{name}.sock",
    )  # fmt: skip


def test_many_dropped_leave_no_thread_no_descriptor_and_no_file(engine: StubEngine, tmp_path: Path) -> None:
    for number in range(20):
        everything(engine, tmp_path, str(number)).wrap(graph(engine)).invoke(ASKED)
    collected()
    assert {path.name for path in tmp_path.iterdir()} == {"records", "records.key", "estimates"}
    assert len((tmp_path / "records").read_text().splitlines()) >= 20, "and what waited was written"
    assert json.loads((tmp_path / "estimates").read_text())["stages"]


@pytest.mark.filterwarnings("ignore:Exception in thread orla")
def test_the_thread_that_ended_by_itself_is_replaced_and_that_is_told(caplog: pytest.LogCaptureFixture) -> None:
    background = backgrounds.Background()

    async def ends() -> None:
        raise SystemExit

    async def works() -> str:
        return "done"

    ended = background.submit(ends())
    thread = background._thread
    assert thread is not None
    thread.join(PATIENCE_S)
    assert ended.done() and not thread.is_alive()
    assert background.submit(works()).result(PATIENCE_S) == "done"
    assert "the background thread had ended" in caplog.text
    background.close()


@pytest.mark.parametrize(
    "how", ["never used", "connected", "silent engine", "model", "saver", "listener", "in a loop"]
)
def test_whatever_was_done_with_it(engine: StubEngine, tmp_path: Path, how: str) -> None:
    orla: Orla | None = everything(engine, tmp_path)
    assert orla is not None
    kept: list[Any] = []
    match how:
        case "connected":
            orla.connect()
        case "silent engine":
            orla.close()
            orla = Orla([Backend("main", "http://127.0.0.1:9/v1")])
            orla.connect()
        case "model":
            ChatOrla(orla=orla, model="main").invoke("hi")
        case "saver":
            app = StateGraph(MessagesState).add_node("a", lambda state: {}).add_edge(START, "a")
            wrapped = orla.wrap(app.compile(checkpointer=OrlaSaver(orla, InMemorySaver())))
            wrapped.invoke(ASKED, {"configurable": {"thread_id": "t"}})
            del wrapped, app
        case "listener":
            mine = orla

            def listener(event: CallEvent) -> None:
                kept.append(mine)  # a circle through the core

            orla.subscribe(listener)
            orla.wrap(graph(engine)).invoke(ASKED)
            kept.clear()
            del listener, mine
        case "in a loop":
            asyncio.run(orla.wrap(graph(engine)).ainvoke(ASKED))
    del orla
    collected()
    assert not list(tmp_path.glob("*.sock"))


def test_a_graph_that_is_still_there_keeps_what_serves_it(engine: StubEngine, tmp_path: Path) -> None:
    wrapped = everything(engine, tmp_path).wrap(graph(engine))
    gc.collect()
    wrapped.invoke(ASKED)
    assert (tmp_path / "o.sock").exists()
    wrapped.invoke(ASKED)
    wrapped = None
    collected()
    assert len((tmp_path / "records").read_text().splitlines()) >= 2


def test_a_stream_that_is_still_read_comes_to_its_end(engine: StubEngine) -> None:
    gate = Gate()
    engine.rule = lambda seen: Reply(gate=gate)
    held: list[Any] = []

    def node(state: MessagesState) -> dict[str, Any]:
        client = openai.OpenAI(base_url=engine.url, api_key="key-of-the-caller")
        held.append(
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}], stream=True)
        )
        return {}

    gate.open()
    app = StateGraph(MessagesState).add_node("a", node).add_edge(START, "a").compile()
    orla = Orla([at(engine)], {"*": "main"})
    core = weakref.ref(orla.core.serving)
    orla.wrap(app).invoke(ASKED)
    del app, node, orla
    gc.collect()
    assert core() is not None, "the stream is all that is left of it"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in held[0] if chunk.choices)
    gc.collect()
    assert core() is None, "the call is over, though its stream is still there"
    held.clear()


def test_no_connection_is_closed_inside_the_collector(engine: StubEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, close, gate = list[bool](), PoolByteStream.close, Gate()
    monkeypatch.setattr(
        PoolByteStream, "close", lambda self: (closed.append(backgrounds.is_collecting()), close(self))
    )
    engine.rule = lambda seen: Reply(text="one two three", mid_gate=gate)
    with Orla([at(engine)]) as orla:
        stream = ChatOrla(model="main", orla=orla).stream("hi")
        next(stream)
        cycle: list[Any] = [stream]
        cycle.append(cycle)
        del stream, cycle
        before = len(closed)
        gc.collect()
        deadline = time.monotonic() + PATIENCE_S
        while len(closed) == before or orla.statistics().backends["main"].queue.in_flight:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        gate.open()
        assert not any(closed[before:]), "a lock of the connection may be held by the thread that collects"


def test_what_the_collector_hands_over_takes_no_lock_of_a_thread_that_begins_another() -> None:
    background, ran = backgrounds.Background(), threading.Event()
    with threading._active_limbo_lock:  # type: ignore[attr-defined]  # as in ``threading.enumerate``
        background.hand_over(ran.set)
        assert ran.wait(PATIENCE_S)


def test_what_is_due_later_keeps_nothing_alive() -> None:
    background = backgrounds.Background()
    called = threading.Event()

    class Owner:
        def due(self) -> None:
            called.set()

    owner = Owner()
    background.call_later(0.0, owner.due)
    assert called.wait(PATIENCE_S)
    called.clear()
    background.call_later(3600.0, owner.due)
    gone = threading.Event()
    weakref.finalize(owner, gone.set)
    done = threading.Event()
    background.call_later(0.0, done.set)
    assert done.wait(PATIENCE_S)
    del owner
    gc.collect()
    assert gone.is_set()
    background.close()


AT_EXIT = """
import sys
from orla_lg import Backend, ChatOrla, Orla
folder, url = sys.argv[1:]
orla = Orla([Backend("main", url, model="m")], records_file=folder + "/r", control=folder + "/s")
ChatOrla(orla=orla, model="main").invoke("hi")
"""


def test_a_process_that_ends_without_close_writes_what_waits(engine: StubEngine, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", AT_EXIT, str(tmp_path), engine.url]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len((tmp_path / "r").read_text().splitlines()) >= 1
    assert {path.name for path in tmp_path.iterdir()} == {"r", "r.key"}, "the socket is gone"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_that_drops_it_takes_nothing_from_its_parent(
    engine: StubEngine, tmp_path: Path, make_orla: Callable[..., Orla]
) -> None:
    orla: Any = make_orla(at(engine), records_file=tmp_path / "r", control=tmp_path / "s")
    ChatOrla(orla=orla, model="main").invoke("hi")
    child = os.fork()
    if child == 0:
        orla.core.serving.resources.let_go()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "s").exists()
    ChatOrla(orla=orla, model="main").invoke("hi")
    orla.close()
    assert len([line for line in (tmp_path / "r").read_text().splitlines() if '"id"' in line]) == 2
