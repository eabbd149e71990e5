"""What may be changed while calls run and wait, through ``Orla``."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from orla_lg import ChatOrla, ConfigError, DeadlineExceeded, Happening, Orla, OrlaClosed
from orla_lg.mappers.load import LoadAware
from tests.conftest import at
from tests.stub_engine import Gate, Reply, StubEngine
from tests.test_lifecycle import QUESTION, Watch, two_nodes

MakeOrla = Callable[..., Orla]
PATIENCE_S = 60.0


def waiting(orla: Orla, name: str = "main") -> int:
    return orla.statistics().backends[name].queue.waiting


@contextmanager
def busy(engine: StubEngine, orla: Orla, calls: int) -> Iterator[tuple[Gate, list[Any]]]:
    """Calls at an engine that answers once the gate opens; they all must come back."""
    gate = Gate()
    engine.rule = lambda seen: Reply(gate=gate)
    llm = ChatOrla(orla=orla, model="main")
    with ThreadPoolExecutor(calls) as pool:
        made = [pool.submit(llm.invoke, f"call {n}") for n in range(calls)]
        try:
            yield gate, made
        finally:
            gate.open()
            orla.resume("main")
        for call in made:
            call.result(PATIENCE_S)


def test_paused_calls_wait_and_go_when_it_is_resumed(engine: StubEngine, orla: Orla) -> None:
    watch, llm = Watch(orla), ChatOrla(orla=orla, model="main")
    orla.pause("main")
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(llm.invoke, "hello") for _ in range(3)]
        watch.wait(Happening.QUEUED, 3)
        assert engine.in_flight == 0 and waiting(orla) == 3 and not any(call.done() for call in calls)
        assert {each.waits_for for each in orla.statistics().backends["main"].waiting} == {"paused"}
        orla.resume("main")
        assert all(call.result(PATIENCE_S) for call in calls)
    assert len(orla.records()) == 3 and all(record.error is None for record in orla.records())


def test_draining_lets_those_in_flight_end_and_keeps_the_others(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = make_orla(at(engine, max_concurrency=2))
    with busy(engine, orla, 5) as (gate, calls):
        engine.wait(lambda e: e.in_flight == 2)
        assert orla.drain("main", timeout_s=0.05) is False, "they are still in flight"
        threading.Timer(0.1, gate.open).start()
        assert orla.drain("main", timeout_s=PATIENCE_S) is True
        assert engine.in_flight == 0 and waiting(orla) == 3
        assert sum(call.done() for call in calls) <= 2


async def test_draining_in_a_loop_blocks_nobody(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = make_orla(at(engine, max_concurrency=1))
    gate = Gate()
    engine.rule = lambda seen: Reply(gate=gate)
    llm = ChatOrla(orla=orla, model="main")
    async with asyncio.TaskGroup() as tasks:
        calls = [tasks.create_task(llm.ainvoke("hello")) for _ in range(3)]
        await engine.await_(lambda e: e.in_flight == 1)
        drained = tasks.create_task(orla.adrain("main"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not drained.done()
        gate.open()
        assert await drained is True and waiting(orla) == 2
        orla.resume("main")
    assert all(call.result() for call in calls)


def test_a_drain_that_is_cancelled_leaves_nothing(engine: StubEngine, orla: Orla) -> None:
    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await orla.adrain("main")

    with busy(engine, orla, 1):
        engine.wait(lambda e: e.in_flight == 1)
        asyncio.run(give_up())
        assert not orla.core.serving.schedulers["main"].drains


def test_deadlines_go_on_while_paused(orla: Orla) -> None:
    orla.pause("main")
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="and it is paused"):
        ChatOrla(orla=orla, model="main").invoke("hello", deadline_s=0.1)
    assert time.monotonic() - began < 5.0 and waiting(orla) == 0


def test_closing_ends_the_waits_of_who_is_paused_and_of_who_drains(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = make_orla(at(engine))
    watch, llm = Watch(orla), ChatOrla(orla=orla, model="main")
    stream = llm.stream("hello")
    next(stream)  # holds its grant until it is read
    with ThreadPoolExecutor(2) as pool:
        draining = pool.submit(orla.drain, "main")
        while not orla.core.serving.schedulers["main"].drains:
            time.sleep(0.01)
        call = pool.submit(llm.invoke, "hello")
        watch.wait(Happening.QUEUED)
        orla.close()
        assert isinstance(call.exception(PATIENCE_S), OrlaClosed)
        assert isinstance(draining.exception(PATIENCE_S), OrlaClosed)
    stream.close()


def test_calls_go_elsewhere_while_a_backend_is_drained(
    engine: StubEngine, other_engine: StubEngine, make_orla: MakeOrla
) -> None:
    mapper = LoadAware({"*": ["main", "other"]})
    orla = make_orla(at(engine), at(other_engine, "other"), mapper=mapper)
    graph = orla.wrap(two_nodes(engine).builder)
    graph.invoke(QUESTION)
    assert orla.drain("main", timeout_s=PATIENCE_S) is True
    graph.invoke(QUESTION)
    orla.resume("main")
    graph.invoke(QUESTION)
    assert [record.backend for record in orla.records()] == ["main"] * 2 + ["other"] * 2 + ["main"] * 2
    assert "paused" in {each.verdict for each in orla.records()[2].considered}


def test_limits_and_policies_change_while_calls_wait(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = make_orla(at(engine, max_concurrency=1))
    with busy(engine, orla, 6):
        engine.wait(lambda e: e.in_flight == 1)
        orla.set_policy(stage_policy="edf", request_policy="sjf")
        orla.set_limit("main", max_concurrency=4)
        engine.wait(lambda e: e.in_flight == 4)
        assert waiting(orla) == 2
        orla.set_limit("main", max_concurrency=None, capacity=50)
        engine.wait(lambda e: e.in_flight == 6)
        queue = orla.statistics().backends["main"].queue
        assert (queue.max_concurrency, queue.capacity, queue.granted) == (None, 50, 6)


@pytest.mark.parametrize(
    "change",
    [
        lambda orla: orla.pause("mein"),
        lambda orla: orla.resume("mein"),
        lambda orla: orla.drain("mein"),
        lambda orla: orla.set_limit("mein", capacity=1),
        lambda orla: orla.set_policy(stage_policy="edf", backend="mein"),
    ],
)
def test_an_unknown_backend_is_named(orla: Orla, change: Callable[[Orla], object]) -> None:
    with pytest.raises(ConfigError, match="unknown backend 'mein'; did you mean 'main'"):
        change(orla)
