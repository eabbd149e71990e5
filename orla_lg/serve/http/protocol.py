"""HTTP/1.1 on the server's port: uvicorn's protocol, with bounds on heads, and without doubt about where bodies end.

What httptools lets pass and two readers may take for different things is refused (400): a second ``Host``, a
``Transfer-Encoding`` that is not simply ``chunked``, a target that names another host. Another ``Upgrade`` than ours
is taken out of the head, or ends the connection: behind one httptools reads a body as another request.
"""

from __future__ import annotations

import asyncio
import json
import re
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from orla_lg.link.messages import UPGRADE

HEAD_S = 20.0
"""The head of a request comes within that time; so does the first byte of a connection's first request."""

MOST_HEAD_BYTES = 64 * 1024
MOST_HEADERS = 200

LOOKED_THROUGH_BYTES = 8 * 1024

_OTHER_UPGRADE = re.compile(rb"(?i)(\r\n)upgrade:(?![ \t]*" + UPGRADE.encode() + rb"[ \t]*(?:\r|\Z))")

ONCE = frozenset({
    b"authorization", b"content-length", b"content-type", b"expect", b"host", b"transfer-encoding", b"upgrade",
    b"x-api-key",
})  # fmt: skip
"""Headers of which a second one could be meant."""


class BadHead(Exception):
    """The head of a request is none that this server answers."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.status = message, status


class GuardedHttpProtocol(HttpToolsProtocol):
    """One connection. A subclass takes it over for another protocol by ``_should_upgrade`` and ``take_over``."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._in_head = True
        self._head_bytes = self._header_bytes = 0
        self._head_ends: asyncio.TimerHandle | None = None
        self._between = True
        """What comes next begins a request."""
        self._is_last = False
        """What comes after the request under way is not read: it might not be a request."""
        self._bad: BadHead | None = None

    # What a subclass says

    def _should_upgrade(self) -> bool:
        """Whether the connection is taken over at the end of this head; any other upgrade is ignored (RFC 9110)."""
        return False

    def take_over(self, rest: bytes) -> None:
        """Take the connection over; *rest* came after the head."""
        raise NotImplementedError

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Begin to wait for the first request's head."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read requests."""
        if self._is_last or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        was_in_head = self._in_head
        if self._between and data.find(b"pgrade", 0, LOOKED_THROUGH_BYTES) >= 0:
            data = self._without_upgrade(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._should_upgrade():
                self.take_over(data[upgrade.args[0] :])
            else:
                self._is_last = True
        except httptools.HttpParserError:
            bad, self._bad = self._bad, None
            self.refuse(*(("the request is no valid HTTP/1.1", 400) if bad is None else (bad.message, bad.status)))
        else:
            if self._in_head:
                self._head_bytes += len(data) if was_in_head else 1  # of one that begins in here, it is not known
            if self._head_bytes > MOST_HEAD_BYTES:
                self.refuse(f"the head of a request has at most {MOST_HEAD_BYTES} bytes", 431)

    def _without_upgrade(self, data: bytes) -> bytes:
        """Rename the header of an upgrade that is ignored: Java's client offers HTTP/2 with its requests, and bodies.

        httptools would take what follows such a head for another protocol's. Where a head does not come at once, or
        not at the beginning of what comes, its header stays, and with a body it is refused.
        """
        head, end, rest = data.partition(b"\r\n\r\n")
        return _OTHER_UPGRADE.sub(rb"\1x-ignored-upgrade:", head) + end + rest

    def refuse(self, message: str, status: int = 400, more: bytes = b"") -> None:
        """Answer with an error, and end the connection; *more* are lines of headers."""
        self._is_last = True
        body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "code": status}}).encode()
        head = b"HTTP/1.1 %d %s\r\n" % (status, HTTPStatus(status).phrase.encode())
        head += b"".join(b"%s: %s\r\n" % header for header in self.server_state.default_headers)
        head += more + b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(
            body
        )
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not (self._in_head or cycle.response_started):
            self.transport.write(head + body)  # else an earlier request's answer is under way
        if cycle is not None:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()

    # The head of a request

    def on_message_begin(self) -> None:
        """Wait for the rest of the head."""
        super().on_message_begin()
        self._between, self._in_head, self._header_bytes = False, True, 0
        if self._head_ends is None:
            self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header in; what comes as one behind a body is left out: a proxy may not have looked at it."""
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > MOST_HEAD_BYTES or len(self.headers) >= MOST_HEADERS:
            self._bad = BadHead(f"a head has at most {MOST_HEADERS} headers in {MOST_HEAD_BYTES} bytes", 431)
            raise self._bad
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Have the request answered, if there is no doubt about what it is."""
        self._head_came()
        try:
            self._check_head()
        except BadHead as bad:
            self._bad = bad
            raise
        super().on_headers_complete()
        self._in_head, self._head_bytes = False, 0
        if self.parser.should_upgrade() and not self._should_upgrade():
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """End a request's body."""
        self._between = True
        super().on_message_complete()

    def _check_head(self) -> None:
        found: dict[bytes, bytes] = {}
        for name, value in self.headers:
            if name in ONCE:
                if name in found:
                    raise BadHead(f"header {name.decode()} is sent twice")
                found[name] = value
        version = self.parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise BadHead("the version of HTTP must be 1.1 or 1.0", 505)
        if b"host" not in found:
            raise BadHead("header host is missing")
        if not self.url.startswith(b"/"):
            raise BadHead("the target must be a path")
        if len(self.url) > MOST_HEAD_BYTES:
            raise BadHead(f"a target has at most {MOST_HEAD_BYTES} bytes", 414)
        coding = found.get(b"transfer-encoding")
        if coding is not None and (coding.lower() != b"chunked" or version == "1.0" or b"content-length" in found):
            raise BadHead("transfer-encoding must be chunked alone, without content-length, in HTTP/1.1")
        if self.parser.should_upgrade() and (coding is not None or found.get(b"content-length", b"0") != b"0"):
            raise BadHead("a request with a body cannot upgrade its connection; send it as plain HTTP/1.1")

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._head_ends = self.loop.call_later(HEAD_S, self._head_is_late)

    def _head_came(self) -> None:
        if self._head_ends is not None:
            self._head_ends.cancel()
            self._head_ends = None

    def _head_is_late(self) -> None:
        self._head_ends = None
        if self._head_bytes:
            self.refuse("the head of the request did not come in time", 408)
        else:
            self.transport.close()
