from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orla_lg.core.cache.engine_cache import EngineCache
from orla_lg.core.cache.gate import Held
from orla_lg.core.call import Ask, Call, Usage
from orla_lg.core.engine.backend import Backend, Capability, Effect, Probe, Support
from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.engine.capabilities import WorkflowCache
from orla_lg.core.engine.health import PROBE_AGAIN_S, PROBE_INTEREST_S, PROBE_PAUSE_S, SILENT_S
from orla_lg.core.memory.events import CacheAction, Verb
from orla_lg.core.operation.steering import reprioritize
from orla_lg.core.placement.view import view_of
from orla_lg.core.policies import policies
from orla_lg.core.queues import Queued
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.errors import BackendUnavailable, OrlaClosed, QueueFull
from tests.core.cache.naive import NaiveCache
from tests.core.fakes import Engine, HandBackground, HandClock, a_call

WORKFLOWS = st.sampled_from("uvwx")
PREFIXES = st.sampled_from(["", "p", "q"])
DEAD = BackendUnavailable("nobody there")


def a_scheduler(
    engine: Engine | None = None, kind: type[BackendScheduler] = BackendScheduler, **limits: int
) -> tuple[BackendScheduler, HandBackground]:
    clock = HandClock()
    background = HandBackground(clock)
    backend = Backend("b", "http://b/v1", **limits)
    return kind(backend, engine or Engine(), background, clock, policies("b", "fcfs", "fcfs")), background


def enter(
    scheduler: BackendScheduler,
    workflow: str = "w",
    *,
    prefix: str = "",
    running: bool = True,
    holds_grant: bool = False,
) -> Queued:
    call = a_branch(workflow, prefix) if prefix else a_call(workflow)
    return scheduler.enter(call, order=None, running=running, holds_grant=holds_grant)


def a_branch(workflow: str, prefix: str, *, max_tokens: int | None = 4) -> Call:
    """A call with a system message of 1000 tokens, which take a second at the pace that is expected at first."""
    call = a_call(workflow)
    system = {"role": "system", "content": prefix * 4000}
    call.ask = Ask("auto", [system, {"role": "user", "content": call.id}], max_tokens=max_tokens)
    return call


def leave(scheduler: BackendScheduler, queued: Queued, *, tokens: int = 5, followed: bool = True) -> None:
    usage = Usage(tokens, 0, 1) if tokens else None
    scheduler.leave(queued, usage=usage, tokens=tokens, followed=lambda: followed)


class SchedulerMachine(RuleBasedStateMachine):
    """Any mixture of events: everything is given back, and no call that could go is left waiting."""

    kind: type[BackendScheduler] = BackendScheduler

    @initialize(bound=st.none() | st.integers(1, 3), slots=st.none() | st.integers(1, 3))
    def start(self, bound: int | None, slots: int | None) -> None:
        self.engine = Engine(Probe(slots=slots))
        self.scheduler, self.background = a_scheduler(
            self.engine, self.kind, capacity=8, **({"max_concurrency": bound} if bound else {})
        )
        self.inside: list[Queued] = []

    @rule(workflow=WORKFLOWS, running=st.booleans(), holds_grant=st.booleans(), prefix=PREFIXES)
    def enter(self, workflow: str, running: bool, holds_grant: bool, prefix: str) -> None:
        try:
            queued = enter(self.scheduler, workflow, prefix=prefix, running=running, holds_grant=holds_grant)
        except QueueFull:
            assert self.scheduler.queue.waiting >= 8
            return
        assert not (holds_grant and queued.waiting), "who holds a grant never waits"
        self.inside.append(queued)

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), tokens=st.sampled_from([0, 5]), followed=st.booleans())
    def leave(self, data: st.DataObject, tokens: int, followed: bool) -> None:
        queued = self.inside.pop(data.draw(st.integers(0, len(self.inside) - 1)))
        leave(self.scheduler, queued, tokens=tokens, followed=followed)
        leave(self.scheduler, queued, tokens=tokens, followed=followed)

    @rule(verb=st.sampled_from(Verb), workflow=WORKFLOWS)
    def apply(self, verb: Verb, workflow: str) -> None:
        self.scheduler.apply(CacheAction(verb, workflow))
        self.scheduler.forget(workflow)

    @rule(answer=st.sampled_from([Probe(slots=1), Probe(slots=2), Probe(), DEAD, ValueError("odd")]))
    def engine_changes(self, answer: Probe | Exception) -> None:
        self.engine.says = answer
        self.scheduler.health.lost(DEAD)

    @rule()
    def connect(self) -> None:
        assert self.scheduler.health.connect() is None or not self.scheduler.health.known

    @rule(effect=st.sampled_from([Effect.FREED, Effect.FAILED, OSError("broken")]))
    def background_works(self, effect: Effect | Exception) -> None:
        self.engine.effect = effect
        if self.background.work:
            self.background.do_next()

    @rule(seconds=st.sampled_from([0.1, 2.0, 6.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.background.advance(seconds)

    @rule(workflow=WORKFLOWS)
    def reprioritize(self, workflow: str) -> None:
        reprioritize(self.scheduler, workflow, lambda call: True)

    @invariant()
    def sound(self) -> None:
        self.scheduler.check_integrity()
        assert {q for q in self.inside if q.waiting or q.granted} == set(self.inside)
        for queued in self.inside:
            told = queued.turn is None or queued.turn.settled
            assert told or queued.waiting, "granted, and not told"
            assert not queued.waiting or queued.turn is not None, "waits for nothing"
        statistics = self.scheduler.statistics()
        assert statistics.queue.in_flight == sum(q.granted for q in self.inside)
        assert statistics.memory.slots_held <= (statistics.memory.slots or 0)

    def better_waits(self, queued: Queued) -> bool:
        """Whether one sits in a slot of its workflow that begins alike, and an idle one does not."""
        ask, workflow, now = queued.call.ask, queued.call.identity.workflow, self.background.clock()
        if len(ask.prefix) < 2:
            return False

        def alike(other: Queued) -> bool:
            return other.call.identity.workflow == workflow and other.call.ask.prefix[:1] == ask.prefix[:1]

        slots, there = self.scheduler.cache.table.slots, 0
        for other, lease in self.scheduler.cache.leases.items():
            slot = slots[lease.slot]
            there += alike(other) and not slot.flush_when_idle and now < slot.last_used_s + 30.0
        idle = [s for s in slots if s.owner == workflow and s.idle]
        return there > 0 and not any(s.prefix[:1] == ask.prefix[:1] for s in idle)

    @invariant()
    def no_call_waits_that_could_go(self) -> None:
        waiting, cache = [q for q in self.inside if q.waiting], self.scheduler.cache
        if not waiting or not self.scheduler.queue.has_room():
            return
        if not cache.slots:
            self.only_a_prefill_is_waited_for(waiting)
            return
        able = cache.table.eligible(self.background.clock())
        for queued in waiting:
            could = able is None or queued.call.identity.workflow in able
            assert not could or self.better_waits(queued), queued
        assert self.scheduler.queue.in_flight or self.background.work or self.background.timers, (
            "nothing will wake them"
        )

    def only_a_prefill_is_waited_for(self, waiting: list[Queued]) -> None:
        going = {q.call.ask.prefix[:1] for q in self.inside if q.granted}
        for queued in waiting:
            alike = len(queued.call.ask.prefix) == 2 and queued.call.ask.prefix[:1] in going
            assert queued.held == Held.CACHE or alike, queued
        assert self.background.timers, "nothing will wake them"

    def teardown(self) -> None:
        for queued in getattr(self, "inside", ()):
            leave(self.scheduler, queued)
            self.scheduler.check_integrity()
        if hasattr(self, "scheduler"):
            assert self.scheduler.queue.in_flight == self.scheduler.queue.waiting == len(self.scheduler._entered) == 0
            self.background.do_all()


SchedulerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase


class NaiveScheduler(BackendScheduler):
    """A scheduler that knows no cache but the naive one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.cache = NaiveCache()

    def _cache_of(self, probe: Probe) -> EngineCache:
        return NaiveCache(probe.slots or 0)


class NaiveSchedulerMachine(SchedulerMachine):
    """The scheduler asks nothing of a cache that is not in the Protocol; with room no call waits at all."""

    kind = NaiveScheduler

    @invariant()
    def no_call_waits_that_could_go(self) -> None:
        assert not self.scheduler.queue.has_room() or not any(queued.waiting for queued in self.inside)


NaiveSchedulerMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestNaiveScheduler = NaiveSchedulerMachine.TestCase


# Probing


def test_a_probe_is_shared_and_ends_once_what_it_learned_is_in_place() -> None:
    scheduler, background = a_scheduler(Engine(Probe(slots=2, models=("m",))))
    ended = scheduler.health.connect()
    assert ended is scheduler.health.connect() and len(background.work) == 1
    assert not ended.cancel(), "one waiter's cancellation is nobody else's"
    seen: list[bool] = []
    ended.add_done_callback(lambda _: seen.append(scheduler.health.known))
    background.do_all()
    assert seen == [True] and scheduler.health.connect() is None
    assert scheduler.queue.max_concurrency == 2 and scheduler.statistics().reachable is True


def test_a_probe_that_ends_at_once_does_not_deadlock() -> None:
    scheduler, background = a_scheduler()
    submit = background.submit

    def at_once(work: object) -> object:
        future = submit(work)
        background.do_all()
        return future

    background.submit = at_once
    assert scheduler.health.connect().done() and scheduler.health.known


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (DEAD, "nobody there"),
        (ValueError("odd"), r"probing backend 'b' failed: ValueError"),
        (TimeoutError(), "Time"),
    ],
)
def test_a_failed_probe_is_a_fault_and_tried_again_after_a_pause(
    error: Exception, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler, background = a_scheduler(Engine(error))
    assert scheduler.statistics().reachable is None
    ended = scheduler.health.connect()
    background.do_all()
    assert ended.result(0) is None and scheduler.statistics().reachable is False
    with pytest.raises(BackendUnavailable, match=fault):
        raise scheduler.health.fault
    assert bool(caplog.records) == isinstance(error, ValueError)
    assert scheduler.health.connect() is None
    background.advance(PROBE_PAUSE_S)
    scheduler.adapter.says = Probe()
    assert scheduler.health.connect() is not None
    background.do_all()
    assert scheduler.health.known and scheduler.health.fault is None


def test_a_probe_cut_off_by_the_end_still_ends() -> None:
    scheduler, background = a_scheduler()
    ended = scheduler.health.connect()
    work, asked = background.work.pop()
    work.close()
    assert asked.cancel() and ended.result(0) is None
    assert isinstance(scheduler.health.fault, BackendUnavailable)


def test_a_lost_engine_keeps_its_name_until_it_says_another() -> None:
    scheduler, _ = a_scheduler(Engine(Probe(models=("m",))))
    scheduler.health._learn(Probe(models=("m",)))
    scheduler.health.lost(DEAD)
    assert (
        view_of(scheduler).models == ("b", "m")
        and not scheduler.health.known
        and scheduler.statistics().reachable is False
    )


def test_a_table_that_changed_while_calls_are_in_flight_takes_no_seats_back() -> None:
    scheduler, background = a_scheduler(Engine(Probe(slots=1)))
    scheduler.health._learn(Probe(slots=3))
    seated = [enter(scheduler, w) for w in "uvw"]
    scheduler.health.lost(DEAD)
    scheduler.health.connect()
    background.do_all()
    assert scheduler.cache.table.count == scheduler.queue.max_concurrency == 1
    for queued in seated:
        leave(scheduler, queued)
    scheduler.check_integrity()
    assert enter(scheduler, "x").lease.slot == 0


# Whether it is well


def broken(scheduler: BackendScheduler, times: int = 5, *, unreachable: bool = False) -> None:
    for _ in range(times):
        scheduler.health.failed(DEAD, unreachable=unreachable)


def test_an_open_circuit_refuses_and_says_why() -> None:
    scheduler, background = a_scheduler()
    scheduler.health._learn(Probe())
    broken(scheduler, 4)
    assert scheduler.health.admit() is None and view_of(scheduler).circuit is Circuit.CLOSED
    broken(scheduler, 1)
    background.clock.now += 0.25
    with pytest.raises(BackendUnavailable, match=r"'b' is open for another 0\.8 s after 5 failures.*nobody there"):
        scheduler.health.admit()
    now = scheduler.statistics()
    assert (now.circuit, now.trips, view_of(scheduler).circuit) == (Circuit.OPEN, 1, Circuit.OPEN)


@pytest.mark.parametrize("well", [True, False])
def test_while_one_call_tries_the_others_wait_for_what_comes_of_it(well: bool) -> None:
    scheduler, background = a_scheduler()
    broken(scheduler)
    background.advance(1.0)
    assert scheduler.health.admit() is None, "the trial"
    waiting = scheduler.health.admit()
    assert waiting is scheduler.health.admit() and not waiting.cancel()
    if well:
        scheduler.health.answered()
    else:
        scheduler.health.failed(DEAD, unreachable=False)
    assert not waiting.done(), "its waiters do not run in the midst of this"
    background.advance(0.0)
    assert waiting.done() and view_of(scheduler).circuit is (Circuit.CLOSED if well else Circuit.OPEN)


def test_a_silent_engine_is_asked_without_a_new_call_and_its_return_closes_the_circuit() -> None:
    scheduler, background = a_scheduler(Engine(DEAD))
    scheduler.health.connect()
    background.do_all()
    broken(scheduler, unreachable=True)
    for _ in range(3):
        background.advance(PROBE_PAUSE_S)
        assert len(background.work) == 1, "one probe at a time, however many calls were lost"
        background.do_all()
    assert view_of(scheduler).circuit is not Circuit.CLOSED and not scheduler.health.known
    scheduler.adapter.says = Probe()
    background.advance(PROBE_PAUSE_S)
    background.do_all()
    assert scheduler.health.known and view_of(scheduler).circuit is Circuit.CLOSED
    background.advance(PROBE_PAUSE_S)
    assert not background.work, "and is left in peace then"


def test_nobody_is_asked_for_ever_on_behalf_of_nobody() -> None:
    scheduler, background = a_scheduler(Engine(DEAD))
    scheduler.health.connect()
    background.do_all()
    background.advance(PROBE_INTEREST_S)
    background.do_all()
    background.advance(PROBE_PAUSE_S)
    assert not background.work and not background.timers


def test_what_an_engine_said_is_asked_anew_from_time_to_time_and_nobody_waits_for_it() -> None:
    scheduler, background = a_scheduler(Engine(Probe(version="2")))
    scheduler.health._learn(Probe(version="1"))
    scheduler.health._probed_s = background.clock()
    background.clock.now += PROBE_AGAIN_S - 1
    assert scheduler.health.connect() is None and not background.work
    background.clock.now += 1
    assert scheduler.health.connect() is None and len(background.work) == 1
    background.do_all()
    assert scheduler.health.probe.version == "2"


@pytest.mark.parametrize(("before", "after", "kept"), [("1", "1", True), ("1", "2", False), ("", "", False)])
def test_a_restarted_engine_has_forgotten(before: str, after: str, kept: bool) -> None:
    scheduler, background = a_scheduler(Engine(Probe(slots=1, incarnation=after)))
    scheduler.health._learn(Probe(slots=1, incarnation=before))
    leave(scheduler, enter(scheduler, "u"), tokens=7)
    scheduler.health.lost(DEAD)
    scheduler.health.connect()
    background.do_all()
    assert scheduler.statistics().memory.tokens == (7 if kept else 0)


@pytest.mark.parametrize(("incarnation", "waits"), [("1", True), ("", False)])
def test_an_engine_that_tells_restarts_is_asked_before_a_call_goes_there_after_a_long_silence(
    incarnation: str, waits: bool
) -> None:
    scheduler, background = a_scheduler(Engine(Probe(slots=1, incarnation=incarnation)))
    scheduler.health._learn(Probe(slots=1, incarnation=incarnation))
    background.clock.now += SILENT_S + 1
    first, second = scheduler.health.connect(), scheduler.health.connect()
    assert (first is not None) == waits and second is first, "all wait for the same answer"
    background.do_all()
    assert first is None or first.done()
    assert scheduler.health.connect() is None, "it was heard of"


def test_a_restart_that_nobody_noticed_is_noticed_by_the_next_probe() -> None:
    scheduler, _ = a_scheduler()
    scheduler.health._learn(Probe(slots=1, incarnation="1"))
    leave(scheduler, enter(scheduler, "u"), tokens=7)
    scheduler.health._learn(Probe(slots=1, incarnation="2"))
    assert scheduler.statistics().memory.tokens == 0


def test_a_model_that_is_gone_is_told_and_the_engine_asked_anew(caplog: pytest.LogCaptureFixture) -> None:
    scheduler, background = a_scheduler(Engine(Probe(models=("new",))))
    scheduler.health._learn(Probe(models=("old",)))
    scheduler.health._probed_s = background.clock()
    scheduler.health.doubt("404: no such model")
    assert "it served old" in caplog.text and "no such model" in caplog.text
    background.do_all()
    assert view_of(scheduler).models == ("b", "new")


# Engines that are told, not seated


class Told(Engine):
    """An engine without slots that takes orders about a workflow's cache."""

    def __init__(self, *capabilities: Capability) -> None:
        super().__init__(Probe(capabilities=dict.fromkeys(capabilities, Support.NATIVE)))
        self.orders: list[tuple[str, str]] = []

    async def pin(self, scope: WorkflowCache, *, ttl_s: float | None = None) -> Effect:
        return Effect.UNSUPPORTED

    async def release(self, scope: WorkflowCache) -> Effect:
        self.orders.append(("release", scope.workflow))
        return Effect.DEMOTED

    async def flush(self, scope: WorkflowCache) -> Effect:
        self.orders.append(("flush", scope.workflow))
        return Effect.FREED


@pytest.mark.parametrize(
    ("can", "orders", "effects"),
    [
        (
            (Capability.FLUSH_WORKFLOW, Capability.RELEASE),
            [("release", "u"), ("flush", "u")],
            {"release:demoted": 1, "flush:freed": 1},
        ),
        ((Capability.RELEASE,), [("release", "u"), ("release", "u")], {"release:demoted": 1, "flush:demoted": 1}),
        ((Capability.FLUSH_WORKFLOW,), [("flush", "u")], {"release:unsupported": 1, "flush:freed": 1}),
        ((), [], {"release:unsupported": 1, "flush:unsupported": 1}),
    ],
)
def test_an_engine_is_told_what_it_can_do_and_only_of_whom_it_served(
    can: tuple[Capability, ...], orders: list[tuple[str, str]], effects: dict[str, int]
) -> None:
    engine = Told(*can)
    scheduler, background = a_scheduler(engine)
    scheduler.health._learn(engine.says)
    leave(scheduler, enter(scheduler, "u"))
    for verb in (Verb.RELEASE, Verb.FLUSH):
        scheduler.apply(CacheAction(verb, "u"))
        scheduler.apply(CacheAction(verb, "stranger"))
    background.do_all()
    assert engine.orders == orders and scheduler.statistics().memory.effects == effects


def test_an_engine_that_is_gone_gets_no_orders() -> None:
    scheduler, background = a_scheduler()
    scheduler.health._learn(Probe(slots=1))
    leave(scheduler, enter(scheduler, "u"))
    scheduler.health.lost(DEAD)
    scheduler.apply(CacheAction(Verb.FLUSH, "u"))
    assert not background.work
    scheduler.health._learn(Probe(slots=1))
    leave(scheduler, enter(scheduler, "v"))
    scheduler.apply(CacheAction(Verb.FLUSH, "v"))
    assert background.work, "and gets them again when it is back"


# Slots


def test_flushed_slots_are_erased_while_quiet_and_only_once() -> None:
    scheduler, background = a_scheduler(Engine())
    scheduler.health._learn(Probe(slots=2))
    leave(scheduler, enter(scheduler, "u"))
    other = enter(scheduler, "v")
    scheduler.apply(CacheAction(Verb.FLUSH, "u"))
    assert not background.work, "an erase would wait for the batch that runs"
    leave(scheduler, other)
    scheduler.apply(CacheAction(Verb.RELEASE, "v"))
    assert len(background.work) == 1
    background.do_all()
    assert scheduler.adapter.erased == [0]
    assert scheduler.statistics().memory.effects == {"release:demoted": 1, "flush:freed": 1}


def test_a_call_waits_for_an_erase_and_goes_even_if_it_breaks() -> None:
    scheduler, background = a_scheduler(Engine(effect=OSError("broken")))
    scheduler.health._learn(Probe(slots=1))
    leave(scheduler, enter(scheduler, "u"))
    scheduler.apply(CacheAction(Verb.FLUSH, "u"))
    waiting = enter(scheduler, "v")
    assert waiting.waiting
    background.do_all()
    assert waiting.turn.settled and waiting.lease.fresh
    assert scheduler.statistics().memory.effects == {"flush:unknown": 1, "flush:deferred": 1}


def test_without_slot_actions_nothing_is_erased_and_after_the_end_neither() -> None:
    scheduler, background = a_scheduler(Engine())
    scheduler.health._learn(Probe(slots=1, capabilities={Capability.FLUSH_WORKFLOW: Support.FLAG}))
    leave(scheduler, enter(scheduler, "u"))
    scheduler.apply(CacheAction(Verb.FLUSH, "u"))
    assert not background.work and enter(scheduler, "v").lease.fresh
    closed, background = a_scheduler(Engine())
    closed.health._learn(Probe(slots=1))
    leave(closed, enter(closed, "u"))
    background.closed = True
    closed.apply(CacheAction(Verb.FLUSH, "u"))


def test_a_favour_ends_by_a_timer() -> None:
    scheduler, background = a_scheduler(Engine())
    scheduler.health._learn(Probe(slots=1))
    leave(scheduler, enter(scheduler, "u"))
    waiting = enter(scheduler, "v")
    assert len(background.timers) == 1
    enter(scheduler, "x")
    assert len(background.timers) == 1, "one timer is enough"
    background.advance(4.9)
    assert not waiting.turn.settled
    background.advance(0.2)
    assert waiting.turn.settled


def test_a_workflow_that_ended_meanwhile_holds_nothing() -> None:
    scheduler, _ = a_scheduler(Engine())
    scheduler.health._learn(Probe(slots=1))
    leave(scheduler, enter(scheduler, "u"), followed=False)
    assert enter(scheduler, "v").granted


def test_who_holds_a_grant_goes_at_once_though_others_wait_for_a_slot() -> None:
    scheduler, _ = a_scheduler(Engine())
    scheduler.health._learn(Probe(slots=2))
    leave(scheduler, enter(scheduler, "held"))
    reading = enter(scheduler, "u")
    waiting = enter(scheduler, "v")
    assert waiting.waiting
    nested = enter(scheduler, "u", holds_grant=True)
    assert nested.extra and nested.lease is None and reading.granted


# The end


def test_closing_tells_everybody_who_waits_and_lets_nobody_wait_after(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    scheduler, _ = a_scheduler(max_concurrency=1)
    scheduler.health._learn(Probe())
    enter(scheduler)
    gone, waiting = enter(scheduler), enter(scheduler)
    leave(scheduler, gone)
    scheduler.turn_away()
    with pytest.raises(OrlaClosed, match="while the call waited"):
        waiting.turn.result()
    with pytest.raises(OrlaClosed):
        enter(scheduler)
    for queued in (gone, waiting):
        leave(scheduler, queued)
    scheduler.check_integrity()
