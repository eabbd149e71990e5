"""The simulated engine: a discrete-event model of continuous batching.

It runs on a virtual clock (``engine.SimEngine``), as a server (``orla-lg sim up``), and is measured from a live
engine (``orla-lg sim calibrate``). Importing the package pulls nothing in: the adapter needs no extra, the server
needs ``orla-lg[sim]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orla_lg_sim.adapter import SimAdapter
    from orla_lg_sim.engine import SimEngine
    from orla_lg_sim.parameters import EngineParameters
    from orla_lg_sim.server import SimServer

__all__ = ["EngineParameters", "SimAdapter", "SimEngine", "SimServer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    homes = {"EngineParameters": "parameters", "SimAdapter": "adapter", "SimEngine": "engine", "SimServer": "server"}
    return getattr(import_module(f"orla_lg_sim.{homes[name]}"), name)
