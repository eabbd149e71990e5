"""What engines say of themselves, when it is garbage: a probe ends in a right ``Probe`` or in an error of ours."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orla_lg.core.boundary.bounded import OutOfBounds, parse_json
from orla_lg.core.engine.backend import Backend, Capability, Probe, Support
from orla_lg.core.engine.capabilities import Observable, Tokenizing
from orla_lg.errors import BackendUnavailable, EngineRefused
from orla_lg.openai_api import adapter as adapters
from orla_lg.openai_api.adapter import OpenAIAdapter
from orla_lg_llamacpp import LlamaCppAdapter
from orla_lg_ollama import OllamaAdapter
from orla_lg_sglang import SGLangAdapter
from orla_lg_vllm import VLLMAdapter

ADAPTERS = [OpenAIAdapter, LlamaCppAdapter, OllamaAdapter, SGLangAdapter, VLLMAdapter]
Answer = Callable[[httpx.Request], httpx.Response]

odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.sampled_from(["4096", "1e400", "", "m", "\0", "-1", "9" * 30]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "n_ctx", "id"]), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = (
    "data", "id", "max_model_len", "root", "parent", "total_slots", "default_generation_settings", "n_ctx",
    "modalities",
    "vision", "media_marker", "ui_settings", "model_path", "version", "capabilities", "parameters", "models", "name",
    "context_length", "expires_at", "max_total_num_tokens", "dp_size", "startup_time", "loads", "num_running_reqs",
    "token_usage", "has_image_understanding", "vllm_config", "scheduler_config", "model_config", "tokens", "prompt",
    "usage", "effect", "suspension", "allow_auto_truncate", "grammar_backend", "is_processing",
)  # fmt: skip
objects = st.dictionaries(st.sampled_from(FIELDS), odd, max_size=8)
nested = st.dictionaries(st.sampled_from(FIELDS), odd | objects | st.lists(objects, max_size=3), max_size=12)
metrics = st.lists(
    st.tuples(
        st.sampled_from(
            ["vllm:num_requests_running", "process_start_time_seconds", 'vllm:cache_config_info{block_size="x"}',
             "vllm:kv_cache_usage_perc", "sglang:prompt_tokens", "llamacpp:requests_deferred"]
        ),
        st.sampled_from(["1", "nan", "inf", "x", "-1", "1e400", "9" * 400]),
    ).map(" ".join),
    max_size=4,
).map("\n".join)  # fmt: skip
answers = st.tuples(
    st.sampled_from([200, 200, 200, 200, 400, 404, 500]), nested.map(json.dumps) | odd.map(json.dumps) | metrics
)


class Whole(httpx.AsyncByteStream):
    def __init__(self, data: bytes) -> None:
        self.data = data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.data


def at(kind: type[OpenAIAdapter], answer: Answer, monkeypatch: pytest.MonkeyPatch) -> OpenAIAdapter:
    """An adapter whose engine answers each request with what *answer* makes of it."""
    real = httpx.AsyncClient

    def streamed(request: httpx.Request) -> httpx.Response:  # as one comes from a network: not read yet
        made = answer(request)
        body = Whole(made.content) if made.is_stream_consumed else made.stream
        return httpx.Response(made.status_code, stream=body)

    def client(**settings: Any) -> httpx.AsyncClient:
        return real(**settings, transport=httpx.MockTransport(streamed))

    monkeypatch.setattr(adapters.httpx, "AsyncClient", client)
    return kind(Backend("main", "http://engine/v1"))


async def everything(adapter: OpenAIAdapter) -> list[Any]:
    """Ask all that an engine says of itself."""
    said: list[Any] = []
    asked = [adapter.probe]
    asked += [adapter.stats] if isinstance(adapter, Observable) else []
    asked += [lambda: adapter.tokenize({"messages": []})] if isinstance(adapter, Tokenizing) else []
    for ask in asked:
        try:
            said.append(await ask())
        except (BackendUnavailable, EngineRefused) as error:
            said.append(error)
    return said


@pytest.mark.parametrize("kind", ADAPTERS)
@settings(max_examples=25, deadline=None)
@given(st.lists(answers, min_size=3, max_size=8), st.booleans())
def test_garbage_is_an_error_of_ours_or_a_probe_of_the_right_types(
    kind: type[OpenAIAdapter], scripted: list[tuple[int, str]], listed: bool
) -> None:
    script = iter(scripted * 20)

    def answer(request: httpx.Request) -> httpx.Response:
        if listed and request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m", "max_model_len": "4096"}, None, 3, {"id": 5}]})
        status, text = next(script)
        return httpx.Response(status, text=text.encode("utf-8", "replace").decode())

    with pytest.MonkeyPatch.context() as patched:
        probe, *_ = asyncio.run(everything(at(kind, answer, patched)))
    if not isinstance(probe, Probe):
        return
    figures = (probe.context_tokens, probe.slots, probe.kv_tokens, probe.request_tokens)
    assert all(figure is None or (type(figure) is int and figure > 0) for figure in figures)
    assert all(type(name) is str for name in probe.models) and probe.vision in (None, True, False)
    assert all(isinstance(support, Support) for support in probe.capabilities.values())
    assert set(probe.capabilities) <= set(Capability) and type(probe.version) is str


HOSTILE = {
    "deep": b'{"data": ' + b"[" * 200_000,
    "a long number": b'{"data": ' + b"9" * 1_000_000 + b"}",
    "endless": b"x" * (adapters.MAX_BYTES + 1),
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_answer_out_of_bounds_is_an_engine_that_does_not_answer(
    kind: type[OpenAIAdapter], body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = at(kind, lambda request: httpx.Response(200, content=body), monkeypatch)
    started = time.process_time()
    assert all(isinstance(said, BackendUnavailable) for said in asyncio.run(everything(adapter))[:1])
    assert time.process_time() - started < 5


def test_an_answer_that_drips_is_bounded_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    class Drip(httpx.AsyncByteStream):
        async def __aiter__(self) -> Any:
            while True:
                await asyncio.sleep(0.02)
                yield b" "

    adapter = at(OpenAIAdapter, lambda request: httpx.Response(200, stream=Drip()), monkeypatch)
    started = time.perf_counter()
    with pytest.raises(BackendUnavailable, match=r"models was not answered within 0\.2 s"):
        asyncio.run(adapter.ask("GET", "models", timeout_s=0.2))
    assert time.perf_counter() - started < 30, "it drips for ever"


@pytest.mark.parametrize("data", [b"[" * 150 + b"]" * 150, b"9" * 500, b'{"a": -' + b"1" * 401 + b"}"])
def test_json_is_read_within_bounds(data: bytes) -> None:
    with pytest.raises(OutOfBounds):
        parse_json(data)


def test_what_is_within_bounds_is_read() -> None:
    assert parse_json(b'{"text": "' + b"9" * 5000 + b'", "n": 7}')["n"] == 7
    assert parse_json(b"[" * 99 + b"]" * 99) is not None and parse_json(b"9" * 400) == int("9" * 400)


def test_several_names_of_one_model_are_told_apart_from_several_models(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [
        {"id": "qwen", "root": "/models/qwen", "parent": None, "max_model_len": 4096},
        {"id": "gpt-4o", "root": "/models/qwen", "parent": None, "max_model_len": 4096},
        {"id": "lora", "root": "/models/lora", "parent": "qwen"},
    ]
    adapter = at(OpenAIAdapter, lambda request: httpx.Response(200, json={"data": listed}), monkeypatch)
    probe = asyncio.run(adapter.probe())
    assert probe.models == ("qwen", "gpt-4o", "lora") and probe.distinct == ("qwen", "lora")
    assert probe.context_tokens is None, "what the third holds is not known"
