from __future__ import annotations

import logging

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orla_lg.core.cache.gate import Held
from orla_lg.core.call import Ask, Call, Usage
from orla_lg.core.engine.backend import Backend, Capability, Effect, Probe, Support
from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.engine.capabilities import WorkflowCache
from orla_lg.core.engine.health import PROBE_AGAIN_S, PROBE_INTEREST_S, PROBE_PAUSE_S, SILENT_S
from orla_lg.core.memory.events import CacheAction, Verb
from orla_lg.core.policies import policies
from orla_lg.core.queues import Queued
from orla_lg.core.scheduler import Desk
from orla_lg.errors import BackendUnavailable, OrlaClosed, QueueFull
from tests.core.fakes import Engine, HandBackground, HandClock, a_call

WORKFLOWS = st.sampled_from("uvwx")
PREFIXES = st.sampled_from(["", "p", "q"])
DEAD = BackendUnavailable("nobody there")


def a_desk(engine: Engine | None = None, **limits: int) -> tuple[Desk, HandBackground]:
    clock = HandClock()
    background = HandBackground(clock)
    backend = Backend("b", "http://b/v1", **limits)
    return Desk(backend, engine or Engine(), background, clock, policies("b", "fcfs", "fcfs")), background


def enter(
    desk: Desk, workflow: str = "w", *, prefix: str = "", running: bool = True, holds_grant: bool = False
) -> Queued:
    call = a_branch(workflow, prefix) if prefix else a_call(workflow)
    return desk.enter(call, order=None, running=running, holds_grant=holds_grant)


def a_branch(workflow: str, prefix: str, *, max_tokens: int | None = 4) -> Call:
    """A call with a system message of 1000 tokens, which take a second at the pace that is expected at first."""
    call = a_call(workflow)
    system = {"role": "system", "content": prefix * 4000}
    call.ask = Ask("auto", [system, {"role": "user", "content": call.id}], max_tokens=max_tokens)
    return call


def leave(desk: Desk, queued: Queued, *, tokens: int = 5, followed: bool = True) -> None:
    usage = Usage(tokens, 0, 1) if tokens else None
    desk.leave(queued, usage=usage, tokens=tokens, followed=lambda: followed)


class DeskMachine(RuleBasedStateMachine):
    """Any mixture of events: everything is given back, and nobody who could go is left waiting."""

    @initialize(bound=st.none() | st.integers(1, 3), slots=st.none() | st.integers(1, 3))
    def start(self, bound: int | None, slots: int | None) -> None:
        self.engine = Engine(Probe(slots=slots))
        self.desk, self.background = a_desk(self.engine, capacity=8, **({"max_concurrency": bound} if bound else {}))
        self.inside: list[Queued] = []

    @rule(workflow=WORKFLOWS, running=st.booleans(), holds_grant=st.booleans(), prefix=PREFIXES)
    def enter(self, workflow: str, running: bool, holds_grant: bool, prefix: str) -> None:
        try:
            queued = enter(self.desk, workflow, prefix=prefix, running=running, holds_grant=holds_grant)
        except QueueFull:
            assert self.desk.queue.waiting >= 8
            return
        assert not (holds_grant and queued.waiting), "who holds a grant never waits"
        self.inside.append(queued)

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), tokens=st.sampled_from([0, 5]), followed=st.booleans())
    def leave(self, data: st.DataObject, tokens: int, followed: bool) -> None:
        queued = self.inside.pop(data.draw(st.integers(0, len(self.inside) - 1)))
        leave(self.desk, queued, tokens=tokens, followed=followed)
        leave(self.desk, queued, tokens=tokens, followed=followed)

    @rule(verb=st.sampled_from(Verb), workflow=WORKFLOWS)
    def apply(self, verb: Verb, workflow: str) -> None:
        self.desk.apply(CacheAction(verb, workflow))
        self.desk.forget(workflow)

    @rule(answer=st.sampled_from([Probe(slots=1), Probe(slots=2), Probe(), DEAD, ValueError("odd")]))
    def engine_changes(self, answer: Probe | Exception) -> None:
        self.engine.says = answer
        self.desk.health.lost(DEAD)

    @rule()
    def connect(self) -> None:
        assert self.desk.health.connect() is None or not self.desk.health.known

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
        self.desk.reprioritize(workflow, lambda call: True)

    @invariant()
    def sound(self) -> None:
        self.desk.check_integrity()
        assert {q for q in self.inside if q.waiting or q.granted} == set(self.inside)
        for queued in self.inside:
            told = queued.turn is None or queued.turn.settled
            assert told or queued.waiting, "granted, and not told"
            assert not queued.waiting or queued.turn is not None, "waits for nothing"
        statistics = self.desk.statistics()
        assert statistics.queue.in_flight == sum(q.granted for q in self.inside)
        assert statistics.memory.slots_held <= (statistics.memory.slots or 0)

    def better_waits(self, queued: Queued) -> bool:
        """Whether one sits in a slot of its workflow that begins alike, and an idle one does not."""
        ask, workflow, now = queued.call.ask, queued.call.identity.workflow, self.background.clock()
        if len(ask.prefix) < 2:
            return False

        def alike(other: Queued) -> bool:
            return other.call.identity.workflow == workflow and other.call.ask.prefix[:1] == ask.prefix[:1]

        slots, there = self.desk.cache.table.slots, 0
        for other, seat in self.desk.cache.seats.items():
            slot = slots[seat.slot]
            there += alike(other) and not slot.flush_when_idle and now < slot.last_used_s + 30.0
        idle = [s for s in slots if s.owner == workflow and not (s.busy or s.erasing)]
        return there > 0 and not any(s.prefix[:1] == ask.prefix[:1] for s in idle)

    @invariant()
    def nobody_waits_who_could_go(self) -> None:
        waiting, cache = [q for q in self.inside if q.waiting], self.desk.cache
        if not waiting or not self.desk.queue.has_room():
            return
        if not cache.slots:
            self.only_a_prefill_is_waited_for(waiting)
            return
        able = cache.table.eligible(self.background.clock())
        for queued in waiting:
            could = able is None or queued.call.identity.workflow in able
            assert not could or self.better_waits(queued), queued
        assert self.desk.queue.in_flight or self.background.work or self.background.timers, "nothing will wake them"

    def only_a_prefill_is_waited_for(self, waiting: list[Queued]) -> None:
        going = {q.call.ask.prefix[:1] for q in self.inside if q.granted}
        for queued in waiting:
            alike = len(queued.call.ask.prefix) == 2 and queued.call.ask.prefix[:1] in going
            assert queued.held == Held.CACHE or alike, queued
        assert self.background.timers, "nothing will wake them"

    def teardown(self) -> None:
        for queued in getattr(self, "inside", ()):
            leave(self.desk, queued)
            self.desk.check_integrity()
        if hasattr(self, "desk"):
            assert self.desk.queue.in_flight == self.desk.queue.waiting == len(self.desk._entered) == 0
            self.background.do_all()


DeskMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestDesk = DeskMachine.TestCase


# Probing


def test_a_probe_is_shared_and_ends_once_what_it_learned_is_in_place() -> None:
    desk, background = a_desk(Engine(Probe(slots=2, models=("m",))))
    ended = desk.health.connect()
    assert ended is desk.health.connect() and len(background.work) == 1
    assert not ended.cancel(), "one waiter's cancellation is nobody else's"
    seen: list[bool] = []
    ended.add_done_callback(lambda _: seen.append(desk.health.known))
    background.do_all()
    assert seen == [True] and desk.health.connect() is None
    assert desk.queue.max_concurrency == 2 and desk.statistics().reachable is True


def test_a_probe_that_ends_at_once_does_not_deadlock() -> None:
    desk, background = a_desk()
    submit = background.submit

    def at_once(work: object) -> object:
        future = submit(work)
        background.do_all()
        return future

    background.submit = at_once
    assert desk.health.connect().done() and desk.health.known


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
    desk, background = a_desk(Engine(error))
    assert desk.statistics().reachable is None
    ended = desk.health.connect()
    background.do_all()
    assert ended.result(0) is None and desk.statistics().reachable is False
    with pytest.raises(BackendUnavailable, match=fault):
        raise desk.health.fault
    assert bool(caplog.records) == isinstance(error, ValueError)
    assert desk.health.connect() is None
    background.advance(PROBE_PAUSE_S)
    desk.adapter.says = Probe()
    assert desk.health.connect() is not None
    background.do_all()
    assert desk.health.known and desk.health.fault is None


def test_a_probe_cut_off_by_the_end_still_ends() -> None:
    desk, background = a_desk()
    ended = desk.health.connect()
    work, asked = background.work.pop()
    work.close()
    assert asked.cancel() and ended.result(0) is None
    assert isinstance(desk.health.fault, BackendUnavailable)


def test_a_lost_engine_keeps_its_name_until_it_says_another() -> None:
    desk, _ = a_desk(Engine(Probe(models=("m",))))
    desk.health._learn(Probe(models=("m",)))
    desk.health.lost(DEAD)
    assert desk.view().models == ("b", "m") and not desk.health.known and desk.statistics().reachable is False


def test_a_table_that_changed_while_calls_are_in_flight_takes_no_seats_back() -> None:
    desk, background = a_desk(Engine(Probe(slots=1)))
    desk.health._learn(Probe(slots=3))
    seated = [enter(desk, w) for w in "uvw"]
    desk.health.lost(DEAD)
    desk.health.connect()
    background.do_all()
    assert desk.cache.table.count == desk.queue.max_concurrency == 1
    for queued in seated:
        leave(desk, queued)
    desk.check_integrity()
    assert enter(desk, "x").seat.slot == 0


# Whether it is well


def broken(desk: Desk, times: int = 5, *, unreachable: bool = False) -> None:
    for _ in range(times):
        desk.health.failed(DEAD, unreachable=unreachable)


def test_an_open_circuit_refuses_and_says_why() -> None:
    desk, background = a_desk()
    desk.health._learn(Probe())
    broken(desk, 4)
    assert desk.health.admit() is None and desk.view().circuit is Circuit.CLOSED
    broken(desk, 1)
    background.clock.now += 0.25
    with pytest.raises(BackendUnavailable, match=r"'b' is open for another 0\.8 s after 5 failures.*nobody there"):
        desk.health.admit()
    now = desk.statistics()
    assert (now.circuit, now.trips, desk.view().circuit) == (Circuit.OPEN, 1, Circuit.OPEN)


@pytest.mark.parametrize("well", [True, False])
def test_while_one_call_tries_the_others_wait_for_what_comes_of_it(well: bool) -> None:
    desk, background = a_desk()
    broken(desk)
    background.advance(1.0)
    assert desk.health.admit() is None, "the trial"
    waiting = desk.health.admit()
    assert waiting is desk.health.admit() and not waiting.cancel()
    if well:
        desk.health.answered()
    else:
        desk.health.failed(DEAD, unreachable=False)
    assert not waiting.done(), "its waiters do not run in the midst of this"
    background.advance(0.0)
    assert waiting.done() and desk.view().circuit is (Circuit.CLOSED if well else Circuit.OPEN)


def test_a_silent_engine_is_asked_without_a_new_call_and_its_return_closes_the_circuit() -> None:
    desk, background = a_desk(Engine(DEAD))
    desk.health.connect()
    background.do_all()
    broken(desk, unreachable=True)
    for _ in range(3):
        background.advance(PROBE_PAUSE_S)
        assert len(background.work) == 1, "one probe at a time, however many calls were lost"
        background.do_all()
    assert desk.view().circuit is not Circuit.CLOSED and not desk.health.known
    desk.adapter.says = Probe()
    background.advance(PROBE_PAUSE_S)
    background.do_all()
    assert desk.health.known and desk.view().circuit is Circuit.CLOSED
    background.advance(PROBE_PAUSE_S)
    assert not background.work, "and is left in peace then"


def test_nobody_is_asked_for_ever_on_behalf_of_nobody() -> None:
    desk, background = a_desk(Engine(DEAD))
    desk.health.connect()
    background.do_all()
    background.advance(PROBE_INTEREST_S)
    background.do_all()
    background.advance(PROBE_PAUSE_S)
    assert not background.work and not background.timers


def test_what_an_engine_said_is_asked_anew_from_time_to_time_and_nobody_waits_for_it() -> None:
    desk, background = a_desk(Engine(Probe(version="2")))
    desk.health._learn(Probe(version="1"))
    desk.health._probed_s = background.clock()
    background.clock.now += PROBE_AGAIN_S - 1
    assert desk.health.connect() is None and not background.work
    background.clock.now += 1
    assert desk.health.connect() is None and len(background.work) == 1
    background.do_all()
    assert desk.health.probe.version == "2"


@pytest.mark.parametrize(("before", "after", "kept"), [("1", "1", True), ("1", "2", False), ("", "", False)])
def test_a_restarted_engine_has_forgotten(before: str, after: str, kept: bool) -> None:
    desk, background = a_desk(Engine(Probe(slots=1, incarnation=after)))
    desk.health._learn(Probe(slots=1, incarnation=before))
    leave(desk, enter(desk, "u"), tokens=7)
    desk.health.lost(DEAD)
    desk.health.connect()
    background.do_all()
    assert desk.statistics().memory.tokens == (7 if kept else 0)


@pytest.mark.parametrize(("incarnation", "waits"), [("1", True), ("", False)])
def test_an_engine_that_tells_restarts_is_asked_before_a_call_goes_there_after_a_long_silence(
    incarnation: str, waits: bool
) -> None:
    desk, background = a_desk(Engine(Probe(slots=1, incarnation=incarnation)))
    desk.health._learn(Probe(slots=1, incarnation=incarnation))
    background.clock.now += SILENT_S + 1
    first, second = desk.health.connect(), desk.health.connect()
    assert (first is not None) == waits and second is first, "all wait for the same answer"
    background.do_all()
    assert first is None or first.done()
    assert desk.health.connect() is None, "it was heard of"


def test_a_restart_that_nobody_noticed_is_noticed_by_the_next_probe() -> None:
    desk, _ = a_desk()
    desk.health._learn(Probe(slots=1, incarnation="1"))
    leave(desk, enter(desk, "u"), tokens=7)
    desk.health._learn(Probe(slots=1, incarnation="2"))
    assert desk.statistics().memory.tokens == 0


def test_a_model_that_is_gone_is_told_and_the_engine_asked_anew(caplog: pytest.LogCaptureFixture) -> None:
    desk, background = a_desk(Engine(Probe(models=("new",))))
    desk.health._learn(Probe(models=("old",)))
    desk.health._probed_s = background.clock()
    desk.health.doubt("404: no such model")
    assert "it served old" in caplog.text and "no such model" in caplog.text
    background.do_all()
    assert desk.view().models == ("b", "new")


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
    desk, background = a_desk(engine)
    desk.health._learn(engine.says)
    leave(desk, enter(desk, "u"))
    for verb in (Verb.RELEASE, Verb.FLUSH):
        desk.apply(CacheAction(verb, "u"))
        desk.apply(CacheAction(verb, "stranger"))
    background.do_all()
    assert engine.orders == orders and desk.statistics().memory.effects == effects


def test_an_engine_that_is_gone_gets_no_orders() -> None:
    desk, background = a_desk()
    desk.health._learn(Probe(slots=1))
    leave(desk, enter(desk, "u"))
    desk.health.lost(DEAD)
    desk.apply(CacheAction(Verb.FLUSH, "u"))
    assert not background.work
    desk.health._learn(Probe(slots=1))
    leave(desk, enter(desk, "v"))
    desk.apply(CacheAction(Verb.FLUSH, "v"))
    assert background.work, "and gets them again when it is back"


# Slots


def test_flushed_slots_are_erased_while_quiet_and_only_once() -> None:
    desk, background = a_desk(Engine())
    desk.health._learn(Probe(slots=2))
    leave(desk, enter(desk, "u"))
    other = enter(desk, "v")
    desk.apply(CacheAction(Verb.FLUSH, "u"))
    assert not background.work, "an erase would wait for the batch that runs"
    leave(desk, other)
    desk.apply(CacheAction(Verb.RELEASE, "v"))
    assert len(background.work) == 1
    background.do_all()
    assert desk.adapter.erased == [0]
    assert desk.statistics().memory.effects == {"release:demoted": 1, "flush:freed": 1}


def test_a_call_waits_for_an_erase_and_goes_even_if_it_breaks() -> None:
    desk, background = a_desk(Engine(effect=OSError("broken")))
    desk.health._learn(Probe(slots=1))
    leave(desk, enter(desk, "u"))
    desk.apply(CacheAction(Verb.FLUSH, "u"))
    waiting = enter(desk, "v")
    assert waiting.waiting
    background.do_all()
    assert waiting.turn.settled and waiting.seat.fresh
    assert desk.statistics().memory.effects == {"flush:unknown": 1, "flush:deferred": 1}


def test_without_slot_actions_nothing_is_erased_and_after_the_end_neither() -> None:
    desk, background = a_desk(Engine())
    desk.health._learn(Probe(slots=1, capabilities={Capability.FLUSH_WORKFLOW: Support.FLAG}))
    leave(desk, enter(desk, "u"))
    desk.apply(CacheAction(Verb.FLUSH, "u"))
    assert not background.work and enter(desk, "v").seat.fresh
    closed, background = a_desk(Engine())
    closed.health._learn(Probe(slots=1))
    leave(closed, enter(closed, "u"))
    background.closed = True
    closed.apply(CacheAction(Verb.FLUSH, "u"))


def test_a_favour_ends_by_a_timer() -> None:
    desk, background = a_desk(Engine())
    desk.health._learn(Probe(slots=1))
    leave(desk, enter(desk, "u"))
    waiting = enter(desk, "v")
    assert len(background.timers) == 1
    enter(desk, "x")
    assert len(background.timers) == 1, "one timer is enough"
    background.advance(4.9)
    assert not waiting.turn.settled
    background.advance(0.2)
    assert waiting.turn.settled


def test_a_workflow_that_ended_meanwhile_holds_nothing() -> None:
    desk, _ = a_desk(Engine())
    desk.health._learn(Probe(slots=1))
    leave(desk, enter(desk, "u"), followed=False)
    assert enter(desk, "v").granted


def test_who_holds_a_grant_goes_at_once_though_others_wait_for_a_slot() -> None:
    desk, _ = a_desk(Engine())
    desk.health._learn(Probe(slots=2))
    leave(desk, enter(desk, "held"))
    reading = enter(desk, "u")
    waiting = enter(desk, "v")
    assert waiting.waiting
    nested = enter(desk, "u", holds_grant=True)
    assert nested.extra and nested.seat is None and reading.granted


# The end


def test_closing_tells_everybody_who_waits_and_lets_nobody_wait_after(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    desk, _ = a_desk(max_concurrency=1)
    desk.health._learn(Probe())
    enter(desk)
    gone, waiting = enter(desk), enter(desk)
    leave(desk, gone)
    desk.turn_away()
    with pytest.raises(OrlaClosed, match="while the call waited"):
        waiting.turn.result()
    with pytest.raises(OrlaClosed):
        enter(desk)
    for queued in (gone, waiting):
        leave(desk, queued)
    desk.check_integrity()
