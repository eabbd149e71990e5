"""What every store promises; another one joins by a line in ``STORES``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orla_lg.link.redis_keys import RedisAddress
from orla_lg.serve.store.lease import NAME, CoreLease, FencedStore
from orla_lg.serve.store.redis import RedisStore
from orla_lg.serve.store.scoped import ScopedStore
from orla_lg.serve.store.sqlite import SqliteStore
from orla_lg.serve.store.store import (
    ABSENT,
    WATCH_S,
    Conflict,
    Fence,
    HeldLease,
    Instant,
    Lease,
    MemoryStore,
    Replaced,
    Store,
    StoreUnavailable,
    instant,
)  # fmt: skip
from tests.redis_server import RedisServer

Make = Callable[..., Store]


class Clock:
    """The clocks of leases, moved by hand."""

    def __init__(self) -> None:
        self.wall_s, self.boot, self.since_boot_s = 1_000_000.0, "boot-1", 500.0

    def __call__(self) -> Instant:
        return Instant(self.wall_s, self.boot, self.since_boot_s)

    def pass_s(self, seconds: float) -> None:
        self.wall_s += seconds
        self.since_boot_s += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


class ByHand(RedisStore):
    """A store on a real server, whose clock is moved by moving its leases."""

    def __init__(self, address: RedisAddress, clock: Clock) -> None:
        super().__init__(address, poll_s=0.05, epochs_behind=0)
        self._hand, self._at_s = clock, clock.since_boot_s

    def lease(self, name: str, holder: str, ttl_s: float) -> Lease | None:
        passed_ms = round(1000 * (self._hand.since_boot_s - self._at_s))
        self._at_s = self._hand.since_boot_s
        for key in self._client.scan_iter(match=self.address.key("lease:*")) if passed_ms else ():
            self._client.hincrby(key, "until", -passed_ms)
        return super().lease(name, holder, ttl_s)


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["memory", "sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Store]:
    if request.param == "memory":
        yield MemoryStore(now=clock)
        return
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        shared = ByHand(RedisAddress.parse(f"{server.url}?prefix={tmp_path.name}", "store"), clock)
        yield shared
        shared.close()
        return
    made = SqliteStore(tmp_path / "state" / "serve.db", now=clock, poll_s=0.02)
    yield made
    made.close()


# Values


def test_a_value_is_there_until_it_is_deleted(store: Store) -> None:
    assert store.get("keys/a") is None
    version = store.put("keys/a", b"one")
    assert store.get("keys/a") == (b"one", version)
    store.put("keys/a", None)
    assert store.get("keys/a") is None
    store.put("keys/a", None)  # nothing to delete


def test_a_writer_that_expects_another_version_changes_nothing(store: Store) -> None:
    first = store.put("a", b"one", expected=ABSENT)
    second = store.put("a", b"two", expected=first)
    for wrong in (ABSENT, first, second + 1):
        with pytest.raises(Conflict, match="'a' has version"):
            store.put("a", b"three", expected=wrong)
        with pytest.raises(Conflict):
            store.put("a", None, expected=wrong)
    assert store.get("a") == (b"two", second)
    with pytest.raises(Conflict, match="'b' does not exist"):
        store.put("b", b"", expected=second)
    store.put("a", None, expected=second)


def test_a_value_written_again_after_its_deletion_has_another_version(store: Store) -> None:
    first = store.put("a", b"same")
    store.put("a", None)
    assert store.put("a", b"same") > first
    with pytest.raises(Conflict):
        store.put("a", b"", expected=first)


def test_a_scan_finds_what_begins_with_its_prefix_sorted(store: Store) -> None:
    for key in ("b/2", "a", "b/1", "b", "b0", "c", "b/\U0010ffff"):
        store.put(key, key.encode())
    assert list(store.scan("b/")) == ["b/1", "b/2", "b/\U0010ffff"]
    assert list(store.scan("")) == ["a", "b", "b/1", "b/2", "b/\U0010ffff", "b0", "c"]
    assert store.scan("b/1") == {"b/1": store.get("b/1")}
    assert store.scan("nothing") == {}


KEYS = st.text(st.characters(), max_size=3)
"""Any characters: NUL and halves of surrogate pairs too."""


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.lists(st.tuples(KEYS, st.none() | st.binary(max_size=3)), max_size=8), KEYS)
def test_any_text_is_a_key(store: Store, writes: list[tuple[str, bytes | None]], prefix: str) -> None:
    for key in store.scan(""):
        store.put(key, None)
    model: dict[str, bytes] = {}
    for key, value in writes:
        store.put(key, value)
        if value is None:
            model.pop(key, None)
        else:
            model[key] = value
    expected = [(key, value) for key, value in sorted(model.items()) if key.startswith(prefix)]
    assert [(key, found.value) for key, found in store.scan(prefix).items()] == expected


def test_threads_that_count_together_lose_no_count(store: Store) -> None:
    store.put("count", b"0")

    def count() -> None:
        for _ in range(25):
            while True:
                found = store.get("count")
                assert found is not None
                try:
                    store.put("count", str(int(found.value) + 1).encode(), expected=found.version)
                    break
                except Conflict:
                    continue

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = store.get("count")
    assert found is not None and found.value == b"100"


# Leases


def test_one_holder_at_a_time_and_a_new_epoch_for_the_next(store: Store, clock: Clock) -> None:
    first = store.lease("core", "a", 1.5)
    began_s = time.time() if isinstance(store, RedisStore) else clock.wall_s  # a server has a clock of its own
    assert first is not None and first.until_s == pytest.approx(began_s + 1.5, abs=1.0)
    assert store.lease("core", "b", 1.5) is None
    assert store.lease("other", "b", 1.5) is not None
    clock.pass_s(1.0)
    renewed = store.lease("core", "a", 1.5)
    assert renewed is not None and renewed.epoch == first.epoch
    clock.pass_s(1.4)
    assert store.lease("core", "b", 1.5) is None
    clock.pass_s(0.2)
    second = store.lease("core", "b", 1.5)
    assert second is not None and second.epoch == first.epoch + 1
    assert store.lease("core", "a", 1.5) is None


def test_a_lease_that_no_other_took_goes_on_with_its_epoch(store: Store, clock: Clock) -> None:
    first = store.lease("core", "a", 1.5)
    clock.pass_s(100)
    again = store.lease("core", "a", 1.5)
    assert first is not None and again is not None and again.epoch == first.epoch


def test_a_lease_that_is_given_back_is_free_at_once(store: Store) -> None:
    first = store.lease("core", "a", 10)
    assert store.lease("core", "a", 0) is not None
    second = store.lease("core", "b", 10)
    assert first is not None and second is not None and second.epoch == first.epoch + 1


@pytest.mark.parametrize("step_s", [-3600.0, 3600.0])
def test_a_change_of_the_wall_clock_neither_ends_a_lease_nor_makes_it_last(
    store: Store, clock: Clock, step_s: float
) -> None:
    assert store.lease("core", "a", 1.5) is not None
    clock.wall_s += step_s
    assert store.lease("core", "b", 1.5) is None
    clock.pass_s(1.6)
    assert store.lease("core", "b", 1.5) is not None


def test_after_the_machine_was_started_again_the_wall_clock_decides(store: Store, clock: Clock) -> None:
    if isinstance(store, RedisStore):
        pytest.skip("by the server's own clock, whichever machine asks")
    assert store.lease("core", "a", 60) is not None
    clock.boot, clock.since_boot_s = "boot-2", 5.0
    clock.wall_s += 30
    assert store.lease("core", "b", 60) is None
    clock.wall_s += 31
    assert store.lease("core", "b", 60) is not None


def test_the_clock_since_boot_goes_forward() -> None:
    before = instant()
    assert HeldLease("a", 1, before).is_over(instant())
    assert abs(before.wall_s - time.time()) < 5


# Watching


class Watched:
    def __init__(self) -> None:
        self.count, self._happened = 0, threading.Event()

    def __call__(self) -> None:
        self.count += 1
        self._happened.set()

    def happened(self, within_s: float = WATCH_S) -> bool:
        found = self._happened.wait(within_s)
        self._happened.clear()
        return found


def test_changes_under_a_prefix_are_announced_and_others_are_not(store: Store) -> None:
    keys, spent = Watched(), Watched()
    store.put("keys/a", b"before")
    store.watch("keys/", keys)
    store.watch("spent/", spent)
    store.put("keys/a", b"after")
    assert keys.happened()
    store.put("keys/a", None)
    assert keys.happened()
    store.lease("keys/", "a", 10)
    store.put("other", b"")
    store.put("spent/x", b"")
    assert spent.happened()
    assert not keys.happened(0.1) and keys.count == 2


def test_a_watcher_that_ended_or_fails_does_not_keep_others_from_hearing(store: Store) -> None:
    ended, well = Watched(), Watched()

    def fail() -> None:
        raise RuntimeError("this watcher fails")

    end = store.watch("a", ended)
    store.watch("a", fail)
    store.watch("a", well)
    end()
    end()
    store.put("a", b"")
    assert well.happened()
    assert not ended.count


def test_a_watcher_may_read_and_write(store: Store) -> None:
    done = Watched()

    def changed() -> None:
        if store.get("copy") is None:
            store.put("copy", next(iter(store.scan("a").values())).value)
            done()

    store.watch("a", changed)
    store.put("a", b"1")
    assert done.happened()
    assert store.scan("copy")["copy"].value == b"1"


def test_a_store_is_what_the_protocol_names(store: Store) -> None:
    methods: list[Any] = [store.get, store.put, store.scan, store.lease, store.watch]
    assert len(methods) == 5


# Writes by a lease


def test_what_another_holder_has_taken_is_not_written_over(store: Store, clock: Clock) -> None:
    """However late a write comes: its writer may have stood still right before it."""
    with pytest.raises(Replaced):
        store.put("a", b"before any lease", fence=Fence("core", 1))
    store.put("a", b"without a fence")
    store.lease("core", "one", 1.0)
    first = store.put("a", b"one", fence=Fence("core", 1))
    clock.pass_s(2.0)
    store.put("a", b"still one: none took it", fence=Fence("core", 1))
    store.lease("core", "two", 1.0)
    for value in (b"one again", None):
        with pytest.raises(Replaced, match=r"epoch 2 by now.*took it with 1"):
            store.put("a", value, fence=Fence("core", 1))
    with pytest.raises(Replaced):
        store.put("a", b"x", expected=first, fence=Fence("core", 1))
    assert store.put("a", b"two", fence=Fence("core", 2)) and issubclass(Replaced, StoreUnavailable)
    found = store.get("a")
    assert found is not None and found.value == b"two"


def test_a_core_writes_by_its_own_lease_in_its_own_pool(store: Store, clock: Clock) -> None:
    pools = [ScopedStore(store, name) for name in ("", "a")]
    leases = [CoreLease(pool, holder="one", clock=lambda: clock.since_boot_s) for pool in pools]
    fenced = [FencedStore(pool, lease) for pool, lease in zip(pools, leases, strict=True)]
    for lease in leases:
        assert lease.take()
    for each in fenced:
        each.put("spent/x", b"mine")
    clock.pass_s(2.0)
    assert CoreLease(pools[1], holder="two").take()
    fenced[0].put("spent/x", b"still mine")
    with pytest.raises(Replaced, match="pool/a/core"):
        fenced[1].put("spent/x", b"late")
    with pytest.raises(Replaced):
        fenced[1].put("spent/x", None)
    assert fenced[1].scan("spent/") == {"spent/x": store.get("pool/a/spent/x")} and NAME == "core"


def test_a_lease_is_given_back_for_a_holder_that_has_ended_and_for_no_other(store: Store) -> None:
    one, two, three = (CoreLease(store, 60.0, holder=name) for name in ("one", "two", "three"))
    assert one.take() and not two.take()
    two.release("three")
    assert not two.take()
    two.release("one")
    assert two.take() and two.epoch == 2
    three.release("one")
    assert not three.take() and two.renew() is False and not two.deposed
