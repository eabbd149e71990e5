"""A clock that moves when it is told to, and calls who asked to be called."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf


@dataclass(order=True, slots=True)
class Timer:
    """A call to come; timers at one moment fire in the order in which they were set."""

    at_s: float
    order: int
    function: Callable[[], None] = field(compare=False, repr=False)
    cancelled: bool = field(default=False, compare=False)

    def cancel(self) -> None:
        """Do not fire. Idempotent."""
        self.cancelled = True


class VirtualClock:
    """Virtual monotonic seconds; calling it tells the time, as ``time.monotonic`` does."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s
        self._timers: list[Timer] = []
        self._orders = itertools.count()

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self._now_s

    def call_at(self, at_s: float, function: Callable[[], None]) -> Timer:
        """Call *function* at *at_s*, or now if that is past."""
        timer = Timer(max(at_s, self._now_s), next(self._orders), function)
        heapq.heappush(self._timers, timer)
        return timer

    def call_later(self, delay_s: float, function: Callable[[], None]) -> Timer:
        """Call *function* in *delay_s* seconds."""
        return self.call_at(self._now_s + delay_s, function)

    @property
    def next_s(self) -> float:
        """When the next timer fires; infinity if there is none."""
        while self._timers and self._timers[0].cancelled:
            heapq.heappop(self._timers)
        return self._timers[0].at_s if self._timers else inf

    def fire_next(self) -> None:
        """Jump to the next timer and fire it alone."""
        self._now_s = self.next_s
        heapq.heappop(self._timers).function()

    def run_until(self, at_s: float) -> None:
        """Fire every timer up to *at_s*, those set on the way included, and stop there.

        Args:
            at_s: A finite time.
        """
        while self.next_s <= at_s:
            self.fire_next()
        self._now_s = max(self._now_s, at_s)

    def run(self) -> None:
        """Fire timers until there is none."""
        while self.next_s < inf:
            self.fire_next()
