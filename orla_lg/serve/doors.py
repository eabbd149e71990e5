"""The HTTP protocol of the server's port: uvicorn's, with links, and bounds on the heads of requests.

A request that asks for a link (``link.messages.PATH``, ``Upgrade: orla-link``) is answered here, and its connection
becomes the link's. What goes over a link is never HTTP again, so nothing of uvicorn's stays on it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Protocol, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from orla_lg.link.messages import PATH, UPGRADE

HEAD_S = 20.0
"""The head of a request that has not come within that ends its connection."""

MOST_HEAD_BYTES = 64 * 1024

BEHIND_PROXY = ("behind-a-proxy", 0)
"""The address of what came through a proxy: none of this machine."""

SERVER_HEADER = "x-orla-server"
"""On each answer; by it a backend is known that is no engine but another server of ours."""


class LinkDenied(Exception):
    """A link is not opened.

    Args:
        status: Of the answer.
        message: Why.
        retry_after_s: When to ask again.
    """

    def __init__(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after_s = status, message, retry_after_s


class Links(Protocol):
    """What opens links."""

    def open_link(self, headers: Mapping[str, str], *, loopback: bool) -> asyncio.Protocol:
        """Return what the connection is given to.

        Raises:
            LinkDenied: It is not opened.
        """
        ...


class ServerProtocol(HttpToolsProtocol):
    """One connection."""

    links: Links
    """Of a subclass, which ``protocol_for`` makes."""
    trusts_local = True
    """Whether what connects from this machine speaks for itself; a proxy does not."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._head_bytes = 0
        self._head_ends: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Begin to wait for the first request's head."""
        super().connection_made(transport)
        if not self.trusts_local:
            self.client = BEHIND_PROXY
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read requests; what comes after one that asks for a link is the link's."""
        if self._head_ends is not None:
            self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._should_upgrade():
                self._open_link(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        else:
            if self._head_ends is not None and self._head_bytes > MOST_HEAD_BYTES:
                self._refuse(431, f"the head of a request has at most {MOST_HEAD_BYTES} bytes")

    # The head of a request

    def on_message_begin(self) -> None:
        """Wait for the rest of the head."""
        super().on_message_begin()
        if self._head_ends is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        """Have the request answered."""
        self._head_came()
        super().on_headers_complete()

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._head_ends = self.loop.call_later(HEAD_S, self.transport.close)

    def _head_came(self) -> None:
        if self._head_ends is not None:
            self._head_ends.cancel()
            self._head_ends = None

    # Links

    def _should_upgrade(self) -> bool:
        """Whether the request asks for a link; any other upgrade is ignored, as RFC 9110 has it."""
        return self.url.partition(b"?")[0] == PATH.encode() and self._get_upgrade() == UPGRADE.encode()

    def _open_link(self, rest: bytes) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in self.headers}
        try:
            session = self.links.open_link(headers, loopback=is_loopback(self.client))
        except LinkDenied as denied:
            self._refuse(denied.status, denied.message, denied.retry_after_s)
            return
        self._head_came()
        self.connections.discard(self)
        self.transport.write(
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: " + UPGRADE.encode() + b"\r\n"
            + _lines(self.server_state.default_headers) + b"\r\n"
        )  # fmt: skip
        self.transport.set_protocol(session)
        session.connection_made(self.transport)
        if rest:
            cast("asyncio.Protocol", session).data_received(rest)

    def _refuse(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        """Answer with an error, and end the connection."""
        body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "code": status}}).encode()
        head = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode(), _lines(self.server_state.default_headers)]
        if retry_after_s is not None:
            head.append(b"retry-after: %d\r\n" % max(1, round(retry_after_s)))
        head.append(b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body))
        self.transport.write(b"".join([*head, body]))
        self.transport.close()


def protocol_for(links: Links, *, trusts_local: bool = True) -> type[ServerProtocol]:
    """Return the protocol whose links are opened by *links*."""
    return type("ServerProtocol", (ServerProtocol,), {"links": links, "trusts_local": trusts_local})


def is_loopback(client: tuple[str, int] | None) -> bool:
    """Whether a peer is on this machine; one on a Unix socket has no address."""
    return client is None or client[0].startswith("127.") or client[0] in ("::1", "::ffff:127.0.0.1")


def _lines(headers: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(b"%s: %s\r\n" % header for header in headers)
