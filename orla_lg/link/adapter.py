"""Engines as a replica has them: requests go there from here, probes and orders are the core's."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from orla_lg.core.call import Ask, Chunk
from orla_lg.core.engine.backend import BackendAdapter, Directions, Probe
from orla_lg.core.memory.events import CacheAction, CacheEvent
from orla_lg.errors import BackendUnavailable
from orla_lg.link.connection import Link


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
