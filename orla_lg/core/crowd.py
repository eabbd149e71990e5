"""A hundred thousand waiting calls, kept out of the garbage collector's way.

A full collection looks at every object that lives: with 130,000 calls waiting that holds the process up for half a
second, though none of them is garbage. So while very many wait, those that are there are *frozen* (``gc.freeze``):
the collector passes them by. They still go when nothing refers to them any more; only cycles among them wait for the
end of the crowd.
"""

from __future__ import annotations

import gc

MANY = 4_000
"""So many waiting calls are a crowd; half of that ends it."""

AT_ONCE = 2_000
"""Frozen each time so many more have come; these few the collector looks at."""


class Crowd:
    """Freezes and thaws as calls begin to wait and stop."""

    def __init__(self) -> None:
        self._come = 0
        """Since the last freeze."""
        self._frozen = False

    def grew(self, waiting: int) -> None:
        """Note that another call waits."""
        self._come += 1
        if waiting >= MANY and self._come >= AT_ONCE:
            self._come, self._frozen = 0, True
            gc.freeze()

    def shrank(self, waiting: int) -> None:
        """Note that a call waits no more."""
        if self._frozen and waiting < MANY // 2:
            self._frozen = False
            gc.unfreeze()
