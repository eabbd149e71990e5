"""A request by OpenAI's Responses without what it only offers or allows."""

from __future__ import annotations

from typing import Any

import pytest

from orla_lg.wires.responses import RESPONSES
from orla_lg.wires.wire import Untranslatable

SHELL = {"type": "function", "name": "shell", "parameters": {"type": "object"}}
FOREIGN: list[dict[str, Any]] = [
    {"type": "web_search"},
    {"type": "namespace", "name": "agents", "tools": [SHELL]},
    {"type": "custom", "name": "apply_patch"},
    {"type": "function", "name": "by_code", "allowed_callers": ["programmatic"]},
    {"name": "without a type"},
]


def said(**body: Any) -> dict[str, Any]:
    return RESPONSES.to_chat(RESPONSES.essentials({"input": "hi", **body}))


def test_tools_other_than_functions_are_left_out() -> None:
    assert [tool["function"]["name"] for tool in said(tools=[*FOREIGN, SHELL])["tools"]] == ["shell"]
    assert "tools" not in said(tools=FOREIGN, tool_choice="auto", parallel_tool_calls=True)
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}, {**SHELL}]}
    assert said(tools=[*FOREIGN, SHELL], tool_choice=choice)["tool_choice"] == "auto"


def test_what_else_may_be_included_is_left_out() -> None:
    assert "include" not in said(include=["reasoning.encrypted_content", "a.thing.of.tomorrow", 7])
    assert "context_management" not in said(context_management=[{"type": "compaction"}])
    assert "client_metadata" not in said(client_metadata={"session_id": "s"})


def test_a_call_in_a_namespace_is_a_call() -> None:
    """It was made by a backend of the caller's wire, in the same conversation."""
    call = {"type": "function_call", "call_id": "c", "name": "spawn", "arguments": "{}", "namespace": "agents"}
    output = {"type": "function_call_output", "call_id": "c", "output": "done"}
    messages = said(input=[{"role": "user", "content": "hi"}, call, output])["messages"]
    assert messages[1]["tool_calls"][0]["function"]["name"] == "spawn"


@pytest.mark.parametrize(
    "asked",
    [
        {"previous_response_id": "resp_1"},
        {"conversation": "conv_1"},
        {"background": True},
        {"prompt": {"id": "pmpt_1"}},
        {"tools": ["no tool at all"]},
        {"tools": {"not": "a list"}},
        {"tool_choice": {"type": "web_search"}},
        {"include": "no list"},
    ],
)
def test_what_is_asked_for_is_no_offer(asked: dict[str, Any]) -> None:
    with pytest.raises(Untranslatable):
        said(**asked)


def test_the_request_itself_stays_as_it_is() -> None:
    body = {"input": [{"role": "user", "content": "hi"}], "tools": [*FOREIGN], "include": ["x"]}
    before = repr(body)
    RESPONSES.essentials(body)
    assert repr(body) == before
