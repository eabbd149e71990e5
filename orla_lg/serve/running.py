"""The process around a server: its event loop, its signals, and uvicorn as far as it is ours to run."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import uvicorn

from orla_lg import __version__
from orla_lg.config_tables import ServeTable
from orla_lg.serve.http.doors import SERVER_HEADER, Links, protocol_for

SIGHUP: int = getattr(signal, "SIGHUP", 0)

IDLE_CONNECTION_S = 75
"""A connection without a request for so long is closed."""

CUT_OFF_S = 1
"""What is still under way after draining has so long to end once its connection is cut off."""


class HttpServer(uvicorn.Server):
    """uvicorn's server, whose signals are ours to take."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield


def http_server(app: Any, links: Links, table: ServeTable) -> HttpServer:
    """Return uvicorn around an ASGI application, as every server of ours has it.

    Args:
        app: What answers requests.
        links: What opens links.
        table: Where the certificate is.
    """
    config = uvicorn.Config(
        app, http=protocol_for(links), ws="none", lifespan="off",
        loop="none", log_config=None, access_log=False, server_header=False, proxy_headers=False,
        headers=[(SERVER_HEADER, __version__)], timeout_keep_alive=IDLE_CONNECTION_S,
        timeout_graceful_shutdown=CUT_OFF_S, ssl_certfile=table.tls_cert, ssl_keyfile=table.tls_key,
    )  # fmt: skip
    return HttpServer(config)


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
