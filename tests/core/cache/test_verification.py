from __future__ import annotations

import pytest

from orla_lg.core.cache import verification
from orla_lg.core.cache.verification import (
    KEEP_ORDERS,
    KEEP_TRAILS,
    SLACK_TOKENS,
    ExpectedTokens,
    Order,
    OrderBook,
    judge,
)
from orla_lg.core.engine.backend import Effect
from orla_lg.core.memory.events import Verb

LONG = 10 * SLACK_TOKENS
"""A prompt so long that the slack is a small part of it."""


def after(effect: Effect | None, tokens: int = LONG, shared: int = 0) -> ExpectedTokens:
    return ExpectedTokens(tokens, shared, "c1", effect)


@pytest.mark.parametrize("shared", [0, LONG])
def test_who_was_freed_finds_nothing_but_what_others_have_too(shared: int) -> None:
    freed = after(Effect.FREED, 2 * LONG, shared)
    for cached, borne_out in ((0, True), (shared, True), (shared + SLACK_TOKENS, True), (shared + LONG, False)):
        assert judge(freed, cached).borne_out is borne_out, cached


@pytest.mark.parametrize("effect", [None, Effect.PINNED, Effect.RESTORED, Effect.WARMED])
def test_who_was_kept_pinned_restored_or_warmed_finds_all_that_was_there(effect: Effect | None) -> None:
    for cached, borne_out in ((2 * LONG, True), (LONG, True), (LONG - SLACK_TOKENS, True), (LONG // 2, False)):
        assert judge(after(effect), cached).borne_out is borne_out, cached
    assert judge(after(effect, 0), 0).borne_out is None, "nothing was believed to be there"
    for cached in (0, SLACK_TOKENS):
        assert judge(after(effect, SLACK_TOKENS), cached).borne_out is None, "too little to tell"


def test_of_long_prompts_a_part_may_be_missing_for_engines_cache_whole_blocks() -> None:
    assert judge(after(None, 100 * LONG), 91 * LONG).borne_out is True
    assert judge(after(None, 100 * LONG), 89 * LONG).borne_out is False


@pytest.mark.parametrize("effect", [Effect.DEMOTED])
@pytest.mark.parametrize("cached", [0, LONG])
def test_who_may_have_been_evicted_was_promised_nothing(effect: Effect, cached: int) -> None:
    assert judge(after(effect), cached).borne_out is None


def test_without_a_count_there_is_no_verdict() -> None:
    book = OrderBook()
    assert book.judge(after(Effect.PINNED), None).borne_out is None
    assert book.judge(after(Effect.FREED), None).borne_out is None
    assert book.truth() == OrderBook().truth()


def asked(book: OrderBook, *said: tuple[Verb, Effect], workflow: str = "w") -> None:
    for verb, effect in said:
        order_log = book.asks(workflow, verb)
        assert order_log is not None
        book.answered(order_log, Order(verb, effect))


@pytest.mark.parametrize("nothing", [Effect.UNSUPPORTED, Effect.FAILED, Effect.DEFERRED, Effect.UNKNOWN])
def test_what_an_engine_did_not_do_leaves_what_was_promised_before(nothing: Effect) -> None:
    book = OrderBook()
    book.called("w", "c1")
    asked(book, (Verb.RELEASE, nothing))
    assert book.claim("w", LONG, 0, 0.0) == after(None), "it should still just be there"
    asked(book, (Verb.PIN, Effect.PINNED), (Verb.FLUSH, nothing))
    assert book.claim("w", LONG, 0, 0.0) == after(Effect.PINNED)


def test_what_was_said_last_counts_and_a_pin_only_as_long_as_it_lasts() -> None:
    book = OrderBook()
    book.called("w", "c1")
    asked(book, (Verb.RELEASE, Effect.DEMOTED))
    order_log = book.asks("w", Verb.PIN)
    assert order_log is not None
    book.answered(order_log, Order(Verb.PIN, Effect.PINNED, until_s=30.0))
    assert book.claim("w", LONG, 0, 29.9).effect is Effect.PINNED
    assert book.claim("w", LONG, 0, 30.0).effect is Effect.DEMOTED, "it ended by itself"
    book.called("w", "c2")
    assert book.claim("w", LONG, 0, 0.0) == ExpectedTokens(LONG, 0, "c2", None), "a call begins anew"


def test_claimed_against_verified() -> None:
    book = OrderBook()
    book.judge(after(None), LONG + 5)
    book.judge(after(Effect.PINNED), 10)
    book.judge(after(Effect.FREED, LONG, LONG), 3)
    said = book.truth()
    assert (said.claimed_tokens, said.verified_tokens) == (2 * LONG, LONG + 10), "what was freed is no claim"
    assert (said.borne_out, said.refuted) == ({"kept": 1, "freed": 1}, {"pinned": 1})
    book.check_integrity()


def test_what_came_of_an_order_is_told_once_and_after_which_call() -> None:
    book = OrderBook()
    book.called("w", "c1")
    order_log = book.asks("w", Verb.FLUSH)
    assert order_log is not None and order_log.waits == 1
    book.called("w", "c2")
    book.answered(order_log, Order(Verb.FLUSH, Effect.FREED))
    book.note(Order(Verb.FLUSH, Effect.DEFERRED))
    assert book.take_news() == [("c1", Order(Verb.FLUSH, Effect.FREED))] and book.take_news() == []
    assert book.counts == {"flush:freed": 1, "flush:deferred": 1}
    assert book.claim("w", LONG, 0, 0.0).effect is None, "it was asked before the second call"


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert KEEP_TRAILS <= 20_000
    monkeypatch.setattr(verification, "KEEP_TRAILS", 10)
    book = OrderBook()
    for nth in range(20):
        book.called(f"w{nth}", f"c{nth}")
        asked(book, *[(Verb.PIN, Effect.PINNED)] * 10, workflow=f"w{nth}")
    book.check_integrity()
    assert len(book.order_logs) == 10 and book.asks("w0", Verb.PIN) is None
    assert {len(order_log.orders) for order_log in book.order_logs.values()} == {KEEP_ORDERS}
    forgotten = book.forget("w19")
    assert forgotten is not None and forgotten.call_id == "c19" and book.forget("w19") is None
