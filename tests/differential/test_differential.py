"""Never worse than bare, on whatever a server answers."""

from __future__ import annotations

import os
import threading
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
    "no last chunk": Case((Reply(framing=Framing(how="no last chunk")),), outer="astream"),
    "no delta at all": Case((Reply(answer=Answer(choices="null message")),)),
    "a field that is none of SSE's": Case((Reply(dialect=Dialect(fields=("unknown: x",))),), outer="stream"),
    "two calls of one id": Case((Reply(answer=Answer(None, (ToolCall(), ToolCall(name="b")), "tool_calls")),)),
    "stopped by a filter": Case(
        (Reply(answer=Answer(content=None, finish="content_filter")),), outer="astream", inner="stop", ask="json_mode"
    ),
    "asked to come back in a day": Case(
        (Reply(status=429, body="{}", headers=(("retry-after", "100000"),)),), retries=1
    ),
}


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    threads = threading.active_count()
    with running_bench() as running:
        yield running
    assert threading.active_count() <= threads + 1


@pytest.mark.parametrize("case", FOUND.values(), ids=FOUND)
def test_what_was_worse_once(bench: Bench, case: Case) -> None:
    verdict = bench.examine(case)
    assert not verdict.faults, verdict


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_a_wrapped_graph_is_never_worse_than_the_bare_one(bench: Bench, case: Case) -> None:
    verdict = bench.examine(case)
    assert not verdict.faults, verdict
