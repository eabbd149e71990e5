from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from orla_lg.core.engine.breaker import Breaker, BreakerPolicy, Circuit

POLICY = BreakerPolicy(failures=3, pause_s=1.0, max_pause_s=3.0, trial_s=10.0)


def opened(at_s: float = 100.0) -> Breaker:
    breaker = Breaker(POLICY)
    assert [breaker.failed(at_s, "down") for _ in range(3)] == [False, False, True]
    return breaker


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not() -> None:
    breaker = Breaker(POLICY)
    for _ in range(10):
        assert not breaker.failed(1.0, "down") and not breaker.failed(1.0, "down")
        assert not breaker.succeeded()
    assert breaker.state(1.0) is Circuit.CLOSED and breaker.admit(1.0)


def test_open_it_refuses_then_lets_one_try() -> None:
    breaker = opened()
    assert breaker.state(100.9) is Circuit.OPEN and not breaker.admit(100.9)
    assert breaker.state(101.0) is Circuit.HALF_OPEN
    assert breaker.admit(101.0) and not breaker.admit(101.5), "one trial at a time"
    assert breaker.succeeded() and breaker.admit(101.5) and breaker.admit(101.5)


def test_a_failed_trial_doubles_the_pause_up_to_its_bound() -> None:
    breaker, now = opened(), 100.0
    for pause_s in (1.0, 2.0, 3.0, 3.0):
        assert breaker.retry_at_s == now + pause_s
        now += pause_s
        assert breaker.admit(now) and breaker.failed(now, "down")
    assert breaker.trips == 1, "one outage"
    breaker.succeeded()
    assert [breaker.failed(now, "down") for _ in range(3)][-1] and breaker.retry_at_s == now + 1.0, "starts afresh"


def test_a_connection_refused_costs_nothing_and_is_tried_every_second() -> None:
    breaker, now = opened(), 100.0
    for _ in range(5):
        now += 1.0
        assert breaker.admit(now) and breaker.failed(now, "refused", unreachable=True)
        assert breaker.retry_at_s == now + 1.0


def test_a_trial_without_news_does_not_bar_the_way_for_ever() -> None:
    breaker = opened()
    assert breaker.admit(101.0) and not breaker.admit(110.9) and breaker.admit(111.0)


def test_what_fails_late_does_not_keep_it_open() -> None:
    breaker = opened()
    assert not breaker.failed(100.5, "late") and breaker.retry_at_s == 101.0 and breaker.reason == "late"


class BreakerMachine(RuleBasedStateMachine):
    """Against a model that remembers the row of failures: open exactly when the row is long enough."""

    @initialize()
    def start(self) -> None:
        self.breaker, self.now, self.row = Breaker(POLICY), 0.0, 0

    @rule(seconds=st.sampled_from([0.0, 0.4, 1.0, 3.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def fails(self) -> None:
        self.row += 1
        was = self.breaker.state(self.now)
        opened_now = self.breaker.failed(self.now, "x")
        assert opened_now == (was is Circuit.HALF_OPEN or (was is Circuit.CLOSED and self.row >= POLICY.failures))

    @rule()
    def succeeds(self) -> None:
        self.row = 0
        self.breaker.succeeded()
        assert self.breaker.state(self.now) is Circuit.CLOSED

    @rule()
    def asks(self) -> None:
        if self.breaker.admit(self.now):
            return
        assert self.row >= POLICY.failures, "nobody is refused but after a row of failures"

    @invariant()
    def sound(self) -> None:
        self.breaker.check_integrity()
        closed = self.breaker.state(self.now) is Circuit.CLOSED
        assert closed == (self.row < POLICY.failures)


BreakerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestBreaker = BreakerMachine.TestCase
