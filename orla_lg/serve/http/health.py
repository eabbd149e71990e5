"""Whether the server lives, and whether it takes calls: for what starts it, and what shares calls among several."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from enum import StrEnum
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orla_lg.link.messages import CORES_HEADER
from orla_lg.serve.access.access import Denied
from orla_lg.serve.gateway.answers import denial
from orla_lg.serve.http.guard import asks_for_html

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Answer = Callable[[Scope, Denied], tuple[Sequence[tuple[bytes, bytes]], bytes]]

ALIVE, READY, ORLA = "/healthz", "/readyz", "/api/v1/health"
"""The third is where Orla's clients look before their first call, so it says what the second does."""

PATHS = frozenset({ALIVE, READY, ORLA})
"""They need no key."""

METRICS = "/metrics"
"""Answered by a server that takes no calls too: that it does not is one of them."""

SHOWS = ("/page/", "/v1/orla/events")
"""What shows a server may be looked at while it takes no calls."""


class CoreState(StrEnum):
    """What a server is at."""

    STANDBY = "standby"
    """Another core has the lease of the store; this one waits for its end."""
    READY = "ready"
    DRAINING = "draining"
    """It takes no new calls, and waits for those in flight."""


REFUSED = {
    CoreState.STANDBY: Denied(
        503, "this core is a standby: another one has the lease of the store", "server_error", 1.0
    ),
    CoreState.DRAINING: Denied(503, "the server is ending; the next one takes calls", "server_error", 1.0),
}


class LinkElsewhere(Denied):
    """A link is refused by a server that is not the core, and says where that is.

    Args:
        state: What it is at.
        urls: Of its pool's core, and of standbys.
    """

    def __init__(self, state: CoreState, urls: Sequence[str]) -> None:
        refused = REFUSED[state]
        super().__init__(refused.status, refused.message, refused.code, refused.retry_after_s)
        self._urls = [url for url in urls if url.isascii() and url.isprintable() and not set(url) & {",", " "}]

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that go with it."""
        found = super().headers
        return [*found, (CORES_HEADER.encode(), ", ".join(self._urls).encode())] if self._urls else found


class Stateful(Protocol):
    """What has a state."""

    @property
    def state(self) -> CoreState:
        """What it is at."""
        ...


def routes(server: Stateful) -> list[Route]:
    """Return the health routes, which need no key and so tell nothing of the engines."""

    async def alive(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_request: Request) -> Response:
        is_ready = server.state is CoreState.READY
        said = {"status": "ok" if is_ready else "not_ready", "state": server.state}
        return JSONResponse(said, 200 if is_ready else 503)

    return [Route(ALIVE, alive), Route(READY, ready), Route(ORLA, ready)]


class ReadinessGate:
    """Refuses calls, in the caller's wire, while the server does not take any.

    Args:
        app: Answers the others.
        server: Has the state.
        answer: Says a refusal as its caller reads errors.
    """

    def __init__(self, app: Any, server: Stateful, answer: Answer = denial) -> None:
        self._app = app
        self._server = server
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if self._server.state is CoreState.READY or scope["type"] != "http" or shows(scope):
            await self._app(scope, receive, send)
            return
        await refuse(scope, send, REFUSED[self._server.state], (b"connection", b"close"), answer=self._answer)


def shows(scope: Scope) -> bool:
    """Whether a request is answered while no calls are taken."""
    path = scope["path"]
    if path in PATHS or path == METRICS or path.startswith(SHOWS):
        return True
    return path == "/" and asks_for_html(scope["method"], scope["headers"])


async def refuse(
    scope: Scope, send: Send, denied: Denied, *more: tuple[bytes, bytes], answer: Answer = denial
) -> None:
    """Answer with a refusal."""
    headers, content = answer(scope, denied)
    headers = [*headers, (b"content-length", b"%d" % len(content)), *more]
    await send({"type": "http.response.start", "status": denied.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
