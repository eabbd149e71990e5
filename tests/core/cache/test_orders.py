"""Orders on their way to an engine and back, with any engine and in any order of events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orla_lg.core.cache.parts import Shared
from orla_lg.core.cache.verification import Order, Verification
from orla_lg.core.call import Usage
from orla_lg.core.engine.backend import Backend, Capability, Effect, Probe, Support
from orla_lg.core.engine.capabilities import WorkflowCache
from orla_lg.core.memory.events import CacheAction, Verb
from orla_lg.core.policies import policies
from orla_lg.core.queues import Queued
from orla_lg.core.scheduler import BackendScheduler
from tests.core.fakes import Engine, HandBackground, HandClock, a_call

WORKFLOWS = st.sampled_from("uvw")
VERBS = st.sampled_from([Verb.PIN, Verb.RELEASE, Verb.FLUSH])
CAN = {Verb.PIN: Capability.PIN, Verb.RELEASE: Capability.RELEASE, Verb.FLUSH: Capability.FLUSH_WORKFLOW}
DOES = {Verb.PIN: Effect.PINNED, Verb.RELEASE: Effect.DEMOTED, Verb.FLUSH: Effect.FREED}


class Obedient(Engine):
    """An engine without slots that does what it is told about a workflow's cache, or fails at it."""

    def __init__(self, *can: Verb) -> None:
        super().__init__(Probe(capabilities={CAN[verb]: Support.NATIVE for verb in can}))
        self.can = can
        self.told: list[tuple[Verb, str]] = []
        self.breaks = False

    async def _does(self, verb: Verb, scope: WorkflowCache) -> Effect:
        self.told.append((verb, scope.workflow))
        if self.breaks:
            raise OSError("broken")
        return DOES[verb]

    async def pin(self, scope: WorkflowCache, *, ttl_s: float | None = None) -> Effect:
        return await self._does(Verb.PIN, scope)

    async def release(self, scope: WorkflowCache) -> Effect:
        return await self._does(Verb.RELEASE, scope)

    async def flush(self, scope: WorkflowCache) -> Effect:
        return await self._does(Verb.FLUSH, scope)


class Heard:
    """A witness that remembers."""

    def __init__(self) -> None:
        self.orders: list[tuple[str, str]] = []
        self.verdicts: list[tuple[str, int | None]] = []

    def ordered(self, call_id: str, order: Order) -> None:
        self.orders.append((call_id, str(order)))

    def judged(self, call_id: str, verdict: Verification) -> None:
        self.verdicts.append((call_id, verdict.cached_tokens))


def a_scheduler(engine: Engine) -> tuple[BackendScheduler, HandBackground, Heard]:
    clock = HandClock()
    background, heard = HandBackground(clock), Heard()
    backend = Backend("b", "http://b/v1")
    scheduler = BackendScheduler(
        backend, engine, background, clock, policies("b", "fcfs", "fcfs"), Shared(sink=heard)
    )
    scheduler.health._learn(engine.says)
    return scheduler, background, heard


@dataclass
class Told:
    """What the model knows of a workflow: its last call that reached the engine, and what was asked since."""

    call: str
    standing: Verb | None = None


@dataclass
class OnItsWay:
    workflow: str
    verb: Verb
    call: str
    owed: bool
    """Whether something of the workflow was believed to be there."""


class OrdersMachine(RuleBasedStateMachine):
    """What is asked of whom, what comes of it, and where that is put down, against a naive model."""

    @initialize(can=st.sets(VERBS))
    def start(self, can: set[Verb]) -> None:
        self.engine = Obedient(*can)
        self.scheduler, self.background, self.heard = a_scheduler(self.engine)
        self.inside: list[tuple[Queued, str | None]] = []
        self.known: dict[str, Told] = {}
        self.on_their_way: list[OnItsWay] = []
        self.believed_free: list[str] = []
        freed = self.scheduler.cache.references.freed
        references = self.scheduler.cache.references

        def watched(workflow: str) -> None:
            self.believed_free.append(workflow)
            self.known_when_freed = workflow in references
            freed(workflow)

        references.freed = watched  # type: ignore[method-assign]

    @rule(workflow=WORKFLOWS)
    def enter(self, workflow: str) -> None:
        queued = self.scheduler.enter(a_call(workflow), order=None, running=True, holds_grant=False)
        assert queued.granted
        told = self.known.get(workflow)
        self.inside.append((queued, told.call if told else None))

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), reached=st.booleans(), cached=st.none() | st.integers(0, 5))
    def leave(self, data: st.DataObject, reached: bool, cached: int | None) -> None:
        queued, before = self.inside.pop(data.draw(st.integers(0, len(self.inside) - 1)))
        usage = Usage(5, cached, 1) if reached else None
        self.scheduler.leave(queued, usage=usage, tokens=6 if reached else 0, followed=lambda: True)
        if reached:
            self.known[queued.call.identity.workflow] = Told(queued.call.id)
            if before is not None:
                assert self.heard.verdicts.pop() == (before, cached), "its finding is held against the call before"
        assert not self.heard.verdicts

    @rule(verb=VERBS, workflow=WORKFLOWS)
    def ask(self, verb: Verb, workflow: str) -> None:
        told, waiting = self.known.get(workflow), len(self.background.work)
        self.scheduler.apply(CacheAction(verb, workflow, ttl_s=5.0))
        if told is None or (told.standing is verb and verb is not Verb.PIN):
            assert len(self.background.work) == waiting, "it was told of a stranger, or twice the same in a row"
            assert not self.heard.orders
            return
        told.standing = verb
        if self.done_as(verb) is not None:
            owed = self.scheduler.cache.tokens_of(workflow) > 0  # calls in flight may never get there
            self.on_their_way.append(OnItsWay(workflow, verb, told.call, owed))
        else:
            assert self.heard.orders.pop() == (told.call, f"{verb}:unsupported")
        assert len(self.background.work) == len(self.on_their_way)

    def done_as(self, verb: Verb) -> Verb | None:
        """Return what the engine is told: what it cannot flush it is to give up first."""
        able = [each for each in (verb, *([Verb.RELEASE] if verb is Verb.FLUSH else [])) if each in self.engine.can]
        return able[0] if able else None

    @precondition(lambda self: self.on_their_way)
    @rule(breaks=st.booleans())
    def engine_does(self, breaks: bool) -> None:
        self.engine.breaks = breaks
        order = self.on_their_way.pop(0)
        self.background.do_next()
        done = self.done_as(order.verb)
        assert done is not None
        assert self.engine.told.pop() == (done, order.workflow) and not self.engine.told
        effect = Effect.UNKNOWN if breaks else DOES[done]
        assert self.heard.orders.pop() == (order.call, f"{order.verb}:{effect}"), "in the record of the right call"
        told = self.known.get(order.workflow)
        later = [each for each in self.on_their_way if each.workflow == order.workflow and each.call != order.call]
        newest = not later if told is None else told.call == order.call  # else a later call has said more
        assert self.believed_free == ([order.workflow] if effect is Effect.FREED and newest else [])
        if self.believed_free and order.owed:
            assert self.known_when_freed, "the engine freed what we had forgotten already"
        for each in self.on_their_way if self.believed_free else ():
            each.owed = each.owed and each.workflow != order.workflow  # nothing is left to free twice
        self.believed_free.clear()

    @rule(workflow=WORKFLOWS)
    def over(self, workflow: str) -> None:
        if any(queued.call.identity.workflow == workflow for queued, _ in self.inside):
            return  # calls end before their runs do
        self.ask(Verb.FLUSH, workflow)
        self.scheduler.forget(workflow)
        self.known.pop(workflow, None)
        if not any(order.workflow == workflow for order in self.on_their_way):
            self.nothing_left(workflow)

    def nothing_left(self, workflow: str) -> None:
        cache = self.scheduler.cache
        assert self.scheduler.orders.order_logs.get(workflow) is None
        assert workflow not in cache.references and workflow not in cache._leaving

    @rule(seconds=st.sampled_from([0.1, 2.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.background.advance(seconds)

    @invariant()
    def sound(self) -> None:
        self.scheduler.check_integrity()
        assert not self.heard.orders and not self.scheduler.orders.news, "told at once, and nothing else"
        counted = self.scheduler.statistics().memory
        assert counted.truth.verified_tokens <= counted.truth.claimed_tokens

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        while self.inside:
            queued, _ = self.inside.pop()
            self.scheduler.leave(queued, usage=None, tokens=0, followed=lambda: True)
        for workflow in "uvw":
            self.over(workflow)
        while self.on_their_way:
            self.engine_does(breaks=False)
        for workflow in "uvw":
            self.nothing_left(workflow)
        self.scheduler.check_integrity()


OrdersMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestOrders = OrdersMachine.TestCase


def call(
    scheduler: BackendScheduler, workflow: str = "w", *, tokens: int = 5, cached: int | None = None, chars: int = 20
) -> str:
    """Make a call and end it; returns its id."""
    queued = scheduler.enter(a_call(workflow, chars=chars), order=None, running=True, holds_grant=False)
    scheduler.leave(queued, usage=Usage(tokens, cached, 0), tokens=tokens, followed=lambda: True)
    return queued.call.id


# Forgetting


def test_what_was_asked_before_the_last_call_says_nothing_of_it_even_when_both_are_forgotten() -> None:
    scheduler, background, _ = a_scheduler(Obedient(Verb.FLUSH))
    for _ in range(2):
        call(scheduler, chars=400)
        scheduler.apply(CacheAction(Verb.FLUSH, "w"))
        scheduler.forget("w")
    background.do_next()
    assert "w" in scheduler.cache.references, "the first flush may have come before the second call"
    background.do_next()
    assert "w" not in scheduler.cache.references and not scheduler.cache._leaving


def test_forgetting_waits_for_what_is_on_its_way_to_the_engine() -> None:
    scheduler, background, heard = a_scheduler(Obedient(Verb.FLUSH))
    first = call(scheduler)
    scheduler.apply(CacheAction(Verb.FLUSH, "w"))
    scheduler.forget("w")
    assert "w" in scheduler.cache.references, "else nobody would know what it is that the engine frees"
    background.do_all()
    assert "w" not in scheduler.cache.references and heard.orders == [(first, "flush:freed")]


def test_who_comes_back_under_the_same_name_is_not_forgotten_with_the_one_before() -> None:
    scheduler, background, _ = a_scheduler(Obedient(Verb.FLUSH))
    call(scheduler)
    scheduler.apply(CacheAction(Verb.FLUSH, "w"))
    scheduler.forget("w")
    call(scheduler)
    background.do_all()
    assert "w" in scheduler.cache.references and scheduler.orders.order_logs.get("w") is not None
    scheduler.check_integrity()


# What pins promise


def test_a_pin_promises_nothing_once_it_ended_by_itself() -> None:
    scheduler, background, _ = a_scheduler(Obedient(Verb.PIN))
    effects = []
    for waits_s in (1.0, 9.0):
        call(scheduler, chars=8_000, tokens=2_000, cached=2_000)
        scheduler.apply(CacheAction(Verb.PIN, "w", ttl_s=5.0))
        background.do_all()
        background.clock.now += waits_s
        queued = scheduler.enter(a_call("w", chars=8_000), order=None, running=True, holds_grant=False)
        assert queued.expected is not None
        effects.append(queued.expected.effect)
        scheduler.leave(queued, usage=None, tokens=0, followed=lambda: True)
    assert effects == [Effect.PINNED, None]


# Slots


def with_slots(count: int, effect: Effect = Effect.FREED) -> tuple[BackendScheduler, HandBackground, Heard]:
    return a_scheduler(Engine(Probe(slots=count), effect))


def test_with_slots_too_what_came_of_orders_is_put_down_with_the_call_before() -> None:
    scheduler, background, heard = with_slots(2)
    first, other = call(scheduler), call(scheduler, "v")
    scheduler.apply(CacheAction(Verb.RELEASE, "w"))
    scheduler.apply(CacheAction(Verb.FLUSH, "w"))
    scheduler.forget("w")
    assert heard.orders == [(first, "release:demoted")]
    background.do_all()
    assert heard.orders == [(first, "release:demoted"), (first, "flush:freed")]
    scheduler.apply(CacheAction(Verb.FLUSH, "stranger"))
    assert not background.work and other not in dict(heard.orders)
    scheduler.check_integrity()


@pytest.mark.parametrize(
    ("effect", "happens", "said"),
    [
        (Effect.FAILED, lambda scheduler: None, "flush:failed"),
        (Effect.FREED, lambda scheduler: scheduler.health._learn(Probe(slots=3)), "flush:failed"),
        (Effect.FREED, lambda scheduler: None, "flush:freed"),
    ],
)
def test_what_became_of_a_flushed_slot(
    effect: Effect, happens: Callable[[BackendScheduler], None], said: str
) -> None:
    scheduler, background, heard = with_slots(1, effect)
    first = call(scheduler)
    scheduler.apply(CacheAction(Verb.FLUSH, "w"))
    happens(scheduler)
    background.do_all()
    call(scheduler, "v")
    assert heard.orders[0] == (first, said)
    scheduler.check_integrity()


def test_a_slot_that_is_needed_before_it_is_erased_is_not_reused_and_its_flush_was_deferred() -> None:
    scheduler, background, heard = with_slots(1)
    first = call(scheduler)
    scheduler.health.lost(OSError("gone"))
    scheduler.apply(CacheAction(Verb.FLUSH, "w"))
    scheduler.health._learn(Probe(slots=1))
    queued = scheduler.enter(a_call("v"), order=None, running=True, holds_grant=False)
    lease = queued.lease
    assert lease is not None and lease.fresh and not background.work
    scheduler.leave(queued, usage=None, tokens=6, followed=lambda: True)
    assert heard.orders == [(first, "flush:deferred")]
    scheduler.check_integrity()


def test_news_that_nobody_hears_are_not_kept() -> None:
    clock = HandClock()
    engine = Obedient()
    scheduler = BackendScheduler(
        Backend("b", "http://b/v1"), engine, HandBackground(clock), clock, policies("b", "fcfs", "fcfs")
    )
    scheduler.health._learn(engine.says)
    call(scheduler)
    scheduler.apply(CacheAction(Verb.FLUSH, "w"))
    assert not scheduler.orders.news
