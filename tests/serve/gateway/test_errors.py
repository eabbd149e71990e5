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
from orla_lg.core.boundary.checked import whole as whole_number
from orla_lg.serve.gateway.settings import GatewaySettings
from tests.conftest import at
from tests.serve.gateway.served import GatewayServer, OpenAccess
from tests.stub_engine import Gate, Reply, StubEngine

HELLO: Any = [{"role": "user", "content": "hello"}]
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "main", "messages": HELLO},
    MESSAGES: {"model": "main", "messages": HELLO, "max_tokens": 9},
    RESPONSES: {"model": "main", "input": "hello"},
}


def ask(gateway: GatewayServer, path: str = CHAT, headers: Any = None, **more: Any) -> httpx.Response:
    return httpx.post(gateway.url + path, json={**BODIES[path], **more}, headers=headers, timeout=5.0)


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
        holding.join(5.0)


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
        holding.join(5.0)


def test_a_spent_budget(engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    limits = Limits(tenants={"acme": Limit(calls=1, per_s=60)})
    with GatewayServer(make_orla(at(engine), limits=limits)) as gateway:
        assert ask(gateway, headers={"x-orla-tenant": "acme"}).status_code == 200
        answer = ask(gateway, MESSAGES, headers={"x-orla-tenant": "acme"})
        assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 60
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


@pytest.mark.parametrize("status", [400, 401, 413, 422])
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


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b'"x"', b"[" * 100_000, b'{"a":"\xff"}'])
def test_a_body_that_is_no_object(gateway: GatewayServer, content: bytes) -> None:
    answer = raw(gateway, content)
    assert answer.status_code == 400 and "body" in message_in(answer, CHAT)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_page_elsewhere_could_post_is_refused(gateway: GatewayServer, kind: str) -> None:
    answer = raw(gateway, json.dumps(BODIES[CHAT]).encode(), content_type=kind)
    assert answer.status_code == 415 and "application/json" in message_in(answer, CHAT)


def test_a_body_that_is_too_long(engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    with GatewayServer(make_orla(at(engine)), settings=GatewaySettings(max_body_bytes=1000)) as gateway:
        body = json.dumps({**BODIES[CHAT], "user": "x" * 2000}).encode()
        assert raw(gateway, body).status_code == 413
        pieces = httpx.post(
            gateway.url + CHAT, content=iter([body[:900], body[900:]]), headers={"content-type": "application/json"}
        )
        assert pieces.status_code == 413 and not engine.chats


def test_a_body_that_does_not_come(engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    with GatewayServer(make_orla(at(engine)), settings=GatewaySettings(body_timeout_s=0.1)) as gateway:
        port = int(gateway.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=5.0) as connection:
            connection.sendall(
                f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{{".encode()
            )
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_metadata_and_messages_of_any_shape_never_break_it(gateway: GatewayServer) -> None:
    for odd in (None, 7, "x", [], {"orla": 7}, {"orla.stage": {}}, {"orla": {"stage": []}}, {"user_id": "{"}):
        assert ask(gateway, metadata=odd, nvext=odd, program_id=odd).status_code == 200
    for path, field in ((CHAT, "messages"), (MESSAGES, "messages"), (RESPONSES, "input")):
        for odd in (7, {}, [7], [None], [{"role": 7}]):
            assert ask(gateway, path, **{field: odd}).status_code < 600  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("headers", "metadata"),
    [({"x-orla-priority": "high"}, {}), ({"x-orla-deadline-ms": "-1"}, {}), ({"x-orla-cache": "maybe"}, {}),
     ({"x-orla-priority": "nan"}, {}), ({"x-orla-mapping": "nowhere"}, {}), ({}, {"orla.priority": "high"})],
)  # fmt: skip
def test_hints_of_our_own_that_cannot_be(gateway: GatewayServer, headers: Any, metadata: Any) -> None:
    answer = ask(gateway, headers=headers, metadata=metadata)
    assert answer.status_code == 400 and message_in(answer, CHAT)
    assert not gateway.records()


class Denied(Exception):
    status, retry_after_s = 401, None


class NoAccess(OpenAccess):
    def __init__(self, status: int, retry_after_s: float | None) -> None:
        super().__init__()
        self.denied = Denied("this key is not known")
        self.denied.status, self.denied.retry_after_s = status, retry_after_s  # type: ignore[misc,assignment]

    def admit(self, headers: Any, *, scope: Any, loopback: bool) -> Any:
        whole_number("status", self.denied.status)
        raise self.denied


@pytest.mark.parametrize(("status", "retry_after_s"), [(401, None), (403, None), (421, None), (429, 2.5)])
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_a_caller_that_may_not(
    engine: StubEngine, make_orla: Callable[..., Orla], status: int, retry_after_s: float | None, path: str
) -> None:
    with GatewayServer(make_orla(at(engine)), access=NoAccess(status, retry_after_s)) as gateway:
        answer = ask(gateway, path)
        assert answer.status_code == status and message_in(answer, path) == "this key is not known"
        assert answer.headers.get("retry-after") == (None if retry_after_s is None else "3")
        assert httpx.get(gateway.url + "/v1/models").status_code == status
        assert not engine.chats
