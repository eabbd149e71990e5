"""Tool calls in the dialects of engines: what each means in one piece must come out of its stream."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg import Backend, ChatOrla
from orla_lg.wires.assembly import Assembly
from orla_lg.wires.reading import Garbage
from tests.differential.render import deltas
from tests.differential.script import Answer, Numbering, Reply
from tests.differential.strategies import CALLS, are_told_apart
from tests.openai_api.raw_engine import MODEL, USAGE, RawEngine, either, events, whole

A, B = '{"city": "Paris"}', '{"city": "Oslo"}'


def part(index: Any = ..., id: Any = ..., name: Any = ..., arguments: Any = ..., **more: Any) -> dict[str, Any]:
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not ...}
    made = {key: value for key, value in (("index", index), ("id", id)) if value is not ...}
    return {**made, **({"function": function} if function else {}), **more}


def built(*deltas: list[Any]) -> Assembly:
    assembly = Assembly()
    for calls in deltas:
        assembly.add({"choices": [{"index": 0, "delta": {"tool_calls": calls}}]})
    return assembly


def calls_of(assembly: Assembly) -> list[tuple[Any, Any, Any]]:
    (choice,) = assembly.completion()["choices"]
    calls = choice["message"].get("tool_calls", [])
    return [(call.get("id"), call["function"]["name"], call["function"]["arguments"]) for call in calls]


TWO = [("a", "f", A), ("b", "g", B)]
DIALECTS: dict[str, tuple[list[list[Any]], list[Any]]] = {
    "as OpenAI": ([[part(0, "a", "f", "")], [part(0, arguments=A[:5])], [part(0, arguments=A[5:])],
                   [part(1, "b", "g", "")], [part(1, arguments=B)]], TWO),
    "from 1": ([[part(1, "a", "f", A[:5])], [part(1, arguments=A[5:])], [part(2, "b", "g", B)]], TWO),
    "sparse": ([[part(0, "a", "f", A)], [part(7, "b", "g", B[:4])], [part(7, arguments=B[4:])]], TWO),
    "huge": ([[part(3_000_000, "a", "f", A)], [part(10**30, "b", "g", B)]], TWO),
    "negative": ([[part(-1, "a", "f", A)], [part(-2, "b", "g", B)]], TWO),
    "a string": ([[part("0", "a", "f", A[:5])], [part(0, arguments=A[5:])], [part("1", "b", "g", B)]], TWO),
    "a float": ([[part(0.0, "a", "f", A[:5])], [part(0, arguments=A[5:])], [part(1.0, "b", "g", B)]], TWO),
    "null": ([[part(None, "a", "f", A[:5])], [part(None, arguments=A[5:])], [part(None, "b", "g", B)]], TWO),
    "none": ([[part(..., "a", "f", A[:5])], [part(arguments=A[5:])], [part(..., "b", "g", B)]], TWO),
    "none, ids each time": ([[part(..., "a", "f", A[:5])], [part(..., "b", "g", B[:5])],
                             [part(..., "a", arguments=A[5:])], [part(..., "b", arguments=B[5:])]], TWO),
    "no number at all": ([[part([], "a", "f", A)], [part({}, "b", "g", B)]], TWO),
    "all 0, ids differ": ([[part(0, "a", "f", A)], [part(0, "b", "g", B[:3])], [part(0, arguments=B[3:])]], TWO),
    "all 0, ids empty": ([[part(0, "", "f", A)], [part(0, "", "g", B)]], [("", "f", A), ("", "g", B)]),
    "all 0, no ids": ([[part(0, ..., "f", A)], [part(0, ..., "f", B)]], [(None, "f", A), (None, "f", B)]),
    "all 0, one has no id": ([[part(0, "", "f", A[:5])], [part(0, arguments=A[5:])], [part(0, "b", "g", B)]],
        [("", "f", A), ("b", "g", B)]),
    "all 0, in turn": ([[part(0, "a", "f", A[:5])], [part(0, "b", "g", B[:5])], [part(0, "a", arguments=A[5:])],
                        [part(0, "b", arguments=B[5:])]], TWO),
    "ids last": ([[part(0, ..., "f", A)], [part(0, "a", "", "")], [part(1, ..., "g", B[:5])],
                  [part(1, "b", None, B[5:])]], TWO),
    "neither": ([[part(..., ..., "f", A), part(..., ..., "g", B)]], [(None, "f", A), (None, "g", B)]),
    "neither, in pieces": ([[part(..., ..., "f", A[:3])], [part(arguments=A[3:])], [part(..., ..., "g", B)]],
                           [(None, "f", A), (None, "g", B)]),
    "at once": ([[part(0, "a", "f", A), part(1, "b", "g", B)]], TWO),
    "a new id each time": ([[part(0, "a", "f", A[:5])], [part(0, "x", arguments=A[5:])], [part(1, "b", "g", B)]],
        TWO),
    "a new id each time, and a null name": ([[part(0, "a", "f", A[:5])], [part(0, "x", None, A[5:])]],
        [("a", "f", A)]),
    "id again": ([[part(0, "a", "f", A[:5])], [part(0, "a", arguments=A[5:])], [part(1, "b", "g", B)]], TWO),
    "name again": ([[part(0, "a", "f", A[:5])], [part(0, "a", "f", A[5:])], [part(1, "b", "g", B)]], TWO),
    "name again, no id": ([[part(0, ..., "f", A[:5])], [part(0, ..., "f", A[5:])]], [(None, "f", A)]),
    "name in pieces": ([[part(0, "a", "get_")], [part(0, ..., "city", "")], [part(0, arguments=A)]],
        [("a", "get_city", A)]),
    "arguments again": ([[part(0, "a", "f", A[:5])], [part(0, arguments=A[5:])], [part(0, arguments=A)]],
        [("a", "f", A)]),
    "all again": ([[part(0, "a", "f", A)], [part(0, "a", "f", A)]], [("a", "f", A)]),
    "arguments grow": ([[part(0, "a", "f", A[:5])], [part(0, arguments=A[:9])], [part(0, arguments=A)]],
        [("a", "f", A)]),
    "an object": ([[part(0, "a", "f", json.loads(A))]], [("a", "f", A)]),
    "null fields": ([[part(0, "a", "f", None, type=None)], [part(0, None, None, A)]], [("a", "f", A)]),
    "null functions": ([[part(0, "a", "f")], [{"index": 0, "function": None}], [part(0, arguments=A)]],
        [("a", "f", A)]),
    "type alone, first": ([[part(0, "a", "f", A)], [part(1, type="function")], [part(1, "b", "g", B)]], TWO),
    "no arguments": ([[part(0, "a", "f")]], [("a", "f", "")]),
    "odd ids": ([[part(0, 7, "f", A)]], [("7", "f", A)]),
}  # fmt: skip
NAMELESS: dict[str, tuple[list[list[Any]], list[Any]]] = {
    "no name": ([[part(0, "a", "f", A)], [part(0, "b", "", "")], [part(0, arguments=B)]],
        [("a", "f", A), ("b", "", B)]),
    "no name, after one without an id": ([[part(0, None, "f", A)], [part(0, "b", "", "")], [part(0, arguments=B)]],
        [(None, "f", A), ("b", "", B)]),
}  # fmt: skip
"""Calls of one index, which chat completions can say and other wires cannot."""


@pytest.mark.parametrize("dialect", [*DIALECTS, *NAMELESS])
def test_a_dialect_of_tool_calls(dialect: str) -> None:
    deltas, meant = {**DIALECTS, **NAMELESS}[dialect]
    assert calls_of(built(*deltas)) == meant


@pytest.mark.parametrize("index", ["right", "all zero", "null", "omitted"])
def test_two_calls_come_out_of_their_stream_however_it_is_numbered(index: Any) -> None:
    ways = itertools.product([index], ["first", "each", "empty later"], ["first", "each"], ["first"], [8, 0])
    numberings = [Numbering(*way) for way in ways]
    for calls in filter(are_told_apart, itertools.product(CALLS, repeat=2)):
        meant = [(call.id, call.name, call.arguments) for call in calls]
        for numbering in numberings:
            reply = Reply(answer=Answer(content=None, calls=calls), numbering=numbering)
            found = calls_of(built(*(delta["tool_calls"] for delta in deltas(reply) if "tool_calls" in delta)))
            assert [(id or None, *said) for id, *said in found] == [(id or None, *said) for id, *said in meant], reply


def test_what_else_a_call_carries_is_kept() -> None:
    signed = {"extra_content": {"google": {"thought_signature": "s"}}}
    assembly = built([part(0, "a", "f", A[:4], **signed)], [part(0, arguments=A[4:])])
    assert assembly.completion()["choices"][0]["message"]["tool_calls"][0]["extra_content"] == signed["extra_content"]
    custom = built(
        [part(0, "a", type="custom", custom={"name": "sql", "input": "SEL"})], [part(0, custom={"input": "ECT"})]
    )
    assert custom.completion()["choices"][0]["message"]["tool_calls"] == [
        {"id": "a", "type": "custom", "custom": {"name": "sql", "input": "SELECT"}}
    ]


@given(st.integers() | st.floats() | st.text(max_size=3) | st.none() | st.booleans())
def test_no_index_brings_a_phantom(index: Any) -> None:
    assert calls_of(built([part(index, "a", "f", A)], [part(index, arguments="")])) == [("a", "f", A)]


def test_a_number_sizes_nothing() -> None:
    tracemalloc.start()
    calls_of(built([part(3_000_000, "a", "f", A)]))
    assembly = Assembly()
    assembly.add({"choices": [{"index": 3_000_000, "delta": {"content": "x"}}]})
    assembly.completion()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": "x"}, {"choices": [3]}, {"choices": [{"delta": "x"}]},
        {"choices": [{"delta": {"tool_calls": 3}}]},
        {"choices": [{"delta": {"tool_calls": [None]}}]}, {"choices": [{"delta": {"tool_calls": [{"function": 1}]}}]},
    ],
)  # fmt: skip
def test_what_is_no_chunk_is_garbage(chunk: Any) -> None:
    with pytest.raises(Garbage, match="expected"):
        Assembly().add(chunk)


@pytest.mark.parametrize(
    ("deltas", "content"),
    [
        (["He", "y"], "Hey"),
        ([[{"type": "text", "text": "a"}], [{"type": "text", "text": "b"}]],
         [{"type": "text", "text": t} for t in "ab"]),
        (["a", [{"type": "image"}]], [{"type": "text", "text": "a"}, {"type": "image"}]),
        ([[{"type": "thinking"}], "b"], [{"type": "thinking"}, {"type": "text", "text": "b"}]),
        ([[{"index": 0, "text": "a"}], [{"index": 0, "text": "b"}, {"index": 1, "text": "c"}]],
         [{"index": 0, "text": "ab"}, {"index": 1, "text": "c"}]),
        (["", None], ""),
        ([3], 3),
    ],
)  # fmt: skip
def test_content_of_every_shape(deltas: list[Any], content: Any) -> None:
    assembly = Assembly()
    for delta in deltas:
        assembly.add({"choices": [{"delta": {"content": delta}}]})
    assert assembly.completion()["choices"][0]["message"]["content"] == content


def test_a_function_call_of_old_and_a_whole_message_in_a_chunk() -> None:
    assembly = Assembly()
    for function in ({"name": "f", "arguments": "{"}, {"name": "", "arguments": "}"}):
        assembly.add({"choices": [{"delta": {"function_call": function}}]})
    assert assembly.completion()["choices"][0]["message"]["function_call"] == {"name": "f", "arguments": "{}"}
    at_once = Assembly()
    at_once.add({"choices": [{"message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}]})
    assert at_once.completion()["choices"][0]["message"]["content"] == "x" and at_once.finished


@pytest.mark.parametrize("dialect", ["huge", "from 1", "all 0, ids differ", "none", "name again"])
def test_through_the_model_as_in_one_piece(dialect: str, make_orla: Any) -> None:
    deltas, meant = DIALECTS[dialect]
    calls = [{"id": id, "type": "function", "function": {"name": n, "arguments": a}} for id, n, a in meant]
    plain = whole({"role": "assistant", "content": None, "tool_calls": calls})
    stream = events([{"role": "assistant", "tool_calls": delta} for delta in deltas], usage=USAGE)
    with RawEngine(either(plain, stream)) as engine:
        orla = make_orla(Backend("main", engine.url, model=MODEL))
        answer = ChatOrla(orla=orla, model="main").invoke("hello")
        assert engine.asked[-1].body["stream"] is True
    assert [(call["id"], call["name"], json.dumps(call["args"])) for call in answer.tool_calls] == meant
    assert not answer.invalid_tool_calls
