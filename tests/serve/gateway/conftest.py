"""A gateway over an Orla with one backend, ``main``, at a stub engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import openai
import pytest

from orla_lg import Orla
from tests.conftest import CALLER_KEY, at
from tests.serve.gateway.served import GatewayServer
from tests.stub_engine import StubEngine


@pytest.fixture
def gateway(engine: StubEngine, make_orla: Callable[..., Orla]) -> Iterator[GatewayServer]:
    with GatewayServer(make_orla(at(engine))) as served:
        yield served


@pytest.fixture
def client(gateway: GatewayServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key=CALLER_KEY, max_retries=0) as client:
        yield client
