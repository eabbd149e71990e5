"""A moment in which nothing is granted at an engine, so that its reports count no call on its way.

A busy engine of many places begins a call in nearly each half-second: each of its reports may then count calls that
have just been granted, or have just ended, and shows nothing of the calls of lost replicas (``orphans``). A report
from within a hush is exact.
"""

from __future__ import annotations

from math import inf

from orla_lg.core.scheduler import BackendScheduler

AFTER_S = (3.0, 12.0)
"""Places that are at stake so long, while calls wait for them, are worth a hush; the next comes twice as late, until
so late: an engine at work for a lost replica is then granted nothing for a seventh of the time at most."""

LASTS_S = 2.0
"""A hush lasts so long at most; clear reports end it, mostly after a second. Where calls are so short that in nearly
each report one has just ended, most have ended by then."""


class Hush:
    """The hushes at one engine. Of the loop's thread.

    Args:
        scheduler: The engine's.
        enough: So many clear reports end a hush.
    """

    def __init__(self, scheduler: BackendScheduler, enough: int) -> None:
        self.scheduler, self._enough = scheduler, enough
        self._at_s = inf
        """When the next one begins, or when the present one began."""
        self._after_s = AFTER_S[0]
        self._clear = 0

    @property
    def is_on(self) -> bool:
        """Whether nothing is granted now."""
        return self.scheduler.queue.hushed

    def look(self, now: float, *, at_stake: bool, tells: bool) -> None:
        """Begin or end one, by the time.

        Args:
            now: Of the core's clock, in seconds.
            at_stake: Whether the engine's reports decide anything.
            tells: Whether there are any.
        """
        if not at_stake:
            self.end(now)
            self._at_s, self._after_s = inf, AFTER_S[0]
        elif self.is_on:
            if now >= self._at_s + LASTS_S:
                self.end(now)
        elif self._at_s == inf:
            self._at_s = now + self._after_s
        elif now >= self._at_s and tells and self.scheduler.queue.waiting:
            with self.scheduler.lock:
                self.scheduler.queue.hushed = True
            self._at_s, self._clear = now, 0
            self._after_s = min(2 * self._after_s, AFTER_S[1])

    def reported(self, now: float, asked_s: float, settles_s: float, *, ended_since: bool) -> None:
        """Take in that a report came that was asked for then; it is clear if all calls had settled by that time."""
        if self.is_on and asked_s >= self._at_s + settles_s and not ended_since:
            self._clear += 1
            if self._clear >= self._enough:
                self.end(now)

    def end(self, now: float) -> None:
        """Grant again."""
        if self.is_on:
            with self.scheduler.changing():
                self.scheduler.queue.hushed = False
            self._at_s = now + self._after_s
