from __future__ import annotations

from dataclasses import replace

import pytest

from orla_lg.core.prefetch.book import NOTICE_S, SLOWS, PrefetchBargain, PrefetchBook, Prefetched, WarmUp, is_worth
from orla_lg.errors import ConfigError

ALONE = PrefetchBargain(chance=1.0, missing_tokens=2000, tokens_per_s=1000)
"""Two seconds of prefill, on an engine that has nothing else to do."""


@pytest.mark.parametrize(
    ("stakes", "worth"),
    [
        (ALONE, True),
        (replace(ALONE, missing_tokens=900 * NOTICE_S), False),
        (replace(ALONE, chance=0.9 * NOTICE_S / 2), False),
        (replace(ALONE, beside=int(1 / SLOWS) + 1), False),
        (replace(ALONE, beside=1), True),
        (replace(ALONE, within_s=0.9 * NOTICE_S), False),
        (replace(ALONE, evicts_tokens=1e9), True),
        (replace(ALONE, chance=0.6, evicts_tokens=2000), True),
        (replace(ALONE, chance=0.6, evicts_tokens=4000), False),
    ],
    ids=[
        "alone",
        "less than it takes to notice that it was given up",
        "hardly likely",
        "many beside it",
        "one beside it",
        "the call is almost there",
        "what it evicts its call would evict too",
        "a likely call for somebody's cache",
        "a likely call for twice as much cache",
    ],
)
def test_a_warm_up_is_worth_it_if_its_call_saves_more_than_others_lose(stakes: PrefetchBargain, worth: bool) -> None:
    assert is_worth(stakes) is worth


BEGINNING = (1, 2)


def test_what_the_call_found_was_used_and_the_rest_wasted() -> None:
    book = PrefetchBook()
    book.warmed("w", BEGINNING, Prefetched(had_tokens=100, computed_tokens=900))
    book.called("w", (1, 9, 3), 1000)
    book.called("v", (1, 2, 3), 1000)
    book.called("w", (1, 2, 3), None)
    said = book.statistics(0, 0)
    assert (said.warmed_tokens, said.used_tokens, said.wasted_tokens) == (900, 0, 0), "its call did not come yet"
    book.called("w", (1, 2, 3), 700)
    book.called("w", (1, 2, 3), 1000)
    said = book.statistics(0, 0)
    assert (said.used_tokens, said.wasted_tokens) == (600, 300), "what was there before is not its merit"


def test_what_was_warmed_twice_for_one_call_is_held_against_it_once() -> None:
    book = PrefetchBook()
    book.warmed("w", BEGINNING, Prefetched(0, 300))
    book.warmed("w", BEGINNING, Prefetched(300, 500))
    book.called("w", (1, 2, 3), 800)
    said = book.statistics(0, 0)
    assert (said.done, said.used_tokens, said.wasted_tokens) == (2, 800, 0)


def test_what_was_given_up_counts_as_far_as_its_call_finds_it() -> None:
    book = PrefetchBook()
    book.gave_up("w", BEGINNING, Prefetched(had_tokens=100, computed_tokens=900, done=False))
    assert book.statistics(0, 0).warmed_tokens == 0 and not book.owes("w"), "nobody knows how far it came"
    book.called("w", (1, 2, 3), 500)
    said = book.statistics(0, 0)
    assert (said.given_up, said.done) == (1, 0)
    assert (said.warmed_tokens, said.used_tokens, said.wasted_tokens) == (400, 400, 0)
    for reached in (None, Prefetched(100, 900, done=False)):
        book.gave_up("v", BEGINNING, reached)
        book.called("v", (1, 2, 3), 100 if reached else 1000)
    book.gave_up("u", BEGINNING, Prefetched(0, 900, done=False))
    book.forget("u")
    said = book.statistics(0, 0)
    assert (said.warmed_tokens, said.used_tokens, said.wasted_tokens) == (400, 400, 0), "nothing of theirs showed"


def test_what_a_second_try_finds_of_the_first_was_warmed_too() -> None:
    book = PrefetchBook()
    book.gave_up("w", BEGINNING, Prefetched(0, 800, done=False))
    book.warmed("w", BEGINNING, Prefetched(300, 500))
    assert book.statistics(0, 0).warmed_tokens == 800 and book.owes("w")
    book.called("w", (1, 2, 3), 700)
    said = book.statistics(0, 0)
    assert (said.done, said.used_tokens, said.wasted_tokens) == (1, 700, 100)


def test_who_never_comes_wastes_it() -> None:
    book = PrefetchBook()
    book.warmed("w", BEGINNING, Prefetched(0, 300))
    book.forget("w")
    book.forget("w")
    assert book.statistics(0, 0).wasted_tokens == 300


@pytest.mark.parametrize("wrong", [{"keep_chars": -1}, {"least_tokens": -1}, {"trust_s": -1.0}, {"room": 0.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        WarmUp(**wrong)
