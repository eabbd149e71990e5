"""What a real vLLM tells of its cache, as the adapter reads it.

Between vLLM and the reader stands a relay, which reads the same stream with code of its own and may let a batch fall.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Hashable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from orla_lg import Backend
from orla_lg.core.call import Ask
from orla_lg.core.engine.backend import Directions
from orla_lg.core.engine.capabilities import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent
from orla_lg.engines import EngineOptions, OwnEngine, running_engine
from orla_lg_vllm import VLLMAdapter

zmq = pytest.importorskip("zmq")
msgpack = pytest.importorskip("msgpack")

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

BLOCK = 32
KV_TOKENS = 120 * BLOCK
"""About half of what the conversations below come to."""

PATIENCE_S = 60.0

Message = dict[str, str]


def words(seed: str, count: int) -> str:
    chance, some = random.Random(seed), ("alpha", "bravo", "delta", "echo", "golf", "hotel", "india", "kilo", "lima")
    return " ".join(chance.choice(some) for _ in range(count))


SYSTEM = {"role": "system", "content": "You are brief. " + words("system", 100)}


def said(seed: str, count: int = 150) -> Message:
    return {"role": "user", "content": words(seed, count)}


class Relay:
    """Passes an engine's events on, but for those that it is told to drop; knows what is cached by reading them."""

    def __init__(self, source: str, folder: Path) -> None:
        self.endpoint = f"ipc://{folder}/relay"
        self.there: Counter[bytes] = Counter()
        """Blocks by their hashes."""
        self.stored = self.batches = self.dropped = 0
        self.drop = 0
        """So many of the next batches that store something."""
        self._context = zmq.Context()
        self._from, self._to = self._context.socket(zmq.SUB), self._context.socket(zmq.PUB)
        self._to.bind(self.endpoint)
        self._from.setsockopt(zmq.SUBSCRIBE, b"")
        self._from.connect(source)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._pass_on)
        self._thread.start()
        time.sleep(1.0)  # until the engine knows of us

    def _pass_on(self) -> None:
        while not self._ending.is_set():
            if not self._from.poll(50):
                continue
            topic, number, payload = self._from.recv_multipart()
            assert int.from_bytes(number, "big") == self.batches, "the relay itself missed something"
            stores = self._read(msgpack.unpackb(payload)[1])
            self.batches += 1
            if stores and self.drop:
                self.drop, self.dropped = self.drop - 1, self.dropped + 1
            else:
                self._to.send_multipart((topic, number, payload))

    def _read(self, events: list[dict[str, Any]]) -> bool:
        for event in events:
            if event["type"] == "AllBlocksCleared":
                self.there.clear()
            elif event["type"] == "BlockStored":
                self.there.update(event["block_hashes"])
                self.stored += len(event["block_hashes"])
            else:
                self.there.subtract(event["block_hashes"])
        return any(event["type"] == "BlockStored" for event in events)

    @property
    def blocks(self) -> int:
        """How many are cached, those of the same content counted once."""
        return sum(count > 0 for count in self.there.values())

    def close(self) -> None:
        self._ending.set()
        self._thread.join(10)
        self._context.destroy(linger=0)


@pytest.fixture(scope="module")
def engine() -> Iterator[OwnEngine]:
    with running_engine(EngineOptions("vllm-cpu", kv_tokens=KV_TOKENS, kv_events=True)) as running:
        yield running


@pytest.fixture(scope="module")
def relay(engine: OwnEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    made = Relay(engine.kv_events, tmp_path_factory.mktemp("kv"))
    yield made
    made.close()


class Reader:
    """The adapter's reader, and what is cached by its events."""

    def __init__(self, engine: OwnEngine, relay: Relay, *, replay: bool = True) -> None:
        self.engine, self.relay = engine, relay
        self.there: Counter[Hashable] = Counter()
        self.gaps = 0
        self.owners = set[str | None]()
        self._adapter = VLLMAdapter(
            Backend(
                "kv", engine.url, model=engine.name, engine="vllm",
                kv_events=relay.endpoint, kv_replay=engine.kv_replay if replay else None,
            )
        )  # fmt: skip

    async def read(self) -> None:
        batches = self._adapter.kv_events()
        assert batches is not None
        async with contextlib.aclosing(batches):
            async for events in batches:
                for event in events:
                    self._apply(event)

    def _apply(self, event: KVEvent) -> None:
        match event:
            case BlocksStored():
                self.there.update(event.hashes)
                self.owners.add(event.workflow)
            case BlocksRemoved():
                self.there.subtract(event.hashes)
            case BlocksCleared():
                self.there.clear()
                self.gaps += event.missed

    @property
    def blocks(self) -> int:
        return sum(count > 0 for count in self.there.values())

    async def call(self, seed: str, workflow: str | None = None) -> None:
        """Have the engine compute a prompt of its own."""
        body: dict[str, Any] = {"model": self.engine.name, "messages": [SYSTEM, said(seed)], "max_tokens": 8}
        if workflow is not None:
            ask = Ask(self.engine.name, body["messages"])
            body |= self._adapter.request_fields(ask, Directions(call_id=seed, workflow=workflow))
        async with httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False) as http:
            told = await http.post(f"{self.engine.url}/chat/completions", json=body)
        assert told.is_success, told.text

    async def heard_all(self) -> None:
        """Wait until what was published has arrived."""
        await asyncio.sleep(0.5)  # the engine publishes after its answers
        async with asyncio.timeout(PATIENCE_S):
            while self.blocks != self.relay.blocks:
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def reading(engine: OwnEngine, relay: Relay, *, replay: bool = True) -> AsyncIterator[Reader]:
    reader = Reader(engine, relay, replay=replay)
    task = asyncio.ensure_future(reader.read())  # noqa: TID251
    try:
        yield reader
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_what_is_read_is_what_the_engine_holds(engine: OwnEngine, relay: Relay) -> None:
    async with reading(engine, relay) as reader:
        for number in range(12):  # twice what fits
            await reader.call(f"w{number}", "some workflow")
        await reader.heard_all()
        assert 60 < reader.blocks <= 120 and "some workflow" in reader.owners


async def test_a_batch_that_was_lost_is_had_again(engine: OwnEngine, relay: Relay) -> None:
    async with reading(engine, relay) as reader:
        await reader.call("a")
        await reader.heard_all()
        before, relay.drop = reader.gaps, 1
        await reader.call("b")
        await reader.call("b again")
        await reader.heard_all()
        assert relay.drop == 0 and reader.gaps == before


async def test_where_it_cannot_be_had_again_that_is_told(engine: OwnEngine, relay: Relay) -> None:
    async with reading(engine, relay, replay=False) as reader:
        await reader.call("c")
        await asyncio.sleep(0.5)
        before, relay.drop = reader.gaps, 1
        await reader.call("d")
        await reader.call("d again")
        async with asyncio.timeout(PATIENCE_S):
            while reader.gaps == before:
                await asyncio.sleep(0.02)


async def test_a_reset_is_told_when_the_engine_next_runs(engine: OwnEngine, relay: Relay) -> None:
    async with reading(engine, relay) as reader:
        await reader.call("a")
        await reader.heard_all()
        many, root = reader.blocks, engine.url.removesuffix("/v1")
        assert httpx.post(f"{root}/reset_prefix_cache", timeout=PATIENCE_S, trust_env=False).json()["success"]
        await reader.call("of somebody else")  # vLLM tells with its next step
        await reader.heard_all()
        assert 0 < reader.blocks < many
