"""Bounds on how long something may say nothing, kept by one timer for all requests.

A timer of its own for each read costs more than the read. So these bounds are looked at every now and then, and end a
little late.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

LEAST_LOOK_S, MOST_LOOK_S = 0.02, 1.0
LOOKS = 8
"""So often is looked in the time of a bound, within these limits."""


class SilenceWatch:
    """All bounds of one kind.

    Args:
        seconds: So long nothing may be said.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.watched: set[SilenceBound] = set()
        self._look_s = min(MOST_LOOK_S, max(LEAST_LOOK_S, seconds / LOOKS))
        self._timer: asyncio.TimerHandle | None = None

    def bound(self) -> SilenceBound:
        """Return a bound for this task: ``with watch.bound() as bound: ...; bound.heard = True``."""
        task = asyncio.current_task()
        assert task is not None
        return SilenceBound(self, task)

    def begin(self, bound: SilenceBound) -> None:
        """Watch a bound."""
        self.watched.add(bound)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._look_s, self._look)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for each in self.watched:
            each.look(now, self.seconds)
        self._timer = loop.call_later(self._look_s, self._look) if self.watched else None


class SilenceBound:
    """One bound; while it is watched its task is cancelled once nothing was heard for too long.

    Raises:
        TimeoutError: At its end, if that is why.
    """

    __slots__ = ("_before", "_expired", "_since_s", "_task", "_watch", "heard", "more_s")

    def __init__(self, watch: SilenceWatch, task: asyncio.Task[Any]) -> None:
        self.heard = True
        """Whether something was heard since the last look; set by what hears it."""
        self.more_s = 0.0
        """So much longer than all bounds of its kind it lasts."""
        self._watch = watch
        self._task = task
        self._before = 0
        self._since_s = 0.0
        self._expired = False

    def __enter__(self) -> Self:
        self._before = self._task.cancelling()
        self._watch.begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watch.watched.discard(self)
        if self._expired and kind is asyncio.CancelledError and self._task.uncancel() <= self._before:
            raise TimeoutError from error

    def look(self, now: float, seconds: float) -> None:
        """Cancel the task if nothing was heard for so long."""
        if self.heard:
            self.heard, self._since_s = False, now
        elif now - self._since_s >= seconds + self.more_s and not self._expired:
            self._expired = True
            self._task.cancel()
