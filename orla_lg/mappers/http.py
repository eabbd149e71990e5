"""An external mapper: a service of the user's decides, over HTTP.

For each call it is POSTed a JSON object::

    {"stage": "support|classify", "workflow": "thread-7", "run": "…", "step": 3,
     "tags": {"tenant": "acme", "variant": "cheap", "priority": 5.0},
     "request": {"model": "gpt-4o", "prompt_chars": 1830, "messages": 4, "max_tokens": null,
                 "json_schema": false, "tools": true},
     "current": "heavy",
     "candidates": [
       {"name": "heavy", "models": ["heavy", "Qwen/Qwen3-8B"], "context_tokens": 32768,
        "input_per_mtoken": 0.2, "cached_input_per_mtoken": null, "output_per_mtoken": 0.6, "quality": 0.9,
        "queue_depth": 2, "in_flight": 32, "capacity": 32, "circuit": "closed", "paused": false,
        "resident_tokens": 4100, "service_s": 2.4}]}

``tags`` are the hints that were given, ``current`` is the backend that holds most of the workflow's KV cache (null
if none does), ``capacity`` is how many calls a backend takes at once (null if unbounded). What the caller
wrote is not sent. It answers 200 with::

    {"backend": "light", "reason": "small talk", "alternatives": ["heavy"]}

of which only ``backend`` must be there. ``{"backend": null}``, an empty name, or 204 without a body, declines.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any
from urllib.parse import urlsplit

import httpx

from orla_lg.arguments import answering
from orla_lg.core.boundary.bounded import parse_json, read_body
from orla_lg.core.call import Assignment, Call, Considered
from orla_lg.core.engine.breaker import Breaker, BreakerPolicy
from orla_lg.core.placement.view import BackendView, find, unfit
from orla_lg.errors import ConfigError

log = logging.getLogger("orla_lg")

BREAKER = BreakerPolicy(failures=3, pause_s=1.0, max_pause_s=30.0)
"""After so many failures in a row the service is left alone for a while: a dead one costs no call its time-out."""


MAX_BYTES = 64 * 1024
"""An answer names a few backends; a longer one is not read."""


class Misanswered(Exception):
    """The service answered what cannot be used; ``kind`` says how it is counted."""

    def __init__(self, kind: str, fault: str) -> None:
        super().__init__(fault)
        self.kind = kind


@answering
class HttpMapper:
    """Asks a URL where a call runs; whatever goes wrong there, the call is mapped as if it had declined.

    An answer is read up to ``MAX_BYTES``, and a call waits for the whole of it no longer than ``timeout_s``.

    Put it before a table: ``First(HttpMapper(url), ExplicitMapper({...}))``.

    Args:
        url: Where to POST.
        timeout_s: Seconds for the whole question; every call waits for it at most so long.
        headers: Sent along, for a key of the service; never logged.

    Raises:
        ConfigError: The URL is none.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float = 0.25,
        headers: Mapping[str, str] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(f"HttpMapper: url {url!r} is not http(s)://host[:port]/path")
        if timeout_s <= 0:
            raise ConfigError(f"HttpMapper: timeout_s must be positive, got {timeout_s}")
        self.url, self.timeout_s = url, timeout_s
        self._where = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        self._headers = dict(headers or {})
        # A client belongs to its loop, and calls come from many: each call has its own. What is dear in one is TLS,
        # which needs nothing loaded where there is none.
        secure = parts.scheme == "https"
        self._tls = ssl.create_default_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._clock = clock
        self._lock = threading.Lock()
        self._breaker = Breaker(BREAKER)
        self._counts: Counter[str] = Counter()

    async def amap(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:  # noqa: D102
        with self._lock:
            admitted = self._breaker.admit(self._clock())
            self._counts["asked" if admitted else "skipped"] += 1
        if not admitted:
            return None
        try:
            async with asyncio.timeout(self.timeout_s):
                answer = await self._asked(call, backends)
            chosen = _read(answer, call, backends)
        except (TimeoutError, httpx.TimeoutException):
            self._failed("timeout", f"no answer in {self.timeout_s} s")
        except Misanswered as error:
            self._failed(error.kind, str(error))
        except Exception as error:  # noqa: BLE001 - a service only advises: nothing of it may fail the call
            self._failed("error", f"{type(error).__name__}: {error}")
        else:
            self._succeeded("declined" if chosen is None else "answered")
            return chosen
        return None

    def statistics(self) -> dict[str, int]:
        """Return how often it was asked, answered, declined and skipped, and how often it failed in which way.

        Ways to fail: ``timeout``, ``error`` (of the connection, the status, the size or the JSON), ``unknown`` (no
        backend has that name) and ``unfit`` (that backend cannot do what the call asks).
        """
        with self._lock:
            return dict(self._counts)

    def __repr__(self) -> str:
        return f"HttpMapper({self._where!r}, timeout_s={self.timeout_s})"

    def question(self, call: Call, backends: Sequence[BackendView]) -> dict[str, Any]:
        """Return what the service gets about a call."""
        return question(call, backends)

    async def _asked(self, call: Call, backends: Sequence[BackendView]) -> Any:
        # Escaped, for ids may hold what UTF-8 cannot (lone surrogates).
        asked = json.dumps(self.question(call, backends)).encode()
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **self._headers}
        async with (
            httpx.AsyncClient(headers=headers, timeout=self.timeout_s, verify=self._tls) as http,
            http.stream("POST", self.url, content=asked) as response,
        ):
            if response.status_code == httpx.codes.NO_CONTENT:
                return {"backend": None}
            if not response.is_success:
                raise Misanswered("error", f"status {response.status_code}")
            data = await read_body(response, MAX_BYTES)
        try:
            return parse_json(data)
        except ValueError as error:
            raise Misanswered(
                "error", f"{len(data)} bytes that are no JSON, or none that is read: {error}"
            ) from error

    def _succeeded(self, kind: str) -> None:
        with self._lock:
            self._counts[kind] += 1
            closed = self._breaker.succeeded()
        if closed:
            log.warning("the mapper at %s answers again", self._where)

    def _failed(self, kind: str, fault: str) -> None:
        with self._lock:
            self._counts[kind] += 1
            first, opened = self._counts[kind] == 1, False
            if kind in ("timeout", "error"):
                was_closed = self._breaker.opened_s is None
                opened = self._breaker.failed(self._clock(), fault) and was_closed
            else:  # it is there, and may know better about another call
                self._breaker.succeeded()
        if first:
            log.warning("the mapper at %s failed, calls are mapped without it: %s; more like this is only counted",
                        self._where, fault)  # fmt: skip
        if opened:
            log.warning("the mapper at %s is left alone for a while after %d failures in a row",
                        self._where, self._breaker.failures)  # fmt: skip


def question(call: Call, backends: Sequence[BackendView]) -> dict[str, Any]:
    """Return what the service gets about a call."""
    identity, ask = call.identity, call.ask
    held = max(backends, key=lambda view: view.resident_tokens, default=None)
    return {
        "stage": identity.stage,
        "workflow": identity.name,
        "run": identity.run,
        "step": identity.step,
        "tags": {f.name: hint for f in fields(call.hints) if (hint := getattr(call.hints, f.name)) is not None},
        "request": {
            "model": ask.model,
            "prompt_chars": ask.prompt_chars,
            "messages": len(ask.messages),
            "max_tokens": ask.max_tokens,
            "json_schema": ask.json_schema,
            "tools": ask.tools,
        },
        "current": held.name if held is not None and held.resident_tokens else None,
        "candidates": [_candidate(view) for view in backends],
    }


def _candidate(view: BackendView) -> dict[str, Any]:
    return {
        "name": view.name,
        "models": list(view.models),
        "context_tokens": None if view.probe is None else view.probe.context_tokens,
        "input_per_mtoken": view.cost.input_per_mtoken,
        "cached_input_per_mtoken": view.cost.cached_input_per_mtoken,
        "output_per_mtoken": view.cost.output_per_mtoken,
        "quality": view.quality,
        "queue_depth": view.waiting,
        "in_flight": view.in_flight,
        "capacity": view.max_concurrency,
        "circuit": str(view.circuit),
        "paused": view.paused,
        "resident_tokens": view.resident_tokens,
        "service_s": view.speed.service_s,
    }


def _read(answer: Any, call: Call, backends: Sequence[BackendView]) -> Assignment | None:
    """Return what an answer means; ``None`` where it declines.

    Raises:
        Misanswered: It cannot be used.
    """
    if not isinstance(answer, Mapping) or "backend" not in answer:
        raise Misanswered("error", "the answer is no object with 'backend'")
    name = answer["backend"]
    if name is None or name == "":
        return None
    view = find(backends, name) if isinstance(name, str) else None
    if view is None:
        raise Misanswered("unknown", f"it named a backend that does not exist: {str(name)[:80]!r}")
    if faults := unfit(call.ask, view, None):
        raise Misanswered("unfit", f"it named backend {name!r} for stage {call.identity.stage!r}: {faults[0]}")
    named = answer.get("alternatives")
    others = [each for each in named if each != name] if isinstance(named, list) else []
    return Assignment(
        view.name,
        mapper="http",
        reason=_sayable(answer.get("reason")),
        alternatives=tuple(each for each in others if isinstance(each, str) and find(backends, each) is not None),
        considered=tuple(
            Considered(
                each.name,
                {"queue_depth": each.waiting, "in_flight": each.in_flight, "resident_tokens": each.resident_tokens},
                "chosen" if each is view else "candidate",
            )
            for each in backends
        ),
    )


def _sayable(reason: Any) -> str:
    """Return a reason as records keep it; empty where it is no text."""
    return reason[:300].encode(errors="replace").decode() if isinstance(reason, str) else ""
