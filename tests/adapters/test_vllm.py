"""The vLLM adapter against a stand-in; ``test_twins`` compares that with a real one."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from orla_lg import Backend, ChatOrla, Orla
from orla_lg.core.engine.backend import Capability, Effect, Support, with_fields
from orla_lg.core.engine.capabilities import PrefixCache, WholeCache, WorkflowCache
from orla_lg.errors import BackendUnavailable, EngineRefused
from orla_lg.wires import chat
from orla_lg_vllm import VLLMAdapter, door
from tests.wire.asking import LONG, body, fields, order_of, read, running, until
from tests.wire.machine import Machine
from tests.wire.vllm_server import MODEL, VLLMFlags, VLLMServer

PLAIN = VLLMFlags(
    dev_mode=False, policy="fcfs", prompt_tokens_details=False, tools=False, log_stats=False, sleep_mode=False
)
PLUGGED = VLLMFlags(plugin="works")
EVERYTHING = VLLMFlags(scale_out=True, sleep_mode=True)
ALWAYS = {
    "json_schema": "native", "stream_usage": "native", "warm": "emulated", "tokenize": "native",
    "pin": "plugin", "release": "plugin", "flush_workflow": "plugin", "flush_prefix": "unsupported",
    "save_restore": "unsupported", "keep": "unsupported", "isolate": "native",
}  # fmt: skip
BY_FLAG = ("tools", "cached_tokens", "priority", "flush_all", "stats", "abort", "sleep")


def of(server: VLLMServer, **settings: Any) -> VLLMAdapter:
    return VLLMAdapter(Backend("main", server.url, **{"model": MODEL, "engine": "vllm", **settings}))


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[VLLMServer]:
    with VLLMServer(getattr(request, "param", EVERYTHING)) as running:
        yield running


@pytest.fixture
async def adapter(server: VLLMServer) -> VLLMAdapter:
    made = of(server)
    await made.probe()
    return made


# Probing


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        (EVERYTHING, set(BY_FLAG)),
        (PLAIN, set()),
        (replace(PLAIN, dev_mode=True), {"flush_all", "abort"}),
        (replace(PLAIN, tools=True), {"tools"}),
        (replace(PLAIN, prompt_tokens_details=True), {"cached_tokens"}),
        (replace(PLAIN, prompt_tokens_details=True, always_details=False), {"cached_tokens"}),
        (replace(PLAIN, policy="priority"), set()),
        (replace(PLAIN, policy="priority", dev_mode=True), {"priority", "flush_all", "abort"}),
        (replace(PLAIN, log_stats=True), {"stats"}),
        (replace(PLAIN, scale_out=True), {"abort"}),
        (replace(PLAIN, scale_out=True, api_servers=2), set()),
        (replace(PLAIN, dev_mode=True, api_servers=2), {"flush_all"}),
        (replace(PLAIN, sleep_mode=True), set()),
        (replace(PLAIN, sleep_mode=True, dev_mode=True), {"flush_all", "abort", "sleep"}),
    ],
)
async def test_a_capability_is_native_with_its_flag_and_flag_without(flags: VLLMFlags, native: set[str]) -> None:
    with VLLMServer(flags) as server:
        probe = await of(server).probe()
    expected = ALWAYS | {name: "native" if name in native else "flag" for name in BY_FLAG}
    assert {str(name): str(how) for name, how in probe.capabilities.items()} == expected
    gainable = {name for name, how in probe.capabilities.items() if how in (Support.FLAG, Support.PLUGIN)}
    assert set(probe.advice) == gainable


async def test_advice_names_the_flag() -> None:
    with VLLMServer(PLAIN) as server:
        advice = (await of(server).probe()).advice
    for name, flag in {
        Capability.TOOLS: "--enable-auto-tool-choice --tool-call-parser",
        Capability.CACHED_TOKENS: "--enable-prompt-tokens-details",
        Capability.PRIORITY: "--scheduling-policy priority",
        Capability.FLUSH_ALL: "VLLM_SERVER_DEV_MODE=1",
        Capability.STATS: "--disable-log-stats",
        Capability.SLEEP: "--enable-sleep-mode",
        Capability.ABORT: "--enable-scale-out",
        Capability.PIN: "plugin",
    }.items():
        assert flag in advice[name]


async def test_several_api_processes_are_advised_to_be_one() -> None:
    with VLLMServer(replace(EVERYTHING, api_servers=3)) as server:
        assert "--api-server-count 1" in (await of(server).probe()).advice[Capability.ABORT]


async def test_a_cpu_build_cannot_sleep_at_all() -> None:
    with VLLMServer(replace(EVERYTHING, device="cpu", sleep_mode=False)) as server:
        probe = await of(server).probe()
    assert probe.capabilities[Capability.SLEEP] is Support.UNSUPPORTED
    assert Capability.SLEEP not in probe.advice


@pytest.mark.parametrize(
    ("flags", "vision"),
    [(EVERYTHING, False), (replace(EVERYTHING, vision=True), True), (replace(EVERYTHING, dev_mode=False), None)],
)
async def test_whether_it_sees_shows_in_dev_mode(flags: VLLMFlags, vision: bool | None) -> None:
    with VLLMServer(flags) as server:
        probe = await of(server).probe()
    assert (probe.vision, probe.request_tokens) == (vision, 4096)


async def test_what_it_is() -> None:
    with VLLMServer(EVERYTHING, Machine(block=32, blocks=100)) as server:
        probe = await of(server).probe()
        assert probe.models == (MODEL,)
        assert (probe.context_tokens, probe.kv_tokens, probe.slots) == (4096, 3200, None)
        assert probe.version == "0.32.0"
        assert probe == await of(server).probe()
        server.restart()
        assert (await of(server).probe()).incarnation != probe.incarnation != ""


async def test_several_engines_behind_one_url_add_up() -> None:
    with VLLMServer(replace(EVERYTHING, engines=2), Machine(block=16, blocks=10)) as server:
        adapter = of(server)
        assert (await adapter.probe()).kv_tokens == 320
        server.machine.queries = 8
        stats = await adapter.stats()
        assert (stats.prefix_queries, stats.kv_usage, stats.kv_tokens) == (8, 0.0, 320)


async def test_several_api_processes_are_told_apart_from_their_successors_in_dev_mode() -> None:
    with VLLMServer(replace(EVERYTHING, api_servers=2)) as server:
        before = (await of(server).probe()).incarnation
        server.restart()
        assert "" != before != (await of(server).probe()).incarnation


async def test_the_count_of_cached_tokens_is_tried_once_for_each_start(server: VLLMServer) -> None:
    adapter = of(server)
    await adapter.probe()

    def tries() -> int:
        return sum(seen.body.get("max_tokens") == 1 for seen in server.asked("/v1/chat/completions"))

    first = tries()
    await adapter.probe()
    assert tries() == first > 0
    server.restart()
    await adapter.probe()
    assert tries() == 2 * first


async def test_an_engine_too_busy_to_be_tried_is_tried_again(
    server: VLLMServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = of(server)
    with server.paused(), monkeypatch.context() as patched:
        patched.setattr(VLLMAdapter.post, "__kwdefaults__", {"timeout_s": 0.1})
        assert (await adapter.probe()).capabilities[Capability.CACHED_TOKENS] is Support.FLAG
    assert (await adapter.probe()).capabilities[Capability.CACHED_TOKENS] is Support.NATIVE


async def test_the_probe_generates_nothing_with_tools(server: VLLMServer) -> None:
    await of(server).probe()
    with_tools = [seen for seen in server.asked("/v1/chat/completions") if "tools" in seen.body]
    assert [seen.body["max_tokens"] for seen in with_tools] == [0]  # refused in any case
    assert "a" not in server.machine.started


# What requests are told


@pytest.mark.parametrize(
    ("told", "sent"),
    [(0, None), (1, -1), (-2, 2), (2.6, -3), (0.4, None), (1e300, -(2**63 - 1)), (-1e300, 2**63 - 1)],
)
async def test_priority_is_a_whole_number_and_lower_is_first(
    adapter: VLLMAdapter, server: VLLMServer, told: float, sent: int | None
) -> None:
    added = fields(adapter, priority=told)
    assert added.get("priority") == sent
    assert (await read(adapter, body("hi", MODEL) | added)).finish == "length"


async def test_the_more_urgent_call_runs_first(adapter: VLLMAdapter, server: VLLMServer) -> None:
    urgency = {"idle": -1.0, "usual": 0.0, "urgent": 5.0, "pressing": 2.0}
    requests = {name: body(name, MODEL) | fields(adapter, priority=how) for name, how in urgency.items()}
    assert await order_of(server, requests, adapter) == ["urgent", "pressing", "usual", "idle"]


@pytest.mark.parametrize(
    ("flags", "sent"),
    [
        (replace(EVERYTHING, policy="fcfs"), False),  # it shows that it would not heed it
        (replace(PLAIN, policy="fcfs"), True),  # it does not show, and ignores it
        (replace(PLAIN, policy="priority"), True),  # it does not show, and heeds it
        (replace(PLAIN, version="0.10.2", refuses_priority=True), False),
        (replace(PLAIN, version="unknown"), False),
    ],
)
async def test_priority_goes_only_where_it_is_not_refused(flags: VLLMFlags, sent: bool) -> None:
    with VLLMServer(flags) as server:
        adapter = of(server)
        assert fields(adapter, priority=3) == {}  # nothing is known before the probe
        await adapter.probe()
        added = fields(adapter, priority=3)
        assert ("priority" in added) is sent
        await read(adapter, body("hi", MODEL) | added)


async def test_a_call_is_named_only_where_it_can_be_ended_by_name(adapter: VLLMAdapter) -> None:
    assert fields(adapter, call_id="c1")["request_id"] == "c1"
    assert "request_id" not in fields(adapter)
    with VLLMServer(PLAIN) as other:
        unable = of(other)
        await unable.probe()
        assert fields(unable, call_id="c1") == {}
        assert await unable.abort("c1") is False


# Orders


async def test_a_flush_frees_all_when_idle_and_is_deferred_when_not(adapter: VLLMAdapter, server: VLLMServer) -> None:
    await read(adapter, body(LONG, MODEL))
    assert (await read(adapter, body(LONG, MODEL))).usage.cached_tokens == 112  # 7 of 8 blocks; the last token never
    async with running(adapter, body("story", MODEL, max_tokens=2000), server):
        assert await adapter.flush(WholeCache()) is Effect.DEFERRED
        assert (await read(adapter, body(LONG, MODEL))).usage.cached_tokens == 112
    await until(lambda: not server.machine.running)
    assert await adapter.flush(WholeCache()) is Effect.FREED
    assert (await read(adapter, body(LONG, MODEL))).usage.cached_tokens == 0


async def test_what_needs_a_plugin_is_told_as_unsupported_and_not_widened(adapter: VLLMAdapter) -> None:
    await read(adapter, body(LONG, MODEL))
    for scope in (WorkflowCache("w"), PrefixCache(body(LONG, MODEL))):
        for order in (adapter.pin, adapter.release, adapter.flush):
            assert await order(scope) is Effect.UNSUPPORTED
    assert (await read(adapter, body(LONG, MODEL))).usage.cached_tokens == 112


async def test_with_the_plugin_workflows_are_pinned_released_and_flushed() -> None:
    with VLLMServer(PLUGGED) as server:
        adapter = of(server)
        probe = await adapter.probe()
        assert all(probe.capabilities[each] is Support.NATIVE and each not in probe.advice for each in door.ORDERS)
        assert await adapter.pin(WorkflowCache("w"), ttl_s=30.0) is Effect.PINNED
        assert await adapter.pin(WorkflowCache("w")) is Effect.PINNED
        assert await adapter.release(WorkflowCache("w")) is Effect.DEMOTED
        assert await adapter.flush(WorkflowCache("w")) is Effect.FREED
        assert await adapter.flush(WorkflowCache("busy")) is Effect.DEFERRED
        assert await adapter.flush(PrefixCache(body(LONG, MODEL))) is Effect.UNSUPPORTED
        named = {"workflow": "w"}
        assert server.orders[1:-1] == [
            ("pin", named | {"ttl_s": 30.0}), ("pin", named), ("release", named), ("flush", named)
        ]  # fmt: skip
        server.broken = "boom"
        assert await adapter.pin(WorkflowCache("w")) is Effect.FAILED


async def test_a_plugin_that_steps_aside_says_why() -> None:
    with VLLMServer(replace(PLUGGED, plugin="vLLM 0.99 is not among the versions it was tested with")) as server:
        adapter = of(server)
        probe = await adapter.probe()
        assert probe.capabilities[Capability.PIN] is Support.PLUGIN
        assert "not among the versions" in probe.advice[Capability.PIN]
        assert "vllm_xargs" not in fields(adapter, workflow="w")
        assert await adapter.flush(WorkflowCache("w")) is Effect.UNSUPPORTED


# Labels


async def test_only_with_the_plugin_is_a_call_labelled(adapter: VLLMAdapter) -> None:
    assert "vllm_xargs" not in fields(adapter, workflow="w", stage="plan", keep_s=3.0)
    with VLLMServer(PLUGGED) as server:
        plugged = of(server)
        await plugged.probe()
        assert fields(plugged, workflow="w", stage="plan", keep_s=3.0)["vllm_xargs"] == {
            "orla_workflow": "w", "orla_stage": "plan", "orla_keep_s": 3.0, "orla_ends": [10], "orla_bands": [3],
        }  # fmt: skip
        assert "vllm_xargs" not in fields(plugged)


def test_segments_are_told_in_characters_the_tools_with_the_system_prompt() -> None:
    messages = [
        {"role": "system", "content": "x" * 93},
        {"role": "user", "content": "y" * 45},
        {"role": "assistant", "content": "z" * 40},
        {"role": "tool", "content": "t" * 95, "tool_call_id": "1"},
    ]
    assert door.segments(chat.ask_of({"messages": messages})) == ([100, 200, 300], [4, 3, 2])
    tools = [{"type": "function", "function": {"name": "f"}}]
    shift = len('[{"type": "function", "function": {"name": "f"}}]')
    ends, bands = door.segments(chat.ask_of({"messages": messages, "tools": tools}))
    assert (ends, bands) == ([100 + shift, 200 + shift, 300 + shift], [4, 3, 2])
    assert door.segments(chat.ask_of({"messages": []})) == ([], [])


async def test_a_callers_own_fields_are_merged_with_ours() -> None:
    with VLLMServer(PLUGGED) as server:
        plugged = of(server)
        await plugged.probe()
        theirs = {"model": MODEL, "messages": [], "vllm_xargs": {"theirs": 1, "orla_workflow": "x"}}
        merged = with_fields(theirs, fields(plugged, workflow="w"))
    assert merged["vllm_xargs"]["theirs"] == 1 and merged["vllm_xargs"]["orla_workflow"] == "w"
    assert theirs["vllm_xargs"] == {"theirs": 1, "orla_workflow": "x"}


def test_the_sdks_extra_body_keeps_its_entries_beside_ours() -> None:
    with VLLMServer(PLUGGED) as server, Orla(backends=[Backend("main", server.url, MODEL, engine="vllm")]) as orla:
        own = {"vllm_xargs": {"theirs": 1}, "min_p": 0.1}
        ChatOrla(orla=orla, model="main", extra_body=own).invoke("hello")
        sent = json.loads(server.asked("/v1/chat/completions")[-1].raw)
    assert sent["vllm_xargs"]["theirs"] == 1 and sent["vllm_xargs"]["orla_workflow"] and sent["min_p"] == 0.1


@pytest.mark.parametrize(
    ("salted", "version", "counts", "isolates"),
    [(True, "0.32.0", True, True), (False, "0.32.0", True, False), (True, "0.32.0", False, True),
     (True, "0.8.5", False, False)],
)  # fmt: skip
async def test_whether_salts_keep_tenants_apart_is_tried_and_not_believed(
    salted: bool, version: str, counts: bool, isolates: bool
) -> None:
    with VLLMServer(replace(EVERYTHING, version=version, prompt_tokens_details=counts)) as server:
        server.machine.salted = salted
        adapter = of(server, isolate_tenants=True)
        assert (await adapter.probe()).can(Capability.ISOLATE) is isolates
        asked = len(server.requests)
        await adapter.probe()
        salts = [seen for seen in server.requests[asked:] if b"cache_salt" in seen.raw]
        assert bool(salts) is not counts, "what was seen is not tried again before a restart"
        assert fields(adapter, cache_salt="s")["cache_salt"] == "s"
        assert "cache_salt" not in fields(adapter)


async def test_a_flush_without_dev_mode_is_unsupported() -> None:
    with VLLMServer(PLAIN) as server:
        assert await of(server).flush(WholeCache()) is Effect.UNSUPPORTED


async def test_an_older_flush_that_does_not_say_what_happened_failed(
    adapter: VLLMAdapter, server: VLLMServer
) -> None:
    server.broken = ""
    assert await adapter.flush(WholeCache()) is Effect.FAILED


async def test_a_warm_up_costs_one_token_and_helps(adapter: VLLMAdapter) -> None:
    warmed = await adapter.warm(body(LONG, MODEL, max_tokens=500, max_completion_tokens=500))
    assert warmed.effect is Effect.WARMED
    assert (warmed.usage.cached_tokens, warmed.usage.completion_tokens) == (0, 1)
    assert (await read(adapter, body(LONG, MODEL))).usage.cached_tokens == 112


@pytest.mark.parametrize("server", [EVERYTHING, replace(EVERYTHING, scale_out=False)], indirect=True)
async def test_an_aborted_call_ends_and_no_other(adapter: VLLMAdapter, server: VLLMServer) -> None:
    request = body("story", MODEL, max_tokens=3000)
    async with running(adapter, request | fields(adapter, call_id="other"), server) as other:
        async with running(adapter, request | fields(adapter, call_id="mine"), server) as mine:
            assert await adapter.abort("mine") is True
            assert (await mine).finish == "abort"
            assert await adapter.abort("nobody") is True
        assert await adapter.abort("") is False  # to vLLM's dev route, no ids mean everybody
        await asyncio.sleep(0.05)
        assert not other.done()


async def test_the_load_is_seen(adapter: VLLMAdapter, server: VLLMServer) -> None:
    server.machine.limit = 1
    before = await adapter.stats()
    async with running(adapter, body(LONG, MODEL, max_tokens=3000), server):
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(read(adapter, body("next", MODEL)))
            await until(lambda: server.machine.waiting)
            stats = await adapter.stats()
            waiting.cancel()
    assert (stats.running, stats.waiting, stats.preemptions) == (1, 1, 0)
    assert stats.kv_usage == pytest.approx(8 / 1024)
    assert (stats.prefix_queries or 0) - (before.prefix_queries or 0) == 121


async def test_a_closed_stream_ends_on_the_engine(adapter: VLLMAdapter, server: VLLMServer) -> None:
    stream = adapter.generate(body("story", MODEL, max_tokens=3000))
    await anext(stream)
    assert server.machine.running
    await stream.aclose()
    await until(lambda: not server.machine.running)


async def test_tokens_are_those_that_the_engine_counts(adapter: VLLMAdapter) -> None:
    request = body(LONG, MODEL, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    assert len(await adapter.tokenize(request)) == (await read(adapter, request)).usage.prompt_tokens
    with pytest.raises(EngineRefused, match="does not exist"):
        await adapter.tokenize(body("hi", "another"))


async def test_sleep_waits_for_running_requests_and_loses_the_cache(adapter: VLLMAdapter, server: VLLMServer) -> None:
    async with running(adapter, body(LONG, MODEL, max_tokens=40), server) as task:
        assert await adapter.sleep() is Effect.FREED
        assert (await task).finish == "length"
    assert server.asleep
    assert await adapter.wake() is Effect.RESTORED
    assert not server.asleep
    assert (await read(adapter, body(LONG, MODEL))).usage.cached_tokens == 0


async def test_sleep_is_not_ordered_where_it_is_not_allowed() -> None:
    with VLLMServer(VLLMFlags()) as server:
        adapter = of(server)
        await adapter.probe()
        assert (await adapter.sleep(), await adapter.wake()) == (Effect.UNSUPPORTED, Effect.UNSUPPORTED)
        assert not server.asked("/sleep") and not server.asked("/wake_up")


# What goes wrong


async def test_the_backends_key_opens_it_and_another_does_not() -> None:
    with VLLMServer(replace(EVERYTHING, api_key="secret")) as server:
        probe = await of(server, api_key="secret").probe()
        assert probe.can(Capability.CACHED_TOKENS) and probe.can(Capability.ABORT)
        with pytest.raises(BackendUnavailable, match=r"main.*401.*Unauthorized"):
            await of(server, api_key="wrong").probe()
        with pytest.raises(EngineRefused, match="401"):
            await read(of(server), body("hi", MODEL))


async def test_a_dead_engine_is_unavailable(server: VLLMServer) -> None:
    adapter = VLLMAdapter(Backend("main", "http://127.0.0.1:9/v1", model=MODEL))
    for asking in (adapter.probe, adapter.stats, lambda: adapter.tokenize(body("hi", MODEL))):
        with pytest.raises(BackendUnavailable, match="main"):
            await asking()
    assert await adapter.flush(WholeCache()) is Effect.FAILED
    assert await adapter.abort("c") is False


async def test_garbage_is_unavailable_or_unknown(adapter: VLLMAdapter, server: VLLMServer) -> None:
    server.broken = "<html>busy</html>"
    for asking in (
        adapter.probe,
        lambda: adapter.tokenize(body("hi", MODEL)),
        lambda: read(adapter, body("", MODEL)),
    ):
        with pytest.raises(BackendUnavailable):
            await asking()
    assert (await adapter.stats()).running is None
    assert await adapter.flush(WholeCache()) is Effect.FAILED
    assert (await adapter.warm(body("hi", MODEL))).effect is Effect.FAILED
    assert await adapter.wake() is Effect.FAILED
    server.broken = "[]"
    with pytest.raises(BackendUnavailable, match="expected an object"):
        await adapter.probe()


def test_the_package_pulls_nothing_in_before_the_adapter_is_asked_for() -> None:
    code = (
        "import sys, orla_lg_vllm; print([name for name in ('orla_lg', 'httpx', 'langgraph') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
