"""A replica's book-keeping: its runs, records and hints are here, what is decided comes from the core by a link.

To the graph's side it is a ``Serving`` like any other. It has a scheduler for each backend of the core, which queues
nothing: it is how the edge knows an engine (its adapter, what it said of itself). Only when calls go on without the
core (``on_core_lost="direct"``) do these queue, each with this replica's part of the bound.
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
from orla_lg.core.guard.access import on_behalf
from orla_lg.core.identity import Identity
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.lifecycle import LEAST_S, CallArrival, Sender
from orla_lg.core.limits.limits import NO_LIMITS
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
from orla_lg.link.losses import CoreLosses, OnCoreLost
from orla_lg.link.messages import (
    PROTOCOL,
    End,
    Grant,
    Hello,
    Message,
    Missed,
    Refused,
    Renewed,
    RequestDone,
    Signal,
    StopWarm,
    View,
    Warm,
    Welcome,
)  # fmt: skip
from orla_lg.link.progress import LinkedProgress
from orla_lg.link.prompts import KeptPrompts
from orla_lg.link.requests import CoreRequests, LinkedLimits, LinkedSteering, ResidentTokens
from orla_lg.link.served import Adapters, Keys, ServedBackends, usable
from orla_lg.link.steps import serve
from orla_lg.link.views import Known, read_statistics
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

    Raises:
        ConfigError: Keys of engines are missing here; all that are.
        LinkBroken: The welcome is none.
    """

    progress: LinkedProgress
    limits: LinkedLimits

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
        self.link, self._version, self.known = link, version, Known()
        self.clients = {
            backend.name: EngineClients(backend, keep_alive=adapter.keep_alive)
            for backend, adapter in adapters.items()
        }
        self.calls = ReplicaCalls(link, self.schedulers)
        self.requests = CoreRequests(link)
        self.prompts = KeptPrompts(link, self.background)
        self.losses = CoreLosses(
            link, self.calls, self.schedulers, self.clients, self.known, on_core_lost, core_patience_s
        )
        self._served = ServedBackends(
            link, self.schedulers, self.clients, self.known, made=self.scheduler_of, adapter_of=adapter_of,
            key_in=key_in, learns=self.resources.masking.learn,
        )  # fmt: skip
        self._last: Statistics | None = None
        self._join()
        self._learned(welcome)

    def _join(self) -> None:
        """Put what tells the core in the place of what decides by itself."""
        services = self.services
        self.limits = services.limits = LinkedLimits(NO_LIMITS, self.clock, self.requests)
        self.progress = services.progress = LinkedProgress(
            self.book,
            self.foresight,
            self.memory,
            self.records,
            self.updates,
            self.clock,
            self.guard,
            looks_ahead=False,
        ).joined(self.link, self.requests, self.prompts)
        self.steering = LinkedSteering(self.requests, self.book)
        self.resources.add(self.link.stop)

    def _learned(self, welcome: Welcome) -> None:
        self._served.learned(welcome, self.mappings, self.limits, self.prompts)
        self.guard.set_elsewhere(welcome.guarded)

    def views(self, call: Call | None = None) -> list[BackendView]:
        """Return the backends as the core saw them last, on behalf of a call."""
        made = []
        for name, scheduler in self.schedulers.items():
            seen = self.known.seen.get(name)
            if seen is None:
                made.append(view_of(scheduler))
            else:
                made.append(seen.view if call is None else seen.for_call(ResidentTokens(self.requests, name, call)))
        return made

    def sendable(self) -> Sequence[str] | None:
        """Return the core's backends that calls can be sent to from here; ``None``: all."""
        return list(self.schedulers) if self._served.unable else None

    # The ways of a call

    def arrive(self, identity: Identity, ask: Ask, **given: Unpack[CallArrival]) -> InFlightCall:  # noqa: D102
        mine = given["mappers"] = tuple(given.get("mappers", ()))
        inflight = lifecycle.arrive(self.services, identity, ask, kind=LinkedCall, **given)
        assert isinstance(inflight, LinkedCall)
        inflight.serving, inflight.raw = self, identity
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
        """Let a call wait for the core's word; where there is no core it waits, ends or goes on alone.

        Raises:
            OrlaClosed: This ``Orla`` was closed.
            LinkBroken: It is too large to be told, or of what cannot be said.
        """
        if not self.calls.enter(call):
            self.losses.met(call)

    def missed(self, call: LinkedCall, report: Missed) -> None:
        """Let a call wait for what the core makes of a failed attempt."""
        if not self.calls.missed(call, report):
            self.losses.met(call)

    def ended(self, call: LinkedCall, end: End, *, failed: bool) -> None:
        """Tell the core that a call is over."""
        if call.prompt is not None:
            followed = not failed and self.book.is_running(call.call.identity.workflow)
            self.prompts.ended(call, call.usage, followed=followed)
        self.calls.ended(call, end)

    def leaves(self, call: LinkedCall) -> bool:
        """Let a call go as it was granted; returns whether it may.

        Grants of a replica that was not heard of for its lease belong to others, and such a call waits again.
        """
        with self.link.lock:
            if self.losses.lease_is_over:
                self.link.drop("this replica was not heard of for its lease")
                self.calls.expire()
            if call.phase is CallPhase.GRANTED:
                call.goes()
                return True
        if not self.link.up:
            self.losses.met(call)
        return False

    # What the link hears (``connection.Listener``)

    def hello(self) -> Hello:  # noqa: D102
        return hello(self.link, self._version)

    def opening(self, welcome: Welcome) -> Sequence[Message]:  # noqa: D102
        if welcome is not self._served.welcome:
            self._learned(welcome)
        self.losses.found()
        return [*self.progress.again(self.clock()), *self.calls.again(welcome.epoch)]

    def heard(self, message: Message) -> None:  # noqa: D102
        if isinstance(message, Grant):
            self.calls.take(message)
        elif isinstance(message, Refused):
            self.calls.refuse(message)
        elif isinstance(message, Renewed):
            self.known.replicas = max(1, message.replicas)
            self.calls.confirmed(message.number)
        elif isinstance(message, View):
            self._served.seen(message.views, message.replicas)
        elif isinstance(message, RequestDone):
            self.requests.answered(message)
        elif isinstance(message, Warm):
            self.prompts.warm(message)
        elif isinstance(message, StopWarm):
            self.prompts.stop(message)
        elif isinstance(message, Welcome):
            self._learned(message)

    def disconnected(self, why: str) -> None:  # noqa: D102
        self.requests.lost(why)
        self.losses.lost()

    def looked(self) -> None:  # noqa: D102
        self.losses.looked()

    def forked(self) -> None:  # noqa: D102
        self.new_id = self.services.new_id = call_ids()
        self.calls.forked()
        self.requests.forked()
        self.prompts.forked()
        self.progress.forked()

    # The rest

    def lost(self) -> None:
        """Count a call whose run is not known, here and at the core."""
        super().lost()
        self.link.send(Signal("unidentified", ""))

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
        try:
            self.requests.ask("feedback", {"record": record_id, "score": score})
        except RecordUnknown:
            if unknown is not None:
                raise
        except BackendUnavailable:
            if unknown is not None:
                raise unknown from None

    def statistics(self) -> Statistics:
        """Return the core's snapshot, of all replicas; the last one while there is no core."""
        with suppress(BackendUnavailable):
            self._last = read_statistics(self.requests.ask("statistics", {}, STATISTICS_S))
        last = super().statistics() if self._last is None else self._last
        return replace(last, direct=self.losses.direct_calls)

    def close(self) -> None:
        """Refuse new calls, end waiting ones with ``OrlaClosed``, part from the core. Idempotent."""
        if self.services.closed:
            return
        self.calls.close()
        self.link.stop()
        self.requests.lost("this Orla was closed")
        super().close()


def hello(link: Link, version: str) -> Hello:
    """Return what a connection begins with."""
    return Hello(PROTOCOL, link.replica, version, link.epoch, (), here(), os.getpid())
