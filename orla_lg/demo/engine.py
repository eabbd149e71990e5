"""The engine of ``orla-lg serve --demo``: small, and gone with the server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from orla_lg.config import Settings
from orla_lg.core.engine.backend import Backend
from orla_lg.engines import running_engine

ADAPTER = "llamacpp"


@contextlib.contextmanager
def demo_engine() -> Iterator[Settings]:
    """Start an engine, installing it first if need be, and yield a configuration that sends all calls there.

    Raises:
        EngineError: It could not be installed or started.
    """
    with running_engine() as engine:
        yield Settings((Backend(engine.name, engine.url, engine.name, ADAPTER),), {"*": engine.name})
