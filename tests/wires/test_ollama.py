"""Ollama's own API as wires, against its server's sources and the types of its own package."""

from __future__ import annotations

import base64
import copy
import json
from contextlib import suppress
from typing import Any

import ollama
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg.core.call import Usage
from orla_lg.wires import ollama_answers, reading
from orla_lg.wires.assembly import Assembly
from orla_lg.wires.chat import ask_of
from orla_lg.wires.ollama import OLLAMA_CHAT, OLLAMA_EMBED, OLLAMA_EMBEDDINGS, OLLAMA_GENERATE
from orla_lg.wires.reading import Garbage
from orla_lg.wires.wire import Untranslatable, Wire

WIRES: tuple[Wire, ...] = (OLLAMA_CHAT, OLLAMA_GENERATE, OLLAMA_EMBED, OLLAMA_EMBEDDINGS)
CREATED = 1_760_000_000
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
HELLO = {"role": "user", "content": "hello"}


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [HELLO], **more}


def generate(**more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "hello", **more}


# Ollama's own translation the other way (openai/openai.go), for there and back


def ollama_request(said: dict[str, Any]) -> dict[str, Any]:
    """What Ollama makes of a chat completion's request: ``FromChatRequest``."""
    messages = []
    for message in said["messages"]:
        content, images = message.get("content") or "", []
        if isinstance(content, list):
            images = [part["image_url"]["url"].partition(";base64,")[2] for part in content if "image_url" in part]
            content = "".join(part["text"] for part in content if part["type"] == "text")
        made: dict[str, Any] = {"role": message["role"], "content": content}
        made |= {"images": images} if images else {}
        made |= {"thinking": message["reasoning_content"]} if message.get("reasoning_content") else {}
        if message.get("tool_calls"):
            functions = [call["function"] for call in message["tool_calls"]]
            made["tool_calls"] = [{"function": {**f, "arguments": json.loads(f["arguments"])}} for f in functions]
        if message["role"] == "tool":
            made["tool_name"] = _tool_of(said["messages"], message["tool_call_id"])
        messages.append(made)
    made = {"messages": messages, "stream": said["stream"]}
    form = said.get("response_format") or {}
    if form:
        made["format"] = "json" if form["type"] == "json_object" else form["json_schema"]["schema"]
    if said.get("tools"):
        made["tools"] = said["tools"]
    if (effort := said.get("reasoning_effort")) is not None:
        made["think"] = {"none": False}.get(effort, effort)
    options = {"max_tokens": "num_predict"}
    for name in ("max_tokens", "temperature", "top_p", "seed", "stop", "top_k", "repeat_penalty"):
        if name in said:
            made.setdefault("options", {})[options.get(name, name)] = said[name]
    return made


def _tool_of(messages: list[dict[str, Any]], call_id: str) -> str:
    for message in reversed(messages):
        for call in message.get("tool_calls") or []:
            if call["id"] == call_id:
                return str(call["function"]["name"])
    return ""


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NAMES = st.sampled_from(["weather", "search", "add"])
ARGUMENTS = st.dictionaries(TEXT, st.one_of(TEXT, st.integers(), st.none(), st.lists(TEXT, max_size=2)), max_size=3)
SCHEMA = st.just({"type": "object", "properties": {"answer": {"type": "string"}}})


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXT)})
    for _ in range(draw(st.integers(1, 3))):
        asked: dict[str, Any] = {"role": "user", "content": draw(TEXT)}
        if draw(st.booleans()):
            asked["images"] = [PNG]
        answered: dict[str, Any] = {"role": "assistant", "content": draw(TEXT)}
        if thinking := draw(TEXT):
            answered["thinking"] = thinking
        names = draw(st.lists(NAMES, max_size=3))
        if names:
            answered["tool_calls"] = [{"function": {"name": name, "arguments": draw(ARGUMENTS)}} for name in names]
        order = draw(st.permutations(names))
        # Without a name, an answer belongs to the next call.
        named = draw(st.booleans()) or order != names
        answers = [{"role": "tool", "content": draw(TEXT), **({"tool_name": n} if named else {})} for n in order]
        messages += [asked, answered, *answers]
    return messages


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": draw(conversations()), "stream": draw(st.booleans())}
    options = {
        "num_predict": st.integers(1, 9), "temperature": st.floats(0, 2), "top_p": st.floats(0, 1),
        "seed": st.integers(0, 9), "stop": st.lists(TEXT, min_size=1, max_size=2), "top_k": st.integers(1, 50),
        "repeat_penalty": st.floats(0.5, 2),
    }  # fmt: skip
    if said := draw(st.fixed_dictionaries({}, optional=options)):
        body["options"] = said
    for name, values in {
        "format": st.one_of(st.just("json"), SCHEMA),
        "tools": st.just([TOOL]),
        "think": st.sampled_from([False, "low", "medium", "high", "max"]),
    }.items():
        if draw(st.booleans()):
            body[name] = draw(values)
    return body


@given(requests())
def test_there_and_back_it_is_the_same_request(body: dict[str, Any]) -> None:
    before = copy.deepcopy(body)
    back = ollama_request(OLLAMA_CHAT.to_chat({"model": "m", "keep_alive": "5m", **body}))
    assert body == before
    for message, was in zip(back["messages"], body["messages"], strict=True):
        if was["role"] == "tool" and "tool_name" not in was:
            was = {**was, "tool_name": message["tool_name"]}
        assert message == was
    assert {k: v for k, v in back.items() if k != "messages"} == {k: v for k, v in body.items() if k != "messages"}


@given(conversations())
def test_each_answer_of_a_tool_names_a_call_of_its_own(messages: list[dict[str, Any]]) -> None:
    said = OLLAMA_CHAT.to_chat({"messages": messages})["messages"]
    calls = [call["id"] for message in said for call in message.get("tool_calls") or []]
    answers = [message["tool_call_id"] for message in said if message["role"] == "tool"]
    assert sorted(calls) == sorted(answers)
    assert len(set(calls)) == len(calls)
    assert all(len(each) == 9 and each.isalnum() for each in calls), "as some chat templates demand"
    for message in said:
        if "name" in message:
            assert message["name"] == _tool_of(said, message["tool_call_id"])


@given(conversations(), st.integers(0, 9))
def test_a_conversation_that_goes_on_begins_as_before(messages: list[dict[str, Any]], cut: int) -> None:
    whole, begun = OLLAMA_CHAT.ask_of({"messages": messages}), OLLAMA_CHAT.ask_of({"messages": messages[:cut]})
    assert whole.prefix[: len(begun.prefix)] == begun.prefix


def test_names_that_were_given_stay() -> None:
    call = {"id": "call_x", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [
        HELLO,
        {"role": "assistant", "tool_calls": [call, {"function": {"name": "weather"}}]},
        {"role": "Tool", "content": "rain", "tool_call_id": "call_x"},
        {"role": "tool", "content": "sun"},
        {"role": "tool", "content": "snow, of no call"},
    ]
    said = OLLAMA_CHAT.to_chat({"messages": messages})["messages"]
    assert said[1]["content"] is None
    assert [each["id"] for each in said[1]["tool_calls"]] == ["call_x", "call00001"]
    assert said[1]["tool_calls"][1]["function"]["arguments"] == "{}"
    assert [each["tool_call_id"] for each in said[2:]] == ["call_x", "call00001", "call00002"]


def test_the_prompt_is_the_prefix_that_chat_completions_have() -> None:
    arguments = json.dumps({"city": "Zürich"}, ensure_ascii=False)
    call = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": arguments}}
    theirs = [
        {"content": "be brief", "role": "system"},
        HELLO,
        {"content": None, "role": "assistant", "tool_calls": [call]},  # as langchain-openai writes it
        {"content": "rain", "role": "tool", "tool_call_id": "call00001"},
    ]
    ours = [
        {"role": "system", "content": "be brief"},
        HELLO,
        {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Zürich"}}}]},
        {"role": "tool", "content": "rain"},
    ]
    asked = OLLAMA_CHAT.ask_of({"model": "m", "messages": ours, "tools": [TOOL]})
    assert asked.prefix == ask_of({"messages": theirs, "tools": [TOOL]}).prefix
    written = OLLAMA_GENERATE.ask_of({"model": "m", "prompt": "hello", "system": "be brief"})
    assert written.prefix == ask_of({"messages": theirs[:2]}).prefix


def test_what_is_asked_for() -> None:
    asked = OLLAMA_CHAT.ask_of(chat(tools=[TOOL], format={"type": "object"}, options={"num_predict": 9}))
    assert (asked.model, asked.stream, asked.json_schema, asked.tools, asked.max_tokens) == ("m", True, True, True, 9)
    plain = OLLAMA_CHAT.ask_of(chat(stream=False, format="json", options={"num_predict": -1}))
    assert (plain.stream, plain.json_schema, plain.tools, plain.max_tokens) == (False, False, False, None)
    assert OLLAMA_CHAT.ask_of(chat(messages=[{**HELLO, "images": [PNG]}])).images
    assert OLLAMA_GENERATE.ask_of(generate(images=[PNG])).images
    assert not OLLAMA_EMBED.ask_of({"model": "m", "input": "x"}).stream


FIELDS = (
    "model", "messages", "prompt", "system", "input", "images", "tools", "options", "format", "think", "stream",
    "logprobs", "raw", "context", "role", "content", "tool_calls", "function", "arguments", "thinking",
)  # fmt: skip
CHUNK_FIELDS = (
    "choices", "delta", "message", "content", "tool_calls", "function", "name", "arguments", "index", "id", "usage",
    "finish_reason", "reasoning", "timings", "error", "model", "created", "logprobs", "prompt_tokens", "refusal",
)  # fmt: skip
ODD = st.sampled_from(
    [None, True, False, 0, -1, 7, 10**400, 0.5, float("nan"), "", "x", "{", "{}", "json", "\ud800", [], {}]
)
"""What may stand anywhere; it costs little to draw."""


def odd(fields: tuple[str, ...]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects of these fields, in which anything may stand, and the like of themselves."""
    names = st.sampled_from(fields)
    inner = st.recursive(
        ODD,
        lambda inner: st.one_of(st.dictionaries(names, inner, max_size=3), st.lists(inner, max_size=2)),
        max_leaves=6,
    )
    return st.dictionaries(names, inner, max_size=4)


BODIES = odd(FIELDS)
CHUNKS = odd(CHUNK_FIELDS)


@given(st.one_of(BODIES, ODD))
def test_whatever_a_caller_writes_is_asked_for(body: Any) -> None:
    for wire in WIRES:
        wire.ask_of(body)
        if isinstance(body, dict):
            try:
                wire.to_chat(body)
            except Untranslatable as error:
                assert error.field


@pytest.mark.parametrize(
    ("wire", "body", "field"),
    [
        (OLLAMA_CHAT, chat(messages=[]), "messages"),
        (OLLAMA_CHAT, {"model": "m", "keep_alive": 0}, "messages"),
        (OLLAMA_CHAT, chat(messages=[HELLO, {"role": "user", "content": []}]), "messages[1].content"),
        (OLLAMA_CHAT, chat(messages=[{**HELLO, "images": [PNG, 7]}]), "messages[0].images[1]"),
        (
            OLLAMA_CHAT,
            chat(messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]),
            "messages[0].tool_calls[0].function.arguments",
        ),
        (OLLAMA_CHAT, chat(tools=["weather"]), "tools[0]"),
        (OLLAMA_CHAT, chat(format="yaml"), "format"),
        (OLLAMA_CHAT, chat(think="much"), "think"),
        (OLLAMA_CHAT, chat(options=[]) | {"options": 7}, "options"),
        (OLLAMA_CHAT, chat(_debug_render_only=True), "_debug_render_only"),
        (OLLAMA_GENERATE, generate(raw=True), "raw"),
        (OLLAMA_GENERATE, generate(suffix="end"), "suffix"),
        (OLLAMA_GENERATE, generate(template="{{ .Prompt }}"), "template"),
        (OLLAMA_GENERATE, generate(context=[1, 2]), "context"),
        (OLLAMA_GENERATE, generate(width=512), "width"),
        (OLLAMA_GENERATE, {"model": "m", "keep_alive": -1}, "prompt"),
        (OLLAMA_EMBED, {"model": "m", "input": [1]}, "input"),
        (OLLAMA_EMBED, {"model": "m", "input": []}, "input"),
        (OLLAMA_EMBEDDINGS, {"model": "m", "prompt": ""}, "prompt"),
    ],
)
def test_what_cannot_be_said_is_named(wire: Wire, body: dict[str, Any], field: str) -> None:
    with pytest.raises(Untranslatable) as raised:
        wire.to_chat(body)
    assert raised.value.field == field


def test_the_whole_of_a_request() -> None:
    options = {"num_predict": 5, "num_ctx": 8192, "num_gpu": 1, "mirostat": 2, "seed": -1, "repeat_penalty": 1.1}
    said = OLLAMA_CHAT.to_chat(chat(options=options, think=True, logprobs=True, top_logprobs=2, truncate=False))
    assert said == {
        "messages": [HELLO],
        "max_tokens": 5,
        "repeat_penalty": 1.1,
        "repetition_penalty": 1.1,
        "reasoning_effort": "medium",
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    # OllamaLLM says all that it knows, mostly nothing.
    empty = {"options": {"temperature": None}, "format": "", "think": None, "suffix": "", "raw": False, "context": []}
    assert OLLAMA_GENERATE.to_chat(generate(**empty, system="", stream=False)) == {
        "messages": [HELLO],
        "stream": False,
    }
    assert OLLAMA_CHAT.streams(chat(stream=None)) and not OLLAMA_CHAT.streams(chat(stream=False))


@pytest.mark.parametrize(
    ("head", "part"),
    [
        (b"\x89PNG\r\n\x1a\n", "data:image/png;base64,"),
        (b"\xff\xd8\xff\xe0", "data:image/jpeg;base64,"),
        (b"RIFF\x00\x00\x00\x00WEBP", "data:image/webp;base64,"),
        (b"GIF89a", "data:image/gif;base64,"),
        (b"what", "data:image/jpeg;base64,"),
        (b"RIFF\x00\x00\x00\x00WAVE", "wav"),
        (b"ID3\x04", "mp3"),
    ],
)
def test_an_image_is_known_by_its_beginning(head: bytes, part: str) -> None:
    data = base64.b64encode(head + bytes(40)).decode()
    said = OLLAMA_GENERATE.to_chat(generate(images=[data]))["messages"][0]["content"]
    assert said[0] == {"type": "text", "text": "hello"}
    if part.startswith("data:"):
        assert said[1] == {"type": "image_url", "image_url": {"url": part + data}}
    else:
        assert said[1] == {"type": "input_audio", "input_audio": {"data": data, "format": part}}
    for odd in ("", "é", "a", "data:image/png;base64,xx"):
        OLLAMA_GENERATE.to_chat(generate(images=[odd]))


def test_a_mappings_parameters_become_options() -> None:
    parameters = {
        "max_tokens": 9, "temperature": 0, "stop": "end", "top_k": 3, "reasoning_effort": "none",
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}, "keep_alive": "1h",
        "options": {"num_ctx": 8192}, "extra_body": {"min_p": 0.1}, "stream": False,
    }  # fmt: skip
    body = chat(options={"temperature": 1, "seed": None})
    assert OLLAMA_CHAT.with_model(body, "theirs", parameters) == {
        "model": "theirs",
        "messages": [HELLO],
        "options": {"num_predict": 9, "temperature": 1, "stop": ["end"], "top_k": 3, "num_ctx": 8192, "min_p": 0.1},
        "think": False,
        "format": {"type": "object"},
        "keep_alive": "1h",
    }
    said = chat(format="json", think="high", keep_alive=0)
    assert OLLAMA_CHAT.with_model(said, "n", parameters | {"options": {}}) | {"options": {}} == {
        **said, "model": "n", "options": {},
    }  # fmt: skip
    assert OLLAMA_CHAT.with_model(body, "n", {}) == {**body, "model": "n"}
    thinking = OLLAMA_CHAT.with_model(chat(), "n", {"chat_template_kwargs": {"enable_thinking": False}})
    assert thinking["think"] is False


# Answers


@st.composite
def completions(draw: st.DrawFn) -> dict[str, Any]:
    """A whole chat completion, as engines write it."""
    message: dict[str, Any] = {"role": "assistant", "content": draw(TEXT)}
    if reasoning := draw(TEXT):
        message[draw(st.sampled_from(["reasoning", "reasoning_content"]))] = reasoning
    if names := draw(st.lists(NAMES, max_size=3)):
        message["content"] = message["content"] or None
        message["tool_calls"] = [
            {"id": f"c{n}", "type": "function", "function": {"name": name, "arguments": json.dumps(draw(ARGUMENTS))}}
            for n, name in enumerate(names)
        ]
    finish = "tool_calls" if names else draw(st.sampled_from(["stop", "length", "content_filter", None]))
    whole = {
        "id": "x", "object": "chat.completion", "created": CREATED, "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
    }  # fmt: skip
    if draw(st.booleans()):
        prompt = draw(st.integers(0, 99))
        whole["usage"] = {"prompt_tokens": prompt, "completion_tokens": draw(st.integers(0, 9)), "total_tokens": 0}
        if draw(st.booleans()):
            whole["usage"]["prompt_tokens_details"] = {"cached_tokens": draw(st.integers(0, prompt))}
    if draw(st.booleans()):
        whole["timings"] = {"prompt_ms": draw(st.floats(0, 99)), "predicted_ms": draw(st.floats(0, 99))}
    return whole


def cut(draw: st.DrawFn, text: str) -> list[str]:
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@st.composite
def streams(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A completion, and the chunks of its stream, as differently cut as engines do."""
    whole = draw(completions())
    message, finish = whole["choices"][0]["message"], whole["choices"][0]["finish_reason"]
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}] if draw(st.booleans()) else []
    for key in ("reasoning", "reasoning_content", "content"):
        deltas += [{key: piece} for piece in cut(draw, message.get(key) or "")]
    for n, call in enumerate(message.get("tool_calls") or []):
        first, *rest = cut(draw, call["function"]["arguments"])
        deltas.append({"tool_calls": [{**call, "index": n, "function": {**call["function"], "arguments": first}}]})
        deltas += [{"tool_calls": [{"index": n, "function": {"arguments": piece}}]} for piece in rest]
    top = {"id": "x", "object": "chat.completion.chunk", "created": CREATED, "model": "m"}
    chunks = [{**top, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    ending = {"index": 0, "delta": {}, "finish_reason": finish}
    counts = {key: whole[key] for key in ("usage", "timings") if key in whole}
    place = draw(st.sampled_from(["with the end", "in one of its own", "in each"]))
    chunks.append({**top, "choices": [ending], **(counts if place == "with the end" else {})})
    if place == "in one of its own" and counts:
        chunks.append({**top, "choices": [], **counts})
    if place == "in each":
        chunks = [{**chunk, **counts} for chunk in chunks]
    return whole, chunks


def lines_of(wire: Wire, chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that a reader makes of chunks, each read as a client reads it."""
    reader = wire.reader({"model": "asked"})
    stream = b"".join(reader.feed(chunk) for chunk in chunks) + reader.end()
    assert stream.endswith(b"\n")
    lines = [json.loads(line) for line in stream.splitlines()]
    for line, raw in zip(lines, stream.splitlines(), strict=True):
        if "error" in line:
            with pytest.raises(Garbage):
                wire.brings(raw)
            continue
        assert wire.brings(raw + b"\n")
        (ollama.ChatResponse if wire is OLLAMA_CHAT else ollama.GenerateResponse)(**line)
    return lines


def assembled(lines: list[dict[str, Any]], wire: Wire) -> dict[str, Any]:
    """What Ollama itself makes of its lines where the answer is to be whole (``writeChatResponse``)."""
    whole = dict(lines[-1])
    if wire is OLLAMA_GENERATE:
        whole["response"] = "".join(line["response"] for line in lines)
        whole |= {"thinking": text} if (text := "".join(line.get("thinking", "") for line in lines)) else {}
        return whole
    messages = [line["message"] for line in lines]
    whole["message"] = {"role": "assistant", "content": "".join(message["content"] for message in messages)}
    for key, joined in {
        "thinking": "".join(message.get("thinking", "") for message in messages),
        "tool_calls": [call for message in messages for call in message.get("tool_calls", [])],
    }.items():
        whole["message"] |= {key: joined} if joined else {}
    return whole


@given(streams(), st.sampled_from([OLLAMA_CHAT, OLLAMA_GENERATE]))
def test_streamed_is_the_same_as_unstreamed(both: tuple[dict[str, Any], list[dict[str, Any]]], wire: Wire) -> None:
    whole, chunks = both
    lines = lines_of(wire, chunks)
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    answer = wire.from_chat(whole, {"model": "asked"})
    assert assembled(lines, wire) == answer
    sent = json.dumps(answer).encode()
    streamed = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    assert wire.usage_in(sent) == wire.usage_in(streamed[-reading.SHOWN_BYTES * 99 :])
    assert wire.ends_well(streamed) and not wire.ends_well(b"".join(streamed.splitlines(keepends=True)[:-1]))


@given(completions())
def test_there_and_back_it_is_the_same_answer(whole: dict[str, Any]) -> None:
    """``ToChatCompletion`` of Ollama makes of the answer what it was made of."""
    said = ollama.ChatResponse(**OLLAMA_CHAT.from_chat(whole, {"model": "asked"}))
    choice = whole["choices"][0]
    message = choice["message"]
    assert (said.model, said.created_at, said.done) == ("m", "2025-10-09T08:53:20Z", True)
    assert said.message.content == (message["content"] or "")
    assert (said.message.thinking or "") == (message.get("reasoning") or message.get("reasoning_content") or "")
    calls = [(call.function.name, call.function.arguments) for call in said.message.tool_calls or []]
    theirs = [call["function"] for call in message.get("tool_calls") or []]
    assert calls == [(each["name"], json.loads(each["arguments"])) for each in theirs]
    reason = "tool_calls" if said.done_reason == "stop" and calls else said.done_reason
    assert reason == choice["finish_reason"]
    usage = whole.get("usage", {})
    assert (said.prompt_eval_count, said.eval_count) == (usage.get("prompt_tokens"), usage.get("completion_tokens"))


@given(completions())
def test_counts_are_found_again(whole: dict[str, Any]) -> None:
    """What the wire says of an engine's counts is what it reads of an Ollama's."""
    found = OLLAMA_CHAT.usage_in(json.dumps(OLLAMA_CHAT.from_chat(whole, {})).encode())
    if "usage" not in whole:
        assert found is None
        return
    usage = whole["usage"]
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens")
    assert found is not None
    assert (found.prompt_tokens, found.cached_tokens, found.completion_tokens) == (
        usage["prompt_tokens"], cached, usage["completion_tokens"],
    )  # fmt: skip
    took_ms = whole.get("timings", {}).get("prompt_ms", 0)
    assert found.prefill_s == (pytest.approx(took_ms / 1000, abs=1e-8) if int(took_ms * 1e6) else None)


@given(st.lists(st.one_of(CHUNKS, st.builds(lambda choice: {"choices": [choice]}, CHUNKS)), max_size=3))
def test_garbage_of_an_engine_is_garbage(chunks: list[dict[str, Any]]) -> None:
    for wire in WIRES[:2]:
        reader = wire.reader({"model": "m"})
        with suppress(Garbage):
            stream = b"".join(reader.feed(chunk) for chunk in chunks) + reader.end()
            for line in map(json.loads, stream.splitlines()):
                if "error" not in line:
                    (ollama.ChatResponse if wire is OLLAMA_CHAT else ollama.GenerateResponse)(**line)
    for wire in WIRES:
        for chunk in chunks:
            with suppress(Garbage):
                wire.from_chat(chunk, {"model": "m", "input": "x", "prompt": "x"})


@given(st.one_of(st.binary(max_size=60), st.one_of(ODD, CHUNKS).map(lambda each: json.dumps(each).encode())))
def test_garbage_of_an_ollama_is_garbage(data: bytes) -> None:
    for wire in WIRES:
        wire.usage_in(data)
        wire.ends_well(data)
        with suppress(Garbage):
            wire.brings(data + b"\n")


def test_deep_and_long_things_are_garbage() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    text = "[" * 100_000 + "]" * 100_000
    call = {"id": "c", "function": {"name": "f", "arguments": deep}}
    whole = {"choices": [{"message": {"tool_calls": [{"function": {"name": "f", "arguments": text}}]}}]}
    for made in (
        lambda: OLLAMA_CHAT.reader({}).feed({"choices": [{"delta": {"tool_calls": [call]}}]}),
        lambda: OLLAMA_CHAT.from_chat(whole, {}),
        lambda: OLLAMA_CHAT.brings(text.encode()),
        lambda: OLLAMA_EMBED.from_chat({"data": [{"embedding": [10**400]}]}, {"input": "x"}),
        lambda: OLLAMA_EMBED.from_chat({"data": [{"embedding": [float("nan")]}]}, {"input": "x"}),
    ):
        with pytest.raises(Garbage):
            made()
    assert OLLAMA_CHAT.usage_in(text.encode()) is None
    with pytest.raises(Untranslatable, match="no JSON"):
        OLLAMA_CHAT.to_chat(
            chat(messages=[{"role": "assistant", "tool_calls": [{"function": {"arguments": {"a": deep}}}]}])
        )


def test_calls_do_not_grow_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_EVENT_BYTES", 1000)
    reader = OLLAMA_CHAT.reader({})
    delta = {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": "x" * 400}}]}
    chunk = {"choices": [{"delta": delta}]}
    assert reader.feed(chunk) == reader.feed(chunk) == b""
    with pytest.raises(Garbage, match="longer than 1000 characters"):
        reader.feed(chunk)


@pytest.mark.parametrize("error", [{"message": "no memory", "code": 500}, "no memory"])
def test_an_error_ends_a_stream(error: Any) -> None:
    reader = OLLAMA_GENERATE.reader({"model": "m"})
    begun = json.loads(reader.feed({"choices": [{"delta": {"content": "once"}}]}))
    assert (begun["response"], begun["done"], begun["model"]) == ("once", False, "m")
    line = reader.feed({"error": error})
    assert json.loads(line) == {"error": "no memory"} == OLLAMA_GENERATE.error(500, "no memory")
    assert reader.end() == b""
    assert not OLLAMA_GENERATE.ends_well(line)
    with pytest.raises(Garbage, match="no memory"):
        OLLAMA_GENERATE.brings(line)
    with pytest.raises(Garbage, match="no memory"):
        OLLAMA_CHAT.from_chat({"error": error}, {})


@pytest.mark.parametrize("arguments", ["{", "[]", '{"a": 1', "7"])
def test_calls_that_cannot_be_said_are_an_error_as_in_ollama(arguments: str) -> None:
    call = {"index": 0, "id": "c", "function": {"name": "weather", "arguments": arguments}}
    with pytest.raises(Garbage, match="'weather'"):
        OLLAMA_CHAT.reader({}).feed({"choices": [{"delta": {"tool_calls": [call]}, "finish_reason": "length"}]})
    (line,) = lines_of(OLLAMA_CHAT, [{"choices": [{"delta": {"tool_calls": [call]}}]}])
    assert "'weather'" in line["error"]
    with pytest.raises(Garbage, match="'weather'"):
        OLLAMA_CHAT.from_chat({"choices": [{"message": {"tool_calls": [call]}}]}, {})


def test_what_models_say_otherwise() -> None:
    """Mistral's content in parts, a refusal, calls without arguments, several choices, lone surrogates."""
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "yes"}]
    for message, text, thinking in (
        ({"content": parts}, "yes", "hm"),
        ({"content": None, "refusal": "no"}, "no", None),
        ({"content": "a\ud800b"}, "a?b", None),
    ):
        choice = {"message": message, "finish_reason": "stop"}
        said = ollama.ChatResponse(**OLLAMA_CHAT.from_chat({"choices": [choice]}, {}))
        assert (said.message.content, said.message.thinking) == (text, thinking)
    call = {"id": "c", "function": {"name": "now", "arguments": ""}}
    said = ollama.ChatResponse(**OLLAMA_CHAT.from_chat({"choices": [{"message": {"tool_calls": [call]}}]}, {}))
    assert said.message.tool_calls is not None and said.message.tool_calls[0].function.arguments == {}
    other = [{"index": 1, "delta": {"content": "other"}}, {"index": 0, "delta": {"content": "first"}}]
    assert lines_of(OLLAMA_CHAT, [{"choices": other}])[0]["message"]["content"] == "first"


def test_probabilities_of_tokens() -> None:
    token = {"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": [{"token": "b", "logprob": -2.0}, {}]}
    logprobs = {"content": [token, {"token": 7}]}
    whole = {"choices": [{"message": {"content": "a"}, "logprobs": logprobs, "finish_reason": "stop"}]}
    said = ollama.ChatResponse(**OLLAMA_CHAT.from_chat(whole, {}))
    assert said.logprobs is not None and said.logprobs[0].top_logprobs is not None
    assert [(each.token, len(each.top_logprobs or [])) for each in said.logprobs] == [("a", 1)]
    lines = lines_of(OLLAMA_CHAT, [{"choices": [{"delta": {"content": "a"}, "logprobs": logprobs}]}])
    assert lines[0]["logprobs"] == OLLAMA_CHAT.from_chat(whole, {})["logprobs"]


# What an Ollama's own answers say

DONE = {
    "model": "m", "created_at": "2025-10-17T23:14:07.414671Z", "message": {"role": "assistant", "content": ""},
    "done": True, "done_reason": "stop", "total_duration": 174560334, "load_duration": 101397084,
    "prompt_eval_count": 11, "prompt_eval_cached_count": 8, "prompt_eval_duration": 13_000_000, "eval_count": 18,
    "eval_duration": 52479709,
}  # fmt: skip


def test_counts_of_an_ollama() -> None:
    usage = Usage(11, 8, 18, 0.013)
    line = json.dumps(DONE).encode()
    assert OLLAMA_CHAT.usage_in(line) == usage == OLLAMA_CHAT.usage_in(json.dumps(DONE, indent=2).encode())
    piece = json.dumps({"message": {"content": '"eval_count": 5'}, "done": False}).encode()
    assert OLLAMA_CHAT.usage_in(piece + b"\n" + line + b"\n") == usage
    assert OLLAMA_CHAT.usage_in(piece) is None
    before = {k: v for k, v in DONE.items() if k != "prompt_eval_cached_count"}
    assert OLLAMA_CHAT.usage_in(json.dumps(before).encode()) == Usage(11, None, 18, 0.013)
    # 0.30 counted what was not cached alone.
    assert OLLAMA_CHAT.usage_in(json.dumps(DONE | {"prompt_eval_count": 3}).encode()) == Usage(3, None, 18, 0.013)
    loaded = {"message": {"content": ""}, "done": True, "done_reason": "load"}
    assert OLLAMA_CHAT.usage_in(json.dumps(loaded).encode()) is None
    assert OLLAMA_EMBED.usage_in(b'{"embeddings": [[1.0]], "prompt_eval_count": 7}') == Usage(7)
    assert OLLAMA_EMBEDDINGS.usage_in(b'{"embedding": [1.0]}') is None


def test_what_a_model_writes_is_no_count_and_no_end() -> None:
    """Arguments are objects here, so their keys look as those of the answer."""
    call = {"function": {"name": "f", "arguments": {"eval_count": 5, "done": True, "prompt_eval_count": 7}}}
    line = json.dumps({"message": {"content": "", "tool_calls": [call]}, "done": False}).encode() + b"\n"
    assert OLLAMA_CHAT.usage_in(line) is None
    assert not OLLAMA_CHAT.ends_well(line)


def test_the_end_of_a_line_that_is_too_long_to_be_kept() -> None:
    """The last line of ``/api/generate`` holds the whole conversation in tokens."""
    head = {"model": "m", "response": "", "done": True, "context": list(range(9000))}
    line = json.dumps({**head, "prompt_eval_count": 9000, "prompt_eval_cached_count": 1, "eval_count": 5}).encode()
    assert OLLAMA_GENERATE.usage_in(line[-16_384:] + b"\n") == Usage(9000, 1, 5)
    assert not OLLAMA_GENERATE.ends_well(line[:-1])
    kept = json.dumps({"response": "x" * 20_000, "done": True, "eval_count": 5}).encode()
    assert OLLAMA_GENERATE.ends_well(kept[-16_384:])


def test_what_brings_something() -> None:
    assert not OLLAMA_CHAT.brings(b"\n")
    assert OLLAMA_CHAT.brings(b'{"message": {"role": "assistant", "content": ""}, "done": false}\n')
    assert OLLAMA_GENERATE.brings(b'{"response": "a"}')
    assert OLLAMA_CHAT.brings(json.dumps(DONE).encode())
    for line in (b"<html>", b"[]", b"{}", b'{"response": "a"}', b'{"error": "no memory"}', b'data: {"message": {}}'):
        with pytest.raises(Garbage):
            OLLAMA_CHAT.brings(line + b"\n")


@given(st.data())
def test_lines_are_found_however_they_are_cut(data: st.DataObject) -> None:
    lines = [b'{"a":"\\n"}\n', b"\n", b"{}\r\n", '{"b":"\u2028é"}\n'.encode(), b'{"c":1}\n']
    stream = b"".join(lines) + b"rest"
    places = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    splitter = reading.LineSplitter()
    pieces = [stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True)]
    assert [line for piece in pieces for line in splitter.feed(piece)] == [line for line in lines if line.strip()]
    assert splitter.rest() == b"rest"


def test_a_line_without_end_is_kept_once() -> None:
    """What came before is not copied for each piece that follows."""
    splitter = reading.LineSplitter()
    splitter.feed(b"x")
    kept = splitter._rest
    splitter.feed(b"x")
    assert splitter._rest is kept


# Embeddings


def test_embeddings_there_and_back() -> None:
    texts = ["a", "b"]
    assert OLLAMA_EMBED.to_chat({"model": "m", "input": texts, "dimensions": 2, "options": {"num_ctx": 9}}) == {
        "input": texts, "encoding_format": "float", "dimensions": 2,
    }  # fmt: skip
    data = [{"index": 1, "embedding": [0.0, 3]}, {"index": 0, "embedding": [0.6, 0.8]}]
    answer = {"data": data, "model": "e", "usage": {"prompt_tokens": 7}}
    said = ollama.EmbedResponse(**OLLAMA_EMBED.from_chat(answer, {"model": "m", "input": texts}))
    assert (said.model, said.embeddings, said.prompt_eval_count) == ("e", [[0.6, 0.8], [0.0, 1.0]], 7)
    packed = base64.b64encode(b"\x00\x00\x80\x3f\x00\x00\x00\x00").decode()
    old = OLLAMA_EMBEDDINGS.from_chat({"data": [{"embedding": packed}]}, {"prompt": "a"})
    assert ollama.EmbeddingsResponse(**old).embedding == [1.0, 0.0]
    for wrong in ([], data, [{"embedding": "xx"}], [{"embedding": []}], [7], [{"embedding": ["a"]}]):
        with pytest.raises(Garbage):
            OLLAMA_EMBEDDINGS.from_chat({"data": wrong}, {"prompt": "a"})
    assert not OLLAMA_EMBED.streams({}) and OLLAMA_EMBED.ends_well(b'{"embeddings": []}\n')
    with pytest.raises(Garbage):
        OLLAMA_EMBED.reader({})


def test_an_assembled_stream_is_a_completion_too() -> None:
    """What our assembly of an engine's chunks makes is what the wire takes."""
    assembly = Assembly()
    for delta in (
        {"role": "assistant", "content": "yes"},
        {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f"}}]},
    ):
        assembly.add({"choices": [{"index": 0, "delta": delta}]})
    said = ollama.ChatResponse(**OLLAMA_CHAT.from_chat(assembly.completion(), {"model": "m"}))
    assert said.message.content == "yes" and said.message.tool_calls and said.done_reason is None


def test_orders_ask_for_nothing() -> None:
    for wire, body in ((OLLAMA_CHAT, chat()), (OLLAMA_GENERATE, generate()), (OLLAMA_EMBED, {"input": ["x"]})):
        assert wire.asks(body)
    for wire in WIRES:
        assert not wire.asks({"model": "m", "keep_alive": 0})
        assert not wire.asks({"model": "m", "messages": [], "prompt": "", "input": []})


def test_each_wire_is_complete() -> None:
    for wire in WIRES:
        assert (wire.framing, wire.error(404, "gone")) == ("ndjson", {"error": "gone"})
        assert "/" + wire.path == wire.paths[0]
        assert wire.headers("key") == {"Authorization": "Bearer key"}
    assert str(ollama.ResponseError(json.dumps(OLLAMA_CHAT.error(404, "gone")), 404)) == "gone (status code: 404)"
    assert ollama_answers.as_response("", "", ()) == {"response": ""}
