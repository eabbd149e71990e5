"""``make bench-serve``: what its figures are made of, and its callers against the scripted engine."""

from __future__ import annotations

import asyncio
from argparse import Namespace

import pytest

from bench.lib.figures import Rounds
from bench.serve import __main__ as bench
from bench.serve import gateway, link, load
from tests import scripted_engine


def turn(arm: str, seed: int, alone_ms: float, cpu_ms: float = 0.5) -> gateway.Turn:
    return gateway.Turn(arm, seed, alone_ms, 1000.0, cpu_ms, alone_ms + 1, 400.0, 5.0)


def block(arm: str, seed: int, loaded: str, *wait_ms: float) -> link.Block:
    return link.Block(arm, seed, loaded, wait_ms, [each + 20 for each in wait_ms], 0.2)


def test_what_the_gateway_adds_is_a_difference_within_a_round() -> None:
    rows = [
        turn(gateway.DIRECT, 0, 0.1), turn(gateway.ORLA, 0, 0.6), turn(gateway.LITELLM, 0, 9.1),
        turn(gateway.ORLA, 1, 5.8), turn(gateway.DIRECT, 1, 5.1), turn(gateway.DIRECT, 2, 0.1),
        turn(gateway.ORLA, 2, 0.9, cpu_ms=0.7),
    ]  # fmt: skip
    rounds = Rounds(gateway.added(rows), [gateway.DIRECT, gateway.ORLA])
    assert rounds.seeds == [0], "a round that an arm lacks compares nothing"
    rounds = Rounds(gateway.added([row for row in rows if row.arm != gateway.LITELLM]))
    assert rounds.column(gateway.ORLA, lambda each: each.added_ms) == pytest.approx([0.5, 0.7, 0.8])
    assert rounds.column(gateway.ORLA, lambda each: each.added_first_ms) == pytest.approx([0.5, 0.7, 0.8])
    assert "| orla-lg serve | 0.90 (0.60 … 5.80) | 0.70 (0.50 … 0.80) |" in rounds.table("arm", gateway.COLUMNS)[3]
    assert gateway.beyond_goal(rounds) == []
    slow = Rounds(gateway.added([turn(gateway.DIRECT, 0, 0.1), turn(gateway.ORLA, 0, 1.2, cpu_ms=0.7)]))
    adds, cpu = gateway.beyond_goal(slow)
    assert "adds at the median of one caller: 1.10 ms, the goal is 0.90" in adds and "0.70 ms" in cpu


def test_what_the_link_adds_is_a_difference_of_medians_within_a_round() -> None:
    blocks = [
        block(link.LOCAL, 0, link.IDLE, 0.1, 0.1, 9.0), block(link.LINK, 0, link.IDLE, 0.3, 0.4, 0.3),
        block(link.LINK, 1, link.IDLE, 2.5), block(link.LOCAL, 1, link.IDLE, 2.1),
        block(link.LOCAL, 0, link.LOADED, 1.0), block(link.LINK, 0, link.LOADED, 3.0),
    ]  # fmt: skip
    assert link.added(blocks, link.IDLE) == pytest.approx([0.2, 0.4])
    assert link.added(blocks, link.LOADED) == pytest.approx([2.0])
    assert link.beyond_goal(blocks) == [] and link.beyond_goal(blocks[2:]) != []
    row = "| idle | by link | 1.40 (0.30 … 2.50) | 2.5 | **0.30** (0.20 … 0.40) | 21.4 (20.3 … 22.5) | 0.20 "
    assert link.report(blocks)[3].startswith(row)


def test_memory_is_flat_or_is_not() -> None:
    def told(requests: list[float], streams: list[float]) -> list[str]:
        return gateway.told([gateway.Held("orla", requests, 120.0, streams)], 1000, 100)

    rows = told([60.0, 80.0, 81.0, 82.0, 82.0], [90.0, 91.0, 92.0, 92.5])
    assert rows[-3].startswith("| orla | 60.0 | 81.0 | 82.0 | 120.0 | 91.0 | 92.5 | +1.5") and rows[-1] == "flat"
    assert "goal missed" in told([60.0, 80.0, 85.0], [90.0, 91.0, 91.0, 91.0])[-1]
    assert "goal missed" in told([60.0, 81.0, 81.0], [90.0, 91.0, 94.0, 96.0])[-1]


def test_it_is_drawn_the_same_each_time(tmp_path: object) -> None:
    assert isinstance(tmp_path, type(bench.DOCS))
    blocks = [block(arm, 0, loaded, 0.1) for arm in (link.LOCAL, link.LINK) for loaded in (link.IDLE, link.LOADED)]
    rounds = Rounds(gateway.added([turn(arm, 0, 1.0) for arm in (gateway.DIRECT, gateway.ORLA, gateway.LITELLM)]))
    first, second = tmp_path / "one.svg", tmp_path / "two.svg"
    for path in (first, second):
        bench.draw(blocks, rounds, path)
    assert first.read_bytes() == second.read_bytes()


async def test_callers_read_whole_answers_and_streams_and_see_wrong_ones() -> None:
    chosen = Namespace(port=0, before_s=0.0, chunks=12, token_s=0.001, late_s=0.0, account=scripted_engine.Account())
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    serving = asyncio.get_running_loop().create_task(scripted_engine.serve(chosen, ready.set_result))
    url = await ready
    by = await load.callers(url, 3)
    whole, stream = load.request(url, "key"), load.request(url, "key", stream=True)
    assert 1900 < len(whole) < 2300
    answers = await load.flood(by, whole, 20)
    assert len(answers) == 20 and all(each.whole_ms > 0 for each in answers)
    streams = await load.flood(by, stream, 4, 12)
    assert all(0 < each.first_ms < each.whole_ms for each in streams)
    with pytest.raises(load.Fault):
        await by[0].ask(stream, 11)
    with pytest.raises(load.Fault):
        await by[1].ask(whole.replace(b"/chat/completions", b"/chat/completionz"))
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
