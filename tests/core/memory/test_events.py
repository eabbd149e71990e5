from __future__ import annotations

import pytest

from orla_lg.core.cache.prefix.cache import PrefixTreeCache
from orla_lg.core.cache.slots.cache import SlotCache
from orla_lg.core.cache.slots.swap import Swaps
from orla_lg.core.cache.verification import KEEP_ORDERS, Order, OrderBook
from orla_lg.core.call import CacheHint
from orla_lg.core.engine.backend import Effect
from orla_lg.core.engine.speed import SpeedMeter
from orla_lg.core.memory.events import CacheAction, CacheEvent, Doing, EventKind, Holding, MemoryPolicy, Returns, Verb
from orla_lg.core.memory.policies import (
    DemoteInterrupted,
    FlushAtBoundary,
    FlushPerRequest,
    FlushUnderPressure,
    Joined,
    PreserveIncrements,
    ReleaseAtSwitch,
    ReleaseOnly,
    WarmNextStage,
    WarmReturns,
    memory_policy,
    rules_for,
)
from orla_lg.core.queues import Queued
from orla_lg.errors import ConfigError
from tests.core.fakes import a_call

K = EventKind


@pytest.mark.parametrize(
    ("policy", "flushed", "released"),
    [
        (FlushAtBoundary, {K.SWITCHED, K.OVER, K.THREAD_DELETED, K.FORGOTTEN}, {K.STRAY_DONE, K.IDLE}),
        (
            FlushPerRequest,
            {K.CALL_DONE, K.STRAY_DONE, K.SWITCHED, K.OVER, K.THREAD_DELETED, K.FORGOTTEN},
            {K.INTERRUPTED, K.IDLE},
        ),
        (ReleaseAtSwitch, {K.OVER, K.THREAD_DELETED, K.FORGOTTEN}, {K.STRAY_DONE, K.SWITCHED, K.IDLE}),
        (ReleaseOnly, set(), {K.STRAY_DONE, K.INTERRUPTED, K.IDLE, K.OVER, K.THREAD_DELETED, K.FORGOTTEN}),
    ],
)
def test_what_is_done_at_boundaries(policy: type, flushed: set[EventKind], released: set[EventKind]) -> None:
    verbs = {kind: [action.verb for action in policy().decide(CacheEvent(kind, "w", "b"))] for kind in K}
    assert {kind for kind, verb in verbs.items() if verb == [Verb.FLUSH]} == flushed
    assert {kind for kind, verb in verbs.items() if verb == [Verb.RELEASE]} == released


RULES = (
    FlushAtBoundary(), FlushPerRequest(), ReleaseAtSwitch(), ReleaseOnly(), PreserveIncrements(), DemoteInterrupted(),
    FlushUnderPressure(), WarmReturns(), WarmNextStage(),
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("hint", [None, "flush", "preserve", "auto"])
def test_a_rule_does_nothing_about_events_that_it_is_not_asked_about(rule: MemoryPolicy, hint: CacheHint) -> None:
    held = Holding("w", 100, 100, 0, Doing.TOOL, 0.0)
    for kind in K:
        event = CacheEvent(
            kind, "w", "b", hint, waits=True, returns=Returns(0.9, 1.0, 4.0), prompt_tokens=100, tool="search",
            needs_tokens=50, holdings=[held], ahead={("s", "b"): 0.9},
        )  # fmt: skip
        if not rules_for(rule, kind):
            assert not rule.decide(event)
    assert any(rules_for(rule, kind) for kind in K), "it is asked about something"


def test_a_class_derived_from_a_rule_is_asked_about_all_events() -> None:
    class Mine(WarmReturns):
        pass

    mine = Mine()
    assert all(rules_for(Joined(FlushAtBoundary(), Joined(mine)), kind)[-1] is mine for kind in K)


def test_hints_win() -> None:
    decide = FlushAtBoundary().decide
    assert decide(CacheEvent(K.CALL_DONE, "w", "b", "flush")) == (CacheAction(Verb.FLUSH, "w", "b"),)
    assert decide(CacheEvent(K.SWITCHED, "w", "b", "preserve")) == ()


def done(prompt: int, fresh: int, **more: object) -> CacheEvent:
    return CacheEvent(K.CALL_DONE, "w", "b", waits=True, prompt_tokens=prompt, fresh_tokens=fresh, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("event", "ttl_s"),
    [
        (done(100, 20), 30.0),
        (done(100, 20, returns=Returns(0.9, 1.0, 4.0)), 6.0),
        (done(100, 20, returns=Returns(0.9, 900.0, 4000.0)), 300.0),
        (done(100, 60), None),
        (done(100, 60, hint="preserve"), 30.0),
        (done(100, 20, hint="flush"), None),
        (done(100, 20, returns=Returns(0.1, 1.0, 4.0)), None),
        (CacheEvent(K.CALL_DONE, "w", "b", prompt_tokens=100), None),
        (CacheEvent(K.TOOL_STARTED, "w", tool="search", returns=Returns(0.9, 8.0, 20.0)), 30.0),
    ],
)
def test_what_grows_by_small_increments_is_pinned_while_its_tool_usually_runs(
    event: CacheEvent, ttl_s: float | None
) -> None:
    ttls = [action.ttl_s for action in PreserveIncrements().decide(event) if action.verb is Verb.PIN]
    assert ttls == ([] if ttl_s is None else [ttl_s])


def test_an_interrupt_demotes_after_a_while_and_a_return_warms() -> None:
    (later,) = DemoteInterrupted(after_s=7.0).decide(CacheEvent(K.INTERRUPTED, "w"))
    assert (later.verb, later.after_s) == (Verb.RELEASE, 7.0)
    (warm,) = WarmReturns().decide(CacheEvent(K.RESUMED, "w"))
    assert warm == CacheAction(Verb.WARM, "w")
    (before_its_end,) = WarmReturns().decide(CacheEvent(K.TOOL_STARTED, "w", returns=Returns(1.0, 10.0, 20.0)))
    assert before_its_end.after_s == pytest.approx(7.0)
    assert not WarmReturns().decide(CacheEvent(K.TOOL_STARTED, "w", returns=Returns()))


def test_under_pressure_goes_what_loses_least_and_what_nobody_runs_on_first() -> None:
    held = [
        Holding("tool", 10, 10, 0, Doing.TOOL, 0.0, chance=0.1),
        Holding("long", 900, 900, 0, Doing.IDLE, 0.0, chance=0.5),
        Holding("likely", 400, 400, 0, Doing.HUMAN, 0.0, chance=0.9),
        Holding("shared", 800, 100, 0, Doing.IDLE, 0.0, chance=0.9),
    ]
    said = FlushUnderPressure().decide(CacheEvent(K.PRESSURE, "", "b", needs_tokens=450, holdings=held))
    assert [(action.verb, action.workflow) for action in said] == [(Verb.RELEASE, "shared"), (Verb.RELEASE, "likely")]
    all_of_it = FlushUnderPressure().decide(CacheEvent(K.PRESSURE, "", "b", needs_tokens=9999, holdings=held))
    assert [action.workflow for action in all_of_it] == ["shared", "likely", "long", "tool"]


def test_of_two_orders_for_one_cache_the_stronger_counts() -> None:
    joined = Joined(PreserveIncrements(), FlushPerRequest(), WarmReturns())
    assert [action.verb for action in joined.decide(done(100, 20))] == [Verb.FLUSH]
    tool = CacheEvent(K.TOOL_STARTED, "w", returns=Returns(1.0, 1.0, 2.0))
    assert [action.verb for action in joined.decide(tool)] == [Verb.PIN, Verb.WARM], "these two go together"
    later = Joined(FlushAtBoundary(), AfterAnHour()).decide(CacheEvent(K.IDLE, "w"))
    assert [(action.verb, action.after_s) for action in later] == [(Verb.RELEASE, 0.0), (Verb.FLUSH, 3600.0)]


class AfterAnHour:
    def decide(self, event: CacheEvent) -> list[CacheAction]:
        return [CacheAction(Verb.FLUSH, event.workflow, after_s=3600.0)]


def test_policies_by_name_or_object() -> None:
    assert isinstance(memory_policy("release_only"), ReleaseOnly)
    mine = FlushAtBoundary()
    assert memory_policy(mine) is mine
    with pytest.raises(ConfigError, match="did you mean 'default'"):
        memory_policy("defualt")
    for wrong in (object(), FlushAtBoundary):
        with pytest.raises(ConfigError, match="needs decide"):
            memory_policy(wrong)  # type: ignore[arg-type]


# What caches are asked


def test_an_engine_is_told_of_those_it_served_and_never_the_same_twice() -> None:
    cache, call = PrefixTreeCache(OrderBook()), a_call("w")

    def serve(tokens: int) -> None:
        queued = Queued(call, 1)
        cache.enter(queued, 0.0, SpeedMeter().speed)
        assert queued.lease is None
        cache.leave(queued, None, 0.0, tokens=tokens, followed=True)

    serve(0)
    assert cache.apply(CacheAction(Verb.FLUSH, "w")) is None, "the call never reached the engine"
    serve(7)
    first, again, stronger = (cache.apply(CacheAction(v, "w")) for v in (Verb.RELEASE, Verb.RELEASE, Verb.FLUSH))
    assert first is not None and again is None and stronger is first
    assert (first.call_id, first.waits) == (call.id, 2)
    for _ in range(KEEP_ORDERS + 1):
        pin = cache.apply(CacheAction(Verb.PIN, "w"))
        assert pin is not None, "a pin is renewed"
        cache.took_effect(CacheAction(Verb.PIN, "w", ttl_s=1.0), pin, Effect.PINNED, 0.0)
    assert len(first.orders) == KEEP_ORDERS
    serve(7)
    assert cache.apply(CacheAction(Verb.RELEASE, "w")) is not None, "after a call it is news again"


def test_with_slots_the_cache_follows_which_call_has_which() -> None:
    cache, speed = SlotCache(2, OrderBook(), Swaps(), None), SpeedMeter().speed
    first, second, third = (Queued(a_call(name), order, running=True) for order, name in enumerate("wvx"))
    for queued in (first, second, third):
        cache.enter(queued, 0.0, speed)
    assert first.lease is not None and second.lease is not None and third.lease is None
    cache.leave(first, None, 0.0, tokens=7, followed=True)
    cache.leave(third, None, 0.0, tokens=9, followed=True)
    now = cache.statistics()
    assert (now.tokens, now.slots, now.slots_held) == (7, 2, 2)
    for verb in (Verb.RELEASE, Verb.FLUSH):
        assert cache.apply(CacheAction(verb, "w")) is None
    assert cache.table.start_erasing() == [first.lease.slot]
    cache.table.erased(first.lease.slot, clean=True)
    cache.orders.note(Order(Verb.FLUSH, Effect.FREED), cache.table.slots[first.lease.slot].take_flush())
    assert [str(order) for _, order in cache.orders.take_news()] == ["release:demoted", "flush:freed"]
    assert cache.statistics().effects == {"release:demoted": 1, "flush:freed": 1}
