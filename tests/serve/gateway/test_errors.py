"""Errors: ours and an engine's, in the wire of the caller."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from orla_lg import Backend, Limit, Limits, Orla
from orla_lg.core.engine.retry import RetryPolicy
from orla_lg.serve.gateway.answers import UpstreamError
from orla_lg.serve.gateway.settings import GatewaySettings
from orla_lg.serve.http.guard import HttpGuard
from tests.conftest import at
from tests.serve.gateway.served import GatewayServer
from tests.stub_engine import Gate, Reply, StubEngine

HELLO: Any = [{"role": "user", "content": "hello"}]
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "main", "messages": HELLO},
    MESSAGES: {"model": "main", "messages": HELLO, "max_tokens": 9},
    RESPONSES: {"model": "main", "input": "hello"},
}


def ask(gateway: GatewayServer, path: str = CHAT, headers: Any = None, **more: Any) -> httpx.Response:
    return httpx.post(gateway.url + path, json={**BODIES[path], **more}, headers=headers, timeout=60.0)


def message_in(answer: httpx.Response, path: str) -> str:
    """Return what an error says, once it has the form of its wire."""
    said = answer.json()
    error = said["error"]
    assert isinstance(error["type"], str)
    if path == MESSAGES:
        assert said["type"] == "error"
    else:
        assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return error["message"]


@pytest.mark.parametrize("path", BODIES)
def test_a_model_that_nothing_is_known_by(gateway: GatewayServer, path: str) -> None:
    answer = ask(gateway, path, model="nowhere")
    assert answer.status_code == 404 and "'nowhere'" in message_in(answer, path)


def test_the_sdk_knows_it_as_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nowhere"):
        client.chat.completions.create(model="nowhere", messages=HELLO)


@pytest.mark.parametrize("path", BODIES)
def test_a_full_queue(engine: StubEngine, make_orla: Callable[..., Orla], path: str) -> None:
    gate = Gate()
    engine.rule = lambda seen: Reply(gate=gate)
    with GatewayServer(make_orla(at(engine, max_concurrency=1, capacity=0))) as gateway:
        holding = threading.Thread(target=lambda: ask(gateway))
        holding.start()
        engine.wait(lambda engine: engine.in_flight == 1)
        answer = ask(gateway, path)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert message_in(answer, path)
        gate.open()
        holding.join(60.0)


def test_a_deadline_that_passes_in_the_queue(engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    gate = Gate()
    engine.rule = lambda seen: Reply(gate=gate)
    with GatewayServer(make_orla(at(engine, max_concurrency=1))) as gateway:
        holding = threading.Thread(target=lambda: ask(gateway))
        holding.start()
        engine.wait(lambda engine: engine.in_flight == 1)
        answer = ask(gateway, headers={"x-orla-deadline-ms": "50"})
        assert answer.status_code == 408 and float(answer.headers["x-orla-queue-wait-ms"]) >= 0
        gate.open()
        holding.join(60.0)


def test_a_spent_budget(engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    limits = Limits(tenants={"acme": Limit(calls=1, per_s=60)})
    with GatewayServer(make_orla(at(engine), limits=limits)) as gateway:
        assert ask(gateway, headers={"x-orla-tenant": "acme"}).status_code == 200
        answer = ask(gateway, MESSAGES, headers={"x-orla-tenant": "acme"})
        assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 61
        assert "acme" in message_in(answer, MESSAGES)
        assert answer.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("path", BODIES)
def test_no_engine(make_orla: Callable[..., Orla], path: str) -> None:
    orla = make_orla(Backend("main", "http://127.0.0.1:9/v1", model="m"))
    with GatewayServer(orla, settings=GatewaySettings(max_attempts=1)) as gateway:
        answer = ask(gateway, path)
        assert answer.status_code == 502 and "no engine answered" in message_in(answer, path)


def test_a_server_that_ends(gateway: GatewayServer) -> None:
    gateway.orla.close()
    answer = ask(gateway)
    assert answer.status_code == 503 and "shutting down" in message_in(answer, CHAT)


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_an_engines_own_error_is_kept_as_it_is(engine: StubEngine, gateway: GatewayServer, status: int) -> None:
    engine.rule = lambda seen: Reply(status=status, headers=(("retry-after", "7"),))
    answer = ask(gateway)
    assert answer.status_code == status and answer.headers["retry-after"] == "7"
    assert answer.json() == {"error": {"message": f"the stub answers {status}", "type": "stub_error", "code": status}}
    assert len(engine.chats) == 1 and gateway.ended()[0].error


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
def test_an_engines_error_is_translated_with_its_answer(
    engine: StubEngine, gateway: GatewayServer, path: str
) -> None:
    engine.rule = lambda seen: Reply(status=400)
    answer = ask(gateway, path)
    assert answer.status_code == 400 and message_in(answer, path) == "the stub answers 400"


def test_an_overloaded_engines_error_comes_after_all_attempts(
    engine: StubEngine, make_orla: Callable[..., Orla]
) -> None:
    engine.rule = lambda seen: Reply(status=429, headers=(("retry-after-ms", "1"),))
    with GatewayServer(make_orla(at(engine)), settings=GatewaySettings(max_attempts=2)) as gateway:
        answer = ask(gateway)
        assert answer.status_code == 429 and answer.headers["retry-after-ms"] == "1"
        assert len(engine.chats) == 2 and gateway.ended()[0].attempts == 2


# Requests that cannot be read


def raw(gateway: GatewayServer, content: bytes, **headers: str) -> httpx.Response:
    sent = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return httpx.post(gateway.url + CHAT, content=content, headers=sent)


def test_a_body_that_is_no_object(gateway: GatewayServer) -> None:
    for content in (b"{", b"[]", b"7", b'"x"', b"[" * 100_000, b'{"a":"\xff"}', b"1" * 5000):
        answer = raw(gateway, content)
        assert answer.status_code == 400 and "body" in message_in(answer, CHAT)


def test_what_a_page_elsewhere_could_post_is_refused(gateway: GatewayServer) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = raw(gateway, json.dumps(BODIES[CHAT]).encode(), content_type=kind)
        assert answer.status_code == 415 and "application/json" in message_in(answer, CHAT)


def test_a_body_that_is_too_long(engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    with GatewayServer(make_orla(at(engine)), guard=HttpGuard(max_body_bytes=1000)) as gateway:
        body = json.dumps({**BODIES[CHAT], "user": "x" * 2000}).encode()
        assert raw(gateway, body).status_code == 413
        pieces = httpx.post(
            gateway.url + CHAT, content=iter([body[:900], body[900:]]), headers={"content-type": "application/json"}
        )
        assert pieces.status_code == 413 and not engine.chats


def test_a_body_that_does_not_come(engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    with GatewayServer(make_orla(at(engine)), guard=HttpGuard(body_timeout_s=0.1)) as gateway:
        port = int(gateway.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=60.0) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            connection.sendall(f"{head}content-length: 99\r\n\r\n{{".encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_metadata_and_messages_of_any_shape_never_break_it(gateway: GatewayServer) -> None:
    gateway.orla.core.serving.services.retries = RetryPolicy(base_s=0.001)
    for odd in (None, 7, "x", [], {"orla": 7}, {"orla.stage": {}}, {"orla": {"stage": []}}, {"user_id": "{"}):
        assert ask(gateway, metadata=odd, nvext=odd, program_id=odd).status_code == 200
    for path, field in ((CHAT, "messages"), (MESSAGES, "messages"), (RESPONSES, "input")):
        for odd in (7, {}, [7], [None], [{"role": 7}]):
            assert ask(gateway, path, **{field: odd}).status_code < 600  # type: ignore[arg-type]


def test_hints_of_our_own_that_cannot_be(gateway: GatewayServer) -> None:
    wrong: list[tuple[dict[str, str], dict[str, Any]]] = [
        ({"x-orla-priority": "high"}, {}), ({"x-orla-deadline-ms": "-1"}, {}), ({"x-orla-cache": "maybe"}, {}),
        ({"x-orla-priority": "nan"}, {}), ({"x-orla-mapping": "nowhere"}, {}), ({}, {"orla.priority": "high"}),
    ]  # fmt: skip
    for headers, metadata in wrong:
        answer = ask(gateway, headers=headers, metadata=metadata)
        assert answer.status_code == 400 and message_in(answer, CHAT), headers
    assert not gateway.records()


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_a_caller_without_a_key(engine: StubEngine, make_orla: Callable[..., Orla], path: str) -> None:
    with GatewayServer(make_orla(at(engine)), tenants=None) as gateway:
        for headers in ({}, {"authorization": "Bearer nothing"}, {"x-api-key": gateway.key + "x"}):
            answer = ask(gateway, path, headers=headers)
            assert answer.status_code == 401 and "key" in message_in(answer, path)
            assert answer.headers["www-authenticate"].startswith("Bearer")
        assert httpx.get(gateway.url + "/v1/models").status_code == 401
        assert not engine.chats
        assert ask(gateway, path, headers={"x-api-key": gateway.key}).status_code == 200
        assert ask(gateway, path, headers={"authorization": f"Bearer {gateway.key}"}).status_code == 200
        assert gateway.key not in str([seen.headers for seen in engine.requests])


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_a_name_that_is_not_the_servers(gateway: GatewayServer, path: str) -> None:
    answer = ask(gateway, path, headers={"host": "evil.example"})
    assert answer.status_code == 421 and message_in(answer, path)


def test_so_many_calls_of_a_key_at_once(engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    gate = Gate()
    engine.rule = lambda seen: Reply(gate=gate)
    with GatewayServer(make_orla(at(engine)), concurrency=1) as gateway:
        mine = {"x-api-key": gateway.key}
        holding = threading.Thread(target=lambda: ask(gateway, headers=mine))
        holding.start()
        engine.wait(lambda engine: engine.in_flight == 1)
        answer = ask(gateway, MESSAGES, headers=mine)
        assert answer.status_code == 429 and answer.headers["retry-after"] and message_in(answer, MESSAGES)
        gate.open()
        holding.join(60.0)
        assert ask(gateway, headers=mine).status_code == 200


def test_what_a_key_may_spend(engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    with GatewayServer(make_orla(at(engine)), limits=(Limit(calls=2, per_s=60),)) as gateway:
        mine = {"x-api-key": gateway.key}
        assert [ask(gateway, headers=mine).status_code for _ in range(3)] == [200, 200, 429]
        assert ask(gateway, headers=mine).headers["retry-after"]


# What an engine does not do


@pytest.mark.parametrize("status", [501, 505])
@pytest.mark.parametrize("path", BODIES)
def test_what_an_engine_will_never_do_is_final_and_shuts_nobody_out(
    engine: StubEngine, gateway: GatewayServer, path: str, status: int
) -> None:
    engine.rule = lambda seen: Reply(status=status)
    for _ in range(6):
        answer = ask(gateway, path)
        assert answer.status_code == status and answer.headers["x-should-retry"] == "false"
        assert answer.json()["error"]["message"] == f"the stub answers {status}"
    assert len(engine.chats) == 6 and {record.attempts for record in gateway.ended(6)} == {1}
    engine.rule = None
    assert ask(gateway).status_code == 200


def test_an_engine_that_asks_for_another_try_gets_it(engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    engine.rule = lambda seen: Reply(status=501, headers=(("x-should-retry", "true"),))
    with GatewayServer(make_orla(at(engine)), settings=GatewaySettings(max_attempts=2)) as gateway:
        gateway.orla.core.serving.services.retries = RetryPolicy(base_s=0.001)
        assert ask(gateway).headers.get_list("x-should-retry") == ["true"]
        assert len(engine.chats) == 2


def test_an_engine_without_a_path_is_said_not_to_serve_what_is_behind_it(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"backend 'main' does not serve embeddings: .* 404 at /v1/embed"):
        client.embeddings.create(model="main", input="a", encoding_format="float")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", False), (b"404 page not found\n", False), (b"<html>\n<h1>404</h1>", False), (b"null", False),
        (b'{"detail": "Not Found"}', False), (b'{"error": {"message": ""}}', False), (b"{}", False),
        (b'{"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}', False),
        (b"no such model", True), (b'{"error": "model \'x\' not found"}', True), (b'{"detail": [{"loc": 1}]}', True),
        (b'{"error": {"message": "The model `x` does not exist."}}', True), (b'"gone"', True),
    ],
)  # fmt: skip
def test_an_engines_words_are_kept_where_it_has_some(content: bytes, says: bool) -> None:
    assert UpstreamError(404, [], content).says_why() is says
