"""The backends as the gateway reaches them: one aiohttp session for each, of the event loop that serves."""

from __future__ import annotations

import asyncio
import contextlib
import io
from typing import Any

import aiohttp
import httpx2
from multidict import CIMultiDict
from yarl import URL

from orla_lg.clients.backend_request import BackendRequest, address_of
from orla_lg.core.engine.backend import Backend
from orla_lg.errors import BackendUnavailable
from orla_lg.openai_api.client import KEEP_ALIVE_S, NO_KEY
from orla_lg.openai_api.dialect import Dialect
from orla_lg.openai_api.home import Home, Upgrade, certificates
from orla_lg.wires.wire import Wire

CONNECT_TIMEOUT_S = 10.0
MOST_REDIRECTS = 5
LARGE_BYTES = 1 << 20
"""A longer body is sent in pieces, so that the loop does other work between them."""

_MOVED = frozenset({307, 308})
_READ_BYTES = 1 << 18

Carried = tuple[tuple[bytes, bytes], ...]


class BackendLink:
    """One backend.

    Args:
        backend: Its configuration.
        keep_alive: Whether a connection may serve another request after a stream.
        silence_s: So long it may say nothing.
    """

    def __init__(self, backend: Backend, *, keep_alive: bool, silence_s: float) -> None:
        self.backend = backend
        self.named = frozenset(name.lower() for name in backend.forward_headers)
        """What is carried of a caller's headers beyond what always is."""
        self.query = frozenset(backend.forward_query)
        self._dialects: dict[str, Dialect] = {}
        self._home = Home(backend)
        self._keep_alive = keep_alive
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=silence_s)
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._addresses: dict[str, URL] = {}
        self._headers: dict[str, tuple[Carried, CIMultiDict[str]]] = {}

    def dialect_of(self, wire: str) -> Dialect:
        """Return what the engine turned out not to take on one wire, by the wire's name."""
        known = self._dialects.get(wire)
        return known or self._dialects.setdefault(wire, Dialect(self.backend))

    async def send(
        self, outgoing: BackendRequest[BackendLink], carried: Carried, query: dict[str, Any]
    ) -> aiohttp.ClientResponse:
        """Send a request, and return the response as soon as its head is there.

        Raises:
            aiohttp.ClientError, TimeoutError: It did not answer.
            BackendUnavailable: It redirects to where prompts must not go.
        """
        content, wire = outgoing.content(), outgoing.wire
        url = self._addresses.get(wire.name)
        if url is None:
            url = self._addresses[wire.name] = URL(address_of(self.backend.url, wire))
        headers = self._headers_with(wire, carried)
        return await self._post(url.update_query(query) if query else url, content, headers)

    async def _post(self, url: URL, content: bytes, headers: CIMultiDict[str]) -> aiohttp.ClientResponse:
        session = self._on_loop()
        for _ in range(MOST_REDIRECTS + 1):
            data: Any = content if len(content) < LARGE_BYTES else io.BytesIO(content)
            verified = certificates() if url.scheme == "https" else False
            response = await session.post(url, data=data, headers=headers, allow_redirects=False, ssl=verified)
            if not 300 <= response.status < 400:
                return response
            target = response.headers.get("location")
            response.release()
            if response.status not in _MOVED or not target:
                raise BackendUnavailable(
                    f"backend {self.backend.name!r} at {self.backend.url} redirects with status {response.status}; "
                    "give the backend the url where it is"
                )
            url = url.join(URL(target))
            with contextlib.suppress(Upgrade):  # certificates are verified wherever TLS is spoken
                self._home.heed(httpx2.URL(str(url)))
        raise BackendUnavailable(f"backend {self.backend.name!r} at {self.backend.url} redirects in a circle")

    def _headers_with(self, wire: Wire, carried: Carried) -> CIMultiDict[str]:
        """Return the headers of a request, which are mostly those of the one before on its wire."""
        known = self._headers.get(wire.name)
        if known is not None and known[0] == carried:
            return known[1]
        headers = CIMultiDict[str]()
        for name, value in carried:
            headers.add(name.decode("latin-1"), value.decode("latin-1"))
        headers["Content-Type"] = "application/json"
        headers["Accept-Encoding"] = "identity"
        headers.update(wire.headers(self.backend.api_key or NO_KEY))
        self._headers[wire.name] = carried, headers
        return headers

    def _on_loop(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if self._session is None or self._loop is not loop:
            connector = (
                aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
                if self._keep_alive
                else aiohttp.TCPConnector(limit=0, force_close=True)
            )
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=self._timeout, cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent",), read_bufsize=_READ_BYTES,
            )  # fmt: skip
            self._loop = loop
        return self._session

    async def close(self) -> None:
        """Close its connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()
