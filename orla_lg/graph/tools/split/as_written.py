"""Messages as LangChain's client for OpenAI's chat completions will write them into the next prompt.

It writes arguments of tool calls anew and leaves out what it does not know, in two private functions. Without them,
or where they fail, nothing is predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

from langchain_core.messages import BaseMessage, ToolMessage

UNREADABLE = (AttributeError, KeyError, TypeError, ValueError)
"""What the functions raise for what is none of their messages."""


class Converters(NamedTuple):
    """The functions that make the next prompt's messages."""

    read: Callable[[Mapping[str, Any]], BaseMessage]
    write: Callable[[BaseMessage], dict[str, Any]]
    content: Callable[[Any], str | list[Any]]
    """What a ``ToolNode`` makes of a result's content."""


@cache
def _converters() -> Converters | None:
    try:
        from langchain_openai.chat_models.base import _convert_dict_to_message, _convert_message_to_dict
        from langgraph.prebuilt.tool_node import msg_content_output
    except ImportError:
        return None
    return Converters(_convert_dict_to_message, _convert_message_to_dict, msg_content_output)


def answer_message(message: Mapping[str, Any], name: str | None = None) -> dict[str, Any] | None:
    """Return a model's answer as the next prompt will have it; ``None`` where that is not known.

    Args:
        message: Of a chat completion.
        name: That the graph gives to its answers.
    """
    if (converters := _converters()) is None:
        return None
    try:
        made = converters.read(message)
        made.name = name if made.name is None else made.name
        return converters.write(made)
    except UNREADABLE:  # private functions of another package, and an engine's answer: nothing is predicted
        return None


def result_message(output: Any, call_id: str) -> dict[str, Any] | None:
    """Return a tool's output as the next prompt will have it; ``None`` where that is not known.

    Args:
        output: As ``on_tool_end`` has it: a ``ToolMessage``, or what a tool returned that was called without a call's
            id. What a ``Command`` leads to is not known.
        call_id: Of its tool call.
    """
    if isinstance(output, str):
        output = ToolMessage(output, tool_call_id=call_id)
    converters = _converters()
    if converters is None or not isinstance(output, ToolMessage) or output.tool_call_id != call_id:
        return None
    try:
        return converters.write(ToolMessage(converters.content(output.content), tool_call_id=call_id))
    except UNREADABLE:  # private functions of another package, and a tool's output: nothing is predicted
        return None
