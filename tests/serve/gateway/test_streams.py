"""Streams, and answers that break: what the caller gets, what the engine sees, and what becomes of the grant."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from orla_lg import Backend, Orla
from orla_lg.core.engine.retry import RetryPolicy
from orla_lg.serve.gateway.settings import GatewaySettings
from orla_lg.testing.faults import Fault
from tests.conftest import at
from tests.openai_api.raw_engine import Answer, RawEngine, whole
from tests.serve.gateway.served import GatewayServer
from tests.stub_engine import MODEL, OK, Gate, Reply, StubEngine

HELLO: Any = [{"role": "user", "content": "hello"}]
PATIENCE_S = 60.0


def spoken(body: dict[str, Any]) -> dict[str, Any] | list[bytes]:
    """Return a Messages answer, whole or streamed, as an engine with its own habits writes it."""
    usage = {"input_tokens": 3, "output_tokens": 2}
    whole = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"], "stop_reason": "end_turn",
             "content": [{"type": "text", "text": "hé"}], "usage": usage, "extra": None}  # fmt: skip
    if not body.get("stream"):
        return whole
    delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hé"}}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {**whole, "content": []}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        delta,
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
        {"type": "message_stop"},
    ]
    return [f"event: {each['type']}\ndata:   {json.dumps(each)}\n\n".encode() for each in events]


def responded(body: dict[str, Any]) -> dict[str, Any] | list[bytes]:
    whole = {"id": "resp_1", "object": "response", "status": "completed", "output": [], "model": body["model"],
             "usage": {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}}  # fmt: skip
    if not body.get("stream"):
        return whole
    kinds = {"response.created": {**whole, "status": "in_progress"}, "response.completed": whole}
    return [
        f"event: {kind}\ndata: {json.dumps({'type': kind, 'response': response}, indent=None)}\n\n".encode()
        for kind, response in kinds.items()
    ]


def completed(body: dict[str, Any]) -> dict[str, Any] | list[bytes]:
    choice = {"index": 0, "text": "é", "finish_reason": "stop"}
    whole = {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}
    if not body.get("stream"):
        return whole
    return [b"data: " + json.dumps(whole).encode() + b"\r\n\r\n", b": a comment\n\n", b"data: [DONE]\n\n"]


def embedded(body: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.1]}], "model": "m"}


SPEAKS: Any = {
    "/v1/messages": spoken, "/v1/responses": responded, "/v1/completions": completed, "/v1/embeddings": embedded,
}  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "héllo \U0001f600"}], "top_p": 1.0},
    "/v1/messages": {"messages": HELLO, "max_tokens": 9},
    "/v1/responses": {"input": "hello"},
    "/v1/completions": {"prompt": "hello"},
    "/v1/embeddings": {"input": "hello"},
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", BODIES)
def test_the_answer_is_the_engines_byte_for_byte(make_orla: Callable[..., Orla], path: str, stream: bool) -> None:
    counted = {"stream_options": {"include_usage": True}} if path == "/v1/chat/completions" else {}
    body = {**BODIES[path], **({"stream": True, **counted} if stream and "embeddings" not in path else {})}
    with StubEngine(speaks=SPEAKS) as engine, GatewayServer(make_orla(at(engine))) as gateway:
        through = httpx.post(gateway.url + path, json={"model": "main", **body})
        (record,) = gateway.ended()
        direct = httpx.post(engine.url.removesuffix("/v1") + path, json={"model": MODEL, **body})
        assert through.status_code == direct.status_code == 200
        assert through.content == direct.content
        assert through.headers["content-type"] == direct.headers["content-type"]
        assert record.error is None


def test_pieces_come_as_the_engine_sends_them(engine: StubEngine, gateway: GatewayServer) -> None:
    gate = Gate()
    engine.rule = lambda seen: Reply(mid_gate=gate)
    body = {"model": "main", "messages": HELLO, "stream": True}
    with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=body) as answer:
        coming = answer.iter_raw()
        assert b"content" in next(coming)  # and the engine has not sent more
        gate.open()
        assert b"[DONE]" in b"".join(coming)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "fault",
    [Fault.DEAD_BEFORE_HEADERS, Fault.RESET, Fault.DEAD_IN_PREFILL, Fault.OVERLOADED, Fault.BROKEN, Fault.HTML_PAGE],
)
def test_what_fails_before_the_first_token_is_tried_again(
    make_orla: Callable[..., Orla], fault: Fault, stream: bool
) -> None:
    left = [fault]
    engine = StubEngine(rule=lambda seen: Reply(fault=left.pop(), status=_status(fault)) if left else OK)
    with engine, GatewayServer(make_orla(at(engine))) as gateway:
        gateway.orla.core.serving.services.retries = RetryPolicy(base_s=0.01)
        body = {"model": "main", "messages": HELLO, "stream": stream}
        answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=PATIENCE_S)
        assert answer.status_code == 200 and "hello" in answer.text
        (record,) = gateway.ended()
        assert (record.attempts, record.error, len(engine.chats)) == (2, None, 2)


def _status(fault: Fault) -> int:
    return {Fault.OVERLOADED: 503, Fault.BROKEN: 500}.get(fault, 200)


@pytest.mark.parametrize("wire", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("fault", [Fault.DEAD_MID_STREAM, Fault.NO_DONE])
def test_an_engine_that_dies_mid_stream_breaks_the_connection(
    engine: StubEngine, gateway: GatewayServer, fault: Fault, wire: str
) -> None:
    engine.rule = lambda seen: Reply(fault=fault, text="one two three four five six")
    body = {"model": "main", "messages": HELLO, "stream": True, "max_tokens": 99}
    with (
        pytest.raises(httpx.RemoteProtocolError),
        httpx.stream("POST", gateway.url + wire, json=body, timeout=PATIENCE_S) as answer,
    ):
        assert answer.status_code == 200
        answer.read()
    (record,) = gateway.ended()
    assert record.error and record.attempts == 1
    assert gateway.orla.core.serving.schedulers["main"].queue.in_flight == 0


@pytest.mark.parametrize("when", ["before the first token", "in the stream", "in a whole answer"])
def test_a_client_that_goes_ends_the_engines_work(engine: StubEngine, gateway: GatewayServer, when: str) -> None:
    gate = Gate()
    engine.rule = lambda seen: Reply(mid_gate=gate) if when == "in the stream" else Reply(gate=gate)
    body = json.dumps({"model": "main", "messages": HELLO, "stream": when != "in a whole answer"}).encode()
    port = int(gateway.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n" \
               f"content-length: {len(body)}\r\n\r\n"  # fmt: skip
        connection.sendall(head.encode() + body)
        engine.wait(lambda engine: engine.in_flight == 1)
        if when == "in the stream":
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    engine.wait(lambda engine: engine.in_flight == 0)
    (record,) = gateway.ended()
    assert record.error == (
        "abandoned" if when == "in the stream" else "CancelledError: the client closed its connection"
    )
    assert gateway.orla.core.serving.schedulers["main"].queue.in_flight == 0
    gate.open()


def test_a_client_that_goes_while_its_call_waits_leaves_the_queue(
    engine: StubEngine, make_orla: Callable[..., Orla]
) -> None:
    gate = Gate()
    engine.rule = lambda seen: Reply(gate=gate)
    with GatewayServer(make_orla(at(engine, max_concurrency=1))) as gateway, httpx.Client() as first:
        queue = gateway.orla.core.serving.schedulers["main"].queue
        body = {"model": "main", "messages": HELLO}
        asking = threading.Thread(
            target=lambda: first.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=PATIENCE_S)
        )
        asking.start()
        engine.wait(lambda engine: engine.in_flight == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=0.2)
        deadline = time.monotonic() + PATIENCE_S
        while queue.waiting and time.monotonic() < deadline:
            time.sleep(0.005)
        assert queue.waiting == 0
        gate.open()
        asking.join(PATIENCE_S)
        assert sorted(bool(record.error) for record in gateway.ended(2)) == [False, True]
        assert len(engine.chats) == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_engine_that_says_nothing_is_given_up(
    engine: StubEngine, make_orla: Callable[..., Orla], stream: bool
) -> None:
    engine.rule = lambda seen: Reply(fault=Fault.HANG)
    settings = GatewaySettings(answer_timeout_s=0.15, max_attempts=1)
    with GatewayServer(make_orla(at(engine)), settings=settings) as gateway:
        body = {"model": "main", "messages": HELLO, "stream": stream}
        answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=PATIENCE_S)
        assert answer.status_code == 504 and "said nothing" in answer.json()["error"]["message"]
        engine.wait(lambda engine: engine.in_flight == 0)


def test_an_engine_that_falls_silent_in_a_stream_breaks_it(
    engine: StubEngine, make_orla: Callable[..., Orla]
) -> None:
    gate = Gate()
    engine.rule = lambda seen: Reply(mid_gate=gate)
    with GatewayServer(make_orla(at(engine)), settings=GatewaySettings(answer_timeout_s=0.15)) as gateway:
        body = {"model": "main", "messages": HELLO, "stream": True}
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=PATIENCE_S)
        (record,) = gateway.ended()
        assert "said nothing" in record.error
        gate.open()


def test_a_large_request_passes(engine: StubEngine, gateway: GatewayServer) -> None:
    body = {"model": "main", "messages": [{"role": "user", "content": "word " * 500_000}]}
    answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=20)
    assert answer.status_code == 200
    assert engine.chats[0].body["messages"] == body["messages"]


def test_a_redirect_elsewhere_is_not_followed(make_orla: Callable[..., Orla]) -> None:
    with RawEngine(lambda asked: whole()) as other, RawEngine(lambda asked: whole()) as engine:
        orla = make_orla(Backend("main", engine.url, model="m", api_key="k"))
        with GatewayServer(orla) as gateway:
            ask: Any = {"model": "main", "messages": HELLO}
            engine.rule = lambda asked: Answer(b"", status=307, headers={"location": f"{other.url}/chat/completions"})
            refused = httpx.post(f"{gateway.url}/v1/chat/completions", json=ask)
            assert refused.status_code == 502 and "redirects to" in refused.text and not other.asked
            moved = Answer(b"", status=307, headers={"location": "/v2/chat/completions"})
            engine.rule = lambda asked: whole() if asked.path.startswith("/v2") else moved
            assert httpx.post(f"{gateway.url}/v1/chat/completions", json=ask).status_code == 200
