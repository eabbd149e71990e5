"""Real clients, through the gateway, against stub engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from orla_lg import Orla
from tests.conftest import at
from tests.serve.gateway.served import GatewayServer
from tests.stub_engine import StubEngine

HELLO: Any = [{"role": "user", "content": "hello"}]
SAID = "1 user said: hello"


@pytest.fixture
def gateway(engine: StubEngine, make_orla: Callable[..., Orla]) -> Iterator[GatewayServer]:
    with GatewayServer(make_orla(at(engine))) as served:
        yield served


@pytest.fixture
def client(gateway: GatewayServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="the-callers", max_retries=0) as client:
        yield client


def test_a_chat_completion(client: openai.OpenAI, gateway: GatewayServer) -> None:
    raw = client.chat.completions.with_raw_response.create(model="main", messages=HELLO)
    assert raw.parse().choices[0].message.content == SAID
    assert raw.headers["x-orla-backend"] == "main"
    assert float(raw.headers["x-orla-queue-wait-ms"]) >= 0
    (record,) = gateway.ended()
    assert (record.backend, record.error, record.prompt_tokens) == ("main", None, raw.parse().usage.prompt_tokens)


def test_a_stream(client: openai.OpenAI, gateway: GatewayServer) -> None:
    chunks = list(client.chat.completions.create(model="auto", messages=HELLO, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == SAID
    (record,) = gateway.ended()
    assert record.error is None and record.completion_tokens and record.ttft_s is not None
