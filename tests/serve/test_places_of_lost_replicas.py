"""Places of lost replicas at engines that say what they run: given back soon, and not before the engine let go."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import count
from random import Random

import pytest

from orla_lg.core.engine.backend import Backend, Capability, Probe, Support
from orla_lg.core.engine.capabilities import EngineStats
from orla_lg.link.messages import Grant, Message
from orla_lg.testing.virtual import StillAdapter
from tests.serve.scripted import Core, Replica, World, end, enter

LEASE_S = 10.0
WAY_S = 0.02
"""From a grant to the engine, and back."""


class Telling(StillAdapter):
    """An engine that says what it runs: calls of a replica that lives, and of one that does not."""

    def __init__(self) -> None:
        super().__init__(Probe(capabilities={Capability.STATS: Support.NATIVE}))
        self.runs = self.lost = 0

    async def stats(self) -> EngineStats:
        return EngineStats(running=self.runs + self.lost, waiting=0)


class Busy:
    """A replica that never stops asking: where a call ends, another one follows."""

    def __init__(
        self,
        world: World,
        engine: Telling,
        core: Core,
        callers: int,
        takes_s: float,
        seed: int,
        spread: float = 0.5,
        gap_s: float = 0.0,
    ) -> None:
        self.most, self._spread = 0, spread
        self._world, self._engine, self._takes_s = world, engine, takes_s
        self._dice, self._numbers = Random(seed), count()
        self._replica = Replica(world, "busy")
        self._replica.on_message = self._took
        self._replica.connect(core)
        for caller in range(callers):
            world.clock.call_later(caller * gap_s, self._ask)

    def _ask(self) -> None:
        self._replica.say(enter(f"busy-{next(self._numbers)}"))

    def _took(self, message: Message) -> None:
        if isinstance(message, Grant):
            self._world.clock.call_later(WAY_S, partial(self._begin, message.call))

    def _begin(self, call: str) -> None:
        self._engine.runs += 1
        self.most = max(self.most, self._engine.runs + self._engine.lost)
        self._world.clock.call_later(
            self._takes_s * self._dice.uniform(1.0 - self._spread, 1.0 + self._spread), partial(self._end, call)
        )

    def _end(self, call: str) -> None:
        self._engine.runs -= 1
        self._world.clock.call_later(WAY_S, partial(self._replica.say, end(call)))
        self._ask()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("bound", "takes_s", "within_s"), [(8, 3.0, 15.0), (32, 12.0, 15.0), (32, 1.0, 15.0)])
def test_a_busy_engine_gives_places_back(
    world: World, bound: int, takes_s: float, within_s: float, seed: int
) -> None:
    engine = Telling()
    core = Core(world, backends={Backend("a", "http://a/v1", max_concurrency=bound): engine}, replica_lease_s=LEASE_S)
    core.start()
    lost = Replica(world, "lost")
    lost.connect(core)
    lost.tell(enter("c1"), enter("c2"), enter("c3"))
    engine.lost = 3
    busy = Busy(world, engine, core, 2 * bound, takes_s, seed)
    world.settle(5.0)
    lost.drop()
    world.settle(LEASE_S + 10.0)
    assert len(core.host.replicas["lost"].calls) == 3, "the engine is at work for them still"
    engine.lost = 1
    world.settle(within_s)
    assert len(core.host.replicas["lost"].calls) == 1
    engine.lost = 0
    world.settle(within_s)
    assert "lost" not in core.host.replicas
    assert busy.most == bound
    core.serving.check_integrity()


@pytest.mark.parametrize("late_s", [0.0, 0.25, 0.5, 0.75])
def test_an_engine_at_which_a_call_begins_each_second_gives_places_back(world: World, late_s: float) -> None:
    """Reports that come each second, too, would always be asked for at the same time after a call began."""
    engine = Telling()
    core = Core(world, backends={Backend("a", "http://a/v1", max_concurrency=5): engine}, replica_lease_s=LEASE_S)
    core.start()
    lost = Replica(world, "lost")
    lost.connect(core)
    lost.tell(enter("c1"))
    engine.lost = 1
    world.settle(late_s)
    busy = Busy(world, engine, core, 8, 4.0 - 2 * WAY_S, 0, spread=0.0, gap_s=1.0)
    world.settle(8.0)
    lost.drop()
    world.settle(LEASE_S + 2.0)
    engine.lost = 0
    world.settle(15.0)
    assert "lost" not in core.host.replicas
    assert busy.most == 5


def test_calls_of_a_replica_that_is_away_are_not_known_to_be_at_the_engine(world: World) -> None:
    engine = Telling()
    core = Core(world, backends={Backend("a", "http://a/v1", max_concurrency=3): engine}, replica_lease_s=LEASE_S)
    core.start()
    lost, away = Replica(world, "lost"), Replica(world, "away")
    for each in (lost, away):
        each.connect(core)
    lost.tell(enter("c1"))
    away.tell(enter("c2"))
    engine.lost = 1  # c2 ends there while its replica is away, which the core does not hear of
    lost.drop()
    world.settle(LEASE_S - 2.0)
    away.drop()
    world.settle(8.0)
    assert len(core.host.replicas["lost"].calls) == 1, "the one call that the engine runs is c1"
    engine.lost = 0
    world.settle(6.0)
    assert not core.host.replicas, "both are gone, by what the engine runs"


def test_a_backend_that_is_removed_in_a_hush_is_not_left_in_it(world: World) -> None:
    engine = Telling()
    core = Core(world, backends={Backend("a", "http://a/v1", max_concurrency=3): engine}, replica_lease_s=LEASE_S)
    core.start()
    lost = Replica(world, "lost")
    lost.connect(core)
    lost.tell(enter("c1"))
    engine.lost = 1
    Busy(world, engine, core, 6, 1.0, 0)
    lost.drop()
    scheduler = core.serving.schedulers["a"]
    while not scheduler.queue.hushed:
        world.settle(0.1)
    del core.serving.schedulers["a"]
    world.settle(1.0)
    assert not scheduler.queue.hushed
    core.serving.schedulers["a"] = scheduler
