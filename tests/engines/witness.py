"""A TCP relay between orla_lg and an engine: it sees what really went over the wire, and by which call."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections import Counter
from typing import Self

MARK = re.compile(rb"call-\d+-")
TOKEN = b'"delta"'
RESET_AT_CLOSE = struct.pack("ii", 1, 0)


class Witness:
    """Relays to *port*, and notes every request that carries a mark (``call-N-``) and what it got."""

    def __init__(self, port: int) -> None:
        self.engine_port = port
        self.sent: Counter[bytes] = Counter()
        """How often each call was sent."""
        self.answered: set[bytes] = set()
        """Calls that got at least a first token."""
        self.repeated: list[bytes] = []
        """Calls sent again after their first token."""
        self.open = 0
        """Connections from orla_lg's side."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(10)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            there = await asyncio.open_connection("127.0.0.1", self.engine_port)
        except OSError:
            self._reset(writer)
        else:
            await self._relay((reader, writer), there)
        finally:
            self.open -= 1

    async def _relay(
        self,
        here: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        there: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        mark: list[bytes] = [b""]
        ways = [
            self._loop.create_task(self._asked(here[0], there[1], mark)),
            self._loop.create_task(self._told(there[0], here[1], mark)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.wait(ways)
        for writer in (here[1], there[1]):
            self._reset(writer)

    async def _asked(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, mark: list[bytes]) -> None:
        rest = b""
        while data := await _read(reader):
            rest += data
            for found in MARK.findall(rest):
                mark[0] = found
                self.sent[found] += 1
                if found in self.answered:
                    self.repeated.append(found)
            rest = rest[-16:] if not MARK.search(rest[-16:]) else b""
            writer.write(data)

    async def _told(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, mark: list[bytes]) -> None:
        while data := await _read(reader):
            if TOKEN in data:
                self.answered.add(mark[0])
            writer.write(data)

    @staticmethod
    def _reset(writer: asyncio.StreamWriter) -> None:
        # As the kernel does for a process that was killed.
        with contextlib.suppress(OSError):
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
        writer.close()


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(65_536)
    except ConnectionError:
        return b""
