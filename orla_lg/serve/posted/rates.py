"""How many calls a second a posted backend takes (``rate_per_second``): a bucket that each grant takes one from.

A queue asks before each grant. Where the bucket is empty nothing is granted, and the queue is looked at again when
there is one more. What was granted is read off the queue's own count, so nothing is in the path of a call.
"""

from __future__ import annotations

from dataclasses import dataclass

from orla_lg.core.scheduler import BackendScheduler
from orla_lg.core.serving import Serving
from orla_lg.serve.posted.book import PostedItems
from orla_lg.serve.posted.items import PostedBackend

LEAST_WAIT_S = 0.001


@dataclass(eq=False, slots=True)
class RateBucket:
    """What may be granted: at most a second's worth, and at least one."""

    rate: float
    tokens: float
    at_s: float
    granted: int
    """By the queue's count, when it was looked at last."""
    wakes_at_s: float = 0.0
    """When the queue is looked at again."""

    def is_open(self, now: float, granted: int) -> bool:
        """Whether another call may be granted."""
        refilled = min(max(1.0, self.rate), self.tokens + (now - self.at_s) * self.rate)
        self.tokens = refilled - (granted - self.granted)
        self.at_s, self.granted = now, granted
        return self.tokens >= 1.0

    @property
    def wait_s(self) -> float:
        """How long until there is one."""
        return max(LEAST_WAIT_S, (1.0 - self.tokens) / self.rate)


class BackendRates:
    """The rates of all posted backends.

    Args:
        serving: The core.
    """

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._rates: dict[str, float] = {}
        self._buckets: dict[BackendScheduler, RateBucket] = {}

    def follow(self, items: PostedItems) -> None:
        """Let the rates hold that are posted now; 0 is none."""
        posted = {name: each.item for name, each in items.of(PostedBackend).items()}
        self._rates = {name: each.rate_per_second for name, each in posted.items() if each.rate_per_second}
        schedulers = self._serving.schedulers
        self._buckets = {
            scheduler: bucket
            for scheduler, bucket in self._buckets.items()
            if schedulers.get(name := scheduler.backend.name) is scheduler and self._rates.get(name) == bucket.rate
        }
        for name in schedulers:
            schedulers[name].go_on()

    def may_grant(self, backend: str) -> bool:
        """Whether a backend's queue may grant another call; asked under its lock."""
        rate = self._rates.get(backend)
        if rate is None:
            return True
        scheduler = self._serving.schedulers.get(backend)
        if scheduler is None:
            return True
        now, granted = scheduler.clock(), scheduler.queue.granted
        bucket = self._buckets.get(scheduler)
        if bucket is None:
            bucket = self._buckets[scheduler] = RateBucket(rate, max(1.0, rate), now, granted)
        if bucket.is_open(now, granted):
            return True
        if scheduler.queue.waiting and bucket.wakes_at_s <= now:
            bucket.wakes_at_s = now + bucket.wait_s
            self._serving.background.call_later(bucket.wait_s, scheduler.go_on)
        return False
