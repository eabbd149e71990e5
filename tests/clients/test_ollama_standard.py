"""LangChain's own tests for ChatOllama: bare and in a node of a wrapped graph, they end alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_ollama import ChatOllama

from orla_lg import Orla
from tests.clients.ollama_graphs import OURS, THEIRS, backend, model, served
from tests.clients.standard import CUSTOMER, Alike, both_ways
from tests.wire.ollama_native import Said
from tests.wire.ollama_server import OllamaServer

EXPECTED: dict[str, dict[str, Any]] = {
    "magic_function": {"input": 3},
    "unicode_customer": CUSTOMER,
}
"""Arguments that the tests expect of a model."""


def script(asked: dict[str, Any]) -> Said:
    """Answer by rule, and call the tools of these tests with what they expect."""
    said = model(asked)
    if (asked.get("response_format") or {}).get("type") == "json_object":
        return Said('{"setup": "knock", "punchline": "who"}')
    return Said(said.text, said.thinking, tuple((name, EXPECTED.get(name, given)) for name, given in said.calls))


class Standard(Alike):
    """On a scripted Ollama; its features are those that langchain-ollama's own run of these tests names, without
    images, which the tests would load from the network."""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _serve(cls) -> Iterator[None]:
        with (
            served(THEIRS, script=script) as theirs,
            served(OURS, script=script) as native,
            served(OURS, script=script, native=False) as chat,
            Orla([backend(native)], mapper={"*": "main"}) as one,
            Orla([backend(chat)], mapper={"*": "main"}) as other,
        ):
            cls.theirs, cls.cores = theirs, ((one, native), (other, chat))
            yield

    @staticmethod
    def asked(server: OllamaServer) -> int:
        paths = ("/api/chat", "/v1/chat/completions")
        return len([seen for seen in server.requests if seen.path in paths and seen.body])

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOllama

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": THEIRS, "base_url": self.theirs.root}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return False


TestStandard = both_ways(Standard)
