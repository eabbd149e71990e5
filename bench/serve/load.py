"""Callers that cost little: raw HTTP/1.1 over connections that stay, each answer looked at."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

from tests.scripted_engine import LENGTH, MODEL, TEXT

PROMPT = [
    {"role": "system", "content": "You answer briefly, and say where you know it from. " * 34},
    {"role": "user", "content": "What is the capital of France?"},
]
"""With the rest of the request 2 kB."""
CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.I)
END, PART = b"0\r\n\r\n", b'"word'


class Answer(NamedTuple):
    """What one request took, in milliseconds."""

    first_ms: float
    """Of a stream: until its first part."""
    whole_ms: float


class Fault(Exception):
    """An answer is not the engine's."""


def request(url: str, key: str = "", *, stream: bool = False) -> bytes:
    """Return a chat completion's request, for an API at *url*."""
    parts = urlsplit(url)
    body = json.dumps({"model": MODEL, "messages": PROMPT, **({"stream": True} if stream else {})})
    lines = [
        f"POST {parts.path}/chat/completions HTTP/1.1",
        f"host: {parts.netloc}",
        "content-type: application/json",
    ]
    lines += [f"authorization: Bearer {key}"] if key else []
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", body]).encode()


class Caller(asyncio.Protocol):
    """One connection, on which one request follows another."""

    def __init__(self) -> None:
        self._answer: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)

    async def ask(self, request: bytes, parts: int = 0) -> Answer:
        """Send a request; return what it took once the answer is whole, with so many *parts* if it is a stream."""
        self._read, self._end, self._first_s = bytearray(), 0, 0.0
        self._answer = asyncio.get_running_loop().create_future()
        begin_s = time.perf_counter()
        self.transport.write(request)
        await self._answer
        end_s, read = time.perf_counter(), self._read
        right = read.count(PART) == parts if parts else TEXT.encode() in read
        if not read.startswith(b"HTTP/1.1 200 ") or not right:
            raise Fault(f"not the engine's answer: {bytes(read[:600])!r}")
        return Answer(((self._first_s or end_s) - begin_s) * 1e3, (end_s - begin_s) * 1e3)

    def data_received(self, data: bytes) -> None:
        """Look whether the answer is whole."""
        read = self._read
        read += data
        if not self._end and (head := read.find(b"\r\n\r\n")) >= 0:
            length = LENGTH.search(read, 0, head + 2)
            self._end = head + 4 + int(length[1]) if length else -1
            if not length and not CHUNKED.search(read, 0, head + 2):
                self._fail(Fault(f"an answer without an end: {bytes(read[:600])!r}"))
        if not self._first_s and PART in data:
            self._first_s = time.perf_counter()
        whole = len(read) >= self._end if self._end > 0 else self._end < 0 and read.endswith(END)
        if whole and self._answer is not None and not self._answer.done():
            self._answer.set_result(b"")

    def connection_lost(self, exc: Exception | None) -> None:
        """Let the request that is under way fail."""
        self._fail(exc or Fault("the connection ended"))

    def _fail(self, fault: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(fault)


async def callers(url: str, count: int) -> list[Caller]:
    """Open connections to the server of *url*."""
    parts, loop = urlsplit(url), asyncio.get_running_loop()
    return [(await loop.create_connection(Caller, parts.hostname, parts.port))[1] for _ in range(count)]


async def flood(by: list[Caller], request: bytes, count: int, parts: int = 0, tick: Any = None) -> list[Answer]:
    """Send *count* requests, each caller the next one when its last is answered."""
    left: Iterator[int] = iter(range(count))
    answers: list[Answer] = []

    async def call(caller: Caller) -> None:
        for _ in left:
            answers.append(await caller.ask(request, parts))
            if tick is not None:
                tick(len(answers))

    async with asyncio.TaskGroup() as group:
        for caller in by:
            group.create_task(call(caller))
    return answers
