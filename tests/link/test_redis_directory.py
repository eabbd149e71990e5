"""A replica that is given the store finds its core there."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from orla_lg import BackendUnavailable, ConfigError, Orla
from orla_lg.link.messages import Ready
from orla_lg.link.places import CORES, STANDBYS, CorePlace, text_of
from orla_lg.link.redis_directory import are_named, directory_at, named
from orla_lg.link.redis_keys import RedisAddress, entry, lexical_range, read_entry
from orla_lg.link.whereabouts import here
from tests.link.scripted import ScriptedCore
from tests.redis_server import RedisServer, free_port

Replica = Callable[..., Orla]


@pytest.mark.parametrize(
    ("url", "shown", "is_believed"),
    [
        ("redis://host:6379/0", "redis://host:6379/0", False),
        ("redis://user:secret@host/1", "redis://host/1", False),
        ("rediss://:secret@host", "rediss://host", True),
        ("rediss://host?ssl_cert_reqs=none", "rediss://host", False),
        ("rediss://host?ssl_check_hostname=false", "rediss://host", False),
        ("redis://127.0.0.1:6379", "redis://127.0.0.1:6379", True),
        ("redis://localhost", "redis://localhost", True),
        ("redis+unix:///run/redis.sock?db=2", "redis+unix:///run/redis.sock", True),
    ],
)
def test_a_store_is_believed_by_its_certificate_or_on_this_machine(url: str, shown: str, is_believed: bool) -> None:
    address = RedisAddress.parse(url, "store")
    assert (address.text, address.is_believed, address.prefix) == (shown, is_believed, "orla")
    assert "secret" not in repr(address.connect().connection_pool.connection_kwargs.get("host"))
    assert RedisAddress.parse(f"{url}{'&' if '?' in url else '?'}prefix=other", "store").key("x") == "{other}:x"


@pytest.mark.parametrize(
    "url",
    ["redis://", "redis+unix://", "redis://host:port", "http://host", "redis://ho st", "redis://h?prefix=",
     "redis://h?prefix={a}", "redis://:secret@h?db=x"],
)  # fmt: skip
def test_wrong_urls_are_refused_without_their_passwords(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RedisAddress.parse(url, "store").connect()
    assert "secret" not in str(caught.value)


def test_urls_are_told_apart() -> None:
    servers, stores = named("redis://store/0, https://core:1,rediss://other")
    assert [each.text for each in servers] == ["https://core:1"] and stores == ["redis://store/0", "rediss://other"]
    assert named("redis://store") == ((), ["redis://store"])
    for wrong in ("", None, "redis://a,", "redis://a,ftp://b"):
        with pytest.raises(ConfigError):
            named(wrong)
    assert are_named("redis://a", "http://b,redis://a") and are_named("http://b/", "http://b,redis://a")
    assert not are_named("redis://c", "http://b,redis://a") and not are_named("redis://a", "nonsense")


def test_values_keep_their_bytes() -> None:
    for value in (b"", b" ", b"\x00 1 2"):
        assert read_entry(entry(7, value)) == (7, value)
    assert lexical_range("core/") == (b"[core/", b"(core/\xff")


def test_without_redis_py_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"redis://store needs the package redis.*pip install 'orla-lg\[redis\]'"):
        Orla.remote("redis://store")


# With a real one


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield f"{server.url}?prefix=test"


@pytest.fixture
def write(redis_url: str) -> Iterator[Callable[[str, CorePlace | bytes | None], None]]:
    address = RedisAddress.parse(redis_url, "store")
    client = address.connect()
    client.flushdb()

    def put(key: str, place: CorePlace | bytes | None) -> None:
        if place is None:
            client.zrem(address.key("names"), key)
            client.hdel(address.key("values"), key)
            return
        value = place if isinstance(place, bytes) else text_of(place)
        client.hset(address.key("values"), key, entry(1, value))
        client.zadd(address.key("names"), {key: 0})

    yield put
    client.close()


def test_the_directory_is_read(redis_url: str, write: Any) -> None:
    source = directory_at(redis_url)
    assert source.read() == []
    core, standby = CorePlace("a", ("https://a:1",), 3, ("x",)), CorePlace("a", ("https://a:2",))
    write(f"{CORES}a", core)
    write(f"{CORES}b", b"nonsense")
    write(f"{STANDBYS}a/holder", standby)
    write("spent/x", CorePlace("a", ("https://not:1",)))
    assert source.read() == [core, standby]


def test_a_replica_finds_its_core_in_the_store_and_the_next_one(
    redis_url: str, write: Any, core: ScriptedCore, replica: Replica
) -> None:
    with pytest.raises(BackendUnavailable, match=r"at redis://127.0.0.1:\d+/0: the store .* names no core"):
        Orla.remote(redis_url, core_patience_s=0.3)
    write(CORES, CorePlace("", (core.url,), 1, host=here()))
    orla = replica(redis_url, key="key-of-the-link")
    assert "Bearer key-of-the-link" in core.heads[-1]
    with ScriptedCore(*core.backends, epoch=2, key_env=core.key_env) as second:
        core.gone()
        time.sleep(0.1)
        write(CORES, CorePlace("", (second.url,), 2, host=here()))
        second.wait(Ready)
        orla.close()


def test_a_store_that_is_away_is_said_so() -> None:
    port = free_port()
    with pytest.raises(BackendUnavailable, match=r"does not say where cores are.*refused"):
        Orla.remote(f"redis://127.0.0.1:{port}/0", core_patience_s=0.5)


def test_nothing_of_it_is_imported_by_what_does_not_need_it() -> None:
    code = "import sys, orla_lg; from orla_lg import Orla; import orla_lg.opening; sys.exit('redis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
