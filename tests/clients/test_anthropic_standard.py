"""LangChain's own tests for ChatAnthropic: bare and in a node of a wrapped graph, they end alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_anthropic import ChatAnthropic, _client_utils
from langchain_core.language_models import BaseChatModel

from orla_lg import Backend, Orla
from tests.clients.standard import CUSTOMER, Alike, both_ways
from tests.conftest import BACKEND_KEY, CALLER_KEY
from tests.wires.messages_server import BOTH, MODEL, Answer, MessagesServer, tool_use


@pytest.fixture(autouse=True)
def _own_http_clients() -> Iterator[None]:
    """LangChain keeps HTTP clients by URL, beyond their loop."""
    yield
    _client_utils._get_default_httpx_client.cache_clear()
    _client_utils._get_default_async_httpx_client.cache_clear()


def script(body: dict[str, Any]) -> Answer | None:
    """Call the tools of these tests with what they expect."""
    tool: dict[str, Any] = next(iter(body.get("tools") or []), {})
    name = (tool.get("function") or tool).get("name")
    if name == "magic_function":
        return Answer((tool_use("magic_function", input=3),))
    if name == "unicode_customer":
        return Answer((tool_use("unicode_customer", **CUSTOMER),))
    return None


class Standard(Alike):
    """On a server of Messages."""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _serve(cls) -> Iterator[None]:
        with (
            MessagesServer(script) as theirs,
            MessagesServer(script, speaks=BOTH) as native,
            MessagesServer(script, speaks=frozenset({"chat"})) as chat,
            Orla([Backend("main", native.url, model=MODEL, api_key=BACKEND_KEY)], mapper={"*": "main"}) as one,
            Orla([Backend("main", chat.url, model=MODEL, api_key=BACKEND_KEY)], mapper={"*": "main"}) as other,
        ):
            cls.theirs, cls.cores = theirs, ((one, native), (other, chat))
            yield

    @staticmethod
    def asked(server: MessagesServer) -> int:
        return len(server.served)

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatAnthropic

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": MODEL, "base_url": self.theirs.root, "api_key": CALLER_KEY, "max_retries": 0}

    @property
    def supports_image_inputs(self) -> bool:
        return True

    @property
    def supports_image_tool_message(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True


TestStandard = both_ways(Standard)
