"""What the bytes of OpenAI's chat completions mean, as far as we must know: usage, events, assembly.

The SDK parses responses for the caller; we look at the same bytes only for token counts, so we search
instead of parsing. Inside a JSON string a quote is escaped, so ``"usage":`` cannot be part of an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, cast

from orla_lg.core.call import Ask, Usage

_USAGE = re.compile(rb'"usage"\s*:\s*(?=\{)')
_TIMINGS = re.compile(rb'"timings"\s*:\s*(?=\{)')
"""llama.cpp's."""
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_DECODER = json.JSONDecoder()

_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')
_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b":")
_SHOWN_BYTES = 120

DONE = b"[DONE]"


class Garbage(Exception):
    """What came is no beginning of an answer: not server-sent events, or an event that says the engine failed."""

    def __init__(self, message: str, body: object = None) -> None:
        super().__init__(message)
        self.body = body


def begins(data: bytes, *, json_too: bool) -> bool:
    """Whether *data*, the beginning of a stream, holds the first event that brings something.

    Args:
        data: What came so far, in pieces of any size.
        json_too: An answer in one piece will do as well.

    Raises:
        Garbage: It cannot become an answer any more.
    """
    start = data.lstrip()
    if json_too and start.startswith(b"{"):
        return True
    if not any(start.startswith(field) or field.startswith(start) for field in _FIELDS):
        raise Garbage(f"expected server-sent events, got {start[:_SHOWN_BYTES]!r}")
    for event in EventSplitter().feed(start):
        if DONE in event:
            return True
        try:
            first = payload(event)
        except json.JSONDecodeError as error:
            raise Garbage(f"the first event is no JSON: {event[:_SHOWN_BYTES]!r}") from error
        if first is not None:
            _heed_error(first)
            return True
    return False


def heed_shape(body: bytes, content_type: str) -> None:
    """Look whether a whole answer has the shape of a JSON object; quick, and blind to what is inside.

    Raises:
        json.JSONDecodeError: It claims to be JSON and is not; what the SDK says of it, too.
        Garbage: It is something else.
    """
    if not (body.lstrip().startswith(b"{") and body.rstrip().endswith(b"}")):
        if "json" in content_type:
            json.loads(body.decode("utf-8", "replace"))
        raise Garbage(f"expected a JSON object, got {len(body)} bytes: {body[:_SHOWN_BYTES]!r}")


def _heed_error(event: Mapping[str, Any]) -> None:
    said = event.get("error")
    code = said.get("code") if isinstance(said, Mapping) else None
    if said and not (isinstance(code, int) and code < 500):  # what is below is the caller's mistake
        raise Garbage(f"the engine failed: {said}", said)


def ends_well(tail: bytes) -> bool:
    """Whether the end of a stream says that the answer is whole."""
    return DONE in tail or _FINISHED.search(tail) is not None


def usage_of(counts: Mapping[str, Any], timings: Mapping[str, Any] | None = None) -> Usage:
    """Return the token counts of a ``usage`` object; what was not counted, or cannot be, was not said.

    Args:
        counts: The ``usage`` object.
        timings: llama.cpp's object beside it, in milliseconds.
    """
    details = counts.get("prompt_tokens_details") or {}
    prompt = _count(counts.get("prompt_tokens")) or 0
    cached = _count(details.get("cached_tokens")) if isinstance(details, Mapping) else None
    believed = cached if cached is not None and cached <= prompt else None
    took_ms = (timings or {}).get("prompt_ms")
    prefill_s = took_ms / 1000 if isinstance(took_ms, int | float) and took_ms > 0 else None
    return Usage(prompt, believed, _count(counts.get("completion_tokens")) or 0, prefill_s)


def _count(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and value >= 0 else None


def usage_in(data: bytes) -> Usage | None:
    """Return the last usage object in *data*, a response body or the end of an event stream."""
    counts = _last_object(_USAGE, data)
    return None if counts is None else usage_of(counts, _last_object(_TIMINGS, data))


def _last_object(key: re.Pattern[bytes], data: bytes) -> dict[str, Any] | None:
    """Return the object behind the last *key* in *data*, if there is one and it is whole."""
    found = list(key.finditer(data))
    if not found:
        return None
    try:
        held, _ = _DECODER.raw_decode(data[found[-1].end() :].decode("utf-8", "replace"))
    except json.JSONDecodeError:
        return None
    return cast("dict[str, Any]", held)


def may_be_usage_only(data: bytes) -> bool:
    """Whether *data* may hold an event that ``is_usage_only``; quick, and right when it says no."""
    return _NO_CHOICES.search(data) is not None


def is_usage_only(event: bytes) -> bool:
    """Whether an event is the extra one that ``stream_options.include_usage`` brings."""
    return _NO_CHOICES.search(event) is not None and _USAGE.search(event) is not None


class EventSplitter:
    """Cuts a byte stream into whole server-sent events, however the network cut it."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that *data* completes, each with its closing blank line."""
        self._rest += data
        events, start = [], 0
        for end in _EVENT_END.finditer(self._rest):
            events.append(self._rest[start : end.end()])
            start = end.end()
        self._rest = self._rest[start:]
        return events

    def whole(self, data: bytes) -> bool:
        """Whether *data* is whole events, as engines send them: then nothing needs cutting."""
        return not self._rest and data.endswith(b"\n\n")

    def rest(self) -> bytes:
        """Return what no blank line has closed."""
        rest, self._rest = self._rest, b""
        return rest


def payload(event: bytes) -> dict[str, Any] | None:
    """Return the JSON object in an event's data lines; ``None`` for comments and ``[DONE]``."""
    lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
    data = b"\n".join(lines)
    if not data or data.startswith(DONE):
        return None
    parsed = json.loads(data)
    return parsed if isinstance(parsed, dict) else None


class Assembly:
    """Builds the chat completion that a non-streamed request would have brought, from its chunks."""

    def __init__(self) -> None:
        self.error: dict[str, Any] | None = None
        self._top: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}

    @property
    def empty(self) -> bool:
        """Whether nothing came that could be a chunk."""
        return not (self._top or self._choices or self.error)

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Take in one chunk."""
        if chunk.get("error"):
            self.error = dict(chunk)
            return
        for choice in chunk.get("choices") or ():
            self._add_choice(choice)
        self._top |= {key: value for key, value in chunk.items() if key != "choices" and value is not None}

    def _add_choice(self, part: Mapping[str, Any]) -> None:
        index = part.get("index", 0)
        blank = {"index": index, "message": {"role": "assistant", "content": None}, "finish_reason": None}
        choice = self._choices.setdefault(index, blank)
        _merge(choice["message"], part.get("delta") or {})
        choice |= {key: value for key, value in part.items() if key not in ("delta", "index") and value is not None}

    def completion(self) -> dict[str, Any]:
        """Return the whole; what is not yet there is missing or null, as in a response cut short."""
        choices = [self._choices[index] for index in sorted(self._choices)]
        return {**self._top, "object": "chat.completion", "choices": choices}


def _merge(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    for key, value in delta.items():
        if value is None:
            continue
        if key == "tool_calls":
            for call in value:
                _merge_tool_call(message.setdefault("tool_calls", []), call)
        elif key == "role":
            message["role"] = value
        elif isinstance(value, str):
            message[key] = (message.get(key) or "") + value
        elif isinstance(value, list):
            message[key] = [*(message.get(key) or ()), *value]
        else:
            message[key] = value


def _merge_tool_call(calls: list[dict[str, Any]], part: Mapping[str, Any]) -> None:
    index = len(calls) if part.get("index") is None else part["index"]
    while len(calls) <= index:
        calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
    call, function = calls[index], part.get("function") or {}
    call |= {key: value for key, value in part.items() if key in ("id", "type") and value}
    for key in ("name", "arguments"):
        call["function"][key] += function.get(key) or ""


def ask_of(body: Mapping[str, Any]) -> Ask:
    """Return what a chat completion request asks for."""
    form = body.get("response_format")
    kind = form.get("type") if isinstance(form, Mapping) else None
    return Ask(
        model=str(body.get("model") or "auto"),
        messages=body.get("messages") or (),
        stream=bool(body.get("stream")),
        json_schema=kind == "json_schema",
        tools=bool(body.get("tools")),
        schemas=body.get("tools") or (),
        max_tokens=body.get("max_completion_tokens") or body.get("max_tokens"),
    )


def can_assemble(body: Mapping[str, Any]) -> bool:
    """Whether a request loses nothing when it is streamed from the engine and assembled here."""
    lossy = ("logprobs", "audio", "modalities", "functions", "stream", "web_search_options")
    return (body.get("n") or 1) == 1 and not any(body.get(key) for key in lossy)
