"""Past calls summed up: percentiles as databases work them out, and no more kept than is bounded."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg.serve.past_calls.completions import Completion, CompletionBook, figures, percentile


def completion(number: int, *, stage: str = "s", latency_s: float = 1.0) -> Completion:
    return Completion(f"c{number}", stage, "w", None, "b", "", None, latency_s, 0.5, float(number))


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=50))
def test_percentiles_lie_between_values_in_proportion(values: list[float]) -> None:
    ordered = sorted(values)
    quarters = statistics.quantiles(ordered, n=4, method="inclusive")
    for part, expected in zip((0.25, 0.5, 0.75), quarters, strict=True):
        assert percentile(ordered, part) == pytest.approx(expected)
    assert (percentile(ordered, 0.0), percentile(ordered, 1.0)) == (ordered[0], ordered[-1])


def test_the_newest_are_kept_and_come_first() -> None:
    book = CompletionBook(3)
    for number in range(1, 6):
        book.add(completion(number))
    assert [each.id for each in book.completions()] == ["c5", "c4", "c3"]
    assert [each.id for each in book.completions(since_s=4.0)] == ["c5"]
    assert not list(book.completions(stage="other"))
    assert book.stages() == {"s"}


def test_calls_are_summed_up_by_backend() -> None:
    (row,) = figures(iter([completion(n, latency_s=n) for n in range(1, 5)]))
    assert (row.count, row.errors, row.mean_s, row.p50_s, row.cost_usd) == (4, 0, 2.5, 2.5, 2.0)
    assert figures(iter(())) == []
