"""What is heard of an answer of Ollama's chat, as a chat completion has it: text, and calls, which come whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from orla_lg.wires import reading
from orla_lg.wires.reading import list_in, object_in
from orla_lg.wires.wire import Body, chunk_of


class LineChunks:
    """Reads the lines of one stream; calls are numbered as they come, whatever their engine says."""

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, line: bytes) -> Body | None:
        """Return what one line brings, as a chunk of a chat completion.

        Raises:
            Garbage: It is no line of this wire.
        """
        said = reading.parse(line) if line.strip() else None
        if not isinstance(said, dict):
            return None
        if said.get("error"):
            return {"error": said["error"]}
        message = object_in(said, "message")
        delta: dict[str, Any] = {}
        if isinstance(text := message.get("content"), str) and text:
            delta["content"] = text
        if calls := _calls(message):
            delta["tool_calls"] = [{**call, "index": self._calls + at} for at, call in enumerate(calls)]
            self._calls += len(calls)
        reason = said.get("done_reason") or "stop" if said.get("done") is True else None
        return chunk_of(delta, reason if isinstance(reason, str) else None)


def message_in(answer: Body) -> Body | None:
    """Return the message of a whole answer.

    Raises:
        Garbage: It is no answer of this wire.
    """
    message = object_in(answer, "message")
    if not message:
        return None
    calls = _calls(message)
    return {
        "role": "assistant", "content": message.get("content") or None, **({"tool_calls": calls} if calls else {}),
    }  # fmt: skip


def _calls(message: Body) -> list[dict[str, Any]]:
    functions = [
        (call, object_in(call, "function")) for call in list_in(message, "tool_calls") if isinstance(call, Mapping)
    ]
    return [
        {
            "id": call.get("id"),
            "type": "function",
            "function": {"name": function.get("name"), "arguments": json.dumps(function.get("arguments") or {})},
        }
        for call, function in functions
    ]
