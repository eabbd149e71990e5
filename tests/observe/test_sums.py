"""Sums of records, against a naive sum over all of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from orla_lg.core.record import Record
from orla_lg.observe import sums
from orla_lg.observe.counts import MOST_VALUES, ControlCounts
from orla_lg.observe.sums import CallSums, decision_of, kind_of, status_of

WHOLE: dict[str, Any] = {
    "id": "1", "workflow": "w", "run": None, "stage": "draft", "step": None, "backend": "light", "model": "m",
    "mapper": "table", "reason": "", "priority": 0.0, "tenant": None, "queue_wait_s": 0.0, "ttft_s": None,
    "duration_s": 1.0, "prompt_tokens": None, "cached_tokens": None, "completion_tokens": None,
    "cache_action": "engine", "attempts": 1, "cost_usd": None, "error": None, "external": False,
}  # fmt: skip

SECONDS = st.floats(0, 1000)
TOKENS = st.none() | st.integers(0, 1000)
RECORDS = st.builds(
    lambda **given: Record(**{**WHOLE, **given}),
    stage=st.sampled_from(["", "draft", "a|b"]), backend=st.sampled_from([None, "light", "heavy"]),
    queue_wait_s=SECONDS, duration_s=SECONDS, ttft_s=st.none() | SECONDS, prompt_tokens=TOKENS,
    cached_tokens=TOKENS, completion_tokens=TOKENS, attempts=st.integers(0, 3), cost_usd=st.none() | SECONDS,
    error=st.sampled_from([None, "QueueFull: x", "abandoned", "TypeError: y", "the call's replica has ended"]),
    external=st.booleans(), mapper=st.sampled_from([None, "code", "table"]),
)  # fmt: skip


def record(**given: Any) -> Record:
    return Record(**{**WHOLE, **given})


@given(st.lists(RECORDS, max_size=20))
def test_sums_are_those_of_the_records(records: list[Record]) -> None:
    made = CallSums()
    for each in records:
        made(each)
    found = dict(made.stages())
    pairs = Counter((each.stage or "(none)", each.backend or "unregistered") for each in records)
    assert {pair: sum(each.statuses.values()) for pair, each in found.items()} == pairs
    for pair, each in found.items():
        mine = [one for one in records if (one.stage or "(none)", one.backend or "unregistered") == pair]
        assert each.statuses == Counter(map(status_of, mine))
        counted = [one for one in mine if one.prompt_tokens is not None]
        assert each.prompt == sum(one.prompt_tokens or 0 for one in counted)
        assert each.completion == sum(one.completion_tokens or 0 for one in counted)
        assert abs(each.usd - sum(one.cost_usd or 0 for one in mine)) < 1e-6
        for bound, count in each.wait.buckets():
            assert count == sum(one.queue_wait_s <= float(bound) for one in mine)
        assert each.first_token.buckets()[-1][1] == sum(one.ttft_s is not None for one in mine)
    assert made.decisions() == Counter(map(decision_of, records))
    for backend, of_it in made.backends():
        mine = [one for one in records if (one.backend or "unregistered") == backend]
        assert of_it.errors.total() == sum(one.error is not None for one in mine)
        assert of_it.retries == sum(one.attempts - 1 for one in mine if one.attempts)
        assert of_it.latency.buckets()[-1][1] == sum(one.attempts > 0 for one in mine)


def test_names_are_bounded() -> None:
    made = CallSums()
    for number in range(sums.MOST_STAGES + 500):
        made(record(stage=f"stage{number}", error=f"Kind{number}: x"))
    found = dict(made.stages())
    assert len(found) == sums.MOST_STAGES + 1
    assert found["other", "light"].statuses == {"error": 500}
    ((_, backend),) = made.backends()
    assert len(backend.errors) == sums.MOST_KINDS + 1 and backend.errors.total() == sums.MOST_STAGES + 500
    counts = ControlCounts()
    for number in range(200):
        counts.mutation(f"r{number}", "POST", "ok")
        counts.hook(f"h{number}", "applied")
    assert len(counts.mutations()) == len(counts.hooks()) == MOST_VALUES + 1


def test_a_name_that_no_text_can_hold_is_shown_as_one() -> None:
    made = CallSums()
    made(record(stage="a\ud800\n" + "x" * 1_000))
    ((stage, _),) = dict(made.stages())
    assert stage.encode() and len(stage) <= sums.MOST_CHARS and "\n" not in stage


def test_a_status_says_who_ended_the_call() -> None:
    said = {"QueueFull: the queue is full": "refused", "DeadlineExceeded: late": "refused", "abandoned": "cancelled",
            "CancelledError: ": "cancelled", "BackendUnavailable: gone": "error", "no name: x": "error"}  # fmt: skip
    assert {error: status_of(record(error=error)) for error in said} == said
    assert kind_of("no name: x") == "other" and kind_of("x" * 500) == "other"


def test_a_token_takes_what_is_left_after_the_first() -> None:
    made = CallSums()
    made(record(queue_wait_s=1.0, ttft_s=2.0, duration_s=7.0, completion_tokens=5))
    made(record(ttft_s=2.0, duration_s=7.0, completion_tokens=1))  # has none after the first
    made(record(ttft_s=2.0, duration_s=7.0, completion_tokens=5, attempts=2))  # an attempt before took a part of it
    ((_, light),) = made.backends()
    assert light.per_token.buckets()[-1] == ("+Inf", 1) and light.per_token.total == 1.0
    assert light.latency.total == 6.0 + 7.0 + 7.0
