"""An engine for a program's own use: running inside a ``with`` block, to be killed and started again at will."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from orla_lg.engines import starting
from orla_lg.engines.progress import Progress
from orla_lg.engines.recipe import EngineOptions
from orla_lg.engines.running import Running, find, kill, stop

__all__ = ["OwnEngine", "running_engine"]


class OwnEngine:
    """A started engine; its port and options stay the same over restarts."""

    def __init__(self, options: EngineOptions) -> None:
        prepared = starting.prepare(options, Progress())
        self._running = starting.start(prepared, Progress())
        self.options = dataclasses.replace(prepared, port=self._running.port)

    @property
    def url(self) -> str:
        """The OpenAI API's base URL."""
        return self._running.url

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._running.port

    @property
    def pid(self) -> int:
        """The process that serves; another one after a restart."""
        return self._running.pid

    @property
    def name(self) -> str:
        """The model's name in requests."""
        return self._running.name

    @property
    def kv_events(self) -> str:
        """Where it publishes its cache events; empty if it does not."""
        return self._running.kv_events

    @property
    def kv_replay(self) -> str:
        """Where it repeats them."""
        return self._running.kv_replay

    @property
    def running(self) -> Running | None:
        """What the engine's file says; None if it is gone."""
        return find(self.port)

    def kill(self) -> None:
        """Kill it without asking, as a crash would, and see all its processes gone."""
        kill(self._running)

    def stop(self) -> None:
        """End it; one that is gone already is none the worse for it."""
        if find(self.port) == self._running:
            stop(self._running)

    def restart(self) -> None:
        """End it if it runs, and start it again on the same port."""
        self.stop()
        self._running = starting.start(self.options, Progress())


@contextlib.contextmanager
def running_engine(options: EngineOptions | None = None) -> Iterator[OwnEngine]:
    """Start an engine, installing it first if need be, and end it when the block is left.

    Raises:
        EngineError: It could not be installed or started.
    """
    engine = OwnEngine(options or EngineOptions())
    try:
        yield engine
    finally:
        engine.stop()
