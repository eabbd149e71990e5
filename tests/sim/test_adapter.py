"""The adapter, against its server."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from orla_lg import Backend
from orla_lg.core.call import Ask
from orla_lg.core.engine import capabilities
from orla_lg.core.engine.backend import Capability, Directions, Effect, Support
from orla_lg.core.engine.capabilities import PrefixCache, WholeCache, WorkflowCache
from orla_lg.errors import BackendUnavailable
from orla_lg_sim import SimAdapter
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.server import SimServer

FAST = EngineParameters(block_tokens=16, kv_blocks=64, context_tokens=1024, step_s=0.004, request_s=0.0)
PROMPT = "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 3


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with SimServer(FAST, speed=2.0) as server:
        yield server.url


@pytest.fixture
def adapter(url: str) -> SimAdapter:
    made = SimAdapter(Backend("sim", url, engine="sim"))
    asyncio.run(made.flush(WholeCache()))
    return made


def body(text: str = PROMPT, **more: Any) -> dict[str, Any]:
    return {"model": "sim", "messages": [{"role": "user", "content": text}], "max_tokens": 2, **more}


async def cached(adapter: SimAdapter, **more: Any) -> int:
    found = 0
    async with contextlib.aclosing(adapter.generate(body(**more))) as chunks:
        async for chunk in chunks:
            if chunk.usage is not None:
                found = chunk.usage.cached_tokens or 0
    return found


def test_importing_the_package_pulls_nothing_in() -> None:
    heavy = ("starlette", "tokenizers", "jinja2", "uvicorn")
    code = f"import orla_lg_sim, sys; print([name for name in {heavy} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code + "; orla_lg_sim.SimAdapter"], capture_output=True, text=True)
    assert told.stdout.strip() == "[]", told.stderr


async def test_it_can_all_that_an_engine_can_be_told(adapter: SimAdapter) -> None:
    probe = await adapter.probe()
    missing = {name for name in Capability if not probe.can(name)}
    assert missing == {Capability.SAVE_RESTORE, Capability.SLEEP, Capability.KEEP, Capability.ISOLATE}
    assert probe.capabilities[Capability.PIN] is Support.NATIVE
    assert (probe.models, probe.context_tokens, probe.kv_tokens) == (("sim",), 1024, 1024)
    assert probe.incarnation == (await adapter.probe()).incarnation != ""
    for what in (
        capabilities.KVControl,
        capabilities.Observable,
        capabilities.Tokenizing,
        capabilities.Abortable,
        capabilities.Warmable,
    ):
        assert isinstance(adapter, what)


def test_directions_become_fields(adapter: SimAdapter) -> None:
    ask = Ask("sim", ())
    told = Directions(call_id="c1", workflow="w1", priority=2.6)
    assert adapter.request_fields(ask, told) == {"workflow": "w1", "priority": -3, "request_id": "c1"}
    assert adapter.request_fields(ask, Directions()) == {}


async def test_a_workflow_is_flushed_alone(adapter: SimAdapter) -> None:
    await cached(adapter, workflow="a")
    await cached(adapter, text="another " + PROMPT, workflow="b")
    assert await adapter.flush(WorkflowCache("a")) is Effect.FREED
    assert await cached(adapter, workflow="a") == 0
    assert await cached(adapter, text="another " + PROMPT, workflow="b") > 64


async def test_a_prefix_is_pinned_released_and_flushed(adapter: SimAdapter) -> None:
    scope = PrefixCache(body())
    assert await adapter.pin(scope) is Effect.FAILED, "nothing is there yet"
    await cached(adapter)
    assert await adapter.pin(scope, ttl_s=60.0) is Effect.PINNED
    for number in range(12):
        await cached(adapter, text=f"{number} " + PROMPT * 2)
    assert await cached(adapter) > 64
    assert await adapter.release(scope) is Effect.DEMOTED
    assert await adapter.flush(scope) is Effect.FREED
    assert await cached(adapter) == 0


async def test_a_warm_prompt_is_found(adapter: SimAdapter) -> None:
    warmed = await adapter.warm(body())
    assert warmed.effect is Effect.WARMED and warmed.usage.prompt_tokens > 64
    assert await cached(adapter) > 64


async def test_figures_tokens_and_aborts(adapter: SimAdapter) -> None:
    before = await adapter.stats()
    found = [await cached(adapter) for _ in range(2)]
    after = await adapter.stats()
    assert (after.running, after.waiting, after.kv_usage, after.kv_tokens) == (0, 0, 0.0, 1024)
    assert after.prefix_hits is not None and before.prefix_hits is not None
    assert after.prefix_hits - before.prefix_hits == sum(found)
    assert len(await adapter.tokenize(body())) > 64
    assert not await adapter.abort("nobody")

    chunks = adapter.generate(body(max_tokens=800, ignore_eos=True, request_id="mine"))
    assert await anext(chunks) is not None
    assert await adapter.abort("mine")
    assert [chunk.finish_reason async for chunk in chunks if chunk.finish_reason] == ["abort"]


async def test_a_server_that_is_gone_is_told() -> None:
    gone = SimAdapter(Backend("sim", "http://127.0.0.1:9/v1", engine="sim"))
    with pytest.raises(BackendUnavailable):
        await gone.probe()
    with pytest.raises(BackendUnavailable):
        await gone.stats()
    assert await gone.flush(WholeCache()) is Effect.FAILED
    assert not await gone.abort("x")
