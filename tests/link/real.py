"""A real core behind a real socket, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from orla_lg.core.engine.backend import Backend
from orla_lg.core.engine.registry import adapter_of
from orla_lg.core.memory.policies import memory_policy
from orla_lg.core.serving import Serving
from orla_lg.serve.link.host import LinkHost
from orla_lg.serve.store.lease import CoreLease
from orla_lg.serve.store.store import MemoryStore
from tests.serve.scripted import OPEN, Key


class Door(asyncio.Protocol):
    """Takes an upgrade, and hands the connection over."""

    def __init__(self, core: RealCore) -> None:
        self._core, self._held = core, b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._held += data
        if b"\r\n\r\n" not in self._held:
            return
        assert self._transport is not None
        self._transport.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: orla-link\r\n\r\n"
        )
        session = self._core.host.session(self._core.key)
        self._transport.set_protocol(session)
        session.connection_made(self._transport)
        if rest := self._held.partition(b"\r\n\r\n")[2]:
            session.data_received(rest)


class RealCore:
    """One core; ``kill`` ends it without a word, and ``RealCore(..., store=…, port=…)`` follows it."""

    def __init__(
        self, *backends: Backend, key: Key = OPEN, store: MemoryStore | None = None, port: int = 0,
        key_envs: Mapping[str, str] | None = None, lease_s: float = 10.0, **settings: Any,
    ) -> None:  # fmt: skip
        self.key, self.port, self.killed = key, port, False
        self.store = store or MemoryStore()
        hosting = {name: settings.pop(name) for name in ("replica_lease_s",) if name in settings}
        adapters = {backend: adapter_of(backend) for backend in backends}
        kept = memory_policy(settings.pop("memory", "default"))
        self.serving = Serving(adapters, **{"mapper": None, "memory": kept, **settings})
        self.host = LinkHost(self.serving, self.store, CoreLease(self.store, lease_s), key_envs=key_envs, **hosting)
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="real-core", daemon=True)
        self._thread.start()
        self._run(self._begin())

    def _run(self, work: Any) -> Any:
        done: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return done.result(60.0)

    async def _begin(self) -> None:
        await self.host.start()
        self._server = await self._loop.create_server(lambda: Door(self), "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> RealCore:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._thread.is_alive():
            self._run(self.host.close())
            self._stop()
        self.serving.close()

    def kill(self) -> None:
        """End the process, as far as replicas can tell: nothing is said, and the sockets close."""

        self.killed = True

        async def die() -> None:
            assert self._server is not None
            self._server.close()
            if self.host._timer is not None:
                self.host._timer.cancel()
            for session in list(self.host.sessions):
                session._ended = True
                session._transport.abort()  # type: ignore[union-attr]

        self._run(die())
        self._stop()

    def _stop(self) -> None:
        async def drop() -> None:
            if self._server is not None:
                self._server.close()

        self._run(drop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60.0)
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
