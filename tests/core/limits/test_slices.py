"""Accounts whose limit other cores share: a call that finds too little in hand waits for more, or is refused."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from orla_lg.core.call import Ask, Call, Hints
from orla_lg.core.identity import Identity
from orla_lg.core.limits import patience
from orla_lg.core.limits.book import LimitBook
from orla_lg.core.limits.limits import NO_LIMITS, Limit, Limits, LimitScope
from orla_lg.core.limits.patience import SLICE_WAIT_S, once_refilled
from orla_lg.core.limits.usage import NOTHING, Amount, Bound, Key, SliceSpent, UsageAccount
from orla_lg.core.lookahead.run_share import RunShare
from orla_lg.core.steps import Pauses, drive
from orla_lg.errors import BudgetExceeded, OrlaClosed

ONE = Amount(calls=1)


def call(tenant: str = "acme") -> Call:
    hints = Hints(tenant=tenant)
    return Call("c", Identity("w", "r", "draft", None), Ask("m", ()), hints, hints, 0.0, RunShare(0.0))


class InHand:
    """A slice of so many calls."""

    def __init__(self, calls: int) -> None:
        self.calls, self.refilled = calls, Future[None]()

    def check(self, bound: Bound, asked: Amount, now: float) -> None:
        if asked.calls > self.calls:
            raise SliceSpent(bound.exceeded("calls", "other pools have it"), self.refilled)

    def refill(self, calls: int) -> None:
        self.calls = calls
        self.refilled.set_result(None)


def test_each_new_account_asks_once_for_its_slice_whatever_it_is_of() -> None:
    book = LimitBook(
        Limits(run=Limit(calls=9), stages={"draft": Limit(calls=9)}, tenants={"*": Limit(calls=9)}), float
    )
    found = list[tuple[str, str, str]]()

    def sliced(run: str, key: Key, bound: Bound, account: UsageAccount) -> InHand:
        found.append((run, str(key[1]), key[2]))
        return InHand(5)

    book.sliced = sliced
    run = SimpleNamespace(id="r", standing=RunShare(0.0), accounts={})
    layers = [LimitScope(NO_LIMITS, "key/k/0", whole=Limit(calls=9), name="ci")]
    for _ in range(3):
        book.settle(book.promise(call(), layers, run, ONE), ONE)  # type: ignore[arg-type]
    assert found == [("r", "run", "r"), ("", "stage", "draft"), ("", "tenant", "acme"), ("", "key", "ci")]


def test_what_is_not_in_hand_sets_nothing_aside_and_does_not_stop_what_runs_already() -> None:
    book = LimitBook(Limits(tenants={"acme": Limit(calls=9)}), float)
    book.sliced = lambda run, key, bound, account: InHand(0)
    with pytest.raises(SliceSpent, match="other pools have it"):
        book.promise(call(), (), None, ONE)
    assert [each.promised for each in book.statistics()] == [NOTHING]
    assert book.promise(call(), (), None, ONE, refuses=False).open
    with book.lock:
        assert book.lock.locked()


@pytest.fixture
def inflight(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(patience, "patience_of", lambda inflight: inflight.patience_s)
    return SimpleNamespace(patience_s=30.0, services=SimpleNamespace(clock=lambda: 5.0, pauses=Pauses()))


def reserved(slice_: InHand) -> Any:
    def reserve(inflight: Any, *more: Any) -> None:
        if slice_.calls < 1:
            raise SliceSpent(BudgetExceeded("spent", scope="key", name="ci", figure="calls"), slice_.refilled)
        slice_.calls -= 1

    return reserve


def test_a_call_waits_for_the_next_slice(inflight: Any) -> None:
    slice_ = InHand(0)
    refilling = threading.Timer(0.02, slice_.refill, [1])
    refilling.start()
    drive(once_refilled(reserved(slice_), inflight))
    refilling.join()
    assert slice_.calls == 0


def test_it_waits_no_longer_than_it_may(inflight: Any) -> None:
    inflight.patience_s = 0.01
    left = iter([0.0, 0.0, 5.0, 5.0 + SLICE_WAIT_S, 9.0, 9.0])
    inflight.services.clock = lambda: next(left)
    with pytest.raises(BudgetExceeded, match="spent"):
        drive(once_refilled(reserved(InHand(0)), inflight))


def test_closing_ends_the_wait(inflight: Any) -> None:
    threading.Timer(0.02, inflight.services.pauses.end, [OrlaClosed("closed")]).start()
    with pytest.raises(OrlaClosed):
        drive(once_refilled(reserved(InHand(0)), inflight))


def test_without_slices_nothing_is_asked(inflight: Any) -> None:
    assert list(once_refilled(lambda *_: None, inflight)) == []
