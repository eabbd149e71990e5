"""Relays between replicas and cores: each replica has its own, which can be shut to make it late."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import Self, cast


class Side(asyncio.Protocol):
    """One end of a relayed connection."""

    def __init__(self, other: Side | None = None) -> None:
        self.other, self.held = other, bytearray()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if self.other is not None and self.other.held:
            self.transport.write(bytes(self.other.held))

    def data_received(self, data: bytes) -> None:
        if self.other is None or self.other.transport is None:
            self.held += data
        else:
            self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.abort()


class Relay:
    """A port of one replica's own."""

    port: int

    def __init__(self, relays: Relays) -> None:
        self._relays = relays
        self.shut_until_s = 0.0
        """Nothing gets through before, monotonic; connections are refused."""

    def accept(self) -> Side:
        side = Side()
        asyncio.get_running_loop().create_task(self._connect(side))
        return side

    async def _connect(self, side: Side) -> None:
        while side.transport is None:
            await asyncio.sleep(0)
        if time.monotonic() >= self.shut_until_s:
            side.other = other = Side(side)
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().create_connection(lambda: other, "127.0.0.1", self._relays.core_port)
                return
        side.transport.abort()


class Relays:
    """All of them, served by a thread; they lead to whatever core is the current one."""

    def __init__(self, core_port: int) -> None:
        self.core_port = core_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def open(self) -> Relay:
        """Return another relay, which listens."""
        relay = Relay(self)
        made = asyncio.run_coroutine_threadsafe(self._loop.create_server(relay.accept, "127.0.0.1", 0), self._loop)
        relay.port = made.result(10).sockets[0].getsockname()[1]
        return relay
