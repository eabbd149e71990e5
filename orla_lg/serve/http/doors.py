"""Links on the server's HTTP port: a request that asks for one is answered here, and its connection is the link's.

What goes over a link is never HTTP again, so nothing of uvicorn's stays on its connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol, cast

from orla_lg.link.messages import PATH, UPGRADE
from orla_lg.serve.access.access import Denied
from orla_lg.serve.http.protocol import GuardedHttpProtocol

SERVER_HEADER = "x-orla-server"
"""On each answer; by it a backend is known that is no engine but another server of ours."""

Headers = Sequence[tuple[bytes, bytes]]


class Links(Protocol):
    """What opens links."""

    def open_link(
        self, headers: Headers, client: Sequence[Any] | None, server: Sequence[Any] | None
    ) -> asyncio.Protocol:
        """Return what the connection is given to.

        Args:
            headers: Of the request.
            client: The peer's address.
            server: The address that the connection came to.

        Raises:
            Denied: No link is opened.
        """
        ...


class ServerProtocol(GuardedHttpProtocol):
    """One connection, which may become a link."""

    links: Links
    """Of a subclass, which ``protocol_for`` makes."""

    def _should_upgrade(self) -> bool:
        return self.url.partition(b"?")[0] == PATH.encode() and self._get_upgrade() == UPGRADE.encode()

    def take_over(self, rest: bytes) -> None:
        """Make a link of the connection; *rest* is what already came over it."""
        try:
            session = self.links.open_link(self.headers, self.client, self.server)
        except Denied as denied:
            self.refuse(denied.message, denied.status, _lines(denied.headers))
            return
        self.connections.discard(cast("Any", self))
        lines = _lines(self.server_state.default_headers)
        switching = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: %s\r\n%s\r\n"
        self.transport.write(switching % (UPGRADE.encode(), lines))
        self.transport.set_protocol(session)
        session.connection_made(self.transport)
        if rest:
            session.data_received(rest)


def protocol_for(links: Links) -> type[ServerProtocol]:
    """Return the protocol whose links are opened by *links*."""
    return type("ServerProtocol", (ServerProtocol,), {"links": links})


def _lines(headers: Headers) -> bytes:
    return b"".join(b"%s: %s\r\n" % header for header in headers)
