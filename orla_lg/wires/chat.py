"""What the bytes of OpenAI's chat completions mean, as far as we must know: usage, events, assembly.

The SDK parses responses for the caller; we look at the same bytes only for token counts, so we search
instead of parsing. Inside a JSON string a quote is escaped, so ``"usage":`` cannot be part of an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from orla_lg.core.call import OBJECT, Ask, Usage
from orla_lg.wires.reading import MAX_COUNT, Garbage, count, is_number, list_in, payload
from orla_lg.wires.wire import Body, ChunkIn, ChunkReader, Wire

_USAGE, _TIMINGS = b'"usage"', b'"timings"'
"""The latter is llama.cpp's."""
_OPENS = re.compile(rb"\s*:\s*(?=\{)")
"""What stands between a key and an object."""
_ANY_USAGE = re.compile(_USAGE + rb"\s*:\s*(?!null\b|\s)")
"""An object or what stands in its place."""
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_DECODER = json.JSONDecoder()

_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')
_DONE = re.compile(rb"(?:\A|[\r\n])data:\s*\[DONE\]")
"""At the beginning of a line: no JSON string holds a raw line break."""


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


def brings(event: bytes) -> bool:
    """Whether one event of a stream brings the first of an answer.

    Raises:
        Garbage: It is none, or says that the engine failed.
    """
    if is_done(event):
        return True
    try:
        first = payload(event)
    except Garbage as error:
        raise Garbage(f"the first event is {error}") from error
    if first is not None:
        _heed_error(first)
    return first is not None


def _heed_error(event: Mapping[str, Any]) -> None:
    said = event.get("error")
    code = said.get("code") if isinstance(said, Mapping) else None
    if said and not (isinstance(code, int) and code < 500):  # what is below is the caller's mistake
        raise Garbage(f"the engine failed: {said}", said)


def is_done(tail: bytes) -> bool:
    """Whether *tail*, an event or the end of a stream, says that nothing more belongs to the stream."""
    return _DONE.search(tail) is not None


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
    if isinstance(timings, dict) and is_number(took_ms := timings.get("prompt_ms")) and 0 < took_ms < MAX_COUNT:
        prefill_s = took_ms / 1000
    return Usage(prompt, believed, count(counts.get("completion_tokens")) or 0, prefill_s)


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


_GROQ_ONLY = ("parsed", "raw", "hidden")
"""Groq's words for the form of reasoning; llama.cpp has a field of the same name, and others in it."""


class ChatCompletions(Wire):
    """Chat completions, which every engine speaks."""

    name = "chat"
    title = "chat completions"
    paths = ("/chat/completions",)
    path = "v1/chat/completions"
    counts_on_demand = True

    ask_of = staticmethod(ask_of)
    brings = staticmethod(brings)
    usage_in = staticmethod(usage_in)
    ends_well = staticmethod(ends_well)
    is_over = staticmethod(is_done)

    def chunks(self) -> ChunkIn:  # noqa: D102
        return payload

    def message_in(self, answer: Body) -> Body | None:  # noqa: D102
        first = next(iter(list_in(answer, "choices")), None)
        message = first.get("message") if isinstance(first, Mapping) else None
        return message if isinstance(message, Mapping) else None

    def with_model(self, body: Body, model: str, parameters: Body) -> dict[str, Any]:  # noqa: D102
        said = {name: value for name, value in body.items() if value is not None}  # llama.cpp refuses some nulls
        if said.get("reasoning_format") in _GROQ_ONLY:
            del said["reasoning_format"]
        if not parameters:
            return {**said, "model": model}
        return {**_given(parameters, said), **said, "model": model}

    def to_chat(self, body: Body) -> dict[str, Any]:  # noqa: D102
        return {name: value for name, value in body.items() if name != "model"}

    def from_chat(self, completion: Body, asked: Body) -> dict[str, Any]:  # noqa: D102
        return dict(completion)

    def reader(self, asked: Body) -> ChunkReader:  # noqa: D102
        return Chunks()

    def error(self, status: int, message: str, *, kind: str | None = None) -> dict[str, Any]:  # noqa: D102
        return error_of(status, message, kind)


def _given(parameters: Body, body: Body) -> dict[str, Any]:
    """Return what a mapping sets, but not against what *body* has under either of a field's names."""
    given = dict(parameters)
    given |= given.pop("extra_body", {})
    limits = {"max_tokens", "max_completion_tokens"}
    if not limits.isdisjoint(body):
        given = {name: value for name, value in given.items() if name not in limits}
    return given


def error_of(status: int, message: str, kind: str | None) -> dict[str, Any]:
    """Return OpenAI's form of an error."""
    usual = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind or usual, "param": None, "code": None}}


class Chunks:
    """Writes the chunks of a chat completion as its stream."""

    def feed(self, chunk: Body) -> bytes:  # noqa: D102
        return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"

    def end(self) -> bytes:  # noqa: D102
        return b"data: [DONE]\n\n"


CHAT = ChatCompletions()
