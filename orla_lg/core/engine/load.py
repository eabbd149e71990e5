"""An engine's own report of its load, asked for in the background while calls want it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future

from orla_lg.core.background import Background
from orla_lg.core.engine.backend import Capability, Probe
from orla_lg.core.engine.capabilities import EngineStats, Observable
from orla_lg.errors import OrlaClosed

PAUSE_S = 1.0
"""An engine is asked at most this often."""

OFTEN_S = 0.3
"""And so often where each report counts, as it decides whether places are free."""

INTEREST_S = 10.0
"""For so long after the last call that wanted it, it is asked on; a call in this time finds news."""

FRESH_S = 3.0
"""What is older than this says nothing of now."""

LIMIT_S = 2.0
"""An answer that takes longer is none."""


class LoadWatch:
    """One engine's load. ``wanted`` is called on the request path and waits for nothing."""

    def __init__(
        self,
        adapter: Observable,
        background: Background,
        clock: Callable[[], float],
        on_stats: Callable[[EngineStats], None] = lambda stats: None,
    ) -> None:
        self._adapter = adapter
        self._on_stats = on_stats
        self._background = background
        self._clock = clock
        self._lock = threading.Lock()
        self._watched_until_s = float("-inf")
        """By then the watch has asked again, unless it ended; a time, since a fork ends it without a word."""
        self._wanted_s = float("-inf")
        self._reported_s = self._often_s = float("-inf")
        self._stats: EngineStats | None = None
        self.asked_s = float("-inf")
        """When the last report was asked for: it is of a moment between then and its coming."""

    def wanted(self, probe: Probe | None, *, often: bool = False) -> EngineStats | None:
        """Return the engine's last report, and have it asked again, or often; ``None`` where it has none.

        Only an engine that says it can is asked: one that does not mention it would answer an error each time.
        """
        if probe is None or Capability.STATS not in probe.capabilities or not probe.can(Capability.STATS):
            return None
        now = self._wanted_s = self._clock()
        if often:
            self._often_s = now
        if now > self._watched_until_s:
            self._watch(now)
        return self.latest

    @property
    def latest(self) -> EngineStats | None:
        """The last report while it is fresh; asks for none."""
        return self._stats if self._clock() - self._reported_s <= FRESH_S else None

    def _watch(self, now: float) -> None:
        with self._lock:
            if now <= self._watched_until_s:
                return
            self._watched_until_s = now + 2 * (LIMIT_S + PAUSE_S)
        self._again()

    def _again(self) -> None:
        """Ask once, and go on while calls want it."""
        now = self._clock()
        if now - self._wanted_s > INTEREST_S:
            self._watched_until_s = float("-inf")
            return
        self._watched_until_s = now + 2 * (LIMIT_S + PAUSE_S)
        with contextlib.suppress(OrlaClosed):
            self._background.submit(self._ask()).add_done_callback(self._asked)

    async def _ask(self) -> tuple[EngineStats, float]:
        asked_s = self._clock()
        async with asyncio.timeout(LIMIT_S):
            return await self._adapter.stats(), asked_s

    def _asked(self, asked: Future[tuple[EngineStats, float]]) -> None:
        if not asked.cancelled() and asked.exception() is None:  # a silent engine is the circuit's business
            (self._stats, self.asked_s), self._reported_s = asked.result(), self._clock()
            self._on_stats(self._stats)
        is_often = self._clock() - self._often_s <= PAUSE_S
        self._background.call_later(OFTEN_S if is_often else PAUSE_S, self._again)
