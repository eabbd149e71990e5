"""The stream of cache events, read from a publisher that behaves as the engines' do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from orla_lg import Backend
from orla_lg.core.call import Ask
from orla_lg.core.engine.backend import Directions
from orla_lg.core.engine.capabilities import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent
from orla_lg.errors import ConfigError
from orla_lg_vllm import VLLMAdapter

zmq = pytest.importorskip("zmq")
msgpack = pytest.importorskip("msgpack")

STORED = {
    "type": "BlockStored", "block_hashes": [1, 2], "parent_block_hash": None, "token_ids": list(range(32)),
    "block_size": 16, "lora_id": None, "medium": "GPU", "lora_name": None, "group_idx": 0, "session_id": "w",
}  # fmt: skip
REMOVED = {"type": "BlockRemoved", "block_hashes": [2], "medium": "GPU", "group_idx": 0}
CLEARED = {"type": "AllBlocksCleared"}


class Publisher:
    """An engine's side of the stream; what it *drops* it still has for who asks again."""

    def __init__(self, folder: Path) -> None:
        self.events, self.replay = f"ipc://{folder}/events", f"ipc://{folder}/replay"
        self.context = zmq.Context()
        self.socket, self.router = self.context.socket(zmq.XPUB), self.context.socket(zmq.ROUTER)
        for socket, endpoint in ((self.socket, self.events), (self.router, self.replay)):
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(endpoint)
        self.batches: list[bytes] = []

    def subscribed(self) -> None:
        assert self.socket.poll(5000), "nobody subscribed"
        self.socket.recv()

    def publish(self, *events: Any, drop: bool = False, number: int | None = None) -> None:
        payload = msgpack.packb([0.0, list(events), 0])
        at = len(self.batches) if number is None else number
        self.batches.append(payload)
        if not drop:
            self.socket.send_multipart((b"", at.to_bytes(8, "big"), payload))

    def answer_replay(self, most: int = 1_000) -> None:
        """Send all that there is, as an engine does; what is more than *most* falls, and the end with it."""
        assert self.router.poll(5000), "nobody asked"
        client, _, first = self.router.recv_multipart()
        all_of_it = range(int.from_bytes(first, "big"), len(self.batches))
        for at in all_of_it[:most]:
            self.router.send_multipart((client, b"", b"", at.to_bytes(8, "big"), self.batches[at]))
        if len(all_of_it) <= most:
            self.router.send_multipart((client, b"", b"", (-1).to_bytes(8, "big", signed=True), b""))

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[Publisher]:
    made = Publisher(tmp_path)
    yield made
    made.close()


def adapter(publisher: Publisher, *, replay: bool = False) -> VLLMAdapter:
    there = {"kv_replay": publisher.replay} if replay else {}
    return VLLMAdapter(Backend("b", "http://b/v1", model="m", engine="vllm", kv_events=publisher.events, **there))


async def read(
    batches: AsyncGenerator[Sequence[KVEvent]] | None, publisher: Publisher, act: Any, wait_s: float = 0.3
) -> list[KVEvent]:
    """Read until the stream says nothing for a moment, while *act* publishes in a thread of its own."""
    assert batches is not None
    seen: list[KVEvent] = []

    async def collect() -> None:
        async for events in batches:
            seen.extend(events)

    def publish() -> None:
        publisher.subscribed()
        act()

    reading = asyncio.get_running_loop().create_task(collect())
    await asyncio.to_thread(publish)
    await asyncio.sleep(wait_s)
    reading.cancel()
    await asyncio.wait([reading])
    await batches.aclose()
    return seen


STORED_READ = BlocksStored([1, 2], None, 16, "w")


async def test_events_are_read_in_both_ways_of_writing_and_other_tiers_left_out(publisher: Publisher) -> None:
    def act() -> None:
        publisher.publish(STORED, {**STORED, "medium": "CPU"}, {**STORED, "group_idx": 1}, {"type": "NewKind"})
        publisher.publish(["BlockStored", [3], 2, [], 16, None], ["BlockRemoved", [3]])
        publisher.publish(REMOVED, CLEARED)

    seen = await read(adapter(publisher).kv_events(), publisher, act)
    assert seen == [
        STORED_READ, BlocksStored([3], 2, 16, None), BlocksRemoved([3]), BlocksRemoved([2]), BlocksCleared(),
    ]  # fmt: skip


async def test_a_gap_without_replay_means_that_less_is_known(publisher: Publisher) -> None:
    def act() -> None:
        publisher.publish(STORED)
        publisher.publish(CLEARED, drop=True)
        publisher.publish(REMOVED)

    seen = await read(adapter(publisher).kv_events(), publisher, act)
    assert seen == [STORED_READ, BlocksCleared(missed=True), BlocksRemoved([2])]


async def test_a_gap_is_filled_by_a_replay(publisher: Publisher) -> None:
    def act() -> None:
        publisher.publish(STORED)
        publisher.publish(CLEARED, drop=True)
        publisher.publish(REMOVED)
        publisher.answer_replay()

    seen = await read(adapter(publisher, replay=True).kv_events(), publisher, act)
    assert seen == [STORED_READ, BlocksCleared(), BlocksRemoved([2])]


async def test_a_replay_that_falls_in_part_is_asked_for_again(publisher: Publisher) -> None:
    def act() -> None:
        publisher.publish(STORED)
        for _ in range(25):
            publisher.publish(REMOVED, drop=True)
        publisher.publish(CLEARED)
        for _ in range(3):
            publisher.answer_replay(most=10)

    seen = await read(adapter(publisher, replay=True).kv_events(), publisher, act, wait_s=1.0)
    assert seen == [STORED_READ, *[BlocksRemoved([2])] * 25, BlocksCleared()]


async def test_what_it_told_before_it_heard_of_us_is_had_by_a_replay_too(publisher: Publisher) -> None:
    def act() -> None:
        publisher.publish(STORED, drop=True)
        publisher.publish(REMOVED)
        publisher.answer_replay()

    seen = await read(adapter(publisher, replay=True).kv_events(), publisher, act)
    assert seen == [STORED_READ, BlocksRemoved([2])]


async def test_an_engine_that_counts_anew_is_empty(publisher: Publisher) -> None:
    def act() -> None:
        for each in (STORED, STORED):
            publisher.publish(each)
        publisher.publish(REMOVED, number=0)

    seen = await read(adapter(publisher).kv_events(), publisher, act)
    assert seen == [STORED_READ, STORED_READ, BlocksCleared(), BlocksRemoved([2])]


async def test_one_that_counts_anew_and_was_not_heard_at_once_is_not_known(publisher: Publisher) -> None:
    def act() -> None:
        for each in (STORED, STORED, STORED):
            publisher.publish(each)
        publisher.publish(REMOVED, number=1)

    seen = await read(adapter(publisher).kv_events(), publisher, act)
    assert seen == [*[STORED_READ] * 3, BlocksCleared(), BlocksCleared(missed=True), BlocksRemoved([2])]


def test_without_an_endpoint_nothing_is_read_and_no_session_sent(publisher: Publisher) -> None:
    silent = VLLMAdapter(Backend("b", "http://b/v1", engine="vllm"))
    ask, told = Ask("m", []), Directions(call_id="c", workflow="w")
    assert silent.kv_events() is None and "session_id" not in silent.request_fields(ask, told)
    assert adapter(publisher).request_fields(ask, told)["session_id"] == "w"


@pytest.mark.parametrize("said", ["127.0.0.1:5557", "tcp://*:5557", "tcp://h", "tcp://h:port", "http://h:1"])
def test_an_endpoint_must_be_one(said: str) -> None:
    with pytest.raises(ConfigError, match="kv_events"):
        Backend("b", "http://b/v1", kv_events=said)
    with pytest.raises(ConfigError, match="kv_replay"):
        Backend("b", "http://b/v1", kv_replay="tcp://h:1")
