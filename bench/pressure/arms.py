"""The arms: the same sessions, let through in different ways."""

from __future__ import annotations

from asyncio import Semaphore
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to serve the sessions."""

    name: str
    cap: int | None = None
    """Sessions under way at once; ``None`` lets all in."""
    by_arrival: bool = False
    """Calls carry the engine's own priority: an earlier session's go first."""
    wrapped: bool = False
    admission: bool = True
    """Wrapped, calls wait until their cache fits."""
    plugin: bool = False
    """Wrapped, the engine's plugin is told of workflows; without it, it is as if it were not there."""
    endless: bool = False
    """The pool is so large that nothing is evicted (simulated only)."""

    def door(self) -> AbstractAsyncContextManager[object]:
        """Return what a session passes before its first call; one for all sessions of a turn."""
        return nullcontext() if self.cap is None else Semaphore(self.cap)


BARE, AGAIN, WRAPPED = "bare", "bare_again", "wrapped"
PLUGIN, BOTH = "plugin", "plugin+admission"
ARMS = (
    Arm(BARE),
    Arm(AGAIN),
    Arm("priority", by_arrival=True),
    Arm("cap4", cap=4),
    Arm("cap6", cap=6),
    Arm("cap8", cap=8),
    Arm(WRAPPED, wrapped=True),
    Arm(PLUGIN, wrapped=True, admission=False, plugin=True),
    Arm(BOTH, wrapped=True, plugin=True),
)
OURS = tuple(arm.name for arm in ARMS if arm.wrapped)
ENDLESS = Arm("no eviction", endless=True)
