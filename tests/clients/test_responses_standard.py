"""LangChain's own tests for ChatOpenAI on the Responses API: bare and in a wrapped graph's node, they end alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI

from orla_lg import Backend, Orla
from tests.clients.standard import CUSTOMER, Alike, both_ways
from tests.conftest import BACKEND_KEY, CALLER_KEY
from tests.wire.machine import Machine
from tests.wires.chatting_server import ChattingServer
from tests.wires.responses_server import MODEL, ResponsesServer, Turn, usual_turn


def script(body: dict[str, Any]) -> Turn:
    """Answer as these tests expect."""
    if any(tool.get("name") == "unicode_customer" for tool in body.get("tools") or ()):
        return Turn(calls=(("unicode_customer", json.dumps(CUSTOMER)),))
    return usual_turn(body)


class Standard(Alike):
    """On a server of the Responses API."""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _serve(cls) -> Iterator[None]:
        def backend(server: Any) -> Backend:
            return Backend("main", server.url, model=MODEL, api_key=BACKEND_KEY)

        with (
            ResponsesServer(script, machine=Machine(token_s=0)) as theirs,
            ResponsesServer(script, machine=Machine(token_s=0)) as native,
            ChattingServer(script, machine=Machine(token_s=0)) as chatting,
            Orla([backend(native)], mapper={"*": "main"}) as one,
            Orla([backend(chatting)], mapper={"*": "main"}) as other,
        ):
            cls.theirs, cls.cores = theirs, ((one, native), (other, chatting))
            yield

    @staticmethod
    def asked(server: ResponsesServer | ChattingServer) -> int:
        return len(server.bodies())

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        named = {"model": MODEL, "base_url": self.theirs.url, "api_key": CALLER_KEY}
        return {**named, "max_retries": 0, "use_responses_api": True}

    @property
    def supports_image_inputs(self) -> bool:
        return True

    @property
    def supports_image_tool_message(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True


TestStandard = both_ways(Standard)
