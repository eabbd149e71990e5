"""What keys may spend: over all their calls, side by side, and over restarts."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from orla_lg.core.call import NO_HINTS, Ask, Call, Hints
from orla_lg.core.identity import Identity
from orla_lg.core.limits.book import LimitBook
from orla_lg.core.limits.limits import NO_LIMITS, Limit, Limits, LimitScope
from orla_lg.core.limits.usage import NOTHING, Amount
from orla_lg.core.lookahead.run_share import RunShare
from orla_lg.errors import BudgetExceeded
from orla_lg.serve.access.budgets import CallSlots, layers_of, spent_of
from orla_lg.serve.pools.directory import CorePlace, Directory
from orla_lg.serve.store.scoped import ScopedStore
from orla_lg.serve.store.spent import SpentKeeper
from orla_lg.serve.store.store import MemoryStore, Store
from tests.serve.fixtures import make

ONE = Amount(calls=1, tokens=10, cost_usd=0.1)


class Clock:
    def __init__(self) -> None:
        self.s = 1000.0

    def __call__(self) -> float:
        return self.s


def call(tenant: str | None = None, stage: str = "draft") -> Call:
    identity = Identity("w", None, stage, None)
    hints = NO_HINTS if tenant is None else Hints(tenant=tenant)
    return Call("c", identity, Ask("m", ()), hints, hints, 0.0, RunShare(0.0))


def spend(book: LimitBook, layers: Any, amount: Amount = ONE, **more: Any) -> None:
    book.settle(book.promise(call(**more), layers, None, amount), amount)


# All calls of a layer together


def test_a_limit_of_a_key_is_over_all_its_calls_whatever_their_stage_and_tenant() -> None:
    book, clock = LimitBook(NO_LIMITS, clock := Clock()), clock
    layers = [LimitScope(NO_LIMITS, "key/a/0", " of key a", whole=Limit(calls=3, per_s=60), name="ci")]
    spend(book, layers)
    spend(book, layers, stage="other", tenant="acme")
    clock.s += 20
    spend(book, layers, tenant="zenith")
    with pytest.raises(BudgetExceeded) as fault:
        spend(book, layers)
    assert (fault.value.scope, fault.value.name, fault.value.figure) == ("key", "ci", "calls")
    assert fault.value.retry_after_s == pytest.approx(41.0)
    assert str(fault.value).startswith("key 'ci' may use 3 calls in any 60 s (limits.calls of key a): 3 calls spent")
    spend(book, [LimitScope(NO_LIMITS, "key/b/0", whole=Limit(calls=3), name="ci")])  # another key of that name
    book.check_integrity()
    assert [(each.scope, each.name, each.refused) for each in book.statistics()] == [
        ("key", "ci", 1),
        ("key", "ci", 0),
    ]


def test_calls_side_by_side_cannot_overspend() -> None:
    book = LimitBook(NO_LIMITS, Clock())
    layers = [LimitScope(NO_LIMITS, "key/a/0", whole=Limit(cost_usd=1.0), name="ci")]
    held, refused = list[Any](), list[BudgetExceeded]()

    def enter() -> None:
        for _ in range(10):
            try:
                held.append(book.promise(call(), layers, None, ONE))
            except BudgetExceeded as fault:
                refused.append(fault)

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (10, 30)
    for each in held[:5]:
        book.settle(each, NOTHING)  # no engine answered
    assert [book.promise(call(), layers, None, ONE) for _ in range(5)]
    with pytest.raises(BudgetExceeded):
        book.promise(call(), layers, None, ONE)
    book.check_integrity()


def test_several_limits_hold_all_and_one_that_refuses_sets_nothing_aside() -> None:
    key, _ = make(MemoryStore(), limits=(Limit(calls=10), Limit(tokens=15)))
    book = LimitBook(NO_LIMITS, Clock())
    spend(book, layers_of(key))
    with pytest.raises(BudgetExceeded, match="15 tokens"):
        spend(book, layers_of(key))
    assert [each.promised for each in book.statistics()] == [NOTHING, NOTHING]


def test_an_account_of_a_key_is_not_forgotten_for_many_others() -> None:
    book = LimitBook(Limits(tenants={"*": Limit(calls=5)}), Clock(), keep=3)
    layers = [LimitScope(NO_LIMITS, "key/a/0", whole=Limit(calls=1), name="ci")]
    spend(book, layers, tenant="first")
    for number in range(20):
        spend(book, (), tenant=f"tenant-{number}")
    with pytest.raises(BudgetExceeded):
        spend(book, layers)


def test_slots_are_counted_by_key() -> None:
    slots = CallSlots()
    one = slots.take("a", 1)
    assert one is not None and slots.take("a", 1) is None and slots.take("b", 1) is not None
    one.release()
    assert slots.take("a", 1) is not None


# Over restarts


class Estimates:
    def dumped(self) -> bytes:
        return b"{}"

    def restore(self, _kept: bytes, _where: str) -> None:
        """Nothing was learned."""


def started(
    store: Store, limits: Limits = NO_LIMITS, wall_s: float = 1000.0
) -> tuple[LimitBook, SpentKeeper, Clock, Clock]:
    """A process: its monotonic clock has nothing to do with the wall clock."""
    monotonic, wall = Clock(), Clock()
    wall.s = wall_s
    book = LimitBook(limits, monotonic)
    serving: Any = SimpleNamespace(
        clock=monotonic, limits=book, book=SimpleNamespace(runs=list), estimates=Estimates()
    )  # fmt: skip
    spent = SpentKeeper(serving, store, lambda: True, wall=wall)
    spent.load()
    return book, spent, monotonic, wall


def test_what_was_spent_outlives_the_process() -> None:
    store: Store = MemoryStore()
    limits = Limits(tenants={"acme": Limit(calls=2)}, stages={"draft": Limit(calls=9)})
    key, _ = make(store, limits=(Limit(cost_usd=0.25), Limit(calls=2, per_s=100.0)))
    book, spent, *_ = started(store, limits)
    spend(book, layers_of(key), tenant="acme")
    spend(book, layers_of(key), tenant="acme")
    spent.close()
    for _ in range(2):  # and the next one
        book, spent, _, wall = started(store, limits)
        with pytest.raises(BudgetExceeded, match=r"key 'key' may use \$0.25"):
            spend(book, layers_of(key))
        with pytest.raises(BudgetExceeded, match="tenant 'acme' may use 2 calls"):
            spend(book, (), tenant="acme")
        spend(book, (), Amount())
        book.check_integrity()
        spent.close()
    assert spent_of(store, key, wall.s)[0]["cost_usd"] == pytest.approx(0.2)


def test_a_window_goes_on_over_a_restart_and_over_the_time_in_between() -> None:
    store: Store = MemoryStore()
    layers = [LimitScope(NO_LIMITS, "key/a/0", whole=Limit(calls=2, per_s=100.0), name="ci")]
    book, spent, monotonic, wall = started(store)
    spend(book, layers)
    for clock in (monotonic, wall):
        clock.s += 40
    spend(book, layers)
    spent.close()
    book, spent, monotonic, wall = started(store, wall_s=wall.s + 50)
    with pytest.raises(BudgetExceeded) as fault:
        spend(book, layers)
    assert fault.value.retry_after_s == pytest.approx(100 * (1 + 1 / 60) - 90)
    monotonic.s += 12
    spend(book, layers)
    with pytest.raises(BudgetExceeded):
        spend(book, layers)
    book.check_integrity()


def test_a_clock_that_went_back_gives_nothing_back_and_holds_nothing_back() -> None:
    store: Store = MemoryStore()
    layers = [LimitScope(NO_LIMITS, "key/a/0", whole=Limit(calls=1, per_s=10.0), name="ci")]
    book, spent, *_ = started(store)
    spend(book, layers)
    spent.close()
    book, spent, monotonic, _ = started(store, wall_s=-2600.0)
    with pytest.raises(BudgetExceeded):
        spend(book, layers)
    monotonic.s += 11
    spend(book, layers)


def test_a_key_shows_what_it_spent_in_its_window() -> None:
    store: Store = MemoryStore()
    key, _ = make(store, limits=(Limit(calls=5, per_s=10.0),))
    assert spent_of(store, key, 0.0) == [{"calls": 0, "tokens": 0, "cost_usd": 0.0, "wall_s": 0.0}]
    book, spent, _, wall = started(store)
    spend(book, layers_of(key))
    spent.close()
    assert spent_of(store, key, wall.s)[0]["calls"] == 1
    assert spent_of(store, key, wall.s + 11)[0]["calls"] == 0
    other = replace(key, limits=(Limit(calls=5, per_s=20.0),))
    assert spent_of(store, other, wall.s)[0]["calls"] == 0  # another window begins empty


def test_what_a_key_spent_in_several_pools_is_shown_together() -> None:
    store: Store = MemoryStore()
    key, _ = make(store, limits=(Limit(calls=9),))
    for pool, calls in (("", 1), ("a", 2), ("b", 3)):
        if pool:
            Directory(store).announce(CorePlace(pool, (), 1))
        book, spent, _, wall = started(ScopedStore(store, pool))
        for _ in range(calls):
            spend(book, layers_of(key))
        spent.close()
    assert spent_of(store, key, wall.s)[0]["calls"] == 6
