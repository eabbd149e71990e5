"""A replica's book-keeping: its runs, records and hints are here, what is decided comes from cores by links.

To the graph's side it is a ``Serving`` like any other. It has a scheduler for each backend of the cores, which queues
nothing: it is how the edge knows an engine (its adapter, what it said of itself). Only when calls go on without a
core (``on_core_lost="direct"``) do these queue, each with this replica's part of the bound.

A server without pools is one core, and has one ``CoreSide`` here. Of several pools each has its own; at which of them
a call enters is decided in ``Entrances``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Unpack

from orla_lg.core import lifecycle
from orla_lg.core.accounting.journal import Journal
from orla_lg.core.boundary.call_ids import call_ids
from orla_lg.core.call import Ask, Call
from orla_lg.core.engine.retry import AttemptFailed
from orla_lg.core.guard.access import on_behalf
from orla_lg.core.identity import Identity
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.lifecycle import LEAST_S, CallArrival, Sender
from orla_lg.core.limits.limits import NO_LIMITS, Limits
from orla_lg.core.mapping import Mapper
from orla_lg.core.operation.statistics import Statistics
from orla_lg.core.placement.embeddings import naming
from orla_lg.core.placement.internal_call import InternalMapping
from orla_lg.core.placement.view import BackendView, view_of
from orla_lg.core.record import Record
from orla_lg.core.serving import Serving
from orla_lg.core.steps import Steps
from orla_lg.errors import BackendUnavailable, ConfigError, RecordUnknown, shown
from orla_lg.link.adapter import LinkedAdapter, NoOrders
from orla_lg.link.call import CallPhase, LinkedCall
from orla_lg.link.calls import ReplicaCalls
from orla_lg.link.connection import Link
from orla_lg.link.cores import Cores
from orla_lg.link.entrances import Entrances, LinkMaker
from orla_lg.link.losses import CoreLosses, OnCoreLost
from orla_lg.link.messages import PROTOCOL, End, Hello, Message, Missed, Moved, Signal, Welcome
from orla_lg.link.progress import LinkedProgress
from orla_lg.link.requests import CoreRequests, LinkedLimits, LinkedSteering, ResidentTokens
from orla_lg.link.served import Adapters, Keys, ServedBackends, of_other_pools, usable
from orla_lg.link.side import CoreSide
from orla_lg.link.steps import serve
from orla_lg.link.together import together
from orla_lg.link.views import Known, read_mapping, read_statistics
from orla_lg.link.whereabouts import here
from orla_lg.openai_api.client import EngineClients

STATISTICS_S = 2.0
"""How long the core may take for its statistics; then the last ones have to do."""


class LinkedServing(Serving):
    """A replica of a core.

    Args:
        link: Opened.
        welcome: What it began with.
        adapter_of: Makes the adapter of a backend.
        key_in: Returns the key in an environment variable.
        version: Of the package.
        keep_records: How many of the newest records are kept.
        journal: The records' file.
        on_core_lost: What becomes of calls without a core.
        core_patience_s: How long they wait for one.
        link_to: Makes a link to a core of another pool, which is not opened yet; ``None``: there are none.

    Raises:
        ConfigError: Keys of engines are missing here; all that are.
        LinkBroken: The welcome is none.
    """

    progress: LinkedProgress
    limits: LinkedLimits
    also_ends: Callable[[str], None] | None = None
    """Ends the requests to a backend that go by other clients than these, as a gateway's do; in any thread."""

    def __init__(
        self,
        link: Link,
        welcome: Welcome,
        *,
        adapter_of: Adapters,
        key_in: Keys,
        version: str,
        keep_records: int = 10_000,
        journal: Journal | None = None,
        on_core_lost: OnCoreLost = "wait",
        core_patience_s: float = 60.0,
        link_to: LinkMaker | None = None,
    ) -> None:
        served, missing = usable(welcome, key_in)
        if missing:
            raise ConfigError("; ".join(map(str, missing)))
        adapters = {each.backend: LinkedAdapter(adapter_of(each.backend), link) for each in served}
        super().__init__(
            adapters, mapper=None, memory=NoOrders(), admission=False, keep_records=keep_records, journal=journal,
            clock=time.monotonic,
        )  # fmt: skip
        if journal is not None:
            journal.setting = None  # the core's, which is not known here
        self._version, self._key_in, self._adapter_of = version, key_in, adapter_of
        self._on_core_lost, self._core_patience_s = on_core_lost, core_patience_s
        self.clients = {
            backend.name: EngineClients(backend, keep_alive=adapter.keep_alive)
            for backend, adapter in adapters.items()
        }
        self.cores = Cores()
        self.cores.begin(self.side_of(welcome.pool, link), self.schedulers)
        self.pools = Entrances(self, self.cores, link_to)
        self._last: dict[str, Statistics] = {}
        self._unable = False
        """Calls cannot be sent to some of the cores' backends from here."""
        self._join()
        self.learned(self.cores.home, welcome)

    def side_of(self, pool: str, link: Link) -> CoreSide:
        """Return this replica's side of a core that *link* leads to."""
        self.resources.add(link.stop)
        side = CoreSide(
            pool, link, self, self.schedulers, self.clients, self._serves, self.background, self._on_core_lost,
            self._core_patience_s,
        )  # fmt: skip
        side.losses.also_ends = self._ends_too
        return side

    def _ends_too(self, backend: str) -> None:
        if self.also_ends is not None:
            self.also_ends(backend)

    def _serves(self, core: CoreSide) -> ServedBackends:
        return ServedBackends(
            core, self.cores, self.schedulers, self.clients, made=self.scheduler_of, adapter_of=self._adapter_of,
            key_in=self._key_in, learns=self.resources.masking.learn,
        )  # fmt: skip

    def _join(self) -> None:
        """Put what tells the cores in the place of what decides by itself."""
        services = self.services
        self.limits = services.limits = LinkedLimits(NO_LIMITS, self.clock, self.cores)
        self.progress = services.progress = LinkedProgress(
            self.book,
            self.lookahead,
            self.memory,
            self.records,
            self.updates,
            self.clock,
            self.guard,
            looks_ahead=False,
        ).joined(self.cores)
        self.steering = LinkedSteering(self.cores, self.book)

    def views(self, call: Call | None = None) -> list[BackendView]:
        """Return the backends as their cores saw them last, on behalf of a call; without its core one is shut."""
        made, cores = [], self.cores
        for name, scheduler in self.schedulers.items():
            core = cores.of(name)
            seen = core.known.seen.get(name)
            if seen is None:
                view = view_of(scheduler)
            else:
                view = seen.view if call is None else seen.for_call(ResidentTokens(core.requests, name, call))
            if cores.several:
                view = replace(view, pool=core.pool, paused=view.paused or not core.link.up)
            made.append(view)
        return made

    def sendable(self) -> Sequence[str] | None:
        """Return the cores' backends that calls can be sent to from here; ``None``: all."""
        return list(self.schedulers) if self._unable else None

    # Of the core that was met first: all there is without pools

    @property
    def link(self) -> Link:
        """The connection to it."""
        return self.cores.home.link

    @property
    def calls(self) -> ReplicaCalls:
        """Those that it knows of."""
        return self.cores.home.calls

    @property
    def known(self) -> Known:
        """What it said last."""
        return self.cores.home.known

    @property
    def losses(self) -> CoreLosses:
        """What becomes of calls without it."""
        return self.cores.home.losses

    # The ways of a call

    def arrive(self, identity: Identity, ask: Ask, **given: Unpack[CallArrival]) -> InFlightCall:  # noqa: D102
        mine = given["mappers"] = tuple(given.get("mappers", ()))
        inflight = lifecycle.arrive(self.services, identity, ask, kind=LinkedCall, **given)
        assert isinstance(inflight, LinkedCall)
        inflight.serving, inflight.core, inflight.raw = self, self.cores.home, identity
        inflight.mine = naming(mine, inflight.call.identity.stage) if ask.embeds else mine
        return inflight

    def serve(self, inflight: InFlightCall, sender: Sender, on_end: Callable[[Record], None] | None = None) -> Steps:  # noqa: D102
        assert isinstance(inflight, LinkedCall)
        if (tracer := self.services.tracer) is not None:
            tracer.arrived(inflight.call)
        return serve(self, inflight, sender, on_end)

    def internal(self, outer: LinkedCall, backend: str, body: Mapping[str, Any], stage: str) -> LinkedCall:
        """Return a call that a mapper needs on the way of another one: in its workflow, with its priority."""
        call = outer.call
        left_s = None if call.deadline_at_s is None else max(call.deadline_at_s - self.clock(), LEAST_S)
        inflight = self.arrive(
            replace(outer.raw, stage=stage), Ask(backend, body["messages"]), call_id=self.new_id(),
            said=replace(call.hints, variant=None, deadline_s=left_s), mappers=(InternalMapping(backend, stage),),
            layers=outer.layers, timeout=call.timeout,
        )  # fmt: skip
        assert isinstance(inflight, LinkedCall)
        inflight.call.access = on_behalf(call.access, call.identity.stage)
        return inflight

    def enter(self, call: LinkedCall) -> None:
        """Let a call wait for its core's word; where there is no core it waits, ends or goes on alone.

        Raises:
            OrlaClosed: This ``Orla`` was closed.
            LinkBroken: It is too large to be told, or of what cannot be said.
        """
        if self.cores.several:
            self.pools.enter(call)
        elif not call.core.calls.enter(call):
            call.core.losses.met(call)

    def missed(self, call: LinkedCall, report: Missed) -> None:
        """Let a call wait for what the core makes of a failed attempt."""
        if not call.core.calls.missed(call, report):
            call.core.losses.met(call)

    def ended(self, call: LinkedCall, end: End, *, failed: bool) -> None:
        """Tell the core that a call is over."""
        if call.prompt is not None:
            followed = not failed and self.book.is_running(call.call.identity.workflow)
            call.core.prompts.ended(call, call.usage, followed=followed)
        with self.cores.home.link.lock:  # another core may just be given the call
            call.core.calls.ended(call, end)

    def leaves(self, call: LinkedCall) -> bool:
        """Let a call go as it was granted; returns whether it may.

        Grants of a replica that was not heard of for its lease belong to others, and such a call waits again.
        """
        core = call.core
        with core.link.lock:
            if core.losses.lease_is_over:
                core.link.drop("this replica was not heard of for its lease")
                core.calls.expire()
            if call.phase is CallPhase.GRANTED:
                assert call.grant is not None
                if (name := call.grant.backend) is None or name in self.schedulers:
                    call.goes()
                    return True
                gone = BackendUnavailable(f"backend {shown(name)} was taken out of the configuration just now")
                call.missed(AttemptFailed(gone, elsewhere=True))
        if not core.link.up:
            core.losses.met(call)
        return False

    def goes_alone(self, call: LinkedCall) -> None:
        """Prepare a call that goes on without its core; with pools it stays in its own."""
        if self.cores.several:
            self.pools.goes_alone(call)

    # What the cores' sides hear (``side.SideReplica``)

    def greets(self, link: Link) -> Hello:  # noqa: D102
        return hello(link, self._version)

    def learned(self, side: CoreSide, welcome: Welcome) -> None:  # noqa: D102
        told = read_mapping(welcome.mapping)
        with self.cores.home.link.lock:
            side.served.learned(welcome)
            self.mappings.shared, self.mappings.variants = told.shared, told.variants
            self.limits.learned(Limits.of(welcome.limits))
            served = [core.served for core in self.cores.all()]
            self._unable = any(each.unable for each in served)
            self.guard.set_elsewhere(any(each.welcome is not None and each.welcome.guarded for each in served))
            if welcome.pool:
                self.pools.follow(side, welcome, of_other_pools(welcome, self._key_in))

    def said_again(self, side: CoreSide, welcome: Welcome) -> Sequence[Message]:  # noqa: D102
        return [*self.progress.again(side.reports, self.clock()), *side.calls.again(welcome.epoch)]

    def moved(self, side: CoreSide, message: Moved) -> None:  # noqa: D102
        self.pools.moved(side, message)

    def was_forked(self) -> None:  # noqa: D102
        self.new_id = self.services.new_id = call_ids()
        self.progress.forked()
        for core in self.cores.all():
            core.link.lock = self.cores.home.link.lock

    # The rest

    def lost(self) -> None:
        """Count a call whose run is not known, here and at the core."""
        super().lost()
        self.cores.home.link.send(Signal("unidentified", ""))

    def variant(self, name: str, mapper: Mapper) -> None:
        """Refuse: variants are named where the mapping is.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"variant {shown(name)}: the mapping that all replicas share, and its variants, are the core's: name it "
            "as [variants.NAME] in the configuration of `orla-lg serve`; wrap(..., mapper=) is for one graph, here"
        )

    def feedback(self, record_id: str, score: float) -> None:
        """Let mappers learn how good the answer of a call was: those of graphs here, and the core's.

        Raises:
            RecordUnknown: There is no such record, or it is no longer kept.
        """
        unknown: RecordUnknown | None = None
        try:
            super().feedback(record_id, score)
        except RecordUnknown as error:
            unknown = error
        for asked in self._asked_of(record_id, known=unknown is None):
            try:
                asked.ask("feedback", {"record": record_id, "score": score})
            except (RecordUnknown, BackendUnavailable):
                continue
            return
        if unknown is not None:
            raise unknown

    def _asked_of(self, record_id: str, *, known: bool) -> Sequence[CoreRequests]:
        """Return the requests to the core that has a record: that of its backend, if it is a call of this process."""
        if not (known and self.cores.several):
            return self.cores.asked_of_all()
        return [self.cores.of(self.records.find(record_id).backend or "").requests]

    def statistics(self) -> Statistics:
        """Return the cores' snapshots as one, of all replicas; the last one of a core that is not there."""
        for core in self.cores.all():
            with suppress(BackendUnavailable):
                self._last[core.pool] = read_statistics(core.requests.ask("statistics", {}, STATISTICS_S))
        known = [self._last[core.pool] for core in self.cores.all() if core.pool in self._last]
        last = together(known) if known else super().statistics()
        return replace(last, direct=sum(core.losses.direct_calls for core in self.cores.all()))

    def check_integrity(self) -> None:
        """Assert the invariants of all state."""
        super().check_integrity()
        for core in self.cores.all():
            core.check_integrity()

    def close(self) -> None:
        """Refuse new calls, end waiting ones with ``OrlaClosed``, part from the core. Idempotent."""
        if self.services.closed:
            return
        cores = self.cores.all()
        for core in cores:
            core.calls.close()
            core.link.stop(0.0)
        for core in cores:
            core.link.stop()
            core.requests.lost("this Orla was closed")
        super().close()


def hello(link: Link, version: str) -> Hello:
    """Return what a connection begins with."""
    pool = link.places.pool or ""
    return Hello(PROTOCOL, link.replica, version, link.epoch, (), here(), os.getpid(), moves=True, pool=pool)
