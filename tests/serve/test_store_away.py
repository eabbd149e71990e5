"""A server whose store is away: it pauses, or goes on, and its loop stands still for neither."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orla_lg import ChatOrla, Orla
from orla_lg.serve.store.lease import CoreLease
from orla_lg.serve.store.opening import store_at
from orla_lg.serve.store.store import Lease, MemoryStore, StoreUnavailable
from tests.redis_server import RedisServer
from tests.serve import in_thread
from tests.stub_engine import StubEngine


class Away(MemoryStore):
    """A store that does not answer while it is away."""

    away = False

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
            assert running.server.lease.store_away and running.server.lease.holds() is (said == "go_on")
            if said == "go_on":
                assert chat.invoke("without the store").content
            redis.thaw()
            assert chat.invoke("after").content
            comes_true(lambda: not running.server.lease.store_away)
            assert not running.server.lease.deposed
        store.close()
