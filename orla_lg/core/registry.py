"""Adapters, found by the name under which their package registered them."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import cast

from orla_lg.core.backend import Backend, BackendAdapter
from orla_lg.errors import ConfigError, did_you_mean

ENTRY_POINTS = "orla_lg.backends"


def adapter_of(backend: Backend) -> BackendAdapter:
    """Return a new adapter for a backend's engine.

    Raises:
        ConfigError: No package registered one of that name.
    """
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if backend.engine not in found:
        raise ConfigError(
            f"backend {backend.name!r}: unknown engine {backend.engine!r}{did_you_mean(backend.engine, found)}"
        )
    return cast("BackendAdapter", found[backend.engine].load()(backend))
