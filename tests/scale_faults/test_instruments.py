"""What faults are seen with: the account of calls, the time until they flow again, relays that are cut."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from collections import Counter

import httpx
import pytest

from tests.scale_faults.account import Call, Flow, Row, flow, shown, spread
from tests.scale_faults.clients import Clients
from tests.scale_faults.controls import CONTROLS, FIRST
from tests.scale_faults.kinds import KINDS, SOME
from tests.scripted_engine import MARK
from tests.serve_kills.relays import Relays

BOUNDS = {"main": 8, "quick": 4}


def call(replica: str, begun_s: float, ended_s: float | None, error: str = "", stage: str = "short") -> Call:
    return Call(replica, stage, 0.5, begun_s, ended_s, error)


def test_calls_flow_again_when_one_that_began_later_left_for_its_engine() -> None:
    calls = [
        call("r0", 9.9, 10.6), call("r0", 10.1, 13.5), call("r0", 10.2, 12.5), call("r1", 11.0, 14.5),
        call("r1", 10.5, 11.5, "BackendUnavailable: none"), call("r2", 10.5, None),
        call("r1", 10.5, 10.9, stage="long"),
    ]  # fmt: skip
    assert flow(calls, "short", 10.0, ["r0", "r1"]) == Flow(2.0, 4.0)
    assert flow(calls, "short", 10.0, ["r0", "r2"]) is None, "a replica still waits"
    assert flow(calls, "short", 20.0, []) is None


def test_a_row_says_what_is_wrong() -> None:
    row = Row("core killed", 3, 100, 2, most={"main": 8, "quick": 4}, flows=[Flow(1.0, 2.0), Flow(1.5, 2.5)])
    assert row.wrong(BOUNDS) == []
    line = "| core killed | 3 | 100 | 0 | 0 | 2 | 0 | 8 of 8, 4 of 4 | 1.2 / 1.5 / 1.5 | 2.2 / 2.5 / 2.5 |"
    assert shown([row], BOUNDS)[2] == line
    bad = Row("core killed", 1, 0, 0, Counter({"BackendUnavailable": 2, "LinkBroken": 1}), 1, 1, {"main": 9},
              may_end_with=frozenset({"BackendUnavailable"}))  # fmt: skip
    assert [each.partition(": ")[2] for each in bad.wrong(BOUNDS)] == [
        "1 calls lost", "1 calls at an engine twice", "no call ended", "9 of 8 at once at main",
        "1 calls ended with LinkBroken",
    ]  # fmt: skip
    assert spread([]) == "–"


def test_a_whole_run_makes_more_than_two_hundred_faults() -> None:
    assert sum(kind.times for kind in KINDS.values()) >= 200
    assert set(FIRST) <= set(CONTROLS) and set(SOME) <= set(KINDS)


async def test_clients_ask_the_other_gateway_by_a_request_of_another_id(capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        found = MARK.search(request.content)
        assert found is not None
        asked.append((request.url.host, found[1].decode()))
        if request.url.host == "a":
            raise httpx.ConnectError("nobody listens")
        return httpx.Response(200, json={})

    chosen = argparse.Namespace(name="c", gateways="http://a,http://b", begins_at=0, long_s=1.0, short_s=0.1)
    clients = Clients(chosen)
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http:
        await clients.call(http, "short")
        await clients.call(http, "long")
    assert asked == [("a", "c.0.0"), ("b", "c.0.1"), ("b", "c.1.0")]
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(each.get("begun"), each.get("ended"), each.get("error")) for each in told] == [
        ("c.0", None, None), (None, "c.0", None), ("c.1", None, None), (None, "c.1", None),
    ]  # fmt: skip


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(100):
            writer.write(data)
    writer.close()


@pytest.mark.parametrize("silently", [False, True])
async def test_a_relay_is_cut_for_a_while(silently: bool) -> None:
    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        with Relays(server.sockets[0].getsockname()[1]) as relays:
            relay = relays.open()

            async def asked(writer: asyncio.StreamWriter, reader: asyncio.StreamReader) -> bytes:
                writer.write(b"hello")
                try:
                    async with asyncio.timeout(0.1):
                        return await reader.read(100)
                except (TimeoutError, ConnectionError):
                    return b""

            reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
            assert await asked(writer, reader) == b"hello"
            relay.cut(0.3, silently=silently)
            await asyncio.sleep(0.05)
            assert await asked(writer, reader) == b""
            await asyncio.sleep(0.35)
            assert await asked(writer, reader) == b"", "what stood ends"
            reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
            assert await asked(writer, reader) == b"hello"
