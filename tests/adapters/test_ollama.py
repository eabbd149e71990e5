"""The Ollama adapter against a stand-in that follows Ollama's documents."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from orla_lg import Backend
from orla_lg.core.engine.backend import Capability, Directions, Effect, Support
from orla_lg.core.engine.capabilities import Abortable, Observable, PrefixCache, Tokenizing, WholeCache, WorkflowCache
from orla_lg.errors import BackendUnavailable, EngineRefused
from orla_lg.wires import chat
from orla_lg_ollama import OllamaAdapter
from orla_lg_ollama.stay import Stay
from tests.wire.asking import LONG, body, events, fields, post, read, running, until
from tests.wire.ollama_server import MODEL, OllamaFlags, OllamaServer

ALWAYS = {
    "json_schema": "native", "stream_usage": "native", "warm": "emulated", "flush_all": "emulated", "sleep": "native",
    "keep": "emulated",
    **dict.fromkeys(("priority", "pin", "release", "flush_workflow", "flush_prefix", "save_restore"), "unsupported"),
    **dict.fromkeys(("stats", "tokenize", "abort", "isolate"), "unsupported"),
}  # fmt: skip


def of(server: OllamaServer, **settings: Any) -> OllamaAdapter:
    return OllamaAdapter(Backend("main", server.url, **{"model": MODEL, "engine": "ollama", **settings}))


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[OllamaServer]:
    with OllamaServer(getattr(request, "param", OllamaFlags())) as running:
        yield running


@pytest.fixture
async def adapter(server: OllamaServer) -> OllamaAdapter:
    made = of(server)
    await made.probe()
    return made


# Probing


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        (OllamaFlags(), {"tools", "cached_tokens"}),
        (OllamaFlags(capabilities=("completion",)), {"cached_tokens"}),
        (OllamaFlags(capabilities=None), {"tools", "cached_tokens"}),  # it does not tell: not held against it
        (OllamaFlags(version="0.33.2", cached_counts=False), {"tools"}),
        (OllamaFlags(version="0.9.9", cached_counts=False), {"tools"}),
        (OllamaFlags(version="0.40.0-rc1"), {"tools", "cached_tokens"}),
        (OllamaFlags(version="1.0.0"), {"tools", "cached_tokens"}),
        (OllamaFlags(version="development", cached_counts=False), {"tools"}),
    ],
)
async def test_capabilities_follow_from_the_model_and_the_version(flags: OllamaFlags, native: set[str]) -> None:
    with OllamaServer(flags) as server:
        adapter = of(server)
        probe = await adapter.probe()
        counted = (await read(adapter, body("hi", MODEL))).usage.cached_tokens
    expected = ALWAYS | {name: "native" if name in native else "unsupported" for name in ("tools", "cached_tokens")}
    assert {str(name): str(how) for name, how in probe.capabilities.items()} == expected
    assert probe.can(Capability.CACHED_TOKENS) is (counted is not None)
    assert probe.advice == {}
    assert not isinstance(adapter, Observable | Tokenizing | Abortable)


@pytest.mark.parametrize(
    ("capabilities", "vision"), [(("completion",), False), (("completion", "vision"), True), (None, None)]
)
async def test_whether_it_sees(capabilities: tuple[str, ...] | None, vision: bool | None) -> None:
    with OllamaServer(OllamaFlags(capabilities=capabilities)) as server:
        assert (await of(server).probe()).vision is vision


async def test_what_it_is(server: OllamaServer) -> None:
    probe = await of(server).probe()
    assert probe.models == (MODEL, "other:7b", "stand-in")
    assert (probe.context_tokens, probe.kv_tokens, probe.slots) == (4096, None, None)
    assert (probe.version, probe.incarnation) == ("0.33.3", "")
    assert probe == await of(server).probe()


@pytest.mark.parametrize(
    ("flags", "context"),
    [
        (OllamaFlags(context_length=8192, parameters="num_ctx 1024"), 8192),  # as it was loaded
        (OllamaFlags(loaded=False, parameters='stop "x"\nnum_ctx                        1024'), 1024),
        (OllamaFlags(loaded=False), None),  # what it was trained for is not what it will be loaded with
    ],
)
async def test_the_context_is_the_one_it_runs_with(flags: OllamaFlags, context: int | None) -> None:
    with OllamaServer(flags) as server:
        assert (await of(server).probe()).context_tokens == context


async def test_the_probe_neither_loads_the_model_nor_keeps_it() -> None:
    with OllamaServer(OllamaFlags(loaded=False)) as server:
        await of(server).probe()
        assert server.loads == 0 and not server.loaded
        assert not server.asked("/v1/chat/completions") and not server.asked("/api/generate")


async def test_where_several_are_installed_and_none_is_named_nothing_is_said_of_the_first(
    server: OllamaServer,
) -> None:
    adapter = of(server, model=None)
    probe = await adapter.probe()
    assert (probe.context_tokens, probe.vision, probe.distinct) == (None, None, (MODEL, "other:7b"))
    assert probe.can(Capability.TOOLS) and not probe.can(Capability.SLEEP)
    assert "`model`" in probe.advice[Capability.KEEP]
    assert [await adapter.sleep(), await adapter.wake(), await adapter.linger(60.0)] == [Effect.UNSUPPORTED] * 2 + [
        None
    ]


@pytest.mark.parametrize("name", ["stand-in", MODEL])
async def test_the_model_is_known_by_its_short_name_too(server: OllamaServer, name: str | None) -> None:
    adapter = of(server, model=name)
    assert (await adapter.probe()).context_tokens == 4096
    assert await adapter.sleep() is Effect.FREED
    assert not server.loaded


# What requests are told


@pytest.mark.parametrize("bound", ["max_tokens", "max_completion_tokens"])
async def test_an_answer_is_bounded_by_either_name(adapter: OllamaAdapter, server: OllamaServer, bound: str) -> None:
    request = body("story", MODEL) | {"max_tokens": None, bound: 3}
    added = adapter.request_fields(chat.ask_of(request), Directions())
    assert added == {"max_tokens": 3}
    assert (await read(adapter, request | added)).usage.completion_tokens == 3


async def test_nothing_else_is_sent(adapter: OllamaAdapter) -> None:
    assert fields(adapter, call_id="c", workflow="w", priority=3, slot=1, fresh=True) == {}


# Orders


async def test_a_flush_of_all_unloads_the_model(adapter: OllamaAdapter, server: OllamaServer) -> None:
    await read(adapter, body(LONG, MODEL))
    assert (await read(adapter, body(LONG, MODEL))).usage.cached_tokens == 120
    assert await adapter.flush(WholeCache()) is Effect.FREED
    assert not server.loaded
    assert (await read(adapter, body(LONG, MODEL))).usage.cached_tokens == 0
    assert server.loads == 1


async def test_a_busy_model_leaves_when_it_is_done(adapter: OllamaAdapter, server: OllamaServer) -> None:
    async with running(adapter, body("story", MODEL, max_tokens=60), server) as task:
        assert await adapter.sleep() is Effect.DEFERRED
        assert server.loaded
        assert (await task).finish == "length"
    await until(lambda: not server.loaded)
    assert await adapter.sleep() is Effect.FREED


async def test_less_than_everything_is_not_flushed(adapter: OllamaAdapter, server: OllamaServer) -> None:
    for scope in (WorkflowCache("w"), PrefixCache(body("hi", MODEL))):
        for order in (adapter.pin, adapter.release, adapter.flush):
            assert await order(scope) is Effect.UNSUPPORTED
    assert server.loaded


# How long the model stays


def told(server: OllamaServer) -> list[int]:
    """Return every keep-alive that was told, in seconds."""
    orders = [seen.body for seen in server.asked("/api/generate")]
    assert not any("prompt" in order for order in orders)
    return [order["keep_alive"] for order in orders]


async def test_the_model_stays_while_somebody_is_expected(adapter: OllamaAdapter, server: OllamaServer) -> None:
    await read(adapter, body(LONG, MODEL))
    assert await adapter.linger(600.0) is Effect.PINNED
    assert told(server) == [750]  # a quarter more, so that the next call need not say it again
    await read(adapter, body(LONG, MODEL))  # which restarts the time, and cannot set it
    assert server.stay_s == 750


async def test_what_the_server_does_by_itself_is_not_told(adapter: OllamaAdapter, server: OllamaServer) -> None:
    for keep_s in (0.0, 5.0, 290.0):
        await read(adapter, body("hi", MODEL))
        assert await adapter.linger(keep_s) is None
    assert told(server) == []


async def test_it_is_told_rarely(adapter: OllamaAdapter, server: OllamaServer) -> None:
    for keep_s in (600.0, 620.0, 700.0, 10.0, 0.0, 640.0):
        await read(adapter, body("hi", MODEL))
        await adapter.linger(keep_s)
    assert told(server) == [750]


async def test_two_at_once_tell_what_both_need(adapter: OllamaAdapter, server: OllamaServer) -> None:
    async with asyncio.TaskGroup() as group:
        lingering = [group.create_task(adapter.linger(keep_s)) for keep_s in (400.0, 4000.0)]
    assert [task.result() for task in lingering] == [Effect.PINNED, None]
    assert server.stay_s == 5000


async def test_a_model_that_left_is_not_loaded_to_be_kept(adapter: OllamaAdapter, server: OllamaServer) -> None:
    await adapter.sleep()
    assert await adapter.linger(600.0) is None
    assert told(server) == [0] and server.loads == 0


@pytest.mark.parametrize("server", [OllamaFlags(keep_alive_s=-1.0)], indirect=True)
async def test_a_server_that_keeps_models_for_ever_is_not_told_less(
    adapter: OllamaAdapter, server: OllamaServer
) -> None:
    assert await adapter.linger(8 * 3600.0) is None
    assert told(server) == []


async def test_an_order_that_fails_is_told_as_failed(adapter: OllamaAdapter, server: OllamaServer) -> None:
    server.broken = "<html>busy</html>"
    assert await adapter.linger(600.0) is Effect.FAILED


class Hours:
    """A model's stay, and a clock to turn."""

    def __init__(self) -> None:
        self.stay, self.now = Stay(), 1000.0
        self.stay.saw(300.0)

    def after(self, passed_s: float, keep_s: float) -> int | None:
        self.now += passed_s
        self.stay.needed(keep_s, self.now)
        seconds = self.stay.to_tell(self.now)
        self.stay.told_s = self.stay.told_s if seconds is None else seconds
        return seconds


def test_a_long_stay_is_taken_back_when_nobody_is_expected_any_more() -> None:
    hours = Hours()
    assert hours.after(0.0, keep_s=7200.0) == 9000
    assert hours.after(2000.0, keep_s=30.0) is None, "the first workflow may still come"
    assert hours.after(5000.0, keep_s=30.0) == 300, "the server's own time again"
    assert hours.after(1.0, keep_s=30.0) is None


def test_a_model_loaded_anew_is_told_anew() -> None:
    hours = Hours()
    assert hours.after(0.0, keep_s=600.0) == 750
    assert hours.after(10.0, keep_s=600.0) is None
    hours.stay.saw(None)
    hours.stay.saw(300.0)
    assert hours.after(10.0, keep_s=600.0) == 750


def test_what_is_told_settles() -> None:
    """However long it is needed, what was told is right at the next look: there is no to and fro."""
    for usual_s in (0.0, 0.4, 299.6, 10.0**9):
        for needed_s in (0.0, 0.1, 59.0, 300.0, 86_400.0, float("inf")):
            stay = Stay()
            stay.saw(usual_s)
            stay.needed(needed_s, 5.0)
            stay.told_s = stay.to_tell(5.0)
            assert stay.to_tell(5.0) is None, (usual_s, needed_s)


async def test_waking_loads_and_leaves_the_time_to_the_server() -> None:
    with OllamaServer(OllamaFlags(loaded=False, keep_alive_s=0.3)) as server:
        adapter = of(server)
        await adapter.probe()
        assert await adapter.wake() is Effect.RESTORED
        assert server.loads == 1
        await until(lambda: not server.loaded)  # its own keep-alive, which we did not change
        assert (await adapter.probe()).context_tokens is None


async def test_a_model_that_left_again_at_once_is_not_told_as_loaded() -> None:
    with OllamaServer(OllamaFlags(loaded=False, keep_alive_s=0.0)) as server:
        adapter = of(server)
        assert await adapter.wake() is Effect.FAILED
        assert server.loads == 1


async def test_a_model_that_is_not_there_is_told(server: OllamaServer) -> None:
    adapter = of(server, model="nobody")
    probe = await adapter.probe()
    assert "nobody" not in probe.models
    assert (await adapter.wake(), await adapter.flush(WholeCache())) == (Effect.FAILED, Effect.FAILED)
    with pytest.raises(EngineRefused, match="not found") as refused:
        await read(adapter, body("hi", "nobody"))
    assert refused.value.status == 404


async def test_a_warm_up_loads_the_model_and_costs_one_token() -> None:
    with OllamaServer(OllamaFlags(loaded=False)) as server:
        adapter = of(server)
        warmed = await adapter.warm(body(LONG, MODEL, max_tokens=500))
        assert (warmed.effect, warmed.usage.completion_tokens, server.loads) == (Effect.WARMED, 1, 1)
        assert (await read(adapter, body(LONG, MODEL))).usage.cached_tokens == 120


async def test_a_closed_stream_ends_on_the_engine(adapter: OllamaAdapter, server: OllamaServer) -> None:
    stream = adapter.generate(body("story", MODEL, max_tokens=3000))
    await anext(stream)
    assert server.machine.running
    await stream.aclose()
    await until(lambda: not server.machine.running)


# What goes wrong


async def test_a_full_queue_is_refused_with_its_status(adapter: OllamaAdapter, server: OllamaServer) -> None:
    server.flags = replace(server.flags, max_queue=0)
    async with running(adapter, body("story", MODEL, max_tokens=3000), server):
        with pytest.raises(EngineRefused, match="server busy") as refused:
            await read(adapter, body("hi", MODEL))
    assert refused.value.status == 503


async def test_a_prompt_too_long_is_refused_or_cut_without_a_word(
    adapter: OllamaAdapter, server: OllamaServer
) -> None:
    with pytest.raises(EngineRefused, match="longer than the context"):
        await read(adapter, body("word " * 5000, MODEL))
    server.flags = replace(server.flags, context_shift=True)
    assert (await read(adapter, body("word " * 5000, MODEL))).usage.prompt_tokens < 4096


async def test_a_dead_engine_is_unavailable() -> None:
    adapter = OllamaAdapter(Backend("main", "http://127.0.0.1:9/v1", model=MODEL))
    with pytest.raises(BackendUnavailable, match="main"):
        await adapter.probe()
    assert {await adapter.sleep(), await adapter.wake(), await adapter.flush(WholeCache())} == {Effect.FAILED}


@pytest.mark.parametrize("nonsense", ["<html>busy</html>", "[]"])
async def test_garbage_is_unavailable_or_failed(adapter: OllamaAdapter, server: OllamaServer, nonsense: str) -> None:
    server.broken = nonsense
    for asking in (adapter.probe, lambda: read(adapter, body("hi", MODEL))):
        with pytest.raises(BackendUnavailable):
            await asking()
    assert {await adapter.sleep(), await adapter.wake()} == {Effect.FAILED}


async def test_odd_answers_beside_the_models_are_not_held_against_it(
    adapter: OllamaAdapter, server: OllamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {key: handler for key, handler in server.routes().items() if key[1].startswith("/v1")}
    monkeypatch.setattr(server, "routes", lambda: kept)
    probe = await adapter.probe()
    assert probe.capabilities[Capability.TOOLS] is Support.NATIVE
    assert (probe.context_tokens, probe.version) == (None, "")


# The stand-in, as its documents have it


async def test_the_stand_in_speaks_the_documented_wire(server: OllamaServer) -> None:
    url = f"{server.url}/chat/completions"
    whole = (await post(url, body("hi", MODEL))).json()
    assert (whole["object"], whole["system_fingerprint"]) == ("chat.completion", "fp_ollama")
    asked = body("hi", MODEL, stream=True, stream_options={"include_usage": True})
    stream = await post(url, asked)
    assert stream.headers["content-type"] == "text/event-stream"
    first, *_, finish, usage = events(stream.text)
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert finish["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length"}]
    assert usage["choices"] == [] and set(usage["usage"]) > {"prompt_tokens", "completion_tokens", "total_tokens"}
    ignored = await post(url, body("hi", MODEL, keep_alive=0, tool_choice="none", priority=1.5))
    assert ignored.status_code == 200 and server.loaded
    missing = await post(url, body("hi", "nobody"))
    error = {"message": "model 'nobody' not found", "type": "not_found_error", "param": None, "code": None}
    assert (missing.status_code, missing.json()) == (404, {"error": error})
    unknown = await post(f"{server.root}/tokenize", {})
    assert (unknown.status_code, unknown.text) == (404, "404 page not found")


async def test_one_request_runs_at_a_time_by_default(adapter: OllamaAdapter, server: OllamaServer) -> None:
    async with running(adapter, body("first", MODEL, max_tokens=3000), server):
        async with asyncio.TaskGroup() as group:
            second = group.create_task(read(adapter, body("second", MODEL)))
            await until(lambda: server.machine.waiting)
            assert server.machine.started[-1] == "first"
            second.cancel()
