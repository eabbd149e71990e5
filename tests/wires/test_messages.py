"""Answers of Anthropic's Messages: watched on their way, and made of chat completions, as the real SDK reads them."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from anthropic._streaming import SSEDecoder
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from orla_lg.core.call import Usage
from orla_lg.wires import chat, reading
from orla_lg.wires.assembly import Assembly
from orla_lg.wires.messages import MESSAGES
from orla_lg.wires.reading import Garbage
from tests.wires.shapes import ANYTHING, NAMES, OBJECTS, TEXTS, named

EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
ASKED = {
    "model": "m", "max_tokens": 99, "messages": [{"role": "user", "content": "hi"}], "stop_sequences": ["STOP"],
    "thinking": {"type": "adaptive"},
}  # fmt: skip


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


@settings(max_examples=60, deadline=None)
@given(answers())
def test_a_stream_put_together_is_the_answer_in_one_piece(
    answer: tuple[dict[str, Any], list[dict[str, Any]]],
) -> None:
    completion, chunks = answer
    stream = streamed(chunks)
    assert put_together(stream) == plain(MESSAGES.from_chat(completion, ASKED))
    assert MESSAGES.ends_well(stream) and MESSAGES.is_over(stream)


@settings(max_examples=40, deadline=None)
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


@settings(max_examples=60, deadline=None)
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
    chunk = {"id": "x", "choices": [{"delta": {"tool_calls": [{"index": 0, **call}]}}]}
    (sent,) = (each.delta.partial_json for each in read(streamed([chunk])) if each.type == "content_block_delta")
    assert sent == arguments, "a stream brings what the model wrote"


def test_a_call_that_an_engine_gives_no_id_gets_one() -> None:
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    made = MESSAGES.from_chat({"choices": [{"message": {"tool_calls": [call, call]}}]}, ASKED)
    ids = [block["id"] for block in made["content"]]
    assert len(set(ids)) == 2 and all(given.startswith("toolu_") for given in ids)
    assert [block["input"] for block in made["content"]] == [{"x": 1}, {"x": 1}]
    assert made["id"].startswith("msg_") and made["model"] == "m"


@pytest.mark.parametrize("said", [None, {"type": "disabled"}, {"type": "adaptive", "display": "omitted"}, "?"])
def test_what_a_model_thought_is_shown_to_those_that_ask_for_it(said: Any) -> None:
    message, why = {"reasoning": "hm", "content": "yes"}, {"finish_reason": "stop"}
    asked = {**ASKED, "thinking": said}
    made = MESSAGES.from_chat({"id": "x", "choices": [{"message": message, **why}]}, asked)
    assert made["content"] == [{"type": "text", "text": "yes"}]
    assert put_together(streamed([{"id": "x", "choices": [{"delta": message, **why}]}], asked)) == plain(made)


def test_thinking_after_a_text_is_a_block_of_its_own() -> None:
    deltas = [{"reasoning": "a"}, {"content": "b"}, {"reasoning": "c"}, {"content": "d"}]
    made = put_together(streamed([{"choices": [{"delta": delta}]} for delta in deltas]))
    assert [block[block["type"]] for block in made["content"]] == ["a", "b", "c", "d"]


def test_a_call_streams_as_it_comes_and_what_is_said_after_it_comes_last() -> None:
    def call(index: int, arguments: str, **first: Any) -> dict[str, Any]:
        name = {"name": first.pop("name")} if first else {}
        return {"tool_calls": [{"index": index, **first, "function": {**name, "arguments": arguments}}]}

    deltas = [
        call(0, "", id="a", name="add"), call(0, '{"x"'), call(0, ': "}"}'), {"content": " "},
        call(1, '{"y": ', id="b", name="add"), call(1, "1}"), {"content": "done"}, call(1, ""),
    ]  # fmt: skip
    reader = MESSAGES.reader(ASKED)
    came = [[each.type for each in read(reader.feed({"choices": [{"delta": delta}]}))] for delta in deltas]
    piece = "content_block_delta"
    assert came == [
        ["message_start", "content_block_start"], [piece], [piece], [],
        ["content_block_stop", "content_block_start", piece], [piece], [], [],
    ]  # fmt: skip
    made = put_together(streamed([{"choices": [{"delta": delta}]} for delta in deltas]))
    assert [block.get("input", block.get("text")) for block in made["content"]] == [{"x": "}"}, {"y": 1}, " done"]


@pytest.mark.parametrize(
    "deltas",
    [
        [(1, "a", "f", '{"x": 1}'), (1, None, None, "")],
        [(0, "a", "f", '{"x"'), (1, "b", "g", '{"y": 2'), (0, None, None, ": 1}"), (1, None, None, "}")],
        [(0, "a", "f", '{"x": '), (0, "a", "f", "1}")],
        [(0, "a", "f", '{"x": 1}'), (0, None, None, '{"x": 1}')],
        [(None, "a", "f", '{"x": 1}'), (None, "b", "g", "{}")],
        [(0, "a", "f", '{"x": 1}'), (0, "b", "g", "{}")],
        [(0, None, "f", '{"x": 1}')],
    ],
)
def test_calls_that_engines_number_in_their_own_way_come_out_as_from_the_assembly(deltas: list[Any]) -> None:
    chunks, assembly = [], Assembly()
    for index, called, name, arguments in deltas:
        call = {"index": index, "id": called, "function": {"name": name, "arguments": arguments}}
        call["function"] = {key: value for key, value in call["function"].items() if value is not None}
        delta = {"tool_calls": [{key: value for key, value in call.items() if value is not None}]}
        chunks.append({"choices": [{"index": 0, "delta": delta}]})
        assembly.add(chunks[-1])
    wanted = plain(MESSAGES.from_chat(assembly.completion(), ASKED))["content"]
    made = put_together(streamed(chunks))["content"]
    assert [(each["name"], each["input"]) for each in made] == [(each["name"], each["input"]) for each in wanted]


def test_long_arguments_are_heard_of() -> None:
    piece = {"choices": [{"delta": {"tool_calls": [{"index": 3, "function": {"arguments": " "}}]}}]}
    first = {
        "choices": [{"delta": {"tool_calls": [{"index": 3, "id": "a", "function": {"name": "f", "arguments": "{"}}]}}]
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


@settings(max_examples=60, deadline=None)
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


@settings(max_examples=60, deadline=None)
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
