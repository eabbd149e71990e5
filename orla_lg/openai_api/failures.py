"""What an attempt's failure means: whether another attempt may succeed, where, and after which pause."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import NoReturn

import httpx2
import openai

from orla_lg.core.engine.retry import NEVER_S, NOT_IMPLEMENTED, AttemptFailed
from orla_lg.core.inflight import InFlightCall
from orla_lg.errors import BackendUnavailable
from orla_lg.wires import reading

NO_REQUEST = httpx2.Request("POST", "/chat/completions")
"""The SDK's errors name a request; ours must not carry the caller's prompt."""

_RETRIED_STATUS = frozenset({408, 409, 429})
_INFINITIES = frozenset({"inf", "+inf", "infinity", "+infinity"})


FAILURES = (BackendUnavailable, json.JSONDecodeError, reading.Garbage, httpx2.HTTPError, openai.APIError)
"""What an attempt may fail with before anything of an answer has reached the caller."""


def give_up(inflight: InFlightCall, error: Exception) -> NoReturn:
    """Say how an attempt failed, by its *error*, which is one of ``FAILURES``.

    Raises:
        AttemptFailed: Trying again may help.
        openai.APIError: It cannot.
    """
    if isinstance(error, BackendUnavailable):  # redirected to where it must not go
        raise AttemptFailed(error, elsewhere=True) from error
    if isinstance(error, json.JSONDecodeError):
        raise AttemptFailed(error) from error
    if isinstance(error, reading.Garbage):
        raise AttemptFailed(openai.APIError(str(error), NO_REQUEST, body=error.body)) from error
    if isinstance(error, httpx2.HTTPError):  # while the stream was primed
        raise attempt_failed(_as_sdk_error(error)) or error from error
    if isinstance(error, openai.APIError) and (failure := attempt_failed(error)) is not None:
        raise failure from error
    inflight.answered()
    raise error


def attempt_failed(error: openai.APIError) -> AttemptFailed | None:
    """Return how *error* counts as a failed attempt; ``None`` where trying again cannot help."""
    if isinstance(error, openai.APITimeoutError):
        return AttemptFailed(error, unreachable=isinstance(error.__cause__, httpx2.ConnectTimeout))
    if isinstance(error, openai.APIConnectionError):
        return AttemptFailed(error, unreachable=True)
    if not isinstance(error, openai.APIStatusError):
        return None
    return failed_status(error, error.status_code, error.response.headers)


def failed_status(error: Exception, status: int, headers: Mapping[str, str]) -> AttemptFailed | None:
    """Return how an answer with an error's *status* counts as a failed attempt; ``None`` where it is final."""
    again, retry_after_s = headers.get("x-should-retry"), _retry_after_s(headers)
    if status == HTTPStatus.NOT_FOUND and again != "true":
        return AttemptFailed(error, elsewhere=True)
    if status in _RETRIED_STATUS or status >= 500 or again == "true":
        overloaded = (
            status == HTTPStatus.TOO_MANY_REQUESTS
            or (status == HTTPStatus.SERVICE_UNAVAILABLE and retry_after_s is not None)
            or status in NOT_IMPLEMENTED
            or not (status in _RETRIED_STATUS or status >= 500)
        )
        return AttemptFailed(
            error, overloaded=overloaded, retry_after_s=NEVER_S if again == "false" else retry_after_s
        )
    return None


def _as_sdk_error(error: httpx2.HTTPError) -> openai.APIConnectionError:
    """Return what the SDK would have raised, had it been reading the stream."""
    if isinstance(error, httpx2.TimeoutException):
        return openai.APITimeoutError(request=NO_REQUEST)
    return openai.APIConnectionError(message=f"{type(error).__name__}: {error}", request=NO_REQUEST)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the pause that a server asks for, in seconds, by the headers that the SDK heeds."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            asked = float(headers[name])
        except (KeyError, ValueError):
            continue
        if math.isinf(asked) and headers[name].strip().lower() not in _INFINITIES:  # a number beyond all numbers
            return NEVER_S
        return max(0.0, asked * unit_s)
    try:
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError):
        return None
