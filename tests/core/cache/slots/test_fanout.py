"""Branches that begin alike, on an engine with slots: who waits for a slot, and who takes another."""

from __future__ import annotations

import pytest

from orla_lg.core.cache.gate import Held
from orla_lg.core.call import Ask, Hints
from orla_lg.core.engine.backend import Probe
from orla_lg.core.memory.events import CacheAction, Verb
from orla_lg.core.operation.statistics import WaitsFor
from orla_lg.core.placement.view import resident_tokens, view_of
from orla_lg.core.queues import Queued
from orla_lg.core.scheduler import BackendScheduler
from tests.core.fakes import HandBackground, a_call, a_serving, new_call
from tests.core.test_scheduler import a_branch, a_scheduler, leave

PREFIX_S = 1.0
"""What the prefill of a branch's prefix takes at the pace of a backend that never told."""


def slots(count: int) -> tuple[BackendScheduler, HandBackground]:
    scheduler, background = a_scheduler()
    scheduler.health._learn(Probe(slots=count))
    return scheduler, background


def enter(
    scheduler: BackendScheduler, workflow: str = "w", prefix: str = "p", *, max_tokens: int | None = 4
) -> Queued:
    call = a_branch(workflow, prefix, max_tokens=max_tokens)
    return scheduler.enter(call, order=None, running=True, holds_grant=False)


def granted(queued: list[Queued]) -> list[int]:
    return [index for index, each in enumerate(queued) if each.granted]


def test_branches_go_one_after_the_other_through_the_slot_that_has_their_prefix() -> None:
    scheduler, _ = slots(8)
    branches = [enter(scheduler) for _ in range(6)]
    assert granted(branches) == [0] and {each.held for each in branches[1:]} == {Held.PREFIX}
    assert view_of(scheduler).waiting == view_of(scheduler).waiting_for_prefix == 5
    for index, branch in enumerate(branches):
        assert granted(branches) == [index]
        lease = branch.lease
        assert lease is not None and lease.slot == 0 and not lease.fresh
        leave(scheduler, branch)
    assert view_of(scheduler).waiting_for_prefix == 0
    scheduler.check_integrity()


def test_nobody_waits_where_answers_are_long_or_prefills_quick() -> None:
    scheduler, _ = slots(8)
    assert all(enter(scheduler, max_tokens=None).granted for _ in range(8)), "256 tokens take longer than the prefix"
    quick, _ = slots(8)
    quick.speed_meter.note(service_s=0.2, prefill_s=0.1, fresh_tokens=1000, completion_tokens=4)
    quick.speed_meter.note(service_s=0.2, prefill_s=0.1, fresh_tokens=1000, completion_tokens=4)
    assert all(enter(quick, max_tokens=12).granted for _ in range(8)), "a tenth of a second each way"


def test_who_writes_long_is_not_waited_for_and_who_writes_short_beside_it_is() -> None:
    scheduler, _ = slots(8)
    assert enter(scheduler, max_tokens=None).granted and enter(scheduler).granted
    waiting = enter(scheduler)
    assert waiting.held == Held.PREFIX, "for the second slot"
    assert enter(scheduler, max_tokens=None).held == Held.PREFIX, "whatever it will write itself"


def test_others_are_not_held_up() -> None:
    scheduler, _ = slots(3)
    first, behind = enter(scheduler), enter(scheduler)
    assert enter(scheduler, "v").granted, "another workflow, queued behind one that waits"
    other = enter(scheduler, "w", "q")
    assert other.granted and not behind.granted, "another prefix"
    leave(scheduler, other)
    assert not behind.granted, "that slot lacks the prefix"
    leave(scheduler, first)
    assert behind.granted and behind.lease.slot == 0


def test_who_waits_is_told_for_what() -> None:
    scheduler, _ = slots(2)
    for workflow in "wwv":
        enter(scheduler, workflow)
    enter(scheduler, "x")
    said = {each.workflow: each.waits_for for each in scheduler.statistics().waiting}
    assert said == {"w": WaitsFor.PREFIX, "x": WaitsFor.PLACE}


def test_who_shares_little_waits_for_nobody() -> None:
    scheduler, _ = slots(2)
    calls = [a_call("w"), a_call("w")]  # the same four characters
    assert all(scheduler.enter(call, order=None, running=True, holds_grant=False).granted for call in calls)


def test_a_sitter_that_pauses_is_not_waited_for_long() -> None:
    scheduler, background = slots(2)
    enter(scheduler)
    waiting = enter(scheduler)
    background.advance(29.9)
    assert waiting.waiting
    background.advance(0.2)
    assert waiting.granted and waiting.turn is not None and waiting.turn.settled
    assert waiting.lease.slot == 1


def test_nobody_waits_past_a_deadline() -> None:
    scheduler, _ = slots(3)
    enter(scheduler)
    for deadline_s, goes in ((20.0, True), (40.0, False)):
        call = a_branch("w", "p")
        call.arrived_s, call.hints = 100.0, Hints(deadline_s=deadline_s)
        assert scheduler.enter(call, order=None, running=True, holds_grant=False).granted == goes


def test_a_slot_that_will_be_flushed_is_not_waited_for() -> None:
    scheduler, _ = slots(2)
    enter(scheduler)
    waiting = enter(scheduler)
    scheduler.apply(CacheAction(Verb.FLUSH, "w"))
    assert waiting.granted and waiting.lease.slot == 1


# What mappers see of it


def test_a_slot_has_what_its_workflow_left_there_and_what_is_on_its_way() -> None:
    scheduler, _ = slots(2)
    assert resident_tokens(scheduler, a_branch("w", "p")) == 0
    sitting = enter(scheduler)
    assert resident_tokens(scheduler, a_branch("w", "p")) == pytest.approx(1000 * PREFIX_S, rel=0.01)
    assert resident_tokens(scheduler, a_branch("v", "p")) == resident_tokens(scheduler, a_branch("w", "q")) == 0
    leave(scheduler, sitting, tokens=1003)
    assert resident_tokens(scheduler, a_branch("w", "p")) == pytest.approx(1000 * PREFIX_S, rel=0.01)
    scheduler.apply(CacheAction(Verb.FLUSH, "w"))
    assert resident_tokens(scheduler, a_branch("w", "p")) == 0


def test_elsewhere_a_prefix_is_everybodys() -> None:
    scheduler, _ = a_scheduler()
    scheduler.health._learn(Probe())
    sitting = enter(scheduler)
    assert resident_tokens(scheduler, a_branch("v", "p")) == pytest.approx(1000, rel=0.01), "promised"
    waiting = enter(scheduler, "v")
    assert waiting.held == Held.PREFIX and view_of(scheduler).waiting_for_prefix == 1
    scheduler.first_token(sitting)
    assert waiting.granted and view_of(scheduler).waiting_for_prefix == 0
    leave(scheduler, sitting, tokens=2003)
    assert resident_tokens(scheduler, a_branch("x", "p")) == pytest.approx(2000, rel=0.01), (
        "as the engine counted them"
    )
    assert resident_tokens(scheduler, a_branch("x", "q")) == 0


def test_views_speak_for_a_call() -> None:
    serving = a_serving("here", "there")
    call = new_call(serving).call
    call.ask = a_branch("w", "p").ask
    serving.schedulers["there"].enter(call, order=None, running=True, holds_grant=False)
    other = new_call(serving).call
    other.ask = Ask("auto", call.ask.messages)
    here, there = serving.views(other)
    assert here.resident_tokens == 0 and there.resident_tokens >= 1000
    assert [view.resident_tokens for view in serving.views()] == [0, 0]
