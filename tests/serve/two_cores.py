"""Two cores on a store that loses answers, and replicas: real ones in virtual time, and what may happen to them.

A core is a ``LinkHost`` with its lease on its own way to the store, in a loop of its own: a frozen core is a loop
that does not run, also in the middle of a question to the store. A replica is a ``LinkedServing`` on a ``Link`` whose
socket is in memory. Only the engine, the network and the callers are models.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar, cast

import pytest

from orla_lg.core.engine.backend import Backend
from orla_lg.core.memory.policies import memory_policy
from orla_lg.core.serving import Serving
from orla_lg.link import calls, connection, losses, serving
from orla_lg.link.connection import Link
from orla_lg.link.dialing import Dialed, Plain, addresses
from orla_lg.link.framing import FrameReader, LinkBroken, frame
from orla_lg.link.greeting import Greeted, _welcome
from orla_lg.link.messages import SILENT_S, Enter, Grant, flat, read
from orla_lg.link.places import CorePlace
from orla_lg.link.serving import LinkedServing
from orla_lg.serve.link.host import LinkHost
from orla_lg.serve.pools import succession
from orla_lg.serve.pools.directory import Directory
from orla_lg.serve.pools.succession import Succession
from orla_lg.serve.store.lease import CoreLease
from orla_lg.serve.store.scoped import ScopedStore
from orla_lg.serve.store.store import Fence, Instant, MemoryStore, StoreUnavailable
from orla_lg.testing.virtual import StillAdapter, VirtualBackground, VirtualClock, VirtualLoop
from tests.serve.scripted import OPEN
from tests.serve.two_callers import ModelCall

BOUND = 2
CORE_LEASE_S, LEASE_S = 1.5, 3.0
"""Of cores, and of replicas: shorter than usual, so that fewer moments pass."""
LETS_GO_S = 1.0
"""``orphans.SILENT_LETS_GO_S``, shorter than usual too."""
ENGINE_NOTICES_S = 0.8 * LETS_GO_S
"""A hung-up request is gone from the engine after so long."""
QUANTUM_S, RESTART_S, REDIAL_S = 0.1, 0.3, 0.2
POOL = "east"
ADDRESS = addresses("http://127.0.0.1:1")[0]

T = TypeVar("T")


class Fault(NamedTuple):
    """What befalls one question to the store."""

    before: bool
    """Whether it takes no effect; else it does, and only its answer is lost or late."""
    seconds: float = 0.0
    """For so long the core stands still in it; 0: it fails."""


class FlakyStore:
    """The store as one core reaches it (``store.Store``)."""

    def __init__(self, inner: MemoryStore, stand_still: Callable[[float], None], *, heeds_fences: bool) -> None:
        self._inner, self._stand_still, self._heeds_fences = inner, stand_still, heeds_fences
        self.away_until_s = 0.0
        self.deaf = set[str]()
        """Methods that never answer."""
        self.faults = deque[Fault]()

    def _ask(self, what: str, asked: Callable[[], T]) -> T:
        fault = self.faults.popleft() if self.faults else None
        if fault is not None and fault.before:
            self._suffer(fault)
        if self._inner._now().since_boot_s < self.away_until_s or what in self.deaf:
            raise StoreUnavailable("it does not answer")
        answer = asked()
        if fault is not None and not fault.before:
            self._suffer(fault)
        return answer

    def _suffer(self, fault: Fault) -> None:
        if not fault.seconds:
            raise StoreUnavailable("the question was lost" if fault.before else "the answer was lost")
        self._stand_still(fault.seconds)

    def get(self, key: str) -> Any:
        return self._ask("get", lambda: self._inner.get(key))

    def put(self, key: str, value: bytes | None, *, expected: int | None = None, fence: Fence | None = None) -> Any:
        fence = fence if self._heeds_fences else None
        return self._ask("put", lambda: self._inner.put(key, value, expected=expected, fence=fence))

    def scan(self, prefix: str) -> Any:
        return self._ask("scan", lambda: self._inner.scan(prefix))

    def lease(self, name: str, holder: str, ttl_s: float) -> Any:
        return self._ask("lease", lambda: self._inner.lease(name, holder, ttl_s))

    def watch(self, prefix: str, changed: Callable[[], None]) -> Callable[[], None]:
        return self._inner.watch(prefix, changed)


class Wire(asyncio.Transport):
    """One connection: the core's transport, and the socket of the replica's link."""

    def __init__(self, core: CoreProcess) -> None:
        super().__init__()
        self.core, self.session, self.coming = core, cast("asyncio.Protocol | None", None), bytearray()
        self.hung_up = self.is_cut = False
        """By the core's side; the network lost what was on its way."""

    # The core's side

    def write(self, data: Any) -> None:
        if not self.is_cut:
            self.coming += data
            self.core.wrote(bytes(data))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def is_closing(self) -> bool:
        return self.hung_up

    def close(self) -> None:
        if not self.hung_up:
            self.hung_up = True
            if self.session is not None and not self.core.dead:
                self.core.loop.call_soon(self.session.connection_lost, None)

    abort = close

    # The replica's side

    def send(self, data: bytes) -> int:
        if not self.core.dead:
            self.core.loop.call_soon(self._arrives, bytes(data))
        return len(data)

    def _arrives(self, data: bytes) -> None:
        if self.session is not None and not (self.hung_up or self.is_cut):
            self.session.data_received(data)

    def recv(self, most: int) -> bytes:
        data, self.coming = bytes(self.coming), bytearray()
        return data

    @property
    def readable(self) -> bool:
        return bool(self.coming) or self.hung_up or self.core.dead

    def shut(self) -> None:
        if not self.core.dead:
            self.core.loop.call_soon(self.close)


class End(NamedTuple):
    """The replica's socket, where a method has another meaning than the transport's."""

    wire: Wire

    def send(self, data: bytes) -> int:
        return self.wire.send(data)

    def recv(self, most: int) -> bytes:
        return self.wire.recv(most)

    def close(self) -> None:
        self.wire.shut()

    def shutdown(self, how: int) -> None:
        self.wire.shut()


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
        self.serving = Serving(
            {Backend("a", "http://a/v1", max_concurrency=BOUND): StillAdapter()}, mapper=None, stage_policy="fcfs",
            request_policy="fcfs", memory=memory_policy("default"), clock=clock,
            background=VirtualBackground(self.loop),
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
        if self.runs:
            self.loop.run_until_complete(self._settled())
        if self.deposed:
            self.die()

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


class ReplicaProcess:
    """One replica: the real link and all behind it; its thread's turns are taken one by one."""

    def __init__(self, machine: TwoCores, name: str) -> None:
        self.machine, self.name, self.clock = machine, name, machine.clock
        self.link = Link((ADDRESS,), None)
        self.link._thread = threading.current_thread()
        self.link.replica = name
        self.serving: LinkedServing | None = None
        self.wire: Wire | None = None
        self.highest = self.tries = 0
        """Epoch that was met."""
        self.late_until_s = self.frozen_until_s = 0.0
        self.dead = False
        self.calls = list[ModelCall]()
        self.woken, self.aborted = deque[ModelCall](), deque[ModelCall]()

    # Its link's thread

    def turn(self) -> None:
        """Do what is due now, unless it is frozen or dead."""
        if self.dead or self.clock() < self.frozen_until_s:
            return
        link = self.link
        if link._dialed is not None:
            if why := self._talk():
                link._lost(why)
                self.late_until_s = max(self.late_until_s, self.clock() + REDIAL_S / 10)
        elif self.clock() >= self.late_until_s:
            link._look()
            self._dial()
        else:
            link._look()
        while self.aborted:
            self.aborted.popleft().cut_off()
        while self.woken:
            self.woken.popleft().goes_on()

    def _talk(self) -> str:
        link, wire = self.link, self.wire
        assert wire is not None
        try:
            while link._dialed is not None and wire.readable:
                link._read(link._dialed.socket)
        except (OSError, LinkBroken) as error:
            return str(error)
        now = self.clock()
        if now - link._heard_s > SILENT_S:
            return "the core has been silent"
        if now >= link._renew_s:
            link._renew(now)
            link._look()
        return link._broken

    def _dial(self) -> None:
        """Try one of the cores, and begin with it if it welcomes this replica."""
        self.tries += 1
        self.late_until_s = self.clock() + REDIAL_S
        core, link = self.machine.cores[self.tries % 2], self.link
        if core is None or core.dead:
            return
        listener, sent_s = self.serving, self.clock()
        hello = serving.hello(link, "test") if listener is None else listener.cores.home.hello()
        wire = self.wire = Wire(core)
        core.wires.append(wire)
        core.loop.call_soon(core.accept, wire)
        wire.send(frame(flat(hello)))
        core.turn()
        reader = FrameReader()
        came = list(reader.feed(wire.recv(0)))
        try:
            welcome = _welcome(ADDRESS, came[0], hello, link.places.pool) if came else None
        except (OSError, LinkBroken):
            welcome = None
        if welcome is None:
            wire.shut()
            return
        socket = cast("Any", End(wire))
        greeted = Greeted(Dialed(socket, Plain(), ADDRESS, b""), welcome, reader, came[1:], sent_s)
        self.highest = max(self.highest, welcome.epoch)
        if listener is None:
            link.epoch = welcome.epoch
            listener = self.serving = LinkedServing(
                link, welcome, adapter_of=lambda backend: StillAdapter(), key_in=lambda name: None, version="test"
            )
            listener.clients["a"] = cast("Any", SimpleNamespace(abort=self._abort))
            link._listener = weakref.ref(listener.cores.home)
        link._joins(greeted)
        if not self.machine.heeds_epochs:
            link.epoch = self.highest = 0
        core.turn()

    def _abort(self) -> None:
        self.aborted += [call for call in self.calls if call.at_engine]

    # What may happen to it

    def drop(self, *, loses: bool) -> None:
        """Let the connection end; *loses*: with what is on its way."""
        if self.link._dialed is not None and self.wire is not None:
            self.wire.is_cut = loses
            if loses:
                self.wire.coming.clear()
            self.link._lost("the network")

    def freeze(self, seconds: float) -> None:
        """Stand still, at most for a lease since the last renewal: then nothing could end its requests in time."""
        over_s = self.link.confirmed_s + LEASE_S + LETS_GO_S - ENGINE_NOTICES_S - QUANTUM_S
        self.frozen_until_s = min(self.clock() + seconds, over_s)

    def die(self) -> None:
        """End without a word; its engine notices a little later."""
        self.dead = True
        self.link._hang_up()
        for call in self.calls:
            call.dies()

    def close(self) -> None:
        self.link._hang_up()
        self.dead, self.link._stopping = True, True
        if self.serving is not None:
            self.serving.close()


class TwoCores:
    """All of it. ``elapse`` lets time pass; the other methods are what may happen."""

    def __init__(
        self,
        *,
        replicas: int = 3,
        heeds_roster: bool = True,
        heeds_epochs: bool = True,
        heeds_fences: bool = True,
        lease: type[CoreLease] = CoreLease,
    ) -> None:
        self.heeds_roster, self.heeds_epochs, self.heeds_fences, self.lease = (
            heeds_roster,
            heeds_epochs,
            heeds_fences,
            lease,
        )
        self.clock = VirtualClock(1000.0)
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(calls, "LETS_GO_S", LETS_GO_S)
        for module in (calls, connection, losses, serving, succession):
            self._patch.setattr(module, "time", SimpleNamespace(monotonic=self.clock))
        self.store = MemoryStore(now=lambda: Instant(self.clock(), "boot", self.clock()))
        self.at_engine, self.most = set[str](), 0
        self.calls = dict[str, ModelCall]()
        self.faults = list[str]()
        self._number = 0
        self.cores: list[CoreProcess | None] = [None, None]
        self.all = list[CoreProcess]()
        self.replicas = list[ReplicaProcess]()
        self.starts(0)
        self.elapse(QUANTUM_S)
        self.starts(1)
        for number in range(replicas):
            self.replicas.append(ReplicaProcess(self, f"r{number}"))
        self.gone = list[ReplicaProcess]()
        self.elapse(3 * REDIAL_S)

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def starts(self, seat: int) -> None:
        core = self.cores[seat] = CoreProcess(self, seat)
        self.all.append(core)

    def expects(self, holds: bool, fault: str) -> None:
        """Note what does not hold; callbacks of loops swallow what is raised."""
        if not holds:
            self.faults.append(fault)

    def elapse(self, seconds: float) -> None:
        """Let time pass."""
        until_s = self.clock() + seconds
        while True:
            for _ in range(2):
                for core in self.cores:
                    if core is not None:
                        core.turn()
                for replica in self.replicas:
                    replica.turn()
            if (left_s := until_s - self.clock()) <= 1e-9:
                break
            self.clock.run_until(self.clock() + min(left_s, QUANTUM_S))

    @property
    def decider(self) -> CoreProcess | None:
        """The core with the newest epoch that decides and was not deposed."""
        able = [core for core in self.cores if core is not None and not core.dead and core.host.decides]
        return max(able, key=lambda core: core.lease.epoch, default=None)

    # The engine

    def begins(self, call: ModelCall) -> None:
        """Take a request in."""
        grant = call.inflight.grant
        assert grant is not None
        self.expects(call.id not in self.at_engine, f"{call.id} was sent twice")
        self.expects(grant.epoch >= call.process.highest, f"{call.id} goes by a grant of an epoch that is over")
        self.at_engine.add(call.id)
        self.most = max(self.most, len(self.at_engine))
        self.expects(len(self.at_engine) <= BOUND, f"{len(self.at_engine)} at the engine, {BOUND} are allowed")

    def leaves(self, call: ModelCall, after_s: float = 0.0) -> None:
        """Let go of a request, soon after it was hung up."""
        if after_s:
            self.clock.call_later(after_s, lambda: self.at_engine.discard(call.id))
        else:
            self.at_engine.discard(call.id)

    # What may happen

    def enters(self, at: int) -> None:
        process = self.replicas[at]
        if process.serving is not None and self.clock() >= process.frozen_until_s:
            call = ModelCall(process, process.serving, self.next_number())
            self.calls[call.id] = call
            process.calls.append(call)
            call.begin()

    def pick(self, at: int, pick: int, *, at_engine: bool) -> ModelCall | None:
        process = self.replicas[at]
        able = [call for call in process.calls if call.open and call.at_engine is at_engine]
        return able[pick % len(able)] if able and self.clock() >= process.frozen_until_s else None

    def replica_dies(self, at: int) -> None:
        """Kill a replica; another one takes its place."""
        process = self.replicas[at]
        process.die()
        self.gone.append(process)
        self.replicas[at] = ReplicaProcess(self, f"r{at}+{self.next_number()}")

    # What holds

    def look(self) -> None:
        """Raise what did not hold up to now."""
        assert not self.faults, self.faults[0]
        assert len(self.at_engine) <= BOUND, f"{len(self.at_engine)} at the engine, {BOUND} are allowed"
        listed = {key.rpartition("/")[2] for key in self.store.scan(f"pool/{POOL}/replica/")}
        for process in self.replicas:
            held = [call.id for call in process.calls if call.at_engine]
            assert not held or process.name in listed, f"{process.name} holds {held}, and no next core would know"
            if process.serving is not None:
                process.serving.check_integrity()
        for core in self.cores:
            if core is not None and core.runs:
                core.serving.check_integrity()
        for call in self.calls.values():
            assert call.ended <= 1, f"{call.id} ended {call.ended} times"

    def heal(self) -> None:
        """Let all that is broken be well again, as far as it lives."""
        for core in self.cores:
            if core is not None and not core.dead:
                core.frozen_until_s = core.store.away_until_s = 0.0
                core.store.faults.clear()
        for process in self.replicas:
            process.frozen_until_s = process.late_until_s = 0.0

    def finish(self, flows_s: float) -> None:
        """Let everything come to its end: calls flow again in time, none is lost, nothing is left."""
        self.heal()
        begun_s, waits = self.clock(), [call for call in self.calls.values() if call.open]
        while any(call.open for call in self.calls.values()):
            took_s = self.clock() - begun_s
            flowed = not waits or any(call.at_engine or not call.open for call in waits)
            assert flowed or took_s < flows_s, f"nothing flows {took_s:.1f} s after all is well again"
            assert took_s < flows_s + len(self.calls), "calls are lost"
            for call in self.calls.values():
                if call.at_engine:
                    call.ends()
            self.elapse(0.3)
            self.look()
        self.elapse(LEASE_S + LETS_GO_S + 2.0)
        self.look()
        core = self.decider
        assert core is not None
        queue = core.serving.schedulers["a"].queue
        assert (queue.in_flight, queue.waiting) == (0, 0), "every grant came back"
        assert all(call.ended == 1 for call in self.calls.values() if not call.process.dead)
        for each in self.all:
            ids = [record.id for record in each.serving.records.records()]
            assert len(ids) == len(set(ids)), "a core records a call once"

    def close(self) -> None:
        for process in (*self.replicas, *self.gone):
            process.close()
        for core in self.all:
            core.close()
        self._patch.undo()
