"""What goes wrong behind the gateway, as clients see it: errors of their libraries' classes, never a quiet end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import httpx2
import openai
import pytest

from orla_lg.testing.faults import Fault, FaultEngine, Reply
from tests.serve.running_gateway import Gateway, running_gateway

anthropic = pytest.importorskip("anthropic")

MODEL = "stub-model"
MESSAGES: Any = [{"role": "user", "content": "hello there, how are you today?"}]


def _openai(gateway: Gateway) -> openai.OpenAI:
    return openai.OpenAI(base_url=gateway.url, api_key="a-key", max_retries=0)


def _anthropic(gateway: Gateway) -> Any:
    return anthropic.Anthropic(base_url=gateway.root, api_key="a-key", max_retries=0)


def chat(gateway: Gateway, model: str = MODEL) -> Any:
    return _openai(gateway).chat.completions.create(model=model, messages=MESSAGES)


def chat_streamed(gateway: Gateway, model: str = MODEL) -> Any:
    return [*_openai(gateway).chat.completions.create(model=model, messages=MESSAGES, stream=True)]


def responses(gateway: Gateway, model: str = MODEL) -> Any:
    return _openai(gateway).responses.create(model=model, input=MESSAGES)


def responses_streamed(gateway: Gateway, model: str = MODEL) -> Any:
    events = [*_openai(gateway).responses.create(model=model, input=MESSAGES, stream=True)]
    if events[-1].type != "response.completed":
        assert events[-1].type in ("response.failed", "error"), events[-1].type
        raise openai.APIError("it says that it failed", request=httpx.Request("POST", gateway.url), body=None)
    return events


def messages(gateway: Gateway, model: str = MODEL) -> Any:
    return _anthropic(gateway).messages.create(model=model, max_tokens=64, messages=MESSAGES)


def messages_streamed(gateway: Gateway, model: str = MODEL) -> Any:
    with _anthropic(gateway).messages.stream(model=model, max_tokens=64, messages=MESSAGES) as stream:
        return stream.get_final_message()


Called = Callable[..., Any]
WHOLE: tuple[Called, ...] = (chat, responses, messages)
STREAMED: tuple[Called, ...] = (chat_streamed, responses_streamed, messages_streamed)

whole = pytest.mark.parametrize("call", WHOLE)
streamed = pytest.mark.parametrize("call", STREAMED)
either = pytest.mark.parametrize("call", WHOLE + STREAMED)


def library(call: Called) -> Any:
    return anthropic if call.__name__.startswith("messages") else openai


@pytest.fixture(scope="module")
def _running() -> Iterator[Gateway]:
    with (
        FaultEngine(any_model=True, context_tokens=None) as engine,
        running_gateway(engine, max_attempts=1) as gateway,
    ):
        yield gateway


@pytest.fixture(scope="module")
def _trying_again() -> Iterator[Gateway]:
    with FaultEngine(any_model=True, context_tokens=None) as engine, running_gateway(engine) as gateway:
        yield gateway


@pytest.fixture
def gateway(_running: Gateway) -> Gateway:
    """One that tries each call once."""
    return fresh(_running)


@pytest.fixture
def trying_again(_trying_again: Gateway) -> Gateway:
    return fresh(_trying_again)


def fresh(gateway: Gateway) -> Gateway:
    gateway.engine.script.clear()
    gateway.engine.otherwise = Reply()
    gateway.forget()
    for scheduler in gateway.orla.core.serving.schedulers.values():
        scheduler.health.breaker.succeeded()  # one test's faults are not the next one's
    return gateway


@either
def test_a_busy_engine_is_a_rate_limit_with_its_time(gateway: Gateway, call: Called) -> None:
    gateway.engine.otherwise = Reply(status=429, headers=(("retry-after", "0"),))
    with pytest.raises(library(call).RateLimitError) as raised:
        call(gateway)
    assert raised.value.response.headers["retry-after"]
    assert "429" in str(raised.value)


@either
@pytest.mark.parametrize(("status", "error"), [(400, "BadRequestError"), (404, "NotFoundError")])
def test_what_an_engine_refuses_is_the_clients_error(gateway: Gateway, call: Called, status: int, error: str) -> None:
    gateway.engine.otherwise = Reply(status=status)
    with pytest.raises(getattr(library(call), error)) as raised:
        call(gateway)
    assert f"the stub answers {status}" in str(raised.value)
    body = raised.value.body
    assert isinstance(body, dict)
    assert "message" in (body["error"] if library(call) is anthropic else body)


@either
def test_a_broken_engine_is_a_server_error(gateway: Gateway, call: Called) -> None:
    gateway.engine.otherwise = Reply(status=500)
    with pytest.raises(library(call).InternalServerError):
        call(gateway)


@streamed
@pytest.mark.parametrize("fault", [Fault.DEAD_MID_STREAM, Fault.ERROR_EVENT, Fault.NO_DONE])
def test_a_stream_that_breaks_is_no_answer(gateway: Gateway, call: Called, fault: Fault) -> None:
    gateway.engine.otherwise = Reply(fault=fault)
    with pytest.raises((library(call).APIError, httpx.TransportError, httpx2.TransportError)):
        call(gateway)
    (record,) = gateway.records(1)
    assert record.error is not None


@pytest.mark.parametrize("call", [chat, *STREAMED])
def test_a_fault_before_the_first_token_is_not_seen(trying_again: Gateway, call: Called) -> None:
    trying_again.engine.script.extend([Fault.RESET, Fault.DEAD_IN_PREFILL])
    call(trying_again)
    (record,) = trying_again.records(1)
    assert (record.error, record.attempts) == (None, 3)


@either
def test_an_engine_that_is_gone_is_a_server_error(gateway: Gateway, call: Called) -> None:
    chat(gateway)
    gateway.engine.refuse()
    try:
        with pytest.raises(library(call).InternalServerError) as raised:
            call(gateway)
    finally:
        gateway.engine.listen()
    assert raised.value.status_code in (502, 503)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"a": ' + b"[" * 100_000])
def test_what_is_no_request_is_refused_in_openais_words(gateway: Gateway, path: str, content: bytes) -> None:
    answer = httpx.post(gateway.root + path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages?beta=true", "/v1/messages/count_tokens"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"a": ' + b"[" * 100_000])
def test_what_is_no_request_is_refused_in_anthropics_words(gateway: Gateway, path: str, content: bytes) -> None:
    answer = httpx.post(gateway.root + path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    said = answer.json()
    assert (said["type"], said["error"]["type"]) == ("error", "invalid_request_error")
    assert said["error"]["message"]


def test_models_are_listed_for_both_libraries(gateway: Gateway) -> None:
    named = {model.id for model in _openai(gateway).models.list()}
    assert named and named == {model.id for model in _anthropic(gateway).models.list()}
    one = sorted(named)[0]
    assert _openai(gateway).models.retrieve(one).id == one
    with pytest.raises(openai.NotFoundError):
        _openai(gateway).models.retrieve("no-such-model")
