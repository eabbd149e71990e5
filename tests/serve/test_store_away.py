"""A server whose store is away: it pauses, or goes on, and its loop stands still for neither."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orla_lg import ChatOrla, Orla
from orla_lg.core.limits.usage import Amount, Scope, UsageAccount
from orla_lg.serve.store.labels import LabelKeeper
from orla_lg.serve.store.lease import CoreLease
from orla_lg.serve.store.opening import store_at
from orla_lg.serve.store.spent import SpentKeeper
from orla_lg.serve.store.store import Lease, MemoryStore, StoreUnavailable
from tests.redis_server import RedisServer
from tests.serve import in_thread
from tests.stub_engine import StubEngine


class Away(MemoryStore):
    """A store that does not answer while it is away."""

    away = False

    def put(self, key: str, value: bytes | None, **more: Any) -> int:
        if self.away:
            raise StoreUnavailable("store: it is away")
        return super().put(key, value, **more)

    def lease(self, name: str, holder: str, ttl_s: float) -> Lease | None:
        if self.away:
            raise StoreUnavailable("store: it is away")
        return super().lease(name, holder, ttl_s)


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_lease_without_its_store_ends_or_goes_on(goes_on: bool, caplog: pytest.LogCaptureFixture) -> None:
    store, now = Away(), [100.0]
    lease = CoreLease(store, 1.5, clock=lambda: now[0], goes_on=goes_on)
    assert lease.take()
    store.away = True
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            now[0] += 0.5
            lease.renew()
            assert lease.holds() is (goes_on or now[0] < 100.75)
    assert lease.store_away and caplog.text.count("cannot be renewed") == 1
    now[0] += 5.0
    assert not lease.holds(), "a process that stood still asks before it grants"
    store.away = False
    assert lease.renew() and lease.holds() and not lease.store_away


def test_a_core_that_went_on_ends_where_another_one_took_its_lease() -> None:
    store = Away()
    lease = CoreLease(store, 0.01, goes_on=True)
    assert lease.take()
    store.away = True
    lease.renew()
    store.away = False
    time.sleep(0.02)
    assert CoreLease(store, 10.0).take()
    assert not lease.renew() and lease.deposed and not lease.holds()


def test_a_core_that_stood_still_while_its_store_was_away_does_not_go_on() -> None:
    """Another one may have taken over, wherever the store does answer."""
    store, now = Away(), [100.0]
    lease = CoreLease(store, 1.5, clock=lambda: now[0], goes_on=True)
    assert lease.take()
    store.away = True
    now[0] += 0.5
    assert not lease.renew() and lease.holds()
    now[0] += 0.8
    assert not lease.renew() and not lease.holds()
    now[0] += 0.1
    assert not lease.renew() and not lease.holds(), "it does not begin to go on later either"
    store.away = False
    assert lease.renew() and lease.holds()


def test_a_replica_that_knows_a_later_core_ends_going_on_and_nothing_else() -> None:
    store, now = Away(), [100.0]
    lease = CoreLease(store, 1.5, clock=lambda: now[0], goes_on=True)
    assert lease.take()
    lease.met(lease.epoch + 7)
    assert lease.holds(), "the store has just said that it is this core's"
    store.away = True
    now[0] += 0.5
    lease.renew()
    lease.met(lease.epoch)
    assert lease.holds()
    lease.met(lease.epoch + 7)
    assert not lease.holds()
    now[0] += 0.1
    lease.renew()
    assert not lease.holds() and not lease.deposed
    store.away = False
    assert lease.renew() and lease.holds() and lease.outages == 1


# What is written behind


class Flow:
    """The labels of a core, as far as their keeper knows it."""

    store: Any = None

    def restore(self, *kept: Any) -> None:
        self.kept = kept


def test_labels_that_the_store_did_not_take_are_kept_once_it_answers(caplog: pytest.LogCaptureFixture) -> None:
    store, decides = Away(), [True]
    keeper, flow = LabelKeeper(store, lambda: decides[0]), Flow()
    keeper.join(flow)  # type: ignore[arg-type]
    keeper.keep("before", b"1")
    store.away = True
    for number in range(3):
        keeper.keep("w", b"%d" % number)
    keeper.keep("before", None)
    keeper.keep_forgotten(b"some")
    decides[0] = False  # half the lease is over
    keeper.keep("paused", b"1")
    keeper.look()
    assert set(store.scan("")) == {"labels/workflow/before"} and caplog.text.count("cannot be kept") == 1
    store.away, decides[0] = False, True
    keeper.look()
    found = {key: each.value for key, each in store.scan("labels/").items()}
    assert found.pop("labels/forgotten") and found == {"labels/workflow/w": b"2", "labels/workflow/paused": b"1"}
    keeper.look()
    keeper.keep("w", b"3")
    found_again = store.get("labels/workflow/w")
    assert found_again is not None and found_again.value == b"3"


def test_what_is_spent_and_what_is_over_while_the_store_is_away_is_written_later() -> None:
    store, runs = Away(), [SimpleNamespace(id="run-1")]
    account = UsageAccount()
    key = ("key/a/0", Scope.RUN, "run-1")
    spent = [("run-1", key, account), ("", ("key/a/0", Scope.KEY, "a"), account)]
    serving: Any = SimpleNamespace(
        clock=time.monotonic, estimates=SimpleNamespace(dumped=lambda: b"{}"),
        book=SimpleNamespace(runs=lambda: list(runs)),
        limits=SimpleNamespace(spent=lambda open_runs: spent if open_runs else spent[1:], brought={}),
    )  # fmt: skip
    keeper = SpentKeeper(serving, store, lambda: True)
    account.spent = Amount(calls=1)
    keeper.close()
    assert len(store.scan("spent/")) == 2
    store.away = True
    account.spent = Amount(calls=2)
    runs.clear()
    for _ in range(2):
        keeper.close()
    store.away = False
    keeper.close()
    (left,) = store.scan("spent/").values()
    assert b'"spent": [2,' in left.value, "the run is over, and nothing of it stays"


# A whole server on a real Redis

CONFIGURED = """
[backends.main]
url = "{engine}"
model = "stub-model"
engine = "openai"
max_concurrency = 4

[serve]
core_lease_s = 0.8
on_store_lost = "{said}"
"""


def comes_true(condition: Callable[[], Any], within_s: float = 10.0) -> None:
    until_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.01)


async def longest_stall(seconds: float) -> float:
    """Return for how long a loop that this runs on did not go on."""
    longest, until_s = 0.0, time.monotonic() + seconds
    while time.monotonic() < until_s:
        began_s = time.monotonic()
        await asyncio.sleep(0.001)
        longest = max(longest, time.monotonic() - began_s - 0.001)
    return longest


@pytest.mark.parametrize("said", ["pause", "go_on"])
def test_calls_while_redis_is_frozen(said: str, tmp_path: Path) -> None:
    with StubEngine() as engine, RedisServer(tmp_path / "redis") as redis:
        file = tmp_path / "orla.toml"
        file.write_text(CONFIGURED.format(engine=engine.url, said=said))
        store = store_at(redis.url, "store")
        with in_thread.server(file, store=store) as running, Orla.remote(running.url, core_patience_s=20.0) as orla:
            comes_true(lambda: running.server.host.recovery.over)
            chat = ChatOrla(orla=orla)
            assert chat.invoke("before").content
            redis.freeze()
            stalled_s = running.call(longest_stall, 1.5)
            print(f"\n{said}: the loop stood still for {1000 * stalled_s:.0f} ms at most")
            assert stalled_s < 0.3
            began_s = time.monotonic()
            assert running.call(longest_stall, 0.5) < 0.1, "it waits once, and not again"
            assert time.monotonic() - began_s < 1.0
            assert running.server.lease.store_away and running.server.lease.holds() is (said == "go_on")
            if said == "go_on":
                assert chat.invoke("without the store").content
            redis.thaw()
            assert chat.invoke("after").content
            comes_true(lambda: not running.server.lease.store_away)
            assert not running.server.lease.deposed
        store.close()
