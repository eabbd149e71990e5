"""Anthropic's Messages: what is asked, there and back, and streams, as the real SDK reads them."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import anthropic
import pytest
from anthropic._streaming import SSEDecoder
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import TypeAdapter

from orla_lg.core.call import Usage
from orla_lg.wires import chat, reading
from orla_lg.wires.messages import MESSAGES
from orla_lg.wires.reading import Garbage
from orla_lg.wires.wire import Untranslatable
from tests.wires.messages_server import MODEL, Answer, MessagesServer, text, thinking, tool_use

EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
ASKED = {"model": "m", "max_tokens": 99, "messages": [{"role": "user", "content": "hi"}], "stop_sequences": ["STOP"]}
PIXEL = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
PIXEL_URL = "data:image/png;base64,iVBORw0KGgo="

# Strategies

TEXTS = st.text(min_size=1, max_size=12)
NAMES = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
LEAVES = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=6)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(max_size=4), VALUES, max_size=3)
ANYTHING = st.recursive(
    LEAVES | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)


def named(*names: str) -> st.SearchStrategy[Any]:
    """Return objects of anything under names that mean something."""
    return st.dictionaries(st.sampled_from(names), ANYTHING | st.sampled_from(names), max_size=5)


# What is asked

REQUESTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a text": ({}, {"messages": [{"content": "hi", "role": "user"}]}),
    "a system prompt": (
        {"system": "S"},
        {"messages": [{"content": "S", "role": "system"}, {"content": "hi", "role": "user"}]},
    ),
    "a system prompt in blocks": (
        {"system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=4711;"},
            {"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "T"},
        ]},
        {"messages": [{"content": "ST", "role": "system"}, {"content": "hi", "role": "user"}]},
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [
            {"type": "image", "source": PIXEL}, {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
            {"type": "text", "text": "what?"},
        ]}]},
        {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": PIXEL_URL}},
            {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
            {"type": "text", "text": "what?"},
        ]}]},
    ),
    "calls and results": (
        {"messages": [
            {"role": "user", "content": "add"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "redacted_thinking", "data": "?"},
                {"type": "text", "text": "I add"},
                {"type": "tool_use", "id": "a", "name": "add", "input": {"x": 1, "ü": "é"}},
                {"type": "tool_use", "id": "b", "name": "see", "input": {}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "b", "content": [
                    text("one"), {"type": "image", "source": PIXEL}, text("two"),
                ]},
                {"type": "tool_result", "tool_use_id": "a", "content": "no such thing", "is_error": True},
                {"type": "text", "text": "go on"},
            ]},
        ]},
        {"messages": [
            {"role": "user", "content": "add"},
            {"role": "assistant", "content": "I add", "reasoning_content": "hm", "tool_calls": [
                {"type": "function", "id": "a", "function": {"name": "add", "arguments": '{"x": 1, "ü": "é"}'}},
                {"type": "function", "id": "b", "function": {"name": "see", "arguments": "{}"}},
            ]},
            {"role": "tool", "tool_call_id": "b", "content": "one\ntwo"},
            {"role": "tool", "tool_call_id": "a", "content": "Error: no such thing"},
            {"role": "user", "content": [
                {"type": "text", "text": "Shown by the tool call b:"},
                {"type": "image_url", "image_url": {"url": PIXEL_URL}}, {"type": "text", "text": "go on"},
            ]},
        ]},
    ),
    "an error that says so": (
        {"messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "a", "content": "Error: no", "is_error": True},
            {"type": "tool_result", "tool_use_id": "b", "is_error": True},
        ]}]},
        {"messages": [
            {"role": "tool", "tool_call_id": "a", "content": "Error: no"},
            {"role": "tool", "tool_call_id": "b", "content": "Error"},
        ]},
    ),
    "an answer that is begun": (
        {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": [text("It is ")]}]},
        {
            "messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is "}],
            "continue_final_message": True, "add_generation_prompt": False,
        },
    ),
    "tools": (
        {
            "tools": [
                {
                    "name": "add", "description": "adds", "input_schema": {"type": "object"}, "strict": True,
                    "cache_control": {"type": "ephemeral"},
                },
                {"type": "custom", "name": "see", "input_schema": {"type": "object"}, "allowed_callers": ["direct"]},
            ],
            "tool_choice": {"type": "tool", "name": "add", "disable_parallel_tool_use": True},
        },
        {
            "tools": [
                {"type": "function", "function": {
                    "name": "add", "description": "adds", "parameters": {"type": "object"}, "strict": True,
                }},
                {"type": "function", "function": {"name": "see", "parameters": {"type": "object"}}},
            ],
            "tool_choice": {"type": "function", "function": {"name": "add"}}, "parallel_tool_calls": False,
        },
    ),
    "any tool": (
        {"tools": [{"name": "a", "input_schema": {}}], "tool_choice": {"type": "any"}},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {}}}], "tool_choice": "required"},
    ),
    "no tools": ({"tools": [], "tool_choice": {"type": "auto"}}, {}),
    "bounds": (
        {"temperature": 0, "top_p": 0.5, "top_k": 7, "metadata": {"user_id": "u"}, "chat_template_kwargs": {"x": 1}},
        {"temperature": 0, "top_p": 0.5, "top_k": 7, "user": "u", "chat_template_kwargs": {"x": 1}},
    ),
    "a stream": ({"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}),
    "a schema": (
        {"output_config": {
            "format": {"type": "json_schema", "schema": {"title": "City", "type": "object"}}, "effort": "max",
        }},
        {
            "response_format": {"type": "json_schema", "json_schema": {
                "name": "City", "schema": {"title": "City", "type": "object"}, "strict": True,
            }},
            "reasoning_effort": "high",
        },
    ),
    "a schema, as it was asked for before": (
        {"output_format": {"type": "json_schema", "schema": {"type": "object"}}},
        {"response_format": {"type": "json_schema", "json_schema": {
            "name": "answer", "schema": {"type": "object"}, "strict": True,
        }}},
    ),
    "no thinking": ({"thinking": {"type": "disabled"}}, {"reasoning_effort": "none"}),
    "some thinking": ({"thinking": {"type": "enabled", "budget_tokens": 5000}}, {"reasoning_effort": "medium"}),
    "thinking as the model likes": ({"thinking": {"type": "adaptive"}}, {}),
    "what an engine does by itself, or not at all": (
        {
            "cache_control": {"type": "ephemeral"}, "context_management": {"edits": []}, "service_tier": "auto",
            "inference_geo": "eu", "speed": "fast", "diagnostics": {}, "container": None, "mcp_servers": [],
        },
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REQUESTS)
def test_a_request_becomes_a_chat_completions(case: str) -> None:
    said, wanted = REQUESTS[case]
    plain = {"messages": [{"content": "hi", "role": "user"}], "max_tokens": 99, "stop": ["STOP"]}
    assert MESSAGES.to_chat({**ASKED, **said}) == {**plain, **wanted}


UNTRANSLATABLE: dict[str, dict[str, Any]] = {
    "tools[1].type": {"tools": [{"name": "a", "input_schema": {}}, {"type": "web_search_20260318", "name": "w"}]},
    "tools[0].type": {"tools": [{"type": "computer_toolset_20260801"}]},
    "tools[0].defer_loading": {"tools": [{"name": "a", "input_schema": {}, "defer_loading": True}]},
    "tools[0].allowed_callers": {"tools": [{"name": "a", "allowed_callers": ["code_execution_20250825"]}]},
    "mcp_servers": {"mcp_servers": [{"type": "url", "url": "https://x", "name": "x"}]},
    "container": {"container": "c"},
    "compaction": {"compaction": {"type": "summary"}},
    "thread": {"thread": {"id": "t"}},
    "output_config.format.type": {"output_config": {"format": {"type": "grammar"}}},
    "system[0]": {"system": [{"type": "image", "source": PIXEL}]},
    "messages[0].content[1].type": {"messages": [{"role": "user", "content": [
        text("read"), {"type": "document", "source": {"type": "base64", "data": "", "media_type": "application/pdf"}},
    ]}]},
    "messages[0].content[0].source.type": {"messages": [{"role": "user", "content": [
        {"type": "image", "source": {"type": "file", "file_id": "f"}},
    ]}]},
    "messages[0].content[0].content[0].type": {"messages": [{"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "search_result", "source": "s"}]},
    ]}]},
    "messages[1].content[0].type": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [
        {"type": "server_tool_use", "id": "a", "name": "web_search", "input": {}},
    ]}]},
    "messages[1].content[0]": {"messages": [{"role": "user", "content": "hi"}, {"role": "system", "content": [
        {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "x"}},
    ]}]},
}  # fmt: skip


@pytest.mark.parametrize("field", UNTRANSLATABLE)
def test_what_cannot_be_said_is_named(field: str) -> None:
    body = {**ASKED, **UNTRANSLATABLE[field]}
    with pytest.raises(Untranslatable) as refused:
        MESSAGES.to_chat(body)
    assert refused.value.field == field
    MESSAGES.ask_of(body)


@settings(max_examples=150, deadline=None)
@given(
    ANYTHING | named("messages", "system", "tools", "tool_choice", "output_config", "thinking", "max_tokens", "model")
)
def test_whatever_a_caller_wrote_asks_for_something(body: Any) -> None:
    asked = MESSAGES.ask_of(body)
    assert asked.prompt_chars >= 0 and len(asked.prefix) == len(asked.messages)
    if isinstance(body, dict):
        try:
            MESSAGES.to_chat(body)
        except Untranslatable as refused:
            assert refused.field and refused.what


BLOCK_TYPES = ("text", "image", "tool_use", "tool_result", "thinking", "document", "redacted_thinking")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "role": st.sampled_from(["user", "assistant", "system", 7]),
                "content": st.lists(
                    named(
                        "text", "input", "content", "source", "id", "name", "thinking", "tool_use_id", "type"
                    ).flatmap(lambda block: st.sampled_from(BLOCK_TYPES).map(lambda kind: {**block, "type": kind})),
                    max_size=3,
                ),
            }
        ),
        max_size=3,
    )
)
def test_blocks_of_any_content_are_looked_at(messages: list[dict[str, Any]]) -> None:
    body = {**ASKED, "messages": messages}
    assert len(MESSAGES.ask_of(body).prefix) >= 0
    try:
        assert MESSAGES.to_chat(body)["messages"] == MESSAGES.ask_of(body).messages
    except Untranslatable as refused:
        assert refused.field.startswith("messages[")


CONVERSATION: list[AnyMessage] = [
    SystemMessage("Be brief."),
    HumanMessage("What is the weather in Bonn and Ulm?"),
    AIMessage("I look.", tool_calls=[{"name": "weather", "args": {"city": "Köln"}, "id": "call_1"}]),
    ToolMessage("rain", tool_call_id="call_1"),
    AIMessage("", tool_calls=[
        {"name": "weather", "args": {"city": "Ulm"}, "id": "a"}, {"name": "tell", "args": {}, "id": "b"},
    ]),
    ToolMessage("sun", tool_call_id="a"),
    ToolMessage("told", tool_call_id="b"),
    HumanMessage("And?"),
    AIMessage("Rain and sun."),
    HumanMessage([
        {"type": "text", "text": "What is on this?"},
        {"type": "image_url", "image_url": {"url": PIXEL_URL}},
    ]),
]  # fmt: skip


@pytest.mark.parametrize("length", range(1, len(CONVERSATION) + 1))
def test_a_conversation_is_the_same_prefix_whichever_client_sends_it(length: int) -> None:
    if isinstance(CONVERSATION[length - 1], SystemMessage):
        length += 1
    said = CONVERSATION[:length]
    openai = ChatOpenAI(model="m", api_key="k")._get_request_payload(said)
    messages = ChatAnthropic(model_name="m", api_key="k")._get_request_payload(said)
    assert MESSAGES.ask_of(messages).prefix == chat.ask_of(openai).prefix
    assert MESSAGES.ask_of(messages).images == (length == len(CONVERSATION))


def test_what_is_asked_is_known() -> None:
    asked = MESSAGES.ask_of({**ASKED, **REQUESTS["tools"][0], **REQUESTS["a schema"][0], "stream": True})
    assert (asked.model, asked.max_tokens, asked.stream, asked.tools, asked.json_schema) == (
        "m",
        99,
        True,
        True,
        True,
    )
    assert [each["function"]["name"] for each in asked.schemas] == ["add", "see"]
    assert MESSAGES.streams({"stream": True}) and not MESSAGES.streams(ASKED)


def test_what_a_mapping_sets_has_the_names_of_this_wire() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    given = {
        "max_tokens": 5, "stop": "END", "reasoning_effort": "low", "response_format": form, "top_k": 3,
        "extra_body": {"id_slot": 2},
    }  # fmt: skip
    made = MESSAGES.with_model({**ASKED, "max_tokens": 99}, "heavy", given)
    assert made == {
        **ASKED, "model": "heavy", "max_tokens": 99, "top_k": 3, "id_slot": 2,
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    }  # fmt: skip
    assert MESSAGES.with_model({}, "m", {"reasoning_effort": "none"})["thinking"] == {"type": "disabled"}
    assert ASKED["model"] == "m"


# There and back: the same conversation

TEXT_BLOCKS = TEXTS.map(text)
IMAGES = st.sampled_from([PIXEL, {"type": "url", "url": "https://x/y.png"}]).map(
    lambda source: {"type": "image", "source": source}
)
CALLS = st.lists(st.tuples(NAMES, OBJECTS), min_size=1, max_size=3)


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    """Return a request whose every tool call has a result, in any order."""
    messages: list[dict[str, Any]] = []
    numbers = itertools.count()
    pending: list[str] = []
    for _ in range(draw(st.integers(1, 4))):
        results = [
            {
                "type": "tool_result",
                "tool_use_id": called,
                "content": draw(TEXTS | st.lists(TEXT_BLOCKS, min_size=1, max_size=2)),
            }
            for called in draw(st.permutations(pending))
        ]
        said = draw(st.lists(TEXT_BLOCKS | IMAGES, min_size=0 if results else 1, max_size=3))
        plain = not results and len(said) == 1 and said[0]["type"] == "text" and draw(st.booleans())
        messages.append({"role": "user", "content": said[0]["text"] if plain else results + said})
        thought = draw(st.lists(TEXTS.map(thinking), max_size=1))
        answer = draw(st.lists(TEXT_BLOCKS, max_size=1))
        calls = [
            tool_use(name, f"toolu_{next(numbers)}") | {"input": given} for name, given in draw(CALLS | st.just([]))
        ]
        if not (answer or calls):
            answer = [text("yes")]
        messages.append({"role": "assistant", "content": thought + answer + calls})
        pending = [call["id"] for call in calls]
    messages.append({"role": "user", "content": [
        *({"type": "tool_result", "tool_use_id": called, "content": "done"} for called in pending), text("and?"),
    ]})  # fmt: skip
    system = draw(st.none() | TEXTS | st.lists(TEXT_BLOCKS, min_size=1, max_size=2))
    return {**ASKED, "messages": messages, **({} if system is None else {"system": system})}


def told(body: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Return what a request of Messages says, piece by piece."""
    system = body.get("system") or ""
    said: list[tuple[Any, ...]] = [
        ("system", system if isinstance(system, str) else "".join(each["text"] for each in system))
    ]
    for message in body["messages"]:
        content = message["content"]
        for block in [text(content)] if isinstance(content, str) else content:
            kind = block["type"]
            if kind == "image":
                source = block["source"]
                said.append(("image", source.get("url") or f"data:{source['media_type']};base64,{source['data']}"))
            elif kind == "tool_result":
                result = block["content"]
                texts = [result] if isinstance(result, str) else [each["text"] for each in result]
                said.append(("result", block["tool_use_id"], "\n".join(texts)))
            elif kind == "tool_use":
                said.append(("call", block["id"], block["name"], block["input"]))
            else:
                said.append((message["role"] if kind == "text" else kind, block[kind]))
    return said


def retold(body: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Return what a chat completion's request says, piece by piece."""
    messages = list(body["messages"])
    said: list[tuple[Any, ...]] = [("system", messages.pop(0)["content"] if messages[0]["role"] == "system" else "")]
    for message in messages:
        content = message["content"]
        if thought := message.get("reasoning_content"):
            said.append(("thinking", thought))
        if message["role"] == "tool":
            said.append(("result", message["tool_call_id"], content))
            continue
        for part in [text(content)] if isinstance(content, str) else content or []:
            of = (
                ("image", part["image_url"]["url"])
                if part["type"] == "image_url"
                else (message["role"], part["text"])
            )
            said.append(of)
        for call in message.get("tool_calls", ()):
            function = call["function"]
            said.append(("call", call["id"], function["name"], json.loads(function["arguments"])))
    return said


@settings(max_examples=150, deadline=None)
@given(conversations())
def test_a_translated_request_is_the_same_conversation(body: dict[str, Any]) -> None:
    assert retold(MESSAGES.to_chat(body)) == told(body)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(TEXTS.map(thinking), max_size=1),
    st.lists(TEXT_BLOCKS, max_size=1),
    st.lists(st.tuples(NAMES, OBJECTS), max_size=3),
)
def test_a_translated_answer_is_the_same_turn_when_it_is_said_again(
    thought: list[Any], said: list[Any], called: list[tuple[str, dict[str, Any]]]
) -> None:
    calls = [tool_use(name, f"toolu_{number}") | {"input": given} for number, (name, given) in enumerate(called)]
    turn = {"role": "assistant", "content": thought + said + calls}
    *_, message = MESSAGES.to_chat({**ASKED, "messages": [turn, {"role": "user", "content": "go on"}]})["messages"][
        :-1
    ]
    back = MESSAGES.from_chat(
        {"id": "x", "model": "m", "choices": [{"message": message, "finish_reason": "stop"}]}, ASKED
    )
    assert back["content"] == turn["content"]


# Answers


@st.composite
def answers(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a chat completion and the chunks of its stream, cut anywhere."""
    top = {"id": "chatcmpl-1", "model": "engine-model"}
    thought, said = draw(st.lists(TEXTS, max_size=4)), draw(st.lists(TEXTS, max_size=4))
    reasoning = draw(st.sampled_from(["reasoning", "reasoning_content"]))
    calls = draw(st.lists(st.tuples(NAMES, OBJECTS | st.just({})), max_size=3))
    message: dict[str, Any] = {"role": "assistant", "content": "".join(said) or None}
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    if thought:
        message[reasoning] = "".join(thought)
        deltas += [{reasoning: piece} | draw(st.sampled_from([{}, {"content": None}])) for piece in thought]
    deltas += [{"content": piece} for piece in said]
    pieces: list[list[dict[str, Any]]] = []
    for index, (name, inputs) in enumerate(calls):
        arguments = json.dumps(inputs)
        call = {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": arguments}}
        message.setdefault("tool_calls", []).append(call)
        cuts = sorted(draw(st.lists(st.integers(0, len(arguments)), max_size=3)))
        cut = [arguments[a:b] for a, b in itertools.pairwise([0, *cuts, len(arguments)])]
        first = {**call, "index": index, "function": {"name": name, "arguments": cut[0]}}
        pieces.append([first, *({"index": index, "function": {"arguments": piece}} for piece in cut[1:])])
    if draw(st.booleans()):  # the calls one after the other
        deltas += [{"tool_calls": [piece]} for call in pieces for piece in call]
    else:  # in turns, each begun in its order
        rounds = itertools.zip_longest(*pieces)
        deltas += [{"tool_calls": [piece for piece in each if piece is not None]} for each in rounds]
    finish = draw(st.sampled_from(["stop", "length", "content_filter"]))
    why = {"finish_reason": "tool_calls" if calls and finish == "stop" else finish}
    why |= draw(st.sampled_from([{}, {"stop_reason": "STOP"}, {"stop_reason": 2}, {"matched_stop": "STOP"}]))
    prompt, answer = draw(st.integers(0, 999)), draw(st.integers(0, 999))
    usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    if draw(st.booleans()):
        usage["prompt_tokens_details"] = {"cached_tokens": draw(st.integers(0, prompt))}
    if draw(st.booleans()):
        usage["completion_tokens_details"] = {"reasoning_tokens": draw(st.integers(0, answer))}
    place = draw(st.sampled_from(["last", "alone", "each", "nowhere"]))
    counted = {} if place == "nowhere" else {"usage": usage}
    chunks = [{**top, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({**top, "choices": [{"index": 0, "delta": {}, **why}]})
    if place == "each":
        chunks = [{**chunk, "usage": {**usage, "completion_tokens": 0}} for chunk in chunks]
    if place in ("alone", "each"):
        chunks.append({**top, "choices": [], **counted})
    elif place == "last":
        chunks[-1] |= counted
    return {**top, "choices": [{"index": 0, "message": message, **why}], **counted}, chunks


def streamed(chunks: list[dict[str, Any]], asked: Mapping[str, Any] = ASKED) -> bytes:
    """Return the whole stream that a chat completion's becomes."""
    reader = MESSAGES.reader(asked)
    return b"".join([*(reader.feed(chunk) for chunk in chunks), reader.end()])


def read(stream: bytes) -> Iterator[Any]:
    """Yield a stream's events, as the SDK's types know them."""
    for each in SSEDecoder().iter_bytes(iter([stream])):
        if each.event != "ping":
            parsed = EVENTS.validate_python(each.json())
            assert parsed.type == each.event
            yield parsed


def put_together(stream: bytes) -> dict[str, Any]:
    """Return the message that the SDK makes of a stream."""
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for each in read(stream):
        snapshot = accumulate_event(event=each, current_snapshot=snapshot, json_bufs=buffers)
    made: dict[str, Any] = json.loads(snapshot.to_json(exclude_unset=False, exclude_none=True))
    return made


def plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as the SDK's type has it."""
    made: dict[str, Any] = json.loads(Message.model_validate(message).to_json(exclude_unset=False, exclude_none=True))
    return made


@settings(max_examples=300, deadline=None)
@given(answers())
def test_a_stream_put_together_is_the_answer_in_one_piece(
    answer: tuple[dict[str, Any], list[dict[str, Any]]],
) -> None:
    completion, chunks = answer
    stream = streamed(chunks)
    assert put_together(stream) == plain(MESSAGES.from_chat(completion, ASKED))
    assert MESSAGES.ends_well(stream) and MESSAGES.is_over(stream)


@settings(max_examples=150, deadline=None)
@given(answers())
def test_a_stream_has_the_order_of_the_documents(answer: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    kinds = [(each.type, getattr(each, "index", None)) for each in read(streamed(answer[1]))]
    assert kinds[0] == ("message_start", None) and kinds[-2:] == [("message_delta", None), ("message_stop", None)]
    blocks = [index for kind, index in kinds if kind == "content_block_start"]
    assert blocks == list(range(len(blocks)))
    open_block: int | None = None
    for kind, index in kinds[1:-2]:
        assert open_block is None if kind == "content_block_start" else open_block == index
        open_block = None if kind == "content_block_stop" else index
    assert open_block is None


@settings(max_examples=100, deadline=None)
@given(answers())
def test_the_token_counts_of_a_translated_answer_are_the_engines(
    answer: tuple[dict[str, Any], list[dict[str, Any]]],
) -> None:
    completion, chunks = answer
    wanted = chat.usage_in(json.dumps(completion).encode()) or Usage()
    assert MESSAGES.usage_in(json.dumps(MESSAGES.from_chat(completion, ASKED)).encode()) == wanted
    stream = streamed(chunks)
    assert MESSAGES.usage_in(stream) == wanted
    assert MESSAGES.usage_in(stream.split(b"\n\n")[0] + b"\n\n" + stream[-400:]) == wanted


def test_what_ends_an_answer() -> None:
    def reasons(message: dict[str, Any], **why: Any) -> tuple[Any, Any]:
        made = MESSAGES.from_chat({"choices": [{"message": message, **why}]}, ASKED)
        return made["stop_reason"], made["stop_sequence"]

    said, called = {"content": "x"}, {"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]}
    assert reasons(said, finish_reason="stop") == ("end_turn", None)
    assert reasons(said, finish_reason="length") == ("max_tokens", None)
    assert reasons(said, finish_reason="stop", stop_reason="STOP") == ("stop_sequence", "STOP")
    assert reasons(said, finish_reason="stop", matched_stop=[7]) == ("end_turn", None)
    assert reasons(called, finish_reason="stop") == ("tool_use", None)
    assert reasons(called, finish_reason="length") == ("max_tokens", None)
    assert reasons(said, finish_reason="tool_calls") == ("end_turn", None), "no agent looks for calls that are none"
    assert reasons({"refusal": "I will not"}, finish_reason="stop") == ("refusal", None)
    assert reasons(said, finish_reason="content_filter") == ("refusal", None)


@pytest.mark.parametrize("arguments", ['{"x": 1', "[1]", '{"x":' * 300 + "1" + "}" * 300, "1e", "NaN"])
def test_arguments_that_are_no_object_stay_readable(arguments: str) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    completion = {
        "id": "x",
        "model": "m",
        "choices": [{"message": {"tool_calls": [call]}, "finish_reason": "tool_calls"}],
    }
    made = plain(MESSAGES.from_chat(completion, ASKED))
    assert made["content"][0]["input"] == {"INVALID_JSON": arguments}
    chunk = {"id": "x", "model": "m", "choices": [{"delta": {"tool_calls": [call]}, "finish_reason": "tool_calls"}]}
    assert put_together(streamed([chunk])) == made


def test_a_call_that_an_engine_gives_no_id_gets_one() -> None:
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    made = MESSAGES.from_chat({"choices": [{"message": {"tool_calls": [call, call]}}]}, ASKED)
    ids = [block["id"] for block in made["content"]]
    assert len(set(ids)) == 2 and all(given.startswith("toolu_") for given in ids)
    assert [block["input"] for block in made["content"]] == [{"x": 1}, {"x": 1}]
    assert made["id"].startswith("msg_") and made["model"] == "m"


def test_thinking_after_a_text_is_a_block_of_its_own() -> None:
    deltas = [{"reasoning": "a"}, {"content": "b"}, {"reasoning": "c"}, {"content": "d"}]
    made = put_together(streamed([{"choices": [{"delta": delta}]} for delta in deltas]))
    assert [block[block["type"]] for block in made["content"]] == ["a", "b", "c", "d"]


def test_long_arguments_are_heard_of() -> None:
    piece = {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": " "}}]}}]}
    first = {
        "choices": [{"delta": {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{"}}]}}]
    }
    reader = MESSAGES.reader(ASKED)
    came = [reader.feed(first), *(reader.feed(piece) for _ in range(200))]
    assert came.count(b'event: ping\ndata: {"type":"ping"}\n\n') == 3


def test_tool_calls_without_end_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_EVENT_BYTES", 100)
    piece = {
        "choices": [
            {"delta": {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "x" * 30}}]}}
        ]
    }
    reader = MESSAGES.reader(ASKED)
    with pytest.raises(Garbage, match="tool calls of more than 100"):
        for _ in range(5):
            reader.feed(piece)


# Garbage

DELTAS = named(
    "content",
    "reasoning",
    "reasoning_content",
    "tool_calls",
    "role",
    "refusal",
    "function",
    "name",
    "arguments",
    "id",
    "index",
)
CHOICES = named("delta", "message", "finish_reason", "stop_reason", "matched_stop", "index") | DELTAS.map(
    lambda delta: {"delta": delta, "message": delta}
)
COMPLETIONS = (
    named("choices", "usage", "id", "model", "error")
    | st.lists(CHOICES, max_size=2).map(lambda choices: {"choices": choices})
    | named("prompt_tokens", "completion_tokens", "prompt_tokens_details").map(
        lambda usage: {"choices": [], "usage": usage}
    )
)


@settings(max_examples=400, deadline=None)
@given(st.lists(COMPLETIONS, max_size=3), COMPLETIONS)
def test_an_engine_that_sends_garbage_is_found_out(chunks: list[dict[str, Any]], completion: dict[str, Any]) -> None:
    try:
        stream = streamed(chunks)
    except Garbage:
        pass
    else:
        assert [each for each in SSEDecoder().iter_bytes(iter([stream])) if each.json()["type"] == each.event]
    with contextlib.suppress(Garbage):
        plain(MESSAGES.from_chat(completion, ASKED))


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=60)
    | ANYTHING.map(lambda value: b"data: " + json.dumps(value).encode() + b"\n\n")
    | named("type", "error", "message", "usage", "delta", "message_start", "message_delta", "stop_reason").map(
        lambda value: b"event: x\ndata: " + json.dumps(value).encode() + b"\n\n"
    )
)
def test_bytes_of_any_kind_are_looked_at(data: bytes) -> None:
    assert isinstance(MESSAGES.ends_well(data), bool) and isinstance(MESSAGES.is_over(data), bool)
    assert isinstance(MESSAGES.usage_in(data), Usage | None)
    assert isinstance(MESSAGES.usage_in(b"{" + data), Usage | None)
    with contextlib.suppress(Garbage):
        assert isinstance(MESSAGES.brings(data), bool)


def frame(data: Mapping[str, Any], name: str = "x") -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def test_what_a_first_event_means() -> None:
    assert MESSAGES.brings(frame({"type": "message_start", "message": {}}))
    assert not MESSAGES.brings(frame({"type": "ping"}))
    assert not MESSAGES.brings(frame({"type": "what_comes_next_year"}))
    assert not MESSAGES.brings(b": a comment\n\n")
    assert MESSAGES.brings(frame({"type": "error", "error": {"type": "invalid_request_error", "message": "no"}}))
    for failed in ({"type": "overloaded_error"}, {"type": ["?"]}, "no", None):
        with pytest.raises(Garbage, match="the engine failed"):
            MESSAGES.brings(frame({"type": "error", "error": failed}))
    with pytest.raises(Garbage, match="no event of Anthropic's Messages"):
        MESSAGES.brings(frame({"choices": [{"delta": {"content": "x"}}]}))


def test_how_streams_end() -> None:
    stop, delta = (
        frame({"type": "message_stop"}),
        frame({"type": "message_delta", "delta": {"stop_reason": "end_turn"}}),
    )
    piece = frame({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "message_stop"}})
    for tail in (stop, piece[9:] + delta + stop, delta + stop + b"data: [DONE]\n\n", stop + frame({"type": "ping"})):
        assert MESSAGES.ends_well(tail) and MESSAGES.is_over(tail)
    assert MESSAGES.ends_well(delta) and not MESSAGES.is_over(delta)
    for tail in (b"", piece, delta + frame({"type": "error", "error": {}}), stop[:-4], b'data: {"type": "message_st'):
        assert not MESSAGES.ends_well(tail) and not MESSAGES.is_over(tail)


def test_token_counts_of_engines() -> None:
    def start(**usage: Any) -> bytes:
        return frame({"type": "message_start", "message": {"usage": usage}})

    def end(**usage: Any) -> bytes:
        return frame({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage})

    cut = b'elta", "text": "\\"usage\\""}}\n\n'
    llamacpp = start(cache_read_input_tokens=30, input_tokens=5, output_tokens=0) + cut + end(output_tokens=7)
    assert MESSAGES.usage_in(llamacpp) == Usage(35, 30, 7)
    vllm = start(input_tokens=35, output_tokens=0) + end(input_tokens=5, cache_read_input_tokens=30, output_tokens=7)
    assert MESSAGES.usage_in(vllm) == Usage(35, 30, 7)
    assert MESSAGES.usage_in(start(input_tokens=35, output_tokens=0) + end(output_tokens=7)) == Usage(35, None, 7)
    created = start(input_tokens=1, cache_creation_input_tokens=20, cache_read_input_tokens=0) + end(output_tokens=7)
    assert MESSAGES.usage_in(created) == Usage(21, 0, 7)
    assert (
        MESSAGES.usage_in(
            frame({"type": "content_block_start", "content_block": {"input": {"usage": {"output_tokens": 9}}}})
        )
        is None
    )
    whole = {
        "content": [{"type": "tool_use", "input": {"usage": {"input_tokens": 9}}}],
        "usage": {"input_tokens": 3, "output_tokens": 4},
    }
    assert MESSAGES.usage_in(json.dumps(whole).encode()) == Usage(3, None, 4)
    assert MESSAGES.usage_in(b'{"content": [], ' + b" " * 2**20 + json.dumps(whole).encode()[1:]) == Usage(3, None, 4)


# Errors

ERRORS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 422: "invalid_request_error", 429: "rate_limit_error", 500: "api_error",
    502: "api_error", 503: "overloaded_error", 504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip


@pytest.mark.parametrize("status", ERRORS)
def test_errors_have_the_form_of_this_wire(status: int) -> None:
    wanted = {"type": "error", "error": {"type": ERRORS[status], "message": "no"}}
    assert MESSAGES.error(status, "no") == MESSAGES.error(status, "no", kind="BadRequestError") == wanted
    assert MESSAGES.error(status, "no", kind="overloaded_error")["error"]["type"] == "overloaded_error"


def test_an_error_in_a_stream_ends_it() -> None:
    chunks: list[dict[str, Any]] = [
        {"choices": [{"delta": {"content": "x"}}]},
        {"error": {"message": "out of memory", "type": "server_error", "code": 503}},
        {"choices": [{"delta": {"content": "y"}}]},
    ]
    stream = streamed(chunks)
    last = [json.loads(each.data) for each in SSEDecoder().iter_bytes(iter([stream]))][-1]
    assert last == {"type": "error", "error": {"type": "overloaded_error", "message": "out of memory"}}
    assert not MESSAGES.ends_well(stream)


# The stand-in, as the real client sees it


def client_of(server: MessagesServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.root, api_key="k", max_retries=0)


ASK: dict[str, Any] = {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "hello " * 40}]}
ADD = {"name": "add", "input_schema": {"type": "object", "properties": {"x": {"type": "integer"}}}}


def test_the_stand_in_answers_as_the_real_client_expects() -> None:
    many = Answer((thinking("let me see"), text("I add."), tool_use("add", "a", x=1), tool_use("add", "b", x=2)))
    with MessagesServer(lambda body: many) as server, client_of(server) as client:
        whole = client.messages.create(**ASK, tools=[ADD])
        with client.messages.stream(**ASK, tools=[ADD]) as stream:
            assembled = stream.get_final_message()
        assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert assembled.content == whole.content and assembled.stop_reason == whole.stop_reason == "tool_use"
        assert whole.usage.cache_read_input_tokens == 0 and (assembled.usage.cache_read_input_tokens or 0) > 0
        assert whole.usage.input_tokens == assembled.usage.input_tokens + (
            assembled.usage.cache_read_input_tokens or 0
        )
        assert (
            client.messages.count_tokens(model=MODEL, messages=ASK["messages"]).input_tokens
            == whole.usage.input_tokens
        )
        raw = client.messages.with_raw_response.create(**ASK)
        assert raw.headers["request-id"] and raw.parse().content == whole.content


def test_the_stand_in_refuses_as_the_api_does() -> None:
    failing = Answer((text("one two three"),), error=(529, "overloaded_error", "Overloaded"), breaks_after=3)
    with MessagesServer(key="k") as server, client_of(server) as client:
        assert client.messages.create(**ASK).stop_reason == "end_turn"
        assert client.messages.create(**{**ASK, "max_tokens": 2}).stop_reason == "max_tokens"
        with pytest.raises(anthropic.NotFoundError, match="model: other"):
            client.messages.create(**{**ASK, "model": "other"})
        with pytest.raises(anthropic.BadRequestError, match="tool_result"):
            called = {"role": "assistant", "content": [tool_use("add", "a", x=1)]}
            client.messages.create(
                **{**ASK, "messages": [*ASK["messages"], called, {"role": "user", "content": "?"}]}
            )
        with pytest.raises(anthropic.AuthenticationError):
            client.with_options(api_key="other").messages.create(**ASK)
        server.script = lambda body: failing
        with pytest.raises(anthropic.APIStatusError) as broke, client.messages.stream(**ASK) as stream:
            stream.get_final_message()
        assert broke.value.type == "overloaded_error"
        with pytest.raises(anthropic.OverloadedError):
            client.messages.create(**ASK)


def test_the_bytes_of_the_stand_in_are_watched() -> None:
    with MessagesServer() as server, client_of(server) as client:
        with client.messages.with_streaming_response.create(**ASK, stream=True) as response:
            data = b"".join(response.iter_bytes())
        events = reading.EventSplitter().feed(data)
        assert [MESSAGES.brings(event) for event in events[:3]] == [True, True, False]
        assert MESSAGES.ends_well(data) and not MESSAGES.ends_well(data[: len(data) // 2])
        whole = client.messages.with_raw_response.create(**ASK)
        counts = MESSAGES.usage_in(whole.http_response.content)
        assert counts is not None and counts.cached_tokens and counts.prompt_tokens > counts.cached_tokens
        assert MESSAGES.usage_in(events[0] + data[-300:]) == Usage(counts.prompt_tokens, 0, counts.completion_tokens)
