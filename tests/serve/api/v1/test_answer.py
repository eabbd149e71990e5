"""What an execute's caller gets: whole, in events, and what breaks its connection."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from orla_lg.serve.api.v1.answer import ExecuteEvents, error, whole
from orla_lg.wires.reading import Garbage, payload
from orla_lg.wires.wire import chunk_of

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
ANSWERED = {"id": "c1", "McpCallToolParams": {"name": "add", "arguments": {"a": 1}}}
METRICS = {"ttft_ms": 1}


def figures() -> dict[str, Any]:
    return METRICS


def test_a_whole_answer() -> None:
    message = {"role": "assistant", "content": "two", "reasoning_content": "hm", "tool_calls": [CALL]}
    response = {"content": "two", "thinking": "hm", "tool_calls": [ANSWERED], "metrics": METRICS}
    assert whole({"choices": [{"message": message}]}, figures) == {"success": True, "response": response}
    silent = whole({"choices": [{"message": {"content": None}}]}, figures)["response"]
    assert silent == {"content": "", "thinking": "", "tool_calls": [], "metrics": METRICS}
    with pytest.raises(Garbage):
        whole({"choices": []}, figures)


def test_a_stream_has_one_space_after_each_colon_and_ends_with_all_of_it() -> None:
    events = ExecuteEvents(figures)
    said = b"".join(
        events.feed(chunk)
        for chunk in (
            chunk_of({"role": "assistant", "content": ""}),
            chunk_of({"reasoning": "hm"}),
            chunk_of({"content": "t\nw"}),
            chunk_of({"content": "o"}),
            chunk_of({"tool_calls": [{"index": 0, **CALL, "function": {"name": "add", "arguments": '{"a"'}}]}),
            chunk_of({"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}),
            {"choices": [], "usage": {"prompt_tokens": 1}},
        )
    )
    said += events.end()
    *split, rest = said.split(b"\n\n")
    assert rest == b"" and all(each[:7] == b"event: " and each.count(b"\ndata: {") == 1 for each in split)
    kinds = [each.partition(b"\n")[0][7:].decode() for each in split]
    assert kinds == ["thinking", "content", "content", "tool_call", "done"]
    data = [payload(each) for each in split]
    assert data[:4] == [{"thinking": "hm"}, {"content": "t\nw"}, {"content": "o"}, ANSWERED["McpCallToolParams"]]
    response = {"content": "t\nwo", "thinking": "hm", "tool_calls": [ANSWERED], "metrics": METRICS}
    assert data[4] == {"success": True, "response": response}


@pytest.mark.parametrize("chunk", [{"error": {"message": "out of memory"}}, {"choices": [1]}, {"choices": {}}])
def test_what_is_no_chunk_breaks_the_stream_off(chunk: dict[str, Any]) -> None:
    with pytest.raises(httpx2.RemoteProtocolError):
        ExecuteEvents(figures).feed(chunk)


def test_an_answer_without_bound_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orla_lg.wires.reading.MAX_EVENT_BYTES", 10)
    events = ExecuteEvents(figures)
    events.feed(chunk_of({"content": "12345"}))
    with pytest.raises(httpx2.RemoteProtocolError, match="more than 10"):
        events.feed(chunk_of({"content": "678901"}))


def test_an_error_names_its_request() -> None:
    assert json.dumps(error("no", "r-1")) == '{"success": false, "error": "no", "request_id": "r-1"}'
    assert "request_id" not in error("no")
