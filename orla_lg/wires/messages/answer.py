"""A chat completion as an answer of Anthropic's Messages: in one piece, as a stream, or as an error.

Both forms are made of the same parts, so that a stream put together is the answer in one piece. Reasoning, text and
tool calls stream as they come, one block after the other, as the documents have it. Engines number and name the
deltas of calls in many ways: unless they are numbered in their order, each with its name and id first and the next
after the last one's end, what belongs together is known only at the end of the answer, and what is left is sent then.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from orla_lg.wires import reading
from orla_lg.wires.reading import Garbage, count, list_in, object_in
from orla_lg.wires.tool_calls import MANY_LOOKS, ToolCalls
from orla_lg.wires.wire import Body

INVALID_JSON = "INVALID_JSON"
"""The only key of a tool's input that is no JSON object: Anthropic's own advice for what a model wrote wrongly."""

PING_EVERY = 64
"""So many chunks of tool calls that wait pass before a ping says that the engine is still at work."""

MAX_NESTING = 100
"""A tool's input that is nested more deeply is taken for none."""

CALLERS_MISTAKES = frozenset({
    "invalid_request_error", "authentication_error", "billing_error", "permission_error", "not_found_error",
    "request_too_large",
})  # fmt: skip
"""Types of errors that another attempt would meet again."""
ERROR_TYPES = CALLERS_MISTAKES | {
    "rate_limit_error", "timeout_error", "conflict_error", "api_error", "overloaded_error",
}  # fmt: skip
_TYPE_OF_STATUS = {
    401: "authentication_error", 402: "billing_error", 403: "permission_error", 404: "not_found_error",
    408: "timeout_error", 409: "conflict_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error", 504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip


def error(status: int, message: str, kind: str | None = None) -> dict[str, Any]:
    """Return the body of an answer that says that a request failed."""
    by_status = _TYPE_OF_STATUS.get(status, "invalid_request_error" if 400 <= status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind if kind in ERROR_TYPES else by_status, "message": message}}


def event(data: Mapping[str, Any]) -> bytes:
    """Return one event of a stream."""
    return f"event: {data['type']}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def whole(completion: Body, asked: Body) -> dict[str, Any]:
    """Return an answer in one piece.

    Raises:
        Garbage: The completion has no answer in it.
    """
    choice = next(iter(list_in(completion, "choices")), None)
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not (isinstance(choice, Mapping) and isinstance(message, Mapping)):
        raise Garbage(f"a chat completion without a message: {str(completion)[: reading.SHOWN_BYTES]}", completion)
    end, calls = _End(asked), ToolCalls()
    end.note(choice, message)
    for index, call in enumerate(list_in(message, "tool_calls")):
        calls.add({**call, "index": index} if isinstance(call, Mapping) else call)
    tool_use = [_tool_use(call) for call in calls.whole()]
    content: list[dict[str, Any]] = []
    if (thought := thought_in(message)) and _shows_thoughts(asked):
        content.append({"type": "thinking", "thinking": thought, "signature": ""})
    if text := said_in(message):
        content.append({"type": "text", "text": text})
    reasons = end.reasons(called=bool(tool_use))
    usage = _usage(completion.get("usage"))
    return {**_top(completion, asked), "content": content + tool_use, **reasons, "usage": usage}


class MessageEvents:
    """Turns the chunks of a chat completion into the events of a stream of Messages.

    Args:
        asked: The request.
    """

    def __init__(self, asked: Body) -> None:
        self._asked = asked
        self._end = _End(asked)
        self._shows_thoughts = _shows_thoughts(asked)
        self._calls = ToolCalls()
        self._calls_chunks = self._kept_chars = 0
        self._live = 0
        """Calls that stream as they come."""
        self._sent: list[str] = []
        """Of the arguments of the newest of them."""
        self._looks = MANY_LOOKS
        self._waits = False
        """Whether what is left of the calls waits for the end."""
        self._late: list[tuple[str, str]] = []
        """Kinds and pieces of what was thought or said after a call began."""
        self._usage: Any = None
        self._begun = self._over = False
        self._open: str | None = None
        """The kind of the block that is open."""
        self._blocks = 0
        """Closed so far."""

    def feed(self, chunk: Body) -> bytes:
        """Return the events that one chunk brings.

        Raises:
            Garbage: It is none, or the tool calls are too long to be waited for.
        """
        if self._over:
            return b""
        if failed := chunk.get("error"):
            self._over = True
            return event(_error_in(failed))
        if isinstance(usage := chunk.get("usage"), Mapping):
            self._usage = usage
        choice = next(iter(list_in(chunk, "choices")), None)
        if choice is None:
            return self._start(chunk)
        if not isinstance(choice, Mapping):
            raise Garbage(f"a choice is {type(choice).__name__}, expected an object")
        delta = object_in(choice, "delta") or object_in(choice, "message")
        self._end.note(choice, delta)
        events = self._start(chunk)
        thought = thought_in(delta) if self._shows_thoughts else ""
        for kind, piece in (("thinking", thought), ("text", said_in(delta))):
            if piece and self._live:
                self._hold(len(piece))
                self._late.append((kind, piece))
            elif piece:
                events += self._piece(kind, piece)
        for call in list_in(delta, "tool_calls"):
            events += self._take(call)
        return events or self._ping(bool(delta.get("tool_calls")))

    def end(self) -> bytes:
        """Return the events that close the stream."""
        if self._over:
            return b""
        self._over = True
        calls = self._calls.whole()
        events = [self._start({}), self._rest_of_live(calls), self._close()]
        for call in calls[self._live :]:
            block = _tool_use(call)
            arguments = json.dumps(block["input"], separators=(",", ":"))
            events.append(self._start_block({**block, "input": {}}))
            events.append(self._delta({"type": "input_json_delta", "partial_json": arguments}))
            events.append(self._close())
        events += [self._piece(kind, piece) for kind, piece in self._late]
        events.append(self._close())
        reasons = self._end.reasons(called=bool(calls))
        events.append(event({"type": "message_delta", "delta": reasons, "usage": _usage(self._usage)}))
        events.append(event({"type": "message_stop"}))
        return b"".join(events)

    def _start(self, chunk: Body) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        nothing: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        usage = {**_usage(self._usage), "output_tokens": 0}
        return event({"type": "message_start", "message": {**_top(chunk, self._asked), **nothing, "usage": usage}})

    def _piece(self, kind: str, piece: str) -> bytes:
        delta = {"type": f"{kind}_delta", kind: piece}
        if self._open == kind:
            return self._delta(delta)
        block = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
        return self._close() + self._start_block(block) + self._delta(delta)

    def _start_block(self, block: dict[str, Any]) -> bytes:
        self._open = block["type"]
        return event({"type": "content_block_start", "index": self._blocks, "content_block": block})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return event({"type": "content_block_delta", "index": self._blocks, "delta": delta})

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        # The API signs what a model thought; an engine of one's own has nothing to sign with.
        signature = self._delta({"type": "signature_delta", "signature": ""}) if self._open == "thinking" else b""
        stop = event({"type": "content_block_stop", "index": self._blocks})
        self._open = None
        self._blocks += 1
        return signature + stop

    def _take(self, call: Any) -> bytes:
        self._calls.add(call)
        function = object_in(call, "function")
        arguments = function.get("arguments")
        self._hold(len(arguments) if isinstance(arguments, str) else 1)
        index, given, name, events = call.get("index"), call.get("id"), function.get("name"), b""
        if self._waits or type(index) is not int or not isinstance(arguments, str | None):
            self._waits = True
            return b""
        if index == self._live and name and given and isinstance(name, str) and isinstance(given, str):
            if self._live and not self._is_whole():
                self._waits = True
                return b""
            self._live += 1
            self._sent = []
            events = self._close() + self._start_block({"type": "tool_use", "id": given, "name": name, "input": {}})
        elif index != self._live - 1 or name or (arguments and self._is_whole()):
            self._waits = True
            return b""
        if not arguments:
            return events
        self._sent.append(arguments)
        return events + self._delta({"type": "input_json_delta", "partial_json": arguments})

    def _hold(self, chars: int) -> None:
        """Note that so much more is kept until the end."""
        self._kept_chars += chars
        if self._kept_chars > reading.MAX_EVENT_BYTES:
            raise Garbage(f"tool calls of more than {reading.MAX_EVENT_BYTES} characters")

    def _is_whole(self) -> bool:
        """Whether the arguments of the newest call that streams are whole; cheap where they plainly go on."""
        if self._looks == 0 or not (self._sent and self._sent[-1].rstrip().endswith("}")):
            return False
        self._looks -= 1
        return INVALID_JSON not in input_of("".join(self._sent))

    def _rest_of_live(self, calls: Sequence[Mapping[str, Any]]) -> bytes:
        """Return what came of the newest call that streams after the others had to wait."""
        if not (self._live and len(calls) >= self._live):
            return b""
        sent, arguments = "".join(self._sent), object_in(calls[self._live - 1], "function").get("arguments")
        if not (isinstance(arguments, str) and arguments.startswith(sent) and len(arguments) > len(sent)):
            return b""
        return self._delta({"type": "input_json_delta", "partial_json": arguments[len(sent) :]})

    def _ping(self, called: bool) -> bytes:
        self._calls_chunks += called
        return event({"type": "ping"}) if called and self._calls_chunks % PING_EVERY == 0 else b""


class _End:
    """Why an answer ended, as chat completions and their engines say it."""

    def __init__(self, asked: Body) -> None:
        stops = asked.get("stop_sequences")
        self._stops = [stop for stop in stops if isinstance(stop, str)] if isinstance(stops, list | tuple) else []
        self._finish: Any = None
        self._stopped_by: str | None = None
        self._refused = False

    def note(self, choice: Mapping[str, Any], message: Mapping[str, Any]) -> None:
        """Take note of what a choice, and the message or the delta in it, say."""
        self._finish = choice.get("finish_reason") or self._finish
        for key in ("stop_reason", "matched_stop"):  # vLLM's and SGLang's: what of the request ended it, or a token
            if choice.get(key) in self._stops:
                self._stopped_by = choice[key]
        self._refused = self._refused or bool(message.get("refusal"))

    def reasons(self, *, called: bool) -> dict[str, Any]:
        """Return what the answer says of its end.

        Args:
            called: There are tool calls; that alone decides, for engines say ``stop`` where a call was forced.
        """
        if self._finish == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if called:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if self._refused or self._finish == "content_filter":
            return {"stop_reason": "refusal", "stop_sequence": None}
        reason = "end_turn" if self._stopped_by is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": self._stopped_by}


def _top(completion: Body, asked: Body) -> dict[str, Any]:
    given, model = completion.get("id"), completion.get("model")
    return {
        "id": given if isinstance(given, str) and given else f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": model if isinstance(model, str) and model else str(asked.get("model") or ""),
    }


def _shows_thoughts(asked: Body) -> bool:
    """Whether an answer shows what the model thought: clients that did not ask for it look for texts alone."""
    said = asked.get("thinking")
    config = said if isinstance(said, Mapping) else {}
    kind = config.get("type")
    return kind not in (None, "disabled") and config.get("display") != "omitted"


def thought_in(message: Mapping[str, Any]) -> str:
    """Return what the model thought: engines name it in two ways, and some in both."""
    return _text(message, "reasoning_content") or _text(message, "reasoning")


def said_in(message: Mapping[str, Any]) -> str:
    """Return what the model said, a refusal included."""
    return _text(message, "content") + _text(message, "refusal")


def _text(message: Mapping[str, Any], key: str) -> str:
    held = message.get(key)
    if held is None or isinstance(held, str):
        return held or ""
    if not isinstance(held, list):
        raise Garbage(f"{key!r} is {type(held).__name__}, expected a text")
    texts = (part.get("text") if isinstance(part, Mapping) else part for part in held)
    return "".join(text for text in texts if isinstance(text, str))


def _tool_use(call: Mapping[str, Any]) -> dict[str, Any]:
    function = object_in(call, "function")
    given, name = call.get("id"), function.get("name")
    return {
        "type": "tool_use",
        "id": given if isinstance(given, str) and given else f"toolu_{secrets.token_hex(12)}",
        "name": name if isinstance(name, str) else "",
        "input": input_of(function.get("arguments")),
    }


def input_of(arguments: Any) -> dict[str, Any]:
    """Return a tool's arguments as an object; what is no JSON object stands under ``INVALID_JSON``."""
    if not isinstance(arguments, str) or not arguments.strip():
        return {}
    try:
        parsed = reading.parse(arguments)
    except Garbage:
        parsed = None
    return parsed if isinstance(parsed, dict) and _is_flat(parsed, arguments) else {INVALID_JSON: arguments}


def _is_flat(value: Any, text: str) -> bool:
    """Whether a value from *text* can be written again wherever that is done."""
    if text.count("{") + text.count("[") <= MAX_NESTING:
        return True
    level = [value]
    for _ in range(MAX_NESTING):
        level = [each for held in level for each in (held.values() if isinstance(held, dict) else held)
                 if isinstance(each, dict | list)]  # fmt: skip
        if not level:
            return True
    return False


def _usage(counts: Any) -> dict[str, Any]:
    """Return token counts: those of the prompt without what was found cached, which is counted by itself."""
    counts = counts if isinstance(counts, Mapping) else {}
    prompt, answer = count(counts.get("prompt_tokens")) or 0, count(counts.get("completion_tokens")) or 0
    cached = _detail(counts, "prompt_tokens_details", "cached_tokens", prompt)
    thought = _detail(counts, "completion_tokens_details", "reasoning_tokens", answer)
    usage: dict[str, Any] = {"input_tokens": prompt - (cached or 0), "output_tokens": answer}
    if cached is not None:
        usage["cache_read_input_tokens"] = cached
    if thought is not None:
        usage["output_tokens_details"] = {"thinking_tokens": thought}
    return usage


def _detail(counts: Mapping[str, Any], kind: str, key: str, most: int) -> int | None:
    details = counts.get(kind)
    said = count(details.get(key)) if isinstance(details, Mapping) else None
    return said if said is not None and said <= most else None


def _error_in(failed: Any) -> dict[str, Any]:
    said = failed if isinstance(failed, Mapping) else {}
    code, kind = said.get("code"), said.get("type")
    status = code if type(code) is int and 400 <= code < 600 else 500
    return error(status, str(said.get("message") or failed), kind if isinstance(kind, str) else None)
