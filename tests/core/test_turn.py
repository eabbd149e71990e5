"""A call's turn, and waiting for it in threads and tasks."""

from __future__ import annotations

import asyncio
import sys
import threading
import time

import pytest

from orla_lg.core.steps import Waiter, WaitForTurn
from orla_lg.errors import OrlaClosed


def test_it_settles_once_and_tells_whoever_asks_before_or_after() -> None:
    told: list[str] = []
    early, late = Waiter(), Waiter()
    early.on_settled(lambda: told.append("early"))
    early.come()
    late.fail(OrlaClosed("shut"))
    late.on_settled(lambda: told.append("late"))
    assert told == ["early", "late"] and early.settled and late.settled
    early.fail(OrlaClosed("too late"))
    early.result()
    with pytest.raises(OrlaClosed, match="shut"):
        late.result()


def test_it_is_small() -> None:
    assert sys.getsizeof(Waiter()) < 100 and not hasattr(Waiter(), "__dict__")


@pytest.mark.parametrize("settle", [Waiter.come, lambda turn: turn.fail(OrlaClosed("shut"))], ids=["comes", "fails"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_waiting_ends_when_another_thread_settles_it(settle: object, asynchronous: bool) -> None:
    for delay_s in (0.0, 0.0, 0.01):
        turn = Waiter()
        other = threading.Timer(delay_s, lambda turn=turn: settle(turn))  # type: ignore[operator]
        other.start()
        wait = WaitForTurn(turn, 5.0)
        try:
            asyncio.run(wait.arun()) if asynchronous else wait.run()
        except OrlaClosed:
            assert settle is not Waiter.come
        else:
            assert settle is Waiter.come
        other.join()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_patience_ends(asynchronous: bool) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        wait = WaitForTurn(Waiter(), 0.05)
        asyncio.run(wait.arun()) if asynchronous else wait.run()
    assert 0.04 < time.monotonic() - began < 2


def test_a_turn_that_comes_to_a_waiter_who_is_gone_disturbs_nobody() -> None:
    turn = Waiter()

    async def leave() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(WaitForTurn(turn, None).arun(), 0.01)
        turn.come()  # in time: the loop runs
        await asyncio.sleep(0)

    asyncio.run(leave())
    turn.come()  # too late: the loop is closed


def test_many_threads_never_miss_their_turn() -> None:
    turns = [Waiter() for _ in range(2000)]
    waiters = [threading.Thread(target=lambda part=part: [WaitForTurn(t, 10.0).run() for t in part])
               for part in (turns[::2], turns[1::2])]  # fmt: skip
    for waiter in waiters:
        waiter.start()
    for turn in turns:
        turn.come()
    for waiter in waiters:
        waiter.join(20)
        assert not waiter.is_alive()
