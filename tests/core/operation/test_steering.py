from __future__ import annotations

import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orla_lg.core.engine.backend import Probe
from orla_lg.core.lifecycle import serve
from orla_lg.core.operation.statistics import SHOWN, WaitsFor
from orla_lg.core.operation.steering import KEEP, Steering, begin_drain
from orla_lg.core.placement.view import view_of
from orla_lg.core.queues import Queued, Sortable
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.core.steps import Waiter, drive
from orla_lg.core.workflow import WorkflowBook
from orla_lg.errors import BackendUnavailable, ConfigError, OrlaClosed, QueueFull
from orla_lg.mappers.load import LoadAware, expect, saturated
from orla_lg.mappers.table import ExplicitMapper
from tests.core.fakes import Engine, HandBackground, Sender, a_call, a_serving, a_view, decide, new_call, step
from tests.core.test_scheduler import a_scheduler, broken, enter

NAMES = st.sampled_from(["fcfs", "workflow_fcfs", "priority", "sjf", "edf", "las", "fair"])


def leave(scheduler: BackendScheduler, queued: Queued) -> None:
    scheduler.leave(queued, usage=None, tokens=5, followed=lambda: True)


class Moody:
    """A policy that fails on calls it does not like."""

    def key(self, head: Queued, now: float) -> Sortable:
        if head.call.priority > 5:
            raise RuntimeError("not this one")
        return (-head.order,)


class SteeringMachine(RuleBasedStateMachine):
    """Whatever is changed while calls wait: none is lost, none goes twice, none goes while it may not."""

    @initialize(bound=st.none() | st.integers(1, 3), slots=st.none() | st.integers(1, 3))
    def start(self, bound: int | None, slots: int | None) -> None:
        self.engine = Engine(Probe(slots=slots))
        self.scheduler, self.background = a_scheduler(
            self.engine, capacity=8, **({"max_concurrency": bound} if bound else {})
        )
        self.scheduler.health._learn(Probe(slots=slots))
        self.steering = Steering({"b": self.scheduler}, WorkflowBook())
        self.slots, self.bound, self.capacity = slots, bound, 8
        self.paused = False
        self.inside: list[Queued] = []
        self.orders: dict[Queued, int] = {}
        self.granted: set[Queued] = set()
        self.drains: list[Waiter] = []

    def may_hold(self) -> int:
        return min(self.bound or math.inf, self.slots or math.inf)

    def look(self) -> None:
        """Take note of who was granted by what just happened."""
        new = {queued for queued in self.inside if queued.granted} - self.granted
        assert not (self.paused and any(not queued.extra for queued in new)), "granted while paused"
        self.granted |= new
        if new and not all(queued.extra for queued in new):
            assert sum(q.granted for q in self.inside) <= self.may_hold() + sum(
                q.granted and q.extra for q in self.inside
            )

    @rule(
        workflow=st.sampled_from("uvw"), priority=st.integers(0, 9), chars=st.integers(0, 9),
        holds_grant=st.booleans(), stage=st.sampled_from("xyz"),
    )  # fmt: skip
    def enter(self, workflow: str, priority: int, chars: int, holds_grant: bool, stage: str) -> None:
        call = a_call(workflow, stage, at_s=self.background.clock(), chars=chars, priority=priority)
        try:
            queued = self.scheduler.enter(call, order=None, running=True, holds_grant=holds_grant)
        except QueueFull:
            assert self.scheduler.queue.waiting >= self.capacity
            return
        self.inside.append(queued)
        self.orders[queued] = queued.order
        self.look()

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def leave_or_cancel(self, data: st.DataObject) -> None:
        queued = self.inside.pop(data.draw(st.integers(0, len(self.inside) - 1)))
        leave(self.scheduler, queued)
        self.look()

    @rule()
    def pause(self) -> None:
        self.steering.pause("b")
        self.paused = True

    @rule()
    def resume(self) -> None:
        self.steering.resume("b")
        self.paused = False
        self.look()
        assert all(turn.settled for turn in self.drains)

    @rule()
    def drain(self) -> None:
        self.drains.append(begin_drain(self.scheduler))
        self.paused = True

    @rule(stage=st.none() | NAMES, request=st.none() | NAMES | st.just({"x": "edf"}))
    def set_policy(self, stage: str | None, request: str | None) -> None:
        if stage is None and request is None:
            return
        self.steering.set_policy(stage, request, None)
        self.look()

    @rule()
    def set_a_policy_that_fails(self) -> None:
        before, order = self.scheduler.queue.policies, self.scheduler.queue.first(100, 0.0)
        if all(queued.call.priority <= 5 for queued in order):
            return
        with pytest.raises(ConfigError, match=r"cannot order the calls that wait: RuntimeError\('not this one'\)"):
            self.steering.set_policy(None, Moody(), "b")
        assert self.scheduler.queue.policies is before and self.scheduler.queue.first(100, 0.0) == order

    @rule(bound=st.none() | st.integers(1, 4), capacity=st.integers(0, 8))
    def set_limit(self, bound: int | None, capacity: int) -> None:
        self.bound, self.capacity = bound, capacity
        self.steering.set_limit("b", bound, capacity)
        self.look()

    @rule()
    def probed_again(self) -> None:
        self.scheduler.health._learn(Probe(slots=self.slots))
        self.scheduler.go_on()
        self.look()

    @rule(seconds=st.sampled_from([0.5, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.background.advance(seconds)
        self.look()

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        self.scheduler.check_integrity()
        queue = self.scheduler.queue
        assert {q for q in self.inside if q.waiting != q.granted} == set(self.inside)
        assert queue.waiting == sum(q.waiting for q in self.inside)
        assert queue.in_flight == sum(q.granted for q in self.inside)
        assert queue.granted == len(self.granted), "every grant was given once"
        assert all(queued.order == order for queued, order in self.orders.items())
        assert queue.max_concurrency == (None if self.may_hold() == math.inf else self.may_hold())
        assert all(q.turn.settled != q.waiting for q in self.inside if q.turn is not None)

    @invariant()
    def drains_end_when_nothing_is_in_flight(self) -> None:
        assert self.scheduler.queue.paused == self.paused
        if not self.scheduler.queue.in_flight or not self.paused:
            assert all(turn.settled for turn in self.drains)
            self.drains.clear()

    @invariant()
    def nobody_waits_who_could_go(self) -> None:
        waiting, cache = {q.call.identity.workflow for q in self.inside if q.waiting}, self.scheduler.cache
        if not waiting or self.paused or self.scheduler.queue.in_flight >= self.may_hold():
            return
        able = cache.table.eligible(self.background.clock()) if cache.slots else None
        assert able is not None and not able & waiting

    @invariant()
    def the_first_shown_is_the_first_to_go(self) -> None:
        queue, now = self.scheduler.queue, self.background.clock()
        shown = queue.first(100, now)
        assert set(shown) == {q for q in self.inside if q.waiting} and len(shown) == queue.waiting
        assert queue.first(2, now) == shown[:2]
        if shown:
            assert shown[0] is queue.next(now)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.steering.resume("b")
        for queued in self.inside:
            leave(self.scheduler, queued)
        assert self.scheduler.queue.in_flight == self.scheduler.queue.waiting == 0


SteeringMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestSteering = SteeringMachine.TestCase


def steered(**limits: int) -> tuple[Steering, BackendScheduler, HandBackground]:
    scheduler, background = a_scheduler(**limits)
    return Steering({"b": scheduler}, WorkflowBook()), scheduler, background


# Pause, drain, resume


def test_who_holds_a_grant_goes_on_while_paused_and_others_wait() -> None:
    steering, scheduler, _ = steered(max_concurrency=2)
    reading = enter(scheduler)
    steering.pause("b")
    assert enter(scheduler).waiting and enter(scheduler, holds_grant=True).extra and reading.granted
    assert view_of(scheduler).paused and scheduler.statistics().queue.paused


def test_with_a_capacity_of_nothing_a_pause_refuses() -> None:
    steering, scheduler, _ = steered(capacity=0)
    leave(scheduler, enter(scheduler))
    steering.pause("b")
    with pytest.raises(QueueFull):
        enter(scheduler)


def test_drain_waits_for_the_last_call_and_for_no_other() -> None:
    steering, scheduler, _ = steered(max_concurrency=2)
    calls, waiting = [enter(scheduler), enter(scheduler)], enter(scheduler)
    with ThreadPoolExecutor(1) as pool:
        drained = pool.submit(drive, steering.drain("b", None))
        while not scheduler.queue.paused:
            pass
        leave(scheduler, calls[0])
        assert not drained.done() and waiting.waiting
        leave(scheduler, calls[1])
        assert drained.result(60.0) is True and waiting.waiting
    assert drive(steering.drain("b", 0)) is True, "at once, where nothing is in flight"
    steering.resume("b")
    assert waiting.granted and waiting.turn is not None and waiting.turn.settled


def test_a_drain_ends_by_its_time_by_a_resume_and_by_the_end() -> None:
    steering, scheduler, _ = steered()
    enter(scheduler)
    assert drive(steering.drain("b", 0.01)) is False
    assert scheduler.queue.paused and not scheduler.drains, "it stays paused, and remembers nobody who left"
    for end, outcome in ((lambda: steering.resume("b"), False), (scheduler.turn_away, OrlaClosed)):
        with ThreadPoolExecutor(1) as pool:
            drained = pool.submit(drive, steering.drain("b", None))
            while not scheduler.drains:
                pass
            end()
            if outcome is False:
                assert drained.result(60.0) is False
            else:
                assert isinstance(drained.exception(60.0), OrlaClosed)


@pytest.mark.parametrize("timeout_s", [-1, math.nan])
def test_a_drain_needs_a_time_that_can_pass(timeout_s: float) -> None:
    steering, scheduler, _ = steered()
    with pytest.raises(ConfigError, match="timeout_s must be 0 or more"):
        drive(steering.drain("b", timeout_s))
    assert not scheduler.queue.paused


def test_drain_while_calls_come_and_go_in_many_threads() -> None:
    steering, scheduler, _ = steered(max_concurrency=4)
    stop, ended = threading.Event(), threading.Semaphore(0)

    def caller() -> None:
        while not stop.is_set():
            queued = enter(scheduler)
            while queued.waiting and not stop.is_set():
                stop.wait(0.0005)
            leave(scheduler, queued)
        ended.release()

    with ThreadPoolExecutor(12) as pool:
        for _ in range(12):
            pool.submit(caller)
        for _ in range(30):
            assert drive(steering.drain("b", 5.0)) is True
            assert scheduler.queue.in_flight == 0
            granted = scheduler.queue.granted
            assert drive(steering.drain("b", 0.0)) is True and scheduler.queue.granted == granted
            steering.resume("b")
        stop.set()
    scheduler.check_integrity()
    assert scheduler.queue.in_flight == scheduler.queue.waiting == 0


# Where calls go meanwhile


def test_load_aware_mapping_leaves_a_paused_backend() -> None:
    home, away = a_view("home", paused=True), a_view("away")
    mapper = LoadAware(ExplicitMapper({"*": ["home", "away"]}))
    moved = decide(mapper, a_call(), [home, away])
    assert moved is not None and moved.backend == "away"
    assert [each.verdict for each in moved.considered] == ["paused", "chosen"]
    stays = decide(mapper, a_call(), [home, a_view("away", paused=True)])
    assert stays is not None and stays.backend == "home", "where all are paused, it waits at home"
    assert saturated(home) and expect(a_call().ask, home, [home]).total_s == math.inf


# Policies


def test_policies_change_while_a_thousand_calls_wait() -> None:
    steering, scheduler, background = steered(max_concurrency=1)
    first = enter(scheduler)
    chance = random.Random(4)
    waiting = []
    for n in range(1_000):
        call = a_call(
            f"w{n % 50}", f"s{n % 7}", at_s=background.clock(), chars=chance.randrange(4000), priority=n % 10
        )
        waiting.append(scheduler.enter(call, order=None, running=False, holds_grant=False))
    orders = {queued: queued.order for queued in waiting}
    for name in ("sjf", "edf", "fair", "priority", "sjf"):
        steering.set_policy(name, name, None)
        scheduler.check_integrity()
        assert scheduler.queue.waiting == 1_000
    gone = [first]
    while scheduler.queue.waiting:
        leave(scheduler, gone[-1])
        (now,) = [queued for queued in waiting if queued.granted]
        gone.append(now)
    assert {q: q.order for q in gone[1:]} == orders, "all of them, each once, with the numbers they came with"
    lengths = [queued.call.expected_tokens for queued in gone[1:]]
    assert lengths == sorted(lengths), "and in the order of the last policy"


def test_a_change_touches_what_it_names_and_nothing_else() -> None:
    schedulers = {name: a_scheduler()[0] for name in ("a", "b")}
    steering = Steering(schedulers, WorkflowBook())
    before = schedulers["b"].queue.policies
    steering.set_policy({"a": "edf"}, None, None)
    assert type(schedulers["a"].queue.policies.stage).__name__ == "EarliestDeadline"
    assert schedulers["b"].queue.policies.stage is before.stage
    steering.set_policy(None, {"reply": "sjf"}, "a")
    now = schedulers["a"].queue.policies
    assert set(now.requests) == {"*", "reply"} and type(now.stage).__name__ == "EarliestDeadline"
    steering.set_policy(None, "edf", "a")
    assert set(schedulers["a"].queue.policies.requests) == {"*"}, "one policy for all stages is for all of them"
    assert schedulers["b"].queue.policies.requests == before.requests


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("sjff", None, None), "unknown scheduling policy 'sjff'; did you mean 'sjf'"),
        (("sjf", "sjff", "a"), "unknown scheduling policy 'sjff'"),
        ((object(), None, None), "needs key"),
        (("sjf", None, "aa"), "unknown backend 'aa'; did you mean 'a'"),
        (({"a": "sjf", "bb": "sjf"}, None, None), "unknown backend 'bb'"),
        ((None, None, None), "nothing to change"),
    ],
)
def test_a_wrong_name_changes_nothing(given: tuple[object, object, str | None], message: str) -> None:
    schedulers = {name: a_scheduler()[0] for name in ("a", "b")}
    before = {name: scheduler.queue.policies for name, scheduler in schedulers.items()}
    with pytest.raises(ConfigError, match=message):
        Steering(schedulers, WorkflowBook()).set_policy(*given)  # type: ignore[arg-type]
    assert all(scheduler.queue.policies is before[name] for name, scheduler in schedulers.items())


def test_a_policy_that_fails_on_one_backend_is_undone_on_the_others() -> None:
    schedulers = {name: a_scheduler(max_concurrency=1)[0] for name in ("a", "b")}
    before = {name: scheduler.queue.policies for name, scheduler in schedulers.items()}
    for scheduler in schedulers.values():
        enter(scheduler)
    calm = [enter(schedulers["a"], w) for w in "uv"]
    schedulers["b"].enter(a_call(priority=9), order=None, running=False, holds_grant=False)
    with pytest.raises(ConfigError, match="backend 'b': the policy cannot order"):
        Steering(schedulers, WorkflowBook()).set_policy(None, Moody(), None)
    assert all(scheduler.queue.policies is before[name] for name, scheduler in schedulers.items())
    assert schedulers["a"].queue.first(5, 0.0) == calm


def test_a_policy_that_fails_on_the_last_call_leaves_the_order_of_the_others() -> None:
    steering, scheduler, _ = steered(max_concurrency=1)
    enter(scheduler)
    calls = [scheduler.enter(a_call(w, priority=p), order=None, running=False, holds_grant=False)
             for w, p in (("u", 1), ("v", 2), ("w", 9))]  # fmt: skip
    with pytest.raises(ConfigError):
        steering.set_policy(None, Moody(), None)
    scheduler.check_integrity()
    assert scheduler.queue.first(5, 0.0) == calls


# Limits


def test_a_limit_holds_at_once_and_over_the_next_probe() -> None:
    steering, scheduler, _ = steered(max_concurrency=1)
    scheduler.health._learn(Probe(slots=4))
    calls = [enter(scheduler, w) for w in "uvwxy"]
    steering.set_limit("b", 3, KEEP)
    assert sum(queued.granted for queued in calls) == 3
    scheduler.health._learn(Probe(slots=4))
    assert scheduler.queue.max_concurrency == 3, "what the engine says of itself does not undo it"
    steering.set_limit("b", None, KEEP)
    assert scheduler.queue.max_concurrency == 4, "as the engine bounds it"
    steering.set_limit("b", 1, KEEP)
    assert sum(queued.granted for queued in calls) == 4, "who is in flight stays"
    leave(scheduler, calls[0])
    assert calls[4].waiting, "and nobody follows until there are fewer"


def test_a_capacity_below_what_waits_ends_no_wait() -> None:
    steering, scheduler, _ = steered(max_concurrency=1)
    calls = [enter(scheduler) for _ in range(4)]
    steering.set_limit("b", KEEP, 1)
    with pytest.raises(QueueFull, match="3 calls waiting, its capacity is 1"):
        enter(scheduler)
    assert [queued.waiting for queued in calls] == [False, True, True, True]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("b", 0, KEEP), "'b': max_concurrency must be at least 1, got 0"),
        (("b", 2, -1), "'b': capacity must not be negative, got -1"),
        (("b", True, KEEP), "max_concurrency must be a whole number, got True"),
        (("b", 1.5, KEEP), "max_concurrency must be a whole number, got 1.5"),
        (("b", KEEP, None), "capacity must be a whole number, got None"),
        (("b", KEEP, KEEP), "nothing to change"),
        (("c", 1, KEEP), "unknown backend 'c'"),
    ],
)
def test_a_wrong_limit_changes_nothing(given: tuple[str, object, object], message: str) -> None:
    steering, scheduler, _ = steered(max_concurrency=5)
    with pytest.raises(ConfigError, match=message):
        steering.set_limit(*given)  # type: ignore[arg-type]
    assert (scheduler.queue.max_concurrency, scheduler.queue.capacity) == (5, 10_000)


@pytest.mark.parametrize("change", ["pause", "resume"])
def test_an_unknown_backend_is_named(change: str) -> None:
    steering, _, _ = steered()
    with pytest.raises(ConfigError, match="unknown backend 'bb'; did you mean 'b'"):
        getattr(steering, change)("bb")


# Who waits, and for what


def waits(scheduler: BackendScheduler) -> list[WaitsFor]:
    return [each.waits_for for each in scheduler.statistics().waiting]


def test_what_calls_wait_for() -> None:
    steering, scheduler, background = steered(max_concurrency=1)
    enter(scheduler, "u")
    held, waiting = enter(scheduler, "v"), enter(scheduler, "w")
    background.clock.now += 2.0
    assert waits(scheduler) == [WaitsFor.PLACE] * 2
    held.held = "cache"
    assert waits(scheduler) == [WaitsFor.CACHE, WaitsFor.PLACE]
    steering.pause("b")
    assert waits(scheduler) == [WaitsFor.PAUSED] * 2
    shown = scheduler.statistics().waiting[1]
    assert (shown.call, shown.workflow, shown.stage) == (waiting.call.id, "w", "node")
    assert shown.waited_s == background.clock() - waiting.call.arrived_s and shown.expected_tokens == 257


def test_who_waits_for_a_slot_or_for_a_trial_says_so() -> None:
    scheduler, _ = a_scheduler()
    scheduler.health._learn(Probe(slots=2))
    leave(scheduler, enter(scheduler, "u"))
    leave(scheduler, enter(scheduler, "v"))
    enter(scheduler, "w")
    assert waits(scheduler) == [WaitsFor.SLOT]
    serving = a_serving()
    scheduler = serving.schedulers["b"]
    broken(scheduler)
    serving.clock.now += 1.0  # type: ignore[attr-defined]
    assert scheduler.health.admit() is None, "the trial"
    step(serve(new_call(serving), Sender()))
    assert waits(scheduler) == [WaitsFor.CIRCUIT]


def test_of_many_the_first_are_shown_in_order() -> None:
    steering, scheduler, _ = steered(max_concurrency=1)
    steering.set_policy("priority", "priority", None)
    enter(scheduler)
    for n in range(3 * SHOWN):
        call = a_call(f"w{n}", f"s{n % 5}", priority=n)
        scheduler.enter(call, order=None, running=False, holds_grant=False)
    shown = scheduler.statistics().waiting
    assert [each.priority for each in shown] == [float(n) for n in range(3 * SHOWN - 1, 2 * SHOWN - 1, -1)]


def test_a_stage_policy_that_fails_shows_them_by_arrival(caplog: pytest.LogCaptureFixture) -> None:
    steering, scheduler, _ = steered(max_concurrency=1)
    enter(scheduler)
    for stage in "xy":
        scheduler.enter(a_call(stage=stage, priority=9), order=None, running=False, holds_grant=False)
    steering.set_policy(Moody(), None, None)
    assert [each.stage for each in scheduler.statistics().waiting] == ["x", "y"]
    assert "stage policy" in caplog.text


def test_an_engine_that_is_gone_can_be_paused() -> None:
    steering, scheduler, _ = steered()
    scheduler.health.lost(BackendUnavailable("gone"))
    steering.pause("b")
    assert enter(scheduler).waiting and view_of(scheduler).shut
