"""Both cores, the store, the engine and the replicas: what may happen to them, and what holds all the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from orla_lg.link import calls, connection, losses, serving
from orla_lg.serve.pools import succession
from orla_lg.serve.store.lease import CoreLease
from orla_lg.serve.store.store import Instant, MemoryStore
from orla_lg.testing.virtual import VirtualClock
from tests.serve.two.call import ModelCall
from tests.serve.two.core import POOL, CoreProcess
from tests.serve.two.replica import ReplicaProcess
from tests.serve.two.times import BOUND, LEASE_S, LETS_GO_S, QUANTUM_S, REDIAL_S


class TwoCores:
    """All of it. ``elapse`` lets time pass; the other methods are what may happen.

    Args:
        replicas: How many.
        tells: Whether the engine says what it runs.
        heeds_roster: Whether a core waits for the replicas of the one before.
        heeds_epochs: Whether replicas refuse older epochs.
        heeds_fences: Whether the store refuses writes of a core that was replaced.
        lease: A core's.
    """

    def __init__(
        self,
        *,
        replicas: int = 3,
        tells: bool = False,
        heeds_roster: bool = True,
        heeds_epochs: bool = True,
        heeds_fences: bool = True,
        lease: type[CoreLease] = CoreLease,
    ) -> None:
        self.heeds_roster, self.heeds_epochs, self.heeds_fences = heeds_roster, heeds_epochs, heeds_fences
        self.lease, self.tells = lease, tells
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
