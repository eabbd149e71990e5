"""A gateway without state in a thread of the test's process, before a core that runs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

from orla_lg import Orla
from orla_lg.serve.http.listening import Listening
from orla_lg.serve.settings import settings
from orla_lg.serve.stateless.server import GatewayServer

PATIENCE_S = 60.0


class RunningGateway:
    """A gateway that runs."""

    def __init__(self, core: str, key: str | None, patience_s: float) -> None:
        self.orla = Orla.remote(core, key=key, core_patience_s=patience_s, control=False)
        self.url = ""
        self.status: int | None = None
        self.loop: asyncio.AbstractEventLoop
        self.server: GatewayServer
        self._patience_s = patience_s
        self._chosen = settings(None, "127.0.0.1:0", reads_file=False)
        self._opened = Listening(self._chosen.listen)
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)

    def _run(self) -> None:
        async def serving() -> int:
            self.loop = asyncio.get_running_loop()
            self.server = GatewayServer(self._chosen, self.orla, self._patience_s)
            return await self.server.run(self._opened, self._listens)

        try:
            self.status = asyncio.run(serving())
        finally:
            self._begun.set()

    def _listens(self, url: str) -> None:
        self.url = url
        self._begun.set()

    def start(self) -> None:
        self._thread.start()
        assert self._begun.wait(PATIENCE_S) and self.url, "the gateway did not start"

    def end(self) -> None:
        """Have it drain and end; returns at once."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.server.end)

    def join(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def stateless(core: str, *, key: str | None = None, patience_s: float = 30.0) -> Iterator[RunningGateway]:
    """Run a gateway before a core until the block ends."""
    running = RunningGateway(core, key, patience_s)
    with running.orla:
        running.start()
        try:
            yield running
        finally:
            running.end()
            running.join()
