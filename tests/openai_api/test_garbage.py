"""Answers that are no answers: each form of a call gives what it gives without us, or a named error, and ends."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gzip
import itertools
import json
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_openai import ChatOpenAI

from orla_lg import Backend, ChatOrla, Orla, OrlaError
from orla_lg.core.call import Usage
from orla_lg.core.engine.registry import adapter_of
from orla_lg.core.engine.retry import RetryPolicy
from orla_lg.openai_api.adapter import Answer as ShortAnswer
from orla_lg.openai_api.adapter import OpenAIAdapter, chunk_of
from orla_lg.wires import chat, reading, tap
from tests.conftest import assert_nothing_left
from tests.openai_api.raw_engine import EVENTS, MODEL, USAGE, Answer, Asked, RawEngine, events, stream_of, whole
from tests.test_failures import FORMS, say

DEEP = b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"}"
ODD: list[Any] = [
    None,
    "x",
    "3",
    -1,
    True,
    1.5,
    float("nan"),
    float("inf"),
    10**400,
    [],
    {},
    [3],
    {"a": None},
    "\ud800",
]

SCALARS = st.sampled_from(ODD)
NAMES = st.sampled_from(["role", "content", "tool_calls", "function", "name", "arguments", "index", "id"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6
)
COUNTS = st.dictionaries(
    st.sampled_from(["prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"]),
    SCALARS | st.fixed_dictionaries({"cached_tokens": SCALARS}),
)
CHOICE = st.fixed_dictionaries(
    {"index": SCALARS, "finish_reason": SCALARS}, optional={"delta": VALUES, "message": VALUES, "logprobs": SCALARS}
)
TOPS = st.fixed_dictionaries(
    {}, optional={"choices": st.lists(CHOICE | SCALARS, max_size=2) | SCALARS, "usage": COUNTS | SCALARS,
                  "error": SCALARS, "model": SCALARS, "timings": SCALARS, "id": SCALARS}
)  # fmt: skip
ROUGH = st.sampled_from(
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"a": "\xff"}',
        b"[" * 3000,
        DEEP,
        b'{"a": ' + b"9" * 5000 + b"}",
        b"nul",
    ]
)
GOOD = st.fixed_dictionaries(
    {"choices": st.lists(st.fixed_dictionaries({"index": SCALARS, "delta": st.just({"content": "hi"})}), min_size=1)},
    optional={"usage": COUNTS | SCALARS, "timings": SCALARS, "model": SCALARS},
)
CHUNKS = st.lists(TOPS | ROUGH | GOOD, min_size=1, max_size=3)


@functools.cache
def shared() -> tuple[RawEngine, Orla, dict[str, Answer]]:
    """Return an engine for all examples, what serves it, and where its next answers are put."""
    given: dict[str, Answer] = {}
    engine = RawEngine(lambda asked: given["stream" if asked.body.get("stream") else "plain"]).__enter__()
    orla = Orla([Backend("main", engine.url, model=MODEL)], mapper={"*": "main"})
    orla.core.serving.services.retries = RetryPolicy(base_s=0.0)
    return engine, orla, given


@functools.cache
def models() -> tuple[ChatOpenAI, ChatOrla]:
    """Return the model without us and with us."""
    engine, orla, _ = shared()
    bare = ChatOpenAI(base_url=engine.url, api_key="k", model=MODEL, max_retries=0, stream_usage=True)  # type: ignore[arg-type]
    return bare, ChatOrla(orla=orla, model="main", max_retries=0)


@pytest.fixture(scope="module", autouse=True)
def _shared() -> Any:
    yield
    engine, orla, _ = shared()
    orla.close()
    engine.__exit__()


def outcome(call: Callable[[], Any]) -> tuple[Any, str]:
    try:
        return call(), ""
    except Exception as error:  # whatever it is, it is compared
        return type(error), repr(error)


def bytes_of(chunk: Any) -> bytes:
    return chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode()


NAMED = (OrlaError, openai.OpenAIError)


def judge(form: str, plain: Answer, stream: Answer) -> None:
    _, orla, now = shared()
    now |= {"plain": plain, "stream": stream}
    orla.core.serving.schedulers["main"].health.breaker.failures = 0
    orla.core.serving.schedulers["main"].health.breaker.opened_s = None
    bare, ours = models()
    expected, _ = outcome(lambda: say(bare, form))
    got, told = outcome(lambda: say(ours, form))
    assert got == expected or (isinstance(got, type) and issubclass(got, (*NAMED, json.JSONDecodeError))) or (
        form.endswith("invoke") and not isinstance(got, type)
    ), f"{form}: bare {expected!r}, ours {got!r} {told}"  # fmt: skip
    assert_nothing_left(orla)


FUZZ = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize("form", ["invoke", "stream"])
@FUZZ
@given(chunks=CHUNKS)
def test_fuzzed_streams(form: str, chunks: list[Any]) -> None:
    judge(form, whole(), stream_of([bytes_of(chunk) for chunk in chunks]))


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@FUZZ
@given(top=TOPS | ROUGH)
def test_fuzzed_answers_in_one_piece(top: Any) -> None:
    answer = Answer(bytes_of(top))
    judge("invoke", answer, answer)


@given(counts=COUNTS | SCALARS, timings=SCALARS | st.fixed_dictionaries({"prompt_ms": SCALARS}))
def test_counts_are_counts(counts: Any, timings: Any) -> None:
    usage = chat.usage_of(counts, timings)
    for value in (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens or 0):
        assert type(value) is int and 0 <= value <= reading.MAX_COUNT
    assert usage.prefill_s is None or 0 < usage.prefill_s < reading.MAX_COUNT
    found = chat.usage_in(json.dumps({"usage": counts, "timings": timings}).encode())
    assert found is None or isinstance(found, Usage)


@pytest.mark.parametrize("deep", [b'{"usage": ' + DEEP, b'{"usage": {"a": ' + b"9" * 5000 + b"}}", DEEP])
def test_usage_that_python_does_not_read(deep: bytes) -> None:
    assert chat.usage_in(deep) is None


@given(parsed=TOPS)
def test_raw_chunks_have_types(parsed: Any) -> None:
    chunk = chunk_of(parsed)
    assert isinstance(chunk.text, str) and isinstance(chunk.finish_reason, str | None)


@given(
    body=TOPS
    | SCALARS
    | st.dictionaries(st.sampled_from(["max_tokens", "messages", "tools", "response_format"]), VALUES)
)
def test_what_a_caller_asks_for_has_types(body: Any) -> None:
    ask = chat.ask_of(body)
    assert isinstance(ask.messages, list | tuple) and ask.prompt_chars >= 0
    assert ask.max_tokens is None or ask.max_tokens > 0


@pytest.mark.parametrize(
    "listed", [b'{"data": 3}', b'{"data": [3, {"id": null}, {"id": "m", "max_model_len": "many"}]}']
)
def test_probes_of_garbage(listed: bytes) -> None:
    adapter = OpenAIAdapter(Backend("main", "http://h/v1"))

    async def get(path: str) -> Any:
        return json.loads(listed)

    adapter.get = get  # type: ignore[method-assign]
    probe = asyncio.run(adapter.probe())
    assert probe.context_tokens is None and probe.models in ((), ("m",))


# What answers in dialects must still be an answer


def packed(answer: Answer, how: str) -> Answer:
    body = gzip.compress(answer.body) if how == "gzip" else zlib.compress(answer.body)
    return Answer(body, answer.kind, headers={"content-encoding": how})


@pytest.mark.parametrize(("how", "form"), [("deflate", "invoke"), *(("gzip", form) for form in FORMS)])
def test_a_server_that_packs_what_was_not_to_be_packed(how: str, form: str, make_orla: Any) -> None:
    def rule(asked: Asked) -> Answer:
        streams = bool(asked.body.get("stream"))
        return packed(events([{"content": "hi"}], usage=USAGE) if streams else whole(), how)

    with RawEngine(rule) as engine:
        orla = make_orla(Backend("main", engine.url, model=MODEL))
        assert say(ChatOrla(orla=orla, model="main"), form) == "hi"
        assert orla.records()[-1].completion_tokens == 2


STREAMS: dict[str, bytes] = {
    "a byte order mark": b"\xef\xbb\xbf: hello\n\n" + events([{"content": "hi"}]).body,
    "mixed line ends": events([{"content": "hi"}]).body.replace(b"\n\n", b"\n\r\n"),
    "many pings": b": ping\n\n" * 5000 + events([{"content": "hi"}]).body,
    "a long first event": stream_of([{"choices": [], "x": "x" * 100_000}]).body.replace(b"data: [DONE]\n\n", b"")
    + events([{"content": "hi"}]).body,
    "no blank at the end": events([{"content": "hi"}]).body.rstrip(),
    "in one piece": whole({"role": "assistant", "content": "hi"}).body,
}


@pytest.mark.parametrize("form", ["invoke", "stream"])
@pytest.mark.parametrize("dialect", STREAMS)
def test_a_dialect_of_streams(dialect: str, form: str, make_orla: Any) -> None:
    if dialect == "in one piece" and form.endswith("stream"):
        pytest.skip("no stream for the SDK either")
    with RawEngine(lambda asked: Answer(STREAMS[dialect], EVENTS)) as engine:
        orla = make_orla(Backend("main", engine.url, model=MODEL))
        assert say(ChatOrla(orla=orla, model="main", max_retries=0), form) == "hi"


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-16"])
@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
def test_json_in_other_codings(coding: str, kind: str) -> None:
    reading.heed_shape('{"a": 1}'.encode(coding), kind)


def test_a_cut_stream_is_no_whole_answer(make_orla: Any) -> None:
    cut = Answer(events([{"content": "hi"}], done=False).body.split(b"\n\n")[0] + b"\n\n", EVENTS)
    replies = [cut, events([{"content": "hi there"}], usage=USAGE)]
    with RawEngine(lambda asked: replies.pop(0)) as engine:
        orla = make_orla(Backend("main", engine.url, model=MODEL))
        orla.core.serving.services.retries = RetryPolicy(base_s=0.0)
        assert ChatOrla(orla=orla, model="main").invoke("x").content == "hi there"
        assert orla.records()[-1].attempts == 2 and orla.records()[-1].ttft_s > 0


# What a peer's bytes may size


@pytest.mark.parametrize("form", ["invoke", "stream"])
def test_an_event_that_never_ends(form: str, make_orla: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_EVENT_BYTES", 10_000)
    with RawEngine(lambda asked: Answer(b'data: {"x": "' + b"x" * 200_000, EVENTS)) as engine:
        orla = make_orla(Backend("main", engine.url, model=MODEL))
        with pytest.raises(openai.APIError, match="an event of more than 10000 bytes"):
            say(ChatOrla(orla=orla, model="main", max_retries=0), form)


def test_a_long_event_in_a_stream_passes_uncut(make_orla: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_EVENT_BYTES", 10_000)
    with RawEngine(lambda asked: events([{"content": "a"}, {"content": "x" * 200_000}], usage=USAGE)) as engine:
        orla = make_orla(Backend("main", engine.url, model=MODEL))
        model = ChatOrla(orla=orla, model="main", stream_usage=False)
        assert say(model, "stream") == "a" + "x" * 200_000
        assert orla.records()[-1].completion_tokens == 2


def test_a_stream_too_long_to_be_one_answer(make_orla: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "MAX_ASSEMBLED_BYTES", 10_000)
    with RawEngine(lambda asked: events([{"content": "x" * 100}] * 200)) as engine:
        orla = make_orla(Backend("main", engine.url, model=MODEL))
        with pytest.raises(openai.APIError, match="too long to be made one answer"):
            ChatOrla(orla=orla, model="main", max_retries=0).invoke("x")


def test_a_long_answer_in_one_piece_passes(make_orla: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "MAX_PLAIN_BYTES", 100_000)
    with RawEngine(lambda asked: whole({"role": "assistant", "content": "x" * 300_000})) as engine:
        orla = make_orla(Backend("main", engine.url, model=MODEL))
        answer = ChatOrla(orla=orla, model="main", extra_body={"unknown": 1}).invoke("x")
        assert len(answer.content) == 300_000 and orla.records()[-1].completion_tokens == 2


def test_events_in_single_bytes_cost_their_length() -> None:
    splitter, data = reading.EventSplitter(), b"data: " + b"x" * 200_000 + b"\n\n"
    assert [event for byte in data for event in splitter.feed(bytes([byte]))] == [data]


# Adapters read more than answers

KEYS = [
    "data", "id", "max_model_len", "total_slots", "default_generation_settings", "n_ctx", "prompt", "tokens",
    "loads", "num_running_reqs", "token_usage", "max_total_num_tokens", "vllm_config", "scheduler_config",
    "policy", "models", "name", "context_length", "capabilities", "suspension", "held_requests", "effect",
    "startup_time", "version", "modalities",
]  # fmt: skip
METRICS = st.sampled_from([
    b"vllm:num_requests_running nan\nvllm:num_requests_waiting +Inf\nvllm:kv_cache_usage_perc x",
    b'vllm:cache_config_info{block_size="' + b"9" * 5000 + b'",num_gpu_blocks="2"} 1',
    b"llamacpp:requests_deferred NaN\nsglang:prompt_tokens 1e400",
])  # fmt: skip
SHOWN = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
)
"""What any route of an engine may show."""


@pytest.mark.parametrize("engine", ["openai", "vllm", "sglang", "llamacpp", "ollama", "sim"])
@FUZZ
@given(shown=st.lists(SHOWN.map(bytes_of) | ROUGH | METRICS, min_size=1, max_size=4))
def test_adapters_make_errors_of_ours_of_garbage(engine: str, shown: list[bytes]) -> None:
    adapter: Any = adapter_of(Backend("main", "http://127.0.0.1:9/v1", engine=engine))
    numbers = itertools.count()

    async def ask(method: str, path: str, body: Any = None, **_: Any) -> httpx.Response:
        return ShortAnswer(200, content=shown[next(numbers) % len(shown)])

    adapter.ask = ask

    async def every() -> None:
        for name in ("probe", "stats", "sleep", "wake"):
            if hasattr(adapter, name):
                with contextlib.suppress(OrlaError):
                    await getattr(adapter, name)()
        if hasattr(adapter, "tokenize"):
            with contextlib.suppress(OrlaError):
                assert all(type(token) is int for token in await adapter.tokenize({"messages": []}))

    asyncio.run(every())
