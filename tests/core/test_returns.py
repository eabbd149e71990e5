from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg.core import returns
from orla_lg.core.memory import Returns
from orla_lg.core.returns import FADE_AT, HUMAN, IDLE, ReturnBook, after_stage, of_tool

WAIT = after_stage("graph", "reply")


def learned(*seconds: float, never: int = 0) -> ReturnBook:
    book = ReturnBook()
    for nth, each in enumerate(seconds):
        book.waits(f"w{nth}", WAIT, 0.0)
        book.came(f"w{nth}", each)
    for nth in range(never):
        book.waits(f"n{nth}", WAIT, 0.0)
        book.gone(f"n{nth}")
    book.check_integrity()
    return book


def test_before_anything_was_seen_most_are_expected_back_at_no_known_time() -> None:
    assert ReturnBook().usual(WAIT) == Returns(0.8, None, None)
    assert ReturnBook().expected("stranger", 5.0) == Returns(), "who does not wait is there"


def test_who_never_comes_back_lowers_the_chance() -> None:
    chances = [learned(1.0, 1.0, never=never).usual(WAIT).chance for never in (0, 2, 10, 40)]
    assert chances == sorted(chances, reverse=True) and chances[0] > 0.9 and chances[-1] < 0.1


def test_who_has_waited_longer_than_most_is_less_likely_to_come() -> None:
    book = learned(*[1.0] * 15, *[100.0] * 2, never=3)
    book.waits("w", WAIT, 0.0)
    chances = [book.expected("w", after).chance for after in (0.0, 0.5, 5.0, 1_000.0)]
    assert chances[0] == chances[1] > 0.8 and chances[0] > chances[2] > chances[3]
    late = book.expected("w", 5.0)
    assert late.usual_s is not None and late.usual_s > 60, "of those who are still away, half come after a minute"
    assert book.usual(WAIT).usual_s < 2.0  # type: ignore[operator]


def test_times_lie_within_their_bucket_of_doubling_width() -> None:
    said = learned(*[1.0] * 9, 50.0).usual(WAIT)
    assert said.usual_s is not None and said.late_s is not None
    assert 0.64 <= said.usual_s <= 1.28 and 0.64 <= said.late_s <= 1.28, "nine in ten, and no more"
    assert 40.96 <= (learned(*[1.0] * 8, 50.0, 50.0).usual(WAIT).late_s or 0) <= 81.92


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=60), st.floats(0.0, 1e6))
def test_half_come_before_nine_in_ten_whatever_was_seen(seen: list[float], waited_s: float) -> None:
    book = learned(*seen)
    book.waits("w", WAIT, 0.0)
    said = book.expected("w", waited_s)
    assert 0.0 < said.chance <= 1.0
    assert (said.usual_s is None) == (said.late_s is None)
    if said.usual_s is not None and said.late_s is not None:
        assert 0.0 <= said.usual_s <= said.late_s
        assert said.late_s <= max(0.01, 2 * max(seen)) or max(seen) > 0.01 * 2**24


def test_what_was_learned_long_ago_counts_less() -> None:
    book = ReturnBook()
    for _ in range(1_000):
        book.took(of_tool("search"), 0.1)
        book.check_integrity()
    for _ in range(int(FADE_AT)):
        book.took(of_tool("search"), 60.0)
    assert (book.usual(of_tool("search")).usual_s or 0) > 30.0, (
        "a thousand quick ones are outweighed by fewer new ones"
    )


def test_who_waits_for_something_else_did_not_come_for_the_first() -> None:
    book = ReturnBook()
    for nth in range(8):
        book.waits(f"w{nth}", WAIT, 0.0)
        book.waits(f"w{nth}", IDLE, 1.0)
        book.came(f"w{nth}", 61.0)
    assert book.usual(WAIT).chance < 0.2, "the stage's call was its run's last"
    assert book.usual(IDLE).chance > 0.9 and 40 < (book.usual(IDLE).usual_s or 0) < 82, "counted from when it began"
    assert book.usual(HUMAN) == ReturnBook().usual(HUMAN)


def test_the_same_wait_told_again_begins_anew() -> None:
    book = ReturnBook()
    book.waits("w", WAIT, 0.0)
    book.waits("w", WAIT, 100.0)
    book.came("w", 101.0)
    book.came("w", 500.0)
    assert (book.usual(WAIT).usual_s or 0) < 2.0 and book.usual(WAIT).chance > 0.8


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(returns, "KEEP_AWAY", 10)
    monkeypatch.setattr(returns, "KEEP_REASONS", 5)
    book = ReturnBook()
    for nth in range(30):
        book.waits(f"w{nth}", f"r{nth}", float(nth))
    book.check_integrity()
    assert len(book._away) == 10 and len(book._reasons) == 5
    book.came("w0", 99.0)
    book.gone("w0")


def test_any_thread_may_tell() -> None:
    book = ReturnBook()

    def tell(name: str) -> None:
        for nth in range(500):
            book.waits(name, WAIT, float(nth))
            book.expected(name, nth + 0.5)
            (book.came if nth % 5 else lambda who, now: book.gone(who))(name, nth + 1.0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(tell, "abcd"))
    book.check_integrity()
    assert len(book._away) == 0 and 0.6 < book.usual(WAIT).chance < 0.9
