"""The backends as the gateway reaches them: one aiohttp session for each, of the event loop that serves."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Mapping
from typing import Any

import aiohttp
import httpx2
from multidict import CIMultiDict
from yarl import URL

from orla_lg.clients.backend_request import BackendRequest, address_of
from orla_lg.core.engine.backend import Backend
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.errors import BackendUnavailable
from orla_lg.openai_api.client import KEEP_ALIVE_S, NO_KEY
from orla_lg.openai_api.dialect import Dialect
from orla_lg.openai_api.home import TRACE, Home, Upgrade, certificates
from orla_lg.serve.gateway.bodies import written
from orla_lg.wires.wire import Wire

CONNECT_TIMEOUT_S = 10.0
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
"""How long an engine may say nothing is the sender's to bound."""

MOST_REDIRECTS = 5
LARGE_BYTES = 1 << 20
"""A longer body is sent in pieces, so that the loop does other work between them."""

_MOVED = frozenset({307, 308})
_READ_BYTES = 1 << 18

OF_LINKS = ("name", "url", "model", "engine", "api_key", "forward_headers", "forward_query")
"""What of a backend's configuration its connections are made by."""

Carried = tuple[tuple[bytes, bytes], ...]


class BackendLink:
    """One backend.

    Args:
        backend: Its configuration.
        keep_alive: Whether a connection may serve another request after a stream.
    """

    def __init__(self, backend: Backend, *, keep_alive: bool) -> None:
        self.backend = backend
        self.named = frozenset(name.lower() for name in backend.forward_headers)
        """What is carried of a caller's headers beyond what always is."""
        self.query = frozenset(backend.forward_query)
        self._dialects: dict[str, Dialect] = {}
        self._home = Home(backend)
        self._keep_alive = keep_alive
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._addresses: dict[str, URL] = {}
        self._headers: dict[str, tuple[Carried, CIMultiDict[str]]] = {}

    def reaches(self, backend: Backend) -> bool:
        """Whether another configuration of the backend is reached in the same way."""
        return all(getattr(self.backend, name) == getattr(backend, name) for name in OF_LINKS)

    def dialect_of(self, wire: str) -> Dialect:
        """Return what the engine turned out not to take on one wire, by the wire's name."""
        known = self._dialects.get(wire)
        return known or self._dialects.setdefault(wire, Dialect(self.backend))

    async def send(
        self,
        outgoing: BackendRequest[BackendLink],
        carried: Carried,
        query: dict[str, Any],
        traced: Mapping[str, str] | None = None,
    ) -> aiohttp.ClientResponse:
        """Send a request, and return the response as soon as its head is there.

        Raises:
            aiohttp.ClientError, TimeoutError: It did not answer.
            BackendUnavailable: It redirects to where prompts must not go.
        """
        content, wire = written(outgoing.body), outgoing.wire
        url = self._addresses.get(wire.name)
        if url is None:
            url = self._addresses[wire.name] = URL(address_of(self.backend.url, wire))
        headers = self._headers_with(wire, carried)
        if traced:  # in the place of the caller's own
            headers = headers.copy()
            for name in TRACE:
                headers.popall(name, None)
            headers.update(traced)
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
                connector=connector, timeout=TIMEOUT, cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent",), read_bufsize=_READ_BYTES,
            )  # fmt: skip
            self._loop = loop
        return self._session

    async def close(self) -> None:
        """Close its connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


class BackendLinks:
    """What is sent to the backends by; made when it is first of use, and again where a backend is another one."""

    def __init__(self) -> None:
        self._links: dict[str, BackendLink] = {}
        self._left: list[BackendLink] = []
        """Of backends that were changed or removed; calls on them go on."""

    def of(self, scheduler: BackendScheduler) -> BackendLink:
        """Return what is sent to a backend by."""
        backend = scheduler.backend
        link = self._links.get(backend.name)
        if link is not None and link.backend is not backend and link.reaches(backend):
            link.backend = backend  # only what the core decides by has changed
        if link is None or link.backend is not backend:
            if link is not None:
                self._left.append(link)
            link = self._links[backend.name] = BackendLink(backend, keep_alive=scheduler.adapter.keep_alive)
        return link

    async def abort(self, backend: str) -> None:
        """End what is under way to a backend."""
        for link in [each for each in (*self._links.values(), *self._left) if each.backend.name == backend]:
            await link.close()

    async def close(self) -> None:
        """Close all connections."""
        for link in (*self._links.values(), *self._left):
            await link.close()
        self._left.clear()
