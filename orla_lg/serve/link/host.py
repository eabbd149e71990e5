"""The core's side of the links: one ``LinkHost`` with its replicas, and one ``LinkSession`` for each connection.

All of it runs in one event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

from orla_lg.core.limits.limits import LimitScope
from orla_lg.core.placement.view import view_of
from orla_lg.core.serving import Serving
from orla_lg.errors import did_you_mean, shown
from orla_lg.link.framing import frame
from orla_lg.link.messages import PROTOCOL, SILENT_S, Flat, Hello, View, Welcome, flat
from orla_lg.link.views import changed_views, flat_backend, flat_limits, flat_mapping, flat_view
from orla_lg.link.whereabouts import here
from orla_lg.serve.access.budgets import HeldSlot
from orla_lg.serve.access.keys import allows
from orla_lg.serve.link import orphans
from orla_lg.serve.link.arrivals import LinkedCalls
from orla_lg.serve.link.flat import MOST_ID_CHARS, LinkCaller, SpokenKeys, named
from orla_lg.serve.link.recovery import Recovery
from orla_lg.serve.link.requests import Requests
from orla_lg.serve.link.roster import MOST_REPLICAS, Listed, Replica, Roster
from orla_lg.serve.link.session import COME_AGAIN, LinkSession
from orla_lg.serve.link.signals import RunSignals
from orla_lg.serve.pools.at_once import PooledSlots
from orla_lg.serve.pools.keeping import SliceKeeper
from orla_lg.serve.store.labels import LabelKeeper
from orla_lg.serve.store.lease import CoreLease, FencedStore
from orla_lg.serve.store.spent import SpentKeeper
from orla_lg.serve.store.store import Store, StoreUnavailable

log = logging.getLogger("orla_lg")

TICK_S = 0.1
"""How often views are compared and clocks looked at."""

STOOD_STILL_S = 1.0
"""A tick that is so late shows that this process stood still: what replicas sent meanwhile is still to be read."""

LEASE_POLL_S = 0.05
"""How often a standby asks for the lease: what is left of it is most of the time in which nothing is granted."""

VALID_AGAIN_S = 0.5
"""How often it is asked whether a connection's key still holds."""


class LinkHost:
    """Serves linked replicas with one core.

    Args:
        serving: The core.
        store: Where the roster is.
        lease: Of this core.
        replica_lease_s: A replica without a core for so long ends its own requests.
        key_envs: By backend, the environment variable in which replicas find its key.
        layers: The limits of a key, as layers of each of its calls.
        taken: Counts a call in among those of its key until it is released; raises, if it may refuse, where as many
            are in.
        pending: What a key's call should wait for before it is counted in; ``None``: nothing.
        is_valid: Whether a key still holds; asked every second for each connection.
        keys: Those in whose names gateways make calls.
        version: Of the package, for people.
        pool: That the core decides for.
        on_deposed: Called once when another core has taken over: nothing is decided here any more.
        heeds_roster: ``False`` grants without a wait for the replicas of the core before; for tests that show what
            that wait is for.
    """

    def __init__(
        self,
        serving: Serving,
        store: Store,
        lease: CoreLease,
        *,
        replica_lease_s: float = 10.0,
        key_envs: Mapping[str, str] | None = None,
        layers: Callable[[LinkCaller], Sequence[LimitScope]] = lambda caller: (),
        taken: Callable[[LinkCaller, bool], HeldSlot] = lambda caller, refuses: HeldSlot(),
        pending: Callable[[str | None], Future[None] | None] = lambda key_id: None,
        is_valid: Callable[[LinkCaller], bool] = lambda caller: True,
        keys: SpokenKeys | None = None,
        version: str = "",
        pool: str = "",
        on_deposed: Callable[[], None] = lambda: None,
        heeds_roster: bool = True,
    ) -> None:
        self.serving = serving
        self.lease = lease
        store = FencedStore(store, lease)
        self.roster = Roster(store)
        self.replica_lease_s = replica_lease_s
        self.replicas: dict[str, Replica] = {}
        """By id: those that are connected, and those that are lost and not over yet."""
        self._unlisted = dict[str, Hello]()
        """Replicas that are served although the store did not take them, by id."""
        self.sessions = set[LinkSession]()
        self.recovery = Recovery(self._go_on, self._gone, self._silent)
        self.signals = RunSignals(serving, lambda run: self.recovery.run_came(run.standing))
        self.requests = Requests(serving, keys)
        self.arrivals = LinkedCalls(serving, self.recovery, lambda: lease.epoch, layers, taken, keys, pending)
        self._spent = SpentKeeper(serving, store, lease.holds)
        self._labels = LabelKeeper(store, lease.holds)
        serving.guard.changed.append(self._policies_changed)
        self._orphans: orphans.Orphans | None = None
        self._key_envs = key_envs or {}
        self._is_valid = is_valid
        self.paced: Callable[[str], bool] | None = None
        """Whether a backend's rate lets another call go; ``None``: there are no rates."""
        self.slices: SliceKeeper | None = None
        """Of limits that other pools' cores keep too; ``None``: there are none."""
        self.version, self.pool = version, pool
        self.cores: Mapping[str, Sequence[str]] = {}
        """By pool, the URLs of its core and then of its standbys, as replicas are given them."""
        self._on_deposed = on_deposed
        self._heeds_roster = heeds_roster
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ticked_s = self._renew_at_s = self._valid_at_s = 0.0
        self._views: list[Flat] = []

    # Its life

    async def start(self, waits: Callable[[], None] = lambda: None) -> None:
        """Take the lease, waiting for it if another core has it, and begin; grants follow once replicas have spoken.

        Args:
            waits: Called when another core has it.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        self._gate()
        while not self.lease.take():
            waits()
            await asyncio.sleep(LEASE_POLL_S)
        self._spent.load()
        self._labels.join(self.serving.guard.flow)
        listed = self.roster.read() if self._heeds_roster else {}
        # All that may fail is done: from here on it decides.
        now = self._ticked_s = self.serving.clock()
        self._renew_at_s = now + self.lease.ttl_s / 3
        self._orphans = orphans.Orphans(self.serving, self.replicas, self.replica_lease_s)
        self.recovery.begin(listed, now, self.replica_lease_s + orphans.SILENT_LETS_GO_S)
        self.recovery.look(now)
        for scheduler in self.serving.schedulers.values():
            scheduler.health.connect()
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(TICK_S, self._tick)
        if self.slices is not None:
            self.slices.start()

    @property
    def decides(self) -> bool:
        """Whether this core has taken over and was not deposed."""
        return self._loop is not None and not self.lease.deposed

    def session(self, caller: LinkCaller, *, looks_on: bool = False) -> LinkSession:
        """Return the protocol of one connection of a key, or of another pool's core that looks on."""
        return LinkSession(self, caller, looks_on=looks_on)

    def _gate(self) -> None:
        """Let each queue ask whether this core may grant."""
        for name, scheduler in self.serving.schedulers.items():
            scheduler.queue.may_grant = partial(self._may_grant, name)

    def _may_grant(self, backend: str) -> bool:
        if self.paced is not None and not self.paced(backend):
            return False
        if self.slices is not None and not self.slices.book.may_grant():
            return False
        return self.recovery.over and self.lease.holds() and backend not in self.arrivals.slots_held

    def share_limits(self, store: Store, pool: str) -> PooledSlots:
        """Have limits hold over all pools of a store, from ``start`` on; returns what counts keys' calls at once."""
        self.slices = SliceKeeper(
            self.serving, store, pool, self.lease, is_recovered=lambda: self.recovery.over, go_on=self._go_on,
            ends_s=self.replica_lease_s + orphans.SILENT_LETS_GO_S,
        )  # fmt: skip
        return PooledSlots(self.slices.book)

    def _go_on(self) -> None:
        for scheduler in self.serving.schedulers.values():
            scheduler.go_on()

    def refresh(self) -> None:
        """Say again what is served, after a change of the configuration."""
        self._gate()
        for session in self.sessions:
            if session.replica is not None or session.views:
                session.send(self.welcome(session.caller))

    def _policies_changed(self) -> None:
        """Say to replicas whether access policies hold; in whichever thread they were changed."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.refresh)

    def bye(self, reason: str) -> None:
        """Say goodbye to all replicas, and go on: what they have at the engines counts until this core has ended."""
        for session in list(self.sessions):
            session.goodbye(reason)

    async def close(self, reason: str = "the server ends") -> None:
        """Say goodbye to all replicas, which wait for the next core, and let that take over at once. Idempotent."""
        self._end(reason)
        if self.slices is not None:
            await self.slices.close()
        await self._spent.written()
        self._spent.close()
        self.lease.give_up()
        await asyncio.sleep(0)

    def _end(self, reason: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._orphans is not None:
            self._orphans.close()
        for session in list(self.sessions):
            session.goodbye(reason)
        for replica in self.replicas.values():
            for call in replica.calls.values():  # the next core's
                call.withdraw()
            replica.calls.clear()

    # What time brings

    def _tick(self) -> None:
        assert self._loop is not None and self._orphans is not None
        self._timer = self._loop.call_later(TICK_S, self._tick)
        now = self.serving.clock()
        stood_still, self._ticked_s = now - self._ticked_s > STOOD_STILL_S, now
        if now >= self._renew_at_s:
            if self.lease.renew():
                self._go_on()
            self._renew_at_s = now if self.lease.store_away else now + self.lease.ttl_s / 3
            if self._unlisted and not self.lease.store_away:
                self._list()
            if self.lease.deposed:
                log.error("another core has taken over; this one decides nothing any more")
                self._end("another core has taken over")
                self._on_deposed()
                return
        for session in list(self.sessions):
            if stood_still:
                session.heard_s = now
            elif now - session.heard_s > SILENT_S:
                session.cut(f"nothing came from it for {SILENT_S:g} s")
        self.recovery.look(now)
        for replica in self._orphans.look(now, self.recovery.waits_for):
            self._strike(replica)
        for listed in self._orphans.settled():
            self._gone(listed)
        self._labels.look()
        self._push_views()
        if now >= self._valid_at_s:
            self._valid_at_s = now + VALID_AGAIN_S
            for session in list(self.sessions):
                if not self._is_valid(session.caller):
                    session.goodbye("the key of this link does not hold any more")
        self._spent.look(now)

    def _strike(self, replica: Replica) -> None:
        """Forget a replica of which nothing is left."""
        self.arrivals.end_all(replica, "the call's replica has ended")
        self.arrivals.lost(replica)  # those that have not entered yet: nobody would give their grants back
        self.recovery.drop_all(replica.id)
        self.signals.end_all(replica)
        replica.places.clear()
        self.replicas.pop(replica.id, None)
        self.recovery.spoke(replica.id)
        try:
            self.roster.remove(replica.id)
        except StoreUnavailable as error:  # the next core waits a lease for it, no more
            log.warning("replica %s stays in the store: %s", replica.id, error)

    def _silent(self, listed: Listed) -> None:
        """Leave it to the engines what a replica may hold that said nothing."""
        assert self._orphans is not None
        self._orphans.silent(listed, self.serving.clock())

    def _gone(self, listed: Listed) -> None:
        """Strike a replica out for good that never came here; what is known here ends by its connection instead."""
        if listed.id in self.replicas:
            return
        try:
            self.roster.strike(listed)
        except StoreUnavailable as error:  # the next core waits a lease for it, no more
            log.warning("replica %s stays in the store: %s", listed.id, error)

    # What replicas see

    def welcome(self, caller: LinkCaller) -> Welcome:
        """Return what a replica must know of this core."""
        serving, envs = self.serving, self._key_envs
        backends = [
            flat_backend(scheduler.backend, api_key_env=envs.get(name), warms=scheduler.prefetcher.able)
            for name, scheduler in serving.schedulers.items()
            if _may_use(caller, name)
        ]
        return Welcome(
            PROTOCOL, self.lease.epoch, self.version, backends, _of(caller, self._seen()),
            flat_mapping(serving.mappings), flat_limits(serving.limits.shared), self.replica_lease_s,
            self.lease.ttl_s, max(1, self.connected), caller.tenants, serving.guard.restricts, self.cores, self.pool,
            self._pools(caller), here(),
        )  # fmt: skip

    def _pools(self, caller: LinkCaller) -> list[Flat]:
        """Return the backends of all pools in their order, those of others as they are configured."""
        serving, envs = self.serving, self._key_envs
        if (elsewhere := serving.schedulers.elsewhere) is None:
            return []
        found = list[Flat]()
        for view in serving.views():
            if not _may_use(caller, view.name):
                continue
            if (backend := elsewhere.backend(view.name)) is None:
                found.append({"name": view.name, "pool": self.pool})
            else:
                found.append({**flat_backend(backend, api_key_env=envs.get(view.name)), "pool": view.pool})
        return found

    @property
    def connected(self) -> int:
        """How many replicas are connected."""
        return sum(replica.session is not None for replica in self.replicas.values())

    def _seen(self) -> list[Flat]:
        return [
            flat_view(
                view_of(scheduler, asks=False), None if (fault := scheduler.health.fault) is None else str(fault)
            )
            for scheduler in self.serving.schedulers.values()
        ]

    def _push_views(self) -> None:
        if not self.sessions:
            return
        seen = self._seen()
        if seen == self._views:
            return
        new, replicas = changed_views(self._views, seen), self.connected
        self._views = seen
        packed: dict[Sequence[str] | None, bytes] = {}
        for session in self.sessions:
            if session.replica is not None:
                backends = session.caller.backends
                if (data := packed.get(backends)) is None:
                    data = packed[backends] = frame(flat(View(_of(session.caller, seen), replicas)))
                session.send_frame(data)
            elif session.views:
                session.send(View(new, replicas))

    # Replicas come and go

    def joined(self, session: LinkSession, hello: Hello) -> Replica | str | None:
        """Take in a replica; returns it, or why it is refused; ``None``: it is another pool's core that looks on."""
        if hello.protocol != PROTOCOL:
            return f"this server speaks protocol {PROTOCOL} of the link, not {hello.protocol}; use the same release"
        self.lease.met(hello.epoch)
        if not self.decides or not self.lease.holds():
            return COME_AGAIN
        if hello.pool and hello.pool != self.pool:
            return f"this core decides for pool {self.pool!r}, not for {shown(hello.pool)}"
        if session.looks_on:
            return None
        named(hello.replica, "a replica's id", MOST_ID_CHARS)
        for each in (hello.host, hello.version):  # they are kept in the store
            named(each, "what a replica says of itself")
        served = [name for name in self.serving.schedulers if _may_use(session.caller, name)]
        elsewhere: Container[str] = self.serving.schedulers.elsewhere or ()
        for name in hello.names:
            if name not in served and name not in elsewhere:
                return f"a mapping of the application names backend {shown(name)}{did_you_mean(name, served)}"
        known = self.replicas.get(hello.replica)
        if known is not None and known.caller.key_id != session.caller.key_id:
            return "another key's replica has this id"
        if known is None and len(self.replicas) >= MOST_REPLICAS:
            return f"{MOST_REPLICAS} replicas are connected; no more are taken"
        try:
            self.roster.add(hello)
        except StoreUnavailable as error:
            if not self.lease.goes_on:
                return f"the server's store does not answer: {error}"
            self._unlisted[hello.replica] = hello
        if known is None:
            known = Replica(hello.replica, session.caller, hello.host, hello.pid, moves=hello.moves)
            self.replicas[known.id] = known
        elif known.session is not None:
            known.session.cut("its replica has another connection")
        known.session, known.lost_s, known.over_s = session, None, None
        known.trusted_s = self.serving.clock() + orphans.SILENT_LETS_GO_S + orphans.SETTLED_S
        return known

    def _list(self) -> None:
        """Write down replicas that came while the store was away; the next core asks for them as well."""
        for hello in list(self._unlisted.values()):
            if hello.replica in self.replicas:
                try:
                    self.roster.add(hello)
                except StoreUnavailable:
                    return
            del self._unlisted[hello.replica]

    def ready(self, replica: Replica) -> None:
        """Note that a replica said all that it has: what it did not speak of has ended there."""
        self.arrivals.end_all(replica, "the call ended while its connection was lost", unclaimed=True)
        replica.places.clear()
        replica.said_all = True
        self._spoke(replica)

    def left(self, replica: Replica) -> None:
        """Note that a replica went in good order."""
        self._strike(replica)
        self._spoke(replica)

    def _spoke(self, replica: Replica) -> None:
        assert self._orphans is not None
        self._orphans.spoke(replica)
        self.recovery.spoke(replica.id)
        self.recovery.look(self.serving.clock())

    def lost(self, session: LinkSession) -> None:
        """Note the end of a connection."""
        self.sessions.discard(session)
        replica = session.replica
        if replica is not None and replica.session is session:
            now = replica.lost_s = self.serving.clock()
            replica.session = None
            self.recovery.lost(Listed(replica.id, replica.host, replica.pid), now, said_all=replica.said_all)
            self.arrivals.lost(replica)


def _text(fault: BaseException | None) -> str | None:
    return None if fault is None else str(fault)


def _may_use(caller: LinkCaller, backend: str) -> bool:
    return allows(caller.backends, backend)


def _of(caller: LinkCaller, views: Sequence[Flat]) -> list[Flat]:
    """Return the views of the backends that a key may use."""
    return [view for view in views if _may_use(caller, view["name"])]
