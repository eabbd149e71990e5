"""Calls that a core takes in later than it hears of them: in its recovery, or while their key's limit is asked for.

Nobody gives back a grant of a replica that has gone by then. What is wrong in one call is its own replica's fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from orla_lg.link.messages import Bye
from tests.serve.scripted import Core, Replica, World, enter


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def recovering(world: World) -> Core:
    """Return a core after one whose replica has not spoken yet."""
    before = Core(world, bound=1)
    before.start()
    Replica(world, "silent").connect(before)
    before.kill()
    world.settle(3.0)
    core = Core(world, bound=1)
    core.start()
    assert not core.host.recovery.over
    return core


def test_a_replica_that_goes_during_the_recovery_leaves_no_grant(world: World) -> None:
    core = recovering(world)
    gone, other = Replica(world, "r1"), Replica(world, "r2")
    gone.connect(core)
    gone.tell(enter("c1"), Bye())
    world.settle(60.0)
    assert core.host.recovery.over and core.serving.schedulers["a"].queue.in_flight == 0
    other.connect(core)
    other.tell(enter("c2"))
    assert other.grants() == ["c2"]


def test_a_replica_that_goes_while_its_key_is_asked_for_leaves_no_grant(world: World) -> None:
    core, pending = Core(world, bound=1), Future[None]()
    core.start()
    core.host.arrivals.pending = lambda key: None if pending.done() else pending
    replica = Replica(world, "r1")
    replica.connect(core)
    replica.tell(enter("c1"), Bye())
    pending.set_result(None)
    world.settle(1.0)
    assert core.serving.schedulers["a"].queue.in_flight == 0


def test_a_wrong_call_that_was_held_costs_its_own_connection(world: World) -> None:
    core = recovering(world)
    wrong, right = Replica(world, "r1"), Replica(world, "r2")
    wrong.connect(core)
    wrong.tell(enter("c1", hashes=[1, 2, 3]))
    right.connect(core)
    right.tell(enter("c2"))
    world.settle(60.0)
    assert core.host.recovery.over and not wrong.connected
    assert right.connected and right.grants() == ["c2"]


def test_a_wrong_call_whose_key_was_asked_for_costs_its_own_connection(world: World) -> None:
    core, pending = Core(world), Future[None]()
    core.start()
    core.host.arrivals.pending = lambda key: None if pending.done() else pending
    replica = Replica(world, "r1")
    replica.connect(core)
    replica.tell(enter("c1", hashes=[1, 2, 3]))
    pending.set_result(None)
    world.settle()
    assert not replica.connected
