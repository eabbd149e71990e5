"""A call's turn: what it waits for in a queue. Small, because there may be very many of them.

A ``concurrent.futures.Future`` brings a condition and a list, 1.6 KB, and a hundred thousand of them hold up the
garbage collector for half a second. A turn is two fields; whoever really waits brings the means (``effects.Wait``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock


class Waiter:
    """Comes once, or ends with an error; one waiter at most.

    Neither side needs a lock: the one that settles sets the outcome before it looks for a waiter, the waiter leaves
    its callback before it looks for the outcome. So one of them sees the other, and if both do, the callback is
    called twice, which it must bear.
    """

    __slots__ = ("_outcome", "_wake")

    def __init__(self) -> None:
        self._outcome: BaseException | bool = False
        self._wake: Callable[[], None] | None = None

    @property
    def settled(self) -> bool:
        """Whether it came, or never will."""
        return self._outcome is not False

    def come(self) -> None:
        """Let the waiter go. Not under a lock: the waiter's callback runs in here."""
        self._settle(True)

    def fail(self, error: BaseException) -> None:
        """End the wait with *error*, unless it has ended before."""
        self._settle(error)

    def _settle(self, outcome: BaseException | bool) -> None:
        if self._outcome is False:
            self._outcome = outcome
        if self._wake is not None:
            self._wake()

    def on_settled(self, wake: Callable[[], None]) -> None:
        """Have *wake* called, in any thread, once it is settled; at once if it is."""
        self._wake = wake
        if self.settled:
            wake()

    def result(self) -> None:
        """Raise the error that it ended with, if it did."""
        if isinstance(self._outcome, BaseException):
            raise self._outcome


class Waiters:
    """Those that wait for the same; a lock of its own, which nobody runs under."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._turns: dict[Waiter, None] = {}

    def __bool__(self) -> bool:
        return bool(self._turns)

    def begin(self) -> Waiter:
        """Return a turn that comes with the others."""
        turn = Waiter()
        with self._lock:
            self._turns[turn] = None
        return turn

    def leave(self, turn: Waiter) -> None:
        """Take one out, if it is in."""
        with self._lock:
            self._turns.pop(turn, None)

    def end(self, error: BaseException | None = None) -> None:
        """Let them all come, or end with *error*; not under another lock."""
        with self._lock:
            turns, self._turns = self._turns, {}
        for turn in turns:
            if error is None:
                turn.come()
            else:
                turn.fail(error)


class Pauses:
    """The waits of calls outside their queue: a pause before another attempt, a trial, a swap; ``end`` ends all."""

    def __init__(self) -> None:
        self._turns = Waiters()
        self._ended: BaseException | None = None

    @contextmanager
    def one(self) -> Iterator[Waiter]:
        """Give a turn to wait with, which fails when all pauses end."""
        turn = self._turns.begin()
        if self._ended is not None:  # looked at after the turn is in: one of both sides sees the other
            turn.fail(self._ended)
        try:
            yield turn
        finally:
            self._turns.leave(turn)

    def end(self, error: BaseException) -> None:
        """Let every wait end with *error*, those to come at once."""
        self._ended = error
        self._turns.end(error)
