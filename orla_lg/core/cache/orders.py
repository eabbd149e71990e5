"""Sends the memory manager's orders to one engine, and reports their effects.

Orders go out on the background loop; their effects land in the order book, under the backend's lock, and then,
without it, in the records of the calls that they followed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from orla_lg.core.background import Background, Clock
from orla_lg.core.cache.engine_cache import EngineCache
from orla_lg.core.cache.verification import Order, OrderBook, OrderLog, Verification
from orla_lg.core.engine.backend import BackendAdapter, Capability, Effect
from orla_lg.core.engine.capabilities import KVControl, Lingering, WorkflowCache
from orla_lg.core.memory.events import CacheAction, CacheEvent, EventKind, Holding
from orla_lg.core.memory.verbs import VERBS, EngineOrder
from orla_lg.errors import OrlaClosed


class RecordSink(Protocol):
    """Learns what came of orders, outside of any lock."""

    def ordered(self, call_id: str, order: Order) -> None:
        """Note an order that followed a call, and its effect."""
        ...

    def judged(self, call_id: str, verdict: Verification) -> None:
        """Note whether the next call found what was promised after a call."""
        ...


class CacheOrders:
    """Sends one backend's orders to its engine, and their effects to the order book and the records.

    Args:
        name: The backend's.
        adapter: The engine's side.
        orders: What was asked of the engine.
        holdings: Returns which workflows could give up what; called under the lock.
        lock: The backend's.
        background: Where orders run.
        clock: Monotonic seconds.
        offers: Whether the engine is there and has a capability.
        sink: Learns what came of orders; ``None``: nothing does.
        signal: Has the memory manager act when the backend is full; ``None``: there is none.
    """

    def __init__(
        self,
        name: str,
        adapter: BackendAdapter,
        orders: OrderBook,
        holdings: Callable[[], Sequence[Holding]],
        lock: threading.Lock,
        background: Background,
        clock: Clock,
        *,
        offers: Callable[[Capability], bool],
        sink: RecordSink | None,
        signal: Callable[[Iterable[CacheEvent]], None] | None = None,
    ) -> None:
        self._name = name
        self._orders = orders
        self._holdings = holdings
        self._lock = lock
        self._background = background
        self._clock = clock
        self._offers = offers
        self._sink = sink
        self._signal = signal
        self._control = adapter if isinstance(adapter, KVControl) else None
        self._lingering = adapter if isinstance(adapter, Lingering) else None
        self.lingers = self._lingering is not None
        """Whether the engine wants to know how long calls may still come."""
        self._pressed_tokens = 0.0
        """Tokens wanted beyond what the engine holds, and not reported yet."""

    # To the engine

    def bring(self, cache: EngineCache, action: CacheAction, order_log: OrderLog) -> None:
        """Give the engine an order, the first that it is able to of those that the verb stands for."""
        order = next((each for each in VERBS[action.verb].orders if self._offers(each.needs)), None)
        if self._control is not None and order is not None:
            try:
                self._background.errand(self._order(self._control, order, cache, action, order_log))
            except OrlaClosed:
                self._took_effect(cache, action, order_log, Effect.FAILED)
        else:
            self._took_effect(cache, action, order_log, Effect.UNSUPPORTED)

    async def _order(
        self, control: KVControl, order: EngineOrder, cache: EngineCache, action: CacheAction, order_log: OrderLog
    ) -> None:
        effect = Effect.UNKNOWN
        try:
            effect = await order.ask(control, WorkflowCache(action.workflow), action)
        finally:
            self._took_effect(cache, action, order_log, effect)

    def _took_effect(self, cache: EngineCache, action: CacheAction, order_log: OrderLog, effect: Effect) -> None:
        with self._lock:
            cache.took_effect(action, order_log, effect, self._clock())
        self.tell()

    def linger(self, keep_s: float) -> None:
        """Tell an engine that drops idle models how long to expect calls for this one; no call waits for that."""
        if self._lingering is not None and self._offers(Capability.KEEP):
            with contextlib.suppress(OrlaClosed):
                self._background.submit(self._linger(self._lingering, keep_s))

    async def _linger(self, lingering: Lingering, keep_s: float) -> None:
        effect = await lingering.linger(keep_s)
        if effect is not None:
            with self._lock:
                self._orders.lingers(effect)

    # To the records

    def tell(self, verdict: Verification | None = None) -> None:
        """Put into the records of calls the effects of the orders after them, and what the next call found."""
        news: Sequence[tuple[str, Order]] = ()
        if self._orders.news:
            with self._lock:
                news = self._orders.take_news()
        if self._sink is None:
            return
        for call_id, order in news:
            self._sink.ordered(call_id, order)
        if verdict is not None and verdict.expected.after is not None:
            self._sink.judged(verdict.expected.after, verdict)

    def pressed(self, needs_tokens: float) -> None:
        """Report to the memory manager, soon and once, how many tokens are wanted beyond what the engine holds.

        Called under the lock; nothing is reported where the engine takes no orders on what to evict first.
        """
        if needs_tokens <= 0 or self._signal is None or not self._offers(Capability.RELEASE):
            return
        if not self._pressed_tokens:
            self._background.call_later(0.0, self._tell_pressure)
        self._pressed_tokens += needs_tokens

    def _tell_pressure(self) -> None:
        with self._lock:
            needs, self._pressed_tokens = self._pressed_tokens, 0.0
            held = self._holdings()
        assert self._signal is not None
        self._signal([CacheEvent(EventKind.PRESSURE, "", self._name, needs_tokens=round(needs), holdings=held)])
