"""One core as a process: a ``LinkHost`` with its lease on its own way to the store, in a loop of its own.

A frozen core is a loop that does not run, also in the middle of a question to the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from orla_lg.core.engine.backend import Backend, Capability, Probe, Support
from orla_lg.core.engine.capabilities import EngineStats
from orla_lg.core.memory.policies import memory_policy
from orla_lg.core.serving import Serving
from orla_lg.link.framing import FrameReader
from orla_lg.link.messages import Enter, Grant, read
from orla_lg.link.places import CorePlace
from orla_lg.serve.link.host import LinkHost
from orla_lg.serve.pools.directory import Directory
from orla_lg.serve.pools.succession import Succession
from orla_lg.serve.store.scoped import ScopedStore
from orla_lg.serve.store.store import StoreUnavailable
from orla_lg.testing.virtual import StillAdapter, VirtualBackground, VirtualLoop
from tests.serve.scripted import OPEN
from tests.serve.two.call import ModelCall
from tests.serve.two.store import FlakyStore
from tests.serve.two.times import BOUND, CORE_LEASE_S, LEASE_S, RESTART_S
from tests.serve.two.wire import Wire

if TYPE_CHECKING:
    from tests.serve.two.cores import TwoCores

POOL = "east"


class OwnBackground(VirtualBackground):
    """Work and timers of one core: they stand still while it does."""

    def call_later(self, delay_s: float, function: Callable[[], None]) -> None:
        if not (self._closed or self._virtual.is_closed()):
            self._virtual.call_later(max(0.0, delay_s), function)


class TellingEngine(StillAdapter):
    """The way to an engine that says what it runs."""

    def __init__(self, at_engine: set[str]) -> None:
        super().__init__(Probe(capabilities={Capability.STATS: Support.NATIVE}))
        self.at_engine = at_engine

    async def stats(self) -> EngineStats:
        return EngineStats(running=len(self.at_engine), waiting=0)


class CoreProcess:
    """One core, from its start to its death; it waits for the lease as the server does."""

    def __init__(self, machine: TwoCores, seat: int) -> None:
        self.machine, self.seat, clock = machine, seat, machine.clock
        self.loop = VirtualLoop(clock)
        self.frozen_until_s = 0.0
        self.dead = self.deposed = self._stands_still = False
        self.demoted = set[str]()
        """Calls that came later than they arrived, and have no place to go on from."""
        self.came_s = dict[str, float]()
        self.wires = list[Wire]()
        self.store = FlakyStore(machine.store, self._stand_still, heeds_fences=machine.heeds_fences)
        engine = TellingEngine(machine.at_engine) if machine.tells else StillAdapter()
        self.serving = Serving(
            {Backend("a", "http://a/v1", max_concurrency=BOUND): engine}, mapper=None, stage_policy="fcfs",
            request_policy="fcfs", memory=memory_policy("default"), clock=clock, background=OwnBackground(self.loop),
        )  # fmt: skip
        own = ScopedStore(self.store, POOL)
        self.lease = machine.lease(own, CORE_LEASE_S, clock=clock, holder=f"core-{machine.next_number()}")
        self.host = LinkHost(
            self.serving, own, self.lease, pool=POOL, replica_lease_s=LEASE_S, heeds_roster=machine.heeds_roster,
            on_deposed=self._deposed,
        )  # fmt: skip
        self._entering, self._reader = self.host.arrivals.enter, FrameReader()
        setattr(self.host.arrivals, "enter", self._enter)  # noqa: B010 - a method is no attribute to mypy
        self._task = self.loop.create_task(
            Succession(self.host, Directory(self.store), self._place, self._refresh, is_meant=True).run()
        )

    def _place(self, epoch: int) -> CorePlace:
        return CorePlace(POOL, (f"http://127.0.0.1:{self.seat + 1}",), epoch, holder=self.lease.holder)

    async def _refresh(self) -> None:
        pass

    @property
    def runs(self) -> bool:
        return not (self.dead or self._stands_still) and self.machine.clock() >= self.frozen_until_s

    def turn(self) -> None:
        """Do what is due now, unless it is frozen."""
        if self.runs and self._is_due():
            self.loop.run_until_complete(self._settled())
        if self.deposed:
            self.die()

    def _is_due(self) -> bool:
        loop: Any = self.loop
        return bool(loop._ready) or (bool(loop._scheduled) and loop._scheduled[0]._when <= self.machine.clock())

    async def _settled(self) -> None:
        ready: Any = self.loop
        for _ in range(2):
            await asyncio.sleep(0)
        while ready._ready:
            await asyncio.sleep(0)

    def accept(self, wire: Wire) -> None:
        """Take a connection in, as the server does while it decides."""
        if not self.host.decides:
            wire.close()
            return
        wire.session = session = self.host.session(OPEN)
        session.connection_made(wire)

    def _enter(self, replica: Any, line: Any, message: Enter) -> None:
        arrived_s = self.machine.calls[message.call].inflight.call.arrived_s
        late = abs(self.machine.clock() - message.age_s - arrived_s) > 1e-3
        if message.call not in replica.places and (late or (self.host.recovery.over and message.age_s > 1e-3)):
            self.demoted.add(message.call)
        self.came_s[message.call] = self.machine.clock()
        self._entering(replica, line, message)

    def wrote(self, data: bytes) -> None:
        for fields in FrameReader().feed(data):
            message = read(fields)
            if isinstance(message, Grant) and message.attempt == 1 and message.call not in self.demoted:
                self._in_order(self.machine.calls[message.call])

    def _in_order(self, granted: ModelCall) -> None:
        for replica in self.host.replicas.values():
            for id, hosted in replica.calls.items():
                came_before = self.came_s[id] < self.machine.clock()  # a grant goes out after others came in
                if came_before and hosted.waits and not hosted.attempt and id not in self.demoted:
                    before_s = self.machine.calls[id].inflight.call.arrived_s
                    fault = f"{granted.id} went before {id}"
                    self.machine.expects(before_s >= granted.inflight.call.arrived_s - 1e-6, fault)

    def _stand_still(self, seconds: float) -> None:
        """Be frozen in the middle of what it does; the others go on."""
        inside = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        self._stands_still = True
        try:
            self.machine.elapse(seconds)
        finally:
            self._stands_still = False
            asyncio._set_running_loop(inside)
        if self.dead:
            raise StoreUnavailable("this core was killed")

    def _deposed(self) -> None:
        self.deposed = True

    def die(self) -> None:
        """End without a word; another one takes its seat soon."""
        if not self.dead:
            self.dead = True
            self.store.away_until_s = float("inf")
            for wire in self.wires:
                wire.session = None
            self.machine.clock.call_later(RESTART_S, lambda: self.machine.starts(self.seat))

    def close(self) -> None:
        self.dead, loop = True, cast("Any", self.loop)
        loop._ready.clear()
        loop._scheduled.clear()
        while left := asyncio.all_tasks(self.loop):
            for task in left:
                task.cancel()
            self.loop.run_until_complete(self._settled())
        self.serving.close()
        self.loop.run_until_complete(self._settled())
        self.loop.close()
