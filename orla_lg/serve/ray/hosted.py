"""A server on a thread of another program's process: begun, begun again after its end, and asked how it is.

It is the server of ``orla-lg serve`` and opens the same socket; what hosts it calls no model call's methods. A server
that was replaced while its process stood still, or whose port is still another process's, is begun again here: what
would begin it again from outside may itself be away.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

from orla_lg.errors import OrlaError
from orla_lg.serve.http.health import CoreState
from orla_lg.serve.http.listening import Listening
from orla_lg.serve.parts import open_parts
from orla_lg.serve.running import new_loop
from orla_lg.serve.server import OrlaServer
from orla_lg.serve.settings import ServeSettings
from orla_lg.serve.stateless.server import GatewayServer
from orla_lg.serve.stateless.starting import begin_gateway

log = logging.getLogger("orla_lg")

AGAIN_S = 0.5
"""Until a server that could not begin is begun again."""

STARTING, FAILED, ENDED = "starting", "failed", "ended"
"""States of a host beside those of its server (``http.health.CoreState``)."""


class HostedStatus(NamedTuple):
    """How a hosted server is."""

    state: str
    pool: str = ""
    url: str = ""
    """Empty as long as it does not listen."""
    epoch: int = 0
    """Of its lease; 0 of a standby."""
    pid: int = 0
    fault: str = ""
    """Why it did not begin, the last time."""


class HostableServer(Protocol):
    """A server that can be hosted: ``OrlaServer`` is one, and a gateway without state is."""

    @property
    def state(self) -> CoreState:
        """What it is at."""
        ...

    async def run(self, opened: Listening, ready: Callable[[str], None]) -> int:
        """Serve until the end."""
        ...

    def end(self) -> None:
        """Drain and end."""
        ...


Built = tuple[Listening, Callable[[], HostableServer]]
"""Where a server listens, and what makes it on its loop."""


def core(chosen: ServeSettings, ending: contextlib.ExitStack) -> Built:
    """Return what a core, or a standby, is made of; *ending* closes it."""
    parts = open_parts(chosen, ending)
    return parts.opened, lambda: OrlaServer(chosen, parts.orla, parts.store)


def gateway(where: str) -> Callable[[ServeSettings, contextlib.ExitStack], Built]:
    """Return the same for a gateway before the cores at *where*."""

    def built(chosen: ServeSettings, ending: contextlib.ExitStack) -> Built:
        opened, orla, _ = begin_gateway(chosen, where, ending)
        return opened, lambda: GatewayServer(chosen, orla)

    return built


class HostedServer:
    """A server on a thread and a loop of its own, until ``end``. Its methods are any thread's.

    Args:
        settings: Called before each begin, for what it begins with; one block lasts as long as its server.
        build: Makes a server of them: ``core``, or ``gateway``.
        crashed: Called on the server's thread after an error that no server should have.
    """

    def __init__(
        self,
        settings: Callable[[], contextlib.AbstractContextManager[ServeSettings]],
        build: Callable[[ServeSettings, contextlib.ExitStack], Built],
        crashed: Callable[[], None],
    ) -> None:
        self._settings, self._build, self._crashed = settings, build, crashed
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._fault = self._url = self._pool = ""
        self._server: HostableServer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="orla-server", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def status(self) -> HostedStatus:
        """Return how it is now."""
        with self._lock:
            server, url = self._server, self._url
        if server is None or not url:
            state = ENDED if self._ends.is_set() else FAILED if self._fault else STARTING
            return HostedStatus(state, self._pool, pid=os.getpid(), fault=self._fault)
        epoch = server.lease.epoch if isinstance(server, OrlaServer) and server.lease.holds() else 0
        return HostedStatus(str(server.state), self._pool, url, epoch, os.getpid())

    def end(self, within_s: float) -> bool:
        """Have the server drain and end; returns whether it has ended *within_s*. Idempotent."""
        with self._lock:
            if not self._ends.is_set():
                self._ends.set()
                if self._server is not None and self._loop is not None:
                    with contextlib.suppress(RuntimeError):  # it has ended by itself, just now
                        self._loop.call_soon_threadsafe(self._server.end)
        self._thread.join(within_s)
        return not self._thread.is_alive()

    # Its thread

    def _run(self) -> None:
        while not self._ends.is_set():
            try:
                self._serve()
                self._fault = ""
            except (OrlaError, OSError) as error:
                if str(error) != self._fault:
                    log.error("the server did not begin, and is begun again: %s", error)
                self._fault = str(error)
                self._ends.wait(AGAIN_S)
            except BaseException:  # whatever it is: a process without a server must not look alive
                log.exception("the server ended by a fault of its own")
                self._crashed()
                return

    def _serve(self) -> None:
        with contextlib.ExitStack() as ending:
            chosen = ending.enter_context(self._settings())
            self._pool = chosen.table.pool
            opened, made = self._build(chosen, ending)

            async def serving() -> int:
                server = made()
                with self._lock:
                    self._server, self._loop = server, asyncio.get_running_loop()
                    if self._ends.is_set():
                        server.end()
                return await server.run(opened, self._listens)

            gc.collect()
            gc.freeze()  # as in a process of its own
            try:
                with asyncio.Runner(loop_factory=new_loop()) as runner:
                    runner.run(serving())
            finally:
                with self._lock:
                    self._server, self._loop, self._url = None, None, ""

    def _listens(self, url: str) -> None:
        with self._lock:
            self._url = url
