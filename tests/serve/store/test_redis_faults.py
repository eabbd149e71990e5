"""The store on a Redis that is full, that says what it was not asked for, and whose connection ends in the middle."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from redis.exceptions import InvalidResponse

from orla_lg.errors import ConfigError
from orla_lg.link.redis_keys import RedisAddress
from orla_lg.serve.store.store import Fence, StoreUnavailable
from tests.redis_server import RedisServer
from tests.serve.store.test_redis import server, store_on, when_it_answers

__all__ = ["server"]


def test_a_server_whose_memory_is_full_renews_leases_and_takes_what_needs_no_more(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis", "--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as full:
        store = store_on(full)
        lease = store.lease("core", "a", 5.0)
        assert lease is not None
        store.put("keys/one", b"valid")
        store.put("keys/two", b"valid")
        with pytest.raises(StoreUnavailable, match="memory is full"):
            for number in range(1000):
                store.put(f"posted/{number}", b"x" * 20_000)
        assert store.lease("core", "a", 0.05) is not None
        time.sleep(0.1)
        after = store.lease("core", "b", 5.0)
        assert after is not None and after.epoch == lease.epoch + 1, "and a standby takes over"
        revoked = store.put("keys/one", b"revoked since yesterday", fence=Fence("core", after.epoch))
        assert store.put("keys/two", None) == revoked + 1
        for name in ("keys/three", "posted/0"):
            with pytest.raises(StoreUnavailable, match="memory is full"):
                store.put(name, b"x" * 30_000)
        with pytest.raises(StoreUnavailable, match="memory is full"):
            store.lease("another", "a", 5.0)
        opened = store_on(full)  # as `orla-lg keys` does
        assert opened.scan("keys/") == {"keys/one": (b"revoked since yesterday", revoked)}
        opened.put("posted/0", None)
        opened.close()
        store.close()


def test_a_message_of_another_program_does_not_end_the_watching(server: RedisServer) -> None:
    store, other = store_on(server), store_on(server)
    heard = threading.Event()
    store.watch("keys/", heard.set)
    store.watch("else/", lambda: None)
    other.put("keys/a", b"1")
    assert heard.wait(5.0)
    for said in ("hello", b"", b"1 \xff\xfe", "9" * 30 + " keys/b"):
        other._client.publish(store._channel, said)
    time.sleep(0.5)
    for value in (b"2", b"3"):
        heard.clear()
        other.put("keys/a", value)
        assert heard.wait(2.0)
    assert store._watching is not None and store._watching.is_alive()
    store.close()
    other.close()


def test_a_watcher_goes_on_after_a_fault_of_any_kind(
    server: RedisServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = store_on(server), store_on(server)
    heard = threading.Event()
    store.watch("keys/", heard.set)
    faults, look = [RuntimeError("odd")], store._look
    monkeypatch.setattr(store, "_look", lambda: (_ for _ in ()).throw(faults.pop()) if faults else look())
    time.sleep(0.6)
    assert not faults and "odd" in caplog.text
    other.put("keys/a", b"1")
    assert heard.wait(5.0)
    store.close()
    other.close()


def test_an_answer_that_cannot_be_read_ends_its_connection(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_on(server)
    store.put("a", b"one")
    store.put("b", b"two")
    connection = store._line._connection
    with monkeypatch.context() as patched:

        def unreadable(*_: object, **__: object) -> None:
            patched.undo()
            raise InvalidResponse("Protocol Error: b'x'")

        patched.setattr(connection._parser, "read_response", unreadable)
        with pytest.raises(StoreUnavailable, match="Protocol Error"):
            store.get("a")
    assert when_it_answers(lambda: store.get("b")) == (b"two", 2)
    assert store._line._connection is not connection
    store.close()


def test_a_question_that_was_interrupted_is_not_answered_to_the_next_one(server: RedisServer) -> None:
    store, other = store_on(server, answer_s=5.0), store_on(server)
    other.put("a", b"one")
    connection = store._line._connection
    server.freeze()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        store.put("a", b"interrupted")
    assert store._line._connection is not connection
    server.thaw()
    written = when_it_answers(lambda: store.put("b", b"two"))
    assert when_it_answers(lambda: store.get("b")) == (b"two", written)
    found = store.get("a")
    assert found is not None and found.version < written, "it was done before the next one, or never"
    store.close()
    other.close()


def test_a_connection_is_made_again_whatever_the_one_before_met(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_on(server)
    line = store._line
    faults, begin = [TypeError("odd")], line._begin

    def begun(connection: object) -> None:
        if faults:
            raise faults.pop()
        begin(connection)

    monkeypatch.setattr(line, "_begin", begun)
    line._lose(line._connection, None)
    assert when_it_answers(lambda: store.get("a"), 3.0) is None
    assert not faults
    store.close()


# What is secret


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:geheim/x@h:1/0", "redis://u:geheim#x@h:1/0", "redis://u:geheim?x@h/0", "redis://u:geheim[x@h/0",
        "redis://u:geheim@h:99999/0", "redis://u:gehe im@h", "http://u:geheim@h",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        RedisAddress.parse(url, "store")
    assert "gehe" not in str(refused.value)


def test_an_address_shows_no_password() -> None:
    address = RedisAddress.parse("rediss://u:geheim@h:1/0?password=geheimer&prefix=p", "store")
    assert f"{address} {address!r} {[address]}".count("geheim") == 0
    assert "geheimer" in address.url
