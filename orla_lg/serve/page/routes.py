"""The page's routes: its files, signing in and out, and the stream of what happens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from orla_lg.serve.access.access import Access, Caller, Denied
from orla_lg.serve.access.keys import KeyScope
from orla_lg.serve.access.sessions import AGE_S, SignIns, cookie_name
from orla_lg.serve.gateway.routes import Greeting
from orla_lg.serve.http.guard import CALLER, PAGE, PAGE_FILES, SESSION, asks_for_html, is_loopback
from orla_lg.serve.page.feed import EventFeed
from orla_lg.serve.page.files import GUARDED, INDEX, files
from orla_lg.serve.page.viewer import PageViewer, Send

EVENTS = "/v1/orla/events"
SIGN_IN, SIGN_OUT, BASIC = (PAGE_FILES + name for name in ("sign-in", "sign-out", "basic"))

CHALLENGE = 'Basic realm="orla-lg: a key is the password"'

MOST_DIGITS = 12
"""Of a workflow's number."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Any]


class LivePage:
    """The page of one server.

    Args:
        feed: Feeds what is open.
        access: Checks keys.
        sign_ins: Of browsers.
        is_secure: Whether browsers reach it by TLS, its own or a proxy's.
        cut: Ends the connection of a request at once.
    """

    def __init__(
        self,
        feed: EventFeed,
        access: Access,
        sign_ins: SignIns,
        *,
        is_secure: bool = False,
        cut: Callable[[Scope], None] = lambda scope: None,
    ) -> None:
        self.feed = feed
        self._access, self._sign_ins, self._is_secure, self._cut = access, sign_ins, is_secure, cut
        self._greeting = Greeting()

    def routes(self) -> list[Route]:
        """Return the routes; they stand before those of the gateway."""
        return [
            Route(PAGE, _Endpoint(self._index), methods=["GET"]),
            Route(SIGN_IN, self._sign_in, methods=["POST"]),
            Route(SIGN_OUT, self._sign_out, methods=["POST"]),
            Route(BASIC, self._by_basic, methods=["GET"]),
            Route(PAGE_FILES + "{name}", _Endpoint(self._file), methods=["GET"]),
            Route(EVENTS, _Endpoint(self._events), methods=["GET"]),
        ]

    # Files

    async def _index(self, scope: Scope, receive: Receive, send: Send) -> None:
        if asks_for_html(scope["method"], scope["headers"]):
            await _say(scope, send, 200, *files()[INDEX])
        else:
            await self._greeting(scope, receive, send)

    async def _file(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = files().get(scope["path_params"]["name"])
        await _say(scope, send, *((404, b"text/plain", b"not found\n") if found is None else (200, *found)))

    # Signing in

    async def _sign_in(self, request: Request) -> Response:
        try:
            said = json.loads(await request.body())
        except (ValueError, RecursionError):
            said = None
        key = said.get("key") if isinstance(said, dict) else None
        if not isinstance(key, str) or not key:
            return _answer(400, 'expected {"key": "orla-…"}')
        return self._begin(request, [(b"authorization", b"Bearer " + key.strip().encode("utf-8", "replace"))])

    async def _by_basic(self, request: Request) -> Response:
        """Sign in by Basic, asked for here alone: what a browser keeps of it, it sends to no other path."""
        headers = request.scope["headers"]
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return _answer(403, "open this address itself; another site's page led here")
        if not any(name == b"authorization" for name, _ in headers):
            return _answer(401, "the password is a key", {"www-authenticate": CHALLENGE})
        begun = self._begin(request, headers)
        if begun.status_code == 401:
            begun.headers["www-authenticate"] = CHALLENGE
        elif begun.status_code == 200:
            begun.status_code, begun.headers["location"] = 303, PAGE
        return begun

    def _begin(self, request: Request, headers: Iterable[tuple[bytes, bytes]]) -> Response:
        """Sign the browser in whose key is in *headers*."""
        if self._access.is_open:
            return _answer(409, "there is no key yet, so nothing to sign in with; this machine needs none")
        loopback = is_loopback(request.scope.get("client"))
        try:
            caller = self._access.admit(headers, scope=KeyScope.VIEW, loopback=loopback)
        except Denied as denied:
            return _answer(denied.status, denied.message)
        assert caller.key_id is not None, "there are keys"
        self._end(request)
        answer = _answer(200, "signed in")
        answer.set_cookie(
            self._cookie(request), self._sign_ins.begin(caller.key_id), max_age=int(AGE_S), path="/",
            secure=self._is_secure, httponly=True, samesite="strict",
        )  # fmt: skip
        return answer

    async def _sign_out(self, request: Request) -> Response:
        self._end(request)
        answer = _answer(200, "signed out")
        answer.delete_cookie(
            self._cookie(request), path="/", secure=self._is_secure, httponly=True, samesite="strict"
        )
        return answer

    def _end(self, request: Request) -> None:
        """Sign out what this browser is signed in as."""
        cookies = (value for name, value in request.scope["headers"] if name == b"cookie")
        if (known := self._sign_ins.find(cookies)) is not None:
            self._sign_ins.end(known.digest)

    def _cookie(self, request: Request) -> str:
        return cookie_name((request.scope.get("server") or (None, None))[1], secure=self._is_secure)

    # The stream

    async def _events(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no"), *GUARDED]
        if scope["method"] == "HEAD":
            await send({"type": "http.response.start", "status": 200, "headers": start})
            await send({"type": "http.response.body", "body": b""})
            return
        caller = scope[CALLER]
        assert isinstance(caller, Caller), "the stream needs a scope"
        viewer = PageViewer(caller, scope.get(SESSION), _workflow_of(scope), lambda: self._cut(scope))
        try:
            self.feed.enter(viewer)
        except Denied as denied:
            more = [(b"retry-after", b"5")]
            await _say(scope, send, denied.status, b"text/plain; charset=utf-8", denied.message.encode(), more)
            return
        try:
            async with asyncio.TaskGroup() as tasks:
                reading = tasks.create_task(_read(receive, viewer))
                await send({"type": "http.response.start", "status": 200, "headers": start})
                await viewer.write(send)
                reading.cancel()
        finally:
            self.feed.leave(viewer)
        await send({"type": "http.response.body", "body": b""})


async def _read(receive: Receive, viewer: PageViewer) -> None:
    """End a stream whose reader is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    viewer.end()


def _workflow_of(scope: Scope) -> int | None:
    name, _, number = scope["query_string"].partition(b"=")
    is_number = name == b"workflow" and number.isdigit() and len(number) <= MOST_DIGITS
    return int(number) if is_number else None


class _Endpoint:
    """An ASGI application for a ``Route``, which takes functions for its own kind of endpoint."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Any]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self._app(scope, receive, send)


async def _say(
    scope: Scope, send: Send, status: int, kind: bytes, body: bytes, more: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *GUARDED, *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def _answer(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """Return a short answer as JSON."""
    guarded = {name.decode(): value.decode() for name, value in GUARDED}
    content = json.dumps({"ok": status == 200, "message": message})
    return Response(content, status, {**guarded, **(headers or {})}, media_type="application/json")
