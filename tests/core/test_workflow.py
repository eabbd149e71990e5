from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orla_lg.core.call import Call
from orla_lg.core.memory import CacheEvent, EventKind
from orla_lg.core.workflow import Outcome, RunState, WorkflowBook

from .fakes import a_call

THREADS, BACKENDS = st.sampled_from(["t1", "t2", "t3"]), st.sampled_from("ab")


class BookMachine(RuleBasedStateMachine):
    """``WorkflowBook``: idle threads are bounded, ends are told once, and nothing of the gone is kept."""

    @initialize(max_idle=st.integers(0, 2))
    def start(self, max_idle: int) -> None:
        self.book, self.max_idle = WorkflowBook(max_idle=max_idle), max_idle
        self.runs: dict[str, str | None] = {}
        self.started = 0
        self.over: Counter[str] = Counter()
        self.open: list[tuple[Call, str]] = []

    def hear(self, events: list[CacheEvent]) -> list[EventKind]:
        self.over.update(event.workflow for event in events if event.kind is EventKind.OVER)
        return [event.kind for event in events]

    @rule(thread=st.none() | THREADS)
    def run_started(self, thread: str | None) -> None:
        self.started += 1
        run = f"r{self.started}"
        self.runs[run] = thread
        assert self.book.run_started(run, thread=thread).workflow == (thread or run)
        assert self.book.is_running(thread or run)

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome))
    def run_ended(self, data: st.DataObject, outcome: Outcome) -> None:
        run = data.draw(st.sampled_from(sorted(self.runs)))
        thread = self.runs.pop(run)
        known = self.book.is_running(thread or run)
        kinds = self.hear(self.book.run_ended(run, outcome))
        assert self.hear(self.book.run_ended(run, outcome)) == [] and self.book.run(run) is None
        if thread is None:
            assert kinds == [EventKind.OVER]
        elif known and thread not in self.runs.values():
            paused = outcome is Outcome.INTERRUPTED
            assert kinds[0] is (EventKind.INTERRUPTED if paused else EventKind.IDLE)
            assert set(kinds[1:]) <= {EventKind.FORGOTTEN}

    @rule(thread=THREADS)
    def thread_deleted(self, thread: str) -> None:
        assert self.hear(self.book.thread_deleted(thread)) == [EventKind.THREAD_DELETED]
        assert not self.book.is_running(thread)

    @rule(data=st.data(), backend=BACKENDS)
    def call_started(self, data: st.DataObject, backend: str) -> None:
        known = [thread or run for run, thread in self.runs.items()]
        call = a_call(data.draw(st.sampled_from(["stray", *known])))
        for event in self.book.call_started(call, backend):
            assert event.kind is EventKind.SWITCHED and event.backend != backend
            assert not any(c.identity.workflow == event.workflow and b == event.backend for c, b in self.open)
        again = a_call(call.identity.workflow)
        assert self.book.call_started(again, backend) == [], "a switch is told once"
        self.book.call_ended(again, backend)
        self.open.append((call, backend))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def call_ended(self, data: st.DataObject) -> None:
        call, backend = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        (event,) = self.book.call_ended(call, backend)
        assert event.kind in (EventKind.CALL_DONE, EventKind.STRAY_DONE) and not event.final

    @invariant()
    def sound(self) -> None:
        self.book.check_integrity()
        statistics = self.book.statistics()
        assert statistics.idle <= self.max_idle
        assert statistics.runs == self.book.open_runs() == len(self.runs)
        assert statistics.running <= len(self.runs)
        assert sum(statistics.outcomes.values()) == self.started - len(self.runs)
        assert all(times == 1 for times in self.over.values())


BookMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBook = BookMachine.TestCase


def test_a_preserved_cache_stays_preserved_until_its_backend_is_left_again() -> None:
    book = WorkflowBook()
    book.run_started("r", thread=None)

    def visit(backend: str, **hints: object) -> list[CacheEvent]:
        call = a_call("r", **hints)
        told = book.call_started(call, backend)
        book.call_ended(call, backend)
        return told

    assert visit("a") == []
    assert visit("b", cache="preserve") == [CacheEvent(EventKind.SWITCHED, "r", "a", "preserve")]
    assert visit("b") == []
    assert visit("a") == [CacheEvent(EventKind.SWITCHED, "r", "b")]


def test_a_thread_that_comes_back_to_another_backend_has_left_the_first() -> None:
    book = WorkflowBook()
    for run, backend, told in (("r1", "a", []), ("r2", "b", [CacheEvent(EventKind.SWITCHED, "t", "a")])):
        book.run_started(run, thread="t")
        call = a_call("t")
        assert book.call_started(call, backend) == told
        book.call_ended(call, backend)
        book.run_ended(run, Outcome.DONE)


@pytest.mark.parametrize("told", Outcome)
def test_an_interrupted_run_is_told_as_done(told: Outcome) -> None:
    run = RunState("r", "w")
    assert run.ends(told) is told
    run.interrupted = True
    assert run.ends(told) is (Outcome.INTERRUPTED if told is Outcome.DONE else told)
