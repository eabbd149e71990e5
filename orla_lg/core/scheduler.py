"""One backend's desk: its queue, its ledger and how its engine is (``health``), under one short lock.

The desk joins the rules of ``queues`` and ``memory``: a call is granted when the queue has room *and* its
workflow can sit down. It starts no I/O by itself except on the background loop.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf

from orla_lg.core.background import Background, Clock
from orla_lg.core.cache.engine_cache import AdmissionStatistics, EngineCache, MemoryStatistics
from orla_lg.core.cache.isolation import Isolation, Salts
from orla_lg.core.cache.orders import CacheOrders, RecordSink
from orla_lg.core.cache.prefix.cache import PrefixTreeCache
from orla_lg.core.cache.prefix.events import KVFeed
from orla_lg.core.cache.slots.cache import SlotCache
from orla_lg.core.cache.slots.files import SavedPool, instance_of
from orla_lg.core.cache.slots.orders import SlotOrders
from orla_lg.core.cache.slots.swap import Swaps
from orla_lg.core.cache.slots.worth import Prices
from orla_lg.core.cache.verification import OrderBook, Verification
from orla_lg.core.call import Ask, Call, Usage
from orla_lg.core.engine.backend import Backend, BackendAdapter, Capability, Probe
from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.engine.capabilities import (
    EngineStats,
    KVEventSource,
    Observable,
    SlotStore,
)
from orla_lg.core.engine.health import Health
from orla_lg.core.engine.load import LoadWatch
from orla_lg.core.engine.speed import SpeedMeter
from orla_lg.core.engine.window import Window
from orla_lg.core.lookahead.estimates import Estimates
from orla_lg.core.memory.events import CacheAction, Doing, Verb
from orla_lg.core.memory.returns import ReturnBook
from orla_lg.core.prefetch.book import WarmStatistics, WarmUp
from orla_lg.core.prefetch.prefetcher import Prefetcher
from orla_lg.core.queues import BackendQueue, Policies, Queued, QueueStatistics
from orla_lg.core.turn import Waiter, Waiters
from orla_lg.core.view import BackendView, nothing, served_names
from orla_lg.core.waiting import Waiting, who_waits
from orla_lg.errors import OrlaClosed

CLOSED = "this Orla was closed while the call waited"


@dataclass(frozen=True, slots=True)
class BackendStatistics:
    """A backend at one moment."""

    queue: QueueStatistics
    memory: MemoryStatistics
    reachable: bool | None
    """``None`` before the first probe ended."""
    circuit: Circuit = Circuit.CLOSED
    trips: int = 0
    """How often the circuit opened."""
    admission: AdmissionStatistics | None = None
    """``None`` on engines with slots."""
    warm_ups: WarmStatistics = field(default_factory=WarmStatistics)
    waiting: tuple[Waiting, ...] = ()
    """Who waits, and for what, whoever goes first first; at most ``waiting.SHOWN``, ``queue.waiting`` counts all."""


class BackendScheduler:
    """Queue, ledger and probe of one backend."""

    def __init__(
        self,
        backend: Backend,
        adapter: BackendAdapter,
        background: Background,
        clock: Clock,
        policies: Policies,
        estimates: Estimates | None = None,
        sink: RecordSink | None = None,
        *,
        admission: bool = True,
        warm_up: WarmUp | None = None,
        returns: ReturnBook | None = None,
        salts: Salts | None = None,
    ) -> None:
        self.backend = backend
        self.adapter = adapter
        self.isolation = Isolation(salts, on=backend.isolate_tenants)
        self.lock = threading.Lock()
        self.queue = BackendQueue(backend.name, policies, backend.capacity, backend.max_concurrency)
        self.orders = OrderBook()
        self._prefix = PrefixTreeCache(self.orders, estimates, holds=admission)
        self.cache: EngineCache = self._prefix
        """Of the kind that the engine turned out to be when it was last probed."""
        self._entered: dict[Queued, EngineCache] = {}
        """Calls with a grant, and the cache that let each in: a call leaves what it entered."""
        self.health = Health(backend, adapter, background, clock, self.lock, self)
        self.cache_orders = CacheOrders(
            backend.name, adapter, self.orders, lambda: self.cache.holdings(), self.lock, background, clock,
            offers=self.health.offers, sink=sink,
        )  # fmt: skip
        self.pace = SpeedMeter()
        self.load = LoadWatch(adapter, background, clock, self._told) if isinstance(adapter, Observable) else None
        self.window = Window()
        self._feed = self._fed_by(adapter, background)
        names = SavedPool(instance_of(backend.name, backend.url), backend.max_saved) if backend.max_saved else None
        self._slot_orders = None
        if isinstance(adapter, SlotStore):
            self._slot_orders = SlotOrders(
                adapter, background, self.lock, self.orders, clock,
                quiet=self._may_tidy, tell=self.cache_orders.tell, go_on=self.go_on, doubt=self.health.doubt_contents,
            )  # fmt: skip
        self._swaps = Swaps(names, able=False, prices=Prices(self.pace), odds=(returns or ReturnBook()).chance)
        self.warming = Prefetcher(self, background, clock, warm_up, self.cache_orders.tell)
        self._background = background
        self._clock = clock
        self._again_at_s = inf
        self.drains = Waiters()
        """Who waits until nothing is in flight."""
        self._at_circuit: dict[str, Call] = {}
        self._closed = False

    def _fed_by(self, adapter: BackendAdapter, background: Background) -> KVFeed | None:
        if not isinstance(adapter, KVEventSource):
            return None
        return KVFeed(adapter, self._prefix.gate.blocks, background, self.lock, self.backend.name)

    # What the engine is

    def learned(self, probe: Probe) -> None:
        """Follow what the engine said of itself."""
        if (probe.slots or 0) != self.cache.slots:
            self.cache.close()
            self.cache = self._cache_of(probe)
        self.cache.learned(probe, self.health.offers)
        self._bound_concurrency(probe)
        if self._feed is not None:
            self._feed.begin()
        self.isolation.heed(self.backend.name, probe)

    def _cache_of(self, probe: Probe) -> EngineCache:
        """Return the cache of an engine of that kind; what lies in slots that are no more is forgotten."""
        if probe.slots:
            return SlotCache(
                probe.slots, self.orders, self._swaps, self._slot_orders, isolated=self.backend.isolate_tenants
            )
        return self._prefix

    def _bound_concurrency(self, probe: Probe | None) -> None:
        bounds = (self.backend.max_concurrency, None if probe is None else probe.slots)
        self.queue.max_concurrency = min(filter(None, bounds), default=None)

    def forgotten(self) -> None:
        """Believe no more that the engine holds anything."""
        self.cache.lose()

    def _told(self, stats: EngineStats) -> None:
        with self.lock:
            self.window.note(stats, self.queue.in_flight)
            self.queue.engine_takes = self.window.bound
        self.go_on()

    def go_on(self) -> None:
        """Let those go who may go now."""
        with self.lock:
            granted = self._pump()
        self.warming.look_soon()
        wake(granted)

    def warmed(self) -> None:
        """Go on after a warm-up, and catch up on what had to wait for it."""
        with self.lock:
            self.cache.tidy()
        self.go_on()

    def view(self, call: Call | None = None) -> BackendView:
        """Return the backend as mappers see it, on behalf of a call."""
        return BackendView(
            name=self.backend.name,
            models=served_names(self.backend, self.health.probe),
            probe=self.health.probe,
            cost=self.backend.cost,
            quality=self.backend.quality,
            waiting=self.queue.waiting,
            in_flight=self.queue.in_flight,
            max_concurrency=self.queue.max_concurrency,
            circuit=self.health.state(),
            paused=self.queue.paused,
            speed=self.pace.speed,
            load=None if self.load is None else self.load.wanted(self.health.probe),
            waiting_for_prefix=self.cache.waiting_for_prefix,
            model=self.backend.model,
            resident=nothing if call is None else partial(self.resident_tokens, call),
        )

    def resident_tokens(self, call: Call) -> int:
        """Return how much of a call's prompt it would find in the cache here, what others are prefilling included."""
        ask = self._asked(call)
        with self.lock:
            return round(self.cache.expected(call, ask))

    def _asked(self, call: Call) -> Ask:
        """Return a call's request with its prefixes as they are found here: its tenant's own, or those of all."""
        if not (self.isolation.on or call.ask.scope):
            return call.ask
        return call.ask.within(self.isolation.scope(call.identity.tenant))

    # Who may go

    def enter(self, call: Call, *, order: int | None, running: bool, holds_grant: bool) -> Queued:
        """Queue a call, and grant whoever may go now; the returned entry may be granted already.

        Args:
            call: The call.
            order: Its arrival number, when it comes back after a failed attempt.
            running: Whether its workflow runs, and so keeps its slot.
            holds_grant: The caller already holds a grant here: to let it wait for itself would deadlock.

        Raises:
            QueueFull: Too many calls wait.
            OrlaClosed: Nobody waits here any more.
        """
        call.ask = self._asked(call)
        with self.lock:
            if self._closed:
                raise OrlaClosed(CLOSED)
            now = self._clock()
            self.warming.make_way(call)
            queued = self.queue.enter(call, now, order=order)
            queued.running = running
            granted = self._pump()
            if queued.waiting and holds_grant:
                self._grant(queued, now, extra=True)
            elif queued.waiting:
                queued.turn = Waiter()
        wake(granted)
        return queued

    def _pump(self) -> list[Queued]:
        """Grant every call that may go; the caller wakes them once the lock is free."""
        granted = self._grant_all()
        if self.queue.waiting and self.warming.give_up():
            granted += self._grant_all()
        return granted

    def _grant_all(self) -> list[Queued]:
        granted: list[Queued] = []
        now = self._clock()
        while self.queue.waiting and self.queue.has_room():
            queued = self._choose(now)
            if queued is None:
                break
            granted.append(self._grant(queued, now))
        return granted

    def _choose(self, now: float) -> Queued | None:
        cache = self.cache
        queued = cache.choose(self.queue, now, self.pace.speed)
        if queued is None and cache.again_at_s < self._again_at_s:
            self._again_at_s = cache.again_at_s
            self._background.call_later(cache.again_at_s - now, self._look_again)
        return queued

    def _grant(self, queued: Queued, now: float, *, extra: bool = False) -> Queued:
        queued.extra = extra
        self._entered[queued] = self.cache
        self.cache_orders.pressed(self.cache.enter(queued, now, self.pace.speed))
        return self.queue.grant(queued, extra=extra)

    def _look_again(self) -> None:
        self._again_at_s = inf
        self.go_on()

    def first_token(self, queued: Queued) -> None:
        """Note that a call's prefill is done; others may have waited for it."""
        with self.lock:
            granted = self._pump() if self.cache.first_token(queued) else ()
        wake(granted)

    def leave(self, queued: Queued, *, usage: Usage | None, tokens: int, followed: Callable[[], bool]) -> None:
        """Give the place or the grant back and let the next ones go. Idempotent.

        Args:
            queued: The entry from ``enter``.
            usage: What the engine counted, if it did.
            tokens: What the call left in the engine's cache; an estimate where the engine did not say.
            followed: Whether the workflow is still known, asked under the lock so that a run that ends
                at this moment either is seen here or cleans up after us.
        """
        with self.lock:
            was_granted = queued.granted
            verdict = None
            if self.queue.leave(queued) and was_granted:
                verdict = self._settle(queued, usage, tokens, keep=followed())
                self.queue.served(queued.call.identity.workflow, self._clock())
            granted = self._pump()
            self.cache.tidy()
        self.warming.look_soon()
        wake(granted)
        self._end_drains()
        self.cache_orders.tell(verdict)

    def _settle(self, queued: Queued, usage: Usage | None, tokens: int, *, keep: bool) -> Verification | None:
        verdict = None
        if usage is not None and queued.claimed is not None:
            verdict = self.orders.judge(queued.claimed, usage.cached_tokens)
        self._entered.pop(queued).leave(queued, usage, self._clock(), tokens=tokens, followed=keep)
        self.warming.ended(queued, usage, reached=tokens > 0, followed=keep)
        return verdict

    # What stays cached

    def apply(self, action: CacheAction) -> None:
        """Carry out what the memory policy asked for."""
        if action.verb is Verb.WARM:
            self.warming.wish(action)
            return
        with self.lock:
            if action.verb is Verb.FLUSH:
                self.warming.forget(action.workflow)  # nobody needs that prompt again
            if action.verb is not Verb.PIN:
                self.warming.dismiss(action.workflow)
            cache = self.cache
            trail = cache.apply(action)
            granted = self._pump()
            self.cache.tidy()
        if trail is not None:
            self.cache_orders.bring(cache, action, trail)
        wake(granted)
        self.cache_orders.tell()

    def turned(self, workflow: str, doing: Doing) -> None:
        """Note what a workflow waits for, outside of any model."""
        with self.lock:
            self.cache.turned(workflow, doing, self._clock())
            granted = self._pump()
            self.cache.tidy()  # who waits for long may be saved meanwhile
        wake(granted)

    def returned(self, workflow: str) -> None:
        """Note that a workflow comes back that was away for who knows how long: is it still the same engine?"""
        with self.lock:
            believed, idle = self.cache.tokens_of(workflow) > 0, not self.queue.in_flight
        if believed:
            self.health.ask_for_return(idle=idle)

    def forget(self, workflow: str) -> None:
        """Drop what is known of a workflow that will not come back."""
        with self.lock:
            self.warming.forget(workflow)
            self.cache.forget(workflow)
            granted = self._pump()
        wake(granted)

    def _may_tidy(self) -> bool:
        return not (self.queue.in_flight or self.warming.running) and self.health.can(Capability.FLUSH_WORKFLOW)

    # What may be changed while running

    def pause(self) -> None:
        """Grant nothing more, except to who holds a grant already: he could not give it back otherwise."""
        with self.lock:
            self.queue.paused = True
            self.warming.give_up()

    def resume(self) -> None:
        """Grant again, and end the waits of who drains."""
        with self.lock:
            self.queue.paused = False
            granted = self._pump()
        wake(granted)
        self.drains.end()

    def drain(self) -> Waiter:
        """Pause, and return what comes when nothing is in flight any more, or somebody resumed."""
        with self.lock:
            self.queue.paused = True
            self.warming.give_up()
            drained = self.drains.begin()
        self._end_drains()
        return drained

    def is_drained(self) -> bool:
        """Whether it is paused with nothing in flight."""
        with self.lock:
            return self.queue.paused and not self.queue.in_flight

    def _end_drains(self) -> None:
        # Without the lock: who drains is known before he looks at what is in flight, and whoever leaves does so the
        # other way round, so one of the two sees the other. While it is paused, what is in flight only shrinks.
        if self.drains and not self.queue.in_flight:
            self.drains.end()

    def change_policies(self, policies: Policies) -> None:
        """Order by other policies, those that wait as well. What a policy raises on one of them changes nothing."""
        with self.lock:
            self.queue.change_policies(policies, self._clock())
            granted = self._pump()
        wake(granted)

    def set_limits(self, limits: Mapping[str, int | None]) -> None:
        """Set ``max_concurrency`` and ``capacity``, as far as they are in *limits*.

        They become the backend's own, so that what the engine says of itself later is held against them.

        Raises:
            ConfigError: A limit is out of its range; nothing is changed then.
        """
        with self.lock:
            self.backend = replace(self.backend, **limits)  # type: ignore[arg-type]  # the caller checked the types
            self.queue.capacity = self.backend.capacity
            self._bound_concurrency(self.health.probe)
            granted = self._pump()
        wake(granted)

    # The rest

    def reprioritize(self, workflow: str, touched: Callable[[Call], bool]) -> None:
        """Order a workflow's waiting calls anew after their hints changed."""
        with self.lock:
            self.queue.reorder(self._clock(), workflow, touched)
            granted = self._pump()
        wake(granted)

    def turn_away(self) -> None:
        """End every wait with ``OrlaClosed``, and let nobody wait any more."""
        with self.lock:
            self._closed = True
            self.warming.give_up(again=False)
            waiting = list(self.queue)
        for queued in waiting:
            assert queued.turn is not None, "who waits has something to wait for"
            queued.turn.fail(OrlaClosed(CLOSED))
        self.health.close()
        self.drains.end(OrlaClosed("this Orla was closed while a backend was drained"))

    @contextlib.contextmanager
    def at_circuit(self, call: Call) -> Iterator[None]:
        """Show *call* among those that wait, while another one tries the engine."""
        self._at_circuit[call.id] = call
        try:
            yield
        finally:
            self._at_circuit.pop(call.id, None)

    def statistics(self) -> BackendStatistics:
        """Return a snapshot."""
        with self.lock:
            health = self.health
            return BackendStatistics(
                self.queue.statistics(),
                self.cache.statistics(),
                health.reachable,
                health.state(),
                health.breaker.trips,
                admission=self.cache.admission(),
                warm_ups=self.warming.statistics(),
                waiting=who_waits(self.queue, list(self._at_circuit.values()), self._clock()),
            )

    def check_integrity(self) -> None:
        """Assert the invariants of queue and slots, and that seats belong to granted calls."""
        with self.lock:
            self.queue.check_integrity()
            self.health.breaker.check_integrity()
            self.cache.check_integrity()
            assert all(queued.granted for queued in self._entered)


def wake(granted: Sequence[Queued]) -> None:
    """Tell waiting callers that it is their turn; never called under a lock."""
    for queued in granted:
        if queued.turn is not None:
            queued.turn.come()
