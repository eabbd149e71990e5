from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orla_lg.core import serving as closing
from orla_lg.core.accounting.journal import Journal
from orla_lg.core.accounting.updates import MANY, RecordUpdates
from orla_lg.core.background import Background
from orla_lg.core.cache.verification import ExpectedTokens, Order, Verification
from orla_lg.core.call import Hints
from orla_lg.core.engine.backend import Backend, Capability, Effect, Probe, Support
from orla_lg.core.engine.capabilities import WorkflowCache
from orla_lg.core.lifecycle import serve
from orla_lg.core.memory.events import CacheAction, CacheEvent, EventKind, Verb
from orla_lg.core.memory.policies import memory_policy
from orla_lg.core.record import CacheFollowUp, RecordBook
from orla_lg.core.serving import Serving
from orla_lg.core.workflow import Outcome
from tests.core.fakes import Engine, Sender, a_serving, identity, new_call, step
from tests.core.test_record import a_record

PINNED, FREED = Order(Verb.PIN, Effect.PINNED), Order(Verb.FLUSH, Effect.FREED)
PATIENCE_S = 60.0


class Lines:
    """A journal in a list."""

    def __init__(self) -> None:
        self.told: list[tuple[str, tuple[str, ...], bool | None]] = []

    def amended(self, record_id: str, late: CacheFollowUp) -> None:
        self.told.append((record_id, late.orders, late.borne_out))


class Book:
    """The amendments of records ``a`` and ``b`` of workflow ``w``, with ``running`` in the test's hand."""

    def __init__(self, *others: str) -> None:
        self.lines, self.running, self.records = Lines(), True, RecordBook(1000)
        for name in ("a", "b", *others):
            self.records.add(replace(a_record(name), cache_orders=()))
        self.amendments = RecordUpdates(self.records, self.lines, lambda workflow: self.running)  # type: ignore[arg-type]


def verdict(borne_out: bool | None) -> Verification:
    return Verification(ExpectedTokens(0, 0, "a", None), 0, borne_out)


def test_while_a_run_goes_on_orders_wait_for_the_verdict_and_are_written_with_it() -> None:
    book = Book()
    book.amendments.ordered("a", PINNED)
    book.amendments.ordered("b", PINNED)
    assert book.lines.told == [] and book.records.find("a").cache_orders == ("pin:pinned",)
    book.amendments.judged("a", verdict(True))
    assert book.lines.told == [("a", ("pin:pinned",), True)]
    book.running = False
    book.amendments.run_ended("w")
    book.amendments.run_ended("w")
    assert book.lines.told[1:] == [("b", ("pin:pinned",), None)], "and no line twice"


def test_an_order_that_comes_just_as_its_run_ends_is_written() -> None:
    book = Book()
    told = book.records.ordered

    def meanwhile(record_id: str, order: str) -> CacheFollowUp | None:
        book.running = False
        book.amendments.run_ended("w")  # before the order is among those that wait
        return told(record_id, order)

    book.records.ordered = meanwhile  # type: ignore[method-assign]
    book.amendments.ordered("a", PINNED)
    assert book.lines.told == [("a", ("pin:pinned",), None)]


def test_of_two_runs_on_a_thread_the_last_one_to_end_counts() -> None:
    book = Book()
    book.amendments.ordered("a", PINNED)
    book.amendments.run_ended("w")
    assert book.lines.told == []
    book.amendments.close()
    assert book.lines.told == [("a", ("pin:pinned",), None)]


def test_what_waits_is_bounded() -> None:
    names = [f"r{n}" for n in range(MANY + 1)]
    book = Book(*names)
    for name in names:
        book.amendments.ordered(name, PINNED)
    assert len(book.lines.told) == MANY + 1


def test_nothing_new_is_no_line_and_without_a_file_nothing_waits() -> None:
    book = Book()
    book.amendments.judged("a", verdict(None))
    book.amendments.judged("stranger", verdict(True))
    book.amendments.ordered("stranger", PINNED)
    assert book.lines.told == []
    fileless = RecordUpdates(book.records, None, lambda workflow: False)
    fileless.ordered("a", FREED)
    fileless.judged("a", verdict(True))
    fileless.close()
    known = book.records.find("a")
    assert (known.cache_orders, known.cache_borne_out) == (("flush:freed",), True)


class Slow(Engine):
    """An engine whose flushes end when the test says so."""

    def __init__(self) -> None:
        super().__init__(Probe(models=("m",), capabilities={Capability.FLUSH_WORKFLOW: Support.NATIVE}))
        self.asked, self.answers = threading.Event(), asyncio.Event()

    async def pin(self, scope: WorkflowCache, *, ttl_s: float | None = None) -> Effect:
        return Effect.UNSUPPORTED

    async def release(self, scope: WorkflowCache) -> Effect:
        return Effect.UNSUPPORTED

    async def flush(self, scope: WorkflowCache) -> Effect:
        self.asked.set()
        await self.answers.wait()
        return Effect.FREED


def closed_while_flushing(file: Path, *, answered: bool) -> tuple[Any, Serving]:
    """Let a run end, and close while its flush is on its way; returns the last line written."""
    engine, background = Slow(), Background()
    serving = Serving(
        {Backend("b", "http://127.0.0.1:1/v1", "m"): engine},  # type: ignore[dict-item]
        mapper=None, memory=memory_policy("flush_at_boundary"), journal=Journal(file), background=background,
    )  # fmt: skip
    probing = serving.schedulers["b"].health.connect()
    assert probing is not None and probing.result(PATIENCE_S) is None
    serving.progress.run_started("r", thread=None)
    step(serve(new_call(serving, who=identity("r", run="r")), Sender()))
    serving.progress.run_ended("r", Outcome.DONE)
    assert engine.asked.wait(PATIENCE_S)
    if answered:
        background.call_later(0.05, engine.answers.set)
    serving.close()
    return json.loads(file.read_text().splitlines()[-1]), serving


@pytest.mark.parametrize(("answered", "order"), [(True, "flush:freed"), (False, "flush:unknown")])
def test_orders_on_their_way_at_the_end_read_as_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answered: bool, order: str
) -> None:
    if not answered:
        monkeypatch.setattr(closing, "CLOSE_PATIENCE_S", 0.05)
    line, serving = closed_while_flushing(tmp_path / "r.jsonl", answered=answered)
    (record,) = serving.records.records()
    assert (line["amends"], line["cache_orders"]) == (record.id, [order])
    assert record.cache_orders == (order,) and serving.schedulers["b"].statistics().memory.effects == {order: 1}


def test_an_order_after_the_end_was_not_given(tmp_path: Path) -> None:
    _, serving = closed_while_flushing(tmp_path / "r.jsonl", answered=True)
    serving.schedulers["b"].orders.called("late", "c")
    late = new_call(serving, who=identity("late"), said=Hints(cache="flush")).call
    serving.memory.signal(serving.book.call_ended(late, "b"))
    assert serving.schedulers["b"].statistics().memory.effects == {"flush:freed": 1, "flush:failed": 1}


def test_a_hint_leaves_its_trace_where_nothing_waits() -> None:
    serving = a_serving()
    step(serve(new_call(serving, said=Hints(cache="preserve")), Sender()))
    (record,) = serving.records.records()
    assert record.cache_hint == record.asdict()["cache_hint"] == "preserve" and record.run is None
    assert not any(order.startswith("pin") for order in record.cache_orders)


class OnlyPins:
    """Says nothing when a run ends."""

    def decide(self, event: CacheEvent) -> list[CacheAction]:
        done = event.kind is EventKind.CALL_DONE
        return [CacheAction(Verb.PIN, event.workflow, event.backend, ttl_s=9.0)] if done else []


def test_a_runs_end_writes_what_no_later_order_would(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    serving = Serving(
        {Backend("b", "http://127.0.0.1:1/v1", "m"): Engine()},  # type: ignore[dict-item]
        mapper=None, memory=OnlyPins(), journal=Journal(file),
    )  # fmt: skip
    serving.schedulers["b"].health._learn(Probe(models=("m",)))
    serving.progress.run_started("r", thread=None)
    step(serve(new_call(serving, who=identity("r", run="r")), Sender()))
    assert serving.journal is not None
    serving.progress.run_ended("r", Outcome.DONE)
    serving.journal.close()  # as if the process ended here
    assert [json.loads(line).get("cache_orders") for line in file.read_text().splitlines()] == [
        [], ["pin:unsupported"]
    ]  # fmt: skip
    serving.close()
