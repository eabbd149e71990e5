"""The store on a real Redis: its death, its silence, passwords, TLS, and what is lost on the way."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from orla_lg.errors import ConfigError
from orla_lg.link.redis_keys import RedisAddress
from orla_lg.serve.access.keys import Keyring
from orla_lg.serve.store import redis as redis_store
from orla_lg.serve.store.opening import store_at
from orla_lg.serve.store.redis import RedisStore
from orla_lg.serve.store.redis_line import ANSWER_S
from orla_lg.serve.store.store import (
    ABSENT,
    WATCH_S,
    Conflict,
    Fence,
    MemoryStore,
    Replaced,
    Store,
    StoreUnavailable,
)
from tests.redis_server import RedisServer, free_port
from tests.serve.fixtures import make
from tests.serve.store.test_store import ByHand, Clock

T = TypeVar("T")

FORK = multiprocessing.get_context("fork")

PAGE = Path(__file__).parents[3] / "docs" / "store.md"

LONGEST_STALL_S = 0.3
"""That a frozen server may hold up the core's loop."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as running:
        yield running


def store_on(server: RedisServer, **given: float) -> RedisStore:
    return RedisStore(RedisAddress.parse(server.url, "store"), **given)


def when_it_answers(ask: Callable[[], T], within_s: float = 10.0) -> T:
    """Return what a store answers once it is asked by a connection again."""
    until_s = time.monotonic() + within_s
    while True:
        try:
            return ask()
        except StoreUnavailable:
            assert time.monotonic() < until_s
            time.sleep(0.01)


def test_what_was_written_and_each_epoch_outlive_a_killed_server(server: RedisServer) -> None:
    store = store_on(server)
    version = store.put("keys/a", b"one")
    first = store.lease("core", "a", 0.01)
    time.sleep(1.1)  # its log is written each second
    server.kill()
    with pytest.raises(StoreUnavailable, match=r"store: redis://127\.0\.0\.1"):
        store.get("keys/a")
    server.start()
    assert when_it_answers(lambda: store.get("keys/a")) == (b"one", version)
    assert store.scan("keys/") == {"keys/a": (b"one", version)}
    second = store.lease("core", "b", 10)
    assert first is not None and second is not None and second.epoch == first.epoch + 1
    assert store.put("keys/b", b"") == version + 1
    store.close()


def test_a_frozen_server_holds_up_no_loop(server: RedisServer) -> None:
    store = store_on(server)
    store.put("a", b"before")
    server.freeze()
    stalls = []
    until_s = time.monotonic() + 1.5
    while time.monotonic() < until_s:
        began_s = time.monotonic()
        with pytest.raises(StoreUnavailable):
            store.lease("core", "a", 1.5)
        stalls.append(time.monotonic() - began_s)
        time.sleep(0.001)
    server.thaw()
    print(
        f"\nlongest stall {1000 * max(stalls):.0f} ms, {len(stalls):,} asked, {sum(s > 0.1 for s in stalls)} waited"
    )
    assert max(stalls) < LONGEST_STALL_S
    assert sum(stalls) < 2 * ANSWER_S, "an outage costs one time-out altogether"
    found = when_it_answers(lambda: store.get("a"))
    assert found is not None and found.value == b"before"
    store.close()


def test_a_write_whose_answer_is_lost_is_not_made_twice(server: RedisServer) -> None:
    store, other = store_on(server), store_on(server)
    first = store.put("count", b"1")
    server.freeze()
    with pytest.raises(StoreUnavailable):
        store.put("count", b"2", expected=first)  # it lies in the socket, and is done when the server goes on
    server.thaw()
    until_s = time.monotonic() + 5
    while (found := other.get("count")) is not None and found.value == b"1" and time.monotonic() < until_s:
        time.sleep(0.01)
    assert found == (b"2", first + 1)
    with pytest.raises(Conflict):
        when_it_answers(lambda: store.put("count", b"2", expected=first))
    assert store.get("count") == (b"2", first + 1)
    store.close()
    other.close()


def test_a_change_while_its_watcher_was_cut_off_is_announced(server: RedisServer) -> None:
    store, other = store_on(server, poll_s=0.1), store_on(server)
    heard = threading.Event()
    store.watch("keys/", heard.set)
    other.put("keys/a", b"one")
    assert heard.wait(WATCH_S)
    heard.clear()
    other._client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    other.put("keys/a", b"two")
    assert heard.wait(WATCH_S)
    time.sleep(1.1)
    server.kill()
    server.start()
    heard.clear()
    when_it_answers(lambda: other.put("keys/a", b"three"))
    assert heard.wait(2 * WATCH_S)
    store.close()
    other.close()


def count_to(url: str, times: int) -> None:
    store = RedisStore(RedisAddress.parse(url, "store"), answer_s=5.0)
    for _ in range(times):
        while True:
            found = store.get("count")
            assert found is not None
            try:
                store.put("count", b"%d" % (int(found.value) + 1), expected=found.version)
                break
            except Conflict:
                continue
    store.close()


def test_processes_that_count_together_lose_no_count(server: RedisServer) -> None:
    both = [FORK.Process(target=count_to, args=(server.url, 100)) for _ in range(2)]
    store = store_on(server)
    store.put("count", b"0", expected=ABSENT)
    store.close()
    for each in both:
        each.start()
    for each in both:
        each.join(60)
        assert each.exitcode == 0
    store = store_on(server)
    found = store.get("count")
    assert found is not None and found.value == b"200"
    store.close()


def test_a_fork_does_not_use_the_connection_of_its_parent(server: RedisServer) -> None:
    def child(store: RedisStore) -> None:
        with pytest.raises(StoreUnavailable, match="forked"):
            store.get("a")
        store.close()

    store = store_on(server)
    process = FORK.Process(target=child, args=(store,))
    process.start()
    process.join(30)
    assert process.exitcode == 0 and store.put("a", b"") == 1
    store.close()


def test_a_server_that_forgets_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RedisServer(tmp_path, "--appendonly", "no") as server, caplog.at_level(logging.WARNING):
        store_on(server).close()
    assert "appendonly no" in caplog.text


def test_a_password_is_needed_and_shown_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RedisServer(tmp_path, "--requirepass", "s3cret-w0rd") as server:
        for url, why in (
            (server.url, "it wants a password, and none was given"),
            (server.url.replace("//", "//:wr0ng-w0rd@"), "invalid username-password"),
        ):
            with pytest.raises(ConfigError, match=f"refuses the connection: {why}.*store_password_env") as refused:
                store_at(url, "store")
            assert "w0rd" not in f"{refused.value}"
        right = store_at(server.url.replace("//", "//:s3cret-w0rd@"), "store")
        assert "w0rd" not in right.place and right.put("a", b"")
        right.close()
        with pytest.raises(ConfigError, match=r"ORLA_TEST_WORD .*is not set"):
            store_at(server.url, "store", password_env="ORLA_TEST_WORD")
        monkeypatch.setenv("ORLA_TEST_WORD", "s3cret-w0rd")
        again = store_at(server.url, "store", password_env="ORLA_TEST_WORD")
        assert again.get("a") is not None
        again.close()


def test_a_password_goes_to_no_other_machine_in_plain_text() -> None:
    with pytest.raises(ConfigError, match="plain text") as refused:
        store_at("redis://:s3cret@redis.example:6379/0", "store")
    assert "s3cret" not in f"{refused.value}"
    with pytest.raises(ConfigError, match="no certificate"):
        store_at("rediss://:s3cret@redis.example:6379/0?ssl_cert_reqs=none", "store")


def test_a_replica_is_no_store(tmp_path: Path, server: RedisServer) -> None:
    with RedisServer(tmp_path / "copy", "--replicaof", "127.0.0.1", f"{server.port}") as copy:
        with pytest.raises(StoreUnavailable, match="it is a replica"):
            store_on(copy)


def test_it_speaks_tls_and_believes_no_other_certificate(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    files = ("--tls-cert-file", f"{certificate}", "--tls-key-file", f"{key}", "--tls-auth-clients", "no")
    with RedisServer(tmp_path / "redis", *files, tls=True) as server:
        with pytest.raises(StoreUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            store_on(server)
        known = RedisAddress.parse(f"{server.url}?ssl_ca_certs={certificate}", "store")
        store = RedisStore(known, answer_s=2.0)
        assert store.put("a", b"") == 1
        store.close()


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Return a certificate for 127.0.0.1, and its key."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    made, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    host = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, made.public_key(), 1, now - timedelta(1), now + timedelta(1))
    signed = builder.add_extension(host, critical=False).sign(made, hashes.SHA256())
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        made.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return certificate, key


# What comes late, and what is lost


class Delaying:
    """A way to a server that can keep back what goes there by the connections that are open."""

    def __init__(self, port: int) -> None:
        self._to, self._lock = port, threading.Lock()
        self._kept: list[tuple[socket.socket, bytes]] | None = None
        self._old: set[socket.socket] = set()
        self._open: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listening.accept()
                there = socket.create_connection(("127.0.0.1", self._to))
                self._open |= {there}
                threading.Thread(target=self._there, args=(here, there), daemon=True).start()
                threading.Thread(target=self._back, args=(there, here), daemon=True).start()

    def _there(self, here: socket.socket, there: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := here.recv(65536):
                with self._lock:
                    if there in self._old and self._kept is not None:
                        self._kept.append((there, data))
                        continue
                there.sendall(data)

    def _back(self, there: socket.socket, here: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := there.recv(65536):
                here.sendall(data)

    def keep_back(self) -> None:
        with self._lock:
            self._kept, self._old = [], set(self._open)

    def let_go(self) -> int:
        """Send on what was kept back; returns how much that was."""
        with self._lock:
            kept, self._kept = self._kept or [], None
        for there, data in kept:
            there.sendall(data)
        return len(kept)

    def close(self) -> None:
        self._listening.close()
        for each in self._open:
            each.close()


@pytest.mark.parametrize("has_deadlines", [True, False])
def test_a_write_that_was_given_up_is_not_made_over_a_newer_one(
    server: RedisServer, has_deadlines: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies on the way, as TCP sends again what was lost: minutes later even. Without deadlines it wins."""
    way = Delaying(server.port)
    store = RedisStore(RedisAddress.parse(f"redis://127.0.0.1:{way.port}/0", "store"))
    store.put("spent", b"1")
    if not has_deadlines:
        monkeypatch.setattr(store._line, "deadline_ms", lambda: 1 << 50)
        monkeypatch.setattr(store._line, "_give_up", lambda deadline_ms: None)
    way.keep_back()
    with pytest.raises(StoreUnavailable, match="no answer"):
        store.put("spent", b"old")
    when_it_answers(lambda: store.put("spent", b"new"))
    assert way.let_go() == 1
    time.sleep(0.05)
    found = store.get("spent")
    assert found is not None and found.value == (b"new" if has_deadlines else b"old")
    store.close()
    way.close()


def test_a_server_whose_clock_is_set_takes_writes_all_the_same(server: RedisServer) -> None:
    store = store_on(server)
    for hours in (-5, 5):
        store._line._ahead_ms += hours * 3_600_000  # as if the server's were set the other way since
        store.put("a", b"")
    store._line._ahead_ms -= 3_600_000
    assert store.lease("core", "a", 1.0) is not None
    store.close()


@pytest.mark.parametrize("how", ["FLUSHALL", "restart"])
def test_a_store_that_has_forgotten_all_opens_no_server_and_gives_no_epoch_twice(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer(tmp_path, "--appendonly", "no") as server:
        store = store_on(server)
        _, secret = make(store)
        keys = Keyring(store)
        lease = store.lease("core", "a", 10.0)
        assert keys.find(secret) is not None and lease is not None and store.lease("core", "b", 10.0) is None
        if how == "restart":
            server.kill()
            server.start()
        else:
            store._client.execute_command("FLUSHALL")
        until_s = time.monotonic() + 10
        while "has forgotten" not in caplog.text:
            assert time.monotonic() < until_s
            time.sleep(0.01)
        for read in (lambda: store.scan(""), lambda: store.get("keys/x")):
            said = ""
            while "has forgotten" not in said:  # it may be away for a moment more
                assert time.monotonic() < until_s, said
                with pytest.raises(StoreUnavailable) as refused:
                    read()
                said = f"{refused.value}"
        assert keys.any and keys.find(secret) is not None, "a server that is open to all would be worse"
        again = when_it_answers(lambda: store.lease("core", "a", 10.0))
        assert again is not None and again.epoch == lease.epoch, "its core goes on"
        assert store.put("a", b"", fence=Fence("core", lease.epoch))
        fresh = store_on(server)  # a process that begins now
        assert fresh.scan("keys/") == {} and fresh.lease("core", "b", 1.0) is None
        store._client.execute_command("FLUSHALL")
        later = fresh.lease("core", "b", 1.0)
        assert later is not None and later.epoch > lease.epoch, "replicas refuse an older one"
        keys.close()
        fresh.close()
        store.close()


def test_a_connection_that_ended_while_nothing_was_asked_fails_nothing(server: RedisServer) -> None:
    store, other = store_on(server), store_on(server)
    for _ in range(3):
        other._client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        time.sleep(0.02)
        assert store.put("a", b"1") and store.get("a") is not None and store.lease("core", "a", 1.0) is not None
    store.close()
    other.close()


def test_a_lease_that_ended_long_ago_takes_no_room_and_the_next_epoch_is_greater(server: RedisServer) -> None:
    store = store_on(server)
    first = store.lease("thread/x", "a", 0.0)
    key = store._lease_key("thread/x")
    assert first is not None and 80_000_000 < store._client.pttl(key) <= 86_400_000
    time.sleep(0.002)
    store._client.delete(key)
    second = store.lease("thread/x", "b", 1.0)
    assert second is not None and second.epoch > first.epoch
    store.close()


def test_scripts_that_the_server_was_told_to_forget_are_sent_again(server: RedisServer) -> None:
    store = store_on(server)
    store._client.execute_command("SCRIPT", "FLUSH")
    assert store.put("a", b"") == 1 and store.lease("core", "a", 1.0) is not None and list(store.scan("")) == ["a"]
    store.close()


def test_a_primary_that_becomes_a_replica_and_one_again(server: RedisServer) -> None:
    store = store_on(server)
    store._client.execute_command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(StoreUnavailable, match="it is a replica"):
        store.put("a", b"")
    with pytest.raises(StoreUnavailable, match="it is a replica"):
        store.lease("core", "a", 1.0)
    store._client.execute_command("REPLICAOF", "NO", "ONE")
    assert when_it_answers(lambda: store.put("a", b"")) == 1
    store.close()


def test_a_node_of_a_cluster_is_a_store_if_it_has_the_slot(tmp_path: Path) -> None:
    with RedisServer(tmp_path, "--cluster-enabled", "yes", "--cluster-port", f"{free_port()}") as server:
        with pytest.raises(StoreUnavailable, match="cluster is down"):
            store_on(server)
        import redis

        client = redis.Redis(port=server.port)
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        until_s = time.monotonic() + 10
        while b"cluster_state:ok" not in client.execute_command("CLUSTER", "INFO"):
            assert time.monotonic() < until_s
            time.sleep(0.02)
        client.close()
        store = store_on(server)
        store.put("a/1", b"x", fence=None)
        assert store.lease("core", "a", 1.0) is not None and list(store.scan("a/")) == ["a/1"]
        store.close()


def test_a_server_without_memory_says_so_and_one_that_throws_away_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer(tmp_path, "--maxmemory", "3mb", "--maxmemory-policy", "allkeys-lru") as server:
        store = store_on(server)
        assert "throws away" in caplog.text
        store._client.execute_command("CONFIG", "SET", "maxmemory-policy", "noeviction")
        with pytest.raises(StoreUnavailable, match="memory is full"):
            for number in range(50):
                store.put(f"a/{number}", b"x" * 200_000)
        store.close()


def test_a_scan_by_pages_is_of_one_moment(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_store, "PAGE", 7)
    store, other, done = store_on(server), store_on(server), threading.Event()
    for number in range(50):
        store.put(f"a/{number:02}", b"0")

    def write() -> None:
        round_ = 0
        while not done.is_set():
            round_ += 1
            for number in range(50):  # from the first to the last: at no moment is a later one ahead
                other.put(f"a/{number:02}", b"%d" % round_)
            time.sleep(0.002 * (round_ % 3))

    writing = threading.Thread(target=write)
    writing.start()
    try:
        for _ in range(30):
            rounds = [int(each.value) for each in store.scan("a/").values()]
            assert len(rounds) == 50 and rounds == sorted(rounds, reverse=True) and rounds[0] - rounds[-1] <= 1
    finally:
        done.set()
        writing.join()
    store.close()
    other.close()


def test_a_user_with_the_rights_that_the_page_names_is_enough(tmp_path: Path) -> None:
    line = next(line for line in PAGE.read_text().splitlines() if line.startswith("user orla on"))
    (tmp_path / "users.acl").write_text(f"user default off\n{line.replace('PASSWORD', 'w0rd')}\n")
    with RedisServer(tmp_path, "--aclfile", f"{tmp_path / 'users.acl'}") as server:
        store = store_at(server.url.replace("//", "//orla:w0rd@"), "store")
        heard = threading.Event()
        store.watch("a", heard.set)
        assert store.put("a", b"1") and store.get("a") and store.scan("") and store.lease("core", "a", 1.0)
        assert heard.wait(WATCH_S)
        store.close()
        with pytest.raises(ConfigError, match="its user may not"):
            store_at(server.url.replace("//", "//orla:w0rd@") + "?prefix=other", "store")


# Against the store in memory

NAMES = st.sampled_from(["a", "a/b", "a/c", "b", ""])
HOLDERS = st.sampled_from(["one", "two"])


class AgainstMemory(RuleBasedStateMachine):
    """Both stores, asked the same."""

    shared: ClassVar[RedisStore]
    hand: ClassVar[Any]
    made = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).made += 1
        self.prefix = f"{self.made}/"
        self.model = MemoryStore(now=self.hand)
        self.ahead: int | None = None
        """Of the versions there, which go on from one example to the next."""

    def both(self, ask: Callable[[Store, str], Any]) -> None:
        found = []
        for store, prefix in ((self.model, ""), (self.shared, self.prefix)):
            try:
                found.append(ask(store, prefix))
            except (Conflict, Replaced) as error:
                found.append(type(error))
        assert found[0] == found[1]

    @rule(key=NAMES, value=st.none() | st.binary(max_size=3), careful=st.booleans(), off=st.sampled_from([0, 0, 1]))
    def put(self, key: str, value: bytes | None, careful: bool, off: int) -> None:
        def ask(store: Store, prefix: str) -> bool:
            found = store.get(prefix + key)
            expected = (ABSENT if found is None else found.version) + off if careful else None
            return store.put(prefix + key, value, expected=expected) > 0 or value is None

        self.both(ask)

    @rule(key=NAMES, name=HOLDERS, epoch=st.integers(0, 4))
    def put_by_a_lease(self, key: str, name: str, epoch: int) -> None:
        self.both(lambda store, prefix: store.put(prefix + key, b"x", fence=Fence(prefix + name, epoch)) > 0)

    @rule(name=HOLDERS, holder=HOLDERS, ttl_s=st.sampled_from([0.0, 1.0, 5.0]))
    def lease(self, name: str, holder: str, ttl_s: float) -> None:
        def ask(store: Store, prefix: str) -> int | None:
            found = store.lease(prefix + name, holder, ttl_s)
            return None if found is None else found.epoch

        self.both(ask)

    @rule(seconds=st.sampled_from([0.4, 0.9, 4.2]))
    def pass_time(self, seconds: float) -> None:
        self.hand.pass_s(seconds)

    @rule(prefix=NAMES)
    def scan(self, prefix: str) -> None:
        self.both(
            lambda store, own: [(key.removeprefix(own), each.value) for key, each in store.scan(own + prefix).items()]
        )

    @rule()
    def order(self) -> None:
        """What was written later has the greater version."""
        self.both(
            lambda store, own: [
                key.removeprefix(own)
                for key, _ in sorted(store.scan(own).items(), key=lambda entry: entry[1].version)
            ]
        )


def test_it_does_what_the_store_in_memory_does(server: RedisServer) -> None:
    AgainstMemory.hand = Clock()
    AgainstMemory.shared = ByHand(RedisAddress.parse(server.url, "store"), AgainstMemory.hand)
    run_state_machine_as_test(
        AgainstMemory, settings=settings(max_examples=40, stateful_step_count=25, deadline=None)
    )
    AgainstMemory.shared.close()
