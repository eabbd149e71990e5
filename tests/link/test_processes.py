"""A replica's process forks, ends, or drops its ``Orla``: each has a connection of its own, and leaves nothing."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import textwrap
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from orla_lg import Orla, OrlaClosed
from orla_lg.link.messages import Bye, End, Enter, Hello, Signal
from tests.conftest import BACKEND_KEY
from tests.link.conftest import ENGINE_KEY, links
from tests.link.scripted import ScriptedCore, eventually
from tests.link.test_calls import graph, hi
from tests.link.test_reconnect import Run
from tests.stub_engine import StubEngine

Replica = Callable[..., Orla]


def forked(work: Callable[[], None]) -> int:
    """Run *work* in a child, and return its exit status."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + 20.0
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("lost", ["wait", "fail", "direct"])
def test_a_forked_child_is_another_replica(
    core: ScriptedCore, engine: StubEngine, replica: Replica, lost: str
) -> None:
    orla = replica(on_core_lost=lost)
    wrapped = orla.wrap(graph(engine))
    wrapped.invoke(hi())

    def work() -> None:
        assert wrapped.invoke(hi())["messages"][-1].content
        assert asyncio.run(wrapped.ainvoke(hi()))["messages"][-1].content
        assert not orla.core.serving.losses.direct_calls  # type: ignore[attr-defined]
        orla.close()

    assert forked(work) == 0
    wrapped.invoke(hi())
    replicas = {each.replica: each.pid for each in core.all(Hello)}  # each may have come again, on a busy machine
    assert len(replicas) == len(set(replicas.values())) == 2
    assert len({each.call.rpartition("-")[0] for each in core.all(Enter)}) == 2, "ids of calls do not meet"
    core.wait(End, 4)
    assert len(core.all(Bye)) == 1


def test_close_says_goodbye_and_ends_what_waits(core: ScriptedCore, engine: StubEngine, replica: Replica) -> None:
    core.grants, orla = False, replica()
    run = Run(orla.wrap(graph(engine)))
    core.wait(Enter)
    orla.close()
    with pytest.raises(OrlaClosed):
        run.result()
    core.wait(Bye)
    eventually(lambda: not links())
    orla.close()
    with pytest.raises(OrlaClosed):
        orla.wrap(graph(engine))


def test_a_dropped_orla_leaves_no_thread(core: ScriptedCore, engine: StubEngine) -> None:
    orla = Orla.remote(core.url)
    orla.wrap(graph(engine)).invoke(hi())
    serving = weakref.ref(orla.core.serving)
    del orla
    gc.collect()
    eventually(lambda: serving() is None or gc.collect() is None)
    assert serving() is None
    core.wait(Bye)
    eventually(lambda: not links())


def test_an_orla_without_a_core_is_dropped_too(core: ScriptedCore) -> None:
    orla = Orla.remote(core.url)
    core.gone()
    link: Any = orla.core.serving.link  # type: ignore[attr-defined]
    eventually(lambda link=link: not link.up)
    del orla, link
    gc.collect()
    eventually(lambda: not links())


def test_a_process_that_just_ends_says_goodbye(core: ScriptedCore, engine: StubEngine) -> None:
    code = f"""
        from orla_lg import ChatOrla, Orla
        orla = Orla.remote({core.url!r})
        print(ChatOrla(model="main", orla=orla).invoke("hi").content)
    """
    environment = {**os.environ, ENGINE_KEY: BACKEND_KEY}

    async def run() -> tuple[int, bytes, bytes]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", textwrap.dedent(code), env=environment, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, errors = await asyncio.wait_for(process.communicate(), 30.0)
        return process.returncode or 0, out, errors

    status, out, errors = asyncio.run(run())
    assert (status, errors) == (0, b"") and out.strip()
    core.wait(Bye)
    assert core.all(Hello)[0].pid != os.getpid()


def test_a_graph_is_said_once(core: ScriptedCore, engine: StubEngine, replica: Replica) -> None:
    from orla_lg.link.messages import Graph

    wrapped = replica().wrap(graph(engine))
    for _ in range(3):
        wrapped.invoke(hi())
    assert len(core.all(Graph)) == 1

    def ended() -> list[Any]:
        return [each.more["outcome"] for each in core.all(Signal) if each.what == "run_ended"]

    eventually(lambda: ended() == ["done"] * 3)
