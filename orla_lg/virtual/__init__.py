"""Virtual time: hours of serving in seconds, the same each time, and a deadlock is an error instead of a wait.

Three things, each made of the one before:

* ``VirtualClock`` for discrete events without any loop;
* ``VirtualLoop``, an asyncio loop on that clock, with ``run`` and ``in_virtual_time`` for async tests;
* ``VirtualServing``, the real core on that loop, with engines that are plain state (``VirtualEngine``).
"""

from orla_lg.virtual.clock import Timer, VirtualClock
from orla_lg.virtual.loop import Deadlock, VirtualLoop, in_virtual_time, run
from orla_lg.virtual.serving import (
    EngineDriver,
    EngineEvent,
    StillAdapter,
    VirtualBackground,
    VirtualEngine,
    VirtualServing,
)

__all__ = [
    "Deadlock",
    "EngineDriver",
    "EngineEvent",
    "StillAdapter",
    "Timer",
    "VirtualBackground",
    "VirtualClock",
    "VirtualEngine",
    "VirtualLoop",
    "VirtualServing",
    "in_virtual_time",
    "run",
]
