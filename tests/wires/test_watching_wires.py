"""What a watch hears on other wires than chat completions: the same, in the same terms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orla_lg.wires.assembly import Assembly
from orla_lg.wires.completions import COMPLETIONS
from orla_lg.wires.messages import MESSAGES
from orla_lg.wires.ollama import OLLAMA_CHAT, OLLAMA_GENERATE
from orla_lg.wires.reading import payload
from orla_lg.wires.responses import RESPONSES
from orla_lg.wires.watching import HeardToolCall
from orla_lg.wires.wire import Wire
from tests.differential.render import body_of
from tests.differential.script import Answer, Dialect, Numbering, Reply, ToolCall
from tests.wires.shapes import ANYTHING, named
from tests.wires.test_watching import A, B, Watch, passed

WIRES: tuple[Wire, ...] = (MESSAGES, RESPONSES, OLLAMA_CHAT)
ASKED = {"model": "m", "stream": True, "messages": [], "input": "x", "max_tokens": 9}

calls = st.lists(
    st.builds(
        ToolCall,
        name=st.sampled_from(("look_up", "other")),
        arguments=st.dictionaries(st.text(max_size=3), st.text(max_size=6), min_size=1).map(json.dumps),
        id=st.uuids().map(str),
    ),
    max_size=4,
)  # fmt: skip
answers = st.builds(
    Answer, content=st.none() | st.text(max_size=20), calls=calls.map(tuple), finish=st.just("tool_calls")
)


def on(wire: Wire, data: bytes) -> tuple[bytes, dict[str, Any]]:
    """Return the stream of a chat completion as *wire* has it, and its whole answer."""
    reader, assembly, stream = wire.reader(ASKED), Assembly(), b""
    for event in data.split(b"\n\n"):
        if (chunk := payload(event)) is not None:
            stream += reader.feed(chunk)
            assembly.add(chunk)
    return stream + reader.end(), wire.from_chat(assembly.completion(), ASKED)


def said(call: HeardToolCall) -> tuple[int, str | None, str, Any]:
    return call.position, call.id, call.name, json.loads(call.arguments)


def is_meant(watch: Watch, answer: Answer, wire: Wire) -> None:
    meant = [(at, call.id, call.name, json.loads(call.arguments)) for at, call in enumerate(answer.calls)]
    assert sorted(map(said, watch.calls), key=str) == sorted(meant, key=str)
    message = watch.end
    assert message["content"] == (answer.content or None)
    found = [(each["id"], each["function"]["name"], json.loads(each["function"]["arguments"]))
             for each in message.get("tool_calls", ())]  # fmt: skip
    assert found == [each[1:] for each in meant]


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.name)
@settings(max_examples=80, deadline=None)
@given(answer=answers, pieces=st.sampled_from((8, 0, 3)), cuts=st.lists(st.integers(1, 90), max_size=3))
def test_what_is_heard_is_what_the_answer_has(wire: Wire, answer: Answer, pieces: int, cuts: Sequence[int]) -> None:
    reply = Reply(answer=answer, numbering=Numbering(pieces=pieces), dialect=Dialect(pieces=7))
    data, _, _ = body_of(reply, {"stream": True})
    stream, whole = on(wire, data)
    watch = Watch()
    assert passed(watch, stream, "stream", cuts=cuts, wire=wire) == stream
    is_meant(watch, answer, wire)
    at_once = Watch()
    passed(at_once, json.dumps(whole).encode(), "plain", wire=wire)
    assert not at_once.calls
    at_once.heard[1:1] = watch.calls
    is_meant(at_once, answer, wire)


def lines(*events: Any, named: bool = True) -> list[bytes]:
    """Return server-sent events."""
    return [b"event: " + each["type"].encode() + b"\ndata: " + json.dumps(each).encode() + b"\n\n" for each in events]


def heard_after(wire: Wire, events: Sequence[bytes]) -> list[int]:
    """Return how many calls are heard after each event."""
    numbers = []
    for count in range(1, len(events) + 1):
        watch = Watch(message=False)
        passed(watch, b"".join(events[:count]), "stream", wire=wire)
        numbers.append(len(watch.calls))
    return numbers


def test_a_call_of_messages_is_heard_when_its_braces_balance() -> None:
    def block(at: int) -> dict[str, Any]:
        tool = {"type": "tool_use", "id": f"toolu_{at}", "name": "f", "input": {}}
        return {"type": "content_block_start", "index": at, "content_block": tool}

    def part(at: int, text: str) -> dict[str, Any]:
        delta = {"type": "input_json_delta", "partial_json": text}
        return {"type": "content_block_delta", "index": at, "delta": delta}

    events = lines(
        {"type": "message_start", "message": {"content": []}}, {"type": "ping"},
        block(0), part(0, ""), part(0, A[:5]), part(0, A[5:]), {"type": "content_block_stop", "index": 0},
        block(1), part(1, B), {"type": "content_block_stop", "index": 1},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}}, {"type": "message_stop"},
    )  # fmt: skip
    assert heard_after(MESSAGES, events) == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


def test_a_call_without_input_is_heard_at_the_end_of_messages() -> None:
    tool = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}
    events = lines(
        {"type": "message_start", "message": {}}, {"type": "content_block_start", "index": 0, "content_block": tool},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}}, {"type": "message_stop"},
    )  # fmt: skip
    watch = Watch()
    passed(watch, b"".join(events), "stream", wire=MESSAGES)
    assert watch.calls == [(0, "toolu_1", "f", "{}")]


@pytest.mark.parametrize("says", [("delta", "done", "item"), ("done",), ("item",), ("delta",)])
def test_a_call_of_responses_is_heard_once_however_often_it_is_said(says: Sequence[str]) -> None:
    item = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "f"}
    part = {"item_id": "fc_1", "output_index": 1}
    events = {
        "delta": [{"type": "response.function_call_arguments.delta", **part, "delta": A[:7]},
                  {"type": "response.function_call_arguments.delta", **part, "delta": A[7:]}],
        "done": [{"type": "response.function_call_arguments.done", **part, "arguments": A}],
        "item": [{"type": "response.output_item.done", "output_index": 1, "item": {**item, "arguments": A}}],
    }  # fmt: skip
    stream = lines(
        {"type": "response.output_text.delta", "output_index": 0, "delta": "I look."},
        {"type": "response.output_item.added", "output_index": 1, "item": {**item, "arguments": ""}},
        *(each for name in says for each in events[name]),
        {"type": "response.completed", "response": {"output": []}},
    )
    watch = Watch()
    passed(watch, b"".join(stream), "stream", wire=RESPONSES)
    assert watch.calls == [(0, "call_1", "f", A)]
    assert watch.end["content"] == "I look." and len(watch.end["tool_calls"]) == 1


def test_equal_calls_of_ollama_are_two() -> None:
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    stream = b"".join(
        json.dumps(each).encode() + b"\n"
        for each in (
            {"message": {"content": "", "tool_calls": [call]}, "done": False},
            {"message": {"content": "", "tool_calls": [call]}, "done": False},
            {"message": {"content": ""}, "done": True, "done_reason": "stop"},
        )
    )
    watch = Watch()
    passed(watch, stream, "stream", wire=OLLAMA_CHAT)
    assert [call.position for call in watch.calls] == [0, 1] and len(watch.end["tool_calls"]) == 2


@pytest.mark.parametrize("wire", [COMPLETIONS, OLLAMA_GENERATE], ids=lambda wire: wire.name)
def test_a_wire_without_tools_brings_its_end_alone(wire: Wire) -> None:
    for mode in ("stream", "plain"):
        watch = Watch()
        passed(watch, b'{"response": "x", "done": true}\n', mode, wire=wire)  # type: ignore[arg-type]
        assert watch.end is None


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.name)
@settings(max_examples=80, deadline=None)
@given(
    events=st.lists(
        named("type", "index", "delta", "content_block", "message", "output_index", "item", "tool_calls", "done")
        | ANYTHING, max_size=4,
    ),
    kind=st.sampled_from((
        "content_block_start", "content_block_delta", "message_delta", "response.output_item.added",
        "response.completed", "response.function_call_arguments.delta", "message", "response", None,
    )),
)  # fmt: skip
def test_nothing_that_an_engine_sends_is_raised(wire: Wire, events: list[Any], kind: str | None) -> None:
    said = [{**each, "type": kind, "object": kind} if isinstance(each, dict) and kind else each for each in events]
    framed = b"%b\n" if wire.framing == "ndjson" else b"data: %b\n\n"
    data = b"".join(framed % json.dumps(each).encode() for each in said)
    for mode in ("stream", "plain"):
        alone, watch = passed(None, data, mode, wire=wire), Watch()  # type: ignore[arg-type]
        got = passed(watch, data, mode, wire=wire)  # type: ignore[arg-type]
        assert type(got) is type(alone) and (isinstance(got, Exception) or got == alone)
