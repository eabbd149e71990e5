"""What is heard of an answer of Anthropic's Messages, as a chat completion has it: text and calls of tools.

What a server's own tools did, and what the model thought, is not heard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from orla_lg.wires.reading import list_in, object_in, payload
from orla_lg.wires.wire import Body, chunk_of

_REASONS = {"tool_use": "tool_calls", "end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length"}


def chunk_in(event: bytes) -> Body | None:
    """Return what one event of a stream brings, as a chunk of a chat completion.

    Raises:
        Garbage: It is no event of this wire.
    """
    data = payload(event)
    if data is None:
        return None
    kind, at = data.get("type"), data.get("index")
    if kind == "error":
        return {"error": data.get("error") or True}
    if kind == "message_start":
        return chunk_of({"role": "assistant"})
    if kind == "message_delta":
        reason = object_in(data, "delta").get("stop_reason")
        return chunk_of({}, _REASONS.get(reason, "other") if isinstance(reason, str) else None)
    if kind == "content_block_start":
        block = object_in(data, "content_block")
        if block.get("type") == "tool_use":
            return chunk_of({"tool_calls": [{**_call(block, empty=""), "index": at}]})
        return _text(block)
    if kind == "content_block_delta":
        delta = object_in(data, "delta")
        if delta.get("type") == "input_json_delta":
            return chunk_of({"tool_calls": [{"index": at, "function": {"arguments": delta.get("partial_json")}}]})
        return _text(delta)
    return None


def message_in(answer: Body) -> Body | None:
    """Return the message of a whole answer.

    Raises:
        Garbage: It is no answer of this wire.
    """
    if answer.get("type") != "message":
        return None
    blocks = [block for block in list_in(answer, "content") if isinstance(block, Mapping)]
    text = "".join(str(block.get("text") or "") for block in blocks if block.get("type") == "text")
    calls = [_call(block, empty="{}") for block in blocks if block.get("type") == "tool_use"]
    return {"role": "assistant", "content": text or None, **({"tool_calls": calls} if calls else {})}


def _text(part: Mapping[str, Any]) -> Body | None:
    text = part.get("text") if part.get("type") in ("text", "text_delta") else None
    return chunk_of({"content": text}) if isinstance(text, str) and text else None


def _call(block: Mapping[str, Any], *, empty: str) -> dict[str, Any]:
    given = block.get("input")
    arguments = json.dumps(given) if given else empty
    return {
        "id": block.get("id"), "type": "function", "function": {"name": block.get("name"), "arguments": arguments},
    }  # fmt: skip
