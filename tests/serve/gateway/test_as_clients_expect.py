"""What clients' libraries do with an answer: which header they name it by, whether they try again, what they show."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from orla_lg.testing.faults import FaultEngine, Reply
from tests.serve.running_gateway import Gateway, running_gateway

MESSAGES = [{"role": "user", "content": "hello"}]
BODY: dict[str, Any] = {"model": "stub-model", "messages": MESSAGES, "max_tokens": 5}


@pytest.fixture(scope="module")
def _running() -> Iterator[Gateway]:
    with (
        FaultEngine(any_model=True, context_tokens=None) as engine,
        running_gateway(engine, max_attempts=1) as gateway,
    ):
        yield gateway


@pytest.fixture
def gateway(_running: Gateway) -> Iterator[Gateway]:
    yield _running
    _running.engine.otherwise = Reply()
    for scheduler in _running.orla.core.serving.schedulers.values():
        scheduler.health.breaker.succeeded()


def post(gateway: Gateway, path: str, **more: Any) -> httpx.Response:
    return httpx.post(f"{gateway.root}{path}", timeout=20, **({"json": BODY} | more))


def test_a_request_is_named_as_each_library_looks_for_it(gateway: Gateway) -> None:
    named = post(gateway, "/v1/messages", headers={"x-request-id": "mine-1"}).headers
    assert named["x-request-id"] == named["request-id"] == "mine-1"
    assert "request-id" not in post(gateway, "/v1/chat/completions").headers
    refused = post(gateway, "/v1/messages", json={"model": "stub-model"} | {"metadata": {"orla.priority": "high"}})
    assert refused.status_code == 400 and refused.headers["request-id"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_proxies_are_asked_to_pass_streams_at_once(gateway: Gateway, path: str) -> None:
    streamed, whole = post(gateway, path, json=BODY | {"stream": True}), post(gateway, path)
    assert (streamed.headers["cache-control"], streamed.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert "x-accel-buffering" not in whole.headers
    gateway.engine.otherwise = Reply(headers=(("cache-control", "no-store"),))
    assert post(gateway, path, json=BODY | {"stream": True}).headers.get_list("cache-control") == ["no-store"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_an_engine_that_refuses_the_servers_key_says_nothing_of_the_callers(gateway: Gateway, path: str) -> None:
    gateway.engine.otherwise = Reply(status=401)
    answer = post(gateway, path, json=BODY | {"input": "hi"})
    assert answer.status_code == 502
    assert "backend 'main' refuses the key that this server has for it (401)" in answer.json()["error"]["message"]
    gateway.engine.otherwise = Reply(status=403)  # of what was asked: moderation, a region
    assert post(gateway, path, json=BODY | {"input": "hi"}).status_code == 403


def test_an_open_circuit_says_when_to_come_back(gateway: Gateway) -> None:
    gateway.engine.otherwise = Reply(status=500)
    for _ in range(8):
        answer = post(gateway, "/v1/chat/completions")
    assert answer.status_code == 503
    assert 1 <= int(answer.headers["retry-after"]) <= 60


def test_a_backend_that_never_answered_may_serve_any_model() -> None:
    """A 404 would be final, and the engine is only about to start."""
    with FaultEngine(any_model=True) as engine:
        pass  # its port is free again
    with running_gateway(engine, max_attempts=1) as gateway:
        answer = post(gateway, "/v1/chat/completions")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "main" in answer.json()["error"]["message"]


def test_a_model_that_nothing_serves_is_not_found_unless_the_mapping_takes_any_stage(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    post(gateway, "/v1/chat/completions")
    answer = post(gateway, "/v1/chat/completions", json=BODY | {"model": "another"})
    assert answer.status_code == 200
    monkeypatch.setattr(gateway.orla.core.serving.mappings, "shared", None)
    answer = post(gateway, "/v1/chat/completions", json=BODY | {"model": "another"})
    assert answer.status_code == 404


def test_a_deadline_that_passed_is_not_tried_again(gateway: Gateway) -> None:
    post(gateway, "/v1/chat/completions")
    late = {"metadata": {"orla.deadline_s": 1e-9}}
    answer = post(gateway, "/v1/chat/completions", json=BODY | late)
    assert answer.status_code == 408, answer.text
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("method", "path", "status", "hint"),
    [
        (
            "POST",
            "/chat/completions",
            404,
            "it is /v1/chat/completions; the base URL of OpenAI's clients ends in /v1",
        ),
        ("POST", "/responses", 404, "/v1/responses"),
        ("GET", "/models", 404, "/v1/models"),
        ("POST", "/messages", 404, "/v1/messages"),
        ("POST", "/v1/v1/messages", 404, "Anthropic's clients add /v1 themselves"),
        ("GET", "/v1/responses/resp_1", 404, "answers are not kept"),
        ("GET", "/nothing", 404, "there is no route '/nothing'"),
        ("POST", "/v1/chat/completion", 404, "did you mean '/v1/chat/completions'"),
        ("POST", "/chat/completion", 404, "did you mean '/v1/chat/completions'"),
        ("POST", "/v1/message", 404, "did you mean '/v1/messages'"),
        ("POST", "/v1/messages/count_token", 404, "did you mean '/v1/messages/count_tokens'"),
        ("GET", "/model", 404, "did you mean '/v1/models'"),
        ("POST", "/w/run/s/draft/v1/embedding", 404, "did you mean '/v1/embeddings'"),
        ("GET", "/v1/chat/completions", 405, "POST"),
        ("GET", "/v1/messages", 405, "POST"),
        ("POST", "/w/run/v1/nothing", 404, "there is no route"),
        ("GET", "/w/run/v1/messages", 405, "POST"),
    ],
)
def test_what_no_route_takes(gateway: Gateway, method: str, path: str, status: int, hint: str) -> None:
    answer = httpx.request(method, gateway.root + path, json=BODY if method == "POST" else None)
    said = answer.json()
    assert (answer.status_code, said.get("type")) == (status, "error" if "/message" in path else None)
    assert hint in said["error"]["message"]


def test_a_look_without_a_body_has_none(gateway: Gateway) -> None:
    answer = httpx.head(f"{gateway.root}/api/hello")
    assert (answer.status_code, answer.content) == (404, b"")


def test_a_compressed_body_is_refused_as_such(gateway: Gateway) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    content = gzip.compress(json.dumps(BODY).encode())
    answer = post(gateway, "/v1/chat/completions", content=content, headers=headers, json=None)
    assert answer.status_code == 415
    assert "Content-Encoding 'gzip'" in answer.json()["error"]["message"]
    headers["content-encoding"] = "identity"
    assert post(gateway, "/v1/chat/completions", content=json.dumps(BODY), headers=headers, json=None).is_success


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_is_refused(gateway: Gateway, number: str) -> None:
    content = json.dumps(BODY)[:-1] + f', "temperature": {number}}}'
    headers = {"content-type": "application/json"}
    answer = post(gateway, "/v1/chat/completions", content=content, headers=headers, json=None)
    assert answer.status_code == 400
    assert number in answer.json()["error"]["message"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
def test_a_body_in_another_unicode_is_read(gateway: Gateway, encoding: str) -> None:
    headers = {"content-type": "application/json"}
    content = json.dumps(BODY).encode(encoding)
    assert post(gateway, "/v1/chat/completions", content=content, headers=headers, json=None).is_success
