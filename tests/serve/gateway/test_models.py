"""Models, token counts, and what clients ask beside their calls."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from orla_lg import Orla
from tests.conftest import CALLER_KEY, at
from tests.serve.gateway.served import GatewayServer
from tests.stub_engine import MODEL, StubEngine
from tests.wire.machine import Machine
from tests.wire.vllm_server import VLLMServer

anthropic = pytest.importorskip("anthropic")

HELLO: Any = [{"role": "user", "content": "hello"}]


def test_models_for_both_kinds_of_clients(engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    orla = make_orla(at(engine, aliases=["gpt-x"]), at(engine, "other"))
    orla.connect()
    with GatewayServer(orla) as gateway:
        client = openai.OpenAI(base_url=gateway.url + "/v1", api_key=CALLER_KEY)
        assert [model.id for model in client.models.list()] == ["auto", "main", "other", MODEL, "gpt-x"]
        assert client.models.retrieve("gpt-x").owned_by == "main"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nowhere")
        claude = anthropic.Anthropic(base_url=gateway.url, api_key=CALLER_KEY)
        assert [model.id for model in claude.models.list()] == ["auto", "main", "other", MODEL, "gpt-x"]
        assert claude.models.retrieve("main").display_name == "main"
        assert httpx.get(gateway.url + "/w/mine/s/plan/v1/models").json()["object"] == "list"


def test_tokens_are_counted_by_the_prompts_length(gateway: GatewayServer, engine: StubEngine) -> None:
    claude = anthropic.Anthropic(base_url=gateway.url, api_key=CALLER_KEY)
    short = claude.messages.count_tokens(model="main", messages=HELLO).input_tokens
    long = claude.messages.count_tokens(model="main", messages=[{"role": "user", "content": "word " * 400}])
    assert 1 <= short < 20 and 400 <= long.input_tokens < 700
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.count_tokens(model="nowhere", messages=HELLO)
    assert not engine.chats and not gateway.records()


def test_tokens_are_counted_by_the_engine_where_it_can(make_orla: Callable[..., Orla]) -> None:
    from orla_lg import Backend

    with VLLMServer(machine=Machine(running=2, token_s=0.0)) as server:
        orla = make_orla(Backend("main", server.url, engine="vllm"))
        orla.connect()
        with GatewayServer(orla) as gateway:
            body = {"model": "main", "messages": [{"role": "user", "content": "one two three"}]}
            counted = httpx.post(gateway.url + "/v1/messages/count_tokens", json=body).json()["input_tokens"]
            before = [seen for seen in server.requests if seen.path == "/tokenize" and "messages" in seen.body]
            assert len(before) == 1 and counted >= 3


def test_greetings(gateway: GatewayServer) -> None:
    assert httpx.head(gateway.url + "/").status_code == 200
    assert httpx.get(gateway.url + "/").json()["models"] == "/v1/models"
    assert httpx.get(gateway.url + "/v1/chat/completions").status_code == 405
    assert httpx.post(gateway.url + "/w/a/v1/nothing", json={}).status_code == 404
    assert httpx.get(gateway.url + "/w/a/v1/messages").status_code == 405


def test_a_path_may_name_workflow_and_stage_whatever_they_hold(gateway: GatewayServer) -> None:
    body = {"model": "main", "messages": HELLO}
    for path in ("/w/team%2Fa/v1", "/w/b/s/plan%20one/v1", "/w/c/s/v1/v1"):
        httpx.post(f"{gateway.url}{path}/chat/completions", json=body).raise_for_status()
    first, second, third = gateway.ended(3)
    assert (first.workflow, first.stage) == ("team/a", "")
    assert second.workflow == "b" and second.stage.startswith("plan-one~")
    assert (third.workflow, third.stage) == ("c", "v1")


def test_a_client_that_takes_a_prefix_as_its_base_url(gateway: GatewayServer) -> None:
    with openai.OpenAI(base_url=gateway.url + "/w/mine/s/plan/v1", api_key=CALLER_KEY) as client:
        client.chat.completions.create(model="main", messages=HELLO)
        client.responses.create(model="main", input="hello", store=False)
    with anthropic.Anthropic(base_url=gateway.url + "/w/mine/s/plan", api_key=CALLER_KEY) as claude:
        claude.messages.create(model="main", messages=HELLO, max_tokens=9)
        assert claude.messages.count_tokens(model="main", messages=HELLO).input_tokens
    assert {(record.workflow, record.stage) for record in gateway.ended(3)} == {("mine", "plan")}


def test_an_upgrade_is_refused_at_once(gateway: GatewayServer) -> None:
    port = int(gateway.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=2.0) as connection:
        connection.sendall(
            b"GET /v1/responses HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        status = connection.recv(1000).split(b" ")[1]
        assert 400 <= int(status) < 500


def test_answers_are_json_to_the_last_byte(gateway: GatewayServer) -> None:
    for path in ("/", "/v1/models", "/v1/models/main", "/v1/models/nowhere", "/w/x/v1/models"):
        answer = httpx.get(gateway.url + path)
        assert int(answer.headers["content-length"]) == len(answer.content) and json.loads(answer.content)
