"""A replay on the virtual clock and one over HTTP see the same engine."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from orla_lg_sim.client import TimingClient
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.replay import CallOutcome, VirtualReplay, live, summarise, table
from orla_lg_sim.server import SimServer
from orla_lg_sim.sessions import Session, Turn
from orla_lg_sim.text import WordTokenizer

ENGINE = EngineParameters(block_tokens=16, kv_blocks=200, context_tokens=2048, step_s=0.02, request_s=0.002)


def sessions(count: int = 3, turns: int = 3) -> list[Session]:
    made = []
    for number in range(count):
        history = [{"role": "system", "content": "a policy that all share " * 20}]
        taken = []
        for turn in range(turns):
            history = [*history, {"role": "user", "content": f"question {turn} of customer {number} " * 8}]
            taken.append(Turn(tuple(history), 12, 0.05))
            history = [*history, {"role": "assistant", "content": f"answer {turn} " * 5}]
        made.append(Session(str(number), number * 0.1, tuple(taken)))
    return made


def test_a_session_is_played_one_call_after_another() -> None:
    outcomes = VirtualReplay(sessions(), ENGINE, WordTokenizer()).run()
    assert len(outcomes) == 9
    for name in "012":
        own = sorted((outcome for outcome in outcomes if outcome.session == name), key=lambda one: one.turn)
        assert own[0].sent_s == pytest.approx(int(name) * 0.1 + 0.05)
        for before, after in pairwise(own):
            assert after.sent_s == pytest.approx(before.sent_s + before.duration_s + 0.05)
            assert after.cached_tokens > before.cached_tokens


def test_a_small_cache_forgets() -> None:
    roomy = VirtualReplay(sessions(6), ENGINE, WordTokenizer()).run()
    small = EngineParameters(block_tokens=16, kv_blocks=50, context_tokens=2048)
    tight = VirtualReplay(sessions(6), small, WordTokenizer()).run()
    assert summarise(tight).cached_tokens < summarise(roomy).cached_tokens


def test_the_server_behaves_as_the_virtual_clock_says() -> None:
    async def over_http(url: str) -> list[CallOutcome]:
        client = TimingClient(url)
        try:
            await client.served()
            return await live(sessions(), client)
        finally:
            await client.aclose()

    with SimServer(ENGINE) as server:
        real = summarise(asyncio.run(over_http(server.url)))
    virtual = summarise(VirtualReplay(sessions(), ENGINE, WordTokenizer()).run())
    assert (real.calls, real.prompt_tokens) == (virtual.calls, virtual.prompt_tokens)
    assert real.cached_tokens == pytest.approx(virtual.cached_tokens, rel=0.05)
    assert real.duration_s == pytest.approx(virtual.duration_s, rel=0.3), "HTTP on a busy machine adds a little"


def test_a_table_shows_the_difference() -> None:
    outcomes = VirtualReplay(sessions(), ENGINE, WordTokenizer()).run()
    assert "+0.0%" in table({"a": outcomes, "b": outcomes})
    assert "%" not in table({"a": outcomes})
