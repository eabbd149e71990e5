"""A whole server, or a gateway before one, in a thread of the test's process, without command line and signals."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from orla_lg import Orla
from orla_lg.config import Settings
from orla_lg.serve.http.listening import Listening
from orla_lg.serve.server import OrlaServer
from orla_lg.serve.settings import ServeSettings, settings
from orla_lg.serve.stateless.server import GatewayServer
from orla_lg.serve.store.store import MemoryStore, Store

PATIENCE_S = 60.0


Server = TypeVar("Server", OrlaServer, GatewayServer)


class InThread(Generic[Server]):
    """A server that runs, in a thread and on a loop of its own.

    Args:
        chosen: What it is started with.
        orla: Its core, or its side of one.
        made: Makes it, on its loop.
    """

    def __init__(self, chosen: ServeSettings, orla: Orla, made: Callable[[], Server]) -> None:
        self.orla = orla
        self.url = ""
        self.status: int | None = None
        self.server: Server
        self.loop: asyncio.AbstractEventLoop
        self._made = made
        self._opened = Listening(chosen.listen)
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)

    def _run(self) -> None:
        async def serving() -> int:
            self.loop = asyncio.get_running_loop()
            self.server = self._made()
            return await self.server.run(self._opened, self._listens)

        try:
            self.status = asyncio.run(serving())
        finally:
            self._begun.set()

    def _listens(self, url: str) -> None:
        self.url = url
        self._begun.set()

    def call(self, function: Any, *args: Any) -> Any:
        """Call a function on the server's loop."""

        async def called() -> Any:
            found = function(*args)
            return await found if asyncio.iscoroutine(found) else found

        return asyncio.run_coroutine_threadsafe(called(), self.loop).result(PATIENCE_S)

    def start(self) -> None:
        self._thread.start()
        assert self._begun.wait(PATIENCE_S) and self.url, "the server did not start"

    def end(self) -> None:
        """Have it drain and end; returns at once."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.server.end)

    def join(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    @contextlib.contextmanager
    def until_the_end(self) -> Iterator[Self]:
        """Run it until the block ends."""
        with self.orla:
            self.start()
            try:
                yield self
            finally:
                self.end()
                self.join()


Running = InThread[OrlaServer]
RunningGateway = InThread[GatewayServer]


@contextlib.contextmanager
def server(
    file: Path | None = None,
    *,
    store: Store | None = None,
    address: str = "127.0.0.1:0",
    core: Settings | None = None,
    pool: str | None = None,
) -> Iterator[Running]:
    """Run a server until the block ends; *core* is a configuration that no file says."""
    chosen = settings(None if file is None else str(file), address, pool=pool, reads_file=file is not None)
    chosen = chosen if core is None else replace(chosen, core=core)
    orla = Orla.from_settings(chosen.core, may_be_empty=True)
    with Running(chosen, orla, lambda: OrlaServer(chosen, orla, store or MemoryStore())).until_the_end() as running:
        yield running


@contextlib.contextmanager
def stateless(core: str, *, key: str | None = None, patience_s: float = 30.0) -> Iterator[RunningGateway]:
    """Run a gateway without state before a core until the block ends."""
    chosen = settings(None, "127.0.0.1:0", reads_file=False)
    orla = Orla.remote(core, key=key, core_patience_s=patience_s, control=False)
    with RunningGateway(chosen, orla, lambda: GatewayServer(chosen, orla, patience_s)).until_the_end() as running:
        yield running
