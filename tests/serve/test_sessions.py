"""Links to a core: what a replica says, and what it is answered."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orla_lg.link.messages import Grant, Welcome
from tests.serve.scripted import Core, Replica, World, end, enter, first


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def test_a_call_is_granted_and_ends(world: World) -> None:
    core = Core(world)
    core.start()
    replica = Replica(world, "r1")
    replica.connect(core)
    (welcome,) = replica.got(Welcome)
    assert welcome.epoch == 1 and [each["name"] for each in welcome.backends] == ["a"]
    replica.tell(enter("c1"))
    (grant,) = replica.got(Grant)
    assert (grant.call, grant.epoch, grant.attempt, grant.backend) == ("c1", 1, 1, "a")
    replica.tell(first("c1"), end("c1"))
    (record,) = core.serving.records.records()
    assert (record.id, record.backend, record.error, record.prompt_tokens) == ("c1", "a", None, 25)
    assert core.serving.schedulers["a"].queue.in_flight == 0
    core.serving.check_integrity()


def test_a_call_waits_for_its_turn(world: World) -> None:
    core = Core(world, bound=1)
    core.start()
    one, two = Replica(world, "r1"), Replica(world, "r2")
    one.connect(core)
    two.connect(core)
    one.tell(enter("c1"))
    two.tell(enter("c2"))
    assert (one.grants(), two.grants()) == (["c1"], [])
    one.tell(first("c1"), end("c1"))
    assert two.grants() == ["c2"]
