"""Prices that change: posted backends that name where their price is to be read (``cost_source``).

All sources are read in turn, in one interval; the last price that could be read holds, however old it is. What was
posted of a backend's prices is not written over, and holds again when the source is cleared.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from math import isfinite
from typing import Any

from orla_lg.core.boundary.checked import is_number
from orla_lg.core.engine.backend import Cost
from orla_lg.core.serving import Serving
from orla_lg.serve.posted.allowed import Allowed
from orla_lg.serve.posted.book import PostedItems
from orla_lg.serve.posted.fetching import OutsideClient, OutsideFault
from orla_lg.serve.posted.items import REFRESH_MS, PostedBackend, PostedSetting
from orla_lg.serve.posted.outside import COSTS

log = logging.getLogger("orla_lg")

TIMEOUT_S = 5.0
PRICES = ("input_cost_per_mtoken", "output_cost_per_mtoken")


class PriceReader:
    """Reads the prices of posted backends again and again. Of the server's loop.

    Args:
        serving: The core.
        client: Asks.
        allowed: Where may be asked.
    """

    def __init__(self, serving: Serving, client: OutsideClient, allowed: Allowed) -> None:
        self.failures = Counter[str]()
        """By backend."""
        self.read_s = dict[str, float]()
        """When each backend's price was read last, in seconds since 1970."""
        self._serving, self._client, self._allowed = serving, client, allowed
        self._items = PostedItems()
        self._live = dict[str, Cost]()
        self._wake = asyncio.Event()

    def follow(self, items: PostedItems) -> None:
        """Read what is posted now, at once where a source is another one."""
        before = {each.name: each.cost_source for each in self._sources()}
        self._items = items
        after = {each.name: each.cost_source for each in self._sources()}
        for name in before.keys() - after.keys():
            self._live.pop(name, None)
            self.read_s.pop(name, None)
            self._restore(name)
        for name in after:
            self._set(name)  # a change of the backend has put its own prices back
        if before != after:
            self._wake.set()

    def _sources(self) -> Iterator[PostedBackend]:
        for stored in self._items.of(PostedBackend).values():
            if stored.item.cost_source:
                yield stored.item

    @property
    def interval_s(self) -> float:
        """How long after one round the next one begins."""
        stored = self._items.get(PostedSetting, COSTS)
        return (REFRESH_MS if stored is None else stored.item.refresh_interval_ms) / 1000

    async def run(self) -> None:
        """Read all prices, for ever."""
        while True:
            for backend in list(self._sources()):
                await self._read(backend)
            try:
                async with asyncio.timeout(self.interval_s):
                    await self._wake.wait()
            except TimeoutError:
                continue
            self._wake.clear()

    async def _read(self, backend: PostedBackend) -> None:
        try:
            self._allowed.check_url("cost_source", backend.cost_source)
            said = await self._client.ask("GET", backend.cost_source, timeout_s=TIMEOUT_S)
            self._live[backend.name] = cost_in(said, backend.cache_read_cost_per_mtoken)
        except (OutsideFault, ValueError) as error:
            if not self.failures[backend.name]:
                log.warning("the price of backend %r cannot be read, the last one holds: %s", backend.name, error)
            self.failures[backend.name] += 1
            return
        self.read_s[backend.name] = time.time()
        self._set(backend.name)

    def _set(self, name: str) -> None:
        scheduler, cost = self._serving.schedulers.get(name), self._live.get(name)
        if scheduler is not None and cost is not None and scheduler.backend.cost != cost:
            scheduler.backend = replace(scheduler.backend, cost=cost)

    def _restore(self, name: str) -> None:
        scheduler, stored = self._serving.schedulers.get(name), self._items.get(PostedBackend, name)
        if scheduler is not None and stored is not None:
            scheduler.backend = replace(scheduler.backend, cost=posted_cost(stored.item))


def posted_cost(backend: PostedBackend) -> Cost:
    """Return the prices that were posted of a backend."""
    return Cost(
        backend.input_cost_per_mtoken or 0.0,
        backend.output_cost_per_mtoken or 0.0,
        backend.cache_read_cost_per_mtoken,
    )


def cost_in(said: Any, cached: float | None) -> Cost:
    """Return the prices in an answer: both must be there.

    Raises:
        OutsideFault: They are not.
    """
    prices: list[Any] = [said.get(name) for name in PRICES] if isinstance(said, dict) else [None]
    if not all(is_number(each) and isfinite(each) and each >= 0 for each in prices):
        raise OutsideFault("error", "input_cost_per_mtoken and output_cost_per_mtoken must be numbers, 0 or more")
    return Cost(float(prices[0]), float(prices[1]), cached)
