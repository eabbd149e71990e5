"""A chat completion, in one piece or in chunks, as an answer of OpenAI's Responses API.

Both are made of the same items (reasoning, message, calls of functions), by the same functions; a stream shows them
as they grow, and its last event holds the answer that a request without a stream would have got.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orla_lg.core.call import OBJECT
from orla_lg.wires.reading import MAX_COUNT, Garbage, count, is_number, list_in, object_in
from orla_lg.wires.tool_calls import ToolCalls
from orla_lg.wires.wire import Body

CUT = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Why an answer is incomplete, by the reason in chat completions."""
_BROKEN = frozenset({"abort", "error"})
"""Reasons of engines that gave up."""
_TIERS = ("auto", "default", "flex", "scale", "priority")
_CODES: Mapping[str, tuple[Any, ...]] = {
    "rate_limit_exceeded": ("rate_limit_exceeded", 429, "429"),
    "invalid_prompt": ("invalid_prompt", "invalid_request_error", "BadRequestError", 400, "400"),
}
"""What engines say in chat completions, by the codes that an answer may fail with; all else is the server's error."""
_ECHOED: Mapping[str, Any] = {
    "instructions": None, "max_output_tokens": None, "max_tool_calls": None, "metadata": {},
    "parallel_tool_calls": True, "prompt_cache_key": None, "safety_identifier": None, "temperature": None,
    "tool_choice": "auto", "tools": [], "top_logprobs": 0, "top_p": None, "user": None,
}  # fmt: skip
"""Fields of a request that its answer repeats, with what stands there where the request has none."""


def fresh(prefix: str) -> str:
    """Return a new id, as OpenAI writes them."""
    return f"{prefix}_{secrets.token_hex(24)}"


def now_s() -> int:
    """Return the time in seconds since the epoch."""
    return int(time.time())


# The parts of an answer


def answer_of(completion: Body, asked: Body) -> dict[str, Any]:
    """Return the answer in one piece to the request *asked*.

    Raises:
        Garbage: The completion has no answer in it.
    """
    try:
        return _answer_of(completion, asked)
    except RecursionError as error:
        raise Garbage("the completion is nested too deeply") from error


def _answer_of(completion: Body, asked: Body) -> dict[str, Any]:
    if said := completion.get("error"):
        raise Garbage(f"the engine failed: {said}", said)
    choice = first_choice(completion)
    if choice is None or not isinstance(choice.get("message"), Mapping):
        raise Garbage("the completion has no message in it")
    message, items = choice["message"], list[dict[str, Any]]()
    if thought := reasoning_in(message):
        items.append(reasoning_item(fresh("rs"), thought, summarized=wants_summary(asked)))
    logprobs = logprobs_in(choice)
    parts = [text_part(text, logprobs)] if (text := text_in(message)) else []
    parts += [refusal_part(refused)] if (refused := refusal_in(message)) else []
    if parts:
        items.append(message_item(fresh("msg"), parts))
    calls = ToolCalls()
    for at, call in enumerate(list_in(message, "tool_calls")):
        calls.add({**call, "index": at} if isinstance(call, Mapping) else call)
    items += [call_item(fresh("fc"), **call) for call in calls_in(calls)]
    return finished(begun(completion, asked), items, completion, choice.get("finish_reason"))


def begun(completion: Body, asked: Body) -> dict[str, Any]:
    """Return the answer as it is before anything of it is there."""
    text, reasoning = (said if isinstance(said := asked.get(key), OBJECT) else {} for key in ("text", "reasoning"))
    created, model, tier = (completion.get(key) for key in ("created", "model", "service_tier"))
    echoed = {key: default if asked.get(key) is None else asked[key] for key, default in _ECHOED.items()}
    return {
        "id": fresh("resp"),
        "object": "response",
        "created_at": count(created) or now_s(),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": model if isinstance(model, str) and model else str(asked.get("model") or ""),
        "output": [],
        **echoed,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None, **reasoning},
        "service_tier": tier if tier in _TIERS else None,
        "store": False,  # of a stored answer the next request could speak
        "text": {**text, "format": text.get("format") or {"type": "text"}},
        "truncation": "disabled",  # what is too long is refused, whatever was asked for
        "usage": None,
    }


def finished(begun: Body, items: Sequence[Body], completion: Body, reason: Any) -> dict[str, Any]:
    """Return the whole answer, with why it ended and the token counts of *completion*."""
    answer = {**begun, "output": [*items], "usage": _usage_of(completion.get("usage"))}
    if isinstance(reason, str) and reason in _BROKEN:
        return failed(answer, "server_error", f"the engine ended the answer: {reason}")
    cut = CUT.get(reason) if isinstance(reason, str) else None
    if cut is not None:
        if items:
            answer["output"][-1] = {**items[-1], "status": "incomplete"}
        return {**answer, "status": "incomplete", "incomplete_details": {"reason": cut}}
    return {**answer, "status": "completed", "completed_at": now_s()}


def failed(answer: Body, code: Any, message: Any) -> dict[str, Any]:
    """Return the answer as one that an engine gave up, with the nearest code of this wire."""
    nearest = next((name for name, said in _CODES.items() if code in said), "server_error")
    return {**answer, "status": "failed", "error": {"code": nearest, "message": str(message)}}


def _usage_of(usage: Any) -> dict[str, Any] | None:
    if not isinstance(usage, Mapping):
        return None
    asked, said = count(usage.get("prompt_tokens")) or 0, count(usage.get("completion_tokens")) or 0
    total = count(usage.get("total_tokens"))
    return {
        "input_tokens": asked,
        "input_tokens_details": {
            "cached_tokens": _detail(usage, "prompt_tokens_details", "cached_tokens"),
            "cache_write_tokens": _detail(usage, "prompt_tokens_details", "cache_write_tokens"),
        },
        "output_tokens": said,
        "output_tokens_details": {
            "reasoning_tokens": _detail(usage, "completion_tokens_details", "reasoning_tokens")
        },
        "total_tokens": asked + said if total is None else total,
    }


def _detail(usage: Body, key: str, name: str) -> int:
    details = usage.get(key)
    return count(details.get(name)) or 0 if isinstance(details, Mapping) else 0


def reasoning_item(item_id: str, text: str, *, summarized: bool) -> dict[str, Any]:
    """Return reasoning in the clear, where a summary was asked for as one: there its reader looks for it."""
    item: dict[str, Any] = {"id": item_id, "type": "reasoning", "summary": [], "encrypted_content": None}
    if summarized:
        return {**item, "summary": [{"type": "summary_text", "text": text}]}
    return {**item, "content": [{"type": "reasoning_text", "text": text}]}


def message_item(item_id: str, parts: Sequence[Body]) -> dict[str, Any]:
    """Return what the model said."""
    return {"id": item_id, "type": "message", "role": "assistant", "status": "completed", "content": [*parts]}


def text_part(text: str, logprobs: Sequence[Body] = ()) -> dict[str, Any]:
    """Return a text of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": [*logprobs]}


def refusal_part(text: str) -> dict[str, Any]:
    """Return a refusal in a message."""
    return {"type": "refusal", "refusal": text}


def call_item(item_id: str, *, call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """Return the call of a function."""
    return {
        "id": item_id, "type": "function_call", "call_id": call_id, "name": name, "arguments": arguments,
        "status": "completed",
    }  # fmt: skip


def calls_in(calls: ToolCalls) -> Iterator[dict[str, str]]:
    """Return the calls of functions, each by what its item is made of.

    Raises:
        Garbage: A function has no name.
    """
    for call in calls.whole():
        function = object_in(call, "function")
        if not isinstance(name := function.get("name"), str) or not name:
            raise Garbage("a call of a function without a name")
        yield {"call_id": call.get("id") or fresh("call"), "name": name, "arguments": function["arguments"]}


# What a message or a delta has of them


def first_choice(holder: Body) -> Body | None:
    """Return the choice of this wire's one answer."""
    for choice in list_in(holder, "choices"):
        if not isinstance(choice, Mapping):
            raise Garbage(f"a choice is {type(choice).__name__}, expected an object")
        if not choice.get("index"):
            return choice
    return None


def text_in(message: Body) -> str:
    """Return the text of a message or a delta."""
    return _joined(message.get("content"), ("text", "output_text"), "text")


def reasoning_in(message: Body) -> str:
    """Return the reasoning in a message or a delta, under either name that engines give it."""
    for key in ("reasoning_content", "reasoning"):
        if isinstance(text := message.get(key), str) and text:
            return text
    return ""


def refusal_in(message: Body) -> str:
    """Return the refusal in a message or a delta."""
    said = message.get("refusal")
    return said if isinstance(said, str) else _joined(message.get("content"), ("refusal",), "refusal", alone=False)


def _joined(content: Any, kinds: tuple[str, ...], key: str, *, alone: bool = True) -> str:
    """Return a text that stands *alone* or in parts of these kinds."""
    if isinstance(content, str):
        return content if alone else ""
    parts = content if isinstance(content, list) else ()
    texts = (part.get(key) for part in parts if isinstance(part, Mapping) and part.get("type") in kinds)
    return "".join(text for text in texts if isinstance(text, str))


def logprobs_in(choice: Body) -> list[dict[str, Any]]:
    """Return what a choice says of the tokens of its text, as far as it can be read."""
    tokens = _tokens(choice.get("logprobs"), "content")
    return [{**_logprob(each), "top_logprobs": [*map(_logprob, _tokens(each, "top_logprobs"))]} for each in tokens]


def _tokens(holder: Any, key: str) -> list[Body]:
    held = holder.get(key) if isinstance(holder, Mapping) else None
    tokens = [each for each in held if isinstance(each, Mapping)] if isinstance(held, list) else []
    return [each for each in tokens if is_number(said := each.get("logprob")) and abs(said) < MAX_COUNT]


def _logprob(token: Body) -> dict[str, Any]:
    text, coded = token.get("token"), token.get("bytes")
    return {
        "token": text if isinstance(text, str) else "",
        "bytes": [each for each in coded if type(each) is int and each < 256] if isinstance(coded, list) else [],
        "logprob": token["logprob"],
    }


def wants_summary(asked: Body) -> bool:
    """Whether a request asks for a summary of the reasoning."""
    reasoning = asked.get("reasoning")
    return isinstance(reasoning, OBJECT) and bool(reasoning.get("summary") or reasoning.get("generate_summary"))
