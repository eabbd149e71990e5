"""What takes time where threads have owners, as steps (``core.steps``): what waits for a store or a saver."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

AWAITED_S = 30.0
"""A loop that does not come to a statement of another thread in so long is stuck."""


@dataclass(frozen=True, slots=True)
class SaverCall:
    """Call a method of a saver: one that waits for a thread, one that is awaited for a task."""

    method: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def run(self) -> Any:  # noqa: D102
        return self.method(*self.args, **self.kwargs)

    async def arun(self) -> Any:  # noqa: D102
        return await self.method(*self.args, **self.kwargs)


@dataclass(frozen=True, slots=True)
class BlockingCall:
    """Call what blocks: right here for a thread, in another one for a task."""

    call: Callable[[], Any]
    executor: Executor | None = None
    """``None``: the loop's own."""

    def run(self) -> Any:  # noqa: D102
        return self.call()

    async def arun(self) -> Any:  # noqa: D102
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self.executor, context.run, self.call)


@dataclass(frozen=True, slots=True)
class LoopCall:
    """Run a coroutine: on its loop for another thread, right here for a task."""

    start: Callable[[], Coroutine[Any, Any, Any]]
    loop: asyncio.AbstractEventLoop

    def run(self) -> Any:  # noqa: D102
        with contextlib.suppress(RuntimeError):
            if asyncio.get_running_loop() is self.loop:
                raise asyncio.InvalidStateError(
                    "synchronous calls of an asynchronous saver are only allowed from another thread than its loop's"
                )
        return asyncio.run_coroutine_threadsafe(self.start(), self.loop).result(AWAITED_S)

    async def arun(self) -> Any:  # noqa: D102
        return await self.start()
