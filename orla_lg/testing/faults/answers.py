"""Answers made of the question alone, and what they count."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from orla_lg.testing.faults.http import text_of

Message = dict[str, Any]
PIECE_CHARS = 8


def fill(schema: dict[str, Any], text: str, defs: dict[str, Any] | None = None) -> Any:
    """Return a value that follows a JSON schema, made of *text*."""
    defs = schema.get("$defs") or defs or {}
    if "$ref" in schema:
        return fill(defs[schema["$ref"].rpartition("/")[2]], text, defs)
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return fill(schema["anyOf"][0], text, defs)
    kind = schema.get("type")
    if kind == "object":
        return {name: fill(each, text, defs) for name, each in (schema.get("properties") or {}).items()}
    if kind == "array":
        return [fill(schema.get("items") or {}, text, defs)]
    found = re.search(r"\d+", text)  # the number in the question, as a model that can call tools would take it
    number = int(found[0]) if found else len(text)
    return {"integer": number, "number": float(number), "boolean": True, "null": None}.get(str(kind), text)


def message_for(body: dict[str, Any], text: str | None) -> Message:
    """Return the assistant's message: the same for the same messages."""
    messages = body["messages"]
    last, said = messages[-1], text_of(messages[-1])
    if text is not None:
        return {"role": "assistant", "content": text}
    form = body.get("response_format") or {}
    if form.get("type") == "json_schema":
        return {"role": "assistant", "content": json.dumps(fill(form["json_schema"]["schema"], said))}
    tools, choice = body.get("tools") or [], body.get("tool_choice")
    if tools and last["role"] == "user" and choice != "none":
        wanted = choice["function"]["name"] if isinstance(choice, dict) else tools[0]["function"]["name"]
        function = next(tool["function"] for tool in tools if tool["function"]["name"] == wanted)
        arguments = json.dumps(fill(function.get("parameters") or {"type": "object"}, said))
        called = {"name": wanted, "arguments": arguments}
        call = {"id": f"call_{digest(body)[:8]}", "type": "function", "function": called}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    return {"role": "assistant", "content": f"{len(messages)} {last['role']} said: {said}"}


def cut(message: Message, max_tokens: int | None) -> tuple[Message, str]:
    """Return the message within *max_tokens* words, and why it ended."""
    if message.get("tool_calls"):
        return message, "tool_calls"
    words = (message.get("content") or "").split(" ")
    if max_tokens is None or len(words) <= max_tokens:
        return message, "stop"
    return {**message, "content": " ".join(words[:max_tokens])}, "length"


def digest(body: dict[str, Any]) -> str:
    """Return a name for the messages."""
    return hashlib.sha256(json.dumps(body["messages"], sort_keys=True).encode()).hexdigest()


def words_of(messages: Sequence[Message]) -> list[str]:
    """Return the prompt's tokens: its words and roles."""
    return [word for message in messages for word in (message["role"], *text_of(message).split())]


def in_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return how many tokens two prompts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def usage_for(messages: Sequence[Message], message: Message, cached: int) -> dict[str, Any]:
    """Return the token counts of an answer."""
    prompt = len(words_of(messages))
    answer = len(str(message.get("content") or message.get("tool_calls")).split())
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def deltas(message: Message) -> list[dict[str, Any]]:
    """Cut a message as engines do: the role, then its pieces, then an empty end."""
    parts: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    for call in message.get("tool_calls") or ():
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        first = {"index": 0, "id": call["id"], "type": "function", "function": {"name": name, "arguments": ""}}
        parts.append({"tool_calls": [first]})
        for at in range(0, len(arguments), PIECE_CHARS):
            piece = arguments[at : at + PIECE_CHARS]
            parts.append({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})
    words = (message.get("content") or "").split(" ")
    if message.get("content"):
        parts += [{"content": word if at == 0 else f" {word}"} for at, word in enumerate(words)]
    return [*parts, {}]
