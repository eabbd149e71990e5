"""The simulated engine's server, over real HTTP."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI

from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.server import SimServer

FAST = EngineParameters(
    block_tokens=16, kv_blocks=256, context_tokens=2048, max_running=4, step_s=0.004, request_s=0.0, jitter=0.0
)
LONG_TEXT = "one two three four five six seven eight nine ten " * 12


@pytest.fixture(scope="module")
def server() -> Iterator[SimServer]:
    with SimServer(FAST, speed=2.0) as running:
        yield running


@pytest.fixture
def http(server: SimServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url.removesuffix("/v1"), timeout=10, verify=False) as client:
        client.post("/v1/sim/kv/flush", json={"all": True})
        yield client


def body(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "sim", "messages": [{"role": "user", "content": text}], "max_tokens": 8, **more}


def chat(http: httpx.Client, text: str = "hello", **more: Any) -> dict[str, Any]:
    response = http.post("/v1/chat/completions", json=body(text, **more))
    assert response.status_code == 200, response.text
    answered: dict[str, Any] = response.json()
    return answered


def metric(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"sim:{name} "))


def until(true: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.01)


def test_the_openai_sdk_gets_the_same_in_one_piece_and_in_a_stream(server: SimServer) -> None:
    sdk = OpenAI(base_url=server.url, api_key="none", max_retries=0)
    asked: Any = body("tell me")
    whole = sdk.chat.completions.create(**asked)
    options: Any = {"include_usage": True}
    chunks = list(sdk.chat.completions.create(**asked, stream=True, stream_options=options))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content != ""
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens <= 8
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason


def test_no_usage_in_a_stream_unless_asked_for(http: httpx.Client) -> None:
    text = http.post("/v1/chat/completions", json=body(stream=True)).text
    assert text.endswith("data: [DONE]\n\n") and '"usage"' not in text


def test_ignore_eos_gives_exactly_as_many_tokens_as_asked(http: httpx.Client) -> None:
    answered = chat(http, max_tokens=37, ignore_eos=True)
    assert answered["usage"]["completion_tokens"] == 37
    assert answered["choices"][0]["finish_reason"] == "length"


def test_a_second_turn_finds_the_first_with_its_answer(http: httpx.Client) -> None:
    first = chat(http, LONG_TEXT, max_tokens=40, ignore_eos=True)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    history = [
        {"role": "user", "content": LONG_TEXT},
        {"role": "assistant", "content": first["choices"][0]["message"]["content"]},
        {"role": "user", "content": "and then?"},
    ]
    second = chat(http, messages=history)["usage"]
    known = first["usage"]["total_tokens"] - 1  # the last token said was never computed
    assert second["prompt_tokens_details"]["cached_tokens"] == known // 16 * 16 > first["usage"]["prompt_tokens"]


def test_json_follows_its_schema(http: httpx.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}, "count": {"type": "integer", "minimum": 3}},
        "required": ["kind", "count"],
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answered = chat(http, response_format=form, max_tokens=100)
    assert json.loads(answered["choices"][0]["message"]["content"]) == {"kind": "a", "count": 3}
    assert answered["choices"][0]["finish_reason"] == "stop"
    assert chat(http, response_format=form, max_tokens=3)["choices"][0]["finish_reason"] == "length"


def test_a_required_tool_is_called_streamed_or_not(server: SimServer) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    sdk = OpenAI(base_url=server.url, api_key="none", max_retries=0)
    asked: Any = body(max_tokens=50, tools=tools, tool_choice="required")
    message = sdk.chat.completions.create(**asked).choices[0].message
    assert message.tool_calls and json.loads(message.tool_calls[0].function.arguments) == {"city": "text"}  # type: ignore[union-attr]
    arguments, name = "", ""
    for chunk in sdk.chat.completions.create(**asked, stream=True):
        for call in chunk.choices[0].delta.tool_calls or ():
            assert call.function is not None
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert (name, json.loads(arguments)) == ("weather", {"city": "text"})


@pytest.mark.parametrize(
    ("wrong", "status", "said"),
    [
        ({"messages": []}, 400, "at least one message"),
        ({"messages": "hello"}, 400, "at least one message"),
        ({"model": "other"}, 404, "does not exist"),
        ({"n": 2}, 400, "n must be 1"),
        ({"temperature": 9}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "at least 1"),
        ({"max_tokens": "many"}, 400, "whole number"),
        ({"max_tokens": 2048}, 400, "maximum context length is 2048"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "maximum context length"),
        ({"response_format": {"type": "yaml"}}, 400, "response_format"),
        ({"tool_choice": "required"}, 400, "needs tools"),
        ({"stream_options": {"include_usage": True}}, 400, "stream"),
        ({"priority": "high"}, 400, "priority"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_wrong_is_refused_in_openais_form(
    http: httpx.Client, wrong: dict[str, Any], status: int, said: str
) -> None:
    response = http.post("/v1/chat/completions", json={**body(), **wrong})
    assert response.status_code == status
    assert said in response.json()["error"]["message"]


def test_a_body_that_is_no_json_is_refused(http: httpx.Client) -> None:
    for content in (b"{", b"[]"):
        assert http.post("/v1/chat/completions", content=content).status_code == 400


def test_a_client_that_leaves_a_stream_frees_its_blocks(http: httpx.Client) -> None:
    asked = body(LONG_TEXT, max_tokens=1500, ignore_eos=True, stream=True)
    with http.stream("POST", "/v1/chat/completions", json=asked) as response:
        pieces = response.iter_bytes()
        next(pieces)
        assert metric(http, "num_requests_running") == 1
    until(lambda: metric(http, "num_requests_running") == 0 and metric(http, "kv_cache_usage_perc") == 0)


def test_a_client_that_leaves_without_an_answer_frees_its_blocks(http: httpx.Client, server: SimServer) -> None:
    payload = json.dumps(body(LONG_TEXT, max_tokens=1500, ignore_eos=True)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + payload)
        until(lambda: metric(http, "num_requests_running") == 1)
    until(lambda: metric(http, "num_requests_running") == 0)


def test_an_abort_by_name_ends_the_answer(http: httpx.Client) -> None:
    asked = body(max_tokens=1500, ignore_eos=True, stream=True, request_id="mine")
    with http.stream("POST", "/v1/chat/completions", json=asked) as response:
        lines = response.iter_lines()
        next(lines)
        assert http.post("/v1/abort", json={"request_ids": ["mine", "nobody's"]}).json() == {"aborted": ["mine"]}
        rest = "".join(lines)
    assert '"finish_reason": "abort"' in rest and rest.endswith("data: [DONE]")


def test_a_name_may_be_used_again(http: httpx.Client) -> None:
    for _ in range(2):
        chat(http, request_id="again")
    assert http.post("/v1/abort", json={"request_ids": ["again"]}).json() == {"aborted": []}


def test_urgent_calls_overtake(http: httpx.Client, server: SimServer) -> None:
    order: list[str] = []
    sdk = OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=30)
    from concurrent.futures import ThreadPoolExecutor

    def call(name: str, tokens: int, priority: int) -> None:
        more: Any = {"extra_body": {"ignore_eos": True, "priority": priority}}
        sdk.chat.completions.create(**(body(name) | {"max_tokens": tokens}), **more)
        order.append(name)

    with ThreadPoolExecutor(8) as pool:
        for number in range(FAST.max_running):  # of lengths so different that a place at a time becomes free
            pool.submit(call, f"busy {number}", 300 * (number + 1), 0)
        until(lambda: metric(http, "num_requests_running") == FAST.max_running)
        pool.submit(call, "patient", 60, 5)
        until(lambda: metric(http, "num_requests_waiting") == 1)
        pool.submit(call, "urgent", 60, -5)
        until(lambda: metric(http, "num_requests_waiting") == 2)
        until(lambda: metric(http, "num_requests_waiting") == 0)
    assert metric(http, "num_preemptions_total") == 0
    assert order.index("urgent") < order.index("patient")


def test_figures_count_what_the_cache_found(http: httpx.Client) -> None:
    before = metric(http, "prefix_cache_hits_total")
    found = [chat(http, LONG_TEXT)["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)]
    assert found[1] > 100 and metric(http, "prefix_cache_hits_total") - before == sum(found)


def cached(http: httpx.Client, text: str, workflow: str) -> int:
    usage = chat(http, text, workflow=workflow, max_tokens=1)["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def order(http: httpx.Client, what: str, **said: Any) -> dict[str, Any]:
    response = http.post(f"/v1/sim/kv/{what}", json=said)
    assert response.status_code == 200, response.text
    answered: dict[str, Any] = response.json()
    return answered


def test_a_workflow_is_flushed_and_nobody_else(http: httpx.Client) -> None:
    mine, other = "mine " + LONG_TEXT, "other " + LONG_TEXT
    cached(http, mine, "a"), cached(http, other, "b")
    assert order(http, "stat", workflow="a")["alone"] > 5
    assert order(http, "flush", workflow="a")["effect"] == "freed"
    assert order(http, "stat", workflow="a")["owned"] == 0
    assert cached(http, mine, "a") == 0 and cached(http, other, "b") > 100


def test_what_two_workflows_share_survives_the_flush_of_one(http: httpx.Client) -> None:
    cached(http, LONG_TEXT, "a"), cached(http, LONG_TEXT + "more of it", "b")
    order(http, "flush", workflow="a")
    assert cached(http, LONG_TEXT, "c") > 100


def test_a_prefix_is_pinned_found_and_flushed(http: httpx.Client) -> None:
    messages = body(LONG_TEXT)["messages"]
    assert order(http, "pin", messages=messages) == {"effect": "failed", "blocks": 0}
    cached(http, LONG_TEXT, "a")
    pinned = order(http, "pin", messages=messages, ttl_s=100)
    assert pinned["effect"] == "pinned" and pinned["blocks"] == order(http, "stat", messages=messages)["found"] > 5
    for number in range(12):  # more than the cache holds
        cached(http, f"{number} " + LONG_TEXT * 3, "b")
    assert order(http, "stat", messages=messages)["found"] == pinned["blocks"]
    assert order(http, "release", messages=messages)["effect"] == "demoted"
    assert order(http, "flush", messages=messages)["effect"] == "freed"
    assert order(http, "stat", messages=messages)["found"] == 0


def test_everything_is_flushed(http: httpx.Client) -> None:
    cached(http, LONG_TEXT, "a")
    order(http, "flush", all=True)
    assert http.get("/v1/sim/kv/stat").json()["known"] == 0
    assert http.post("/v1/sim/kv/flush", json={}).status_code == 400


def test_it_says_what_it_is(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert http.get("/version").json()["version"].startswith("sim-")
    assert http.get("/v1/models").json()["data"][0] | {"owned_by": ""} == {
        "id": "sim",
        "object": "model",
        "created": 0,
        "owned_by": "",
        "max_model_len": 2048,
    }
    told = http.post("/tokenize", json=body(LONG_TEXT)).json()
    assert told["count"] == len(told["tokens"]) == chat(http, LONG_TEXT)["usage"]["prompt_tokens"]


def test_only_this_machine_can_reach_it(server: SimServer) -> None:
    assert server._socket.getsockname()[0] == "127.0.0.1"
