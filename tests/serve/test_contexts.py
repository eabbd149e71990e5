"""What calls left in the slots of an engine is the same workflow's under the next core."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orla_lg.core.engine.backend import Backend, Probe
from orla_lg.link.messages import Grant, Message, Ready, SlotContents
from orla_lg.testing.virtual import StillAdapter
from tests.serve.scripted import Core, Key, Replica, World, adopted, end, enter, first


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def met(world: World, slots: int = 3) -> Core:
    """Return a core that has asked its engine, which has slots."""
    core = Core(world, backends={Backend("a", "http://a/v1"): StillAdapter(Probe(slots=slots))})
    core.start()
    world.settle(0.2)
    return core


def left(workflow: str, slot: int, *, age_s: float = 1.0, backend: str = "a", tokens: int = 25) -> SlotContents:
    return SlotContents(list(enter(f"old-{workflow}", workflow=workflow)), backend, slot, tokens, age_s)


def opened(world: World, core: Core, *said: Message, name: str = "r1", key: Key | None = None) -> Replica:
    replica = Replica(world, name) if key is None else Replica(world, name, key)
    replica.connect(core, ready=False)
    replica.tell(*said, Ready())
    return replica


def slots_of(replica: Replica) -> dict[str, int | None]:
    return {grant.call: grant.slot for grant in replica.got(Grant)}


def test_an_adopted_call_has_its_slot_and_the_others_are_free(world: World) -> None:
    core = met(world)
    replica = opened(world, core, adopted("c1", slot=1), adopted("c2", slot=2), enter("c3"), enter("c4"))
    assert slots_of(replica) == {"c3": 0}, "nothing waits for the calls of the core before"
    replica.tell(end("c1"))
    assert slots_of(replica) == {"c3": 0, "c4": 1}
    core.serving.check_integrity()


def test_two_adopted_calls_of_one_workflow_have_theirs(world: World) -> None:
    core = met(world)
    replica = opened(
        world, core, adopted("c1", slot=2, workflow="w"), adopted("c2", slot=0, workflow="w"), enter("c3")
    )
    assert slots_of(replica) == {"c3": 1}
    core.serving.check_integrity()


def test_an_adopted_call_whose_slot_cannot_be_is_waited_for(world: World) -> None:
    replica = opened(world, met(world), adopted("c1", slot=7), enter("c2"))
    assert replica.grants() == [], "which slot is free is not known"
    replica.tell(end("c1"))
    assert replica.grants() == ["c2"]


def test_a_workflow_finds_its_context_under_the_next_core(world: World) -> None:
    core = met(world)
    replica = opened(world, core, left("w1", 2), left("w2", 0))
    replica.tell(enter("c2", workflow="w2"), enter("c1", workflow="w1"), enter("c3", workflow="w3"))
    assert slots_of(replica) == {"c2": 0, "c1": 2, "c3": 1}
    (granted,) = [grant for grant in replica.got(Grant) if grant.call == "c1"]
    assert (granted.cache_action, granted.expected_tokens) == ("reused", 25)
    core.serving.check_integrity()


def test_of_two_that_were_in_a_slot_the_last_one_counts(world: World) -> None:
    core = met(world)
    one = Replica(world, "r1")
    two = Replica(world, "r2")
    for each in (one, two):
        each.connect(core, ready=False)
    one.tell(left("old", 1, age_s=9.0), left("late", 2, age_s=1.0), Ready())
    two.tell(left("new", 1, age_s=2.0), left("early", 2, age_s=5.0), Ready())
    one.tell(enter("c1", workflow="new"), enter("c2", workflow="late"))
    assert slots_of(one) == {"c1": 1, "c2": 2}


def test_what_a_core_has_seen_itself_goes_before(world: World) -> None:
    core = met(world, slots=1)
    one = opened(world, core)
    one.tell(enter("c1", workflow="w1"), first("c1"))
    two = opened(world, core, left("w2", 0, age_s=0.0), name="r2")
    one.tell(end("c1"))
    cache = core.serving.schedulers["a"].cache
    assert cache.tokens_of("w1") and not cache.tokens_of("w2")
    two.tell(left("w2", 0, age_s=0.0))
    assert not cache.tokens_of("w2"), "it was said too late"
    core.serving.check_integrity()


def test_what_cannot_be_is_passed_by(world: World, caplog: pytest.LogCaptureFixture) -> None:
    core = met(world)
    key = Key(key_id="k", tenants=("acme", "other"))
    opened(world, core, left("w", -1), left("w", 3), left("w", 1, backend="none"))
    stray = opened(world, core, left("w", 1), name="r2", key=key)
    assert stray.connected and "what is in slot 1 of backend a is not known" in caplog.text
    cache = core.serving.schedulers["a"].cache
    assert not cache.workflows()
    broken = Replica(world, "r3")
    broken.connect(core, ready=False)
    broken.tell(SlotContents(["no", "enter"], "a", 1, 3, 0.0))
    assert not broken.connected


def test_where_tenants_are_isolated_nothing_is_believed_of_what_is_there(world: World) -> None:
    backend = Backend("a", "http://a/v1", isolate_tenants=True)
    core = Core(world, backends={backend: StillAdapter(Probe(slots=2))})
    core.start()
    world.settle(0.2)
    replica = opened(world, core, left("w", 1))
    replica.tell(enter("c1", workflow="w"))
    (granted,) = replica.got(Grant)
    assert granted.slot == 1 and not granted.expected_tokens
