"""A model of replicas, an engine and cores that die, come late and freeze; what it asserts holds at every moment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from orla_lg.link.messages import Bye, Grant, Message, Ready, Refused, Welcome
from tests.serve.scripted import Core, Replica, World, adopted, end, enter, first, missed

BOUND = 2
LEASE_S = 3.0
"""Of replicas; shorter than usual, so that fewer ticks pass."""

LETS_GO_S = 1.0
"""``orphans.SILENT_LETS_GO_S``, shorter than usual too."""

ENGINE_NOTICES_S = 0.8 * LETS_GO_S
"""A hung-up request is gone from the engine after so long: the core must wait for longer."""


@dataclass
class ModelCall:
    id: str
    arrived_s: float
    waits: bool = True
    granted: bool = False
    attempt: int = 0
    epoch: int = 0
    first: bool = False
    retries: bool = False
    """It missed, so it may pause before it waits again."""
    demoted: bool = False
    """It comes after others of its age: its replica was cut off then, or for longer than places are kept."""
    ended: int = 0


@dataclass
class Process:
    """A replica as the real one behaves: it keeps what waits and what it holds, and says both on each connection."""

    replica: Replica
    calls: dict[str, ModelCall] = field(default_factory=dict)
    unconfirmed: list[str] = field(default_factory=list)
    """Calls that ended while there was no connection."""
    core: Core | None = None
    epoch: int = 0
    lost_s: float | None = None
    dead: bool = False
    entered: set[str] = field(default_factory=set)
    """Calls that the present core has heard of."""

    def open(self) -> list[ModelCall]:
        return [call for call in self.calls.values() if not call.ended]


class Machine:
    """All of it. Every method is one thing that may happen."""

    def __init__(self, *, replicas: int = 3, heeds_roster: bool = True) -> None:
        self.world = World()
        self.heeds_roster = heeds_roster
        self.at_engine: set[str] = set()
        self.worst = 0
        self.faults: list[AssertionError] = []
        self.granted: list[ModelCall] = []
        """Since it was last looked at."""
        self.number = 0
        self.core = self._core()
        self.processes = [Process(Replica(self.world, f"r{n}")) for n in range(replicas)]
        for process in self.processes:
            process.replica.on_message = lambda message, process=process: self._heard(process, message)  # type: ignore[misc]
            self._connect(process)

    def _core(self) -> Core:
        core = Core(self.world, bound=BOUND, replica_lease_s=LEASE_S, heeds_roster=self.heeds_roster)
        core.start()
        self.began_s = self.world.clock()
        return core

    # What replicas do by themselves

    def _heard(self, process: Process, message: Message) -> None:
        try:
            self._take(process, message)
        except AssertionError as fault:  # the loop's callbacks swallow it
            self.faults.append(fault)

    def _take(self, process: Process, message: Message) -> None:
        if isinstance(message, Welcome):
            process.epoch = max(process.epoch, message.epoch)
        if isinstance(message, Bye):
            process.entered.clear()
        if isinstance(message, Grant):
            self._granted(process, message)
        if isinstance(message, Refused):
            call = process.calls[message.call]
            assert not call.granted and not call.ended, f"{call.id} was refused while it ran"
            call.ended += 1
            call.waits = False

    def _granted(self, process: Process, grant: Grant) -> None:
        call = process.calls.get(grant.call)
        if process.dead or call is None or call.ended or grant.epoch < process.epoch:
            return
        if (grant.epoch, grant.attempt) <= (call.epoch, call.attempt):
            assert call.granted or call.retries, "the same grant again, for a call that holds it"
            return
        assert not call.granted, f"{call.id} was granted twice"
        self.granted.append(call)
        call.waits, call.granted, call.retries = False, True, False
        call.epoch, call.attempt, call.first = grant.epoch, grant.attempt, False
        self.at_engine.add(call.id)
        self.worst = max(self.worst, len(self.at_engine))
        assert len(self.at_engine) <= BOUND, f"{len(self.at_engine)} at the engine, {BOUND} are allowed"

    def _in_order(self, granted: ModelCall) -> None:
        if granted.demoted or granted.attempt > 1:
            return
        for process in self.processes:
            if process.dead or process.core is not self.core or not process.replica.connected:
                continue
            for call in process.open():
                if call.waits and call.id in process.entered and not (call.retries or call.demoted):
                    assert call.arrived_s >= granted.arrived_s - 1e-6, f"{granted.id} went before {call.id}"

    def _connect(self, process: Process) -> None:
        """Connect and say everything, as a replica does."""
        replica, core = process.replica, self.core
        away_s = 0.0 if process.lost_s is None else self.world.clock() - process.lost_s
        late = process.core is not core and self.world.clock() >= self.began_s + LEASE_S
        same = process.core is core
        process.core, process.lost_s = core, None
        process.entered.clear()
        replica.connect(core, ready=False)
        if not replica.connected:
            process.lost_s = self.world.clock()
            return
        self.at_engine.difference_update(process.unconfirmed)  # by now
        said: list[Any] = [end(call) for call in process.unconfirmed]
        process.unconfirmed.clear()
        for call in sorted(process.open(), key=lambda each: each.arrived_s):
            age_s = self.world.clock() - call.arrived_s
            if call.granted:
                said.append(adopted(call.id, attempt=call.attempt, first=call.first, age_s=age_s))
            else:
                call.demoted = call.demoted or away_s >= LEASE_S or late
                call.retries = call.retries and same
                attempts = call.attempt if call.epoch == process.epoch else 0
                said.append(enter(call.id, age_s=age_s, attempts=attempts))
        replica.tell(*said, Ready())
        process.entered.update(call.id for call in process.open())
        self.look()

    # What may happen

    def enters(self, at: int) -> None:
        process = self.processes[at]
        self.number += 1
        call = ModelCall(f"{process.replica.name}-c{self.number}", self.world.clock())
        process.calls[call.id] = call
        if process.replica.connected:
            process.replica.say(enter(call.id))
            process.entered.add(call.id)
        else:
            call.demoted = True
        self.passes(0.01)

    def answers(self, at: int, pick: int) -> None:
        """The first token of a call comes."""
        if (call := self._pick(at, pick, granted=True)) is not None and not call.first:
            call.first = True
            self.processes[at].replica.tell(first(call.id, call.attempt))
            self.look()

    def ends(self, at: int, pick: int) -> None:
        if (call := self._pick(at, pick, granted=True)) is not None:
            self._end(self.processes[at], call)

    def cancels(self, at: int, pick: int) -> None:
        if (call := self._pick(at, pick, granted=False)) is not None:
            self._end(self.processes[at], call)

    def _end(self, process: Process, call: ModelCall, *, notices_s: float = 0.0) -> None:
        call.ended += 1
        call.granted = call.waits = False
        if notices_s:
            self.world.clock.call_later(notices_s, lambda: self.at_engine.discard(call.id))
        else:
            self.at_engine.discard(call.id)
        if process.replica.connected:
            process.replica.tell(end(call.id))
        else:
            process.unconfirmed.append(call.id)
        self.look()

    def misses(self, at: int, pick: int) -> None:
        """An attempt fails before its first token."""
        call = self._pick(at, pick, granted=True)
        process = self.processes[at]
        if call is None or call.first or not process.replica.connected:
            return
        call.granted, call.waits, call.retries = False, True, True
        self.at_engine.discard(call.id)
        process.replica.tell(missed(call.id, call.attempt, overloaded=True))
        self.look()

    def _pick(self, at: int, pick: int, *, granted: bool) -> ModelCall | None:
        process = self.processes[at]
        able = [call for call in process.open() if call.granted is granted]
        return able[pick % len(able)] if able else None

    def drops(self, at: int) -> None:
        """A connection ends without a word."""
        process = self.processes[at]
        if process.replica.connected:
            process.replica.drop()
            process.lost_s = self.world.clock()
        self.look()

    def returns(self, at: int) -> None:
        process = self.processes[at]
        if not process.replica.connected:
            self._connect(process)

    def passes(self, seconds: float) -> None:
        """Time passes; a replica that has no core for a lease ends its own requests."""
        until_s = self.world.clock() + seconds
        while True:
            left_s = until_s - self.world.clock()
            self.world.settle(min(0.25, max(0.0, left_s)))
            for process in self.processes:
                if process.lost_s is None and not process.replica.connected:
                    process.lost_s = self.world.clock()
                if process.lost_s is not None and self.world.clock() - process.lost_s >= LEASE_S - 0.3:
                    for call in process.open():
                        if call.granted:
                            self._end(process, call, notices_s=ENGINE_NOTICES_S)
            if left_s <= 0.25:
                break
        self.look()

    def blips(self, at: int) -> None:
        """A connection is lost and there again."""
        self.drops(at)
        self.returns(at)

    def dies(self, at: int) -> None:
        """A replica is killed; its engine notices a little later. Another process takes its place."""
        process = self.processes[at]
        process.dead = True
        if process.replica.connected:
            process.replica.drop()
        held = [call.id for call in process.open() if call.granted]
        self.world.clock.call_later(ENGINE_NOTICES_S, lambda: self.at_engine.difference_update(held))
        self.number += 1
        another = self.processes[at] = Process(Replica(self.world, f"{process.replica.name}+{self.number}"))
        another.replica.on_message = lambda message: self._heard(another, message)
        self._connect(another)

    def core_dies(self, late: list[int]) -> None:
        """The core is killed and another begins; some replicas come late, the others at once."""
        self.core.kill()
        self._lost_all()
        self.passes(0.2)
        self.core = self._core()
        for at, process in enumerate(self.processes):
            if at not in late:
                self._connect(process)
        self.look()

    def core_freezes(self, late: list[int]) -> None:
        """The core stands still for longer than its lease; another begins, and the frozen one goes on beside it."""
        old, timer = self.core, self.core.host._timer
        assert timer is not None
        timer.cancel()
        for process in self.processes:
            if process.replica.wire is not None:
                process.replica.wire.open = False  # nothing is read from it; replicas end such a connection
        self._lost_all()
        self.core = self._core()
        for at, process in enumerate(self.processes):
            if at not in late:
                self._connect(process)
        queue = old.serving.schedulers["a"].queue
        queue.max_concurrency, granted = 100, queue.granted
        old.host._go_on()  # it goes on, and has not looked at its lease yet
        assert queue.granted == granted, "a core that stood still grants nothing"
        old.host._tick()
        assert old.deposed, "a core that was replaced finds out before it does anything"
        self.look()

    def _lost_all(self) -> None:
        for process in self.processes:
            if process.lost_s is None:
                process.lost_s = self.world.clock()

    # What holds

    def look(self) -> None:
        if self.faults:
            raise self.faults[0]
        granted, self.granted = self.granted, []
        for call in granted:
            self._in_order(call)
        self.core.serving.check_integrity()
        queue = self.core.serving.schedulers["a"].queue
        assert len(self.at_engine) <= BOUND, f"{len(self.at_engine)} at the engine, {BOUND} are allowed"
        assert queue.in_flight - queue.extra <= BOUND
        for process in self.processes:
            assert all(call.ended <= 1 for call in process.calls.values())

    def finish(self) -> None:
        """Let everything come to its end: nothing is lost, nothing is left."""
        for at in range(len(self.processes)):
            self.returns(at)
        for _ in range(200):
            waiting = [call for process in self.processes for call in process.open()]
            if not waiting:
                break
            for at, process in enumerate(self.processes):
                if not process.replica.connected:
                    self.returns(at)
                for call in process.open():
                    if call.granted:
                        self._end(process, call)
            self.passes(0.5)
        lost = [call for process in self.processes for call in process.open()]
        assert not lost, f"lost: {lost}"
        self.passes(LEASE_S + 6.0)
        queue = self.core.serving.schedulers["a"].queue
        assert (queue.in_flight, queue.waiting) == (0, 0), "every grant came back"
        assert not self.core.host.recovery._held
        for core in self.world.cores:
            ids = [record.id for record in core.serving.records.records()]
            assert len(ids) == len(set(ids)), "a core records a call once"

    def close(self) -> None:
        self.world.close()
