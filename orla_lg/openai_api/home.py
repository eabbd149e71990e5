"""Where a backend lives: what a request may be redirected to, and what is carried there of the caller's.

The SDK follows redirects, with the prompt and, to the same origin, with the key. So do we within the backend's own
origin (scheme, host and port) and from ``http`` to ``https`` on its host; anywhere else neither may go. Headers and
query parameters that the caller's SDK client adds were meant for the server that the code names: an allow-list of
kinds passes (tracing, names of requests and sessions, content negotiation), and what the backend names.
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

import httpx2

from orla_lg.core.call import OBJECT
from orla_lg.core.engine.backend import Backend
from orla_lg.errors import BackendUnavailable

_PORTS = {"http": 80, "https": 443}

HEADERS = frozenset({
    # tracing
    "traceparent", "tracestate", "b3", "uber-trace-id", "x-amzn-trace-id", "x-cloud-trace-context", "sentry-trace",
    "x-datadog-trace-id", "x-datadog-parent-id", "x-datadog-sampling-priority", "x-datadog-origin", "x-datadog-tags",
    "x-trace-id", "x-span-id",
    # which request, which session, which program
    "x-request-id", "request-id", "x-correlation-id", "correlation-id", "x-client-request-id", "x-session-id",
    "idempotency-key", "user-agent", "http-referer", "x-title",
    # what is understood
    "accept", "accept-language", "content-type",
})  # fmt: skip
"""Headers of a caller that are carried to a backend, in lower case."""

PREFIXES = ("x-b3-", "x-stainless-", "____stainless_")
"""Beginnings of such headers: tracing, and how the SDK describes itself and asks itself for raw answers."""

QUERY = frozenset({"api-version"})
"""Query parameters of a caller that are carried."""

TRACE = frozenset({"traceparent", "tracestate"})
"""Where a request belongs in a trace, as W3C has it."""

_THE_CLIENTS_OWN = frozenset({"accept", "content-type", "user-agent"})
"""Headers that every HTTP client has by itself: no caller gave them."""


class Address(Protocol):
    """A URL of httpx or of httpx2."""

    @property
    def scheme(self) -> str:
        """In lower case."""
        ...

    @property
    def host(self) -> str:
        """In lower case."""
        ...

    @property
    def port(self) -> int | None:
        """``None`` for the scheme's own."""
        ...


class Upgrade(Exception):
    """The backend redirects from ``http`` to ``https``, and the client that asked does not verify certificates."""


class Home:
    """A backend's own origin.

    Args:
        backend: Its URL says where it lives.
    """

    def __init__(self, backend: Backend) -> None:
        self._where = f"backend {backend.name!r} at {backend.url}"
        url = httpx2.URL(backend.url)
        self._origin = url.scheme, url.host, url.port or _PORTS.get(url.scheme)
        self.verified = self._origin[0] == "https"
        """Whether clients must be able to verify certificates: loading them takes 20 ms, so not without need."""

    def heed(self, url: Address) -> None:
        """Let a request go to *url*, a redirect's target too, or not.

        Raises:
            BackendUnavailable: It is another origin.
            Upgrade: It is ours under TLS; ``verified`` is set from now on.
        """
        scheme, host, port = target = url.scheme, url.host, url.port or _PORTS.get(url.scheme)
        if target == self._origin:
            return
        if (self._origin[0], scheme) != ("http", "https") or host != self._origin[1]:
            raise BackendUnavailable(
                f"{self._where} redirects to {scheme}://{host[:200]}:{port}: keys and prompts go to the backend's "
                "own origin only; if the engine is there, give the backend that url"
            )
        if not self.verified:
            self.verified = True
            raise Upgrade

    def heed_request(self, request: Any) -> None:
        """``heed`` as a hook of an HTTP client."""
        self.heed(request.url)

    async def aheed_request(self, request: Any) -> None:
        """``heed`` as an async hook."""
        self.heed(request.url)


@functools.cache
def certificates() -> ssl.SSLContext:
    """Return the certificates that servers are verified by, loaded once."""
    return httpx2.create_ssl_context()


def headers_of(caller: Any, given: Any, named: Collection[str]) -> dict[str, Any]:
    """Return the headers to carry: of the caller's HTTP client, of its SDK client, and given with the call.

    Args:
        caller: The SDK client that the code called.
        given: With the call; nothing that is no mapping.
        named: More that the backend takes, in lower case.
    """
    named = frozenset(named)
    http = getattr(getattr(caller, "_client", None), "headers", None)
    carried: dict[str, Any] = {} if http is None else dict(_of_client(tuple(http.raw), named))
    for source in (getattr(caller, "_custom_headers", None), given):
        if source and isinstance(source, OBJECT):
            for name, value in source.items():
                if _passes(lower := name.lower(), named):
                    carried[lower] = value
    return carried


@functools.lru_cache(maxsize=64)
def _of_client(headers: tuple[tuple[bytes, bytes], ...], named: frozenset[str]) -> Mapping[str, str]:
    """Return what is carried of an HTTP client's own headers, which are the same at each of its calls."""
    return {
        name: value
        for name, value in httpx2.Headers(headers).items()
        if name not in _THE_CLIENTS_OWN and _passes(name, named)
    }


@functools.lru_cache(maxsize=1024)
def carries(name: bytes, named: frozenset[str]) -> bool:
    """Whether a header of a caller's HTTP request is carried.

    Args:
        name: As HTTP clients hold it.
        named: More that the backend takes, or that are part of the API, in lower case.
    """
    return _passes(name.decode("latin-1").lower(), named)


@functools.lru_cache(maxsize=1024)
def _passes(name: str, named: frozenset[str]) -> bool:
    return name in HEADERS or name in named or name.startswith(PREFIXES)


def beside_trace(headers: Mapping[str, Any], traced: Mapping[str, str]) -> dict[str, Any]:
    """Return headers to carry with those that tell of a call's trace in the place of the caller's own."""
    return {**{name: value for name, value in headers.items() if name.lower() not in TRACE}, **traced}


def query_of(caller: Any, given: Any, named: Collection[str]) -> dict[str, Any]:
    """Return the query parameters to carry: of the caller's SDK client, and given with the call."""
    carried: dict[str, Any] = {}
    for source in (getattr(caller, "_custom_query", None), given):
        if source and isinstance(source, OBJECT):
            carried |= query_among(source.items(), named)
    return carried


def query_among(given: Iterable[tuple[str, Any]], named: Collection[str]) -> dict[str, Any]:
    """Return which of a caller's query parameters are carried."""
    return {name: value for name, value in given if name.lower() in QUERY or name in named}
