"""The memory manager between its policy and its desks; the desks are lists of what they are told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from orla_lg.core.background import Background
from orla_lg.core.identity import Identity
from orla_lg.core.lifecycle import serve
from orla_lg.core.memory.events import CacheAction, CacheEvent, Doing, EventKind, Holding, MemoryPolicy, Verb
from orla_lg.core.memory.manager import MemoryManager
from orla_lg.core.memory.policies import DemoteInterrupted, FlushAtBoundary, Joined, default
from orla_lg.core.memory.returns import IDLE, after_stage, of_tool
from orla_lg.core.workflow import Outcome
from tests.core.fakes import HandBackground, HandClock, Sender, a_call, a_serving, identity, new_call, step

K = EventKind


@dataclass
class FakeDesk:
    told: list[Any] = field(default_factory=list)

    def apply(self, action: CacheAction) -> None:
        self.told.append((action.verb, action.workflow))

    def turned(self, workflow: str, doing: Doing) -> None:
        self.told.append((doing, workflow))

    def returned(self, workflow: str) -> None:
        self.told.append(("returned", workflow))

    def forget(self, workflow: str) -> None:
        self.told.append(("forget", workflow))


class Managed:
    """A manager with two fake desks, a clock and timers in the test's hand."""

    def __init__(self, policy: MemoryPolicy) -> None:
        self.clock = HandClock()
        self.background = HandBackground(self.clock)
        self.here, self.there = FakeDesk(), FakeDesk()
        schedulers: Any = {"here": self.here, "there": self.there}
        background: Any = self.background
        self.manager = MemoryManager(policy, schedulers, background, self.clock)

    def hears(self, *kinds: EventKind, **said: Any) -> None:
        self.manager.signal([CacheEvent(kind, "w", **said) for kind in kinds])
        self.manager.check_integrity()

    def passes(self, seconds: float) -> None:
        self.background.advance(seconds)
        self.manager.check_integrity()


class Says:
    """A policy that says what a function of the event does, and remembers the events."""

    def __init__(self, said: Callable[[CacheEvent], Any] = lambda event: ()) -> None:
        self.said, self.heard = said, list[CacheEvent]()

    def decide(self, event: CacheEvent) -> Sequence[CacheAction]:
        self.heard.append(event)
        actions: Sequence[CacheAction] = self.said(event)
        return actions


# What is done, where and when


def test_an_order_goes_to_the_backend_it_names_or_to_all() -> None:
    to_one = Managed(Says(lambda event: [CacheAction(Verb.RELEASE, "w", event.backend)]))
    to_one.hears(K.CALL_DONE, backend="there")
    assert (to_one.here.told, to_one.there.told) == ([], [(Verb.RELEASE, "w")])
    to_one.hears(K.RESUMED)
    resumed = [(Doing.TOOL, "w"), ("returned", "w"), (Verb.RELEASE, "w")]
    assert to_one.here.told == resumed and to_one.there.told[1:] == resumed


def test_what_is_to_be_done_later_is_done_then_unless_the_workflow_calls_before() -> None:
    later = Says(lambda event: [CacheAction(Verb.RELEASE, event.workflow, "here", after_s=20.0)])
    managed = Managed(later)
    managed.hears(K.TOOL_STARTED)
    managed.passes(19.0)
    assert managed.here.told == []
    managed.passes(1.0)
    assert managed.here.told == [(Verb.RELEASE, "w")] and not managed.manager._due
    managed.hears(K.TOOL_STARTED, K.TOOL_STARTED)
    managed.manager.called("v")
    managed.manager.called("w")
    managed.hears(K.TOOL_STARTED)
    managed.passes(20.0)
    assert len(managed.here.told) == 2, "of three only the one after the call is carried out"
    assert not managed.manager._due


def test_an_end_forgets_and_takes_back_what_was_to_be_done_later() -> None:
    managed = Managed(Joined(FlushAtBoundary(), DemoteInterrupted(after_s=7.0)))
    managed.hears(K.INTERRUPTED)
    assert managed.here.told == [(Doing.HUMAN, "w")]
    managed.hears(K.THREAD_DELETED)
    managed.passes(7.0)
    for scheduler in (managed.here, managed.there):
        assert scheduler.told == [(Doing.HUMAN, "w"), (Verb.FLUSH, "w"), ("forget", "w")]
    assert not managed.manager.returns._away


def test_an_interrupt_demotes_after_a_while_a_resume_warms_and_the_end_of_a_run_releases() -> None:
    managed = Managed(default())
    managed.hears(K.INTERRUPTED)
    managed.passes(19.0)
    managed.hears(K.RESUMED)
    managed.manager.called("w")
    managed.passes(60.0)
    managed.hears(K.IDLE)
    managed.hears(K.RESUMED, K.INTERRUPTED)
    managed.passes(20.0)
    managed.hears(K.OVER)
    assert managed.here.told == [
        (Doing.HUMAN, "w"), (Doing.TOOL, "w"), ("returned", "w"), (Verb.WARM, "w"),
        (Doing.IDLE, "w"), (Verb.RELEASE, "w"),
        (Doing.TOOL, "w"), ("returned", "w"), (Verb.WARM, "w"), (Doing.HUMAN, "w"), (Verb.RELEASE, "w"),
        (Verb.FLUSH, "w"), ("forget", "w"),
    ]  # fmt: skip


# What a policy is told


def test_a_policy_is_told_when_who_waits_usually_comes_back() -> None:
    managed = Managed(says := Says())
    for _ in range(10):
        managed.hears(K.CALL_DONE, backend="here", graph="g", stage="s", waits=True)
        managed.passes(4.0)
        managed.manager.called("w")
    managed.hears(K.CALL_DONE, backend="here", graph="g", stage="s", waits=True)
    said = says.heard[-1].returns
    assert said is not None and said.chance > 0.9 and 2.56 <= (said.usual_s or 0) <= 5.12
    managed.hears(K.CALL_DONE, backend="here", graph="g", stage="s", waits=False)
    assert says.heard[-1].returns is None, "another call of it is still open"
    managed.manager.returns.used("w", "search", 60.0)
    managed.hears(K.TOOL_STARTED, tool="search")
    assert says.heard[-1].returns == managed.manager.returns.usual(of_tool("search"))


def test_under_pressure_a_policy_is_told_how_likely_each_comes_back() -> None:
    managed = Managed(says := Says())
    for _ in range(10):
        managed.hears(K.IDLE)
        managed.passes(1.0)
        managed.manager.called("w")
    managed.hears(K.IDLE)
    held = [Holding(name, 10, 10, 0, Doing.IDLE, 0.0) for name in ("w", "stranger")]
    managed.passes(1_000.0)
    managed.hears(K.PRESSURE, backend="here", holdings=held)
    likely = {each.workflow: each.chance for each in says.heard[-1].holdings}
    assert likely["w"] == pytest.approx(likely["stranger"], abs=0.01) and likely["w"] < 0.3, (
        "nobody was away for so long: nothing is known"
    )
    managed.manager.called("w")
    managed.hears(K.IDLE)
    managed.hears(K.PRESSURE, backend="here", holdings=held)
    likely = {each.workflow: each.chance for each in says.heard[-1].holdings}
    assert likely["w"] > 0.8, "it was always back after a second"


def test_for_how_long_a_cache_is_of_use_after_a_call() -> None:
    managed = Managed(Says())
    manager = managed.manager
    assert manager.keep_s(a_call("w")) == 0.0, "outside of any run nothing follows"
    call = a_call("w", "s")
    call.identity = Identity("w", "run", "s")
    assert manager.keep_s(call) is None, "not known"
    reason = after_stage(call.standing.graph, "s")
    manager.returns.waits("w", reason, 0.0)
    manager.returns.came("w", 10.0)
    assert 5.12 <= (manager.keep_s(call) or 0) <= 10.24
    for nth in range(20):
        manager.returns.waits(f"w{nth}", reason, 0.0)
        manager.returns.waits(f"w{nth}", IDLE, 0.0)
    assert manager.keep_s(call) == 0.0, "its runs end here"


# A policy that fails


def fails(event: CacheEvent) -> Any:
    raise KeyError("oh")


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (fails, "KeyError: 'oh'"),
        (lambda event: None, "TypeError"),
        (lambda event: ["flush"], "CacheActions, as a list; in it was 'flush'"),
        (lambda event: CacheAction(Verb.FLUSH, "w"), "TypeError"),
        (lambda event: [CacheAction(Verb.SAVE, "w")], "Verb.RELEASE, Verb.FLUSH; it was <Verb.SAVE: 'save'>"),
        (lambda event: [CacheAction("pin", "w")], "Verb.RELEASE, Verb.FLUSH; it was 'pin'"),  # type: ignore[arg-type]
    ],
)
def test_a_policy_that_fails_is_told_of_once_and_places_are_given_back_all_the_same(
    said: Callable[[CacheEvent], Any], fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    managed = Managed(Says(said))
    with caplog.at_level(logging.ERROR):
        managed.hears(K.CALL_DONE, K.CALL_DONE, K.IDLE, K.IDLE, K.OVER)
    assert managed.here.told == [
        *[(Doing.IDLE, "w"), (Verb.RELEASE, "w")] * 2, (Verb.RELEASE, "w"), ("forget", "w"),
    ]  # fmt: skip
    assert [record.args[1] for record in caplog.records] == [K.CALL_DONE, K.IDLE, K.OVER]  # type: ignore[index]
    assert fault in caplog.text


def test_a_policy_that_fails_ends_no_call() -> None:
    serving = a_serving("b", memory=Says(fails))
    serving.progress.run_started("r", thread=None)
    (answer,) = step(serve(new_call(serving, who=identity("r", run="r")), Sender()))
    serving.progress.run_ended("r", Outcome.DONE)
    assert answer == "answer" and serving.records.records()[0].error is None
    serving.check_integrity()
    serving.close()


def test_timers_of_a_real_background_end_with_it() -> None:
    background = Background()
    manager = MemoryManager(DemoteInterrupted(after_s=60.0), {}, background, HandClock())
    manager.signal([CacheEvent(K.INTERRUPTED, "w")])
    background.close()
    manager.signal([CacheEvent(K.INTERRUPTED, "v")])
    manager.check_integrity()
