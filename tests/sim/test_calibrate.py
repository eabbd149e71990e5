"""Calibration finds the numbers that an engine runs with. The engine is in this process and time is virtual."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orla_lg.core.call import Usage
from orla_lg.errors import BackendUnavailable, EngineError
from orla_lg.testing.virtual import in_virtual_time
from orla_lg_sim.calibrate import CalibrationResult, Calibrator, Effort
from orla_lg_sim.chat import ChatReader
from orla_lg_sim.client import Timed, TimingClient
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.figures import exposition
from orla_lg_sim.live import LiveEngine
from orla_lg_sim.parameters import EngineParameters, load
from orla_lg_sim.request import Kind
from orla_lg_sim.text import WordTokenizer

TRUE = EngineParameters(
    block_tokens=16,
    kv_blocks=900,
    context_tokens=4096,
    max_running=12,
    max_batch_tokens=1024,
    step_s=0.02,
    prefill_token_s=3e-4,
    prefill_attention_s=2e-7,
    decode_sequence_s=8e-4,
    decode_context_s=6e-7,
    request_s=0.005,
)


class InProcess(TimingClient):
    """A client whose engine is simulated in the same loop, without HTTP."""

    def __init__(self, parameters: EngineParameters, *, metrics: bool = True) -> None:
        super().__init__("http://in.process", "sim")
        loop = asyncio.get_running_loop()
        self.live = LiveEngine(SimEngine(parameters), clock=loop.time)
        self.reader = ChatReader("sim", parameters, WordTokenizer())
        self.time, self.has_metrics = loop.time, metrics

    async def served(self) -> dict[str, Any]:
        return {"id": "sim", "max_model_len": self.live.engine.parameters.context_tokens}

    async def metrics(self) -> str:
        return exposition(self.live.catch_up(), 0.0) if self.has_metrics else ""

    async def ask(self, body: Mapping[str, Any], heard: Callable[[int], None] = lambda _: None) -> Timed:
        chat = self.reader.read({**body, "stream": True})
        sent_s, came = self.time(), []
        usage = Usage()
        async for event in self.live.run(chat.request):
            if event.kind is Kind.FINISHED:
                usage = Usage(event.prompt_tokens, event.cached_tokens, event.tokens)
            else:
                came.append(self.time())
                heard(len(came))
        return Timed(sent_s, tuple(came), self.time(), usage)


async def calibrated(client: TimingClient, base: EngineParameters | None = None) -> CalibrationResult:
    try:
        return await Calibrator(client, Effort()).run(base or EngineParameters())
    finally:
        await client.aclose()


@in_virtual_time
async def test_it_finds_what_the_engine_runs_with() -> None:
    found = await calibrated(InProcess(TRUE))
    told = found.parameters
    assert found.notes == ()
    for limit in ("block_tokens", "kv_blocks", "context_tokens", "max_running", "max_batch_tokens"):
        assert getattr(told, limit) == getattr(TRUE, limit), limit
    for cost in ("prefill_token_s", "prefill_attention_s", "decode_sequence_s", "decode_context_s"):
        assert getattr(told, cost) == pytest.approx(getattr(TRUE, cost), rel=0.08), cost
    # The fixed parts: of a step that decodes, and around a request.
    assert told.step_s == pytest.approx(TRUE.step_s, rel=0.05)
    assert told.request_s + told.prefill_s == pytest.approx(TRUE.request_s, abs=0.001)
    assert max(found.errors.values()) < 0.02


@in_virtual_time
async def test_a_step_that_begins_a_prefill_may_cost_more() -> None:
    found = await calibrated(InProcess(replace(TRUE, prefill_s=0.015)))
    assert found.parameters.prefill_s == pytest.approx(0.015, rel=0.1)
    assert found.parameters.request_s == pytest.approx(TRUE.request_s, rel=0.3)


@in_virtual_time
async def test_jitter_does_not_lead_it_astray() -> None:
    found = await calibrated(InProcess(replace(TRUE, jitter=0.1)))
    step = step_s(found.parameters)
    assert step == pytest.approx(step_s(TRUE), rel=0.1)
    assert 0.01 < max(found.errors.values()) < 0.15


def step_s(costs: EngineParameters) -> float:
    """A prefill of 300 tokens beside six streams of 1500."""
    prefill = costs.prefill_s + 300 * costs.prefill_token_s + 45_000 * costs.prefill_attention_s
    return costs.step_s + prefill + 6 * costs.decode_sequence_s + 9000 * costs.decode_context_s


@in_virtual_time
async def test_without_metrics_limits_are_the_users_and_that_is_said() -> None:
    base = EngineParameters(block_tokens=16, kv_blocks=900, max_running=12)
    found = await calibrated(InProcess(TRUE, metrics=False), base)
    assert (found.parameters.block_tokens, found.parameters.max_running) == (16, 12)
    assert len([note for note in found.notes if "no metrics" in note]) == 2


@in_virtual_time
async def test_an_engine_without_chunks_in_reach_says_so() -> None:
    found = await calibrated(InProcess(replace(TRUE, max_batch_tokens=8192)))
    assert any("chunk size was not measured" in note for note in found.notes)


@in_virtual_time
async def test_an_engine_that_takes_no_time_is_none() -> None:
    still = EngineParameters(
        step_s=0, prefill_token_s=0, prefill_attention_s=0, decode_sequence_s=0, decode_context_s=0
    )
    with pytest.raises(EngineError, match="in no time"):
        await calibrated(InProcess(replace(still, request_s=0)))


def test_what_is_found_is_kept(tmp_path: Path) -> None:
    TRUE.save(tmp_path / "found.toml")
    assert load(tmp_path / "found.toml") == TRUE


async def test_an_engine_that_does_not_answer_is_told_at_once() -> None:
    with pytest.raises(BackendUnavailable, match="does not list"):
        await calibrated(TimingClient("http://127.0.0.1:9/v1"))
