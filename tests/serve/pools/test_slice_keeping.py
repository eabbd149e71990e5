"""What must not end the looking after slices, nor hold a core's grants back for good; and the end in good order."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from orla_lg.core.limits.limits import Limit
from orla_lg.core.limits.usage import Amount, Bound, Scope, SliceSpent, UsageAccount
from orla_lg.serve.pools.gone import LEASE
from orla_lg.serve.pools.keeping import SliceKeeper
from orla_lg.serve.pools.shares import SLICES, Share, packed
from orla_lg.serve.pools.slices import FORGET_S, SliceBook
from orla_lg.serve.store.scoped import ScopedStore
from orla_lg.serve.store.spent import SpentKeeper
from orla_lg.serve.store.store import ABSENT, Fence, MemoryStore, StoreUnavailable
from tests.serve.pools.sharing import FaultyStore, VirtualTime

ONE = Amount(calls=1)
RUN = json.dumps(["r", "shared", "run", "r"])


def book_on(store: MemoryStore, time: VirtualTime, *, epoch: int = 1, **more: Any) -> SliceBook:
    return SliceBook(store, "a", lock=threading.Lock(), epoch=lambda: epoch, clock=time, wall=time, **more)


def slice_in(book: SliceBook, bound: Bound, run: str = "") -> Any:
    account = UsageAccount(per_s=bound.limit.per_s)
    held = book.slice_of(run, ("shared", bound.scope, bound.name), bound, account)
    assert held is not None
    return held


def test_a_run_that_ended_while_its_core_stood_still_holds_no_grant_back() -> None:
    time, runs = VirtualTime(), {"r"}
    store = FaultyStore(time)
    book = book_on(store, time, is_open=runs.__contains__)
    bound = Bound(Scope.RUN, "r", Limit(calls=8, per_s=60.0))
    held = slice_in(book, bound, "r")
    with pytest.raises(SliceSpent):
        held.check(bound, ONE, time())
    book.work()
    held.check(bound, ONE, time())
    held.account.promise(ONE)
    assert book.may_grant()
    time.s += 30.0  # it stands still, and another pool finds it gone
    assert ScopedStore(store, "a").lease(LEASE, "b, which found no core", 0.001) is not None
    time.s += 1.0
    held.account.settle(ONE, ONE, time())
    runs.clear()
    for _ in range(3):
        book.work()
        time.s += 1.0
    assert book.may_grant()


def test_an_old_entry_that_another_core_deletes_at_once_is_no_fault() -> None:
    time = VirtualTime()
    time.s = 2 * FORGET_S
    store = FaultyStore(time)
    store.put(SLICES + RUN, packed({"b": Share(1, (1, 0, 0, 0), at_s=1.0)}))
    entries = store.scan(SLICES)
    store.put(SLICES + RUN, None)

    class Late(FaultyStore):
        def scan(self, prefix: str) -> Any:
            return entries if prefix == SLICES else super().scan(prefix)

    book = book_on(Late(time), time, epoch=2)
    book.work()
    assert book.valid_until_s > time()


@pytest.mark.parametrize("name", ["what", "5", "[]", "{}"])
def test_an_entry_of_no_account_is_left_alone(name: str) -> None:
    time = VirtualTime()
    store = FaultyStore(time)
    store.put(SLICES + name, packed({"a": Share(1, (1, 0, 0, 0), at_s=1.0)}))
    book_on(store, time, epoch=2).work()
    assert store.get(SLICES + name) is not None


def test_what_the_core_before_had_is_found_although_the_store_was_away_at_first() -> None:
    time = VirtualTime()
    store = FaultyStore(time)
    name = json.dumps(["", "shared", "tenant", "acme"])
    store.put(SLICES + name, packed({"a": Share(1, (5, 0, 0, 0), back_s=60.0)}))
    book = book_on(store, time, epoch=2)
    store.faults = ["", "", "away"]  # its lease, the directory, all shares
    for _ in range(70):
        book.work()
        time.s += 1.0
    assert store.get(SLICES + name) is None, "no share of the core before is left"


@pytest.mark.parametrize("value", [b"x", b'{"a": [1e999, [0,0,0,0], [0,0,0,0], 0, 0, 0, 0, 0]}', b"[" * 100_000])
def test_an_entry_that_cannot_be_read_is_looked_at_now_and_then(value: bytes) -> None:
    time = VirtualTime()
    store = FaultyStore(time)
    book, bound = book_on(store, time), Bound(Scope.TENANT, "acme", Limit(calls=8))
    held = slice_in(book, bound)
    store.put(SLICES + held.name, value)
    book.work()
    before = store.counts["get"]
    for _ in range(40):
        with pytest.raises(SliceSpent):
            held.check(bound, ONE, time())
        book.work()
        time.s += 0.25
    assert store.counts["get"] - before <= 3
    store.put(SLICES + held.name, None)
    time.s += 5.0
    with pytest.raises(SliceSpent):
        held.check(bound, ONE, time())
    book.work()
    held.check(bound, ONE, time())


class Looking:
    """Stands for a book: what a look does is said by a test."""

    def __init__(self) -> None:
        self.looks, self.is_busy, self.done = deque[Any](), True, list[str]()

    def may_grant(self) -> bool:
        return True

    def work(self) -> None:
        look = self.looks.popleft() if self.looks else None
        if isinstance(look, Exception):
            raise look
        if look is not None:
            look.wait(5.0)
        self.done.append("looked")

    def close(self) -> None:
        self.done.append("closed")


def keeper_of(book: Looking) -> SliceKeeper:
    serving: Any = SimpleNamespace(limits=SimpleNamespace(lock=threading.Lock()), clock=None, book=None)
    lease: Any = SimpleNamespace(epoch=1)
    keeper = SliceKeeper(
        serving, MemoryStore(), "a", lease, is_recovered=lambda: True, go_on=lambda: None, ends_s=5.0
    )
    keeper.book = book  # type: ignore[assignment]
    return keeper


def test_slices_are_looked_after_again_whatever_a_look_met(caplog: pytest.LogCaptureFixture) -> None:
    book = Looking()
    book.looks += [RuntimeError("odd"), StoreUnavailable("away")]

    async def looked() -> None:
        keeper = keeper_of(book)
        keeper.start()
        while not book.done:
            await asyncio.sleep(0.01)
        await keeper.close()

    asyncio.run(asyncio.wait_for(looked(), 10.0))
    assert "odd" in caplog.text


def test_slices_are_given_back_once_a_look_has_ended_that_is_under_way() -> None:
    book, goes_on = Looking(), threading.Event()
    book.looks.append(goes_on)

    async def closed() -> None:
        keeper = keeper_of(book)
        keeper.start()
        first = asyncio.get_running_loop().create_task(keeper.close())
        await asyncio.sleep(0.05)
        first.cancel()  # a second signal ends the server at once
        assert not book.done
        goes_on.set()
        await keeper.close()
        await keeper.close()

    asyncio.run(closed())
    assert book.done == ["looked", "closed"]


class Slow(MemoryStore):
    """Writes what another thread than the first asks for when a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on, self.came, self._first = threading.Event(), threading.Event(), threading.get_ident()

    def put(self, key: str, value: bytes | None, *, expected: int | None = None, fence: Fence | None = None) -> int:
        if threading.get_ident() != self._first:
            self.came.set()
            self.goes_on.wait(5.0)
        return super().put(key, value, expected=expected, fence=fence)


def test_what_was_spent_last_is_what_stays() -> None:
    account, key = UsageAccount(), ("shared", Scope.TENANT, "acme")
    serving: Any = SimpleNamespace(
        clock=lambda: 100.0, estimates=SimpleNamespace(dumped=lambda: b"{}"), book=SimpleNamespace(runs=list),
        limits=SimpleNamespace(spent=lambda runs: [("", key, account)], brought={}),
    )  # fmt: skip
    store = Slow()

    async def spent() -> None:
        keeper = SpentKeeper(serving, store, lambda: True)
        account.spent = ONE
        keeper.look(100.0)
        await asyncio.to_thread(store.came.wait, 5.0)
        account.spent = Amount(calls=2)
        asyncio.get_running_loop().call_later(0.05, store.goes_on.set)
        await keeper.written()
        keeper.close()

    asyncio.run(spent())
    (found,) = store.scan("spent/").values()
    assert json.loads(found.value)["spent"][0] == 2 and found.version > ABSENT
