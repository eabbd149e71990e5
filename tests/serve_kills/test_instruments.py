"""What the kills are seen with: the scripted engine's account, and relays that make a replica late."""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest

from tests import scripted_engine
from tests.serve_kills.relays import Relays

BODY = b'{"messages":[{"role":"user","content":"call-%s-of-%s- go on"}]}'


@pytest.fixture
async def engine() -> AsyncIterator[Any]:
    """The engine's account and its port."""
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    chosen = Namespace(port=0, before_s=0.0, chunks=2, token_s=0.0, late_s=0.0, account=scripted_engine.Account())
    serving = asyncio.get_running_loop().create_task(scripted_engine.serve(chosen, ready.set_result))
    chosen.port = int((await ready).split(":")[2].partition("/")[0])
    yield chosen
    serving.cancel()


async def asks(port: int, call: str, seconds: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = BODY % (call.encode(), str(seconds).encode())
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
    await asyncio.sleep(0.02)
    return reader, writer


async def test_the_engine_counts_what_is_at_once_and_what_came_twice(engine: Any) -> None:
    account = engine.account
    answers = [await asks(engine.port, call, 0.1) for call in ("r0.1", "r0.2", "r0.1")]
    assert (account.running, account.most) == (3, 3)
    for reader, _ in answers:
        assert (await reader.read(15)).startswith(b"HTTP/1.1 200 OK")
    assert (account.running, account.most, account.asdict()["twice"]) == (0, 3, ["r0.1"])
    account.anew()
    assert account.most == 0


@pytest.mark.parametrize("late_s", [0.0, 0.1])
async def test_the_engine_notices_hang_ups_at_once_or_late(engine: Any, late_s: float) -> None:
    engine.late_s = late_s
    _, writer = await asks(engine.port, "r0.1", 5.0)
    assert engine.account.running == 1
    writer.transport.abort()
    await asyncio.sleep(0.03)
    assert engine.account.running == (1 if late_s else 0)
    await asyncio.sleep(late_s)
    assert engine.account.running == 0 and engine.account.hung_up == 1


async def test_a_relay_that_is_shut_lets_nothing_through_until_its_time(engine: Any) -> None:
    with Relays(engine.port) as relays:
        relay = relays.open()
        relay.shut_until_s = time.monotonic() + 0.1
        reader, _ = await asks(relay.port, "r0.1", 0.0)
        with suppress(ConnectionError):
            assert not await reader.read(1)
        assert engine.account.served == 0
        await asyncio.sleep(0.1)
        reader, _ = await asks(relay.port, "r0.1", 0.0)
        assert (await reader.read(15)).startswith(b"HTTP/1.1 200 OK")
        assert engine.account.delivered == {"r0.1": 1}
