"""What is heard of an answer of OpenAI's Responses API, as a chat completion has it: text and calls of functions.

A stream says the arguments of a call up to four times: what is said again is no other call (``tool_calls``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orla_lg.wires.reading import list_in, object_in, payload
from orla_lg.wires.responses_answer import CUT, text_in
from orla_lg.wires.wire import Body, chunk_of

_REASONS = {said: reason for reason, said in CUT.items()}


def chunk_in(event: bytes) -> Body | None:
    """Return what one event of a stream brings, as a chunk of a chat completion.

    Raises:
        Garbage: It is no event of this wire.
    """
    data = payload(event)
    if data is None:
        return None
    kind, at = data.get("type"), data.get("output_index")
    if kind in ("error", "response.failed"):
        return {"error": data.get("error") or True}
    if kind == "response.output_text.delta":
        return chunk_of({"content": data.get("delta")})
    if kind == "response.function_call_arguments.delta":
        return chunk_of({"tool_calls": [{"index": at, "function": {"arguments": data.get("delta")}}]})
    if kind == "response.function_call_arguments.done":
        return chunk_of({"tool_calls": [{"index": at, "function": {"arguments": data.get("arguments")}}]})
    if kind in ("response.output_item.added", "response.output_item.done"):
        item = object_in(data, "item")
        return chunk_of({"tool_calls": [{**_call(item), "index": at}]}) if _is_call(item) else None
    if kind in ("response.completed", "response.incomplete"):
        return chunk_of({}, _reason(object_in(data, "response")))
    return None


def message_in(answer: Body) -> Body | None:
    """Return the message of a whole answer.

    Raises:
        Garbage: It is no answer of this wire.
    """
    if answer.get("object") != "response":
        return None
    items = [item for item in list_in(answer, "output") if isinstance(item, Mapping)]
    text = "".join(text_in(item) for item in items if item.get("type") == "message")
    calls = [_call(item) for item in items if _is_call(item)]
    return {"role": "assistant", "content": text or None, **({"tool_calls": calls} if calls else {})}


def _reason(answer: Body) -> str:
    cut = object_in(answer, "incomplete_details").get("reason")
    return "stop" if cut is None else _REASONS.get(cut, "other") if isinstance(cut, str) else "other"


def _is_call(item: Body) -> bool:
    return item.get("type") == "function_call"


def _call(item: Body) -> dict[str, Any]:
    said = item.get("arguments")
    function = {"name": item.get("name"), "arguments": said if isinstance(said, str) else ""}
    return {"id": item.get("call_id"), "type": "function", "function": function}
