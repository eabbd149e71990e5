"""Which ``EngineCache`` an engine has: its probe says so, and may say something else when it comes back."""

from __future__ import annotations

import threading
from collections.abc import Callable

from orla_lg.core.background import Background, Clock
from orla_lg.core.cache.engine_cache import EngineCache
from orla_lg.core.cache.prefix.cache import PrefixTreeCache
from orla_lg.core.cache.slots.cache import SlotCache
from orla_lg.core.cache.slots.files import SavedPool, instance_of
from orla_lg.core.cache.slots.orders import SlotOrders
from orla_lg.core.cache.slots.swap import Swaps
from orla_lg.core.cache.slots.worth import Prices
from orla_lg.core.cache.verification import OrderBook
from orla_lg.core.engine.backend import Backend, BackendAdapter, Capability, Probe
from orla_lg.core.engine.capabilities import SlotStore
from orla_lg.core.engine.health import Health
from orla_lg.core.engine.speed import SpeedMeter
from orla_lg.core.lookahead.estimates import Estimates
from orla_lg.core.memory.returns import ReturnBook


class EngineCaches:
    """Makes the cache of one backend's engine. Under the backend's lock.

    Args:
        backend: The backend.
        adapter: The engine's side.
        orders: What was asked of the engine.
        lock: The backend's.
        background: Where orders to the engine run.
        clock: Monotonic seconds.
        health: Of the engine.
        speed_meter: How fast it is.
        estimates: Of what calls need.
        returns: When workflows come back.
        admission: Whether calls wait until their tokens fit.
        quiet: Whether nothing runs on the engine now.
        tell: Called when there is news of orders.
        go_on: Lets the calls go that may go now.
    """

    def __init__(
        self,
        backend: Backend,
        adapter: BackendAdapter,
        orders: OrderBook,
        lock: threading.Lock,
        background: Background,
        clock: Clock,
        health: Health,
        speed_meter: SpeedMeter,
        estimates: Estimates | None,
        returns: ReturnBook | None,
        *,
        admission: bool,
        quiet: Callable[[], bool],
        tell: Callable[[], None],
        go_on: Callable[[], None],
    ) -> None:
        self._backend = backend
        self._orders = orders
        self._offers = health.offers
        self.prefix = PrefixTreeCache(orders, estimates, holds=admission)
        self._slot_orders = None
        if isinstance(adapter, SlotStore):
            self._slot_orders = SlotOrders(
                adapter, background, lock, orders, clock,
                quiet=lambda: quiet() and health.can(Capability.FLUSH_WORKFLOW), tell=tell, go_on=go_on,
                doubt=health.doubt_contents,
            )  # fmt: skip
        names = SavedPool(instance_of(backend.name, backend.url), backend.max_saved) if backend.max_saved else None
        self.swaps = Swaps(names, able=False, prices=Prices(speed_meter), odds=(returns or ReturnBook()).chance)

    def of(self, probe: Probe, before: EngineCache) -> EngineCache:
        """Return the cache of what an engine says it is; what lies in slots that are no more is forgotten."""
        cache = before
        if (probe.slots or 0) != before.slots:
            before.close()
            cache = self.prefix
            if probe.slots:
                cache = SlotCache(
                    probe.slots, self._orders, self.swaps, self._slot_orders, isolated=self._backend.isolate_tenants,
                    folder=self._backend.slot_folder,
                )  # fmt: skip
        cache.learned(probe, self._offers)
        return cache
