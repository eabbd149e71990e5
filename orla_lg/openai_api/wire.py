"""What the bytes of OpenAI's chat completions mean, as far as we must know: usage, events, assembly.

The SDK parses responses for the caller; we look at the same bytes only for token counts, so we search
instead of parsing. Inside a JSON string a quote is escaped, so ``"usage":`` cannot be part of an answer.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from orla_lg.core.call import OBJECT, Ask, Usage

_USAGE, _TIMINGS = b'"usage"', b'"timings"'
"""The latter is llama.cpp's."""
_OPENS = re.compile(rb"\s*:\s*(?=\{)")
"""What stands between a key and an object."""
_ANY_USAGE = re.compile(_USAGE + rb"\s*:\s*(?!null\b|\s)")
"""An object or what stands in its place."""
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_EVENT_END = re.compile(rb"\r\n\r\n|\n\r?\n|\r\r")
_DECODER = json.JSONDecoder()

_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')
_DONE = re.compile(rb"(?:\A|[\r\n])data:\s*\[DONE\]")
"""At the beginning of a line: no JSON string holds a raw line break."""
_FIELD = re.compile(rb"(?:\A|[\r\n])(?:data|event|id|retry)?:")
"""A line that only a stream of events has."""
_SHOWN_BYTES = 120

MAX_EVENT_BYTES = 16 * 2**20
"""One event of a stream that is longer is not waited for."""
MAX_COUNT_DIGITS = 15
"""Of a count that an engine writes as a text."""
MAX_COUNT = 10**12
"""A larger number is no count of tokens, and no time in milliseconds."""

_ASSEMBLED = frozenset({
    "messages", "model", "n", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed",
    "presence_penalty", "frequency_penalty", "logit_bias", "user", "tools", "tool_choice", "parallel_tool_calls",
    "response_format", "reasoning_effort", "verbosity", "metadata", "store", "service_tier", "safety_identifier",
    "prompt_cache_key", "stream_options", "top_k", "min_p", "typical_p", "repetition_penalty", "repeat_penalty",
    "length_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "bad_words", "include_stop_str_in_output",
    "skip_special_tokens", "add_generation_prompt", "continue_final_message", "chat_template",
    "chat_template_kwargs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs",
    "regex", "ebnf", "json_schema", "grammar", "priority", "session_id", "request_id", "rid", "cache_salt",
    "vllm_xargs", "id_slot", "cache_prompt", "keep_alive", "options", "think", "mm_processor_kwargs",
    "truncate_prompt_tokens", "enable_thinking", "separate_reasoning",
})  # fmt: skip
"""Fields of a request that leave the chunks of its stream with all that the answer in one piece has."""


class Garbage(Exception):
    """What came is no beginning of an answer: not server-sent events, or an event that says the engine failed."""

    def __init__(self, message: str, body: object = None) -> None:
        super().__init__(message)
        self.body = body


def parse(data: bytes | str) -> Any:
    """Return the JSON in *data*.

    Raises:
        Garbage: It is none, or none that Python reads: nested too deeply, numbers of thousands of digits, no UTF-8.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Garbage(f"no JSON ({type(error).__name__}): {data[:_SHOWN_BYTES]!r}") from error


def object_in(holder: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the object under *key*, an empty one where there is none.

    Raises:
        Garbage: It is something else.
    """
    held = holder.get(key)
    if held is None:
        return {}
    if not isinstance(held, Mapping):
        raise Garbage(f"{key!r} is {type(held).__name__}, expected an object")
    return held


def list_in(holder: Mapping[str, Any], key: str) -> Sequence[Any]:
    """Return the list under *key*, an empty one where there is none.

    Raises:
        Garbage: It is something else.
    """
    held = holder.get(key)
    if held is None:
        return ()
    if not isinstance(held, list):
        raise Garbage(f"{key!r} is {type(held).__name__}, expected a list")
    return held


class Beginning:
    """Judges the beginning of a stream as its bytes come, in pieces of any size.

    Args:
        json_too: An answer in one piece will do as well.
    """

    def __init__(self, *, json_too: bool) -> None:
        self.is_json = False
        """Whether it is an answer in one piece."""
        self.head = b""
        """What it begins with."""
        self._json_too = json_too
        self._bytes = 0
        self._splitter = EventSplitter()

    def feed(self, data: bytes) -> bool:
        """Take in *data*; returns whether the first event that brings something is there.

        Raises:
            Garbage: It cannot become an answer any more.
        """
        if len(self.head) < _SHOWN_BYTES:
            self.head = (self.head + data).removeprefix(codecs.BOM_UTF8).lstrip()
            if self._json_too and self.head.startswith(b"{"):
                self.is_json = True
                return True
        self._bytes += len(data)
        if any(_brings(event) for event in self._splitter.feed(data)):
            return True
        if self._splitter.is_stuck:
            raise Garbage(f"an event of more than {MAX_EVENT_BYTES} bytes")
        if self._bytes > MAX_EVENT_BYTES:
            raise Garbage(f"no event in {self._bytes} bytes, which begin with {self.head[:_SHOWN_BYTES]!r}")
        return False

    def end(self) -> None:
        """Judge what ended before an event that brings something; lines that SSE does not know mean nothing there.

        Raises:
            Garbage: It has nothing of a stream of events.
        """
        if self.head and not _FIELD.search(self.head):
            raise Garbage(f"expected server-sent events, got {self.head[:_SHOWN_BYTES]!r}")


def _brings(event: bytes) -> bool:
    if is_done(event):
        return True
    try:
        first = payload(event)
    except Garbage as error:
        raise Garbage(f"the first event is {error}") from error
    if first is not None:
        _heed_error(first)
    return first is not None


def heed_shape(body: bytes, content_type: str) -> None:
    """Look whether a whole answer has the shape of a JSON object; quick, and blind to what is inside.

    Raises:
        json.JSONDecodeError: It claims to be JSON and is not; what the SDK says of it, too.
        Garbage: It is something else.
    """
    if body.lstrip().startswith(b"{") and body.rstrip().endswith(b"}"):
        return
    if "json" in content_type:
        try:
            if isinstance(json.loads(body), dict):  # in UTF-16, or behind a byte order mark
                return
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise Garbage(f"no JSON ({type(error).__name__}): {body[:_SHOWN_BYTES]!r}") from error
    raise Garbage(f"expected a JSON object, got {len(body)} bytes: {body[:_SHOWN_BYTES]!r}")


def _heed_error(event: Mapping[str, Any]) -> None:
    said = event.get("error")
    code = said.get("code") if isinstance(said, Mapping) else None
    if said and not (isinstance(code, int) and code < 500):  # what is below is the caller's mistake
        raise Garbage(f"the engine failed: {said}", said)


def is_done(data: bytes) -> bool:
    """Whether *data*, an event or the end of a stream, says that nothing more belongs to the stream."""
    return _DONE.search(data) is not None


def ends_well(tail: bytes) -> bool:
    """Whether the end of a stream says that the answer is whole."""
    return is_done(tail) or _FINISHED.search(tail) is not None


def usage_of(counts: Any, timings: Any = None) -> Usage:
    """Return the token counts of a ``usage`` object; what was not counted, or cannot be, was not said.

    Args:
        counts: The ``usage`` object.
        timings: llama.cpp's object beside it, in milliseconds.
    """
    counts = counts if isinstance(counts, dict) else {}
    details = counts.get("prompt_tokens_details")
    prompt = count(counts.get("prompt_tokens")) or 0
    cached = count(details.get("cached_tokens")) if isinstance(details, dict) else None
    believed = cached if cached is not None and cached <= prompt else None
    prefill_s = None
    if isinstance(timings, dict) and _is_number(took_ms := timings.get("prompt_ms")) and 0 < took_ms < MAX_COUNT:
        prefill_s = took_ms / 1000
    return Usage(prompt, believed, count(counts.get("completion_tokens")) or 0, prefill_s)


def count(value: Any) -> int | None:
    """Return how many tokens, slots or the like an engine says there are; ``None`` for what cannot be."""
    if value is None:
        return None
    if type(value) is int:  # as nearly always
        return value if 0 <= value <= MAX_COUNT else None
    if isinstance(value, str) and value.isdecimal() and len(value) <= MAX_COUNT_DIGITS:
        value = int(value)
    return int(value) if _is_number(value) and 0 <= value <= MAX_COUNT else None


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def usage_in(data: bytes) -> Usage | None:
    """Return the last usage object in *data*, a response body or the end of an event stream."""
    counts = _last_object(_USAGE, data)
    return None if counts is None else usage_of(counts, _last_object(_TIMINGS, data))


def _last_object(key: bytes, data: bytes) -> Any:
    """Return the object behind the last *key* in *data* that has one, if it is whole."""
    at = data.rfind(key)
    while at >= 0:
        if (begins := _OPENS.match(data, at + len(key))) is not None:
            try:
                return _DECODER.raw_decode(data[begins.end() :].decode("utf-8", "replace"))[0]
            except (ValueError, RecursionError):
                return None
        at = data.rfind(key, 0, at)
    return None


def may_be_usage_only(data: bytes) -> bool:
    """Whether *data* may hold an event that ``is_usage_only``; quick, and right when it says no."""
    return _USAGE in data and _NO_CHOICES.search(data) is not None


def is_usage_only(event: bytes) -> bool:
    """Whether an event is the extra one that ``stream_options.include_usage`` brings."""
    return _NO_CHOICES.search(event) is not None and _ANY_USAGE.search(event) is not None


def is_unreadable_usage(event: bytes) -> bool:
    """Whether an event brings nothing but token counts, and such as a reader of the stream stumbles over."""
    if not may_be_usage_only(event):
        return False
    try:
        usage = (payload(event) or {}).get("usage")
    except Garbage:
        return False  # the reader's to judge
    return bool(usage) and not _is_readable(usage)


def _is_readable(usage: Any) -> bool:
    if not isinstance(usage, Mapping):
        return False
    return all(
        not value or _is_readable(value) if key.endswith("_details") else value is None or _is_whole(value)
        for key, value in usage.items()
        if key.endswith(("_tokens", "_details"))
    )


def _is_whole(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().isdecimal() and len(value) < 20
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


class EventSplitter:
    """Cuts a byte stream into whole server-sent events, however the network cut it."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._searched = 0
        """Up to here nothing ends in what is held back."""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that *data* completes, each with its closing blank line."""
        rest = self._rest
        rest += data
        events, start = [], 0
        for end in [found.end() for found in _EVENT_END.finditer(rest, self._searched)]:
            events.append(bytes(rest[start:end]))
            start = end
        if start:
            del rest[:start]
        self._searched = max(0, len(rest) - 3)
        return events

    @property
    def is_stuck(self) -> bool:
        """Whether an event is too long to be waited for (``MAX_EVENT_BYTES``)."""
        return len(self._rest) > MAX_EVENT_BYTES

    def whole(self, data: bytes) -> bool:
        """Whether *data* is whole events, as engines send them: then nothing needs cutting."""
        return not self._rest and data.endswith(b"\n\n")

    def rest(self) -> bytes:
        """Return what no blank line has closed."""
        rest, self._rest, self._searched = bytes(self._rest), bytearray(), 0
        return rest


def payload(event: bytes) -> dict[str, Any] | None:
    """Return the JSON object in an event's data lines; ``None`` for comments and ``[DONE]``.

    Raises:
        Garbage: The data are no JSON.
    """
    lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
    data = b"\n".join(lines)
    if not data or data.startswith(b"[DONE]"):
        return None
    parsed = parse(data)
    return parsed if isinstance(parsed, dict) else None


def ask_of(body: Any) -> Ask:
    """Return what a chat completion request asks for; what the engine will refuse asks for nothing."""
    body = body if isinstance(body, OBJECT) else {}
    form, tools, messages = body.get("response_format"), body.get("tools"), body.get("messages")
    kind = form.get("type") if form and isinstance(form, Mapping) else None
    return Ask(
        model=str(body.get("model") or "auto"),
        messages=messages if isinstance(messages, (list, tuple)) else (),
        stream=bool(body.get("stream")),
        json_schema=kind == "json_schema",
        tools=bool(tools),
        schemas=tools if isinstance(tools, (list, tuple)) else (),
        max_tokens=count(body.get("max_completion_tokens")) or count(body.get("max_tokens")) or None,
    )


def can_assemble(body: Mapping[str, Any]) -> bool:
    """Whether a request loses nothing when it is streamed from the engine and assembled here.

    A field that is not known here may ask for more in the answer than its chunks are known to bring.
    """
    return (body.get("n") or 1) == 1 and not any(value for key, value in body.items() if key not in _ASSEMBLED)
