"""How many calls an engine takes at once, learned from its reports of its load.

An engine has a queue of its own, in its own order. What we send beyond its batch waits there, where neither workflow
nor cache counts, and priorities only if it heeds them. So while it says that calls wait, we send no more than it runs
and a few to follow on at once: its batch stays full, and the order stays ours.
"""

from __future__ import annotations

from math import inf

from orla_lg.core.engine.capabilities import EngineStats

AHEAD = 2
"""So many may wait at the engine, for it never to run dry."""

PERSISTENT = 2
"""So many times in a row it must say so: calls that just arrived wait for a moment everywhere."""

OPENING = 1.25
"""By this the window grows each time the engine says that none waits."""

UNBOUNDED = 4096.0


class Window:
    """The bound for calls in flight on one engine; ``inf`` where its queue was never seen."""

    def __init__(self) -> None:
        self.bound = inf
        self._crowded = 0

    def note(self, stats: EngineStats, in_flight: int) -> None:
        """Learn from the engine's report of its load while *in_flight* calls of ours were there."""
        if stats.running is None or stats.waiting is None:
            return
        if stats.waiting > AHEAD:
            self._crowded += 1
            if self._crowded >= PERSISTENT:
                self.bound = max(1, stats.running) + AHEAD
            return
        self._crowded = 0
        if stats.waiting == 0 and in_flight >= self.bound:
            self.bound = self.bound * OPENING + 1
            if self.bound > UNBOUNDED:
                self.bound = inf
