"""Keys in the store, and as a running server knows them."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orla_lg.core.limits.limits import Limit
from orla_lg.errors import ConfigError
from orla_lg.serve.access.keys import PREFIX, AccessKey, Keyring, KeyScope, create, forget, named, revoke, stored
from orla_lg.serve.store.sqlite import SqliteStore
from orla_lg.serve.store.store import MemoryStore, Store, StoreUnavailable, Versioned
from tests.serve.fixtures import make, until

FULL = {
    "scopes": (KeyScope.LINK, KeyScope.VIEW),
    "tenants": ("acme", "zenith"),
    "tags": {"team": "blue"},
    "backends": ("light", "gpu-*"),
    "stages": ("draft",),
    "limits": (Limit(calls=60, per_s=60.0), Limit(cost_usd=5.0)),
    "concurrency": 4,
    "created_s": 10.0,
    "expires_s": 20.0,
}


def test_a_key_is_256_random_bits_and_only_its_hash_is_stored() -> None:
    store = MemoryStore()
    made, secret = make(store, "ci")
    _, other = make(store, "ci")
    assert re.fullmatch(r"orla-[a-z2-7]{52}", secret) and secret != other
    (entry,) = store.scan(PREFIX + made.id).values()
    assert json.loads(entry.value)["sha256"] == hashlib.sha256(secret.encode()).hexdigest()
    assert all(secret not in repr(each) for each in (made, entry, made.as_dict()))
    assert made.sha256 not in repr(made) and "sha256" not in made.as_dict()


def test_what_is_stored_comes_back() -> None:
    store = MemoryStore()
    made, _ = make(store, "full", **FULL)
    assert stored(store) == [made]
    assert AccessKey.unpack(made.pack()) == made


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""}, {"scopes": ()}, {"scopes": ("use", "all")}, {"tenants": "acme"}, {"tenants": ("",)},
        {"tags": ["a"]}, {"tags": {"a": 1}}, {"concurrency": 0}, {"expires_s": "soon"}, {"backends": (1,)},
    ],
)  # fmt: skip
def test_what_no_key_may_say_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        AccessKey(**{"id": "a", "name": "n", "sha256": "x", **wrong})


@pytest.mark.parametrize(
    "packed",
    [b"", b"[]", b"{}", b'{"id": "a"}', b"\xff", b"[" * 5000, b'{"id": "a", "name": "n", "sha256": "x", "limits": 1}',
     b'{"id": "a", "name": "n", "sha256": "x", "limits": [{"calls": -1}]}',
     b'{"id": "a", "name": "n", "sha256": "x", "limits": [{"more": 1}]}',
     b'{"id": "a", "name": "n", "sha256": "x", "scopes": 7}',
     b'{"id": "a", "name": "n", "sha256": "x", "only_on_sundays": true}'],
)  # fmt: skip
def test_what_is_no_key_or_of_a_newer_version_lets_nothing_in(
    packed: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError):
        AccessKey.unpack(packed)
    store = MemoryStore()
    store.put(f"{PREFIX}a", packed)
    keyring = Keyring(store)
    assert keyring.by_id("a") is None
    assert keyring.any  # it is there to keep others out
    assert "lets nothing in" in caplog.text


def test_a_key_is_found_by_id_or_by_a_name_that_is_one_keys() -> None:
    store = MemoryStore()
    first, secret = make(store, "ci")
    assert named(store, first.id) == named(store, "ci") == first
    second, _ = make(store, "ci", created_s=1.0)
    with pytest.raises(ConfigError, match="2 keys are named 'ci'"):
        named(store, "ci")
    revoke(store, first, 5.0)
    assert named(store, "ci") == second
    with pytest.raises(ConfigError, match="no key has the id or name 'cj'"):
        named(store, "cj")
    with pytest.raises(ConfigError) as fault:
        named(store, secret)
    assert secret not in str(fault.value)


def test_a_key_is_revoked_once_and_forgotten_as_often_as_asked() -> None:
    store = MemoryStore()
    made, _ = make(store, "ci")
    assert revoke(store, made, 5.0).revoked_s == 5.0
    assert revoke(store, made, 6.0).revoked_s == 5.0
    forget(store, made)
    forget(store, made)
    assert not stored(store)
    with pytest.raises(ConfigError, match="gone"):
        revoke(store, made, 7.0)


def test_a_key_lets_in_until_it_expires_or_is_revoked() -> None:
    made, _ = make(MemoryStore(), "ci", expires_s=20.0)
    assert made.fault(19.9) is None and made.fault(20.0) == "expired"
    assert revoke_of(made) == "was revoked"
    assert (made.state(19.9), made.state(20.0)) == ("valid", "expired")
    assert replace(made, revoked_s=1.0).state(0.0) == "revoked"


def revoke_of(key: AccessKey) -> str | None:
    store = MemoryStore()
    store.put(PREFIX + key.id, key.pack())
    return revoke(store, key, 1.0).fault(0.0)


# In a running server


def test_a_keyring_follows_the_store(tmp_path: Path) -> None:
    """The two are of different processes in truth; here they are two connections."""
    server, command = (SqliteStore(tmp_path / "s" / "serve.db", poll_s=0.02) for _ in range(2))
    keyring = Keyring(server)
    assert keyring.find("orla-" + "a" * 52) is None
    made, secret = make(command, "ci")
    until(lambda: keyring.find(secret) == made)
    assert keyring.any and keyring.find(secret + "a") is None and keyring.find("") is None
    assert keyring.find(secret[:-1] + ("a" if secret[-1] != "a" else "b")) is None
    revoke(command, made, 5.0)
    until(lambda: (found := keyring.find(secret)) is not None and found.revoked_s == 5.0)
    assert keyring.any
    forget(command, made)
    until(lambda: not keyring.any)
    assert keyring.find(secret) is None and keyring.by_id(made.id) is None
    keyring.close()
    server.close()
    command.close()


class Failing(MemoryStore):
    """A store that cannot be read for a while."""

    fails = False

    def scan(self, prefix: str) -> dict[str, Versioned]:
        if self.fails:
            raise StoreUnavailable("the disk is gone")
        return super().scan(prefix)


def test_a_store_that_cannot_be_read_leaves_keys_as_they_were_and_is_read_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orla_lg.serve.access.keys.RETRY_S", 0.0)
    store = Failing()
    made, secret = make(store, "ci")
    keyring = Keyring(store)
    store.fails = True
    with caplog.at_level(logging.WARNING):
        revoke(store, made, 5.0)
        assert keyring.find(secret) == made and keyring.by_id(made.id) == made
    assert caplog.text.count("cannot be read now") == 1
    store.fails = False
    found = keyring.find(secret)
    assert found is not None and found.revoked_s == 5.0
    with pytest.raises(StoreUnavailable):
        store.fails = True
        Keyring(store)


def test_a_change_between_reading_and_watching_is_seen() -> None:
    class Late(MemoryStore):
        def watch(self, prefix: str, changed: Any) -> Any:
            make(self, "came in between")
            return super().watch(prefix, changed)

    assert Keyring(Late()).any


def test_threads_may_ask_while_keys_change() -> None:
    store: Store = MemoryStore()
    _, secret = make(store, "ci")
    keyring, stop, wrong = Keyring(store), threading.Event(), list[object]()

    def ask() -> None:
        while not stop.is_set():
            if keyring.find(secret) is None:
                wrong.append(secret)

    asking = threading.Thread(target=ask)
    asking.start()
    for number in range(100):
        make(store, f"key-{number}")
    stop.set()
    asking.join()
    assert not wrong


def test_ids_and_keys_do_not_repeat() -> None:
    store = MemoryStore()
    assert len({create(store, lambda i, s: AccessKey(i, "n", s))[1] for _ in range(50)}) == 50
