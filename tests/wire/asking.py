"""How tests talk to an adapter and its stand-in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from orla_lg.core.call import Ask, Chunk, Usage
from orla_lg.core.engine.backend import BackendAdapter, Directions
from orla_lg.wires import reading
from tests.wire.served import WireServer

ASK = Ask("any", [{"role": "user", "content": "hello"}])
LONG = "word " * 120
PATIENCE_S = 20.0


def body(text: str, model: str, **more: Any) -> dict[str, Any]:
    """Return a chat completion's body."""
    return {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 4, **more}


def fields(adapter: BackendAdapter, **told: Any) -> dict[str, Any]:
    """Return what the adapter adds for these directions."""
    return adapter.request_fields(ASK, Directions(**told))


@dataclass(frozen=True)
class Read:
    """A stream, read to its end."""

    text: str
    usage: Usage
    finish: str | None


async def read(adapter: BackendAdapter, request: Mapping[str, Any]) -> Read:
    """Stream a request to its end."""
    async with asyncio.timeout(PATIENCE_S):
        chunks: list[Chunk] = [chunk async for chunk in adapter.generate(request)]
    usage = next(chunk.usage for chunk in reversed(chunks) if chunk.usage is not None)
    reasons = [chunk.finish_reason for chunk in chunks if chunk.finish_reason]
    return Read("".join(chunk.text for chunk in chunks), usage, reasons[-1] if reasons else None)


@asynccontextmanager
async def running(adapter: BackendAdapter, request: Mapping[str, Any], server: WireServer) -> AsyncIterator[Any]:
    """Keep a request running while the block does; gives its task."""
    before = len(server.machine.started)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(read(adapter, request))
        await until(lambda: len(server.machine.started) > before and server.machine.running)
        try:
            yield task
        finally:
            task.cancel()


async def until(condition: Callable[[], Any]) -> None:
    """Wait until *condition* holds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


async def order_of(
    server: WireServer, requests: Mapping[str, Mapping[str, Any]], adapter: BackendAdapter
) -> list[str]:
    """Send labelled requests to an engine that is held, then let it go, one at a time; returns who began when."""
    server.machine.limit = 1
    before = len(server.machine.started)
    async with asyncio.TaskGroup() as group:
        with server.paused():
            for number, request in enumerate(requests.values(), 1):
                group.create_task(read(adapter, request))
                await until(lambda wanted=number: len(server.machine.waiting) == wanted)  # type: ignore[misc]
    return [next(key for key in requests if key in label) for label in server.machine.started[before:]]


async def post(url: str, request: Any, key: str | None = None) -> httpx.Response:
    """POST without an adapter."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        return await http.post(url, json=request, headers=headers)


def events(text: str) -> list[dict[str, Any]]:
    """Return the JSON events of a stream."""
    parsed = [reading.payload(part.encode()) for part in text.split("\n\n")]
    return [each for each in parsed if each is not None]


def shape(value: Any) -> Any:
    """Return keys and kinds of a JSON value, without what varies: numbers, texts, how many of a kind."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in sorted(value.items())}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
