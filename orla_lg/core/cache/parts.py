"""What stands between one backend's scheduler and its engine, made and joined in one place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from orla_lg.core.background import Background, Clock
from orla_lg.core.cache.caches import EngineCaches
from orla_lg.core.cache.isolation import Isolation, Salts
from orla_lg.core.cache.orders import CacheOrders, RecordSink
from orla_lg.core.cache.verification import OrderBook
from orla_lg.core.engine.backend import Backend, BackendAdapter
from orla_lg.core.engine.capabilities import EngineStats, Observable
from orla_lg.core.engine.health import Health, HealthListener
from orla_lg.core.engine.load import LoadWatch
from orla_lg.core.engine.speed import SpeedMeter
from orla_lg.core.engine.window import Window
from orla_lg.core.lookahead.estimates import Estimates
from orla_lg.core.memory.events import CacheEvent, Holding
from orla_lg.core.memory.returns import ReturnBook
from orla_lg.core.prefetch.book import WarmUp


@dataclass(frozen=True, eq=False, slots=True)
class Shared:
    """What the backends of one core share."""

    estimates: Estimates | None = None
    """What calls and graphs usually need."""
    sink: RecordSink | None = None
    """Learns what came of orders to engines."""
    signal: Callable[[Iterable[CacheEvent]], None] | None = None
    """Has the memory manager act on a backend that is full."""
    admission: bool = True
    """Whether calls wait until their tokens fit."""
    warm_up: WarmUp | None = None
    """What prefetches may take; ``None``: there are none."""
    returns: ReturnBook | None = None
    """When workflows come back."""
    salts: Salts | None = None


NOTHING_SHARED = Shared()


class EngineParts:
    """The parts of one backend that know its engine.

    Args:
        backend: The backend.
        adapter: The engine's side.
        background: Where probes and orders run.
        clock: Monotonic seconds.
        lock: The backend's.
        shared: Of its core.
        listener: Acts on what the engine is.
        told: Called with what the engine says of its load.
        holdings: Returns which workflows could give up what; called under the lock.
        quiet: Whether nothing runs on the engine now.
    """

    def __init__(
        self,
        backend: Backend,
        adapter: BackendAdapter,
        background: Background,
        clock: Clock,
        lock: threading.Lock,
        shared: Shared,
        listener: HealthListener,
        *,
        told: Callable[[EngineStats], None],
        holdings: Callable[[], Sequence[Holding]],
        quiet: Callable[[], bool],
    ) -> None:
        self.isolation = Isolation(shared.salts, on=backend.isolate_tenants)
        self.health = Health(backend, adapter, background, clock, lock, listener)
        self.load = LoadWatch(adapter, background, clock, told) if isinstance(adapter, Observable) else None
        self.window = Window()
        self.speed_meter = SpeedMeter()
        self.orders = OrderBook()
        self.cache_orders = CacheOrders(
            backend.name, adapter, self.orders, holdings, lock, background, clock,
            offers=self.health.offers, sink=shared.sink, signal=shared.signal,
        )  # fmt: skip
        self.caches = EngineCaches(
            backend, adapter, self.orders, lock, background, clock, self.health, self.speed_meter, shared.estimates,
            shared.returns, admission=shared.admission, quiet=quiet, tell=self.cache_orders.tell,
            go_on=listener.go_on,
        )  # fmt: skip
