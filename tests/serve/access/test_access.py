"""What a caller may do, found out from its key."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from orla_lg.core.call import Assignment
from orla_lg.core.limits.limits import Limit
from orla_lg.serve.access.access import Access, Caller, Denied, credentials
from orla_lg.serve.access.keys import Keyring, KeyScope, forget, revoke
from orla_lg.serve.store.store import MemoryStore, Store
from tests.serve.fixtures import bearer, make


class Now:
    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


@pytest.fixture
def store() -> Store:
    return MemoryStore()


@pytest.fixture
def now() -> Now:
    return Now()


@pytest.fixture
def access(store: Store, now: Now) -> Access:
    return Access(Keyring(store, clock=now))


def denied(access: Access, headers: Any, *, scope: KeyScope = KeyScope.USE, loopback: bool = True) -> Denied:
    with pytest.raises(Denied) as found:
        access.admit(headers, scope=scope, loopback=loopback)
    return found.value


def test_without_any_key_this_machine_alone_is_served(access: Access) -> None:
    for scope in KeyScope:
        caller = access.admit([], scope=scope, loopback=True)
        assert caller.key_id is None and caller.tenants is None and access.still(caller, scope)
    access.admit(bearer("EMPTY"), scope=KeyScope.USE, loopback=True)  # clients send something
    assert denied(access, [], loopback=False).status == 401


def test_once_a_key_exists_everything_needs_one(access: Access, store: Store) -> None:
    before = access.admit([], scope=KeyScope.LINK, loopback=True)
    _, secret = make(store)
    fault = denied(access, [])
    assert (fault.status, fault.code) == (401, "missing_api_key")
    assert (b"www-authenticate", b'Bearer realm="orla-lg"') in fault.headers
    assert not access.still(before, KeyScope.LINK)  # links that were open before are not, from now on
    assert access.admit(bearer(secret), scope=KeyScope.USE, loopback=False).name == "key"


@pytest.mark.parametrize(
    "wrong", ["x", "orla-", "orla-" + "a" * 52, "orla-" + "a" * 51, "\x00", "é", "orla-" + "a" * 100_000, "null"]
)
def test_a_wrong_key_is_refused_in_any_header_and_is_in_no_message(access: Access, store: Store, wrong: str) -> None:
    make(store)
    basic = base64.b64encode(f"u:{wrong}".encode())
    for headers in (
        [(b"authorization", b"Bearer " + wrong.encode())], [(b"x-api-key", wrong.encode())],
        [(b"authorization", b"Basic " + basic)],
    ):  # fmt: skip
        fault = denied(access, headers)
        assert (fault.status, fault.code) == (401, "invalid_api_key")
        assert len(wrong) < 5 or wrong not in str(fault)


@pytest.mark.parametrize(
    "header",
    ["Bearer {}", "bearer {}", "BEARER   {} ", "Basic {name}", "Basic {alone}", "basic {name}"],
)
def test_a_key_comes_as_bearer_or_basic(access: Access, store: Store, header: str) -> None:
    _, secret = make(store)
    name = base64.b64encode(f"anything:{secret}".encode()).decode()
    alone = base64.b64encode(f"{secret}:".encode()).decode()
    sent = header.format(secret, name=name, alone=alone).encode()
    assert access.admit([(b"authorization", sent)], scope=KeyScope.USE, loopback=False).key_id


def test_a_key_comes_as_x_api_key_also_beside_another_authorization(access: Access, store: Store) -> None:
    made, secret = make(store)
    for headers in (
        [(b"x-api-key", secret.encode())],
        [(b"authorization", b"Bearer dummy"), (b"x-api-key", secret.encode())],
        [*bearer(secret), (b"x-api-key", secret.encode())],
    ):
        assert access.admit(headers, scope=KeyScope.USE, loopback=False).key_id == made.id
    _, other = make(store, "other")
    assert "several keys" in str(denied(access, [*bearer(secret), (b"x-api-key", other.encode())]))


@pytest.mark.parametrize(
    "value", [b"", b"Bearer", b"Bearer ", b"Basic", b"Basic !!!", b"Basic 8J+", b"Digest a=b", b"Basic Og=="]
)
def test_a_header_without_a_key_is_none(value: bytes) -> None:
    assert list(credentials([(b"authorization", value), (b"x-api-key", b" ")])) == []


def test_a_key_is_good_for_its_scopes_alone(access: Access, store: Store) -> None:
    _, secret = make(store, scopes=(KeyScope.USE, KeyScope.VIEW))
    for scope in KeyScope:
        if scope in (KeyScope.USE, KeyScope.VIEW):
            access.admit(bearer(secret), scope=scope, loopback=True)
        else:
            fault = denied(access, bearer(secret), scope=scope)
            assert (fault.status, fault.code) == (403, "permission_denied")
            assert f"use, view; {scope} is needed" in str(fault)


def test_a_revoked_an_expired_and_a_forgotten_key_let_nothing_in(access: Access, store: Store, now: Now) -> None:
    revoked, secret = make(store)
    make(store, "another")
    caller = access.admit(bearer(secret), scope=KeyScope.USE, loopback=True)
    assert access.still(caller, KeyScope.USE) and not access.still(caller, KeyScope.LINK)
    revoke(store, revoked, 1.0)
    assert "was revoked" in str(denied(access, bearer(secret))) and not access.still(caller, KeyScope.USE)
    _, secret = make(store, expires_s=200.0)
    caller = access.admit(bearer(secret), scope=KeyScope.USE, loopback=True)
    now.s = 200.0
    assert "expired" in str(denied(access, bearer(secret))) and not access.still(caller, KeyScope.USE)
    gone, secret = make(store)
    caller = access.admit(bearer(secret), scope=KeyScope.USE, loopback=True)
    forget(store, gone)
    assert denied(access, bearer(secret)).status == 401 and not access.still(caller, KeyScope.USE)


# Tenant, tags, backends, stages: narrower, never wider


@pytest.mark.parametrize(
    ("tenants", "claimed", "found"),
    [
        (None, None, None), (None, "", None), (None, "acme", "acme"),
        ((), None, None), ((), "", None), ((), "acme", 403),
        (("acme",), None, "acme"), (("acme",), "acme", "acme"), (("acme",), "zenith", 403), (("acme",), "ACME", 403),
        (("acme", "zenith"), "zenith", "zenith"), (("acme", "zenith"), None, 403), (("acme", "zenith"), "other", 403),
        (("a*",), "acme", 403),
    ],
)  # fmt: skip
def test_the_tenant_comes_from_the_key(tenants: Any, claimed: str | None, found: Any) -> None:
    caller = Caller("id", "key", tenants=tenants)
    if found == 403:
        with pytest.raises(Denied) as fault:
            caller.tenant_of(claimed)
        assert fault.value.status == 403
    else:
        assert caller.tenant_of(claimed) == found


def test_a_caller_adds_tags_and_contradicts_none() -> None:
    caller = Caller("id", "key", tags={"team": "blue"})
    assert caller.tags_with({}) == {"team": "blue"}
    assert caller.tags_with({"team": "blue", "job": "7"}) == {"team": "blue", "job": "7"}
    with pytest.raises(Denied, match="'team' of key 'key' is 'blue'"):
        caller.tags_with({"team": "red"})
    assert Caller("id", "key").tags_with({"a": "b"}) == {"a": "b"}


def test_a_key_narrows_backends_and_stages() -> None:
    caller = Caller("id", "key", backends=("light", "gpu-*"), stages=("draft", "review/*"))
    caller.check_backend("gpu-7")
    caller.check_stage("review/first")
    for check, name in ((caller.check_backend, "heavy"), (caller.check_stage, "final"), (caller.check_stage, "")):
        with pytest.raises(Denied):
            check(name)
    Caller("id", "key").check_backend("any")


def test_an_assignment_goes_where_the_key_allows() -> None:
    caller = Caller("id", "key", backends=("light", "gpu-*"))
    kept = caller.narrow(Assignment("light", alternatives=("heavy", "gpu-1")))
    assert (kept.backend, kept.alternatives) == ("light", ("gpu-1",))
    moved = caller.narrow(Assignment("heavy", reason="why", alternatives=("gpu-1", "light")))
    assert (moved.backend, moved.alternatives) == ("gpu-1", ("light",))
    assert moved.reason == "why; the caller's key does not allow 'heavy'"
    with pytest.raises(Denied, match="may not use backend 'heavy'"):
        caller.narrow(Assignment("heavy", alternatives=("other",)))
    free = Assignment("heavy")
    assert Caller("id", "key").narrow(free) is free


# Limits


def test_a_keys_limits_are_layers_of_its_calls_as_they_are_now(access: Access, store: Store) -> None:
    made, secret = make(store, limits=(Limit(calls=2), Limit(cost_usd=1.0, per_s=60.0)))
    caller = access.admit(bearer(secret), scope=KeyScope.USE, loopback=True)
    first = access.layers(caller)
    assert [(layer.key, layer.whole) for layer in first] == [
        (f"key/{made.id}/0", Limit(calls=2)), (f"key/{made.id}/1", Limit(cost_usd=1.0, per_s=60.0)),
    ]  # fmt: skip
    assert access.layers(caller) is first
    forget(store, made)
    assert access.layers(caller) == ()
    assert access.layers(Caller(None, "this machine")) == ()


def test_so_many_calls_of_a_key_at_once_and_no_more(access: Access, store: Store) -> None:
    _, secret = make(store, concurrency=2)
    caller = access.admit(bearer(secret), scope=KeyScope.USE, loopback=True)
    held = [access.enter(caller), access.enter(caller)]
    with pytest.raises(Denied) as fault:
        access.enter(caller)
    assert fault.value.status == 429 and (b"retry-after", b"1") in fault.value.headers
    held[0].release()
    held[0].release()  # counts once
    with access.at_once(caller), pytest.raises(Denied):
        access.enter(caller)
    access.enter(caller)
    _, free = make(store, "free")
    for _ in range(5):
        access.enter(access.admit(bearer(free), scope=KeyScope.USE, loopback=True))
