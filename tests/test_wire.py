from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg.core.call import Usage
from orla_lg.wires.assembly import Assembly
from orla_lg.wires.chat import ask_of, can_assemble, is_usage_only, usage_in, usage_of
from orla_lg.wires.reading import EventSplitter, payload

TEXTS = st.text(max_size=20)
ENDS = st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r"])


@pytest.mark.parametrize(
    ("counts", "usage"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 2}, Usage(3, None, 2)),
        ({"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}}, Usage(3, 1, 0)),
        ({"prompt_tokens": None, "prompt_tokens_details": None}, Usage()),
        ({"prompt_tokens": "many", "prompt_tokens_details": [], "completion_tokens": 2.0}, Usage(0, None, 2)),
    ],
)
def test_counts_as_engines_write_them(counts: dict[str, object], usage: Usage) -> None:
    assert usage_of(counts) == usage


@pytest.mark.parametrize(
    ("timings", "prefill_s"),
    [
        ('{"cache_n": 9, "prompt_ms": 250.0}', 0.25),
        ('{"prompt_ms": "?"}', None),
        ('{"prompt_ms": 0}', None),
        ("{", None),
    ],
)
def test_llama_cpp_says_how_long_it_prefilled(timings: str, prefill_s: float | None) -> None:
    body = '{"usage": {"prompt_tokens": 3, "completion_tokens": 2}, "timings": ' + timings
    assert usage_in(body.encode()) == Usage(3, None, 2, prefill_s)


@given(answer=TEXTS, spaces=st.sampled_from(["", " ", "\n  "]))
def test_usage_is_found_without_parsing_the_answer(answer: str, spaces: str) -> None:
    body = {"choices": [{"message": {"content": answer + '"usage": {"prompt_tokens": 9}'}}], "usage": None}
    data = json.dumps(body) + f'"usage"{spaces}:{spaces}' + json.dumps({"prompt_tokens": 1, "completion_tokens": 2})
    assert usage_in(data.encode()) == Usage(1, None, 2)


@pytest.mark.parametrize("data", [b"", b'{"usage": null}', b'{"usage": {"prompt_tokens": 1'])
def test_usage_that_is_not_there(data: bytes) -> None:
    assert usage_in(data) is None


def test_the_extra_event_is_told_from_others() -> None:
    assert is_usage_only(b'data: {"choices": [], "usage": {"prompt_tokens": 1}}\n\n')
    assert not is_usage_only(b'data: {"choices": [{"delta": {}}], "usage": {"prompt_tokens": 1}}\n\n')
    assert is_usage_only(b'data: {"choices": [], "usage": "7"}\n\n')
    assert not is_usage_only(b'data: {"choices": []}\n\n')
    assert not is_usage_only(b'data: {"choices": [], "usage" :  null}\n\n')


@given(events=st.lists(st.tuples(TEXTS.map(json.dumps), ENDS), max_size=5), cuts=st.lists(st.integers(0, 200)))
def test_events_come_whole_however_the_network_cut_them(events: list[tuple[str, bytes]], cuts: list[int]) -> None:
    whole = [b"data: " + text.encode() + end for text, end in events]
    data, splitter, got, start = b"".join(whole) + b"data: re", EventSplitter(), [], 0
    for cut in [*sorted(c for c in cuts if c <= len(data)), len(data)]:
        got += splitter.feed(data[start:cut])
        start = cut
    assert got == whole
    assert (splitter.rest(), splitter.rest()) == (b"data: re", b"")


@pytest.mark.parametrize(
    ("event", "parsed"),
    [
        (b'data: {"a": 1}\n\n', {"a": 1}),
        (b'data: {"a":\ndata: 1}\r\n\r\n', {"a": 1}),
        (b"data: [DONE]\n\n", None),
        (b": ping\n\n", None),
        (b"data: 3\n\n", None),
    ],
)
def test_payloads(event: bytes, parsed: object) -> None:
    assert payload(event) == parsed


def chunk(index: int = 0, finish: str | None = None, **delta: object) -> dict[str, object]:
    return {"id": "x", "object": "chunk", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}


def test_a_stream_becomes_the_answer_it_would_have_been() -> None:
    built = Assembly()
    for part in (
        chunk(role="assistant", content=""),
        chunk(content="He", reasoning_details=[{"text": "a"}], tool_calls=[{"index": 0, "id": "c1"}]),
        chunk(content="y", reasoning_details=[{"text": "b"}], refusal=None),
        chunk(tool_calls=[{"index": 0, "function": {"name": "f", "arguments": '{"a"'}}]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": ": 1}"}}, {"index": None, "id": "c2"}]),
        chunk(finish="stop", stats={"n": 1}),
        chunk(1, role="assistant"),
        {"choices": [], "usage": {"prompt_tokens": 1}},
    ):
        built.add(part)
    whole = built.completion()
    first, second = (choice["message"] for choice in whole["choices"])
    assert (whole["id"], whole["object"], whole["usage"]) == ("x", "chat.completion", {"prompt_tokens": 1})
    assert first["content"] == "Hey" and first["reasoning_details"] == [{"text": "a"}, {"text": "b"}]
    assert first["tool_calls"][0] == {
        "id": "c1",
        "type": "function",
        "function": {"name": "f", "arguments": '{"a": 1}'},
    }
    assert first["tool_calls"][1]["id"] == "c2" and first["stats"] == {"n": 1}
    assert whole["choices"][0]["finish_reason"] == "stop" and second["content"] is None


def test_an_error_in_a_stream_is_kept() -> None:
    built = Assembly()
    built.add({"error": {"code": 503}})
    assert built.error == {"error": {"code": 503}}


def test_what_a_request_asks_for() -> None:
    asked = ask_of({"model": "m", "stream": True, "tools": [1], "max_tokens": 5, "max_completion_tokens": 7})
    assert (asked.model, asked.stream, asked.tools, asked.json_schema, asked.max_tokens) == (
        "m",
        True,
        True,
        False,
        7,
    )
    assert ask_of({"response_format": {"type": "json_schema"}}).json_schema
    assert ask_of({}).model == "auto"


@pytest.mark.parametrize(
    "lossy", [{"n": 2}, {"logprobs": True}, {"stream": True}, {"audio": {}, "modalities": ["a"]}]
)
def test_what_streaming_would_lose_is_not_streamed(lossy: dict[str, object]) -> None:
    assert can_assemble({"n": None}) and not can_assemble(lossy)
