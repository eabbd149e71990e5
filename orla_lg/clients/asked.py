"""One request of a model's client, as its HTTP library holds it, and how it is said to an engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from orla_lg.clients.libraries import Library
from orla_lg.clients.question import Question
from orla_lg.core.call import CallerTimeout
from orla_lg.openai_api.home import carries, query_among
from orla_lg.wires.wire import Wire

_KEYS = frozenset({b"authorization", b"x-api-key", b"api-key"})


@lru_cache(maxsize=1024)
def is_key(name: bytes) -> bool:
    """Whether a header holds a key."""
    return name.lower() in _KEYS


def _text(key: bytes) -> str:
    return key.decode("latin-1").removeprefix("Bearer ")


@dataclass(eq=False)
class Asked(Question):
    """A request that a wire knows."""

    library: Library
    request: Any
    """The library's."""
    unread: bool
    """Whether the client reads the response itself."""
    encoding: Any
    """How the client reads a text without a charset."""
    timeouts: Mapping[str, Any]

    def timeout(self) -> CallerTimeout | None:
        """Return how long the client would wait for an answer; ``None``: without end."""
        seconds = self.timeouts.get("read")
        return None if seconds is None else CallerTimeout(seconds, self._timed_out)

    def _timed_out(self, waited_for: str) -> Exception:
        return self.library.failed("ReadTimeout", waited_for, self.request)

    @cached_property
    def raw_headers(self) -> Sequence[tuple[bytes, bytes]]:
        """The headers, as HTTP clients hold them: looking them up by name takes long."""
        raw: Sequence[tuple[bytes, bytes]] = self.request.headers.raw
        return raw

    def secrets(self) -> Iterator[str]:
        """Return the caller's keys, which must not be recorded."""
        for name, value in self.raw_headers:
            if is_key(name):
                yield _text(value)

    def headers(self, named: frozenset[str]) -> tuple[tuple[bytes, bytes], ...]:
        """Return the headers to carry; *named* are what the backend takes beside the usual ones."""
        if self.wire.carries:
            named |= self.wire.carries
        return tuple([each for each in self.raw_headers if carries(each[0], named)])

    def query(self, named: frozenset[str]) -> dict[str, Any]:
        """Return the query parameters to carry."""
        url = self.request.url
        return query_among(url.params.items(), named) if url.query else {}


def read(library: Library, client: Any, request: Any, wire: Wire, *, unread: bool) -> Asked | None:
    """Return a request as its wire has it; ``None`` where its body is still to come, no object, or no question."""
    try:
        body = json.loads(request.content.decode())  # of bytes it would guess in which encoding they are
    except (library.module.RequestNotRead, ValueError, RecursionError):
        return None
    if not isinstance(body, dict) or not wire.asks(body):
        return None
    timeouts = request.extensions.get("timeout") or client.timeout.as_dict()
    return Asked(wire, body, library, request, unread, client._default_encoding, timeouts)
