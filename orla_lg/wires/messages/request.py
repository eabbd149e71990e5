"""A request of Anthropic's Messages as one of chat completions.

Messages, tools and images are in the very form in which ``ChatOpenAI`` sends them, key by key, so that a conversation
is the same prefix whichever client sends it. What chat completions cannot say is handed to a ``Refuse``, which raises
where a request is translated and does nothing where it is only looked at. What a caller wrote wrongly stays as it is:
the engine has the better words for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from orla_lg.core.call import OBJECT
from orla_lg.wires.messages.tools import CHANGES, Refuse, chat_tools, essential_tools, reference
from orla_lg.wires.wire import Body, Untranslatable

ATTRIBUTION = "x-anthropic-billing-header"
"""How a system block begins that is no prompt: Claude Code's, with a hash of its own in each request."""

DROPPED = frozenset({
    "betas", "billing_policy", "cache_control", "context_management", "diagnostics", "fallback_credit_token",
    "fallbacks", "inference_geo", "metadata", "model", "service_tier", "speed", "user_profile_id", "workspace_id",
})  # fmt: skip
"""Fields that ask for nothing in the answer that an engine of one's own could give or withhold: it caches by itself,
and cuts no conversation on its side."""
SERVER_SIDE = {
    "container": "a container",
    "mcp_servers": "an MCP server that the API calls",
    "compaction": "a summary that the API makes",
    "thread": "a conversation that the API keeps",
}
"""Fields by which the API does more than to call a model."""
TRANSLATED = frozenset({
    "messages", "system", "tools", "tool_choice", "stop_sequences", "stream", "thinking", "output_config",
    "output_format",
})  # fmt: skip

EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
"""Efforts above ``high`` are known to few engines."""
HIGH_BUDGET, MEDIUM_BUDGET = 10_000, 5_000
"""Tokens of thinking from which on a budget is a high or a medium effort."""

TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def refuse(field: str, what: str) -> None:
    """Raise that a request cannot be said in chat completions."""
    raise Untranslatable(field, what)


def overlook(field: str, what: str) -> None:
    """Take no note of what cannot be said in chat completions."""


def chat_request(body: Body) -> dict[str, Any]:
    """Return a request as a chat completion's, without its model.

    Raises:
        Untranslatable: It asks for what cannot be said there.
    """
    for name, what in SERVER_SIDE.items():
        if body.get(name):
            refuse(name, what)
    left = DROPPED | TRANSLATED | SERVER_SIDE.keys()
    chat = {name: value for name, value in body.items() if name not in left and value is not None}
    chat["messages"] = messages = chat_messages(body, refuse)
    if tools := chat_tools(body, refuse):
        chat["tools"] = tools
        chat |= _tool_choice(body.get("tool_choice"))
    if stops := body.get("stop_sequences"):
        chat["stop"] = stops
    if body.get("stream"):
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
    if (form := response_format(body, refuse)) is not None:
        chat["response_format"] = form
    if (effort := _effort(body)) is not None:
        chat["reasoning_effort"] = effort
    metadata = body.get("metadata")
    if isinstance(metadata, OBJECT) and metadata.get("user_id"):
        chat["user"] = metadata["user_id"]
    if _is_begun(messages):  # the answer goes on where the last message ends
        chat |= {"continue_final_message": True, "add_generation_prompt": False}
    return chat


def essentials(body: Body) -> Body:
    """Return a request without what it only offers to the model: the tools that chat completions cannot describe."""
    return {**body, "tools": essential_tools(body["tools"])} if body.get("tools") else body


def chat_messages(body: Body, refuse: Refuse) -> list[Any]:
    """Return the system prompt and the conversation as messages of chat completions."""
    made: list[Any] = []
    if system := _instructions(body.get("system"), "system", refuse):
        made.append({"content": system, "role": "system"})
    conversation = body.get("messages")
    for number, message in enumerate(conversation if isinstance(conversation, list | tuple) else ()):
        made += _messages(message, f"messages[{number}]", refuse)
    return made


def _messages(message: Any, where: str, refuse: Refuse) -> list[Any]:
    if not isinstance(message, OBJECT):
        return [message]
    role, content = message.get("role"), message.get("content")
    if role == "system":
        text = _instructions(content, f"{where}.content", refuse)
        return [{"content": text, "role": role}] if text else []
    if not isinstance(content, list | tuple):
        return [{"content": content, "role": role}]
    turn = _assistant_turn if role == "assistant" else _user_turn
    return turn(content, f"{where}.content", refuse)


def _instructions(system: Any, where: str, refuse: Refuse) -> Any:
    """Return a system prompt as one text; the engines that speak Messages join its blocks without a break, too."""
    blocks = system if isinstance(system, list | tuple) else [{"type": "text", "text": system}] if system else []
    texts: list[str] = []
    for number, block in enumerate(blocks):
        kind, text = (block.get("type"), block.get("text")) if isinstance(block, OBJECT) else (None, None)
        if not isinstance(text, str):
            if isinstance(kind, str) and kind in CHANGES:
                continue
            refuse(f"{where}[{number}]", f"{_named(block)} in a system prompt")
            text = _dumped(block)
        if not text.startswith(ATTRIBUTION):
            texts.append(text)
    return "".join(texts)


def _user_turn(blocks: Sequence[Any], where: str, refuse: Refuse) -> list[Any]:
    """Return the results of tools first, which must follow the message that called them, then what else was said."""
    results: list[Any] = []
    parts: list[Any] = []
    said: list[Any] = []
    for number, block in enumerate(blocks):
        at = f"{where}[{number}]"
        if isinstance(block, OBJECT) and block.get("type") == "tool_result":
            result, shown = _tool_result(block, at, refuse)
            results.append(result)
            parts += shown
        else:
            said.append(_part(block, at, refuse))
    parts += said
    if parts or not results:
        results.append({"content": _content(parts), "role": "user"})
    return results


def _tool_result(block: Mapping[str, Any], where: str, refuse: Refuse) -> tuple[dict[str, Any], list[Any]]:
    """Return the message that brings a tool's result, and the images in it: such a message holds text alone."""
    content, called = block.get("content"), block.get("tool_use_id")
    texts: list[str] = []
    shown: list[Any] = []
    if isinstance(content, list | tuple):
        for number, each in enumerate(content):
            part = _part(each, f"{where}.content[{number}]", refuse)
            if isinstance(part, OBJECT) and part.get("type") == "image_url":
                shown.append(part)
            else:
                text = part.get("text") if isinstance(part, OBJECT) else None
                texts.append(text if isinstance(text, str) else _dumped(part))
    elif content:
        texts.append(content if isinstance(content, str) else _dumped(content))
    text = "\n".join(texts)
    if block.get("is_error") and not text.lower().startswith("error"):
        text = f"Error: {text}" if text else "Error"
    if shown:
        shown.insert(0, {"type": "text", "text": f"Shown by the tool call {called}:"})
    return {"content": text, "role": "tool", "tool_call_id": called}, shown


def _assistant_turn(blocks: Sequence[Any], where: str, refuse: Refuse) -> list[Any]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for number, block in enumerate(blocks):
        kind = block.get("type") if isinstance(block, OBJECT) else None
        if kind == "thinking":
            thoughts.append(_str(block.get("thinking")))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": _dumped(block.get("input") or {})}
            calls.append({"type": "function", "id": block.get("id"), "function": function})
        elif kind != "redacted_thinking":
            part = _part(block, f"{where}[{number}]", refuse)
            text = part.get("text") if isinstance(part, OBJECT) else None
            texts.append(text if isinstance(text, str) else _dumped(part))
    text = "".join(texts)
    message: dict[str, Any] = {"content": text or (None if calls else ""), "role": "assistant"}
    if calls:
        message["tool_calls"] = calls
    if thought := "".join(thoughts):
        message["reasoning_content"] = thought
    return [message]


def _part(block: Any, where: str, refuse: Refuse) -> Any:
    """Return a block of content as a part of a message."""
    kind = block.get("type") if isinstance(block, OBJECT) else None
    if kind == "text":
        return {"type": "text", "text": block.get("text")}
    if kind == "tool_reference":
        return {"type": "text", "text": f"The tool {reference(block)} can be called now."}
    if kind == "image":
        source = block.get("source")
        if not isinstance(source, OBJECT):
            return block
        if source.get("type") == "base64":
            url = f"data:{source.get('media_type')};base64,{source.get('data')}"
            return {"type": "image_url", "image_url": {"url": url}}
        if source.get("type") == "url":
            return {"type": "image_url", "image_url": {"url": source.get("url")}}
        refuse(f"{where}.source.type", f"an image from a {source.get('type')}")
    elif isinstance(kind, str):
        refuse(f"{where}.type", _named(block))
    return block


def _content(parts: list[Any]) -> Any:
    """Return one text as such, as nearly all clients do, and else the parts."""
    if len(parts) == 1 and isinstance(parts[0], OBJECT) and isinstance(text := parts[0].get("text"), str):
        return text
    return parts


def _tool_choice(choice: Any) -> dict[str, Any]:
    if not isinstance(choice, OBJECT):
        return {} if choice is None else {"tool_choice": choice}
    kind = choice.get("type")
    chosen: Any = TOOL_CHOICES.get(kind, kind) if isinstance(kind, str) else choice
    if kind == "tool":
        chosen = {"type": "function", "function": {"name": choice.get("name")}}
    one_at_a_time = {"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else {}
    return {"tool_choice": chosen} | one_at_a_time


def response_format(body: Body, refuse: Refuse) -> dict[str, Any] | None:
    """Return the schema that an answer must follow."""
    config, where = body.get("output_config"), "output_config.format"
    form = config.get("format") if isinstance(config, OBJECT) else None
    if form is None:
        form, where = body.get("output_format"), "output_format"
    if not isinstance(form, OBJECT):
        return None
    schema = form.get("schema")
    if form.get("type") != "json_schema":
        refuse(f"{where}.type", f"the format {form.get('type')!r}")
    title = schema.get("title") if isinstance(schema, OBJECT) else None
    name = title if isinstance(title, str) and _NAME.fullmatch(title) else "answer"
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}


def _effort(body: Body) -> str | None:
    """Return how much an answer may think: chat completions know an effort, and no budget in tokens."""
    thinking, config = body.get("thinking"), body.get("output_config")
    kind = thinking.get("type") if isinstance(thinking, OBJECT) else None
    if kind == "disabled":
        return "none"
    said = config.get("effort") if isinstance(config, OBJECT) else None
    if isinstance(said, str):
        return EFFORTS.get(said, said)
    budget = thinking.get("budget_tokens") if isinstance(thinking, OBJECT) and kind == "enabled" else None
    if not isinstance(budget, int | float):
        return None
    return "high" if budget >= HIGH_BUDGET else "medium" if budget >= MEDIUM_BUDGET else "low"


def _is_begun(messages: Sequence[Any]) -> bool:
    """Whether the answer is begun already, by a last message of the model's without tool calls."""
    last = messages[-1] if messages else None
    return isinstance(last, OBJECT) and last.get("role") == "assistant" and "tool_calls" not in last


def _named(block: Any) -> str:
    kind = block.get("type") if isinstance(block, OBJECT) else None
    return f"a block of type {kind!r}" if kind is not None else f"{type(block).__name__} instead of a block"


def _str(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError):
        return repr(type(value))
