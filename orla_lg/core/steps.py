"""What takes time in a call's life, as values: ``lifecycle.serve`` yields them, ``drive`` carries them out.

And what a call waits for: a ``Waiter``, small because there may be very many of them. A ``concurrent.futures.Future``
brings a condition and a list, 1.6 KB, and a hundred thousand of them hold up the garbage collector for half a second.
A waiter is two fields; the thread or task that really waits brings the means (``WaitForTurn``).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

from orla_lg.core.background import Background
from orla_lg.errors import OrlaClosed


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


class Step(Protocol):
    """Something that takes time."""

    def run(self) -> Any:
        """Do it in this thread."""
        ...

    async def arun(self) -> Any:
        """Do it in this task."""
        ...


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait for a future, at most ``timeout_s`` seconds; raises ``TimeoutError``, or what ``unless`` ended with."""

    future: Future[Any]
    timeout_s: float | None
    unless: Waiter | None = None
    """Ends the wait early; one of its own (``Pauses.one``)."""

    def run(self) -> None:  # noqa: D102
        if self.unless is None:
            self.future.result(self.timeout_s)
        else:
            self._either(self.unless).run()

    async def arun(self) -> None:  # noqa: D102
        if self.unless is not None:
            await self._either(self.unless).arun()
            return
        async with asyncio.timeout(self.timeout_s):
            await asyncio.wrap_future(self.future)

    def _either(self, turn: Waiter) -> WaitForTurn:
        self.future.add_done_callback(lambda _: turn.come())
        return WaitForTurn(turn, self.timeout_s)


@dataclass(frozen=True, slots=True)
class WaitForTurn:
    """Wait for a turn, at most ``timeout_s`` seconds; raises ``TimeoutError``, or what the turn ended with."""

    turn: Waiter
    timeout_s: float | None

    def run(self) -> None:  # noqa: D102
        settled = threading.Event()
        self.turn.on_settled(settled.set)
        if not settled.wait(self.timeout_s):
            raise TimeoutError
        self.turn.result()

    async def arun(self) -> None:  # noqa: D102
        loop = asyncio.get_running_loop()
        settled = loop.create_future()

        def settle() -> None:
            if not settled.done():  # woken twice, or its waiter was cancelled
                settled.set_result(None)

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed, and its waiter with it
                loop.call_soon_threadsafe(settle)

        self.turn.on_settled(wake)
        async with asyncio.timeout(self.timeout_s):
            await settled
        self.turn.result()


@dataclass(frozen=True, slots=True)
class Sleep:
    """Pause; raises what ``unless`` ended with."""

    seconds: float
    unless: Waiter | None = None
    """Ends the pause early; one of its own (``Pauses.one``)."""

    def run(self) -> None:  # noqa: D102
        if self.unless is None:
            time.sleep(self.seconds)
        else:
            with contextlib.suppress(TimeoutError):
                WaitForTurn(self.unless, self.seconds).run()

    async def arun(self) -> None:  # noqa: D102
        if self.unless is None:
            await asyncio.sleep(self.seconds)
        else:
            with contextlib.suppress(TimeoutError):
                await WaitForTurn(self.unless, self.seconds).arun()


@dataclass(frozen=True, slots=True)
class Await:
    """Run a coroutine: on the background loop for a thread, right here for a task."""

    start: Callable[[], Coroutine[Any, Any, Any]]
    background: Background

    def run(self) -> Any:  # noqa: D102
        try:
            return self.background.submit(self.start()).result()
        except CancelledError as cut_off:
            raise OrlaClosed("this Orla was closed while a call waited for it") from cut_off

    async def arun(self) -> Any:  # noqa: D102
        return await self.start()


Steps = Generator[Step, Any, Any]


def drive(steps: Steps) -> Any:
    """Carry out *steps* in this thread and return their result."""
    try:
        effect = next(steps)
        while True:
            try:
                done = effect.run()
            except BaseException as error:  # noqa: BLE001 - handed to the steps, which raise it again
                effect = steps.throw(error)
            else:
                effect = steps.send(done)
    except StopIteration as end:
        return end.value


async def adrive(steps: Steps) -> Any:
    """Carry out *steps* in this task and return their result."""
    try:
        effect = next(steps)
        while True:
            try:
                done = await effect.arun()
            except BaseException as error:  # noqa: BLE001 - handed to the steps, which raise it again
                effect = steps.throw(error)
            else:
                effect = steps.send(done)
    except StopIteration as end:
        return end.value


class Pauses:
    """The waits of calls outside their queue: a pause before another attempt, a trial, a swap; ``end`` ends all."""

    def __init__(self) -> None:
        self._turns = Waiters()
        self._ended: BaseException | None = None

    @contextlib.contextmanager
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
