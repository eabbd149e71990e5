"""What goes back to a caller: headers, an engine's words as they are, and our own errors in the caller's wire."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from orla_lg.clients import translation
from orla_lg.core.engine.retry import NOT_IMPLEMENTED
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.mapping import named_in_code
from orla_lg.core.placement.elsewhere import BackendElsewhere
from orla_lg.errors import (
    AccessDenied,
    BackendUnavailable,
    BudgetExceeded,
    ConfigError,
    DeadlineExceeded,
    MappingError,
    OrlaClosed,
    OrlaError,
    PolicyError,
    QueueFull,
)
from orla_lg.serve.access.access import Denied
from orla_lg.serve.gateway.identity import BadHint
from orla_lg.wires.chat import CHAT
from orla_lg.wires.messages import MESSAGES
from orla_lg.wires.registry import wire_at
from orla_lg.wires.wire import Wire

Header = tuple[bytes, bytes]

JSON = (b"content-type", b"application/json")
FINAL = (b"x-should-retry", b"false")
"""Keeps the clients' libraries from trying again."""
SHOWN_CHARS = 500
"""Of an engine's error, in records."""

BUSY_RETRY_S = 1.0
"""What a caller is asked to wait where a queue is full."""

RETRIED_WITHIN_S = 60.0
"""The clients' libraries heed no ``Retry-After`` that is longer, and try again at once."""

_NO_WORDS = re.compile(r"(file |404 page )?not found|method not allowed|not implemented|<.*", re.I | re.S)
"""What servers say of a route that they do not have."""

_ID = re.compile(rb"[A-Za-z0-9._:@/+=|~-]{1,128}")

_KEPT = frozenset({
    b"retry-after", b"retry-after-ms", b"x-should-retry", b"cache-control", b"x-accel-buffering",
    b"content-language", b"server-timing", b"warning",
})  # fmt: skip
_KEPT_BEGINNINGS = (b"openai-", b"anthropic-", b"x-ratelimit-", b"x-vllm-", b"x-sglang-", b"x-envoy-upstream-")


class Failed(NamedTuple):
    """An answer that says why there is none."""

    status: int
    message: str
    kind: str | None = None
    retry_after_s: float | None = None


class UpstreamError(Exception):
    """An engine answered with an error, which is the caller's.

    Args:
        status: Its HTTP status.
        headers: As it sent them.
        content: Its body.
    """

    def __init__(self, status: int, headers: Iterable[Header], content: bytes) -> None:
        self.text = content.decode("utf-8", "replace")
        super().__init__(f"{status} - {self.text[:SHOWN_CHARS]}")
        self.status = status
        self.headers = [(name.lower(), value) for name, value in headers]
        self.content = content

    def kept(self) -> list[Header]:
        """Return which of its headers the caller gets."""
        said = dict(self.headers)
        final = [FINAL] if self.status in NOT_IMPLEMENTED and FINAL[0] not in said else []
        return [*kept(self.headers), *final, (b"content-type", said.get(b"content-type", JSON[1]))]

    def says_why(self) -> bool:
        """Whether it has words of its own, and not those of a server that has no such route."""
        try:
            said = json.loads(self.content)
        except (ValueError, RecursionError):
            said = self.text.strip()
        error = said.get("error", said) if isinstance(said, dict) else said
        if isinstance(error, dict):
            error = error.get("message") or error.get("detail")
        return bool(error) and not (isinstance(error, str) and _NO_WORDS.fullmatch(error))

    def translated(self, wire: Wire) -> None:
        """Say the same in another wire."""
        self.content = translation.refusal(self.content, self.status, wire)
        self.headers = [each for each in self.headers if each[0] != b"content-type"]


class UpstreamSilent(Exception):
    """An engine said nothing for too long."""


class UpstreamGarbled(Exception):
    """What an engine sent was no answer."""


class RequestRefused(OrlaError):
    """A request cannot be read."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@lru_cache(maxsize=1024)
def _is_kept(name: bytes) -> bool:
    return name in _KEPT or name.startswith(_KEPT_BEGINNINGS)


def kept(headers: Iterable[Header]) -> list[Header]:
    """Return which of an engine's headers are of use to a caller; credentials and what frames bytes are not."""
    return [(lower, value) for name, value in headers if _is_kept(lower := name.lower())]


def request_id(headers: Mapping[bytes, bytes], call_id: str) -> bytes:
    """Return the name of a request: the caller's where that is one, else the call's."""
    said = headers.get(b"x-request-id")
    return said if said is not None and _ID.fullmatch(said) else call_id.encode()


def named(headers: Mapping[bytes, bytes], call_id: str, wire: Wire) -> list[Header]:
    """Return the headers that name a request, as the clients of its wire look for them."""
    name = request_id(headers, call_id)
    return [(b"x-request-id", name), (b"request-id", name)] if wire is MESSAGES else [(b"x-request-id", name)]


def about(inflight: InFlightCall) -> list[Header]:
    """Return headers that say which call it is, where it ran and how long it waited."""
    told = [
        (b"x-orla-call-id", inflight.call.id.encode()),
        (b"x-orla-queue-wait-ms", b"%.2f" % (inflight.queue_wait_s * 1000)),
    ]
    if inflight.backend is not None:
        told.append((b"x-orla-backend", inflight.backend.encode("latin-1", "replace")))
    return told


def failed(error: BaseException, inflight: InFlightCall | None) -> Failed | None:
    """Return how an error is answered; ``None`` for one that is nothing to be said of."""
    message = f"{error}"
    match error:
        case RequestRefused():
            return Failed(error.status, message)
        case BadHint():
            return Failed(400, message)
        case QueueFull():
            return Failed(429, message, "rate_limit_exceeded", BUSY_RETRY_S)
        case BudgetExceeded():
            return Failed(429, message, "insufficient_quota", error.retry_after_s)
        case AccessDenied():
            return Failed(403, message, "permission_denied")
        case DeadlineExceeded():
            return Failed(408, message, "deadline_exceeded")
        case OrlaClosed():
            return Failed(503, "the server is shutting down", "server_error", BUSY_RETRY_S)
        case BackendUnavailable():
            return _unavailable(message, inflight)
        case BackendElsewhere():  # its client may ask the core of that pool, which the message names
            return Failed(421, message, "misdirected_request")
        case MappingError() if inflight is not None and _names_nothing(inflight):
            return _unknown(message, inflight)
        case MappingError() | ConfigError():
            return Failed(400, message)
        case PolicyError():
            return Failed(500, message)
        case UpstreamError():  # the others' words are the caller's answer
            where = f"backend {inflight.backend!r}" if inflight is not None else "the engine"
            return Failed(
                502, f"{where} refuses the key that this server has for it ({error.status})", "server_error"
            )
        case UpstreamSilent():
            return Failed(504, message, "server_error")
        case UpstreamGarbled():
            return Failed(502, message, "server_error")
    status = getattr(error, "status", 500 if isinstance(error, OrlaError) else None)
    if not isinstance(status, int):
        return None
    return Failed(status, message, _KINDS.get(status), getattr(error, "retry_after_s", None))


_KINDS = {
    401: "authentication_error",
    403: "permission_denied",
    421: "invalid_request_error",
    429: "rate_limit_exceeded",
}


def _names_nothing(inflight: InFlightCall) -> bool:
    """Whether a call was refused because nothing is known by the name of its model."""
    if inflight.assignment is not None:
        return False
    views = inflight.services.schedulers.views(inflight.call)
    return named_in_code(inflight.call.ask.model, views) is None


def _unknown(message: str, inflight: InFlightCall) -> Failed:
    """Return how a call of a model that nothing is known of is answered: a backend may yet say that it serves it."""
    schedulers = inflight.services.schedulers
    if silent := [name for name, scheduler in schedulers.items() if scheduler.health.probe is None]:
        return Failed(503, f"{message}; has not answered yet: {', '.join(silent)}", "server_error", BUSY_RETRY_S)
    return Failed(404, message, "model_not_found")


def _unavailable(message: str, inflight: InFlightCall | None) -> Failed:
    """Return how a call that reached no engine is answered: where each circuit is open, with when one is tried."""
    if inflight is not None and inflight.tried:
        services = inflight.services
        breakers = [services.schedulers[name].health.breaker for name in inflight.tried]
        if (left_s := min(breaker.retry_at_s for breaker in breakers) - services.clock()) > 0:
            return Failed(503, message, "server_error", left_s)
    return Failed(502, message, "server_error")


def denial(scope: Mapping[str, Any], denied: Denied) -> tuple[list[Header], bytes]:
    """Return headers and body of a refusal of the access layer (``serve.http.guard``), as its caller reads errors."""
    said = Failed(denied.status, denied.message, _KINDS.get(denied.status), denied.retry_after_s)
    headers, content = refusal(said, wire_at(scope["path"]) or CHAT)
    if named := request_id(dict(scope["headers"]), ""):
        headers.append((b"x-request-id", named))
    return headers, content


def refusal(said: Failed, wire: Wire) -> tuple[list[Header], bytes]:
    """Return headers and body of an answer that says why there is none, in the caller's wire."""
    content = json.dumps(wire.error(said.status, said.message, kind=said.kind)).encode()
    headers = [JSON]
    if said.retry_after_s is not None and math.isfinite(said.retry_after_s):
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(said.retry_after_s))))
    if _is_final(said):
        headers.append(FINAL)
    return headers, content


def _is_final(said: Failed) -> bool:
    """Whether trying again is in vain, which the clients' libraries do by themselves after a 408 and a 429."""
    if said.kind == "insufficient_quota":
        return said.retry_after_s is None or said.retry_after_s > RETRIED_WITHIN_S
    return said.kind == "deadline_exceeded"
