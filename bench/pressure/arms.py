"""The arms: the same sessions, let through in different ways."""

from __future__ import annotations

from asyncio import Semaphore
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

from bench.lib import turns


@dataclass(frozen=True, slots=True)
class Arm(turns.Arm):
    """One way to serve the sessions; with admission, calls wait until their cache fits."""

    cap: int | None = None
    """Sessions under way at once; ``None`` lets all in."""
    by_arrival: bool = False
    """Calls carry the engine's own priority: an earlier session's go first."""
    plugin: bool = False
    """Wrapped, the engine's plugin hears of workflows; without it, it is as if it were not there."""
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
    *(Arm(f"cap{most}", cap=most) for most in (4, 6, 8)),
    Arm(WRAPPED, {"admission": True}),
    Arm(PLUGIN, {"admission": False}, plugin=True),
    Arm(BOTH, {"admission": True}, plugin=True),
)
OURS = tuple(arm.name for arm in ARMS if arm.orla is not None)
ENDLESS = Arm("no eviction", endless=True)
