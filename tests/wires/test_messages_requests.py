"""Requests of Anthropic's Messages: what they ask for, and the same said in chat completions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI

from orla_lg.wires import chat
from orla_lg.wires.messages import MESSAGES
from orla_lg.wires.wire import Untranslatable
from tests.wires.messages_server import text, thinking, tool_use
from tests.wires.shapes import ANYTHING, NAMES, OBJECTS, TEXTS, named

ASKED = {"model": "m", "max_tokens": 99, "messages": [{"role": "user", "content": "hi"}], "stop_sequences": ["STOP"]}
PIXEL = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
PIXEL_URL = "data:image/png;base64,iVBORw0KGgo="


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
    "tools[0].defer_loading": {
        "tools": [
            {"name": "a", "input_schema": {}, "defer_loading": True},
            {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"},
        ]
    },
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
        {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x.png"}},
    ]}]},
}  # fmt: skip


@pytest.mark.parametrize("field", UNTRANSLATABLE)
def test_what_cannot_be_said_is_named(field: str) -> None:
    body = {**ASKED, **UNTRANSLATABLE[field]}
    with pytest.raises(Untranslatable) as refused:
        MESSAGES.to_chat(body)
    assert refused.value.field == field
    MESSAGES.ask_of(body)


@settings(max_examples=40, deadline=None)
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


@settings(max_examples=40, deadline=None)
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


@settings(max_examples=40, deadline=None)
@given(conversations())
def test_a_translated_request_is_the_same_conversation(body: dict[str, Any]) -> None:
    assert retold(MESSAGES.to_chat(body)) == told(body)


@settings(max_examples=40, deadline=None)
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
        {"id": "x", "model": "m", "choices": [{"message": message, "finish_reason": "stop"}]},
        {**ASKED, "thinking": {"type": "adaptive"}},
    )
    assert back["content"] == turn["content"]
