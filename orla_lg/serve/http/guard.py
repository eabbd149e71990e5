"""What stands before the server's routes: names, keys, kinds and sizes of requests. The outermost ASGI layer.

In this order: the ``Host`` is a name of this server (421; a page of another name that was pointed at this address has
that one's), what writes is JSON and not another site's (415, 403), a key allows it (401, 403), and its body comes
within a size and a time (413, 408). A body is read only after that, and whole, so that what is behind sees no other.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from orla_lg.errors import shown
from orla_lg.link.messages import PATH as LINK_PATH
from orla_lg.serve.access.access import Access, Caller, Denied
from orla_lg.serve.access.keys import KeyScope
from orla_lg.serve.access.sessions import SignIns
from orla_lg.serve.gateway.silence import SilenceWatch

RequestScope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[RequestScope, Receive, Send], Awaitable[None]]
Answer = Callable[[RequestScope, Denied], tuple[Sequence[tuple[bytes, bytes]], bytes]]
"""Returns the headers and the body of a refusal, as its caller reads errors."""

CALLER = "orla.caller"
"""Where the ``Caller`` is, in the scope of a request."""

HEALTH = frozenset({"/healthz", "/readyz", "/api/v1/health"})
"""They need no key, and no name: what looks whether a server lives asks an address."""

CALLS = frozenset({
    "/api/v1/execute", "/api/v1/access/check", "/api/v1/workflows", "/api/v1/workflow/complete",
})  # fmt: skip
"""What applications ask of Orla's APIs for their own calls."""

PAGE, PAGE_FILES = "/", "/page/"
"""The live page, for what asks for HTML, and what it is made of: they show nothing of the server, and need no key."""

SEEN_BY_SIGN_IN = "/v1/orla/"
"""Below it a browser's sign-in counts as its key."""

SESSION = "orla.session"
"""Where the digest of the browser's sign-in is, in the scope of a request that came by one."""

LEAST_BODY_BYTES = 4 * 1024
"""A body without a key is no longer."""

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

READS = frozenset({"GET", "HEAD", "OPTIONS"})
WITHOUT_BODY = READS | {"DELETE"}
"""Of the rest a page of another site can send some without being asked whether it may; but no JSON."""

FORWARDED = frozenset({b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip", b"via"})
"""A request with one of these came through a proxy: its sender is elsewhere, whichever address it comes from."""

LEAST_BYTES_PER_S = 64 * 1024
"""A large body may take longer: a second for each so many bytes."""

MIB = 1 << 20


def scope_of(method: str, path: str) -> KeyScope | None:
    """Return what a request needs a key for; ``None``: nothing."""
    if path in HEALTH or path.startswith(PAGE_FILES):
        return None
    if path == LINK_PATH:
        return KeyScope.LINK
    if path in CALLS:
        return KeyScope.USE
    if path.startswith(("/api/", "/v1/orla/")):
        return KeyScope.VIEW if method in READS else KeyScope.CONTROL
    return KeyScope.VIEW if path == "/metrics" else KeyScope.USE


@dataclass(frozen=True, slots=True)
class HttpGuard:
    """What requests must be like."""

    names: frozenset[str] = LOOPBACK_NAMES
    """Of this server, in lower case, without a port. The address that a request came to is one without being here."""
    behind_proxy: bool = False
    """All requests come through a proxy, so none is from this machine."""
    max_body_bytes: int = 64 * MIB
    body_timeout_s: float = 60.0
    """A body has so long, and a second more for each ``LEAST_BYTES_PER_S`` of it that came."""
    scope_of: Callable[[str, str], KeyScope | None] = field(default=scope_of)
    """What a key is needed for, by method and path."""

    def is_name(self, host: str, address: str | None) -> bool:
        """Whether *host*, of a ``Host`` or an ``Origin``, is this server.

        Args:
            host: A name or an address, with or without a port.
            address: The one that the connection came to.
        """
        name = _without_port(host.lower())
        return name is not None and (name in self.names or (address is not None and _is_address(name, address)))


@lru_cache(1024)
def _without_port(host: str) -> str | None:
    """Return the name of ``name:port``, and the address of ``[address]:port``; ``None`` where it is neither."""
    name, bracket, port = host[1:].partition("]") if host.startswith("[") else (host, "", "")
    if not bracket:
        name, _, port = host.partition(":")
        port = f":{port}" if port else ""
    if port and not (port[0] == ":" and port[1:].isascii() and port[1:].isdecimal()):
        return None
    return name.removesuffix(".") or None


@lru_cache(1024)
def _is_address(name: str, address: str) -> bool:
    try:
        return ipaddress.ip_address(name) == ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False


class AccessLayer:
    """Lets requests through to an app, with their ``Caller`` in the scope and their body whole.

    Args:
        app: What answers them.
        access: Whether they may.
        guard: What they must be like.
        answer: Says a refusal as its caller reads errors.
        sign_ins: Of browsers.
    """

    def __init__(
        self,
        app: App,
        access: Access,
        guard: HttpGuard,
        answer: Answer | None = None,
        sign_ins: SignIns | None = None,
    ) -> None:
        self._app, self._access, self._guard = app, access, guard
        self._sign_ins = SignIns() if sign_ins is None else sign_ins
        self._answer = answer or as_json
        self._bodies = SilenceWatch(guard.body_timeout_s)

    async def __call__(self, scope: RequestScope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            try:
                scope[CALLER] = self._admit(scope)
                received = await self._with_body(scope, receive)
            except Denied as denied:
                await self._refuse(scope, denied, send)
                return
            if received is not None:
                await self._app(scope, received, send)
        else:  # there are no WebSockets here
            await send({"type": "websocket.close", "code": 1008})

    def admit_link(
        self, headers: Sequence[tuple[bytes, bytes]], client: Sequence[Any] | None, server: Sequence[Any] | None
    ) -> Caller:
        """Return what the sender of a request for a link may do; a link is no request of the app's.

        Raises:
            Denied: Nothing.
        """
        caller = self._admit(
            {"method": "GET", "path": LINK_PATH, "headers": headers, "client": client, "server": server}
        )
        assert caller is not None, "a link needs a scope"
        return caller

    def _admit(self, scope: RequestScope) -> Caller | None:
        guard, method, path = self._guard, scope["method"], scope["path"]
        if path in HEALTH:
            return None
        is_page = path == PAGE and asks_for_html(method, scope["headers"])
        needed = None if is_page else guard.scope_of(method, path)
        host = origin = site = kind = b""
        forwarded = guard.behind_proxy
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name == b"content-type":
                kind = value
            elif name == b"origin":
                origin = value
            elif name == b"sec-fetch-site":
                site = value
            elif name in FORWARDED:
                forwarded = True
        address = (scope.get("server") or (None,))[0]
        if not guard.is_name(host.decode("latin-1"), address):
            raise Denied(
                421, f"this server is not {shown(host.decode('latin-1'))}; [serve] names = [...] gives it more names",
                "misdirected_request",
            )  # fmt: skip
        if method not in READS:
            self._check_writing(method, needed, kind, origin, site, address)
        if needed is None:
            return None
        signed_in = self._signed_in(scope, host, origin, site) if path.startswith(SEEN_BY_SIGN_IN) else None
        loopback = not forwarded and is_loopback(scope.get("client"))
        return self._access.admit(scope["headers"], scope=needed, loopback=loopback, signed_in=signed_in)

    def _signed_in(self, scope: RequestScope, host: bytes, origin: bytes, site: bytes) -> str | None:
        """Return the id of the key that a request's browser signed in with; ``None``: it did not.

        The cookie comes by itself with whatever a browser sends here, so where it came from counts too: another port
        of this host is the same site for ``SameSite``, and here it is another one.
        """
        found = self._sign_ins.find(value for name, value in scope["headers"] if name == b"cookie")
        if found is None or scope["path"] == LINK_PATH:
            return None
        is_own = site.lower() in (b"", b"same-origin", b"none")
        if scope["method"] not in READS:
            named = _host_of(origin).lower()
            address = (scope.get("server") or (None,))[0]
            is_own &= named == host.decode("latin-1").lower() or (
                self._guard.behind_proxy and self._guard.is_name(named, address)
            )
        if not is_own:
            raise Denied(403, "a browser's sign-in counts for this server's own page alone", "permission_denied")
        scope[SESSION] = found.digest
        return found.key_id

    def _check_writing(
        self, method: str, needed: KeyScope | None, kind: bytes, origin: bytes, site: bytes, address: str | None
    ) -> None:
        """Refuse what a page of another site can have a browser send."""
        if method not in WITHOUT_BODY and kind.partition(b";")[0].strip().lower() != b"application/json":
            raise Denied(
                415, f"the body must be `content-type: application/json`, not {shown(kind.decode('latin-1'))}",
                "unsupported_media_type",
            )  # fmt: skip
        if needed is not KeyScope.CONTROL and needed is not None:
            return
        own = not origin or self._guard.is_name(_host_of(origin), address)
        if not own or site.lower() in (b"cross-site", b"same-site"):
            raise Denied(403, "another site's page asks to change this server", "permission_denied")

    async def _with_body(self, scope: RequestScope, receive: Receive) -> Receive | None:
        """Return what gives the app the whole body at once; ``None`` where its sender is gone before the end."""
        length = _length(scope["headers"])
        if length == 0 or scope["path"] in HEALTH:
            return receive
        most = self._guard.max_body_bytes
        if scope[CALLER] is None:
            most = min(most, LEAST_BODY_BYTES)
        if length is not None and length > most:
            raise _too_large(most)
        whole = await self._read(receive, most)
        if whole is None:
            return None
        given = False

        async def once() -> MutableMapping[str, Any]:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": whole, "more_body": False}

        return once

    async def _read(self, receive: Receive, most: int) -> bytes | None:
        guard, parts, size = self._guard, list[bytes](), 0
        try:
            with self._bodies.bound() as bound:
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    if size > most:
                        raise _too_large(most)
                    parts.append(part)
                    if not message.get("more_body", False):
                        return parts[0] if len(parts) == 1 else b"".join(parts)
                    bound.more_s = size / LEAST_BYTES_PER_S
        except TimeoutError:
            raise Denied(
                408, f"the body did not come in time: {size} bytes in {guard.body_timeout_s:g} s", "request_timeout"
            ) from None

    async def _refuse(self, scope: RequestScope, denied: Denied, send: Send) -> None:
        """Answer with a refusal, and end a connection on which the rest of a body would come."""
        headers, body = self._answer(scope, denied)
        names = {name.lower() for name, _ in headers}
        headers = [*headers, *(each for each in denied.headers if each[0] not in names)]
        headers += [(b"content-length", b"%d" % len(body))] if b"content-length" not in names else []
        if _length(scope["headers"]) != 0:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": denied.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _too_large(most: int) -> Denied:
    return Denied(413, f"a body has at most {most} bytes", "request_too_large")


def asks_for_html(method: str, headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether a request is a browser's for a page: clients of models ask for JSON, or say nothing."""
    return method == "GET" and any(name == b"accept" and b"text/html" in value for name, value in headers)


def _length(headers: Sequence[tuple[bytes, bytes]]) -> int | None:
    """Return how long a request's body is; ``None`` where only its end tells."""
    length: int | None = 0
    for name, value in headers:
        if name == b"transfer-encoding":
            return None
        if name == b"content-length":
            length = int(value) if value.isdigit() else None
    return length


def _host_of(origin: bytes) -> str:
    try:
        return urlsplit(origin.decode("latin-1")).netloc
    except ValueError:
        return ""


def is_loopback(client: Sequence[Any] | None) -> bool:
    """Whether a peer is on this machine; one on a Unix socket has no address."""
    return not client or _is_loopback(str(client[0]))


@lru_cache(1024)
def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def as_json(_scope: RequestScope, denied: Denied) -> tuple[Sequence[tuple[bytes, bytes]], bytes]:
    """Say a refusal as OpenAI's API says errors."""
    kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    error = {"message": denied.message, "type": kind.get(denied.status, "invalid_request_error"), "code": denied.code}
    return [(b"content-type", b"application/json")], json.dumps({"error": error}).encode()
