"""A connection in memory: the core's transport at one end, the socket of a replica's link at the other."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from tests.serve.two.core import CoreProcess


class Wire(asyncio.Transport):
    """One connection: the core's transport, and the socket of the replica's link."""

    def __init__(self, core: CoreProcess) -> None:
        super().__init__()
        self.core, self.session, self.coming = core, cast("asyncio.Protocol | None", None), bytearray()
        self.hung_up = self.is_cut = False
        """By the core's side; the network lost what was on its way."""

    # The core's side

    def write(self, data: Any) -> None:
        if not self.is_cut:
            self.coming += data
            self.core.wrote(bytes(data))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def is_closing(self) -> bool:
        return self.hung_up

    def close(self) -> None:
        if not self.hung_up:
            self.hung_up = True
            if self.session is not None and not self.core.dead:
                self.core.loop.call_soon(self.session.connection_lost, None)

    abort = close

    # The replica's side

    def send(self, data: bytes) -> int:
        if not self.core.dead:
            self.core.loop.call_soon(self._arrives, bytes(data))
        return len(data)

    def _arrives(self, data: bytes) -> None:
        if self.session is not None and not (self.hung_up or self.is_cut):
            self.session.data_received(data)

    def recv(self, most: int) -> bytes:
        data, self.coming = bytes(self.coming), bytearray()
        return data

    @property
    def readable(self) -> bool:
        return bool(self.coming) or self.hung_up or self.core.dead

    def shut(self) -> None:
        if not self.core.dead:
            self.core.loop.call_soon(self.close)


class End(NamedTuple):
    """The replica's socket, where a method has another meaning than the transport's."""

    wire: Wire

    def send(self, data: bytes) -> int:
        return self.wire.send(data)

    def recv(self, most: int) -> bytes:
        return self.wire.recv(most)

    def close(self) -> None:
        self.wire.shut()

    def shutdown(self, how: int) -> None:
        self.wire.shut()
