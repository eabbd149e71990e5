"""The answer to an execute, made of a chat completion: in one piece, as server-sent events, or as an error.

pyorla takes for success whatever ends politely: an event that says otherwise, and an end without ``done``. So a
stream that fails half-way raises here, which breaks the caller's connection.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx2

from orla_lg.core.inflight import InFlightCall
from orla_lg.wires import reading
from orla_lg.wires.messages.answer import input_of, said_in, thought_in
from orla_lg.wires.reading import Garbage, list_in, object_in
from orla_lg.wires.tool_calls import ToolCalls
from orla_lg.wires.wire import Body

Figures = Callable[[], dict[str, Any]]
"""Returns the metrics of a call whose answer is whole."""


def error(message: str, request_id: str = "") -> dict[str, Any]:
    """Return the body of an answer that says that a request failed."""
    said: dict[str, Any] = {"success": False, "error": message}
    return {**said, "request_id": request_id} if request_id else said


def whole(completion: Body, figures: Figures) -> dict[str, Any]:
    """Return an answer in one piece.

    Raises:
        Garbage: The completion has no answer in it.
    """
    choice = next(iter(list_in(completion, "choices")), None)
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(message, Mapping):
        raise Garbage(f"a chat completion without a message: {str(completion)[: reading.SHOWN_BYTES]}", completion)
    calls = ToolCalls()
    for index, call in enumerate(list_in(message, "tool_calls")):
        calls.add({**call, "index": index} if isinstance(call, Mapping) else call)
    return _answer(said_in(message), thought_in(message), calls.whole(), figures)


def _answer(text: str, thinking: str, calls: Sequence[Body], figures: Figures) -> dict[str, Any]:
    response: dict[str, Any] = {"content": text, "thinking": thinking, "tool_calls": [_tool_call(c) for c in calls]}
    return {"success": True, "response": {**response, "metrics": figures()}}


def _tool_call(call: Body) -> dict[str, Any]:
    function, given = object_in(call, "function"), call.get("id")
    name = function.get("name")
    params = {"name": name if isinstance(name, str) else "", "arguments": input_of(function.get("arguments"))}
    return {"id": given if isinstance(given, str) else "", "McpCallToolParams": params}


class ExecuteEvents:
    """Turns the chunks of a chat completion into the events of an execute.

    Args:
        figures: Asked at the end.
    """

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._calls = ToolCalls()
        self._text, self._thinking = list[str](), list[str]()
        self._kept_chars = 0

    def feed(self, chunk: Body) -> bytes:
        """Return the events that one chunk brings.

        Raises:
            httpx2.RemoteProtocolError: The engine failed; so does the caller's connection.
        """
        if failed := chunk.get("error"):
            said = failed.get("message") if isinstance(failed, Mapping) else None
            raise httpx2.RemoteProtocolError(f"the engine's stream turned into an error: {said or failed}")
        try:
            return self._events_of(chunk)
        except Garbage as garbage:
            raise httpx2.RemoteProtocolError(f"the engine's stream is none: {garbage}") from garbage

    def _events_of(self, chunk: Body) -> bytes:
        choice = next(iter(list_in(chunk, "choices")), None)
        if choice is None:
            return b""
        if not isinstance(choice, Mapping):
            raise Garbage(f"a choice is {type(choice).__name__}, expected an object")
        delta = object_in(choice, "delta") or object_in(choice, "message")
        events = b""
        for kind, kept, piece in (
            ("thinking", self._thinking, thought_in(delta)),
            ("content", self._text, said_in(delta)),
        ):
            if piece:
                kept.append(piece)
                self._hold(len(piece))
                events += event(kind, {kind: piece})
        for call in list_in(delta, "tool_calls"):
            self._calls.add(call)
            self._hold(len(str(call)))
        return events

    def _hold(self, chars: int) -> None:
        """Note that so much more is kept for the answer in one piece with which the stream ends."""
        self._kept_chars += chars
        if self._kept_chars > reading.MAX_EVENT_BYTES:
            raise Garbage(f"an answer of more than {reading.MAX_EVENT_BYTES} characters")

    def end(self) -> bytes:
        """Return the events that close the stream: its tool calls, which are whole now, and all of the answer."""
        answer = _answer("".join(self._text), "".join(self._thinking), self._calls.whole(), self._figures)
        calls = (each["McpCallToolParams"] for each in answer["response"]["tool_calls"])
        return b"".join([*(event("tool_call", call) for call in calls), event("done", answer)])


def event(kind: str, data: Mapping[str, Any]) -> bytes:
    """Return one event of a stream; pyorla reads it with exactly one space after each colon."""
    return f"event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def metrics(inflight: InFlightCall) -> dict[str, Any]:
    """Return the figures of a call that ended, times in whole milliseconds; ``None`` where it is not known."""
    record, departed_s = inflight.record, inflight.departed_s
    assert record is not None, "the call has not ended"
    ended_s = inflight.call.arrived_s + record.duration_s
    latency_s = None if departed_s is None else ended_s - departed_s
    said: dict[str, Any] = {
        "ttft_ms": _ms(record.ttft_s),
        "tpot_ms": None,
        "prompt_tokens": record.prompt_tokens or 0,
        "completion_tokens": record.completion_tokens or 0,
        "queue_wait_ms": _ms(record.queue_wait_s),
        "scheduler_decision_ms": _ms(inflight.entered_s - inflight.began_s),
        "dispatch_ms": 0,
        "backend_latency_ms": _ms(latency_s),
        "estimated_cost_usd": record.cost_usd,
    }
    if record.ttft_s is not None and latency_s is not None and (record.completion_tokens or 0) > 1:
        said["tpot_ms"] = _ms((latency_s - record.ttft_s) / ((record.completion_tokens or 0) - 1))
    return said


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)
