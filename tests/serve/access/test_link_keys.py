"""What a key allows holds over a link as it does over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from orla_lg import Backend
from orla_lg.core.limits.limits import Limit
from orla_lg.link.messages import Bye, Enter, Ready, Request, RequestDone, Welcome
from orla_lg.serve.access.access import Access
from orla_lg.serve.access.keys import Keyring, KeyScope, revoke
from orla_lg.testing.virtual import StillAdapter
from tests.serve.fixtures import bearer, make
from tests.serve.scripted import Core, Replica, World, adopted, end, enter, first


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


class Linked:
    """A core with keys, and a replica with one."""

    def __init__(self, world: World, **key: Any) -> None:
        self.access = access = Access(Keyring(world.store, clock=world.clock))
        self.core = Core(
            world, mapper={"*": "gpu-1", "light": "light"},  # type: ignore[arg-type]
            backends={Backend(name, f"http://{name}/v1", max_concurrency=9): StillAdapter() for name in NAMES},
            layers=access.layers, taken=access.enter, is_valid=lambda caller: access.still(caller, KeyScope.LINK),
        )  # fmt: skip
        self.core.start()
        self.key, secret = make(world.store, **{"scopes": (KeyScope.LINK,), **key})
        caller = access.admit(bearer(secret), scope=KeyScope.LINK, loopback=False)
        self.replica = Replica(world, "r1", caller)  # type: ignore[arg-type]
        self.replica.connect(self.core)

    def enter(self, call: str, **more: Any) -> str:
        """Returns ``granted`` or why not."""
        self.replica.tell(call_of(call, **more))
        return "granted" if call in self.replica.grants() else self.replica.refusals().get(call, "waits")

    def ask(self, what: str, **more: Any) -> RequestDone:
        self.replica.tell(Request(1, what, more))
        return self.replica.got(RequestDone)[-1]


NAMES = ("light", "gpu-1")


def call_of(call: str, **more: Any) -> Enter:
    return enter(call, **{"own": {"backend": "gpu-1"}, **more})


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("pause", {"backend": "light"}), ("resume", {"backend": "light"}),
    ("drain", {"backend": "light", "timeout_s": 0}),
    ("set_policy", {"stage_policy": "edf"}), ("set_limit", {"backend": "light", "max_concurrency": 1}),
    ("limits", {"limits": {"run": {"calls": 1}}}),
]  # fmt: skip


@pytest.mark.parametrize(("what", "more"), CHANGES)
def test_a_link_changes_the_core_only_by_a_key_of_that_scope(world: World, what: str, more: dict[str, Any]) -> None:
    linked = Linked(world)
    refused = linked.ask(what, **more)
    assert refused.error == "ConfigError" and "--scope control" in refused.value
    assert not linked.core.serving.schedulers["light"].queue.paused
    assert linked.ask("limits").error is None and linked.ask("statistics").error is None


@pytest.mark.parametrize(("what", "more"), CHANGES)
def test_a_key_of_both_scopes_does(world: World, what: str, more: dict[str, Any]) -> None:
    assert Linked(world, scopes=(KeyScope.LINK, KeyScope.CONTROL)).ask(what, **more).error is None


@pytest.mark.parametrize(
    ("tenants", "named", "found"),
    [
        (None, None, None), (None, "acme", "acme"), ((), None, None), ((), "acme", "MappingError"),
        (("acme",), None, "acme"), (("acme",), "zenith", "MappingError"), (("acme", "zenith"), None, "MappingError"),
        (("acme", "zenith"), "zenith", "zenith"),
    ],
)  # fmt: skip
def test_the_tenant_is_one_of_the_keys(world: World, tenants: Any, named: str | None, found: str | None) -> None:
    linked = Linked(world, tenants=tenants)
    answer = linked.enter("c1", said={} if named is None else {"tenant": named})
    if found == "MappingError":
        assert answer.startswith("MappingError")
        return
    linked.replica.tell(first("c1"), end("c1"))
    assert linked.core.serving.records.find("c1").tenant == found


def test_backends_and_stages_are_patterns_here_too(world: World) -> None:
    linked = Linked(world, backends=("gpu-*",), stages=("draft/*", "light"))
    (welcome,) = linked.replica.got(Welcome)
    assert [each["name"] for each in welcome.backends] == ["gpu-1"]
    assert linked.enter("c1", stage="draft/first") == "granted"
    assert linked.enter("c2", stage="final").startswith("MappingError: this key may not call from stage 'final'")
    refused = linked.enter("c3", stage="light", own={"backend": "light"})
    assert refused.startswith("MappingError: this key may not use backend 'light'")


def test_a_keys_limits_hold_over_links(world: World) -> None:
    linked = Linked(world, limits=(Limit(calls=2, per_s=60.0),))
    assert [linked.enter(f"c{number}") for number in range(2)] == ["granted"] * 2
    assert linked.enter("c2").startswith("BudgetExceeded: key 'key' may use 2 calls in any 60 s")


def test_so_many_calls_at_once(world: World) -> None:
    linked = Linked(world, concurrency=2)
    assert [linked.enter(f"c{number}") for number in range(2)] == ["granted"] * 2
    assert linked.enter("c2").startswith("QueueFull: 2 calls of key 'key'")
    linked.replica.tell(first("c0"), end("c0"))
    assert linked.enter("c3") == "granted"
    linked.replica.tell(end("c1", "CancelledError"))
    assert linked.enter("c4") == "granted"
    linked.core.serving.check_integrity()


def test_calls_that_are_adopted_count_among_those_at_once_and_are_not_refused(world: World) -> None:
    linked = Linked(world, concurrency=2)
    linked.replica.drop()
    linked.replica.connect(linked.core, ready=False)
    linked.replica.tell(*(adopted(f"a{number}", backend="gpu-1") for number in range(3)), Ready())
    assert not linked.replica.refusals() and linked.enter("c0").startswith("QueueFull: 2 calls of key 'key'")
    linked.replica.tell(end("a0"), end("a1"))
    assert linked.enter("c1") == "granted"
    linked.replica.tell(end("a2"), end("c1"))
    assert [linked.enter(f"c{number}") for number in (2, 3)] == ["granted"] * 2
    linked.core.serving.check_integrity()


def test_the_link_of_a_revoked_key_is_closed_within_a_second(world: World) -> None:
    linked = Linked(world)
    revoke(world.store, linked.key, world.clock())
    world.settle(0.9)
    assert "does not hold any more" in (linked.replica.bye() or "") or not linked.replica.connected
    assert linked.replica.got(Bye)
