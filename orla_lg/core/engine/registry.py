"""Adapters, found by the name under which their package registered them."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import cast

from orla_lg.core.engine.backend import Backend, BackendAdapter
from orla_lg.errors import ConfigError, did_you_mean, shown

ENTRY_POINTS = "orla_lg.backends"


def adapter_of(backend: Backend) -> BackendAdapter:
    """Return a new adapter for a backend's engine.

    Raises:
        ConfigError: No package registered one of that name.
    """
    registered = check_engine(backend)
    try:
        made = registered.load()
    except ImportError as error:
        raise ConfigError(
            f"backend {shown(backend.name)}: the package of engine {backend.engine!r} cannot be loaded: {error}"
        ) from error
    return cast("BackendAdapter", made(backend))


def check_engine(backend: Backend) -> EntryPoint:
    """Return what a package registered for a backend's engine.

    Raises:
        ConfigError: No package registered one of that name.
    """
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if backend.engine not in found:
        near = did_you_mean(backend.engine, found)
        raise ConfigError(f"backend {shown(backend.name)}: unknown engine {shown(backend.engine)}{near}")
    return found[backend.engine]
