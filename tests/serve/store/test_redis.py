"""The store on a real Redis: its death, its silence, passwords, TLS, and what is lost on the way."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from orla_lg.errors import ConfigError
from orla_lg.link.redis_keys import RedisAddress
from orla_lg.serve.store.opening import store_at
from orla_lg.serve.store.redis import REST_S, RedisStore
from orla_lg.serve.store.store import ABSENT, WATCH_S, Conflict, StoreUnavailable
from tests.redis_server import RedisServer

LONGEST_STALL_S = 0.3
"""That a frozen server may hold up the core's loop."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as running:
        yield running


def store_on(server: RedisServer, **given: float) -> RedisStore:
    return RedisStore(RedisAddress.parse(server.url, "store"), **given)


def test_what_was_written_and_each_epoch_outlive_a_killed_server(server: RedisServer) -> None:
    store = store_on(server, rest_s=0.0)
    version = store.put("keys/a", b"one")
    first = store.lease("core", "a", 0.01)
    time.sleep(1.1)  # its log is written each second
    server.kill()
    with pytest.raises(StoreUnavailable, match=r"store: cannot read redis://127\.0\.0\.1"):
        store.get("keys/a")
    server.start()
    assert store.get("keys/a") == (b"one", version) and store.scan("keys/") == {"keys/a": (b"one", version)}
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
    assert sum(stalls) < 1.0, "it is left alone for as long as it was waited for"
    time.sleep(REST_S)
    found = store.get("a")
    assert found is not None and found.value == b"before"
    store.close()


def test_a_write_whose_answer_is_lost_is_not_made_twice(server: RedisServer) -> None:
    store, other = store_on(server, rest_s=0.0), store_on(server)
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
        store.put("count", b"2", expected=first)
    assert store.get("count") == (b"2", first + 1)
    store.close()
    other.close()


def test_a_change_while_its_watcher_was_cut_off_is_announced(server: RedisServer) -> None:
    store, other = store_on(server, poll_s=0.1, rest_s=0.0), store_on(server, rest_s=0.0)
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
    other.put("keys/a", b"three")
    assert heard.wait(2 * WATCH_S)
    store.close()
    other.close()


COUNTER = """
import sys
from orla_lg.link.redis_keys import RedisAddress
from orla_lg.serve.store.redis import RedisStore
from orla_lg.serve.store.store import Conflict
store = RedisStore(RedisAddress.parse(sys.argv[1], "store"), answer_s=5.0)
for _ in range(100):
    while True:
        found = store.get("count")
        try:
            store.put("count", b"%d" % (int(found.value) + 1), expected=found.version)
            break
        except Conflict:
            continue
"""


def test_processes_that_count_together_lose_no_count(server: RedisServer) -> None:
    store = store_on(server)
    store.put("count", b"0", expected=ABSENT)
    both = [subprocess.Popen([sys.executable, "-c", COUNTER, server.url]) for _ in range(2)]
    assert [each.wait(60) for each in both] == [0, 0]
    found = store.get("count")
    assert found is not None and found.value == b"200"
    store.close()


def test_a_server_that_forgets_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RedisServer(tmp_path, "--appendonly", "no") as server, caplog.at_level(logging.WARNING):
        store_on(server).close()
    assert "appendonly no" in caplog.text


def test_a_password_is_needed_and_shown_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RedisServer(tmp_path, "--requirepass", "s3cret-w0rd") as server:
        for url in (server.url, server.url.replace("//", "//:wr0ng-w0rd@")):
            with pytest.raises(ConfigError, match="store_password_env") as refused:
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
        store = store_on(copy)
        with pytest.raises(StoreUnavailable, match="it is a replica"):
            store.put("a", b"")
        store.close()


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
