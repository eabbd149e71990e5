"""What is sent to an engine at once follows what it says of its own queue."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from orla_lg.core.engine.capabilities import EngineStats
from orla_lg.core.engine.window import AHEAD, Window
from orla_lg.core.operation.statistics import WaitsFor
from tests.core.test_scheduler import a_scheduler, enter, leave


def said(running: int | None, waiting: int | None) -> EngineStats:
    return EngineStats(running=running, waiting=waiting)


def test_an_engine_whose_queue_was_never_seen_gets_all() -> None:
    window = Window()
    window.note(said(40, 0), 40)
    window.note(said(None, None), 40)
    window.note(said(40, AHEAD), 42)
    assert window.bound == inf


def test_a_queue_that_stays_bounds_what_is_sent_and_one_that_ends_lets_more_go() -> None:
    window = Window()
    window.note(said(8, 20), 28)
    assert window.bound == inf, "calls that just arrived"
    window.note(said(8, 19), 28)
    assert window.bound == 8 + AHEAD
    window.note(said(8, 1), 10)
    assert window.bound == 8 + AHEAD, "a little ahead is as it should be"
    window.note(said(9, 0), 5)
    assert window.bound == 8 + AHEAD, "nothing learned from an engine that was sent less"
    window.note(said(10, 0), 10)
    assert window.bound > 10 + AHEAD


@given(st.integers(1, 64), st.lists(st.integers(0, 300), min_size=200, max_size=300))
def test_it_settles_where_the_batch_is_full_and_little_waits(batch: int, wanted: list[int]) -> None:
    window = Window()
    for arriving in (1000, 1000, 1000, *wanted, *([1000] * 40)):
        in_flight = int(min(arriving, window.bound))
        window.note(said(min(in_flight, batch), max(0, in_flight - batch)), in_flight)
    assert batch <= window.bound <= 1.25 * (batch + AHEAD) + 1


def test_the_desk_holds_what_the_engine_would_only_queue_and_goes_on_when_it_says_so() -> None:
    scheduler, _ = a_scheduler()
    for _ in range(2):
        scheduler._told(said(2, 9))
    inside = [enter(scheduler, f"w{n}") for n in range(6)]
    assert [each.granted for each in inside] == [True] * 4 + [False] * 2
    scheduler._told(said(4, 0))
    assert all(each.granted for each in inside), "it runs them all: more can go"
    for each in inside:
        leave(scheduler, each)
    scheduler.check_integrity()


def test_a_bound_holds_nothing_back_from_an_engine_with_nothing_to_do() -> None:
    scheduler, _ = a_scheduler()
    for _ in range(2):
        scheduler._told(said(0, 9))
    assert enter(scheduler).granted


def test_who_is_held_by_the_window_waits_for_a_place() -> None:
    scheduler, _ = a_scheduler()
    for _ in range(2):
        scheduler._told(said(1, 9))
    inside = [enter(scheduler, f"w{n}") for n in range(4)]
    assert not scheduler.queue.has_room() and not inside[-1].granted
    assert [each.waits_for for each in scheduler.statistics().waiting] == [WaitsFor.PLACE]
