"""Which run reads a checkpoint: a run's read is told from a viewer's, and its end is heard where LangGraph ends it.

The configuration of a run carries LangGraph's runtime, and the same ``RunControl`` in all its parts: nested graphs
and branches are one owner. A viewer's (``get_state``) has none. The loop that reads is the nearest caller; on its
exit stack what it holds is given back after its last write, however it ends. A loop that fails before it has begun
never unwinds that stack: its callbacks, or its own end as an object, say so then.
"""

from __future__ import annotations

import secrets
import sys
import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from langchain_core.runnables.config import var_child_runnable_config
from langgraph.pregel._loop import PregelLoop

RUNTIME = "__pregel_runtime"

MOST_FRAMES = 40

_BEGINNINGS = ("__enter__", "__aenter__")


class RunOwner:
    """A run and all that is nested in it, as one owner of threads."""

    __slots__ = ("_outside", "holder", "over", "run")

    def __init__(self, run: str) -> None:
        self.run = run
        """Its id, for people."""
        self._outside = var_child_runnable_config.get()
        self.holder = secrets.token_hex(8)
        self.over = False

    @property
    def is_here(self) -> bool:
        """Whether this code runs in a node of it: beside its open stream its context is that of its caller."""
        return not self.over and var_child_runnable_config.get() is not self._outside


CURRENT: ContextVar[RunOwner | None] = ContextVar("orla_thread_owner", default=None)
"""The run of this context, while that is not over; a nested graph on a thread of its own belongs to it, too."""


def current() -> RunOwner | None:
    """Return the run of this context."""
    owner = CURRENT.get()
    return owner if owner is not None and owner.is_here else None


def control_of(config: Mapping[str, Any]) -> object | None:
    """Return what is the same in all parts of one run; ``None``: no run reads or writes, but a viewer."""
    runtime = (config.get("configurable") or {}).get(RUNTIME)
    control = getattr(runtime, "control", None)
    return runtime if control is None else control


def beginning_loop() -> PregelLoop | None:
    """Return the loop that is just beginning and reads its checkpoint in this very call; ``None`` for other reads."""
    frame = sys._getframe(1)
    for _ in range(MOST_FRAMES):
        if frame.f_code.co_name in _BEGINNINGS and isinstance(found := frame.f_locals.get("self"), PregelLoop):
            return found
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None


def run_of(loop: PregelLoop) -> str:
    """Return the id of a loop's run."""
    return str(getattr(loop.manager, "run_id", "") or "")


class Use:
    """One loop's use of a thread; it ends once."""

    def __init__(self, held: Any, loop: PregelLoop, ends: Any) -> None:
        self.held, self._ends = held, ends
        self.is_root = False
        self._finalizer = weakref.finalize(loop, self.dropped)
        self._finalizer.atexit = False
        self._run = run_of(loop)
        if self._run:
            UNFINISHED[self._run] = self

    def closed(self) -> None:
        """Note that it is over, and that nothing more needs to hear of it."""
        if self.is_root:
            self.held.owner.over = True
        self._finalizer.detach()
        if UNFINISHED.get(self._run) is self:
            del UNFINISHED[self._run]

    def dropped(self) -> None:
        """Note that its loop failed before it had begun, or was left behind: what it holds is given back aside."""
        self.closed()
        self._ends(self)


UNFINISHED: dict[str, Use] = {}
"""By run, the use of a thread that began with it and has not ended."""


def ended(run: str) -> None:
    """Note that a run has ended, by its callbacks: after its loop, if that began."""
    if (use := UNFINISHED.get(run)) is not None:
        use.dropped()
