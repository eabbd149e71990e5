"""Which tools of a request by Anthropic's Messages the model may call: what the conversation adds and takes away."""

from __future__ import annotations

from typing import Any

import pytest

from orla_lg.wires.messages import MESSAGES
from orla_lg.wires.wire import Untranslatable


def a_tool(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "input_schema": {"type": "object"}, **more}


LATER = a_tool("later", defer_loading=True)
BASH = a_tool("bash")
SEARCH = {"type": "tool_search_tool_bm25_20251119", "name": "tool_search_tool_bm25"}
CALLED = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "find", "input": {}}]}


def found(*names: str, key: str = "tool_name") -> dict[str, Any]:
    parts = [{"type": "tool_reference", key: name} for name in names]
    return {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": parts}]}


def changed(kind: str, tool: Any) -> dict[str, Any]:
    return {"role": "system", "content": [{"type": kind, "tool": tool}]}


def by_reference(name: str) -> dict[str, Any]:
    return {"type": "tool_reference", "name": name}


def by_value(name: str) -> dict[str, Any]:
    return {"type": "tool_definition", "definition": a_tool(name)}


def names_in(tools: list[Any], *messages: Any) -> list[str]:
    body = {"model": "m", "max_tokens": 8, "tools": tools, "messages": [{"role": "user", "content": "hi"}, *messages]}
    chat = MESSAGES.to_chat(body)
    seen = [tool["function"]["name"] for tool in MESSAGES.ask_of(body).schemas]
    named = [tool["function"]["name"] for tool in chat.get("tools", [])]
    assert seen == named  # as the core sees it, too
    return named


@pytest.mark.parametrize(
    ("tools", "messages", "names"),
    [
        ([BASH, LATER], [], ["bash"]),
        ([LATER], [], []),
        ([BASH, LATER], [CALLED, found("later")], ["bash", "later"]),
        ([BASH, LATER], [CALLED, found("later", key="name")], ["bash", "later"]),
        ([BASH, LATER], [CALLED, found("another")], ["bash"]),
        ([BASH, LATER], [changed("tool_addition", by_reference("later"))], ["bash", "later"]),
        ([BASH], [changed("tool_addition", by_value("new"))], ["bash", "new"]),
        ([BASH], [changed("tool_addition", by_value("bash"))], ["bash"]),
        ([BASH, LATER], [changed("tool_removal", by_reference("bash"))], []),
        (
            [BASH],
            [changed("tool_removal", by_reference("bash")), changed("tool_addition", by_reference("bash"))],
            ["bash"],
        ),
        ([BASH], [changed("tool_addition", by_value("new")), changed("tool_removal", by_reference("new"))], ["bash"]),
        ([BASH], [changed("tool_removal", None), changed("tool_removal", {"name": ["x"]})], ["bash"]),
    ],
)
def test_the_tools_at_the_end_of_the_conversation(tools: list[Any], messages: list[Any], names: list[str]) -> None:
    assert names_in(tools, *messages) == names


def test_a_reference_is_said_to_the_model() -> None:
    """A result without a text would say that nothing was found."""
    chat = MESSAGES.to_chat({"tools": [LATER], "messages": [CALLED, found("later")]})
    assert chat["messages"][-1] == {
        "role": "tool", "tool_call_id": "t1", "content": "The tool later can be called now.",
    }  # fmt: skip


def test_a_message_of_changes_alone_is_no_message() -> None:
    chat = MESSAGES.to_chat({"tools": [BASH], "messages": [changed("tool_removal", by_reference("bash"))]})
    assert chat == {"messages": []}


@pytest.mark.parametrize(
    ("tools", "names"),
    [
        ([BASH, SEARCH, LATER], ["bash", "later"]),
        ([BASH, LATER], ["bash"]),
        ([{"type": "web_search_20260209", "name": "web_search"}, BASH], ["bash"]),
        ([BASH, a_tool("code_only", allowed_callers=["code_execution_20250825"])], ["bash"]),
        ([SEARCH], []),
        ([a_tool("typed", type="custom"), {"type": "bash_20250124", "name": "bash"}], ["typed"]),
    ],
)
def test_without_what_is_only_offered(tools: list[Any], names: list[str]) -> None:
    body = {"tools": tools, "messages": [{"role": "user", "content": "hi"}]}
    chat = MESSAGES.to_chat(MESSAGES.essentials(body))
    assert [tool["function"]["name"] for tool in chat.get("tools", [])] == names
    assert body["tools"] is tools


@pytest.mark.parametrize("asked", [{"mcp_servers": [{"url": "http://x"}]}, {"container": "c"}])
def test_what_is_asked_for_is_no_offer(asked: dict[str, Any]) -> None:
    with pytest.raises(Untranslatable):
        MESSAGES.to_chat(MESSAGES.essentials({"messages": [{"role": "user", "content": "hi"}], **asked}))
