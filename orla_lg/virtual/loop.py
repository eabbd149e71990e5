"""An asyncio event loop whose time is virtual.

Nothing in it waits: where a loop would sleep until its next timer, this one's clock jumps there. Where a loop
would sleep for ever (every task is blocked and no timer is set) this one raises ``Deadlock``. So it does no
network I/O, and functions meant for threads run at once, in this one.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine, Mapping
from math import inf
from typing import Any, ParamSpec, TypeVar

from orla_lg.virtual.clock import VirtualClock

T = TypeVar("T")
P = ParamSpec("P")


class Deadlock(RuntimeError):
    """Every task waits, and nothing is left that could wake one; the message says who waits where."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on a ``VirtualClock``, which others may use too.

    Args:
        clock: The clock; ``None`` makes one.
    """

    def __init__(self, clock: VirtualClock | None = None) -> None:
        self.clock = clock if clock is not None else VirtualClock()
        super().__init__(_Jumps(self))

    def time(self) -> float:
        """Return virtual seconds."""
        return self.clock()

    def jump(self, timeout_s: float | None) -> None:
        """Let time pass up to *timeout_s* seconds or the clock's next timer, whichever is first."""
        limit_s = inf if timeout_s is None else self.clock() + timeout_s
        if self.clock.next_s < inf and self.clock.next_s <= limit_s:
            self.clock.fire_next()
        elif timeout_s is None:
            raise Deadlock(self._who_waits())
        else:
            self.clock.run_until(limit_s)

    def _who_waits(self) -> str:
        lines = [f"at {self.clock():.3f} s every task waits and nothing will happen any more:"]
        for task in sorted(asyncio.all_tasks(self), key=lambda task: task.get_name()):
            stack = task.get_stack(limit=1)
            place = f"{stack[-1].f_code.co_filename}:{stack[-1].f_lineno}" if stack else "its end"
            lines.append(f"  {task.get_name()} at {place}")
        return "\n".join(lines)

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Run a function meant for a thread at once: real threads know nothing of virtual time."""
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - it is the future's
            done.set_exception(error)
        return done


class _Jumps(selectors.BaseSelector):
    """Stands where a loop waits for sockets; the loop's own wake-up pipe is all that is ever registered."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = self._keys[fileobj] = selectors.SelectorKey(fileobj, 0, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self._loop.jump(timeout)
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


def run(main: Coroutine[Any, Any, T], clock: VirtualClock | None = None) -> T:
    """Run *main* in virtual time and return its result, as ``asyncio.run`` does.

    Raises:
        Deadlock: Every task waits for what will not happen.
    """
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(clock)) as runner:
        return runner.run(main)


def in_virtual_time(test: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Make an async test one that takes no time: ``asyncio.sleep(3600)`` returns at once, an hour later."""

    @functools.wraps(test)
    def runs(*args: P.args, **kwargs: P.kwargs) -> T:
        return run(test(*args, **kwargs))

    return runs
