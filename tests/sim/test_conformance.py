"""The simulated engine can all that an adapter can promise, and the shipped suite says that it does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from orla_lg import Backend
from orla_lg.testing.conformance import Status, conform
from orla_lg_sim import EngineParameters, SimAdapter, SimServer

ENGINE = EngineParameters(block_tokens=16, kv_blocks=256, context_tokens=2048, step_s=0.004, request_s=0.001)


@pytest.fixture
def adapter() -> Iterator[SimAdapter]:
    with SimServer(ENGINE, speed=2.0) as server:
        yield SimAdapter(Backend("sim", server.url, engine="sim"))


@pytest.mark.slow
def test_it_conforms_in_all_that_it_has(adapter: SimAdapter) -> None:
    report = asyncio.run(conform(adapter))
    report.raise_for_failures()
    passed = {result.name for result in report.results if result.status is Status.PASSED}
    assert {"pin_withstands_pressure", "flush_of_a_workflow_is_not_widened", "flush_of_a_prefix_frees_it"} <= passed
