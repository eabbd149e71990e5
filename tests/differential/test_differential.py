"""Never worse than bare, on whatever a server answers."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings

from tests.differential.bench import Bench, running_bench
from tests.differential.script import Answer, Case, Dialect, Framing, Numbering, Reply, ToolCall, Usage
from tests.differential.strategies import cases

DEEP = os.environ.get("ORLA_HYPOTHESIS") == "random"
EXAMPLES = int(os.environ.get("ORLA_DIFFERENTIAL_EXAMPLES") or (500 if DEEP else 120))

TWO = Answer(content=None, calls=(ToolCall(), ToolCall(name="other", id="call_2")), finish="tool_calls")
MOVED = Reply(status=307, redirect="same", body="moved", framing=Framing(how="length"))
PAGE = "<html><body>502 Bad Gateway</body></html>"
INFINITE = {"prompt_tokens": 1e308, "completion_tokens": float("inf"), "total_tokens": 3}
TEXTS = {"prompt_tokens": "7", "completion_tokens": "3", "total_tokens": "10"}
FRACTIONS = {"prompt_tokens": 7.5, "completion_tokens": 3.0, "total_tokens": 10.5}

FOUND = {
    "redirected": Case((MOVED, Reply())),
    "redirected while it streams": Case((MOVED, Reply()), outer="astream"),
    "redirected in a circle": Case((MOVED,)),
    "redirected to nowhere": Case((Reply(status=308, redirect="missing", body="moved"),)),
    "not modified": Case((Reply(status=304), Reply()), retries=1),
    "several choices": Case((Reply(status=300, body=PAGE, content_type="application/json"),), ask="json_mode"),
    "stream_options refused": Case((Reply(refuses=("stream_options",)),), outer="stream"),
    "stream_options refused, not streamed": Case((Reply(refuses=("stream_options",), refusal_status=422),)),
    "calls numbered from one": Case((Reply(answer=TWO, numbering=Numbering(index="from one")),), outer="ainvoke"),
    "calls numbered below zero": Case((Reply(answer=TWO, numbering=Numbering(index="negative")),)),
    "calls numbered in millions": Case((Reply(answer=TWO, numbering=Numbering(index="huge")),)),
    "calls without numbers": Case((Reply(answer=TWO, numbering=Numbering(index="omitted", ids="each")),)),
    "counts beyond all numbers": Case((Reply(usage=Usage(INFINITE, place="always last")),), outer="stream"),
    "its stream has no end, and the next reply answers": Case(
        (Reply(dialect=Dialect(end="no finish, no done")), Reply(answer=Answer(content=""))), retries=1
    ),
    "cut at the end of what only bare has packed": Case(
        (Reply(framing=Framing(how="short length", encoding="gzip twice")),)
    ),
    "refused within its stream, and asked again without our fields": Case(
        (
            Reply(answer=TWO, dialect=Dialect(error_at=0, error={"error": {"code": 400}})),
            Reply(answer=Answer(None, (ToolCall(name="", id="call_4"),), "tool_calls", choices="two")),
        ),
    ),
    "no last chunk": Case((Reply(framing=Framing(how="no last chunk")),), outer="astream"),
    "no delta at all": Case((Reply(answer=Answer(choices="null message")),)),
    "no delta at all, streamed": Case((Reply(answer=Answer(choices="null message")),), outer="stream"),
    "no delta at all, streamed in a task": Case((Reply(answer=Answer(choices="null message")),), outer="astream"),
    "a count alone, as it was asked for": Case(
        (Reply(answer=Answer(choices="no message")),), inner="stream", stream_usage=True
    ),
    "a count alone, parsed": Case(
        (Reply(answer=Answer(choices="no message"), usage=Usage(place="always last")),),
        inner="stream", ask="function_calling",
    ),
    "a field that is none of SSE's": Case((Reply(dialect=Dialect(fields=("unknown: x",))),), outer="stream"),
    "two calls of one id": Case((Reply(answer=Answer(None, (ToolCall(), ToolCall(name="b")), "tool_calls")),)),
    "two nameless calls of one id": Case(
        (Reply(answer=Answer(None, (ToolCall(name="", id="x"), ToolCall(name="", id="x")), "tool_calls")),)
    ),
    "a call of one number with another, nameless one": Case(
        (
            Reply(
                answer=Answer(None, (ToolCall(), ToolCall(name="", id="call_4")), "tool_calls"),
                numbering=Numbering(index="all zero"),
            ),
        ),
    ),
    "a call of one number with another, and without its id": Case(
        (
            Reply(
                answer=Answer(None, (ToolCall(id=""), ToolCall(name="other", id="call_2")), "tool_calls"),
                numbering=Numbering(index="all zero", ids="each"),
            ),
        ),
        outer="ainvoke",
    ),
    "half an object, called a text": Case(
        (Reply(body='{"error": {"message"', content_type="text/plain"),), outer="ainvoke"
    ),
    "half an object, called nothing": Case((Reply(body='{"error": {"message"', content_type=None),)),
    "half an object, packed in a way that bare cannot read": Case(
        (Reply(body='{"error": {"message"', framing=Framing(encoding="x-gzip")),)
    ),
    "a call that goes on with an empty id and its name": Case(
        (
            Reply(
                answer=Answer(None, (ToolCall(arguments="null", id="call_5"),), "tool_calls"),
                numbering=Numbering(index="omitted", ids="empty later", names="each", types="none", pieces=3),
            ),
        ),
    ),
    "a call that goes on with its name alone": Case(
        (Reply(answer=Answer(None, (ToolCall(),), "tool_calls"), numbering=Numbering(index="null", names="each")),)
    ),
    "counts in each chunk, the second of which is none": Case(
        (Reply(usage=Usage(place="in each chunk"), dialect=Dialect(between="event: ping\n\n")),), inner="stop"
    ),
    "counts in each chunk, the second of which is none, in a task": Case(
        (Reply(usage=Usage(place="in each chunk"), dialect=Dialect(between="event: ping\n\n")),),
        outer="ainvoke", inner="stop",
    ),
    "stopped by a filter": Case(
        (Reply(answer=Answer(content=None, finish="content_filter")),), outer="astream", inner="stop", ask="json_mode"
    ),
    "asked to come back in a day": Case(
        (Reply(status=429, body="{}", headers=(("retry-after", "100000"),)),), retries=1
    ),
    "stream_options crash it": Case((Reply(refuses=("stream_options",), refusal_status=500),), outer="astream"),
    "stream crashes it": Case((Reply(refuses=("stream",), refusal_status=500),), outer="ainvoke"),
    "stream_options refused, one chunk read": Case((Reply(refuses=("stream_options",)),), inner="stop"),
    "no last chunk, not streamed": Case((Reply(framing=Framing(how="no last chunk")),), outer="ainvoke"),
    "a field without a colon": Case((Reply(dialect=Dialect(fields=("event",), lead="\n\n\n")),), outer="stream"),
    "garbage and nothing else": Case((Reply(body=PAGE, content_type="text/event-stream"),), outer="stream"),
    "data after the end": Case((Reply(dialect=Dialect(end="data after")),)),
    "data after the end, in a task": Case((Reply(dialect=Dialect(end="data after")),), outer="ainvoke"),
    "it does not hang up": Case((Reply(framing=Framing(drop="hang within", drop_at=100)),), outer="stream"),
    "counts that nobody asked for": Case((Reply(usage=Usage(place="always last")),), outer="stream"),
    "counts that nobody asked for, and no choice beside them": Case(
        (Reply(answer=Answer(choices="empty"), usage=Usage(place="with the finish")),), inner="stream"
    ),
    "counts that are texts": Case((Reply(answer=Answer(finish=""), usage=Usage(TEXTS)),)),
    "counts that are a text": Case((Reply(usage=Usage("7")),), inner="stream"),
    "counts in fractions": Case((Reply(usage=Usage(FRACTIONS)),), outer="stream", inner="stream"),
    "details that are a word": Case(
        (Reply(usage=Usage({"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": "none"})),),
        outer="astream", ask="json_schema",
    ),
    "an error in a charset that it is not": Case(
        (Reply(status=408, content_type="text/event-stream; charset=utf-16"), Reply()), retries=1
    ),
    "a fault in a charset that it is not": Case(
        (Reply(status=500, body=PAGE, content_type="text/html; charset=utf-16"), Reply()), retries=1, outer="ainvoke"
    ),
    "a stream of one event that says nothing, and another reply": Case(
        (Reply(answer=TWO, dialect=Dialect(error_at=0, error={"error": None})), Reply()), retries=1
    ),
    "an error without its status, and then an answer of nothing": Case(
        (
            Reply(body='{"error": {"message": "bad request", "code": "x"}}', framing=Framing(how="length")),
            Reply(answer=Answer(choices="missing")),
        ),
        outer="stream", retries=1,
    ),
    "labelled as packed, and another reply": Case(
        (Reply(answer=Answer(finish="length"), framing=Framing(encoding="mislabelled")), Reply()), retries=1
    ),
    "an error labelled as packed, and an answer that is no JSON": Case(
        (Reply(body="{}", framing=Framing(encoding="mislabelled", forced=True)), Reply()),
        outer="stream", ask="json_schema", retries=1,
    ),
    "half a body, labelled as packed": Case((Reply(framing=Framing(how="short length", encoding="mislabelled")),)),
    "a page, and then nothing, labelled as packed": Case(
        (Reply(body=PAGE), Reply(framing=Framing(encoding="empty gzip", forced=True))), retries=1
    ),
    "asked to come back at once": Case(
        (Reply(status=498, body="{}", headers=(("x-should-retry", "true"), ("retry-after-ms", "5"))), Reply()),
        retries=1,
    ),
    "asked not to come back": Case(
        (Reply(status=500, body="{}", headers=(("x-should-retry", "false"),)),), retries=2, outer="ainvoke"
    ),
    "asked to come back in many milliseconds": Case(
        (Reply(status=429, body="{}", headers=(("retry-after-ms", "9999999999"),)),), retries=1
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    before = set(threading.enumerate())
    with running_bench() as running:
        yield running
    deadline = time.monotonic() + 10.0
    while (left := _begun_since(before)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, left


def _begun_since(before: set[threading.Thread]) -> list[threading.Thread]:
    """Return the threads begun since, without Python 3.11's records of those of ``_thread``, which outlive them."""
    later = set(threading.enumerate()) - before
    return [each for each in later if not isinstance(each, threading._DummyThread)]


@pytest.mark.parametrize("case", FOUND.values(), ids=FOUND)
def test_what_was_worse_once(bench: Bench, case: Case) -> None:
    verdict = bench.examine(case)
    assert not verdict.faults, verdict


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_a_wrapped_graph_is_never_worse_than_the_bare_one(bench: Bench, case: Case) -> None:
    verdict = bench.examine(case)
    assert not verdict.faults, verdict
