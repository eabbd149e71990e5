from __future__ import annotations

from collections.abc import Callable

import pytest

from orla_lg.core.call import Hints
from orla_lg.core.lookahead.run_share import HALF_LIFE_S, RunShare
from orla_lg.core.policies import Fair, Fcfs, policies, policy
from orla_lg.core.queues import BackendQueue, Queued, Sortable
from orla_lg.errors import ConfigError
from tests.core.fakes import a_call


def test_a_name_or_an_object() -> None:
    mine = Fcfs()
    assert policy(mine) is mine and isinstance(policy("fcfs"), Fcfs)


@pytest.mark.parametrize(("wrong", "message"), [("prioriti", "did you mean 'priority'"), (object(), "needs key")])
def test_what_is_no_policy_is_refused(wrong: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy(wrong)


def test_a_name_means_one_policy_in_a_backend_and_another_in_the_next() -> None:
    first, second = policies("a", "fair", "fair"), policies("b", "fair", "fair")
    assert first.stage is first.of("any") and first.stage is not second.stage
    mine = Fair()
    assert policies("a", mine, {"report": mine, "*": "fair"}).of("report") is mine


def test_an_idle_tenants_call_goes_before_a_crowd_in_every_stage() -> None:
    """The crowd's calls stand in two stages; one account over both levels lets the newcomer go next."""
    queue = BackendQueue("b", policies("b", "fair", "fair"), 1000, 1)
    for number in range(40):
        queue.enter(a_call("crowd", "common" if number % 8 else "rare", tenant="crowd"), 0.0)
    for _ in range(10):
        chosen = queue.next(0.0)
        assert chosen is not None
        queue.leave(queue.grant(chosen))
    newcomer = queue.enter(a_call("light", "common", tenant="light"), 0.0)
    assert queue.next(0.0) is newcomer


def test_a_policy_that_is_both_is_told_once_who_goes() -> None:
    class Counts(Fcfs):
        told = 0

        def granted(self, head: Queued) -> None:
            self.told += 1

    both = Counts()
    queue = BackendQueue("b", policies("b", both, both), 10)
    queue.grant(queue.enter(a_call("w", "s"), 0.0))
    assert both.told == 1


def test_service_long_ago_counts_less_and_waiting_changes_nothing() -> None:
    queue = BackendQueue("b", policies("b", "las", "las"), 10)
    old, fresh, new = (a_call(workflow, "s") for workflow in ("old", "fresh", "new"))
    for call, at_s in ((old, 0.0), (fresh, 4 * HALF_LIFE_S)):
        call.standing = RunShare()
        call.standing.serve(1000, at_s)
    new.standing = RunShare()
    waiting = [queue.enter(call, 5 * HALF_LIFE_S) for call in (fresh, old, new)]
    gone = [queue.grant(queue.next(now)) for now in (300.0, 9e3, 9e6)]  # type: ignore[arg-type]
    assert gone == [waiting[2], waiting[1], waiting[0]]
    assert old.standing.attained(600.0) / fresh.standing.attained(600.0) == pytest.approx(1 / 16)


def test_what_a_run_expects_is_computed_once_when_it_is_read() -> None:
    call, asked = a_call("w", "s"), list[str]()

    def expects(what: str, seconds: float) -> Callable[[], float]:
        return lambda: asked.append(what) or seconds  # type: ignore[func-returns-value]

    assert call.standing.remaining_s is None
    call.standing.expects = expects("run", 3.0)
    assert not asked
    assert [call.standing.remaining_s] * 2 == [3.0, 3.0]
    assert asked == ["run"]
    call.standing.expects = expects("the next node", 2.0)
    assert call.standing.remaining_s == 2.0
    call.standing.expects = expects("never", 1.0)
    call.standing.remaining_s = None
    assert call.standing.remaining_s is None and "never" not in asked


class Steady(Fcfs):
    """By hinted priority, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def key(self, head: Queued, now: float) -> Sortable:
        self.asked += 1
        return (-head.call.priority,)


def test_a_steady_stage_policy_is_asked_for_new_heads_only() -> None:
    steady = Steady()
    queue = BackendQueue("b", policies("b", steady, "fcfs"), 1000)
    for number in range(300):
        queue.enter(a_call("w", f"stage {number % 30}", priority=number % 30), 0.0)
    for _ in range(100):
        queue.grant(queue.next(0.0))  # type: ignore[arg-type]
    assert steady.asked <= 30 + 100
    queue.check_integrity()


def test_a_hint_that_changes_reaches_the_stage_policy() -> None:
    queue = BackendQueue("b", policies("b", "priority", "priority"), 10)
    first, second = queue.enter(a_call("w", "a", priority=2), 0.0), queue.enter(a_call("v", "b", priority=1), 0.0)
    assert queue.next(0.0) is first
    second.call.hints = Hints(priority=3)
    queue.reorder(0.0, second.call.identity.workflow, lambda call: call is second.call)
    assert queue.next(0.0) is second


def test_a_stage_policy_that_fails_once_is_asked_again() -> None:
    class Fails(Steady):
        def key(self, head: Queued, now: float) -> Sortable:
            key = super().key(head, now)
            if self.asked == 2:
                raise ValueError("once")
            return key

    queue = BackendQueue("b", policies("b", Fails(), "fcfs"), 10)
    first = queue.enter(a_call("w", "a", priority=1), 0.0)
    second = queue.enter(a_call("w", "b", priority=2), 0.0)
    assert queue.next(0.0) is first, "first come, first served, this time"
    assert queue.next(0.0) is second


def test_a_run_that_was_served_sinks_at_the_stage_level_too() -> None:
    queue = BackendQueue("b", policies("b", "las", "fcfs"), 10)
    first, second = queue.enter(a_call("busy", "a"), 0.0), queue.enter(a_call("idle", "b"), 0.0)
    assert queue.next(0.0) is first
    first.call.standing.serve(1000, 0.0)
    queue.served("busy", 0.0)
    assert queue.next(0.0) is second


def test_a_class_is_no_policy_and_one_value_is_a_key() -> None:
    with pytest.raises(ConfigError, match=r"give an object of it: Fcfs\(\)"):
        policies("b", Fcfs, "fcfs")  # type: ignore[arg-type]

    class LongestFirst:
        def key(self, head: Queued, now: float) -> float:
            return -head.call.ask.prompt_chars

    queue = BackendQueue("b", policies("b", "fcfs", LongestFirst()), 10, 0)  # type: ignore[arg-type]
    short, long = queue.enter(a_call(chars=1), 0.0), queue.enter(a_call(chars=9), 0.0)
    assert queue.next(0.0) is long is not short
