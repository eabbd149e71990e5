"""The Responses API as a wire: what it asks, what its answers say, and both in chat completions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any, get_args

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from langchain_openai.chat_models.base import (
    _construct_lc_result_from_responses_api,
    _convert_responses_chunk_to_generation_chunk,
)
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel

from orla_lg.core.call import Usage
from orla_lg.wires import chat, reading, responses_answer, responses_stream
from orla_lg.wires.assembly import Assembly
from orla_lg.wires.reading import Garbage
from orla_lg.wires.responses import RESPONSES
from orla_lg.wires.wire import Untranslatable
from tests.openai_api.test_assembly import DIALECTS
from tests.openai_api.test_garbage import DEEP, ODD, VALUES
from tests.wires.responses_server import MODEL, ResponsesServer, Turn

EVENTS: dict[str, type[BaseModel]] = {
    get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(get_args(ResponseStreamEvent)[0])
}
"""The SDK's, by type."""
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FLAT = {"type": "function", "name": "look", "description": "Looks.", "parameters": SCHEMA, "strict": True}
NESTED = {"type": "function", "function": {key: FLAT[key] for key in ("name", "description", "parameters", "strict")}}
USER = {"content": "hello", "role": "user"}


def strict(event: dict[str, Any]) -> Any:
    """Return an event as the SDK's type of it takes it, without leniency."""
    return EVENTS[event["type"]].model_validate(event)


def said_in(body: dict[str, Any]) -> list[Any]:
    return RESPONSES.to_chat(body)["messages"]


# Requests


@pytest.mark.parametrize(("asked", "chatted"), [
    ({"input": "hello"}, {}),
    ({"input": "hello", "temperature": 0.5, "top_p": 0.9, "user": "me", "metadata": {"a": "b"}},
     {"temperature": 0.5, "top_p": 0.9, "user": "me", "metadata": {"a": "b"}}),
    ({"input": "hello", "temperature": None, "tools": None, "text": None, "reasoning": None, "include": None}, {}),
    ({"input": "hello", "max_output_tokens": 7}, {"max_tokens": 7}),
    ({"input": "hello", "reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}),
    ({"input": "hello", "store": False}, {"store": False}),
    ({"input": "hello", "store": True, "truncation": "auto", "max_tool_calls": 3}, {}),
    ({"input": "hello", "include": ["reasoning.encrypted_content"]}, {}),
    ({"input": "hello", "include": ["message.output_text.logprobs"]}, {"logprobs": True, "top_logprobs": 0}),
    ({"input": "hello", "top_logprobs": 2}, {"logprobs": True, "top_logprobs": 2}),
    ({"input": "hello", "stream": True, "stream_options": {"include_obfuscation": False}}, {"stream": True}),
    ({"input": "hello", "top_k": 5, "cache_salt": "x"}, {"top_k": 5, "cache_salt": "x"}),
    ({"input": "hello", "tools": [FLAT], "tool_choice": "required", "parallel_tool_calls": False},
     {"tools": [NESTED], "tool_choice": "required", "parallel_tool_calls": False}),
    ({"input": "hello", "tools": [FLAT], "tool_choice": {"type": "function", "name": "look"}},
     {"tools": [NESTED], "tool_choice": {"type": "function", "function": {"name": "look"}}}),
    ({"input": "hello", "tools": [FLAT, {**FLAT, "name": "other"}],
      "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look"}]}},
     {"tools": [NESTED], "tool_choice": "required"}),
    ({"input": "hello", "tools": [{"type": "function", "name": "f", "parameters": None, "strict": None}]},
     {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    ({"input": "hello", "tools": [], "tool_choice": "auto", "parallel_tool_calls": True}, {}),
    ({"input": "hello", "text": {"format": {"type": "text"}, "verbosity": "low"}}, {"verbosity": "low"}),
    ({"input": "hello", "text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
    ({"input": "hello", "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}},
     {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}}),
])  # fmt: skip
def test_a_request_becomes_a_chat_completion(asked: dict[str, Any], chatted: dict[str, Any]) -> None:
    before = json.dumps(asked)
    assert RESPONSES.to_chat({"model": "m", **asked}) == {"messages": [USER], **chatted}
    assert json.dumps(asked) == before


ITEMS: dict[str, tuple[list[Any], list[Any]]] = {
    "messages": (
        [{"role": "developer", "content": "be brief"}, {"type": "message", "role": "user", "content": "hello"},
         {"role": "assistant", "content": "hi"}, {"role": "assistant", "content": "again"}],
        [{"content": "be brief", "role": "system"}, USER, {"content": "hi", "role": "assistant"},
         {"content": "again", "role": "assistant"}]),
    "parts": (
        [{"role": "user", "content": [
            {"type": "input_text", "text": "see", "prompt_cache_breakpoint": {"mode": "explicit"}},
            {"type": "input_image", "image_url": "data:,x", "detail": "low"},
            {"type": "input_image", "image_url": "data:,y", "detail": "original"}]}],
        [{"content": [
            {"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:,x", "detail": "low"}},
            {"type": "image_url", "image_url": {"url": "data:,y"}}], "role": "user"}]),
    "a turn": (
        [{"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
         {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [
             {"type": "output_text", "text": "I ", "annotations": []}, {"type": "output_text", "text": "look"}]},
         {"type": "function_call", "id": "fc_1", "call_id": "a", "name": "look", "arguments": "{}"},
         {"type": "function_call", "call_id": "b", "name": "look", "arguments": "{}", "status": "completed"},
         {"type": "function_call_output", "call_id": "a", "output": "sun"},
         {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "rain"}]}],
        [{"content": "I look", "role": "assistant", "reasoning_content": "hm", "tool_calls": [
            {"type": "function", "id": "a", "function": {"name": "look", "arguments": "{}"}},
            {"type": "function", "id": "b", "function": {"name": "look", "arguments": "{}"}}]},
         {"content": "sun", "role": "tool", "tool_call_id": "a"},
         {"content": [{"type": "text", "text": "rain"}], "role": "tool", "tool_call_id": "b"}]),
    "one call after the other": (
        [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
         {"type": "function_call_output", "call_id": "a", "output": ""},
         {"type": "function_call", "call_id": "b", "name": "f", "arguments": "{}"},
         {"type": "function_call_output", "call_id": "b", "output": ""}],
        [{"content": None, "role": "assistant",
          "tool_calls": [{"type": "function", "id": "a", "function": {"name": "f", "arguments": "{}"}}]},
         {"content": "", "role": "tool", "tool_call_id": "a"},
         {"content": None, "role": "assistant",
          "tool_calls": [{"type": "function", "id": "b", "function": {"name": "f", "arguments": "{}"}}]},
         {"content": "", "role": "tool", "tool_call_id": "b"}]),
    "a summary": (
        [{"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "a"},
                                                         {"type": "summary_text", "text": "b"}]},
         {"role": "assistant", "content": "c"}],
        [{"content": "c", "role": "assistant", "reasoning_content": "a\n\nb"}]),
    "encrypted": (
        [{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
         {"role": "assistant", "content": "c"}],
        [{"content": "c", "role": "assistant"}]),
    "nothing but reasoning": (
        [{"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "a"}]}],
        [{"content": "", "role": "assistant", "reasoning_content": "a"}]),
    "a refusal": (
        [{"role": "assistant", "type": "message", "content": [{"type": "refusal", "refusal": "no"}]}],
        [{"content": "no", "role": "assistant"}]),
}  # fmt: skip


@pytest.mark.parametrize("name", ITEMS)
def test_items_become_messages(name: str) -> None:
    items, messages = ITEMS[name]
    assert said_in({"input": items}) == messages
    assert said_in({"input": items, "instructions": "You see."}) == [
        {"content": "You see.", "role": "system"},
        *messages,
    ]


@pytest.mark.parametrize(("asked", "field"), [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"conversation": {"id": "conv_1"}}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ({"moderation": {"model": "m"}}, "moderation"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm"),
    ({"include": ["reasoning.encrypted_content", "new.thing"]}, "include[1]"),
    ({"include": [{}]}, "include[0]"),
    ({"tools": [FLAT, {"type": "web_search"}]}, "tools[1].type"),
    *(({"tools": [{"type": kind}]}, "tools[0].type") for kind in (
        "web_search_preview", "file_search", "code_interpreter", "computer_use_preview", "mcp", "image_generation",
        "custom", "namespace", "local_shell", "shell", "apply_patch", "tool_search")),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name"),
    ({"tools": [{**FLAT, "allowed_callers": ["programmatic"]}]}, "tools[0].allowed_callers"),
    ({"tools": ["x"]}, "tools[0].type"),
    ({"tools": {}}, "tools"),
    ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "custom", "name": "x"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}},
     "tool_choice.tools[0].type"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
    ({"text": "x"}, "text"),
    ({"input": 3}, "input"),
    ({"input": ["x"]}, "input[0]"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
    *(({"input": [USER, {"type": kind, "id": "x"}]}, "input[1].type") for kind in (
        "web_search_call", "file_search_call", "computer_call", "computer_call_output", "code_interpreter_call",
        "image_generation_call", "mcp_call", "mcp_list_tools", "mcp_approval_request", "custom_tool_call",
        "custom_tool_call_output", "local_shell_call", "compaction", "additional_tools", "program")),
    ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
     "input[0].content[0].file_id"),
    ({"input": [{"role": "critic", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "assistant", "content": [{"type": "input_image", "image_url": "x"}]}]},
     "input[0].content[0].type"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "a", "output": [{"type": "input_file"}]}]},
     "input[0].output[0].type"),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}", "namespace": "n"}]},
     "input[0].namespace"),
])  # fmt: skip
def test_what_cannot_be_said_is_named(asked: dict[str, Any], field: str) -> None:
    with pytest.raises(Untranslatable) as refused:
        RESPONSES.to_chat({"model": "m", "input": "hello", **asked})
    assert refused.value.field == field and str(refused.value).startswith(f"{field}: ")
    assert RESPONSES.ask_of({"model": "m", "input": "hello", **asked}).model == "m"


NAMES = st.sampled_from(["look", "listen"])
TEXTS = st.text(max_size=12)
ARGUMENTS = st.dictionaries(TEXTS, TEXTS | st.integers(), max_size=2).map(json.dumps)


@st.composite
def turns(draw: st.DrawFn) -> dict[str, Any]:
    """Return what a model may say, as a message of a chat completion."""
    message: dict[str, Any] = {"content": draw(TEXTS.filter(bool) | st.none()), "role": "assistant"}
    if thought := draw(TEXTS):
        message["reasoning_content"] = thought
    calls = draw(st.lists(st.tuples(NAMES, ARGUMENTS), max_size=3))
    if calls:
        message["tool_calls"] = [
            {"type": "function", "id": f"call_{at}", "function": {"name": name, "arguments": arguments}}
            for at, (name, arguments) in enumerate(calls)
        ]
    return message


def completion(message: dict[str, Any], **more: Any) -> dict[str, Any]:
    reason = more.pop("reason", "stop")
    choice = {"index": 0, "message": message, "finish_reason": reason, **more.pop("choice", {})}
    return {"id": "x", "object": "chat.completion", "created": 7, "model": "m", "choices": [choice], **more}


@settings(deadline=None)  # types of the SDK are built when they are first used
@given(st.lists(turns(), min_size=1, max_size=3), st.sampled_from([None, "auto"]))
def test_what_a_model_said_comes_back_as_it_said_it(said: list[dict[str, Any]], summary: str | None) -> None:
    asked = {"model": "m", "input": "hello", "reasoning": {"summary": summary}}
    items: list[Any] = [USER]
    expected: list[Any] = [USER]
    for message in said:
        answer = RESPONSES.from_chat(completion(message), asked)
        Response.model_validate(answer)
        items += answer["output"]
        outputs = [
            {"type": "function_call_output", "call_id": call["id"], "output": "done"}
            for call in message.get("tool_calls", ())
        ]
        items += [*outputs, USER]
        is_empty = message == {"content": None, "role": "assistant"}
        calls = bool(message.get("tool_calls"))
        expected += (
            [] if is_empty else [{**message, "content": message["content"] if calls else message["content"] or ""}]
        )
        expected += [{"content": "done", "role": "tool", "tool_call_id": each["call_id"]} for each in outputs]
        expected.append(USER)
    assert said_in({"input": items}) == expected


CONVERSATION: list[BaseMessage] = [
    SystemMessage("You are brief."),
    HumanMessage("Weather?"),
    AIMessage("", tool_calls=[{"name": "look", "args": {"city": "Köln"}, "id": "call_1"}]),
    ToolMessage("sun", tool_call_id="call_1"),
    AIMessage("Sunny."),
    HumanMessage([{"type": "text", "text": "And here?"}, {"type": "image_url", "image_url": {"url": "data:,x"}}]),
]


def test_a_prompt_is_the_same_prefix_on_both_wires() -> None:
    plain, responses = (
        ChatOpenAI(model="m", api_key="any", use_responses_api=which, max_tokens=9) for which in (False, True)
    )
    for length in range(1, len(CONVERSATION) + 1):
        asked = responses._get_request_payload(CONVERSATION[:length])
        ask, other = RESPONSES.ask_of(asked), chat.ask_of(plain._get_request_payload(CONVERSATION[:length]))
        assert ask.pieces == other.pieces
        assert (ask.prompt_chars, ask.images, ask.max_tokens) == (other.prompt_chars, other.images, other.max_tokens)


def test_what_is_asked() -> None:
    form = {"type": "json_schema", "name": "n", "schema": SCHEMA}
    ask = RESPONSES.ask_of(
        {
            "model": "m",
            "input": "hello",
            "tools": [FLAT],
            "text": {"format": form},
            "stream": True,
            "max_output_tokens": 4,
        }
    )
    assert (ask.model, ask.stream, ask.json_schema, ask.tools, ask.max_tokens) == ("m", True, True, True, 4)
    assert ask.messages == [USER] and ask.tools_chars > 0


def test_a_mapping_sets_fields_under_this_wires_names() -> None:
    parameters = {
        "max_tokens": 9, "reasoning_effort": "low", "temperature": 0, "verbosity": "low", "extra_body": {"top_k": 1},
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
    }  # fmt: skip
    body = {"model": "x", "input": "hello", "reasoning": {"summary": "auto"}}
    before = json.dumps(body)
    assert RESPONSES.with_model(body, "m", parameters) == {
        "model": "m", "input": "hello", "max_output_tokens": 9, "temperature": 0, "top_k": 1,
        "reasoning": {"summary": "auto", "effort": "low"},
        "text": {"verbosity": "low", "format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
    }  # fmt: skip
    own = {
        "model": "x", "input": "hello", "max_output_tokens": 3, "reasoning": {"effort": "high"}, "temperature": 1,
        "text": {"format": {"type": "text"}, "verbosity": "high"},
    }  # fmt: skip
    assert RESPONSES.with_model(own, "m", parameters) == {**own, "model": "m", "top_k": 1}
    assert json.dumps(body) == before and RESPONSES.with_model(body, "m", {}) == {**body, "model": "m"}


def test_an_engines_own_id_stays_one_of_an_answer() -> None:
    assert RESPONSES.fields({"request_id": "ab-1", "priority": 2}) == {"request_id": "resp_ab-1", "priority": 2}
    assert RESPONSES.fields({"priority": 2}) == {"priority": 2}


# Answers in one piece


def test_an_answer_is_whole() -> None:
    usage = {
        "prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 8}, "completion_tokens_details": {"reasoning_tokens": 2},
    }  # fmt: skip
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    message = {"role": "assistant", "content": "hi", "reasoning": "hm", "tool_calls": [call]}
    asked = {"model": "auto", "input": "hello", "tools": [FLAT], "metadata": {"a": "b"}, "store": True}
    answer = RESPONSES.from_chat(completion(message, usage=usage), asked)
    parsed = Response.model_validate(answer)
    assert [item.type for item in parsed.output] == ["reasoning", "message", "function_call"]
    assert parsed.output_text == "hi" and parsed.status == "completed" and parsed.model == "m"
    assert parsed.usage is not None and parsed.usage.input_tokens_details.cached_tokens == 8
    assert parsed.usage.output_tokens_details.reasoning_tokens == 2 and parsed.usage.total_tokens == 13
    assert parsed.metadata == {"a": "b"} and parsed.created_at == 7 and answer["store"] is False
    ids = [answer["id"], *(item["id"] for item in answer["output"])]
    assert [each.split("_")[0] for each in ids] == ["resp", "rs", "msg", "fc"] and len(set(ids)) == 4
    assert answer["output"][2]["call_id"] == "call_1"
    assert RESPONSES.from_chat(completion(message), asked)["id"] != answer["id"]


@pytest.mark.parametrize(("reason", "status", "why"), [
    ("stop", "completed", None), ("tool_calls", "completed", None), (None, "completed", None),
    ("length", "incomplete", "max_output_tokens"), ("content_filter", "incomplete", "content_filter"),
    ("abort", "failed", None),
])  # fmt: skip
def test_why_an_answer_ends(reason: str | None, status: str, why: str | None) -> None:
    answer = RESPONSES.from_chat(completion({"content": "hi"}, reason=reason), {})
    assert answer["status"] == status and (answer["incomplete_details"] or {}).get("reason") == why
    assert (answer["error"] is not None) == (status == "failed")
    assert answer["output"][0]["status"] == ("incomplete" if why else "completed")


def test_a_refusal_is_one() -> None:
    answer = RESPONSES.from_chat(completion({"content": None, "refusal": "no"}), {})
    assert answer["output"][0]["content"] == [{"type": "refusal", "refusal": "no"}]


def test_what_is_known_of_tokens_comes_along() -> None:
    token = {"token": "hi", "logprob": -0.5, "bytes": [104, 105], "top_logprobs": [
        {"token": "hi", "logprob": -0.5, "bytes": [104, 105]}, {"token": "ho", "logprob": float("nan")}]}  # fmt: skip
    whole = completion({"content": "hi"}, choice={"logprobs": {"content": [token, {"logprob": None}]}})
    (part,) = RESPONSES.from_chat(whole, {})["output"][0]["content"]
    assert part["logprobs"] == [{**token, "top_logprobs": token["top_logprobs"][:1]}]


@pytest.mark.parametrize(
    "whole", [{}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": "x"}]}, {"error": {"message": "no"}}]
)
def test_a_completion_without_an_answer_is_garbage(whole: dict[str, Any]) -> None:
    with pytest.raises(Garbage):
        RESPONSES.from_chat(whole, {})


@pytest.mark.parametrize(("status", "kind"), [(400, None), (429, None), (500, None), (400, "BadRequestError")])
def test_an_error_is_openais(status: int, kind: str | None) -> None:
    body = RESPONSES.error(status, "it is wrong", kind=kind)
    assert body["error"]["message"] == "it is wrong" and body["error"]["code"] == kind and body["error"]["type"]


# Streams


def cut(draw: st.DrawFn, text: str, most: int = 3) -> list[str]:
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=most)))
    return [text[one:other] for one, other in itertools.pairwise([0, *places, len(text)])]


@st.composite
def streams(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Return the chunks of an answer, cut anywhere, the pieces of calls one after the other or mixed."""
    message = draw(turns())
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": draw(st.sampled_from(["", None]))}]
    key = draw(st.sampled_from(["reasoning_content", "reasoning"]))
    deltas += [{key: piece} for piece in cut(draw, message.get("reasoning_content", ""))]
    deltas += [{"content": piece} for piece in cut(draw, message["content"] or "")]
    queues: list[list[dict[str, Any]]] = []
    for at, call in enumerate(message.get("tool_calls", ())):
        function = call["function"]
        begins = {"index": at, "id": call["id"], "type": "function", "function": {**function, "arguments": ""}}
        goes_on = [{"index": at, "function": {"arguments": piece}} for piece in cut(draw, function["arguments"])]
        queues.append([begins, *goes_on])
    mixed = draw(st.booleans())
    while queues:
        queue = queues[draw(st.integers(0, len(queues) - 1)) if mixed else 0]
        # The first pieces keep their order: an engine numbers calls as they begin.
        queue = queue if "id" not in queue[0] else next(each for each in queues if "id" in each[0])
        deltas.append({"tool_calls": [queue.pop(0)]})
        queues = [each for each in queues if each]
    head = {"id": "x", "object": "chat.completion.chunk", "created": 7, "model": "m"}
    reason = draw(st.sampled_from(["stop", "length", "content_filter", "abort"]))
    chunks = [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 3}}
    place = draw(st.sampled_from(["none", "last", "own", "all"]))
    chunks.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    if place == "last":
        chunks[-1]["usage"] = usage
    elif place == "own":
        chunks.append({**head, "choices": [], "usage": usage})
    elif place == "all":
        chunks = [{**chunk, "usage": {**usage, "completion_tokens": at}} for at, chunk in enumerate(chunks)]
    return chunks


def events_of(chunks: list[dict[str, Any]], asked: dict[str, Any]) -> list[dict[str, Any]]:
    reader = RESPONSES.reader(asked)
    written = b"".join([*map(reader.feed, chunks), reader.end(), reader.end()])
    parsed = [reading.payload(event) for event in reading.EventSplitter().feed(written)]
    return [event for event in parsed if event is not None]


def whole_of(chunks: list[dict[str, Any]], asked: dict[str, Any]) -> dict[str, Any]:
    assembly = Assembly()
    for chunk in chunks:
        assembly.add(chunk)
    return RESPONSES.from_chat(assembly.completion(), asked)


def alike(answer: dict[str, Any]) -> dict[str, Any]:
    """Return an answer without what is new in each: ids and the time."""
    output = [{key: value for key, value in item.items() if key != "id"} for item in answer["output"]]
    for item in output:
        if str(item.get("call_id")).startswith("call_") and len(item["call_id"]) > 20:
            item["call_id"] = "made up"
    return {**{key: value for key, value in answer.items() if key not in ("id", "completed_at")}, "output": output}


@settings(deadline=None)
@given(streams(), st.sampled_from([None, "auto"]))
def test_a_stream_ends_in_the_answer_in_one_piece(chunks: list[dict[str, Any]], summary: str | None) -> None:
    asked = {"model": "m", "input": "hello", "reasoning": {"summary": summary}, "stream": True}
    events = events_of(chunks, asked)
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    last = events[-1]
    assert alike(last["response"]) == alike(whole_of(chunks, asked))
    assert last["type"] == f"response.{last['response']['status']}"
    heed_grammar(events)
    heed_sdk(events)
    heed_langchain(events)


def heed_grammar(events: list[dict[str, Any]]) -> None:
    """Hold that items follow one another, and that pieces make up what is done."""
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    opened: int | None = None
    pieces: dict[tuple[Any, ...], str] = {}
    for event in events[2:-1]:
        kind, at = event["type"].removeprefix("response."), event["output_index"]
        if kind == "output_item.added":
            assert opened is None and at == len({key[0] for key in pieces} | set(range(at)))
            opened = at
            continue
        assert opened == at
        place = (at, event.get("content_index"), event.get("summary_index"))
        if kind.endswith(".delta"):
            pieces[place] = pieces.get(place, "") + event["delta"]
        elif kind == "output_item.done":
            opened = None
        elif kind.endswith(("text.done", "refusal.done")):
            assert pieces[place] == event.get("text", event.get("refusal"))
        elif kind == "function_call_arguments.done":
            assert pieces.get(place, "") == event["arguments"]
    assert opened is None
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]


def heed_sdk(events: list[dict[str, Any]]) -> None:
    """Hold that the SDK takes each event strictly, and puts the stream together."""
    state: ResponseStreamState[None] = ResponseStreamState(input_tools=openai.omit, text_format=openai.omit)
    for event in events:
        state.handle_event(strict(event))
    if events[-1]["type"] == "response.completed":
        assert state._completed_response is not None
        output = [without_parsed(item) for item in state._completed_response.to_dict()["output"]]  # type: ignore[attr-defined]
        assert output == Response.model_validate(events[-1]["response"]).to_dict()["output"]


def without_parsed(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item without what the SDK's parsing adds."""
    parts = [{key: value for key, value in part.items() if key != "parsed"} for part in item.get("content") or ()]
    kept = {key: value for key, value in item.items() if key != "parsed_arguments"}
    return {**kept, "content": parts} if "content" in item else kept


def heed_langchain(events: list[dict[str, Any]]) -> None:
    """Hold that LangChain reads the same from a stream and from its last event."""
    if events[-1]["type"] == "response.failed":
        return
    index = output_index = sub_index = -1
    places: dict[str, int] = {}
    whole: AIMessageChunk | None = None
    for event in map(strict, events):
        index, output_index, sub_index, chunk = _convert_responses_chunk_to_generation_chunk(
            event, index, output_index, sub_index, item_output_indices=places
        )
        if chunk is not None:
            assert isinstance(chunk.message, AIMessageChunk)
            whole = chunk.message if whole is None else whole + chunk.message
    assert whole is not None
    result = _construct_lc_result_from_responses_api(Response.model_validate(events[-1]["response"]))
    once = result.generations[0].message
    assert isinstance(once, AIMessage)
    assert whole.text == once.text and whole.tool_calls == once.tool_calls
    assert whole.usage_metadata == once.usage_metadata
    summaries = [
        [part["text"] for block in each.content if block["type"] == "reasoning" for part in block["summary"]]  # type: ignore[index]
        for each in (whole, once)
    ]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize("name", DIALECTS)
def test_calls_in_the_dialects_of_engines(name: str) -> None:
    deltas, _ = DIALECTS[name]
    chunks = [{"created": 7, "choices": [{"index": 0, "delta": {"tool_calls": calls}}]} for calls in deltas]
    events = events_of(chunks, {"model": "m"})
    assert alike(events[-1]["response"]) == alike(whole_of(chunks, {"model": "m"}))
    heed_sdk(events)


def test_a_plain_call_is_shown_as_it_grows() -> None:
    function = {"name": "look", "arguments": ""}
    pieces: list[Any] = [{"index": 0, "id": "a", "function": function}]
    pieces += [{"index": 0, "function": {"arguments": text}} for text in ('{"a"', ": 1}")]
    pieces += [{"index": 1, "id": "b", "function": {**function, "arguments": "{}"}}]
    reader = RESPONSES.reader({})
    shown = [reader.feed({"choices": [{"delta": {"tool_calls": [piece]}}]}) for piece in pieces]
    counts = [part.count(b"function_call_arguments.delta\n") for part in shown]
    assert counts == [0, 1, 1, 1] and shown[3].count(b"output_item.done\n") == 1


def test_texts_after_a_call_follow_it() -> None:
    deltas: list[Any] = [
        {"content": "a"}, {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}]},
        {"content": "b"}, {"refusal": "no"}, {"reasoning": "c"},
    ]  # fmt: skip
    events = events_of([{"choices": [{"delta": delta}]} for delta in deltas], {})
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "message", "reasoning"]
    assert [part["type"] for part in output[2]["content"]] == ["output_text", "refusal"]
    heed_grammar(events)
    heed_sdk(events)


def test_an_answer_that_comes_at_once_in_a_stream() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": "hi", "tool_calls": [call, {**call, "id": "b"}]}
    events = events_of([completion(message)], {})
    assert alike(events[-1]["response"]) == alike(RESPONSES.from_chat(completion(message), {}))


@pytest.mark.parametrize(("said", "code", "text"), [
    ({"message": "boom", "type": "InternalServerError", "code": 500}, "server_error", "boom"),
    ({"message": "slow down", "code": "rate_limit_exceeded"}, "rate_limit_exceeded", "slow down"),
    ({"message": "bad", "type": "BadRequestError", "code": 400}, "invalid_prompt", "bad"),
    ("boom", "server_error", "boom"),
])  # fmt: skip
def test_an_engine_that_fails_half_way(said: Any, code: str, text: str) -> None:
    for before in ([], [{"choices": [{"delta": {"content": "hi"}}]}]):
        events = events_of([*before, {"error": said}, {"choices": [{"delta": {"content": "more"}}]}], {})
        assert events[0]["type"] == "response.created" and events[-1]["type"] == "response.failed"
        failed = events[-1]["response"]
        assert failed["error"] == {"code": code, "message": text} and len(failed["output"]) == len(before)
        heed_sdk(events)


def test_a_stream_without_an_answer_fails() -> None:
    assert events_of([], {})[-1]["type"] == "response.failed"
    call = {"index": 0, "id": "a", "function": {"arguments": "{}"}}
    events = events_of([{"choices": [{"delta": {"content": "hi", "tool_calls": [call]}}]}], {})
    assert events[-1]["type"] == "response.failed" and "without a name" in events[-1]["response"]["error"]["message"]
    heed_sdk(events)


def test_what_comes_before_garbage_is_not_lost() -> None:
    reader = RESPONSES.reader({})
    with pytest.raises(Garbage):
        reader.feed({"choices": [{"delta": {"content": "hi", "tool_calls": "x"}}]})
    written = reader.feed({"error": {"message": "garbage"}}) + reader.end()
    events = [reading.payload(event) or {} for event in reading.EventSplitter().feed(written)]
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:2] == ["created", "in_progress"] and kinds[-2:] == ["output_text.delta", "failed"]
    assert [event["sequence_number"] for event in events] == [*range(len(events))]


def test_an_answer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses_stream, "MAX_ANSWER_CHARS", 100)
    pieces: list[Any] = [{"content": "x" * 60}, {"tool_calls": [{"index": 10**12, "id": "a"}]}]
    for delta in pieces:
        reader = RESPONSES.reader({})
        reader.feed({"choices": [{"delta": delta}]})
        with pytest.raises(Garbage):
            reader.feed({"choices": [{"delta": delta}]})


# Whatever comes

BODIES = st.dictionaries(
    st.sampled_from([
        "input", "instructions", "tools", "tool_choice", "text", "reasoning", "include", "stream", "model"]),
    VALUES | st.lists(st.fixed_dictionaries(
        {}, optional={key: VALUES | st.sampled_from([
            "message", "user", "assistant", "function", "function_call", "function_call_output", "reasoning",
            "input_text", "allowed_tools"]) for key in (
            "type", "role", "content", "output", "call_id", "name", "arguments", "summary", "detail", "image_url")}
    ), max_size=3),
)  # fmt: skip


@settings(max_examples=60)
@given(BODIES)
def test_whatever_a_caller_writes(body: dict[str, Any]) -> None:
    ask = RESPONSES.ask_of(body)
    assert len(ask.pieces) == len(ask.messages) and ask.prompt_chars >= 0 and ask.images in (True, False)
    RESPONSES.with_model(body, "m", {"max_tokens": 3, "reasoning_effort": "low", "response_format": {"type": "text"}})
    try:
        RESPONSES.to_chat(body)
    except Untranslatable as refused:
        assert refused.field


@pytest.mark.parametrize("body", ODD)
def test_a_body_that_is_no_object_asks_for_nothing(body: Any) -> None:
    assert RESPONSES.ask_of(body).model == "auto"


DELTAS = st.dictionaries(
    st.sampled_from(["content", "reasoning", "reasoning_content", "refusal", "tool_calls", "role"]),
    VALUES | st.lists(st.fixed_dictionaries({}, optional={
        "index": st.sampled_from([*ODD, 0, 1]), "id": st.sampled_from([*ODD, "a", "b"]),
        "type": st.sampled_from([*ODD, "text"]), "text": VALUES,
        "function": VALUES | st.fixed_dictionaries({}, optional={
            "name": st.sampled_from([*ODD, "f"]), "arguments": st.sampled_from([*ODD, "{}"])}),
    }), max_size=3),
)  # fmt: skip
CHUNKS = st.fixed_dictionaries({}, optional={
    "choices": VALUES | st.lists(st.fixed_dictionaries({}, optional={
        "index": st.sampled_from([*ODD, 0]), "delta": DELTAS | VALUES, "message": DELTAS | VALUES,
        "finish_reason": VALUES, "logprobs": VALUES | st.fixed_dictionaries({"content": VALUES | st.lists(
            st.fixed_dictionaries({}, optional=dict.fromkeys(
                ("token", "logprob", "bytes", "top_logprobs"), VALUES)), max_size=2)}),
    }), max_size=2),
    "usage": VALUES | st.dictionaries(
        st.sampled_from(["prompt_tokens", "completion_tokens", "prompt_tokens_details"]), VALUES),
    "error": VALUES, "id": VALUES, "model": VALUES, "created": VALUES, "service_tier": VALUES,
})  # fmt: skip


@settings(deadline=None)
@given(st.lists(CHUNKS, max_size=4))
def test_whatever_an_engine_sends(chunks: list[dict[str, Any]]) -> None:
    for chunk in chunks:
        try:
            answer = RESPONSES.from_chat(chunk, {})
        except Garbage:
            continue
        Response.model_validate(json.loads(json.dumps(answer, allow_nan=False)))
    reader = RESPONSES.reader({})
    try:
        written = b"".join(map(reader.feed, chunks))
    except Garbage:
        return
    written += reader.end()
    for event in reading.EventSplitter().feed(written):
        strict(reading.payload(event) or {})


def test_what_is_nested_too_deeply_is_garbage() -> None:
    deep: Any = {}
    for _ in range(50_000):
        deep = {"a": deep}
    call = {"index": 0, "id": "a", "function": {"name": "f", "arguments": deep}}
    with pytest.raises(Garbage):
        RESPONSES.from_chat(completion({"content": None, "tool_calls": [call]}), {})
    with pytest.raises(Garbage):
        RESPONSES.reader({}).feed({"choices": [{"delta": {"tool_calls": [call]}}]})
    with pytest.raises(Garbage):
        RESPONSES.brings(b"data: " + DEEP * 20 + b"\n\n")


BYTES = st.sampled_from([
    b"data: ", b"event: ", b"\n", b"\n\n", b"\r\n", b'{"type": "response.completed"}', b'{"type": "error"}',
    b'"usage"', b': {"input_tokens": 3}', b": {", b'{"error": {"code": 3}}', b"[DONE]", b'"output_tokens": 3',
    b": ping",
])  # fmt: skip


@given(st.binary(max_size=60) | st.lists(BYTES).map(b"".join))
def test_whatever_bytes_come(data: bytes) -> None:
    RESPONSES.usage_in(data)
    RESPONSES.ends_well(data)
    for event in [*reading.EventSplitter().feed(data), data]:
        try:
            RESPONSES.brings(event)
        except Garbage:
            continue


# What a server of this wire sends

STREAM = {"model": MODEL, "input": "hello", "stream": True}


def streamed(server: ResponsesServer, body: dict[str, Any]) -> bytes:
    client = openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)
    with client, client.responses.with_streaming_response.create(**body) as response:
        return b"".join(response.iter_bytes())


@pytest.fixture(scope="module")
def server() -> Iterator[ResponsesServer]:
    with ResponsesServer() as server:
        yield server


def test_a_stream_is_watched(server: ResponsesServer) -> None:
    data = streamed(server, {**STREAM, "reasoning": {"effort": "low"}})
    events = reading.EventSplitter().feed(data)
    kinds = [(reading.payload(event) or {})["type"] for event in events]
    first = next(kind for kind, event in zip(kinds, events, strict=True) if RESPONSES.brings(event))
    assert first == "response.output_item.added"
    usage = RESPONSES.usage_in(data)
    assert usage is not None and usage.prompt_tokens > 0 and usage.completion_tokens > 3 and usage.cached_tokens == 0
    assert RESPONSES.ends_well(data)
    last = len(data) - len(events[-1])
    assert not any(RESPONSES.ends_well(data[:end]) for end in range(0, last, 7))
    assert not RESPONSES.ends_well(data[:-5]) and RESPONSES.ends_well(data + b": ping\n\n")


@pytest.mark.parametrize("turn", [Turn(text="word " * 20_000), Turn(calls=(("f", json.dumps({"a": "x" * 40_000})),))])
def test_the_last_event_of_a_long_answer_may_be_longer_than_what_is_kept(turn: Turn) -> None:
    with ResponsesServer(lambda body: turn) as server:
        server.machine.token_s = 0
        tool = {**FLAT, "parameters": {"type": "object", "properties": {"usage": {"type": "object"}}}}
        data = streamed(server, {**STREAM, "tools": [tool]})
    events, kept = reading.EventSplitter().feed(data), 16_384
    assert len(events[-1]) > 2 * kept
    assert RESPONSES.ends_well(data[-kept:]) and RESPONSES.usage_in(data[-kept:]) is not None
    start = 0
    for event in events[:-1]:
        start += len(event)
        if len(event) > kept:
            assert not RESPONSES.ends_well(data[:start][-kept:])
    created = events[0] + events[1]
    assert b'"usage":{' in created and RESPONSES.usage_in(created) is None  # the tool's own property


@pytest.mark.parametrize("last", ["completed", "incomplete", "failed"])
def test_type_may_stand_at_the_end_of_an_event(last: str) -> None:  # as vLLM writes it
    event = json.dumps({"response": {"output": []}, "sequence_number": 3, "type": f"response.{last}"}).encode()
    assert RESPONSES.ends_well(b"data: " + event + b"\n\n") and RESPONSES.ends_well(b"data: x\n\ndata: [DONE]\n\n")
    assert not RESPONSES.ends_well(b"data: " + event)


@pytest.mark.parametrize(("event", "brings"), [
    ({"type": "response.created", "response": {}}, False),
    ({"type": "response.in_progress", "response": {}}, False),
    ({"type": "keepalive"}, False),
    ({"type": "response.output_item.added", "item": {}}, True),
    ({"type": "response.completed", "response": {"error": None}, "error": None}, True),
    ({"type": "response.failed", "response": {"error": {"code": "server_error", "message": "no"}}}, None),
    ({"type": "response.failed", "response": {"error": {"code": "rate_limit_exceeded", "message": "no"}}}, None),
    ({"type": "response.failed", "response": None}, None),
    ({"type": "response.failed", "response": {"error": {"code": "invalid_prompt", "message": "no"}}}, True),
    ({"type": "error", "code": None, "message": "no"}, None),
    ({"type": "error", "code": "invalid_image", "message": "no"}, True),
    ({"error": {"code": 500, "message": "no"}}, None),
    ({"error": {"code": 400, "message": "no"}}, True),
    ({"object": "chat.completion.chunk", "choices": []}, None),
])  # fmt: skip
def test_what_begins_an_answer(event: dict[str, Any], brings: bool | None) -> None:
    data = b"data: " + json.dumps(event).encode() + b"\n\n"
    if brings is None:
        with pytest.raises(Garbage):
            RESPONSES.brings(data)
    else:
        assert RESPONSES.brings(data) is brings
    assert RESPONSES.brings(b": ping\n\n") is False and RESPONSES.brings(b"data: [DONE]\n\n") is True


def test_counts_that_cannot_be_are_not_believed() -> None:
    said = b'{"usage":{"input_tokens":3,"output_tokens":2,"input_tokens_details":{"cached_tokens":9}}}'
    assert RESPONSES.usage_in(said) == Usage(3, None, 2)
    assert RESPONSES.usage_in(b'{"usage":null}') is None and RESPONSES.usage_in(b'{"usage":{"input_tok') is None


# The stand-in itself


class Weather(BaseModel):
    city: str
    degrees: int


def test_the_stand_in_speaks_the_wire(server: ResponsesServer) -> None:
    with openai.OpenAI(base_url=server.url, api_key="any", max_retries=0) as client:
        first = client.responses.create(model=MODEL, input="hello " * 30, instructions="be brief")
        assert first.output_text.startswith("once upon") and first.usage is not None
        again = client.responses.create(model=MODEL, input="hello " * 30, instructions="be brief")
        assert again.usage is not None and again.usage.input_tokens_details.cached_tokens > 0
        follows = client.responses.create(model=MODEL, input="more", previous_response_id=first.id)
        assert follows.usage is not None and follows.usage.input_tokens > first.usage.input_tokens
        parsed = client.responses.parse(model=MODEL, input="weather?", text_format=Weather)
        assert parsed.output_parsed == Weather(city="word", degrees=7)
        for more in ({}, {"tools": [FLAT]}, {"reasoning": {"effort": "low", "summary": "auto"}}):
            with client.responses.stream(model=MODEL, input="hello", **more) as stream:  # type: ignore[arg-type]
                events = [event.type for event in stream]
                final = stream.get_final_response()
            assert events[0] == "response.created" and events[-1] == "response.completed" and final.output
        cut_off = client.responses.create(model=MODEL, input="hello", max_output_tokens=3)
        assert cut_off.status == "incomplete" and cut_off.output_text == "once upon a"
        with pytest.raises(openai.BadRequestError, match="not found"):
            client.responses.create(model=MODEL, input="more", previous_response_id="resp_x")
        with pytest.raises(openai.BadRequestError, match="messages"):
            client.responses.create(model=MODEL, input="more", extra_body={"messages": []})


def test_the_stand_in_fails_as_the_wire_does() -> None:
    turns = iter([
        Turn(status=429, error={"message": "slow down", "type": "requests", "code": "rate_limit_exceeded"}),
        Turn(text="half", error={"code": "server_error", "message": "boom"}),
        Turn(text="half", error={"code": "server_error", "message": "boom"}, breaks="error"),
    ])  # fmt: skip
    with ResponsesServer(lambda body: next(turns), key="right") as server:
        client = openai.OpenAI(base_url=server.url, api_key="right", max_retries=0)
        with client:
            with pytest.raises(openai.RateLimitError):
                client.responses.create(model=MODEL, input="hello")
            for last in ("response.failed", "error"):
                with client.responses.create(model=MODEL, input="hello", stream=True) as stream:
                    assert [event.type for event in stream][-1] == last
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key="wrong").responses.create(model=MODEL, input="hello")


def test_ids_are_fresh_and_can_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count()
    monkeypatch.setattr(responses_answer, "fresh", lambda prefix: f"{prefix}_{next(numbers)}")
    events = events_of([{"choices": [{"delta": {"content": "hi"}}]}], {})
    assert events[-1]["response"]["id"] == "resp_0" and events[-1]["response"]["output"][0]["id"] == "msg_1"
