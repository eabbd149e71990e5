"""A gateway over a core, served by uvicorn in a thread of the test process."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette

from orla_lg import Orla
from orla_lg.serve.access.access import Access
from orla_lg.serve.access.keys import AccessKey, Keyring, create
from orla_lg.serve.gateway.answers import denial
from orla_lg.serve.gateway.calls import Gateway
from orla_lg.serve.gateway.no_route import ON_ERROR
from orla_lg.serve.gateway.routes import Shortcut, routes_of
from orla_lg.serve.gateway.settings import GatewaySettings
from orla_lg.serve.http.guard import AccessLayer, HttpGuard
from orla_lg.serve.store.store import MemoryStore

PATIENCE_S = 60.0


class GatewayServer:
    """``with GatewayServer(orla) as gateway: ...``; ``gateway.url`` is where it listens."""

    def __init__(
        self, orla: Orla, *, settings: GatewaySettings | None = None, guard: HttpGuard | None = None, **key: Any
    ) -> None:
        """Serve an Orla; with what a key allows, one is needed, and it is ``self.key``."""
        self.orla = orla
        self.store = MemoryStore()
        self.key = ""
        if key:
            _, self.key = create(self.store, lambda key_id, sha256: AccessKey(key_id, "test", sha256, **key))
        self.keyring = Keyring(self.store)
        access = Access(self.keyring)
        self.gateway = Gateway(orla.core.serving, access, settings or GatewaySettings())
        routed = Shortcut(Starlette(routes=routes_of(self.gateway), exception_handlers=ON_ERROR), self.gateway)
        app = AccessLayer(routed, access, guard or HttpGuard(), denial)
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off", ws="none")
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="gateway", daemon=True)

    def _serve(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self._until_stopped())
        self.loop.close()

    async def _until_stopped(self) -> None:
        await self.server.serve()
        await self.gateway.aclose()
        self.keyring.close()

    def __enter__(self) -> Self:
        self._thread.start()
        deadline = time.monotonic() + PATIENCE_S
        while not self.server.started:
            assert self._thread.is_alive() and time.monotonic() < deadline, "the gateway does not start"
            time.sleep(0.005)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.should_exit = True
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the gateway does not stop"

    def records(self) -> list[Any]:
        """Return the records of the calls that ended."""
        return list(self.orla.records())

    def ended(self, calls: int = 1) -> list[Any]:
        """Wait until so many calls have ended, and return their records."""
        deadline = time.monotonic() + PATIENCE_S
        while len(found := self.records()) < calls:
            assert time.monotonic() < deadline, f"{len(found)} of {calls} calls ended"
            time.sleep(0.005)
        return found
