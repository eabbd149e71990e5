"""Callers that cost little: raw HTTP/1.1 over connections that stay, each answer looked at."""

from __future__ import annotations

import asyncio
import json
import time
from typing import NamedTuple, cast
from urllib.parse import urlsplit

from tests.scripted_engine import LENGTH, MODEL, TEXT

PROMPT = [
    {"role": "system", "content": "You answer briefly, and say where you know it from. " * 34},
    {"role": "user", "content": "What is the capital of France?"},
]
"""With the rest of the request 2 kB."""
HEAD_END, END, PART = b"\r\n\r\n", b"0\r\n\r\n", b'"word'


class Answer(NamedTuple):
    """What one request took, in milliseconds; of a stream also until its first part."""

    whole_ms: float
    first_ms: float


class Fault(Exception):
    """An answer is not the engine's."""


def request(url: str, key: str, *, stream: bool = False) -> bytes:
    """Return a chat completion's request, for an API at *url*."""
    parts = urlsplit(url)
    body = json.dumps({"model": MODEL, "messages": PROMPT, **({"stream": True} if stream else {})})
    return (
        f"POST {parts.path}/chat/completions HTTP/1.1\r\nhost: {parts.netloc}\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}"
    ).encode()


class Caller(asyncio.Protocol):
    """One connection, on which one request follows another."""

    def __init__(self) -> None:
        self._whole: asyncio.Future[None] | None = None
        self._read, self._length, self._first_s = bytearray(), 0, 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    async def ask(self, request: bytes, parts: int = 0) -> Answer:
        """Send a request, and read its answer to the end: of a stream so many *parts*."""
        self._read, self._length, self._first_s = bytearray(), 0, 0.0
        self._whole = asyncio.get_running_loop().create_future()
        begin_s = time.perf_counter()
        self.transport.write(request)
        await self._whole
        end_s, read = time.perf_counter(), self._read
        right = read.count(PART) == parts if parts else TEXT.encode() in read
        if not read.startswith(b"HTTP/1.1 200 ") or not right:
            raise Fault(f"not the engine's answer: {bytes(read[:2000])!r}")
        return Answer((end_s - begin_s) * 1e3, (self._first_s - begin_s) * 1e3)

    def data_received(self, data: bytes) -> None:
        read = self._read
        read += data
        if not self._length and (head := read.find(HEAD_END)) >= 0:
            found = LENGTH.search(read, 0, head + 2)
            self._length = head + len(HEAD_END) + int(found[1]) if found else -1
        if not self._first_s and PART in data:
            self._first_s = time.perf_counter()
        whole = len(read) >= self._length if self._length > 0 else self._length < 0 and read.endswith(END)
        if whole and self._whole is not None and not self._whole.done():
            self._whole.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._whole is not None and not self._whole.done():
            self._whole.set_exception(exc or Fault("the connection ended"))


async def callers(url: str, count: int) -> list[Caller]:
    """Open connections to the server of *url*."""
    parts, loop = urlsplit(url), asyncio.get_running_loop()
    return [(await loop.create_connection(Caller, parts.hostname or "", parts.port or 80))[1] for _ in range(count)]


async def flood(by: list[Caller], request: bytes, count: int, parts: int = 0) -> list[Answer]:
    """Send *count* requests, each caller the next one when its last is answered."""
    left, answers = iter(range(count)), list[Answer]()

    async def call(caller: Caller) -> None:
        answers.extend([await caller.ask(request, parts) for _ in left])

    async with asyncio.TaskGroup() as group:
        for caller in by:
            group.create_task(call(caller))
    return answers
