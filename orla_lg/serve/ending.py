"""The end of a server: what is under way has time, and is cut off then.

A core that another one has replaced has no time to give: the next one counts nothing of what is at the engines by the
gateway of this one, so that goes at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from orla_lg.core.boundary.plain import counted
from orla_lg.serve.running import CUT_OFF_S, HttpServer

log = logging.getLogger("orla_lg")

DRAIN_POLL_S, CUT_OFF_POLL_S = 0.05, 0.005

EXIT_CUT = 1
EXIT_REPLACED = 3
"""Of a standby that decided, and was replaced: it begins again, as a standby."""


class Pages(Protocol):
    """The pages that are open, whose requests never end."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def close(self) -> None:
        """End them."""
        ...


class ServerEnd:
    """How far a server is with its end. Of its loop.

    Args:
        pages: That are open.
        bye: Says goodbye to replicas.
        hand_over: Lets the next core take over.
    """

    def __init__(self, pages: Pages, bye: Callable[[str], None], hand_over: Callable[[], Awaitable[None]]) -> None:
        self.has_begun = False
        self.is_replaced = False
        """Another core decides, and this one stood still or lost its store for too long."""
        self.cut = 0
        """Calls that were not waited for."""
        self._pages, self._bye, self._hand_over = pages, bye, hand_over
        self._asked = 0
        self._begins = asyncio.Event()
        self._http: HttpServer | None = None
        self._tasks: asyncio.TaskGroup | None = None

    def of(self, http: HttpServer, tasks: asyncio.TaskGroup) -> None:
        """Begin to watch a server, whose tasks run in a group."""
        self._http, self._tasks = http, tasks

    def ask(self) -> None:
        """Drain and end; asked a second time, end at once."""
        self._asked += 1
        if self._asked == 1:
            self._begin()
        elif self._tasks is not None and self._asked == 2:
            self._tasks.create_task(self._cut_off())

    def replaced(self) -> None:
        """End at once: another core decides now, and what waits here would wait for ever."""
        self.is_replaced = True
        self._begin()

    def _begin(self) -> None:
        self.has_begun = True
        self._begins.set()

    def status(self, *, is_standby: bool) -> int:
        """Return the exit status."""
        if self._asked > 1 or (self.is_replaced and not is_standby):
            return EXIT_CUT
        return EXIT_REPLACED if self.is_replaced and not self._asked else 0

    async def run(self, drain_s: float) -> None:
        """Wait for the end, let what is under way end, and let the next core take over; then no request is taken."""
        await self._begins.wait()
        assert self._http is not None
        drain_s = 0 if self.is_replaced else drain_s
        if under_way := self.under_way:
            calls = counted(under_way, "call")
            log.warning("ending: %s under way, with %g s to end; a second signal ends at once", calls, drain_s)
        self._bye("the server ends")
        until_s = time.monotonic() + drain_s
        while self.under_way and time.monotonic() < until_s:  # noqa: ASYNC110 - uvicorn's tasks
            await asyncio.sleep(DRAIN_POLL_S)
        left = self.under_way
        self._pages.close()
        if left:
            log.warning("%s still under way after %g s, and cut off", counted(left, "call"), drain_s)
            await self._cut_off()
        await self._hand_over()
        self._http.should_exit = True

    async def _cut_off(self) -> None:
        """End what is under way as if its clients had gone: engines hear of that, and uvicorn has nothing to log."""
        assert self._http is not None
        self.cut = self.under_way
        for connection in list(self._http.server_state.connections):
            connection.transport.abort()
        until_s = time.monotonic() + CUT_OFF_S
        while self.under_way and time.monotonic() < until_s:  # noqa: ASYNC110 - uvicorn's tasks
            await asyncio.sleep(CUT_OFF_POLL_S)
        self._http.force_exit = self._http.should_exit = True

    @property
    def under_way(self) -> int:
        """How many HTTP requests have no whole answer yet; those of open pages, which never have, do not count."""
        return 0 if self._http is None else max(0, len(self._http.server_state.tasks) - len(self._pages))

    def cut_request(self, scope: Any) -> None:
        """End the connection of a request at once, whatever it has not read."""
        for connection in list(self._http.server_state.connections) if self._http is not None else ():
            if getattr(connection, "scope", None) is scope:
                connection.transport.abort()
