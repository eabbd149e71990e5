"""The SGLang adapter against a stand-in; ``test_twins`` compares that with a real one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from orla_lg import Backend
from orla_lg.core.engine.backend import Capability, Effect, Support
from orla_lg.core.engine.capabilities import PrefixCache, WholeCache, WorkflowCache
from orla_lg.errors import BackendUnavailable, EngineRefused
from orla_lg_sglang import SGLangAdapter
from tests.wire.asking import LONG, body, fields, order_of, read, running, until
from tests.wire.machine import Machine
from tests.wire.sglang_server import MODEL, SGLangFlags, SGLangServer

PLAIN = SGLangFlags(
    priority=False, sessions=False, cache_report=False, tool_call_parser=None, grammar_backend="none", metrics=False
)
EVERYTHING = SGLangFlags(memory_saver=True, weights_backup=True)
ORDERED = replace(EVERYTHING, eviction="priority")
EVICTION_ONLY = replace(ORDERED, priority=False)
ALWAYS = {
    "stream_usage": "native", "warm": "native", "tokenize": "native", "stats": "native", "pin": "unsupported",
    "flush_workflow": "unsupported", "flush_prefix": "unsupported", "save_restore": "unsupported",
    "isolate": "native",
}  # fmt: skip
BY_FLAG = ("json_schema", "tools", "cached_tokens", "priority", "release", "keep", "flush_all", "abort", "sleep")


def of(server: SGLangServer, **settings: Any) -> SGLangAdapter:
    return SGLangAdapter(Backend("main", server.url, **{"model": MODEL, "engine": "sglang", **settings}))


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[SGLangServer]:
    with SGLangServer(getattr(request, "param", EVERYTHING)) as running:
        yield running


@pytest.fixture
async def adapter(server: SGLangServer) -> SGLangAdapter:
    made = of(server)
    await made.probe()
    return made


# Probing


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        (ORDERED, set(BY_FLAG)),
        (EVERYTHING, set(BY_FLAG) - {"keep"}),
        (PLAIN, {"flush_all", "abort"}),
        (replace(PLAIN, admin_key="admin"), set()),
        (replace(PLAIN, grammar_backend="xgrammar"), {"flush_all", "abort", "json_schema"}),
        (replace(PLAIN, tool_call_parser="qwen"), {"flush_all", "abort", "tools"}),
        (replace(PLAIN, cache_report=True), {"flush_all", "abort", "cached_tokens"}),
        (replace(PLAIN, priority=True), {"flush_all", "abort", "priority"}),
        (replace(PLAIN, sessions=True), {"flush_all", "abort", "release"}),
        (replace(PLAIN, eviction="priority"), {"flush_all", "abort", "keep"}),
        (replace(PLAIN, eviction="priority", abort_on_priority=True), {"flush_all", "abort"}),
        (replace(PLAIN, eviction="slru"), {"flush_all", "abort"}),
        (replace(PLAIN, memory_saver=True), {"flush_all", "abort", "sleep"}),
        (replace(PLAIN, memory_saver=True, admin_key="admin"), set()),
        (replace(ORDERED, old_paths=True), set(BY_FLAG)),
    ],
)
async def test_a_capability_is_native_with_its_flag_and_flag_without(flags: SGLangFlags, native: set[str]) -> None:
    with SGLangServer(flags) as server:
        probe = await of(server).probe()
    expected = ALWAYS | {name: "native" if name in native else "flag" for name in BY_FLAG}
    assert {str(name): str(how) for name, how in probe.capabilities.items()} == expected
    assert set(probe.advice) == {name for name, how in probe.capabilities.items() if how is Support.FLAG}


async def test_advice_names_the_flag() -> None:
    with SGLangServer(replace(PLAIN, admin_key="admin")) as server:
        advice = (await of(server).probe()).advice
    for name, flag in {
        Capability.JSON_SCHEMA: "--grammar-backend",
        Capability.TOOLS: "--tool-call-parser",
        Capability.CACHED_TOKENS: "--enable-cache-report",
        Capability.PRIORITY: "--enable-priority-scheduling",
        Capability.RELEASE: "--enable-session-radix-cache",
        Capability.KEEP: "--radix-eviction-policy priority",
        Capability.FLUSH_ALL: "--admin-api-key",
        Capability.ABORT: "--admin-api-key",
        Capability.SLEEP: "--enable-memory-saver",
    }.items():
        assert flag in advice[name]


@pytest.mark.parametrize(
    ("flags", "vision", "request_tokens"),
    [
        (EVERYTHING, False, 4096),
        (replace(EVERYTHING, vision=True, auto_truncate=True), True, None),
        (replace(EVERYTHING, old_paths=True), None, 4096),
    ],
)
async def test_what_it_sees_and_refuses(flags: SGLangFlags, vision: bool | None, request_tokens: int | None) -> None:
    with SGLangServer(flags) as server:
        probe = await of(server).probe()
    assert (probe.vision, probe.request_tokens) == (vision, request_tokens)


async def test_what_it_is() -> None:
    with SGLangServer(replace(EVERYTHING, dp_size=2), Machine(block=1, blocks=500)) as server:
        probe = await of(server).probe()
        assert probe.models == (MODEL,)
        assert (probe.context_tokens, probe.kv_tokens, probe.slots) == (4096, 1000, None)
        assert probe.version == "0.5.23"
        assert probe == await of(server).probe()
        assert (await of(server).stats()).kv_tokens == 1000
        server.restart()
        assert (await of(server).probe()).incarnation != probe.incarnation != ""


async def test_keys_that_the_engine_tells_are_not_kept() -> None:
    flags = replace(EVERYTHING, api_key="secret", admin_key="secret")
    with SGLangServer(flags) as server:
        adapter = of(server, api_key="secret")
        probe = await adapter.probe()
    assert "secret" not in repr(probe)
    assert "secret" not in repr({name: value for name, value in vars(adapter).items() if name != "backend"})


# What requests are told


@pytest.mark.parametrize(
    ("told", "sent"), [(0, 0), (1, 1), (-2, -2), (2.6, 3), (1e300, 2**63 - 1), (-1e300, 1 - 2**63)]
)
async def test_priority_is_a_whole_number_and_higher_is_first(adapter: SGLangAdapter, told: float, sent: int) -> None:
    added = fields(adapter, priority=told)
    assert added["priority"] == sent
    assert (await read(adapter, body("hi", MODEL) | added)).finish == "length"


@pytest.mark.parametrize("server", [EVERYTHING, replace(EVERYTHING, low_values_first=True)], indirect=True)
async def test_the_more_urgent_call_runs_first(adapter: SGLangAdapter, server: SGLangServer) -> None:
    urgency = {"idle": -1.0, "usual": 0.0, "urgent": 5.0, "pressing": 2.0}
    requests = {name: body(name, MODEL) | fields(adapter, priority=how) for name, how in urgency.items()}
    stranger = {"stranger": body("stranger", MODEL)}  # without a priority it is the last to run
    order = await order_of(server, stranger | requests, adapter)
    assert order == ["urgent", "pressing", "usual", "idle", "stranger"]


@pytest.mark.parametrize("flags", [PLAIN, replace(PLAIN, abort_on_priority=True)])
async def test_nothing_is_sent_that_is_not_heeded(flags: SGLangFlags) -> None:
    with SGLangServer(flags) as server:
        adapter = of(server)
        assert fields(adapter, priority=3, workflow="w", call_id="c") == {}  # nothing is known before the probe
        await adapter.probe()
        added = fields(adapter, priority=3, workflow="w", call_id="c")
        assert set(added) == {"rid"}
        await read(adapter, body("hi", MODEL) | added)


async def test_a_call_is_named_only_where_it_can_be_ended_by_name() -> None:
    with SGLangServer(replace(PLAIN, admin_key="admin")) as server:
        adapter = of(server)
        await adapter.probe()
        assert fields(adapter, call_id="c1") == {}
        assert await adapter.abort("c1") is False


async def test_a_workflow_is_a_session(adapter: SGLangAdapter, server: SGLangServer) -> None:
    await read(adapter, body("hi", MODEL) | fields(adapter, workflow="thread 1"))
    assert server.machine.sessions == {"main/thread 1"}
    assert "session_id" not in fields(adapter)


async def test_a_call_of_no_workflow_opens_no_session_that_nobody_would_close(adapter: SGLangAdapter) -> None:
    assert "session_id" not in fields(adapter, workflow="call 7", keep_s=0.0)


async def test_two_backends_at_one_server_do_not_close_each_other_s_sessions(server: SGLangServer) -> None:
    one, other = (SGLangAdapter(Backend(name, server.url, MODEL, "sglang")) for name in ("one", "other"))
    for adapter in (one, other):
        await adapter.probe()
        await read(adapter, body("hi", MODEL) | fields(adapter, workflow="thread"))
    assert await one.release(WorkflowCache("thread")) is Effect.DEMOTED
    assert server.machine.sessions == {"other/thread"}


async def test_closing_closes_the_sessions_that_are_open(adapter: SGLangAdapter, server: SGLangServer) -> None:
    for workflow in ("ended", "running"):
        await read(adapter, body("hi", MODEL) | fields(adapter, workflow=workflow))
    await adapter.release(WorkflowCache("ended"))
    await adapter.aclose()
    assert not server.machine.sessions
    assert len(server.asked("/close_session")) == 2, "what was closed is not closed again"


# What a cache is worth


@pytest.mark.parametrize(
    ("told", "sent"),
    [
        ({}, 0), ({"keep_s": 30.0}, 1), ({"keep_s": 0.0}, -1),
        ({"priority": 2.0}, 6), ({"priority": 2.0, "keep_s": 30.0}, 7),
        ({"priority": -1.0, "keep_s": 0.0}, -4), ({"priority": 1e300, "keep_s": 1.0}, 2**63 - 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("server", [ORDERED], indirect=True)
async def test_one_number_says_urgency_first_and_worth_within_it(
    adapter: SGLangAdapter, told: dict[str, Any], sent: int
) -> None:
    added = fields(adapter, **told)
    assert added["priority"] == sent
    assert (await read(adapter, body("hi", MODEL) | added)).finish == "length"


@pytest.mark.parametrize("server", [ORDERED], indirect=True)
async def test_no_worth_overtakes_an_urgency(adapter: SGLangAdapter, server: SGLangServer) -> None:
    told = {
        "urgent": {"priority": 1.0, "keep_s": 0.0}, "wanted": {"keep_s": 60.0}, "usual": {},
        "single": {"keep_s": 0.0},
    }  # fmt: skip
    requests = {name: body(name, MODEL) | fields(adapter, **how) for name, how in reversed(told.items())}
    assert await order_of(server, requests, adapter) == list(told)


@pytest.mark.parametrize("server", [EVICTION_ONLY], indirect=True)
async def test_without_priority_scheduling_the_number_is_the_worth_alone(adapter: SGLangAdapter) -> None:
    assert fields(adapter, priority=5.0, keep_s=30.0)["priority"] == 1
    assert fields(adapter, priority=5.0)["priority"] == 0


@pytest.mark.parametrize("flags", [ORDERED, EVICTION_ONLY, EVERYTHING])
async def test_what_is_expected_back_outlives_what_is_not(flags: SGLangFlags) -> None:
    with SGLangServer(replace(flags, sessions=False), Machine(block=1, blocks=700)) as server:
        adapter = of(server)
        await adapter.probe()
        await read(adapter, body("mine " + LONG, MODEL) | fields(adapter, workflow="mine", keep_s=60.0))
        for number in range(8):
            await read(adapter, body(f"{number} " + LONG, MODEL) | fields(adapter, keep_s=0.0))
        cached = (await read(adapter, body("mine " + LONG, MODEL))).usage.cached_tokens or 0
    assert (cached > 100) is (flags.eviction == "priority")


# Orders


@pytest.mark.parametrize("released", [True, False])
async def test_a_released_workflow_is_found_until_it_is_the_first_to_go(released: bool) -> None:
    with SGLangServer(EVERYTHING, Machine(block=1, blocks=700)) as server:
        adapter = of(server)
        await adapter.probe()
        mine = body("mine " + LONG, MODEL) | fields(adapter, workflow="mine")
        await read(adapter, mine)
        if released:
            assert await adapter.release(WorkflowCache("mine")) is Effect.DEMOTED
        assert ((await read(adapter, body("mine " + LONG, MODEL))).usage.cached_tokens or 0) > 100
        for number in range(6):  # requests of nobody: they fill the cache more than once
            await read(adapter, body(f"{number} " + LONG, MODEL))
        cached = (await read(adapter, body("mine " + LONG, MODEL))).usage.cached_tokens or 0
    assert (cached < 10) is released


async def test_a_flush_frees_all_when_idle_and_is_deferred_when_not(
    adapter: SGLangAdapter, server: SGLangServer
) -> None:
    await read(adapter, body(LONG, MODEL))
    async with running(adapter, body("story", MODEL, max_tokens=2000), server):
        assert await adapter.flush(WholeCache()) is Effect.DEFERRED
        assert (await read(adapter, body(LONG, MODEL))).usage.cached_tokens == 120  # all but the last token
    await until(lambda: not server.machine.running)
    assert await adapter.flush(WholeCache()) is Effect.FREED
    assert (await read(adapter, body(LONG, MODEL))).usage.cached_tokens == 0


async def test_what_it_cannot_is_told_as_unsupported_and_not_widened(adapter: SGLangAdapter) -> None:
    await read(adapter, body(LONG, MODEL) | fields(adapter, workflow="w"))
    prefix = PrefixCache(body(LONG, MODEL))
    assert {await adapter.flush(WorkflowCache("w")), await adapter.flush(prefix)} == {Effect.UNSUPPORTED}
    assert {await adapter.release(prefix), await adapter.release(WholeCache())} == {Effect.UNSUPPORTED}
    assert await adapter.pin(WorkflowCache("w")) is Effect.UNSUPPORTED
    assert (await read(adapter, body(LONG, MODEL))).usage.cached_tokens == 120


async def test_without_the_flag_a_release_is_not_sent_for_it_would_be_answered_all_the_same() -> None:
    with SGLangServer(PLAIN) as server:
        adapter = of(server)
        await adapter.probe()
        assert await adapter.release(WorkflowCache("w")) is Effect.UNSUPPORTED
        assert not server.asked("/close_session")


async def test_a_warm_up_generates_nothing_and_helps(adapter: SGLangAdapter) -> None:
    warmed = await adapter.warm(body(LONG, MODEL, max_tokens=500, max_completion_tokens=500))
    assert warmed.effect is Effect.WARMED
    assert (warmed.usage.cached_tokens, warmed.usage.completion_tokens) == (0, 0)
    assert (await read(adapter, body(LONG, MODEL))).usage.cached_tokens == 120


async def test_an_aborted_call_ends_and_none_whose_id_begins_like_it(
    adapter: SGLangAdapter, server: SGLangServer
) -> None:
    request = body("story", MODEL, max_tokens=3000)
    async with running(adapter, request | fields(adapter, call_id="call-10"), server) as other:
        async with running(adapter, request | fields(adapter, call_id="call-1"), server) as mine:
            assert await adapter.abort("call-1") is True
            assert (await mine).finish == "abort"
        assert await adapter.abort("") is False
        await asyncio.sleep(0.05)
        assert not other.done()


async def test_the_load_is_seen(adapter: SGLangAdapter, server: SGLangServer) -> None:
    server.machine.limit = 1
    before = await adapter.stats()
    async with running(adapter, body(LONG, MODEL, max_tokens=3000), server):
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(read(adapter, body("next", MODEL)))
            await until(lambda: server.machine.waiting)
            stats = await adapter.stats()
            waiting.cancel()
    assert (stats.running, stats.waiting) == (1, 1)
    assert stats.kv_usage == pytest.approx(121 / 16384)
    assert (stats.prefix_queries or 0) - (before.prefix_queries or 0) == 121
    server.flags = replace(server.flags, metrics=False)
    assert (await adapter.stats()).prefix_queries is None


async def test_a_closed_stream_ends_on_the_engine(adapter: SGLangAdapter, server: SGLangServer) -> None:
    stream = adapter.generate(body("story", MODEL, max_tokens=3000))
    await anext(stream)
    assert server.machine.running
    await stream.aclose()
    await until(lambda: not server.machine.running)


async def test_tokens_are_those_that_the_engine_counts(adapter: SGLangAdapter) -> None:
    request = body(LONG, MODEL, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    assert len(await adapter.tokenize(request)) == (await read(adapter, request)).usage.prompt_tokens


@pytest.mark.parametrize("backup", [True, False])
async def test_sleep_kills_neither_the_engine_nor_its_requests(backup: bool) -> None:
    with SGLangServer(replace(EVERYTHING, weights_backup=backup)) as server:
        adapter = of(server)
        await adapter.probe()
        await read(adapter, body(LONG, MODEL))
        async with running(adapter, body("story", MODEL, max_tokens=60), server) as task:
            assert await adapter.sleep() is Effect.FREED
            # Weights that were not copied would be garbage after.
            assert server.released == (["kv_cache", "weights"] if backup else ["kv_cache"])
            assert not server.died
            assert await adapter.wake() is Effect.RESTORED
            assert (await task).finish == "length"
        assert server.released == []
        assert (await read(adapter, body(LONG, MODEL))).usage.cached_tokens == 0


async def test_a_sleep_that_fails_leaves_it_running(
    adapter: SGLangAdapter, server: SGLangServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    routes = server.routes()

    def without_release() -> Any:
        return {key: handler for key, handler in routes.items() if "release" not in key[1]}

    monkeypatch.setattr(server, "routes", without_release)
    assert await adapter.sleep() is Effect.FAILED
    assert (await read(adapter, body("hi", MODEL))).finish == "length"


async def test_sleep_is_not_ordered_where_it_would_do_nothing() -> None:
    with SGLangServer(SGLangFlags()) as server:
        adapter = of(server)
        await adapter.probe()
        assert (await adapter.sleep(), await adapter.wake()) == (Effect.UNSUPPORTED, Effect.UNSUPPORTED)
        assert not server.asked("/pause_generation") and not server.asked("/release_memory_occupation")


# What goes wrong


async def test_keys_open_what_they_should() -> None:
    with SGLangServer(replace(EVERYTHING, api_key="secret", admin_key="admin")) as server:
        adapter = of(server, api_key="secret")
        probe = await adapter.probe()
        assert probe.can(Capability.PRIORITY) and not probe.can(Capability.FLUSH_ALL)
        assert await adapter.flush(WholeCache()) is Effect.UNSUPPORTED
        with pytest.raises(BackendUnavailable, match=r"main.*401.*Unauthorized"):
            await of(server, api_key="wrong").probe()
        both = of(server, api_key="secret", admin_key="admin")
        assert (await both.probe()).can(Capability.FLUSH_ALL)
        await read(both, body("hi", MODEL) | fields(both, workflow="w", call_id="c"))
        assert await both.flush(WholeCache()) is Effect.FREED
        assert await both.release(WorkflowCache("w")) is Effect.DEMOTED
        assert {seen.key for seen in server.asked("/v1/chat/completions")} == {"secret"}
        assert "admin" not in repr(both.backend)
    with SGLangServer(replace(EVERYTHING, admin_key="admin")) as server:
        assert (await of(server, api_key="admin").probe()).can(Capability.FLUSH_ALL)
        assert (await of(server, admin_key="admin").probe()).can(Capability.FLUSH_ALL)


async def test_refusals_keep_their_status(adapter: SGLangAdapter, server: SGLangServer) -> None:
    with pytest.raises(EngineRefused, match="longer than the model's context") as refused:
        await read(adapter, body("word " * 5000, MODEL))
    assert refused.value.status == 400


async def test_a_dead_engine_is_unavailable() -> None:
    adapter = SGLangAdapter(Backend("main", "http://127.0.0.1:9/v1", model=MODEL))
    for asking in (adapter.probe, adapter.stats, lambda: adapter.tokenize(body("hi", MODEL))):
        with pytest.raises(BackendUnavailable, match="main"):
            await asking()
    assert await adapter.flush(WholeCache()) is Effect.FAILED
    assert await adapter.abort("c") is False


@pytest.mark.parametrize("nonsense", ["<html>busy</html>", "[]", '{"loads": 3, "tokens": "none"}'])
async def test_garbage_is_unavailable_or_unknown(adapter: SGLangAdapter, server: SGLangServer, nonsense: str) -> None:
    server.broken = nonsense
    for asking in (
        adapter.stats,
        lambda: adapter.tokenize(body("hi", MODEL)),
        lambda: read(adapter, body("", MODEL)),
    ):
        with pytest.raises(BackendUnavailable):
            await asking()
    assert (await adapter.warm(body("hi", MODEL))).effect is Effect.FAILED


async def test_an_engine_that_shows_no_flags_is_asked_for_nothing_special() -> None:
    with SGLangServer(EVERYTHING) as server:
        routes = server.routes()
        server.routes = lambda: {key: each for key, each in routes.items() if "info" not in key[1]}  # type: ignore[method-assign]
        probe = await of(server).probe()
    assert not probe.can(Capability.PRIORITY) and probe.can(Capability.STATS)
    assert (probe.kv_tokens, probe.version, probe.incarnation) == (None, "", "")


@pytest.mark.parametrize("salted", [True, False])
async def test_whether_salts_keep_tenants_apart_is_tried_and_not_believed(salted: bool) -> None:
    with SGLangServer() as server:
        server.machine.salted = salted
        adapter = of(server, isolate_tenants=True)
        assert (await adapter.probe()).can(Capability.ISOLATE) is salted
        assert fields(adapter, cache_salt="s")["cache_salt"] == "s"
        assert "cache_salt" not in fields(adapter)
