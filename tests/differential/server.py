"""A server on loopback that answers by script: the key in a prompt, or in a redirect's path, says which."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Self

from tests.differential.render import body_of, cut, encoded
from tests.differential.script import Framing, Reply

MODEL = "stub-model"
HANG_S = 5.0
_KEY = re.compile(rb"case-\d+-[a-z]+")


@dataclass(eq=False)
class Seen:
    """One request that came."""

    method: str
    path: str
    host: str
    key: str
    authorization: str
    body: bytes
    headers: dict[str, str] = field(repr=False, default_factory=dict)


@dataclass(eq=False)
class _Talk:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    keys: set[str] = field(default_factory=set)


class ScriptedServer:
    """Listens on two ports, in a thread of its own, from ``with`` to its end."""

    def __init__(self) -> None:
        self.port = self.other_port = 0
        self.scripts: dict[str, tuple[Reply, ...]] = {}
        self.seen: dict[str, list[Seen]] = {}
        self.answering: dict[str, int] = {}
        self.talks: set[_Talk] = set()
        self.probes = 0
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="scripted-server", daemon=True)

    @property
    def url(self) -> str:
        """The backend's base URL."""
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(self, *exc: object) -> None:
        self._do(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def forget(self, keys: set[str]) -> None:
        """Drop what belongs to *keys*."""
        for key in keys:
            for kept in (self.scripts, self.seen, self.answering):
                kept.pop(key, None)  # type: ignore[attr-defined]

    def busy(self, keys: set[str]) -> bool:
        """Whether a request of one of *keys* is still being answered."""
        return any(self.answering.get(key) for key in keys)

    def connected(self, keys: set[str]) -> bool:
        """Whether a connection that brought one of *keys* is open."""
        return any(talk.keys & keys for talk in list(self.talks))

    @staticmethod
    def wait(condition: Callable[[], bool], patience_s: float = 3.0) -> bool:
        """Wait until *condition* holds; returns whether it does."""
        until = time.monotonic() + patience_s
        while not condition():
            if time.monotonic() > until:
                return False
            time.sleep(0.002)
        return True

    # Inside

    async def _listen(self) -> None:
        self._servers = [await asyncio.start_server(self._talk, "127.0.0.1", 0, backlog=256) for _ in range(2)]
        self.port, self.other_port = (server.sockets[0].getsockname()[1] for server in self._servers)

    async def _stop(self) -> None:
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        talk = _Talk(reader, writer)
        self.talks.add(talk)
        try:
            while (seen := await self._read(talk)) is not None:
                if not await self._answer(talk, seen):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            self.talks.discard(talk)
            writer.close()

    async def _read(self, talk: _Talk) -> Seen | None:
        try:
            head = await talk.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        body = await talk.reader.readexactly(int(headers.get("content-length", 0)))
        found = _KEY.search(path.encode()) or _KEY.search(body)
        key = found[0].decode() if found else ""
        seen = Seen(method, path, headers.get("host", ""), key, headers.get("authorization", ""), body, headers)
        if key:
            talk.keys.add(key)
            self.seen.setdefault(key, []).append(seen)
        return seen

    async def _answer(self, talk: _Talk, seen: Seen) -> bool:
        """Answer one request; returns whether the connection may be used again."""
        if seen.path.rstrip("/").endswith("/models"):
            self.probes += 1
            reply = Reply(body=json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}))
            return await self._send(talk, seen, reply, {})
        script = self.scripts.get(seen.key)
        if script is None:
            return await self._send(
                talk, seen, Reply(status=404, body='{"error": {"message": "no such script"}}'), {}
            )
        try:
            request = json.loads(seen.body) if seen.body else {}
        except ValueError:
            request = {}
        reply = script[min(len(self.seen[seen.key]) - 1, len(script) - 1)]
        if any(name in request for name in reply.refuses):
            name = next(name for name in reply.refuses if name in request)
            said = json.dumps({"error": {"message": f"Extra inputs are not permitted: {name}", "code": None}})
            reply = Reply(status=reply.refusal_status, body=said)
        self.answering[seen.key] = self.answering.get(seen.key, 0) + 1
        try:
            return await self._send(talk, seen, reply, request)
        finally:
            if seen.key in self.answering:
                self.answering[seen.key] -= 1

    def _location(self, reply: Reply, key: str, hop: int) -> str | None:
        path = f"/v1/chat/completions?{key}.{hop}"
        return {
            "same": f"http://127.0.0.1:{self.port}{path}",
            "relative": path,
            "port": f"http://127.0.0.1:{self.other_port}{path}",
            "host": f"http://localhost:{self.port}{path}",
            "scheme": f"ftp://127.0.0.1:{self.port}{path}",
            "nowhere": "http://127.0.0.1:1/",
            "missing": None,
        }[reply.redirect]

    async def _send(self, talk: _Talk, seen: Seen, reply: Reply, request: dict[str, Any]) -> bool:
        framing = reply.framing
        if framing.drop == "hang before":
            await self._hang(talk)
        if framing.drop in ("close before", "reset before"):
            return self._drop(talk, reset=framing.drop.startswith("reset"))
        plain, ends, suits = body_of(reply, request)
        data, label = encoded(plain, framing.encoding)
        wanted = (label or "").split(",")[0].removeprefix("x-") in seen.headers.get("accept-encoding", "")
        if not (framing.forced or wanted):
            data, label = plain, None
        head = self._head(reply, seen, len(data), suits, label)
        if reply.informational:
            talk.writer.write(f"HTTP/1.1 {reply.informational} Early\r\nlink: </x>\r\n\r\n".encode())
        talk.writer.write(head.encode("latin-1"))
        if framing.drop in ("close after head", "reset after head"):
            await self._flush(talk)
            return self._drop(talk, reset=framing.drop.startswith("reset"))
        within = framing.drop.endswith("within")
        if reply.status not in (204, 304):
            sent = data[: len(data) * framing.drop_at // 100] if within else data
            for piece in cut(sent, framing.cuts, ends if label is None else []):
                talk.writer.write(_framed(piece, framing))
                await self._flush(talk)
        if framing.drop == "hang within":
            await self._hang(talk)
        if within:
            return self._drop(talk, reset=framing.drop.startswith("reset"))
        if framing.how in ("chunked", "bad chunk"):
            talk.writer.write(b"0\r\n\r\n" if framing.how == "chunked" else b"zz\r\n")
        await self._flush(talk)
        return framing.how in ("length", "chunked")

    def _head(self, reply: Reply, seen: Seen, length: int, suits: str, label: str | None) -> str:
        framing = reply.framing
        lines = [f"HTTP/{'1.0' if framing.how == 'http/1.0' else '1.1'} {reply.status} Said"]
        kind = suits if reply.content_type == "right" else reply.content_type
        if kind is not None:
            lines.append(f"content-type: {kind}")
        if label is not None:
            lines.append(f"content-encoding: {label}")
        if reply.redirect and (where := self._location(reply, seen.key, len(self.seen[seen.key]))):
            lines.append(f"location: {where}")
        lines += [f"{name}: {value}" for name, value in reply.headers]
        if reply.status not in (204, 304):
            lines += {
                "length": [f"content-length: {length}"],
                "short length": [f"content-length: {max(0, length - 3)}", "connection: close"],
                "long length": [f"content-length: {length + 7}"],
                "close": ["connection: close"],
                "http/1.0": [],
            }.get(framing.how, ["transfer-encoding: chunked"])
        return "\r\n".join([*lines, "", ""])

    @staticmethod
    async def _flush(talk: _Talk) -> None:
        await talk.writer.drain()
        await asyncio.sleep(0)

    @staticmethod
    async def _hang(talk: _Talk) -> None:
        """Say nothing more until the client goes."""
        await ScriptedServer._flush(talk)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HANG_S):
                await talk.reader.read(1)
        raise ConnectionResetError

    @staticmethod
    def _drop(talk: _Talk, *, reset: bool) -> bool:
        if reset:
            end = talk.writer.get_extra_info("socket")
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            talk.writer.transport.abort()
        return False


def _framed(piece: bytes, framing: Framing) -> bytes:
    if framing.how in ("chunked", "no last chunk", "bad chunk"):
        return f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
    return piece
