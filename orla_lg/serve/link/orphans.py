"""The calls of replicas that are lost: how long their grants stay out, and when they are given back.

A replica that was cut off comes back within its lease and adopts them, or ends its requests when the lease is over;
one that is gone has ended them already. Even then an engine may still be busy with them: it notices a hang-up when it
looks. So a grant is given back once the engine runs fewer requests than are counted on it, by its own report, or
after a bound of time where it does not say.

What a report leaves for calls of lost replicas is what it counts less the calls of others that are there for certain.
A call that was granted shortly before may be on its way, and one whose replica is away may have ended unheard, so the
figure is too high whenever there is such a call: under load it nearly always is. Nothing is added to what lost
replicas have at an engine, though, so the lowest figure holds on: what reports before and after it count matters not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from orla_lg.core.boundary.plain import counted
from orla_lg.core.engine.capabilities import EngineStats
from orla_lg.core.serving import Serving
from orla_lg.link.calls import LETS_GO_S
from orla_lg.link.whereabouts import is_gone
from orla_lg.serve.link.hosted import HostedCall
from orla_lg.serve.link.roster import Replica

log = logging.getLogger("orla_lg")

SILENT_LETS_GO_S = LETS_GO_S
"""An engine that does not say what it runs has let go of a request that was hung up so long ago."""

TELLING_LETS_GO_S = 60.0
"""One that says so, too, if its figures never show it: others may use it beside us."""

SETTLED_S = 0.5
"""A call that was granted so long before a report was asked for, and goes on after it, is among those it counts."""

ON_ITS_WAY_S = 0.1
"""So long after a report a call may still count that had ended at the engine before it."""

AGREEING = 2
"""So many reports must show that a call is gone."""

LOST = "the replica of the call was lost"


@dataclass(eq=False, slots=True)
class _Watched:
    """An engine with calls of lost replicas."""

    since_s: dict[int, float] = field(default_factory=dict)
    """By arrival number, when a call was first seen to have a grant there."""
    orphans: frozenset[HostedCall] = frozenset()
    """The calls of lost replicas that its reports were held against."""
    left: list[int] = field(default_factory=list)
    """How many of them are still there at most: the ``AGREEING`` lowest figures of its reports."""

    def settled(self, at_s: float) -> set[int]:
        """Return the calls that were granted so long before a moment that they were at the engine then."""
        return {order for order, since_s in self.since_s.items() if since_s <= at_s - SETTLED_S}

    def left_of(self, orphans: frozenset[HostedCall], left: int) -> int:
        """Take in how many calls of lost replicas a report leaves room for; returns how many are there at most."""
        more = len(orphans - self.orphans)
        self.left = sorted([*(each + more for each in self.left), left])[:AGREEING]
        self.orphans = orphans
        return self.left[-1] if len(self.left) == AGREEING else len(orphans)


class Orphans:
    """Gives the grants of lost replicas back. Of the loop's thread.

    Args:
        serving: The core.
        replicas: All that are known, by id.
        lease_s: A replica without a core for so long ends its requests.
    """

    def __init__(self, serving: Serving, replicas: dict[str, Replica], lease_s: float) -> None:
        self._serving = serving
        self._replicas = replicas
        self._lease_s = lease_s
        self._watched: dict[str, _Watched] = {}
        self._loop = asyncio.get_running_loop()
        self._ends: list[Callable[[], None]] = []
        for name, scheduler in serving.schedulers.items():
            report = partial(self._told, name)
            scheduler.reports.append(report)
            self._ends.append(partial(scheduler.reports.remove, report))

    def close(self) -> None:
        """Hear of no engine any more."""
        for end in self._ends:
            end()
        self._ends = []

    def look(self, now: float) -> list[Replica]:
        """Give back what is due; returns the replicas of which nothing is left."""
        lost = [replica for replica in self._replicas.values() if replica.lost_s is not None]
        if not lost:
            self._watched.clear()
            return []
        for replica in lost:
            assert replica.lost_s is not None
            if replica.over_s is None and (
                now >= replica.lost_s + self._lease_s or is_gone(replica.host, replica.pid)
            ):
                replica.over_s = now
                if replica.calls:
                    log.warning(
                        "replica %s (%s, process %d) does not come back; it held %s", replica.id,
                        replica.host.partition(" ")[0], replica.pid, counted(len(replica.calls), "grant"),
                    )  # fmt: skip
        names = {call.inflight.backend or "" for _, call in self._all()}
        for name in self._watched.keys() - names:
            del self._watched[name]
        for name in names:
            self._watch(name, now)
        for replica, call in list(self._all()):
            if call.inflight.backend is None or (
                replica.over_s is not None and now >= replica.over_s + self._bound_s(call.inflight.backend)
            ):  # it went past the core, and holds nothing here
                self._give_back(replica, call)
        return [replica for replica in lost if replica.over_s is not None and not replica.calls]

    def _all(self) -> Iterator[tuple[Replica, HostedCall]]:
        """Yield the calls of replicas that are over."""
        for replica in self._replicas.values():
            if replica.over_s is not None:
                for call in replica.calls.values():
                    yield replica, call

    def _give_back(self, replica: Replica, call: HostedCall) -> None:
        del replica.calls[call.inflight.call.id]
        call.give_up(LOST)

    def _bound_s(self, backend: str) -> float:
        scheduler = self._serving.schedulers[backend]
        tells = scheduler.load is not None and scheduler.load.latest is not None
        return TELLING_LETS_GO_S if tells else SILENT_LETS_GO_S

    # What engines say

    def _watch(self, backend: str, now: float) -> None:
        """Have an engine asked for its load, and note what is granted there."""
        scheduler = self._serving.schedulers.get(backend)
        if scheduler is None or scheduler.load is None:
            return
        scheduler.load.wanted(scheduler.health.probe)
        watched = self._watched.setdefault(backend, _Watched())
        watched.since_s = {order: watched.since_s.get(order, now) for order in scheduler.granted_orders()}

    def _told(self, backend: str, stats: EngineStats) -> None:
        """Take in an engine's report; called in the background's thread."""
        scheduler = self._serving.schedulers.get(backend)
        if backend in self._watched and scheduler is not None and scheduler.load is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                self._loop.call_soon_threadsafe(self._reported, backend, stats, scheduler.load.asked_s)

    def _reported(self, backend: str, stats: EngineStats, asked_s: float) -> None:
        watched = self._watched.get(backend)
        if watched is not None and stats.running is not None:
            at_engine = stats.running + (stats.waiting or 0)
            self._loop.call_later(ON_ITS_WAY_S, self._judge, backend, at_engine, watched.settled(asked_s))

    def _judge(self, backend: str, at_engine: int, settled: set[int]) -> None:
        """Give back as many calls of lost replicas as reports show to be gone."""
        watched, scheduler = self._watched.get(backend), self._serving.schedulers.get(backend)
        orphans = [(replica, call) for replica, call in self._all() if call.inflight.backend == backend]
        if watched is None or scheduler is None or not orphans:
            return
        unsure = {
            at[1]
            for replica in self._replicas.values() if replica.lost_s is not None
            for call in replica.calls.values() if (at := call.inflight.waits_at) is not None and at[0] == backend
        }  # fmt: skip
        others = len((settled & scheduler.granted_orders()) - unsure)
        left = watched.left_of(frozenset(call for _, call in orphans), max(0, at_engine - others))
        for replica, call in orphans[left:]:
            self._give_back(replica, call)
