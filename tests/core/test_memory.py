from __future__ import annotations

import pytest

from orla_lg.core.backend import Effect
from orla_lg.core.memory import (
    CacheAction,
    CacheEvent,
    EventKind,
    FlushAtBoundary,
    FlushPerRequest,
    Ledger,
    ReleaseOnly,
    Verb,
    memory_policy,
)
from orla_lg.core.slots import SlotTable
from orla_lg.errors import ConfigError

from .fakes import a_call

K = EventKind


@pytest.mark.parametrize(
    ("policy", "flushed", "released"),
    [
        (FlushAtBoundary, {K.SWITCHED, K.OVER, K.THREAD_DELETED, K.FORGOTTEN}, {K.STRAY_DONE, K.INTERRUPTED, K.IDLE}),
        (FlushPerRequest, set(K) - {K.INTERRUPTED, K.IDLE}, {K.INTERRUPTED, K.IDLE}),
        (ReleaseOnly, set(), set(K) - {K.CALL_DONE, K.SWITCHED}),
    ],
)
def test_what_each_policy_does(policy: type, flushed: set[EventKind], released: set[EventKind]) -> None:
    verbs = {kind: [action.verb for action in policy().decide(CacheEvent(kind, "w", "b"))] for kind in K}
    assert {kind for kind, verb in verbs.items() if verb == [Verb.FLUSH]} == flushed
    assert {kind for kind, verb in verbs.items() if verb == [Verb.RELEASE]} == released


def test_hints_win() -> None:
    decide = FlushAtBoundary().decide
    assert decide(CacheEvent(K.CALL_DONE, "w", "b", "flush")) == (CacheAction(Verb.FLUSH, "w", "b"),)
    assert decide(CacheEvent(K.SWITCHED, "w", "b", "preserve")) == ()


def test_policies_by_name_or_object() -> None:
    assert isinstance(memory_policy("release_only"), ReleaseOnly)
    mine = FlushAtBoundary()
    assert memory_policy(mine) is mine
    with pytest.raises(ConfigError, match="did you mean 'default'"):
        memory_policy("defualt")
    with pytest.raises(ConfigError, match="needs decide"):
        memory_policy(object())


def test_without_slots_the_ledger_only_believes_and_claims_nothing() -> None:
    ledger, call = Ledger(), a_call("w")
    assert ledger.prepare(call, 0.0, running=True) is None
    ledger.settle(call, None, 0, 0.0, followed=True)
    ledger.settle(a_call("stray"), None, 7, 0.0, followed=False)
    assert ledger.statistics().workflows == 0
    ledger.settle(call, None, 7, 0.0, followed=True)
    assert (ledger.statistics().workflows, ledger.statistics().tokens, ledger.statistics().slots) == (1, 7, None)
    orders = [CacheAction(verb, "w") for verb in (Verb.RELEASE, Verb.FLUSH, Verb.RELEASE, Verb.FLUSH)]
    assert [ledger.apply(order) for order in orders] == [True, True, False, False], "what is not there needs no order"
    assert ledger.statistics().effects == {}
    ledger.settle(call, None, 7, 0.0, followed=True)
    ledger.engine_lost()
    assert ledger.statistics().tokens == 0


def test_with_slots_it_counts_what_lies_in_them() -> None:
    ledger, call = Ledger(slots=SlotTable(2)), a_call("w")
    seat = ledger.prepare(call, 0.0, running=True)
    assert ledger.prepare(a_call("v"), 0.0, running=True) is not None
    assert ledger.prepare(a_call("x"), 0.0, running=True) is None
    ledger.settle(call, seat, 7, 0.0, followed=True)
    ledger.settle(a_call("x"), None, 9, 0.0, followed=True)
    said = ledger.statistics()
    assert (said.workflows, said.tokens, said.slots, said.slots_held) == (2, 7, 2, 2)
    ledger.apply(CacheAction(Verb.RELEASE, "w"))
    ledger.apply(CacheAction(Verb.FLUSH, "w"))
    assert ledger.slots.start_erasing() == [seat.slot]
    ledger.erased(ledger.slots, seat.slot, Effect.FREED)
    assert ledger.statistics().effects == {"release:demoted": 1, "flush:freed": 1}
    ledger.engine_lost()
    assert ledger.statistics().tokens == 0
