"""A gateway in a process of its own: the doors of HTTP, before a core that is reached by a link.

It keeps nothing that another one of its kind could not know as well, so any number of them may stand before one core,
come and go. Without a core calls wait for one, for as long as a linked application's do.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orla_lg.core.boundary.plain import counted
from orla_lg.link.serving import LinkedServing
from orla_lg.orla import Orla
from orla_lg.serve.access.access import Denied, credentials
from orla_lg.serve.access.keys import KeyScope
from orla_lg.serve.api.denials import denial
from orla_lg.serve.ending import ServerEnd
from orla_lg.serve.gateway.no_route import ON_ERROR
from orla_lg.serve.gateway.routes import Shortcut, routes_of
from orla_lg.serve.http.doors import Headers
from orla_lg.serve.http.guard import PAGE_FILES, AccessLayer
from orla_lg.serve.http.health import ALIVE, ORLA, PATHS, READY, CoreState, ReadinessGate, refuse
from orla_lg.serve.http.listening import Listening
from orla_lg.serve.running import SIGHUP, http_server, new_loop, signals
from orla_lg.serve.server import gateway_settings, guard
from orla_lg.serve.settings import ServeSettings
from orla_lg.serve.stateless.calls import LinkedGateway
from orla_lg.serve.stateless.keys import CoreKeys, ForwardedAccess

log = logging.getLogger("orla_lg")

CORES = ("/api/", "/v1/orla/", PAGE_FILES, "/metrics")
"""What a core alone answers."""

NOT_HERE_STATUS = 421
"""Misdirected: the same request is right at the core."""

UNLINKED = "unlinked"


class NoPages:
    """The open pages of a server that has none (``ending.Pages``)."""

    def __len__(self) -> int:
        return 0

    def close(self) -> None:
        """Do nothing."""


class GatewayServer:
    """A gateway, and what it is reached by.

    Args:
        settings: What it is started with.
        orla: The replica's side of its core (``Orla.remote``).
        core_patience_s: How long a core is waited for.
    """

    def __init__(self, settings: ServeSettings, orla: Orla, core_patience_s: float = 60.0) -> None:
        serving = orla.core.serving
        assert isinstance(serving, LinkedServing), "its core is elsewhere"
        self.settings, self.orla, self.serving = settings, orla, serving
        self.keys = CoreKeys(serving.cores.home.requests, core_patience_s)
        self.access = ForwardedAccess(self.keys)
        self.gateway = LinkedGateway(serving, self.access, gateway_settings(settings), KeyScope.USE)
        self.ending = ServerEnd(NoPages(), lambda reason: None, self._hand_over)
        routes = [Route(ALIVE, self._alive), Route(READY, self._ready), Route(ORLA, self._ready)]
        app = Starlette(routes=[*routes, *routes_of(self.gateway)], exception_handlers=ON_ERROR)
        layer = AccessLayer(Shortcut(app, self.gateway), self.access, guard(settings), denial)
        self.app = ReadinessGate(KeysFirst(layer, self.keys, self.core_at), self, denial)

    @property
    def state(self) -> CoreState:
        """What it is at; without a core it takes calls, which wait."""
        return CoreState.DRAINING if self.ending.has_begun else CoreState.READY

    def core_at(self) -> str:
        """Return where the core was met last, else where it was named."""
        places = self.serving.link.places
        return next((address.text for address in places.addresses()), places.text)

    async def _alive(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, _request: Request) -> Response:
        said = self.state.value if self.serving.link.up or self.ending.has_begun else UNLINKED
        is_ready = said == CoreState.READY
        return JSONResponse({"status": "ok" if is_ready else "not_ready", "state": said}, 200 if is_ready else 503)

    def open_link(
        self, headers: Headers, client: Sequence[Any] | None, server: Sequence[Any] | None
    ) -> asyncio.Protocol:
        """Refuse: links are opened to the core (``doors.Links``)."""
        raise elsewhere(self.core_at())

    # Its life

    async def run(self, opened: Listening, ready: Callable[[str], None]) -> int:
        """Serve until a signal ends it; returns the exit status.

        Args:
            opened: Where it listens.
            ready: Called with the URL when requests are answered.
        """
        table, loop = self.settings.table, asyncio.get_running_loop()
        http = http_server(self.app, self, table)
        self.serving.also_ends = partial(self._ends, loop)
        with signals(loop, {signal.SIGTERM: self.end, signal.SIGINT: self.end, SIGHUP: self._nothing_to_load}):
            async with asyncio.TaskGroup() as tasks:
                self.ending.of(http, tasks)
                serving = tasks.create_task(http.serve(sockets=[opened.socket]))
                while not http.started and not serving.done():  # noqa: ASYNC110 - uvicorn has no event for it
                    await asyncio.sleep(0.005)
                ready(self.settings.listen.url(opened.port, tls=self.settings.has_tls))
                ending = tasks.create_task(self.ending.run(table.drain_s))
                await serving
                ending.cancel()
        self.serving.also_ends = None
        await self.gateway.aclose()
        opened.close()
        cut = f", {counted(self.ending.cut, 'call')} cut off" if self.ending.cut else ""
        log.warning("ended: %s served%s", counted(self.serving.records.total, "call"), cut)
        return self.ending.status(is_standby=False)

    def end(self) -> None:
        """Drain and end; asked a second time, end at once."""
        self.ending.ask()

    def _nothing_to_load(self) -> None:
        log.warning("a gateway has no configuration of its own to load again; its core has, and says what changes")

    async def _hand_over(self) -> None:
        """Do nothing: others of its kind take calls already."""

    def _ends(self, loop: asyncio.AbstractEventLoop, backend: str) -> None:
        """End what runs on a backend by grants that are over, from the link's thread."""
        if not loop.is_closed():
            asyncio.run_coroutine_threadsafe(self.gateway.end_all(backend), loop)


def elsewhere(core: str) -> Denied:
    """Return the refusal of what only a core answers."""
    return Denied(NOT_HERE_STATUS, f"this is a gateway; ask its core for that, at {core}", "misdirected_request")


class KeysFirst:
    """Has the keys that a request is sent with known, before the access layer looks at them.

    Args:
        app: The access layer.
        keys: Of the core.
        core_at: Returns where the core is.
    """

    def __init__(self, app: Any, keys: CoreKeys, core_at: Callable[[], str]) -> None:
        self._app, self._keys, self._core_at = app, keys, core_at

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] == "http" and scope["path"] not in PATHS:
            try:
                if scope["path"].startswith(CORES):
                    raise elsewhere(self._core_at())
                await self._keys.look(credentials(scope["headers"]))
            except Denied as denied:
                await refuse(scope, send, denied, (b"connection", b"close"), answer=denial)
                return
        await self._app(scope, receive, send)


def run(settings: ServeSettings, orla: Orla, opened: Listening, ready: Callable[[str], None]) -> int:
    """Serve on one loop until a signal ends it; returns the exit status."""

    async def serving() -> int:
        return await GatewayServer(settings, orla).run(opened, ready)

    with asyncio.Runner(loop_factory=new_loop()) as runner:
        return runner.run(serving())
