"""Virtual time for tests: what ``orla_lg.virtual`` has, under the name that tests know."""

from orla_lg.virtual import (
    Deadlock,
    EngineDriver,
    EngineEvent,
    StillAdapter,
    Timer,
    VirtualBackground,
    VirtualClock,
    VirtualEngine,
    VirtualLoop,
    VirtualServing,
    in_virtual_time,
    run,
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
