"""A replica's book-keeping: its runs, records and hints are here, what is decided comes from the core by a link.

To the graph's side it is a ``Serving`` like any other. It has a scheduler for each backend of the core, which queues
nothing: it is how the edge knows an engine (its adapter, what it said of itself). Only when calls go on without the
core (``on_core_lost="direct"``) do these queue, each with this replica's part of the bound.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

from orla_lg.core import lifecycle
from orla_lg.core.accounting.journal import Journal
from orla_lg.core.call import NO_HINTS, Ask, Call, CallerTimeout, Chunk, Hints, call_ids
from orla_lg.core.engine.backend import Backend, BackendAdapter, Directions, Probe
from orla_lg.core.identity import Identity
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.lifecycle import CLOSED, Sender
from orla_lg.core.limits.book import LimitBook
from orla_lg.core.limits.limits import NO_LIMITS, Limits, LimitScope, checked
from orla_lg.core.mapping import Mapper
from orla_lg.core.memory.events import CacheAction, CacheEvent
from orla_lg.core.placement.embeddings import naming
from orla_lg.core.placement.view import BackendView, view_of
from orla_lg.core.record import Record
from orla_lg.core.serving import Serving, Statistics
from orla_lg.core.steps import Steps
from orla_lg.errors import BackendUnavailable, ConfigError, OrlaClosed, RecordUnknown, shown
from orla_lg.link.call import LinkedCall, Phase
from orla_lg.link.connection import Link
from orla_lg.link.framing import LinkBroken
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
    StopWarm,
    View,
    Warm,
    Welcome,
)  # fmt: skip
from orla_lg.link.progress import LinkedProgress
from orla_lg.link.prompts import KeptPrompts
from orla_lg.link.requests import LinkedSteering, Requests
from orla_lg.link.steps import serve
from orla_lg.link.views import Known, flat_limits, read_backend, read_mapping, read_statistics, read_view
from orla_lg.openai_api.client import EngineClients

OnCoreLost = Literal["wait", "fail", "direct"]
"""Calls wait for a core, end at once, or go on without one; what was granted goes on in any case."""

ON_CORE_LOST: tuple[OnCoreLost, ...] = get_args(OnCoreLost)

MOST_UNSAID = 10_000
"""Ends of calls that the core does not know of yet; of more the oldest are dropped, and end there by their lease."""

RESIDENT_S = 0.05
"""How long a mapper that asks for ``resident_tokens`` waits for the core."""

STATISTICS_S = 2.0

log = logging.getLogger("orla_lg")


class NoOrders:
    """A memory policy that orders nothing: the core's does."""

    def decide(self, event: CacheEvent) -> Sequence[CacheAction]:  # noqa: D102
        return ()


class LinkedAdapter:
    """An engine's adapter, whose probes the core makes."""

    def __init__(self, inner: BackendAdapter, link: Link) -> None:
        self.inner, self._link = inner, link
        self.keep_alive = inner.keep_alive
        self.probe_seen: Probe | None = None
        self.fault: str | None = None

    async def probe(self) -> Probe:
        """Return what the core found; without a core, what the engine answers."""
        if not self._link.up:
            return await self.inner.probe()
        if self.probe_seen is None or self.fault is not None:
            raise BackendUnavailable(self.fault or "the core has not met this engine yet")
        return self.probe_seen

    def request_fields(self, ask: Ask, told: Directions) -> dict[str, Any]:  # noqa: D102
        return self.inner.request_fields(ask, told)

    def generate(self, body: Mapping[str, Any]) -> AsyncGenerator[Chunk]:  # noqa: D102
        return self.inner.generate(body)

    async def aclose(self) -> None:  # noqa: D102
        await self.inner.aclose()


class LinkedLimits(LimitBook):
    """The core's limits; here they are shown, and changed over there."""

    def __init__(self, limits: Limits, clock: Callable[[], float], requests: Requests) -> None:
        super().__init__(limits, clock)
        self._requests = requests

    @property
    def shared(self) -> Limits:
        """The limits of all replicas together."""
        return self._shared.limits

    @shared.setter
    def shared(self, limits: Limits) -> None:
        self._requests.ask("limits", {"limits": flat_limits(checked(limits))})
        self.learned(limits)

    def learned(self, limits: Limits) -> None:
        """Note what the core's limits are."""
        self._shared = replace(self._shared, limits=checked(limits))
        self.concern_all = self._shared.limits is not NO_LIMITS


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
    """

    def __init__(
        self,
        link: Link,
        welcome: Welcome,
        *,
        adapter_of: Callable[[Backend], BackendAdapter],
        key_in: Callable[[str], str | None],
        version: str,
        keep_records: int = 10_000,
        journal: Journal | None = None,
        on_core_lost: OnCoreLost = "wait",
        core_patience_s: float = 60.0,
    ) -> None:
        self.link, self.on_core_lost, self.core_patience_s = link, on_core_lost, core_patience_s
        self._adapter_of, self._key_in, self._version = adapter_of, key_in, version
        self._welcome = welcome
        served, missing = self._served(welcome)
        if missing:
            raise ConfigError("; ".join(map(str, missing)))
        adapters = {each.backend: LinkedAdapter(adapter_of(each.backend), link) for each in served}
        super().__init__(
            adapters, mapper=None, memory=NoOrders(), admission=False, keep_records=keep_records, journal=journal,
            clock=time.monotonic,
        )  # fmt: skip
        self.clients = {
            backend.name: EngineClients(backend, keep_alive=adapter.keep_alive)
            for backend, adapter in adapters.items()
        }
        self.known = Known()
        self.calls: dict[str, LinkedCall] = {}
        """Those that wait for the core or hold a grant, in the order of their arrival; under the link's lock."""
        self.requests = Requests(link)
        self.prompts = KeptPrompts(link, self.background)
        self.direct_calls = 0
        """How many went on without the core."""
        self._directs = False
        self._closing = False
        self._unable: set[str] = set()
        """Backends of the core that calls cannot be sent to from here."""
        self._unconfirmed: deque[tuple[int, End]] = deque(maxlen=MOST_UNSAID)
        """Ends that were sent, each with the number of the ``Renew`` after it."""
        self._unsent: deque[tuple[LinkedCall, End]] = deque(maxlen=MOST_UNSAID)
        """Those of calls that held a grant, while there was no core."""
        self._last: Statistics | None = None
        self._join()
        self._learned(welcome)

    def _join(self) -> None:
        """Put what tells the core in the place of what decides by itself."""
        services = self.services
        self.limits = services.limits = LinkedLimits(NO_LIMITS, self.clock, self.requests)
        self.progress = services.progress = LinkedProgress(
            self.book, self.foresight, self.memory, self.records, self.updates, self.clock, looks_ahead=False
        ).joined(self.link, self.requests, self.prompts.over)
        self.steering = LinkedSteering(self.requests, self.book)  # type: ignore[assignment]  # the same five methods
        self.resources.add(partial(self.link.stop, 0.0))
        for scheduler in self.schedulers.values():
            self.resources.masking.learn(scheduler.backend.api_key)

    # What the core is and serves

    def _served(self, welcome: Welcome) -> tuple[list[Any], list[ConfigError]]:
        """Return the backends that can be used from here, and what is wrong with the others."""
        served, faults = [], list[ConfigError]()
        for flat in welcome.backends:
            try:
                served.append(read_backend(flat, self._key_in))
            except ConfigError as error:
                faults.append(error)
        return served, faults

    def _learned(self, welcome: Welcome) -> None:
        """Follow what the core is and serves."""
        served, faults = self._served(welcome)
        names = {each.backend.name for each in served}
        self._unable = {str(flat.get("name")) for flat in welcome.backends} - names
        for fault in faults if welcome is not self._welcome else ():
            log.warning("calls cannot be sent to a backend of the core from here: %s", fault)
        for each in served:
            self._serves(each.backend)
            adapter = self.schedulers[each.backend.name].adapter
            assert isinstance(adapter, LinkedAdapter)
            self.prompts.serves(
                each.backend.name, adapter.inner, warms=each.warms, isolated=each.backend.isolate_tenants
            )
        for gone in [name for name in self.schedulers if name not in names]:
            del self.schedulers[gone]
        mappings = read_mapping(welcome.mapping)
        self.mappings.shared, self.mappings.variants = mappings.shared, mappings.variants
        self.limits.learned(Limits.of(welcome.limits))  # type: ignore[attr-defined]  # set in ``_join``
        known, tenants = self.known, welcome.tenants
        known.epoch, known.version, known.tenants = welcome.epoch, welcome.version, tenants
        self.prompts.tenant = tenants[0] if tenants is not None and len(tenants) == 1 else ""
        self._seen(welcome.views, welcome.replicas)
        self._welcome = welcome

    def _serves(self, backend: Backend) -> None:
        """Note a backend, which may be new or another one than before."""
        before = self.schedulers.get(backend.name)
        if before is not None and before.backend == backend and before.backend.api_key == backend.api_key:
            return
        adapter = LinkedAdapter(self._adapter_of(backend), self.link)
        self.schedulers[backend.name] = self.scheduler_of(backend, adapter)
        self.clients[backend.name] = EngineClients(backend, keep_alive=adapter.keep_alive)
        self.resources.masking.learn(backend.api_key)

    def _seen(self, views: Sequence[Mapping[str, Any]], replicas: int) -> None:
        """Take in how the core sees its backends."""
        self.known.replicas = max(1, replicas)
        for flat in views:
            scheduler = self.schedulers.get(str(flat.get("name")))
            if scheduler is None:
                continue
            seen = self.known.seen[scheduler.backend.name] = read_view(flat, scheduler.backend)
            adapter, probe = scheduler.adapter, seen.view.probe
            assert isinstance(adapter, LinkedAdapter)
            adapter.probe_seen, adapter.fault = probe, seen.fault
            scheduler.health.follow(probe, None if seen.fault is None else BackendUnavailable(seen.fault))

    def views(self, call: Call | None = None) -> list[BackendView]:
        """Return the backends as the core saw them last, on behalf of a call."""
        made = []
        for name, scheduler in self.schedulers.items():
            seen = self.known.seen.get(name)
            if seen is None:
                made.append(view_of(scheduler))
            else:
                made.append(seen.view if call is None else seen.for_call(_Resident(self.requests, name, call)))
        return made

    def sendable(self) -> Sequence[str] | None:
        """Return the core's backends that calls can be sent to from here; ``None``: all."""
        return list(self.schedulers) if self._unable else None

    # The ways of a call

    def arrive(  # noqa: D102
        self,
        identity: Identity,
        ask: Ask,
        *,
        call_id: str,
        said: Hints = NO_HINTS,
        hints: Hints = NO_HINTS,
        mappers: Iterable[Mapper] = (),
        layers: Sequence[LimitScope] = (),
        timeout: CallerTimeout | None = None,
        may_pass: bool = False,
    ) -> InFlightCall:
        mine = tuple(mappers)
        inflight = lifecycle.arrive(
            self.services, identity, ask, call_id=call_id, said=said, hints=hints, mappers=mine, layers=layers,
            timeout=timeout, may_pass=may_pass, kind=LinkedCall,
        )  # fmt: skip
        assert isinstance(inflight, LinkedCall)
        inflight.serving, inflight.raw = self, identity
        inflight.mine = naming(mine, inflight.call.identity.stage) if ask.embeds else mine
        return inflight

    def serve(self, inflight: InFlightCall, sender: Sender, on_end: Callable[[Record], None] | None = None) -> Steps:  # noqa: D102
        assert isinstance(inflight, LinkedCall)
        return serve(inflight, sender, on_end)

    def enter(self, call: LinkedCall) -> None:
        """Tell the core of a call, which waits for its answer from then on; or lets it go on alone.

        Raises:
            BackendUnavailable: There is no core, and calls are not to wait for one.
            OrlaClosed: This ``Orla`` was closed.
        """
        entering = call.entering()
        with self.link.lock:
            if self._closing:
                raise OrlaClosed(CLOSED)
            call.phase = Phase.WAITING
            self.calls[call.call.id] = call
            try:
                sent = self.link.send(entering)
            except LinkBroken:  # too large, or of what cannot be said
                call.phase = Phase.NEW
                del self.calls[call.call.id]
                raise
        if not sent and self.on_core_lost != "wait" and not self.link.beginning:
            self._without_core(call)
            if call.turn.settled:
                call.turn.result()

    def missed(self, call: LinkedCall, report: Missed) -> None:
        """Tell the core that an attempt failed; the call waits for what comes of it."""
        with self.link.lock:
            call.phase = Phase.MISSED
            sent = self.link.send(report)
        if not sent and self.on_core_lost != "wait":
            self._without_core(call)

    def ended(self, call: LinkedCall, end: End, *, failed: bool) -> None:
        """Tell the core that a call is over."""
        followed = not failed and self.book.is_running(call.call.identity.workflow)
        if call.prompt is not None:
            self.prompts.ended(call, call.usage, followed=followed)
        with self.link.lock:
            if self.calls.pop(call.call.id, None) is None:
                return
            phase, call.phase = call.phase, Phase.OVER
            if self.link.send(end):
                self._unconfirmed.append((self.link.number, end))
            elif phase is Phase.GRANTED:
                self._unsent.append((call, end))

    def may_send(self, call: LinkedCall) -> bool:
        """Whether a grant still holds: a replica that was not heard of for its lease has lost what it had."""
        if time.monotonic() - self.link.confirmed_s <= self._welcome.replica_lease_s:
            return True
        self.link.drop("this replica was not heard of for its lease")
        return False

    # What the core says (``connection.Listener``)

    def hello(self) -> Hello:  # noqa: D102
        return hello(self.link, self._version)

    def opening(self, welcome: Welcome) -> Sequence[Message]:  # noqa: D102
        if welcome is not self._welcome:
            self._learned(welcome)
        said: list[Message] = list(self.progress.again(self.clock()))  # type: ignore[attr-defined]
        ends = list(self._unconfirmed)
        for call, end in self._unsent:
            assert call.grant is not None
            if call.grant.epoch != welcome.epoch and call.grant.backend is not None:
                said.append(call.adopting())
            ends.append((0, end))
        self._unsent.clear()
        self._unconfirmed = deque(((self.link.number, end) for _, end in ends), maxlen=MOST_UNSAID)
        said += [end for _, end in ends]
        held = [call for call in self.calls.values() if call.phase is Phase.GRANTED]
        said += [call.adopting() for call in held if call.grant is not None and call.grant.backend is not None]
        for call in self.calls.values():
            if call.phase in (Phase.WAITING, Phase.MISSED):
                said.append(call.entering())
                if call.phase is Phase.MISSED and call.report is not None and call.grant is not None:
                    if call.grant.epoch == welcome.epoch:
                        said.append(call.report)
                    else:
                        call.phase = Phase.WAITING
        self._directs = False
        return said

    def heard(self, message: Message) -> None:  # noqa: D102
        if isinstance(message, Grant):
            self._granted(message)
        elif isinstance(message, Refused):
            with self.link.lock:
                call = self.calls.get(message.call)
                waited = call is not None and call.refused(message)
            if call is not None and waited:
                call.turn.come()
        elif isinstance(message, View):
            self._seen(message.views, message.replicas)
        elif isinstance(message, Renewed):
            self.known.replicas = max(1, message.replicas)
            while self._unconfirmed and self._unconfirmed[0][0] <= message.number:
                self._unconfirmed.popleft()
        elif isinstance(message, RequestDone):
            self.requests.answered(message)
        elif isinstance(message, Warm):
            self.prompts.warm(message)
        elif isinstance(message, StopWarm):
            self.prompts.stop(message)
        elif isinstance(message, Welcome):
            self._learned(message)

    def _granted(self, grant: Grant) -> None:
        if grant.epoch < self.link.epoch:  # of a core that another one followed
            return
        with self.link.lock:
            call = self.calls.get(grant.call)
            if call is None:
                return
            if grant.backend is not None and grant.backend not in self.schedulers:
                cause = f"this replica cannot reach backend {shown(grant.backend)}"
                self.link.send(Missed(grant.call, grant.attempt, cause, False, False, True, None))
                return
            taken = call.granted(grant)
        if taken:
            call.turn.come()

    # Without a core

    def lost(self, why: str) -> None:  # noqa: D102
        self.requests.lost(why)
        if self.on_core_lost != "wait":
            for call in self._waiting():
                self._without_core(call)

    def _waiting(self) -> list[LinkedCall]:
        with self.link.lock:
            return [call for call in self.calls.values() if call.phase in (Phase.WAITING, Phase.MISSED)]

    def _without_core(self, call: LinkedCall) -> None:
        """Let a call that waits end, or go on alone."""
        with self.link.lock:
            if call.phase not in (Phase.WAITING, Phase.MISSED) or self.link.up:
                return
            if self.on_core_lost == "direct":
                self._part()
                del self.calls[call.call.id]
                call.phase, call.alone = Phase.OVER, True
                self.direct_calls += 1
        if call.alone:
            call.turn.come()
        else:
            call.turn.fail(
                BackendUnavailable(f"the core is lost: {self.link.fault}; on_core_lost='wait' waits for it")
            )

    def _part(self) -> None:
        """Give each backend this replica's part of its bound, for calls that go on alone."""
        if self._directs:
            return
        self._directs = True
        replicas = self.known.replicas
        for name, scheduler in self.schedulers.items():
            seen = self.known.seen.get(name)
            bound = scheduler.backend.max_concurrency if seen is None else seen.view.max_concurrency
            with scheduler.changing():
                scheduler.queue.max_concurrency = None if bound is None else max(1, bound // replicas)
                scheduler.queue.paused = False if seen is None else seen.view.paused
        log.warning(
            "the core is lost (%s): calls go on without it, each backend with 1/%d of its bound in this process, and "
            "no order, limit or cache is shared meanwhile; statistics().direct counts such calls",
            self.link.fault, replicas,
        )  # fmt: skip

    def looked(self) -> None:  # noqa: D102
        now = time.monotonic()
        if not self.link.up and self.on_core_lost == "wait":
            for call in self._waiting():
                if now - max(self.link.lost_s, call.call.arrived_s) > self.core_patience_s:
                    call.turn.fail(
                        BackendUnavailable(
                            f"no core for {self.core_patience_s} s (core_patience_s): {self.link.fault}; is "
                            "`orla-lg serve` running?"
                        )
                    )
        if now - self.link.confirmed_s > self._welcome.replica_lease_s and self.on_core_lost != "direct":
            self._end_requests()

    def _end_requests(self) -> None:
        """End what runs at engines by grants that nothing renews: the core gives them to others by now."""
        with self.link.lock:
            granted = [
                call for call in self.calls.values() if call.phase is Phase.GRANTED and call.backend is not None
            ]
        if not granted:
            return
        for call in granted:
            call.cut = (
                f"the request to backend {call.backend!r} was ended: no core was heard of for "
                f"{self._welcome.replica_lease_s} s, this replica's lease, so its place belongs to others"
            )
        for name in {call.backend for call in granted}:
            if name in self.clients:
                self.clients[name].abort()

    def forked(self) -> None:  # noqa: D102
        self.new_id = self.services.new_id = call_ids()
        self.calls, self.requests = {}, Requests(self.link)
        self._unconfirmed.clear()
        self._unsent.clear()
        self.prompts.forked()
        self.progress.forked()  # type: ignore[attr-defined]

    # The rest

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
        return replace(last, direct=self.direct_calls)

    def close(self) -> None:
        """Refuse new calls, end waiting ones with ``OrlaClosed``, part from the core. Idempotent."""
        if self.services.closed:
            return
        self._closing = True
        for call in self._waiting():
            call.turn.fail(OrlaClosed(CLOSED))
        self.link.stop()
        self.requests.lost("this Orla was closed")
        super().close()


class _Resident:
    """Asks the core once what of a call's prompt lies in a backend's cache."""

    __slots__ = ("_backend", "_call", "_requests", "_tokens")

    def __init__(self, requests: Requests, backend: str, call: Call) -> None:
        self._requests, self._backend, self._call = requests, backend, call
        self._tokens: int | None = None

    def __call__(self) -> int:
        if self._tokens is None:
            ask, identity = self._call.ask, self._call.identity
            more = {
                "backend": self._backend, "workflow": identity.name, "tenant": identity.tenant, "tools": ask.tools,
                "hashes": [hashed for hashed, _ in ask.pieces], "chars": [chars for _, chars in ask.pieces],
                "prompt_chars": ask.prompt_chars,
            }  # fmt: skip
            self._tokens = 0
            with suppress(BackendUnavailable):
                self._tokens = int(self._requests.ask("resident", more, RESIDENT_S))
        return self._tokens


def hello(link: Link, version: str) -> Hello:
    """Return what a connection begins with."""
    return Hello(PROTOCOL, link.replica, version, link.epoch, (), socket.gethostname(), os.getpid())
