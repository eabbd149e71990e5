from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg.core.memory import returns
from orla_lg.core.memory.events import Doing, Returns
from orla_lg.core.memory.returns import FADE_AT, HALVES_AFTER_S, HUMAN, IDLE, ReturnBook, after_stage, of_tool
from orla_lg.core.workflow import Outcome
from tests.core.prefetch.test_prefetcher import SLOTS, Bench

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


# Before anything was learned


def test_who_is_sure_to_come_back_before_who_may_before_who_cannot() -> None:
    order = [Doing.GENERATING, Doing.TOOL, Doing.HUMAN, Doing.IDLE, None]
    chances = [ReturnBook().chance("w", doing, 0.0, 60.0) for doing in order]
    assert chances == sorted(chances, reverse=True) and (chances[0], chances[-1]) == (1.0, 0.0)


@pytest.mark.parametrize("doing", HALVES_AFTER_S)
@pytest.mark.parametrize("known", [True, False], ids=["waits", "stranger"])
def test_the_prior_halves_by_the_kind_of_wait_whether_or_not_the_wait_was_told(doing: Doing, known: bool) -> None:
    book, reason = ReturnBook(), {Doing.HUMAN: HUMAN, Doing.IDLE: IDLE}.get(doing, WAIT)
    if known:
        book.waits("w", reason, 100.0)
    at_once, later = (book.chance("w", doing, 100.0, 100.0 + s) for s in (0.0, HALVES_AFTER_S[doing]))
    assert at_once == returns.CHANCE[doing] and later == pytest.approx(at_once / 2)
    assert book.usual(reason) == Returns(at_once, None, None)


def test_a_few_waits_outweigh_the_prior_and_nothing_outweighs_who_runs_or_who_is_nobody() -> None:
    book = ReturnBook()
    for nth in range(4):
        book.waits(f"w{nth}", IDLE, 0.0)
        book.came(f"w{nth}", 60.0)
    book.waits("w", IDLE, 0.0)
    assert book.chance("w", Doing.IDLE, 0.0, 1.0) > 0.8
    assert book.chance("w", Doing.GENERATING, 0.0, 1.0) == 1.0 and book.chance("w", None, 0.0, 1.0) == 0.0


def test_where_the_asker_knows_of_another_wait_than_the_book_the_prior_of_his_holds() -> None:
    book = learned(*[1.0] * 3, never=20)
    book.waits("w", WAIT, 0.0)
    assert book.chance("w", Doing.TOOL, 0.0, 0.0) < 0.3
    assert book.chance("w", Doing.HUMAN, 0.0, 0.0) == returns.CHANCE[Doing.HUMAN], "it was turned a moment ago"
    book.came("w", 1.0)
    assert book.chance("w", Doing.TOOL, 1.0, 1.0) == returns.CHANCE[Doing.TOOL], "it is there"


# What was learned


def test_who_never_comes_back_lowers_the_chance() -> None:
    chances = [learned(1.0, 1.0, never=never).usual(WAIT).chance for never in (0, 2, 10, 40)]
    assert chances == sorted(chances, reverse=True) and chances[0] > 0.9 and chances[-1] < 0.1


def test_who_has_waited_longer_than_most_is_less_likely_to_come() -> None:
    book = learned(*[1.0] * 15, *[100.0] * 2, never=3)
    book.waits("w", WAIT, 0.0)
    chances = [book.chance("w", Doing.TOOL, 0.0, after) for after in (0.0, 0.5, 5.0, 1_000.0)]
    assert chances[0] == pytest.approx(chances[1], abs=0.001) and chances[0] > 0.8
    assert chances[0] > chances[2] > chances[3]
    assert book.usual(WAIT).usual_s < 2.0  # type: ignore[operator]
    longest = learned(*[1.0] * 20)
    longest.waits("w", WAIT, 0.0)
    at_last = longest.chance("w", Doing.TOOL, 0.0, 600.0)
    assert at_last == pytest.approx(returns.CHANCE[Doing.TOOL] / 2), "nobody waited so long: the prior holds again"


def test_times_lie_within_their_bucket_of_doubling_width() -> None:
    said = learned(*[1.0] * 9, 50.0).usual(WAIT)
    assert said.usual_s is not None and said.late_s is not None
    assert 0.64 <= said.usual_s <= 1.28 and 0.64 <= said.late_s <= 1.28, "nine in ten, and no more"
    assert 40.96 <= (learned(*[1.0] * 8, 50.0, 50.0).usual(WAIT).late_s or 0) <= 81.92


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=60), st.floats(0.0, 1e6))
def test_half_come_before_nine_in_ten_whatever_was_seen(seen: list[float], waited_s: float) -> None:
    book = learned(*seen)
    book.waits("w", WAIT, 0.0)
    said = book.usual(WAIT)
    assert 0.0 <= book.chance("w", Doing.TOOL, 0.0, waited_s) <= 1.0
    assert (said.usual_s is None) == (said.late_s is None)
    if said.usual_s is not None and said.late_s is not None:
        assert 0.0 <= said.usual_s <= said.late_s
        assert said.late_s <= max(0.01, 2 * max(seen)) or max(seen) > 0.01 * 2**24


def test_what_was_learned_long_ago_counts_less() -> None:
    book = ReturnBook()
    for _ in range(1_000):
        book.used("w", "search", 0.1)
        book.check_integrity()
    for _ in range(int(FADE_AT)):
        book.used("w", "search", 60.0)
    assert (book.usual(of_tool("search")).usual_s or 0) > 30.0, (
        "a thousand quick ones are outweighed by fewer new ones"
    )


# Tools


def uses(book: ReturnBook, *tools: tuple[str, float | None], comes_s: float | None) -> None:
    """Let a workflow wait, use tools of so many seconds (``None``: without an end), and call after so many."""
    book.waits("w", WAIT, 0.0)
    for tool, seconds in tools:
        book.uses("w", tool, 0.0)
        if seconds is not None:
            book.used("w", tool, seconds)
    if comes_s is None:
        book.gone("w")
    else:
        book.came("w", comes_s)
    book.check_integrity()


def test_a_tool_that_ended_counts_when_its_workflow_calls_and_as_never_when_it_does_not() -> None:
    book = ReturnBook()
    for _ in range(8):
        uses(book, ("search", 1.0), comes_s=9.0)
        uses(book, ("submit", 1.0), comes_s=None)
        uses(book, ("hang", None), comes_s=None)
    search = book.usual(of_tool("search"))
    assert search.chance > 0.99 and 0.64 <= (search.usual_s or 0) <= 1.28, "as long as the tool took, and no longer"
    for never in ("submit", "hang"):
        assert book.usual(of_tool(never)).chance < 0.15 and book.usual(of_tool(never)).usual_s is None
    book.waits("w", WAIT, 0.0)
    between = book.chance("w", Doing.TOOL, 0.0, 0.5)
    for tool, as_usual in (("search", True), ("submit", False), ("search", True)):
        book.uses("w", tool, 0.5)
        assert (book.chance("w", Doing.TOOL, 0.0, 0.5) > between) == as_usual, "what was started last says most"


def test_a_tool_that_another_branch_still_waits_for_counts_when_it_ends() -> None:
    book = ReturnBook()
    uses(book, ("quick", 1.0), ("slow", None), comes_s=1.5)
    assert book.usual(of_tool("slow")).usual_s is None
    book.used("w", "slow", 60.0)
    assert 40.96 <= (book.usual(of_tool("slow")).usual_s or 0) <= 81.92


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
            book.chance(name, Doing.TOOL, 0.0, nth + 0.5)
            (book.came if nth % 5 else lambda who, now: book.gone(who))(name, nth + 1.0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(tell, "abcd"))
    book.check_integrity()
    assert len(book._away) == 0 and 0.6 < book.usual(WAIT).chance < 0.9


# Who asks


@pytest.mark.parametrize("learned_before", [True, False])
def test_of_two_that_wait_for_tools_the_slot_goes_of_whose_tool_is_never_followed_by_a_call(
    learned_before: bool,
) -> None:
    bench = Bench(SLOTS)
    serving, slots = bench.serving, bench.scheduler.cache.table
    assert slots is not None
    slots.hold_s = 0.0

    def waits_for(tool: str, thread: str) -> str:
        bench.call(run := bench.run(thread), "hello")
        state = serving.book.run(run)
        assert state is not None
        serving.progress.tool_started(state, "tools", tool)
        bench.clock.now += 1.0
        return run

    for nth in range(6 if learned_before else 0):
        for tool in ("look", "submit"):
            run = waits_for(tool, f"{tool} {nth}")
            serving.progress.tool_ended(serving.book.run(run), "tools", tool, 1.0)  # type: ignore[arg-type]
            if tool == "look":
                bench.call(run, "hello", "found")
            serving.progress.run_ended(run, Outcome.DONE)
            serving.progress.thread_deleted(f"{tool} {nth}")

    waits_for("look", "ann")
    waits_for("submit", "bob")
    bench.call(bench.run("cid"), "hello")
    stayed = {slot.owner for slot in slots.slots} - {"cid"}
    assert stayed == ({"ann"} if learned_before else {"bob"}), "bob's was used later"
    serving.check_integrity()
