"""Relays between replicas and cores: each replica has its own, which can be shut to make it late."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import Self, cast


class Side(asyncio.Protocol):
    """One end of a relayed connection."""

    def __init__(self, relay: Relay, other: Side | None = None) -> None:
        self.relay, self.other, self.held = relay, other, bytearray()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.relay.sides.add(self)
        if self.other is not None and self.other.held:
            self.transport.write(bytes(self.other.held))

    def data_received(self, data: bytes) -> None:
        if self.relay.is_silent:
            return
        if self.other is None or self.other.transport is None:
            self.held += data
        else:
            self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.relay.sides.discard(self)
        if self.other is not None and self.other.transport is not None:
            self.other.transport.abort()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class Relay:
    """A port of one replica's own, or of a core's on its way to the store."""

    port: int

    def __init__(self, relays: Relays) -> None:
        self._relays = relays
        self.sides = set[Side]()
        self.shut_until_s = 0.0
        """Nothing gets through before, monotonic; connections are refused."""
        self.is_silent = False
        """What is sent is lost, and connections that are made are never answered."""

    def cut(self, seconds: float, *, silently: bool = False) -> None:
        """Let nothing through for so long, on connections that stand, too: they end, or *silently* nothing comes."""
        self.shut_until_s = time.monotonic() + seconds
        self._relays.loop.call_soon_threadsafe(self._cut, seconds, silently)

    def _cut(self, seconds: float, silently: bool) -> None:
        self.is_silent = silently
        if silently:
            self._relays.loop.call_later(seconds, self._hear_again)
        else:
            self._abort_all()

    def _hear_again(self) -> None:
        self.is_silent = False
        self._abort_all()

    def _abort_all(self) -> None:
        for side in list(self.sides):
            side.abort()

    def accept(self) -> Side:
        side = Side(self)
        asyncio.get_running_loop().create_task(self._connect(side))
        return side

    async def _connect(self, side: Side) -> None:
        while side.transport is None:
            await asyncio.sleep(0)
        if self.is_silent:
            return
        if time.monotonic() >= self.shut_until_s:
            side.other = other = Side(self, side)
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().create_connection(lambda: other, "127.0.0.1", self._relays.core_port)
                return
        side.transport.abort()


class Relays:
    """All of them, served by a thread; they lead to the one port that is the current one."""

    def __init__(self, core_port: int) -> None:
        self.core_port = core_port
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)

    def open(self) -> Relay:
        """Return another relay, which listens."""
        relay = Relay(self)
        made = asyncio.run_coroutine_threadsafe(self.loop.create_server(relay.accept, "127.0.0.1", 0), self.loop)
        relay.port = made.result(10).sockets[0].getsockname()[1]
        return relay
