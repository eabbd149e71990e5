"""Anthropic's Messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from orla_lg.core.call import OBJECT, Ask, Usage
from orla_lg.wires import reading
from orla_lg.wires.messages import answer, heard, request
from orla_lg.wires.messages.tools import chat_tools
from orla_lg.wires.reading import Garbage, count
from orla_lg.wires.wire import Body, ChunkIn, ChunkReader, Wire

__all__ = ["MESSAGES", "Messages"]

MAX_PARSED_BYTES = 2**20
"""A whole answer that is longer is searched for its token counts instead of parsed."""

BEGINNINGS = frozenset({
    "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
    "message_stop",
})  # fmt: skip
"""Types of events that belong to an answer; the documents name pings beside them, and say that there may be more."""

_USAGE = b'"usage"'
_DECODER = json.JSONDecoder()
_RENAMED = {"stop": "stop_sequences", "max_completion_tokens": "max_tokens"}


class Messages(Wire):
    """The API of the Anthropic SDK, which vLLM, SGLang, llama.cpp and Ollama speak as well, by version."""

    name = "messages"
    title = "Anthropic's Messages"
    paths = ("/v1/messages",)
    path = "v1/messages"
    beside = ("/v1/messages/count_tokens",)
    """Paths of requests below its own that are no model calls."""
    carries = frozenset({"anthropic-version", "anthropic-beta"})

    # What is asked

    def ask_of(self, body: Body) -> Ask:  # noqa: D102
        body = body if isinstance(body, OBJECT) else {}
        tools = chat_tools(body, request.overlook)
        return Ask(
            model=str(body.get("model") or "auto"),
            messages=request.chat_messages(body, request.overlook),
            stream=bool(body.get("stream")),
            json_schema=request.response_format(body, request.overlook) is not None,
            tools=bool(body.get("tools")),
            schemas=tools,
            max_tokens=count(body.get("max_tokens")) or None,
        )

    def with_model(self, body: Body, model: str, parameters: Body) -> dict[str, Any]:
        """Return the request for a backend that speaks this wire, what a mapping sets under this wire's names."""
        return {**_parameters(parameters), **body, "model": model}

    def headers(self, key: str) -> dict[str, str]:
        """Return a key as the API takes it, and as vLLM does for all its APIs; llama.cpp takes either."""
        return {"x-api-key": key, "Authorization": f"Bearer {key}"}

    # What an answer says

    def brings(self, event: bytes) -> bool:  # noqa: D102
        try:
            data = reading.payload(event)
        except Garbage as fault:
            raise Garbage(f"the first event is {fault}") from fault
        if data is None:
            return False
        kind = data.get("type")
        if kind == "error" or data.get("error"):
            said = data.get("error")
            if isinstance(said, Mapping) and str(said.get("type")) in answer.CALLERS_MISTAKES:
                return True
            raise Garbage(f"the engine failed: {said}", data)
        if not isinstance(kind, str):
            raise Garbage(f"no event of {self.title}: {event[: reading.SHOWN_BYTES]!r}", data)
        return kind in BEGINNINGS

    def usage_in(self, data: bytes) -> Usage | None:  # noqa: D102
        counts: dict[str, Any] = {}
        for said in _whole_usage(data) if data.lstrip().startswith(b"{") else _streamed_usage(data):
            counts |= {key: value for key, value in said.items() if value is not None}
        if not counts:
            return None
        cached = count(counts.get("cache_read_input_tokens"))
        created = count(counts.get("cache_creation_input_tokens")) or 0
        prompt = (count(counts.get("input_tokens")) or 0) + (cached or 0) + created
        return Usage(prompt, cached, count(counts.get("output_tokens")) or 0)

    def ends_well(self, tail: bytes) -> bool:  # noqa: D102
        last = _last(tail)
        return last.get("type") == "message_stop" or bool(_object(last.get("delta")).get("stop_reason"))

    def is_over(self, tail: bytes) -> bool:
        """Whether nothing of the answer can follow."""
        return _last(tail).get("type") == "message_stop"

    # What is heard of an answer

    calls_mark = b"tool_use"

    def chunks(self) -> ChunkIn:  # noqa: D102
        return heard.chunk_in

    def message_in(self, answer: Body) -> Body | None:  # noqa: D102
        return heard.message_in(answer)

    # Between wires

    def to_chat(self, body: Body) -> dict[str, Any]:  # noqa: D102
        return request.chat_request(body)

    def essentials(self, body: Body) -> Body:  # noqa: D102
        return request.essentials(body)

    def from_chat(self, completion: Body, asked: Body) -> dict[str, Any]:  # noqa: D102
        return answer.whole(completion, asked)

    def reader(self, asked: Body) -> ChunkReader:  # noqa: D102
        return answer.MessageEvents(asked)

    def error(self, status: int, message: str, *, kind: str | None = None) -> dict[str, Any]:  # noqa: D102
        return answer.error(status, message, kind)


def _parameters(parameters: Body) -> dict[str, Any]:
    """Return what a mapping sets, under this wire's names."""
    renamed: dict[str, Any] = {}
    extra = parameters.get("extra_body")
    for name, value in [*parameters.items(), *_object(extra).items()]:
        form = value.get("json_schema") if name == "response_format" and isinstance(value, OBJECT) else None
        if isinstance(form, OBJECT):
            schema = {"type": "json_schema", "schema": form.get("schema")}
            renamed["output_config"] = {**renamed.get("output_config", {}), "format": schema}
        elif name == "reasoning_effort":
            renamed |= {"thinking": {"type": "disabled"}} if value == "none" else {}
            if value != "none":
                renamed["output_config"] = {**renamed.get("output_config", {}), "effort": value}
        elif name == "stop" and isinstance(value, str):
            renamed["stop_sequences"] = [value]
        elif name != "extra_body":
            renamed[_RENAMED.get(name, name)] = value
    return renamed


def _whole_usage(data: bytes) -> list[Mapping[str, Any]]:
    """Return the counts of an answer in one piece, of which only the end may be left."""
    if len(data) <= MAX_PARSED_BYTES:
        try:
            parsed = reading.parse(data)
        except Garbage:
            parsed = None
        if isinstance(parsed, dict):
            return [_object(parsed.get("usage"))]
    at = data.rfind(_USAGE)
    opens = data.find(b"{", at)
    if at < 0 or opens < 0:
        return []
    try:
        return [_object(_DECODER.raw_decode(data[opens:].decode("utf-8", "replace"))[0])]
    except (ValueError, RecursionError):
        return []


def _streamed_usage(data: bytes) -> list[Mapping[str, Any]]:
    """Return the counts in the events of a stream, of which pieces are left: each line is looked at by itself."""
    lines = (_data_in(line) for line in data.splitlines() if _USAGE in line)
    found = [line for line in lines if line is not None and line.get("type") in ("message_start", "message_delta")]
    return [_object((_object(line["message"]) if "message" in line else line).get("usage")) for line in found]


def _last(tail: bytes) -> Mapping[str, Any]:
    """Return the last event of a stream, of which the end is given, but for pings and what ends chat completions."""
    events = (_data_in(line) for line in reversed(tail.splitlines()))
    return next((event for event in events if event is not None and event.get("type") != "ping"), {})


def _data_in(line: bytes) -> Mapping[str, Any] | None:
    """Return the object in a line of data of an event; ``None`` for a line that is no such, or not whole."""
    if not line.startswith(b"data:"):
        return None
    try:
        return reading.payload(line)
    except Garbage:
        return None


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


MESSAGES = Messages()
