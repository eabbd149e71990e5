"""Groq's SDK and ChatGroq, which speak chat completions: served once, in every form."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from orla_lg import Backend, BackendUnavailable, MappingError, Orla
from orla_lg.testing.faults import Fault
from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings
from tests.clients.nodes import ainside, inside
from tests.conftest import BACKEND_KEY, CALLER_KEY, at
from tests.stub_engine import Gate, Reply, StubEngine

groq = pytest.importorskip("groq")
ChatGroq = pytest.importorskip("langchain_groq").ChatGroq

MESSAGES: Any = [{"role": "user", "content": "hello"}]
SAID = "1 user said: hello"


@pytest.fixture
def theirs(other_engine: StubEngine) -> StubEngine:
    """The server that the application's code names."""
    return other_engine


def sdk(theirs: StubEngine, **settings: Any) -> Any:
    return groq.Groq(base_url=theirs.url.removesuffix("/v1"), api_key=CALLER_KEY, **{"max_retries": 0, **settings})


def asdk(theirs: StubEngine, **settings: Any) -> Any:
    url = theirs.url.removesuffix("/v1")
    return groq.AsyncGroq(base_url=url, api_key=CALLER_KEY, **{"max_retries": 0, **settings})


def model(theirs: StubEngine, **settings: Any) -> Any:
    url = theirs.url.removesuffix("/v1")
    return ChatGroq(model="gpt-x", base_url=url, api_key=CALLER_KEY, **{"max_retries": 0, **settings})


def ask(client: Any, **more: Any) -> str:
    return str(client.chat.completions.create(model="gpt-x", messages=MESSAGES, **more).choices[0].message.content)


async def aask(client: Any, **more: Any) -> str:
    answer = await client.chat.completions.create(model="gpt-x", messages=MESSAGES, **more)
    return str(answer.choices[0].message.content)


def stream(client: Any) -> str:
    chunks = client.chat.completions.create(model="gpt-x", messages=MESSAGES, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


async def astream(client: Any) -> str:
    chunks = await client.chat.completions.create(model="gpt-x", messages=MESSAGES, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


def raw(client: Any) -> str:
    answer = client.chat.completions.with_raw_response.create(model="gpt-x", messages=MESSAGES)
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    assert answer.elapsed.total_seconds() > 0
    return str(answer.parse().choices[0].message.content)


def raw_stream(client: Any) -> str:
    create = client.chat.completions.with_streaming_response.create
    with create(model="gpt-x", messages=MESSAGES) as answer:
        return str(answer.parse().choices[0].message.content)


async def araw_stream(client: Any) -> str:
    create = client.chat.completions.with_streaming_response.create
    async with create(model="gpt-x", messages=MESSAGES) as answer:
        return str((await answer.parse()).choices[0].message.content)


FORMS: dict[str, Callable[[StubEngine], Any]] = {
    "create": lambda theirs: ask(sdk(theirs)),
    "stream": lambda theirs: stream(sdk(theirs)),
    "raw": lambda theirs: raw(sdk(theirs)),
    "raw stream": lambda theirs: raw_stream(sdk(theirs)),
    "invoke": lambda theirs: model(theirs).invoke("hello").content,
    "streamed": lambda theirs: "".join(chunk.content for chunk in model(theirs).stream("hello")),
    "batch": lambda theirs: model(theirs).batch(["hello"])[0].content,
}
AFORMS: dict[str, Callable[[StubEngine], Any]] = {
    "create": lambda theirs: aask(asdk(theirs)),
    "stream": lambda theirs: astream(asdk(theirs)),
    "raw stream": lambda theirs: araw_stream(asdk(theirs)),
    "invoke": lambda theirs: _acontent(model(theirs)),
    "streamed": lambda theirs: _astreamed(model(theirs)),
}


async def _acontent(llm: Any) -> str:
    return str((await llm.ainvoke("hello")).content)


async def _astreamed(llm: Any) -> str:
    return "".join([chunk.content async for chunk in llm.astream("hello")])


def assert_served_once(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    (seen,) = engine.chats
    assert (seen.key, seen.body["model"]) == (BACKEND_KEY, "stub-model")
    assert CALLER_KEY not in str(seen.headers) and not theirs.requests
    (record,) = orla.records()
    assert (record.stage, record.backend, record.attempts, record.error) == ("ask", "main", 1, None)
    assert record.prompt_tokens and record.completion_tokens and not record.external
    assert (record.ttft_s is not None) == bool(seen.body.get("stream"))
    assert orla.statistics().unidentified == 0


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_served_once(engine: StubEngine, theirs: StubEngine, orla: Orla, form: str) -> None:
    assert inside(orla, lambda: FORMS[form](theirs)) == SAID
    assert_served_once(engine, theirs, orla)


@pytest.mark.parametrize("form", AFORMS)
def test_each_async_form_is_served_once(engine: StubEngine, theirs: StubEngine, orla: Orla, form: str) -> None:
    assert ainside(orla, lambda: AFORMS[form](theirs)) == SAID
    assert_served_once(engine, theirs, orla)


def test_outside_a_wrapped_graph_nothing_changes(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    inside(orla, lambda: None)  # interception is installed
    with pytest.raises(groq.NotFoundError):
        ask(sdk(theirs))
    (seen,) = theirs.requests
    assert (seen.path, seen.key) == ("/openai/v1/chat/completions", CALLER_KEY)
    assert not engine.chats and not orla.records()


def test_what_no_model_sends_passes(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    body = {"model": "gpt-x", "messages": MESSAGES}
    answer = inside(orla, lambda: httpx.post(f"{theirs.url}/chat/completions", json=body))
    assert answer.json()["choices"] and len(theirs.chats) == 1
    assert not engine.chats and not orla.records()


def test_what_nothing_places_passes_with_the_sdks_own_retries(
    engine: StubEngine, theirs: StubEngine, make_orla: Any
) -> None:
    orla = make_orla(at(engine), mapper={"other": "main"})
    theirs.every_path = True
    theirs.script.extend([Reply(status=500, headers=(("retry-after-ms", "1"),)), Reply(status=400)])
    with pytest.raises(groq.BadRequestError):
        inside(orla, lambda: ask(sdk(theirs, max_retries=2)))
    assert [seen.key for seen in theirs.requests] == [CALLER_KEY] * 2 and not engine.chats
    assert theirs.requests[0].body == theirs.requests[1].body == {"model": "gpt-x", "messages": MESSAGES}
    (record,) = orla.records()
    assert (record.external, record.stage) == (True, "ask") and "BadRequestError" in str(record.error)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_engines_error_is_the_sdks_own(
    engine: StubEngine, theirs: StubEngine, orla: Orla, streamed: bool
) -> None:
    engine.rule = lambda seen: Reply(status=400)
    with pytest.raises(groq.BadRequestError) as caught:
        inside(orla, lambda: (stream if streamed else ask)(sdk(theirs, max_retries=2)))
    assert caught.value.body and len(engine.chats) == 1 + streamed, "once more without what we added"
    (record,) = orla.records()
    assert record.error is not None and "400" in record.error and not record.external


def test_attempts_are_as_many_as_the_sdk_would_make(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    engine.script.extend([Reply(status=500, headers=(("retry-after-ms", "1"),))] * 2)
    assert inside(orla, lambda: ask(sdk(theirs, max_retries=2))) == SAID
    (record,) = orla.records()
    assert (record.attempts, len(engine.chats)) == (3, 3)
    engine.script.extend([Reply(status=500, headers=(("retry-after-ms", "1"),))] * 2)
    with pytest.raises(groq.InternalServerError):
        inside(orla, lambda: ask(sdk(theirs, max_retries=1)))
    assert orla.records()[-1].attempts == 2 and not theirs.requests


def test_another_backend_steps_in(engine: StubEngine, theirs: StubEngine, make_orla: Any) -> None:
    with StubEngine() as gone:
        orla = make_orla(at(gone, "gone"), at(engine), mapper={"*": ["gone", "main"]})
        orla.connect()
    assert inside(orla, lambda: ask(sdk(theirs))) == SAID
    (record,) = orla.records()
    assert (record.backend, record.attempts) == ("main", 2)


@pytest.mark.parametrize("retries", [0, 1])
def test_errors_of_ours_come_out_as_they_are(theirs: StubEngine, make_orla: Any, retries: int) -> None:
    with StubEngine() as gone:
        orla = make_orla(at(gone), mapper={"*": "main"})
        orla.connect()
    with pytest.raises(BackendUnavailable, match="no engine answered"):
        inside(orla, lambda: ask(sdk(theirs, max_retries=retries)))
    with pytest.raises(BackendUnavailable):
        ainside(orla, lambda: aask(asdk(theirs, max_retries=retries)))
    with pytest.raises(MappingError, match="variant 'v' does not exist"):
        inside(orla, lambda: ask(sdk(theirs)), {"configurable": {"orla": {"variant": "v"}}})


def test_the_callers_time_out_is_heeded(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    gate = Gate()
    engine.rule = lambda seen: Reply(gate=gate)
    try:
        with pytest.raises(groq.APITimeoutError):
            inside(orla, lambda: ask(sdk(theirs, timeout=0.05)))
        with pytest.raises(groq.APITimeoutError):
            ainside(orla, lambda: aask(asdk(theirs), timeout=0.05))
    finally:
        gate.open()


def test_its_headers_are_carried_and_its_credentials_are_not(
    engine: StubEngine, theirs: StubEngine, make_orla: Any
) -> None:
    orla = make_orla(at(engine, forward_headers=("X-Team",)), mapper={"*": "main"})
    headers = {"X-Team": "a", "X-Secret": "b", "X-Request-ID": "c", "Cookie": "d"}
    inside(orla, lambda: ask(sdk(theirs, default_headers=headers), extra_query={"api-version": "1", "k": "v"}))
    (seen,) = engine.chats
    assert seen.key == BACKEND_KEY and seen.query == {"api-version": "1"}
    assert (seen.headers["x-team"], seen.headers["x-request-id"]) == ("a", "c")
    assert not {"x-secret", "cookie"} & seen.headers.keys() and seen.headers["accept-encoding"] == "identity"


def test_what_a_mapping_sets_counts_where_the_caller_said_nothing(
    engine: StubEngine, theirs: StubEngine, make_orla: Any
) -> None:
    entry = {"to": "main", "temperature": 0.5, "max_tokens": 5, "extra_body": {"top_k": 1}}
    orla = make_orla(at(engine), mapper={"*": entry})
    inside(orla, lambda: ask(sdk(theirs), temperature=0.1, max_completion_tokens=9))
    (seen,) = engine.chats
    assert (seen.body["temperature"], seen.body["top_k"]) == (0.1, 1) and "max_tokens" not in seen.body


def test_a_stream_that_is_closed_or_dropped_gives_its_grant_back(
    engine: StubEngine, theirs: StubEngine, orla: Orla
) -> None:
    def begin(ends: Callable[[Any], None]) -> None:
        chunks = sdk(theirs).chat.completions.create(model="gpt-x", messages=MESSAGES, stream=True)
        next(iter(chunks))
        assert orla.statistics().backends["main"].queue.in_flight == 1
        ends(chunks)

    inside(orla, lambda: begin(lambda chunks: chunks.close()))
    assert orla.statistics().backends["main"].queue.in_flight == 0
    inside(orla, lambda: begin(lambda chunks: None))
    gc.collect()
    assert [record.error for record in orla.records()] == ["abandoned"] * len(orla.records())


def test_a_cancelled_call_gives_its_grant_back(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    gate = Gate()
    engine.rule = lambda seen: Reply(gate=gate)

    async def body() -> str:
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(aask(asdk(theirs)))
            await engine.await_(lambda stub: stub.in_flight == 1)
            asking.cancel()
        assert asking.cancelled()
        assert orla.statistics().backends["main"].queue.in_flight == 0
        return "cancelled"

    assert ainside(orla, body) == "cancelled"
    gate.open()
    assert "CancelledError" in str(orla.records()[-1].error)


def test_a_backend_that_dies_in_its_prefill_is_found_out_before_the_caller_has_anything(
    engine: StubEngine, theirs: StubEngine, orla: Orla
) -> None:
    engine.script.extend([Fault.DEAD_IN_PREFILL, Fault.GARBAGE])
    assert inside(orla, lambda: stream(sdk(theirs, max_retries=2))) == SAID
    assert orla.records()[-1].attempts == 3


@pytest.mark.parametrize("fault", [Fault.DEAD_MID_STREAM, Fault.NO_DONE])
def test_a_backend_that_dies_mid_stream_ends_the_stream(
    engine: StubEngine, theirs: StubEngine, orla: Orla, fault: Fault
) -> None:
    engine.script.extend([fault, fault])
    with pytest.raises(httpx.RemoteProtocolError if fault is Fault.NO_DONE else httpx.TransportError):
        inside(orla, lambda: stream(sdk(theirs, max_retries=2)))
    with pytest.raises(httpx.TransportError):
        ainside(orla, lambda: astream(asdk(theirs, max_retries=2)))
    assert len(engine.chats) == 2 and all(record.error for record in orla.records())


def test_a_field_that_the_engine_refuses_is_left_out(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    def rule(seen: Any) -> Reply | None:
        return Reply(status=400, text="stream_options is not allowed") if "stream_options" in seen.body else None

    engine.rule = rule
    assert [inside(orla, lambda: stream(sdk(theirs))) for _ in range(2)] == [SAID, SAID]
    assert ["stream_options" in seen.body for seen in engine.chats] == [True, False, False]


def test_tools_are_called(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    def weather(city: str) -> str:
        """Return the weather."""
        return city

    (called,) = inside(orla, lambda: model(theirs).bind_tools([weather]).invoke("hello")).tool_calls
    assert called["name"] == "weather"
    assert_served_once(engine, theirs, orla)


@pytest.mark.parametrize("given", ["parsed", None])
def test_what_groq_alone_knows_and_what_is_null_stays_out(
    engine: StubEngine, theirs: StubEngine, orla: Orla, given: str | None
) -> None:
    inside(orla, lambda: model(theirs, reasoning_format=given).invoke("hello"))
    (seen,) = engine.chats
    assert "reasoning_format" not in seen.body and None not in seen.body.values()


@pytest.mark.engine
def test_a_real_llamacpp_answers_it() -> None:
    with EmbeddedEngine(EngineSettings(slots=1)) as running:
        backend = Backend("main", running.url, engine="llamacpp")
        with Orla([backend], mapper={"*": "main"}) as orla:
            llm = ChatGroq(model="gpt-x", base_url="http://127.0.0.1:9", api_key="k", max_tokens=3, max_retries=0)
            assert inside(orla, lambda: llm.invoke("Say hello.").text)
            (record,) = orla.records()
    assert (record.backend, record.error, record.completion_tokens) == ("main", None, 3)
