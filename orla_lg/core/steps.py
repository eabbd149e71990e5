"""What takes time in a call's life, as values: ``Serving.steps`` yields them, ``drive`` carries them out."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from orla_lg.errors import OrlaClosed

if TYPE_CHECKING:
    from orla_lg.core.background import Background
    from orla_lg.core.inflight import InFlightCall
    from orla_lg.core.turn import Waiter


class Sender(Protocol):
    """The edge that carries the bytes: one request, ready to be sent to whichever backend is chosen."""

    max_attempts: int

    def send(self, inflight: InFlightCall) -> Any:
        """Send and return the response.

        Raises:
            AttemptFailed: It failed before its first token and may be tried again.
        """
        ...

    async def asend(self, inflight: InFlightCall) -> Any:
        """``send`` for a running loop."""
        ...


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
            if not settled.done():  # told twice, or its waiter was cancelled
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


@dataclass(frozen=True, slots=True)
class Send:
    """Send the request."""

    sender: Sender
    inflight: InFlightCall

    def run(self) -> Any:  # noqa: D102
        return self.sender.send(self.inflight)

    async def arun(self) -> Any:  # noqa: D102
        return await self.sender.asend(self.inflight)


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
