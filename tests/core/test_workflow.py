from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orla_lg.core.call import Call
from orla_lg.core.identity import tenant_of, workflow_key
from orla_lg.core.memory.events import CacheEvent, EventKind
from orla_lg.core.workflow import Outcome, RunState, WorkflowBook
from tests.core.fakes import a_call

TENANTS = st.sampled_from([None, "", "acme", "zenith"])
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


class TenantBookMachine(RuleBasedStateMachine):
    """Runs whose calls name tenants: each workflow is idle, or running for exactly the runs that called in it."""

    @initialize(max_idle=st.integers(0, 2))
    def start(self, max_idle: int) -> None:
        self.book, self.max_idle, self.started = WorkflowBook(max_idle=max_idle), max_idle, 0
        self.runs: dict[str, RunState] = {}
        self.called: dict[str, set[str]] = {}
        """By run, the keys of the workflows that calls of it belong to and that were not deleted since."""

    @rule(thread=st.none() | THREADS, tenant=TENANTS)
    def run_started(self, thread: str | None, tenant: str | None) -> None:
        self.started += 1
        run = self.book.run_started(f"r{self.started}", thread=thread, tenant=tenant)
        assert run.workflow == workflow_key(thread or run.id, tenant) and run.name == (thread or run.id)
        self.runs[run.id], self.called[run.id] = run, set()

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), tenant=TENANTS)
    def a_call_names_a_tenant(self, data: st.DataObject, tenant: str | None) -> None:
        run = data.draw(st.sampled_from(list(self.runs.values())))
        key, known = run.key(tenant), set(run.workflows)
        assert tenant_of(key) == ((run.tenant if tenant is None else tenant) or "")
        idle, settled = set(self.book._idle), run.settled
        events = self.book.joined(run, key)
        assert ([e.kind for e in events if e.workflow == key] == [EventKind.RESUMED]) == (key in idle - known)
        assert run.workflow == key and set(run.workflows) == (known | {key} if settled else {key})
        assert key in known or key in self.book._workflows
        if key in self.book._workflows and (not settled or key not in known):
            self.called[run.id].add(key)
        assert self.book.joined(run, key) == [], "it is told once"

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome))
    def run_ended(self, data: st.DataObject, outcome: Outcome) -> None:
        run = self.runs.pop(data.draw(st.sampled_from(sorted(self.runs))))
        del self.called[run.id]
        mine = set(run.workflows)
        for event in self.book.run_ended(run.id, outcome):
            assert event.workflow in mine or event.kind is EventKind.FORGOTTEN
        assert not any(run.id in state.runs for state in self.book._workflows.values())

    @rule(thread=THREADS, tenant=TENANTS)
    def thread_deleted(self, thread: str, tenant: str | None) -> None:
        key, others = workflow_key(thread, tenant), set(self.book._workflows)
        (event,) = self.book.thread_deleted(thread, tenant)
        assert event == CacheEvent(EventKind.THREAD_DELETED, key)
        assert set(self.book._workflows) == others - {key}, "another tenant's went with it"
        for called in self.called.values():
            called.discard(key)

    @invariant()
    def sound(self) -> None:
        self.book.check_integrity()
        assert self.book.statistics().idle <= self.max_idle
        for run, called in self.called.items():
            assert all(run in self.book._workflows[key].runs for key in called)


BookMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBook = BookMachine.TestCase
TenantBookMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTenantBook = TenantBookMachine.TestCase


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
