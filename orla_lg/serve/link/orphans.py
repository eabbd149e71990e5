"""The calls of replicas that are lost: how long their grants stay out, and when they are given back.

A replica that was cut off comes back within its lease and adopts them, or ends its requests when the lease is over;
one that is gone has ended them already. Even then an engine may still be busy with them: it notices a hang-up when it
looks, and a replica that is frozen hangs nothing up. So a grant is given back once the engine runs fewer requests
than are counted on it, by its own report, or after a bound of time where it does not say.

Of a replica that was silent during the recovery this core does not know what it holds. It may be all places that are
free when the recovery ends: they are kept back (``BackendQueue.kept_back``), and given back by the same reports.

What a report leaves for lost replicas is what it counts less the calls of others that are there for certain. A call
that was granted shortly before may be on its way, and one whose replica is away may have ended unheard, so the figure
is too high whenever there is such a call: under load it nearly always is. Nothing is added to what lost replicas have
at an engine, though, so the lowest figure holds on: what reports before and after it count matters not. Where chance
brings no report without such a call, the core brings it about: for a moment it grants nothing at that engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import inf

from orla_lg.core.boundary.plain import counted
from orla_lg.core.engine.capabilities import EngineStats
from orla_lg.core.serving import Serving
from orla_lg.link.calls import LETS_GO_S
from orla_lg.link.messages import RENEW_S
from orla_lg.link.whereabouts import is_gone
from orla_lg.serve.link.hosted import HostedCall
from orla_lg.serve.link.hush import Hush
from orla_lg.serve.link.roster import Listed, Replica

log = logging.getLogger("orla_lg")

SILENT_LETS_GO_S = LETS_GO_S
"""An engine that does not say what it runs has let go of a request that was hung up so long ago."""

TELLING_LETS_GO_S = 60.0
"""One that says so, too, if its figures never show it: many calls begin there each second, or others use it."""

KEPT_BACK_S = 600.0
"""Places are kept back so long at most: their figures are from a time without such calls, but others may use it."""

SETTLED_S = 0.5
"""A call that was granted so long before a report was asked for, and goes on after it, is among those it counts."""

ON_ITS_WAY_S = 0.1
"""So long after a report a call may still count that had ended at the engine before it."""

QUIET_S = 1.5 * RENEW_S
"""A replica of which nothing came for so long may be frozen, and not have sent what it was granted."""

AGREEING = 2
"""So many reports must show that a call is gone."""

LOST = "the replica of the call was lost"


@dataclass(eq=False, slots=True)
class _Watched:
    """An engine that may be busy with requests of lost replicas."""

    hush: Hush
    since_s: dict[int, float] = field(default_factory=dict)
    """By arrival number, when a call was first seen to have a grant there."""
    orphans: frozenset[HostedCall] = frozenset()
    """The calls of lost replicas that its reports were held against."""
    latest: deque[int] = field(default_factory=lambda: deque(maxlen=AGREEING))
    """How many requests of lost replicas its last reports leave room for."""
    lowest: list[int] = field(default_factory=list)
    """The ``AGREEING`` lowest of these figures."""
    kept_s: float = 0.0
    """Since when places are kept back there."""

    def settled(self, at_s: float) -> set[int]:
        """Return the calls that were granted so long before a moment that they were at the engine then."""
        return {order for order, since_s in self.since_s.items() if since_s <= at_s - SETTLED_S}

    def take(self, orphans: frozenset[HostedCall], left: int) -> None:
        """Take in how many requests of lost replicas a report leaves room for, *orphans* among them."""
        more = len(orphans - self.orphans)
        self.orphans = orphans
        self.latest.append(left)
        self.lowest = sorted([*(each + more for each in self.lowest), left])[:AGREEING]

    @property
    def most(self) -> float:
        """Requests of lost replicas that are there at most, by all that its reports have shown."""
        return self.lowest[-1] if len(self.lowest) == AGREEING else inf


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
        self._silent: dict[str, Listed] = {}
        """Replicas that did not say what they hold, by id: the recovery waits for them no more."""
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
        for name in [*self._watched]:
            self._leave(name)

    def look(self, now: float, waits_for: Collection[str] = ()) -> list[Replica]:
        """Give back what is due; returns the replicas of which nothing is left.

        While the recovery *waits for* replicas all engines are watched, so that their figures are there when it ends.
        """
        lost = [replica for replica in self._replicas.values() if replica.lost_s is not None]
        kept = [name for name, scheduler in self._serving.schedulers.items() if scheduler.queue.kept_back]
        if not (lost or kept or waits_for):
            for name in [*self._watched]:
                self._leave(name)
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
        used = {call.inflight.backend or "" for replica in lost for call in replica.calls.values()}
        wanted = used.union(self._serving.schedulers if waits_for else kept)
        for name in self._watched.keys() - wanted:
            self._leave(name)
        for name in wanted:
            self._watch(name, now)
        for replica, call in list(self._all()):
            if call.inflight.backend is None or (
                replica.over_s is not None and now >= replica.over_s + self._bound_s(call.inflight.backend)
            ):  # it went past the core, and holds nothing here
                self._give_back(replica, call)
        for name in kept:
            if now >= self._watched[name].kept_s + KEPT_BACK_S:
                self._free(name, self._serving.schedulers[name].queue.kept_back)
        return [
            replica
            for replica in lost
            if replica.over_s is not None
            and not replica.calls
            and (replica.said_all or not (replica.id in waits_for or replica.id in self._silent))
        ]

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
        watched = self._watched.get(backend)
        return TELLING_LETS_GO_S if watched is not None and watched.latest else SILENT_LETS_GO_S

    # Replicas that do not say what they hold

    def silent(self, listed: Listed, now: float) -> None:
        """Keep back what a replica may hold that the recovery waits for no more; only engines that tell show it."""
        self._silent[listed.id] = listed
        for name, watched in self._watched.items():
            scheduler = self._serving.schedulers.get(name)
            if scheduler is None or not watched.latest or (bound := scheduler.queue.max_concurrency) is None:
                continue
            with scheduler.changing():
                queue = scheduler.queue
                queue.kept_back, watched.kept_s = max(0, bound - queue.in_flight), now
            watched.lowest = sorted(watched.latest)  # what came to the engine before is in the last reports alone
            self._judge(name)
            if queue.kept_back:
                log.warning(
                    "backend %r: %s kept back, since the engine runs requests that may be those of replica %s, which "
                    "says nothing", name, counted(queue.kept_back, "place"), listed.id,
                )  # fmt: skip

    def spoke(self, replica: Replica) -> None:
        """Note that a replica said all that it holds, or that it holds nothing any more."""
        if self._silent.pop(replica.id, None) is None:
            return
        for name, scheduler in self._serving.schedulers.items():
            if scheduler.queue.kept_back:
                said = sum(
                    call.granted is not None and call.inflight.backend == name for call in replica.calls.values()
                )
                self._free(name, said if self._silent else scheduler.queue.kept_back)

    def settled(self) -> list[Listed]:
        """Return the silent replicas, once, when nothing is kept back for any of them."""
        if not self._silent or any(each.queue.kept_back for each in self._serving.schedulers.values()):
            return []
        settled, self._silent = [*self._silent.values()], {}
        return settled

    def _free(self, backend: str, places: int) -> None:
        """Give places back that were kept."""
        if places > 0:
            scheduler = self._serving.schedulers[backend]
            with scheduler.changing():
                scheduler.queue.kept_back = max(0, scheduler.queue.kept_back - places)
            if not self._at_stake(backend):
                self._watched[backend].hush.end(self._serving.clock())

    # What engines say

    def _watch(self, backend: str, now: float) -> None:
        """Have an engine asked for its load, and note what is granted there."""
        scheduler, watched = self._serving.schedulers.get(backend), self._watched.get(backend)
        if watched is not None and watched.hush.scheduler is not scheduler:  # removed, or another one by a reload
            self._leave(backend)
        if scheduler is None or scheduler.load is None:
            return
        scheduler.load.wanted(scheduler.health.probe, often=True)
        watched = self._watched.get(backend)
        if watched is None:
            watched = self._watched[backend] = _Watched(Hush(scheduler, AGREEING))
        watched.since_s = {order: watched.since_s.get(order, now) for order in scheduler.granted_orders()}
        watched.hush.look(now, at_stake=self._at_stake(backend), tells=bool(watched.latest))

    def _leave(self, backend: str) -> None:
        """Watch an engine no more."""
        self._watched.pop(backend).hush.end(self._serving.clock())

    def _at_stake(self, backend: str) -> bool:
        """Whether an engine's reports decide anything."""
        return bool(self._serving.schedulers[backend].queue.kept_back or self._orphans(backend))

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
            self._loop.call_later(
                ON_ITS_WAY_S, self._take, watched, backend, at_engine, watched.settled(asked_s), asked_s
            )

    def _take(self, watched: _Watched, backend: str, at_engine: int, settled: set[int], asked_s: float) -> None:
        scheduler = self._serving.schedulers.get(backend)
        if scheduler is None or watched is not self._watched.get(backend):
            return
        granted = scheduler.granted_orders()
        others = len(settled & granted - self._doubted(backend))
        watched.take(frozenset(call for _, call in self._orphans(backend)), max(0, at_engine - others))
        self._judge(backend)
        watched.hush.reported(self._serving.clock(), asked_s, SETTLED_S, ended_since=not settled <= granted)

    def _judge(self, backend: str) -> None:
        """Give back as much of what is counted for lost replicas as reports show to be gone."""
        orphans, kept = self._orphans(backend), self._serving.schedulers[backend].queue.kept_back
        gone = len(orphans) + kept - self._watched[backend].most
        if gone > 0:
            self._free(backend, min(int(gone), kept))
            for replica, call in orphans[: max(0, int(gone) - kept)]:
                self._give_back(replica, call)

    def _orphans(self, backend: str) -> list[tuple[Replica, HostedCall]]:
        return [(replica, call) for replica, call in self._all() if call.inflight.backend == backend]

    def _doubted(self, backend: str) -> set[int]:
        """Return the calls with a grant, by arrival number, that may not be at the engine any more, or not yet."""
        now = self._serving.clock()
        return {
            at[1]
            for replica in self._replicas.values()
            if replica.session is None or now < replica.trusted_s or now > replica.session.heard_s + QUIET_S
            for call in replica.calls.values()
            if (at := call.inflight.waits_at) is not None and at[0] == backend
        }
