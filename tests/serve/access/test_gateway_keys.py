"""A link may make calls in the names of other keys by the scope ``gateway`` alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from orla_lg import Backend
from orla_lg.core.limits.limits import Limit
from orla_lg.link.messages import Ready, Request, RequestDone
from orla_lg.mappers.table import stage_mapper
from orla_lg.serve.access.access import Access
from orla_lg.serve.access.keys import AccessKey, Keyring, KeyScope, digest, revoke
from orla_lg.testing.virtual import StillAdapter
from tests.serve.fixtures import bearer, make
from tests.serve.scripted import Core, Replica, World, adopted, end, enter, first


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


class Spoken:
    """A core with keys, and a link of one of them."""

    def __init__(self, world: World, *scopes: KeyScope) -> None:
        self.world = world
        self.access = access = Access(Keyring(world.store, clock=world.clock))
        self.core = self.begin()
        self.link, secret = make(world.store, "link", scopes=scopes or (KeyScope.GATEWAY,))
        caller = access.admit(bearer(secret), scope=KeyScope.LINK, loopback=False)
        self.replica = Replica(world, "r1", caller)  # type: ignore[arg-type]
        self.replica.connect(self.core)

    def begin(self) -> Core:
        access = self.access
        core = Core(
            self.world, mapper=stage_mapper({"*": "a"}),
            backends={Backend(name, f"http://{name}/v1", max_concurrency=9): StillAdapter() for name in "ab"},
            layers=access.layers, taken=access.enter, keys=access,
        )  # fmt: skip
        core.start()
        return core

    def enter(self, call: str, key: AccessKey | None, **more: Any) -> str:
        """Returns ``granted`` or why not."""
        self.replica.tell(enter(call, key=None if key is None else key.id, **more))
        return "granted" if call in self.replica.grants() else self.replica.refusals().get(call, "waits")


def test_a_call_in_the_name_of_a_key_is_within_what_that_allows(world: World) -> None:
    spoken = Spoken(world)
    key, _ = make(world.store, "app", tenants=("red",), backends=("b",), stages=("ask",))
    assert (
        spoken.enter("c1", key, stage="ask").startswith("MappingError") and spoken.enter("c2", key, stage="x") != ""
    )
    assert spoken.enter("c3", key, stage="ask", own={"backend": "b"}) == "granted"
    spoken.replica.tell(first("c3"), end("c3"))
    assert spoken.core.serving.records.find("c3").tenant == "red"
    assert spoken.enter("c4", key, stage="ask", own={"backend": "b"}, said={"tenant": "blue"}).startswith("Mapping")
    assert spoken.enter("c5", None, said={"tenant": "any"}) == "granted", "its own calls are of any tenant"


def test_the_keys_own_limits_count(world: World) -> None:
    spoken = Spoken(world)
    key, _ = make(world.store, "app", limits=(Limit(calls=1),), concurrency=2)
    other, _ = make(world.store, "other")
    assert spoken.enter("c1", key) == "granted"
    assert spoken.enter("c2", key).startswith("BudgetExceeded") and spoken.enter("c3", other) == "granted"
    single, _ = make(world.store, "single", concurrency=1)
    assert spoken.enter("c4", single) == "granted" and spoken.enter("c5", single).startswith("QueueFull")
    spoken.replica.tell(end("c4"))
    assert spoken.enter("c6", single) == "granted"


def test_an_adopted_call_counts_for_its_key(world: World) -> None:
    spoken = Spoken(world)
    single, _ = make(world.store, "single", concurrency=1, limits=(Limit(calls=1),))
    assert spoken.enter("c1", single) == "granted"
    spoken.core.kill()
    world.settle(2.0)
    new = spoken.core = spoken.begin()
    spoken.replica.connect(new, ready=False)
    spoken.replica.tell(adopted("c1", key=single.id), Ready())
    assert spoken.enter("c2", single).startswith(("QueueFull", "BudgetExceeded"))
    spoken.replica.tell(end("c1"))
    assert new.serving.check_integrity() is None


@pytest.mark.parametrize("scopes", [(KeyScope.LINK,), (KeyScope.LINK, KeyScope.USE, KeyScope.CONTROL)])
def test_a_replica_claims_no_others_limits(world: World, scopes: tuple[KeyScope, ...]) -> None:
    spoken = Spoken(world, *scopes)
    key, secret = make(world.store, "app")
    refused = spoken.enter("c1", key)
    assert refused.startswith("AccessDenied") and "--scope gateway" in refused
    spoken.replica.tell(Request(1, "key", {"sha256": digest(secret)}))
    assert spoken.replica.got(RequestDone)[-1].error == "AccessDenied"
    assert spoken.enter("c2", None) == "granted"


def test_a_key_that_does_not_hold_gets_nothing(world: World) -> None:
    spoken = Spoken(world)
    gone, _ = make(world.store, "gone")
    revoke(world.store, gone, world.clock())
    wrong, _ = make(world.store, "wrong", scopes=(KeyScope.VIEW,))
    world.settle(2.0)
    for number, (key, why) in enumerate([(gone, "was revoked"), (wrong, "use is needed")]):
        refused = spoken.enter(f"c{number}", key)
        assert refused.startswith("AccessDenied") and why in refused
    spoken.replica.tell(enter("c9", key="unknown"))
    assert "is gone" in spoken.replica.refusals()["c9"]


def test_a_gateway_learns_what_it_must_of_a_key_and_never_its_hash(world: World) -> None:
    spoken = Spoken(world)
    key, secret = make(world.store, "app", tenants=("red",), tags={"team": "x"}, limits=(Limit(calls=1),))
    spoken.replica.tell(Request(1, "key", {"sha256": digest(secret)}), Request(2, "key", {"sha256": ""}))
    known, unknown = (done.value for done in spoken.replica.got(RequestDone)[-2:])
    assert known["any"] and known["key"]["id"] == key.id and known["key"]["tenants"] == ["red"]
    assert "sha256" not in known["key"] and "limits" not in known["key"] and known["key"]["tags"] == {"team": "x"}
    assert unknown == {"any": True, "key": None}
