from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orla_lg.core.call import Assignment
from orla_lg.core.engine.retry import MAX_RETRY_AFTER_S, AttemptFailed, Retry, RetryPolicy

FAILED = AttemptFailed(RuntimeError("x"))
POLICY = RetryPolicy()


def test_untried_alternatives_come_first_and_at_once() -> None:
    to = Assignment("a", alternatives=("b", "c"))
    assert POLICY.next(FAILED, to, ["a"], 1) == Retry("b", 0.0)
    assert POLICY.next(FAILED, to, ["a", "b"], 1) == Retry("c", 0.0)
    assert POLICY.next(FAILED, to, ["a", "b", "c"], 1) is None
    assert POLICY.next(FAILED, to, ["a", "b", "c"], 4).backend == "a"


@given(alternatives=st.lists(st.sampled_from("abc"), max_size=3), attempts=st.integers(1, 6))
def test_it_ends(alternatives: list[str], attempts: int) -> None:
    to, tried = Assignment("a", alternatives=tuple(alternatives)), ["a"]
    while retry := POLICY.next(FAILED, to, tried, attempts):
        tried.append(retry.backend)
        assert len(tried) <= max(attempts, 1 + len(set(alternatives)))
    assert len(tried) >= attempts and {"a", *alternatives} == set(tried)


@given(attempts=st.integers(1, 40))
def test_pauses_grow_to_a_bound(attempts: int) -> None:
    most = min(POLICY.cap_s, POLICY.base_s * 2 ** (attempts - 1))
    assert most / 2 <= POLICY.delay_s(attempts, None) <= most


def test_what_the_engine_asks_for_is_respected_within_reason() -> None:
    assert POLICY.delay_s(1, 7.0) == 7.0
    assert POLICY.delay_s(1, 1e9) == MAX_RETRY_AFTER_S


def asked_to_wait(seconds: float) -> AttemptFailed:
    return AttemptFailed(RuntimeError("busy"), overloaded=True, retry_after_s=seconds)


def test_an_engine_that_asks_for_more_than_can_be_waited_is_given_up_at_once() -> None:
    to = Assignment("a", alternatives=("b",))
    assert POLICY.next(asked_to_wait(MAX_RETRY_AFTER_S), to, ["a", "b"], 3) == Retry("a", MAX_RETRY_AFTER_S)
    assert POLICY.next(asked_to_wait(MAX_RETRY_AFTER_S + 1), to, ["a", "b"], 3) is None
    assert POLICY.next(asked_to_wait(100_000), to, ["a"], 3) == Retry("b", 0.0), "another may take it"
    assert POLICY.next(asked_to_wait(5), to, ["a", "b"], 3, left_s=4.9) is None
    assert POLICY.next(asked_to_wait(5), to, ["a", "b"], 3, left_s=5.1) == Retry("a", 5)


@given(asked=st.sampled_from([0.0, -1.0, float("inf"), float("nan")]), left=st.floats(0, 10))
def test_what_is_no_pause_is_not_asked_for_and_ours_leaves_time_for_the_attempt(asked: float, left: float) -> None:
    retry = POLICY.next(asked_to_wait(asked), Assignment("a"), ["a"], 3, left_s=left)
    assert retry is not None and 0 <= retry.delay_s <= left / 2
    assert POLICY.base_s / 2 <= POLICY.delay_s(1, asked) <= POLICY.base_s
