"""One backend: its queue, what its engine holds and how its engine is, under one short lock.

A call is granted when the queue has room *and* its workflow fits the cache. The scheduler starts no I/O by itself
except on the background loop.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from math import inf

from orla_lg.core.background import Background, Clock
from orla_lg.core.cache.engine_cache import EngineCache
from orla_lg.core.cache.parts import NOTHING_SHARED, EngineParts, Shared
from orla_lg.core.call import Call, Usage
from orla_lg.core.engine.backend import Backend, BackendAdapter, Probe, concurrency_of
from orla_lg.core.engine.capabilities import EngineStats
from orla_lg.core.memory.events import CacheAction, Doing, Verb
from orla_lg.core.operation.statistics import BackendStatistics, statistics_of
from orla_lg.core.prefetch.prefetcher import Prefetcher
from orla_lg.core.queues import BackendQueue, Policies, Queued
from orla_lg.core.steps import Waiter, Waiters
from orla_lg.errors import OrlaClosed

CLOSED = "this Orla was closed while the call waited"


class BackendScheduler:
    """Queue, cache and health of one backend."""

    def __init__(
        self,
        backend: Backend,
        adapter: BackendAdapter,
        background: Background,
        clock: Clock,
        policies: Policies,
        shared: Shared = NOTHING_SHARED,
    ) -> None:
        self.backend = backend
        self.adapter = adapter
        self.lock = threading.Lock()
        self.queue = BackendQueue(backend.name, policies, backend.capacity, backend.max_concurrency)
        parts = EngineParts(
            backend, adapter, background, clock, self.lock, shared, self, told=self._told,
            holdings=lambda: self.cache.holdings(),
            quiet=lambda: not (self.queue.in_flight or self.prefetcher.running),
        )  # fmt: skip
        self.isolation, self.health, self.load, self.window = parts.isolation, parts.health, parts.load, parts.window
        self.speed_meter, self.caches = parts.speed_meter, parts.caches
        self.orders, self.cache_orders = parts.orders, parts.cache_orders
        self.cache: EngineCache = self.caches.prefix
        """Of the kind that the engine turned out to be when it was last probed."""
        self._entered: dict[Queued, EngineCache] = {}
        """Calls with a grant, and the cache that let each in: a call leaves what it entered."""
        self.prefetcher = Prefetcher(self, background, clock, shared.warm_up, self.cache_orders.tell)
        self.listener = self.prefetcher if self.prefetcher.able else None
        """Hears of each call's entering, request and end; ``None`` where nothing does."""
        self.reports: list[Callable[[EngineStats], None]] = []
        """Called, outside the lock, with each report of the engine's load."""
        self._background = background
        self.clock = clock
        self._again_at_s = inf
        self.drains = Waiters()
        """What waits until nothing is in flight."""
        self._closed = False

    # What the engine is

    def learned(self, probe: Probe) -> None:
        """Follow what the engine says of itself."""
        self.cache = self.caches.of(probe, self.cache)
        self.queue.max_concurrency = concurrency_of(self.backend, probe)
        self.isolation.heed(self.backend.name, probe)

    def forgotten(self) -> None:
        """Expect no more that the engine holds anything."""
        self.cache.lose()

    def _told(self, stats: EngineStats) -> None:
        with self.lock:
            self.window.note(stats, self.queue.in_flight)
            self.queue.engine_takes = self.window.bound
        for report in self.reports:
            report(stats)
        self.go_on()

    # What may go

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock for a change; the calls that may go after it are granted and woken."""
        with self.lock:
            yield
            granted = self._pump()
        if granted:
            wake(granted)

    def go_on(self) -> None:
        """Let the calls go that may go now."""
        with self.lock:
            granted = self._pump()
        self.prefetcher.look_soon()
        if granted:
            wake(granted)

    def enter(self, call: Call, *, order: int | None, running: bool, holds_grant: bool) -> Queued:
        """Queue a call, and grant the calls that may go now; the returned entry may be granted already.

        Args:
            call: The call.
            order: Its arrival number, when it comes back after a failed attempt.
            running: Whether its workflow runs, and so keeps its slot.
            holds_grant: The caller already holds a grant here: to let it wait for itself would deadlock.

        Raises:
            QueueFull: Too many calls wait.
            OrlaClosed: Nothing may wait here any more.
        """
        if self.isolation.on or call.ask.scope:
            call.ask = self.isolation.within(call)
        with self.lock:
            if self._closed:
                raise OrlaClosed(CLOSED)
            now = self.clock()
            if self.listener is not None:
                self.listener.entering(call)
            if not self.queue.waiting and self.cache.lets_all and self.queue.has_room():
                queued = self.queue.pass_through(call, now, order=order)
                queued.running = running
                return self._grant(queued, now)
            queued = self.queue.enter(call, now, order=order, refuses=not holds_grant)
            queued.running = running
            granted = self._pump()
            if queued.waiting and holds_grant:
                self._grant(queued, now, extra=True)
            elif queued.waiting:
                queued.turn = Waiter()
        if granted:
            wake(granted)
        return queued

    def _pump(self) -> Sequence[Queued]:
        """Grant every call that may go; the caller wakes them once the lock is free.

        A call that finds no room has the prefetch given up that runs, and the queue is looked at once more.
        """
        queue = self.queue
        if not queue.waiting:
            return ()
        granted: list[Queued] = []
        now = self.clock()
        while queue.waiting:
            cache, queued = self.cache, None
            if queue.has_room():
                queued = cache.choose(queue, now, self.speed_meter.speed)
                if queued is None and cache.again_at_s < self._again_at_s:
                    self._again_at_s = cache.again_at_s
                    self._background.call_later(cache.again_at_s - now, self._look_again)
            if queued is not None:
                granted.append(self._grant(queued, now))
            elif not self.prefetcher.give_up():
                break
        return granted

    def _grant(self, queued: Queued, now: float, *, extra: bool = False) -> Queued:
        queued.extra = extra
        self._entered[queued] = self.cache
        if (gone_tokens := self.cache.enter(queued, now, self.speed_meter.speed)) > 0:
            self.cache_orders.pressed(gone_tokens)
        return self.queue.grant(queued, extra=extra)

    def _look_again(self) -> None:
        self._again_at_s = inf
        self.go_on()

    def first_token(self, queued: Queued) -> None:
        """Note that a call's prefill is done; others may have waited for it."""
        with self.lock:
            granted = self._pump() if self.cache.first_token(queued) else ()
        if granted:
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
        verdict, keep = None, False
        with self.lock:
            was_granted, left = queued.granted, self.queue.leave(queued)
            if left and was_granted:
                keep, now = followed(), self.clock()
                if usage is not None and queued.expected is not None:
                    verdict = self.orders.judge(queued.expected, usage.cached_tokens)
                self._entered.pop(queued).leave(queued, usage, now, tokens=tokens, followed=keep)
                if self.queue.waiting:
                    self.queue.served(queued.call.identity.workflow, now)
            if left and self.listener is not None:
                self.listener.ended(queued, usage, reached=was_granted and tokens > 0, followed=keep)
            granted = self._pump() if self.queue.waiting else ()
            self.cache.tidy()
        if granted:
            wake(granted)
        # Without the lock: a drain is known before it looks at what is in flight, and a call leaves the other way
        # round, so one of the two sees the other. While it is paused, what is in flight only shrinks.
        if self.drains and not self.queue.in_flight:
            self.drains.end()
        if self.orders.news or (verdict is not None and verdict.expected.after is not None):
            self.cache_orders.tell(verdict)

    # What stays cached

    def apply(self, action: CacheAction) -> None:
        """Carry out what the memory policy asks for."""
        if action.verb is Verb.WARM:
            self.prefetcher.wish(action)
            return
        with self.lock:
            self.prefetcher.heed(action)
            cache = self.cache
            order_log = cache.apply(action)
            granted = () if action.verb is Verb.PIN else self._pump()  # a pin gives no place up
            self.cache.tidy()
        if order_log is not None:
            self.cache_orders.bring(cache, action, order_log)
        if granted:
            wake(granted)
        self.cache_orders.tell()

    def turned(self, workflow: str, doing: Doing) -> None:
        """Note what a workflow waits for, outside of any model."""
        with self.lock:
            self.cache.turned(workflow, doing, self.clock())
            granted = self._pump()
            self.cache.tidy()  # a workflow that waits for long may be saved meanwhile
        if granted:
            wake(granted)

    def returned(self, workflow: str) -> None:
        """Note that a workflow comes back after an unknown time: is it still the same engine?"""
        with self.lock:
            believed, idle = self.cache.tokens_of(workflow) > 0, not self.queue.in_flight
        if believed:
            self.health.ask_for_return(idle=idle)

    def forget(self, workflow: str) -> None:
        """Drop what is known of a workflow that will not come back."""
        with self.changing():
            self.prefetcher.forget(workflow)
            self.cache.forget(workflow)

    # The rest

    def turn_away(self) -> None:
        """End every wait with ``OrlaClosed``, and let nothing wait any more."""
        with self.lock:
            self._closed = True
            self.prefetcher.give_up(again=False)
            waiting = list(self.queue)
        for queued in waiting:
            assert queued.turn is not None, "a waiting call has something to wait for"
            queued.turn.fail(OrlaClosed(CLOSED))
        self.health.close()
        self.drains.end(OrlaClosed("this Orla was closed while a backend was drained"))

    def granted_orders(self) -> set[int]:
        """Return the arrival numbers of the calls that hold a grant."""
        with self.lock:
            return {queued.order for queued in self._entered}

    def statistics(self) -> BackendStatistics:
        """Return a snapshot."""
        with self.lock:
            return statistics_of(self, self.clock())

    def check_integrity(self) -> None:
        """Assert the invariants of queue and slots, and that leases belong to granted calls."""
        with self.lock:
            self.queue.check_integrity()
            self.health.breaker.check_integrity()
            self.cache.check_integrity()
            assert all(queued.granted for queued in self._entered)


def wake(granted: Sequence[Queued]) -> None:
    """Let calls go whose turn it is; never called under a lock."""
    for queued in granted:
        if queued.turn is not None:
            queued.turn.come()
