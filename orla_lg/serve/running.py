"""The process around a server: its event loop, its signals, and uvicorn as far as it is ours to run."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping

import uvicorn

SIGHUP: int = getattr(signal, "SIGHUP", 0)


class HttpServer(uvicorn.Server):
    """uvicorn's server, whose signals are ours to take."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield


@contextlib.contextmanager
def signals(loop: asyncio.AbstractEventLoop, taken: Mapping[int, Callable[[], None]]) -> Iterator[None]:
    """Have signals call methods of ours, where this thread and this platform let them."""
    done: list[int] = []
    for number, method in taken.items():
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # no main thread, no such signals
            loop.add_signal_handler(number, method)
            done.append(number)
    try:
        yield
    finally:
        for number in done:
            loop.remove_signal_handler(number)


def new_loop() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return what makes the loop of a server."""
    if sys.platform == "win32":
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop
