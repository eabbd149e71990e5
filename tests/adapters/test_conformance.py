"""Every adapter runs the conformance suite: on wire-faithful stand-ins, and on real engines where there are any."""

from __future__ import annotations

import unittest
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from orla_lg import Backend
from orla_lg.core.engine.backend import BackendAdapter
from orla_lg.engines import OwnEngine
from orla_lg.openai_api.adapter import OpenAIAdapter
from orla_lg.testing.conformance import CHECKS, Check, Report, Status, Subject, conform
from orla_lg.testing.faults import FaultEngine, Reply
from orla_lg_llamacpp import LlamaCppAdapter
from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings
from orla_lg_ollama import OllamaAdapter
from orla_lg_sglang import SGLangAdapter
from orla_lg_sim import EngineParameters, SimAdapter, SimServer
from orla_lg_vllm import VLLMAdapter
from tests.wire.machine import Machine
from tests.wire.ollama_server import MODEL as OLLAMA_MODEL
from tests.wire.ollama_server import OllamaFlags, OllamaServer
from tests.wire.sglang_server import SGLangFlags, SGLangServer
from tests.wire.vllm_server import VLLMFlags, VLLMServer

ANY_ENGINE = {check.name for check in CHECKS[:9]} - {"priority_keeps_order"} | {
    "tokens_come_one_by_one", "usage_comes_at_the_end", "streams_do_not_mix", "closing_frees_the_engine",
    "schema_is_obeyed", "cached_tokens_are_real", "warm_up_helps", "failed_warm_up_says_so", "works_in_any_loop",
    "closing_twice_is_fine", "broken_streams_raise", "nonsense_raises", "refusals_keep_their_status",
    "false_counts_do_no_harm", "probe_of_nonsense_raises",
}  # fmt: skip
"""Checks that no engine of ours is excused from."""

VLLM = ANY_ENGINE | {
    "priority_keeps_order", "too_long_is_refused", "unknown_model_is_refused", "abort_ends_a_call", "tools_are_taken",
    "flush_of_all_frees_all", "unusable_orders_say_so", "stats_follow_the_load", "tokens_are_those_of_the_prompt",
}  # fmt: skip
SGLANG = VLLM - {"unknown_model_is_refused"} | {"release_keeps_until_needed"}
PRESSED = {"released_goes_first", "kept_outlives_the_rest"}
SIM = VLLM | {
    "flush_of_a_workflow_frees_it", "flush_of_a_workflow_is_not_widened", "flush_leaves_what_is_shared",
    "flush_does_not_break_a_stream", "flush_of_a_prefix_frees_it", "release_keeps_until_needed",
    "released_goes_first", "pin_is_told", "pin_withstands_pressure", "pin_ends_with_its_time",
}  # fmt: skip
LLAMACPP = ANY_ENGINE | {
    "too_long_is_refused", "flush_of_a_workflow_frees_it", "flush_of_a_workflow_is_not_widened",
    "flush_leaves_what_is_shared", "flush_does_not_break_a_stream", "flush_of_all_frees_all",
    "release_keeps_until_needed", "pin_is_told", "pin_withstands_pressure", "unusable_orders_say_so",
    "saved_slot_comes_back", "orders_stay_in_their_slot", "restoring_nothing_says_so", "stats_follow_the_load",
    "tokens_are_those_of_the_prompt",
}  # fmt: skip


def passed(report: Report) -> set[str]:
    return {result.name for result in report.results if result.status is Status.PASSED}


def assert_conforms(report: Report, at_least: set[str]) -> None:
    """Assert that nothing failed, and that what matters was not skipped."""
    report.raise_for_failures()
    assert at_least <= passed(report), f"not passed: {sorted(at_least - passed(report))}\n{report}"


# The generic adapter, a test for each check ---------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> Iterator[Subject]:
    with FaultEngine(otherwise=Reply(token_s=0.002)) as engine:
        yield Subject(OpenAIAdapter(Backend("plain", engine.url)))


@pytest.mark.parametrize("check", CHECKS, ids=str)
async def test_the_generic_adapter(check: Check, plain: Subject) -> None:
    try:
        await check.verify(plain)
    except unittest.SkipTest:
        assert check.name not in ANY_ENGINE


# Stand-ins ------------------------------------------------------------------------------------------------


@contextmanager
def vllm(**flags: Any) -> Iterator[BackendAdapter]:
    with VLLMServer(VLLMFlags(**flags)) as server:
        yield VLLMAdapter(Backend("main", server.url, engine="vllm"))


@contextmanager
def sglang(blocks: int = 16_384, **flags: Any) -> Iterator[BackendAdapter]:
    with SGLangServer(SGLangFlags(**flags), Machine(block=1, blocks=blocks)) as server:
        yield SGLangAdapter(Backend("main", server.url, engine="sglang"))


@contextmanager
def ollama(**flags: Any) -> Iterator[BackendAdapter]:
    with OllamaServer(OllamaFlags(**flags)) as server:
        yield OllamaAdapter(Backend("main", server.url, OLLAMA_MODEL, engine="ollama"))


@contextmanager
def sim() -> Iterator[BackendAdapter]:
    """A cache small enough to put pins under pressure."""
    with SimServer(EngineParameters(kv_blocks=130, context_tokens=2048), speed=4) as server:
        yield SimAdapter(Backend("main", server.url, engine="sim"))


STAND_INS: dict[str, tuple[Callable[[], AbstractContextManager[BackendAdapter]], set[str]]] = {
    "vllm": (lambda: vllm(scale_out=True, sleep_mode=True), VLLM | {"sleep_and_wake"}),
    "vllm, no flags": (
        lambda: vllm(dev_mode=False, policy="fcfs", prompt_tokens_details=False, tools=False, log_stats=False),
        ANY_ENGINE - {"cached_tokens_are_real", "warm_up_helps"} | {"cached_tokens_are_not_hidden"},
    ),
    "sglang": (sglang, SGLANG),
    "sglang, a small cache": (lambda: sglang(blocks=4000, eviction="priority"), SGLANG | PRESSED),
    "sglang, eviction only": (
        lambda: sglang(blocks=4000, eviction="priority", priority=False, sessions=False),
        SGLANG - {"priority_keeps_order", "release_keeps_until_needed"} | {"kept_outlives_the_rest"},
    ),
    "sglang, no flags": (
        lambda: sglang(priority=False, sessions=False, cache_report=False, tool_call_parser=None, metrics=False),
        ANY_ENGINE - {"cached_tokens_are_real", "warm_up_helps"} | {"cached_tokens_are_not_hidden"},
    ),
    "ollama": (ollama, ANY_ENGINE | {"unknown_model_is_refused", "too_long_is_refused"}),
    "ollama, before it counted": (
        lambda: ollama(version="0.30.0", cached_counts=False),
        ANY_ENGINE - {"cached_tokens_are_real", "warm_up_helps"} | {"cached_tokens_are_not_hidden"},
    ),
    "sim": (sim, SIM),
}


@pytest.mark.parametrize("name", STAND_INS)
async def test_on_a_stand_in(name: str) -> None:
    place, at_least = STAND_INS[name]
    with place() as adapter:
        assert_conforms(await conform(adapter, disruptive=True), at_least)


# Real engines ---------------------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.slow
async def test_on_the_embedded_llamacpp() -> None:
    # One thread: two that wait for each other on a busy machine are ten times slower.
    with EmbeddedEngine(EngineSettings(slots=4, context_tokens=1024, threads=1)) as engine:
        adapter = LlamaCppAdapter(Backend("llama", engine.url, engine="llamacpp"))
        report = await conform(adapter, prompt_words=120, limit_s=120)
    assert_conforms(report, LLAMACPP)


@pytest.mark.engines
async def test_on_a_real_sglang(real_sglang: Backend) -> None:
    adapter = SGLangAdapter(real_sglang)
    report = await conform(adapter, limit_s=170)
    await adapter.aclose()
    assert_conforms(report, SGLANG)


@pytest.mark.engines
async def test_on_a_real_vllm(real_vllm: OwnEngine) -> None:
    assert_conforms(await conform(VLLMAdapter(Backend("vllm", real_vllm.url, engine="vllm"))), VLLM)


@pytest.mark.engines
async def test_the_generic_adapter_on_a_real_vllm(real_vllm: OwnEngine) -> None:
    report = await conform(OpenAIAdapter(Backend("vllm", real_vllm.url)))
    assert_conforms(report, ANY_ENGINE | {"too_long_is_refused", "unknown_model_is_refused"})
