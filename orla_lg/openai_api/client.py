"""Step 6 on the OpenAI wire: clients per backend and loop, and one request carried."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

import httpx2
import openai

from orla_lg.core.backend import Backend, with_fields
from orla_lg.core.call import CallerTimeout
from orla_lg.core.dispatch import AttemptFailed
from orla_lg.core.flight import Flight
from orla_lg.openai_api import wire
from orla_lg.openai_api.tap import TAP, AsyncTappedStream, Mode, Tap, TappedStream, atap_response, tap_response

NO_KEY = "none"
"""Sent where a backend has no key: the SDK insists on one, engines without authentication ignore it."""

KEEP_ALIVE_S = 4.0
"""An idle connection is let go after so long: uvicorn (vLLM, SGLang) closes it after five seconds, and a request that
is sent at that very moment is lost."""

_SECRETS = ("authorization", "key", "token", "secret", "cookie", "openai-")
"""A caller's header with one of these in its name speaks of an account elsewhere and is not sent on."""
NO_REQUEST = httpx2.Request("POST", "/chat/completions")
"""The SDK's errors name a request; ours must not carry the caller's prompt."""
_RETRIED_STATUS = frozenset({408, 409, 429})


class EngineClient(openai.OpenAI):
    """The SDK's client for one backend; interception lets it through."""

    request = openai.OpenAI.request  # bound before anything replaces it on the base class


class AsyncEngineClient(openai.AsyncOpenAI):
    """``EngineClient`` for one event loop."""

    request = openai.AsyncOpenAI.request


class EngineClients:
    """The SDK clients of one backend: one for all threads, and one per event loop.

    A connection pool belongs to the loop that made it, and to the process: both are made anew when either
    is another one.
    """

    def __init__(self, backend: Backend, *, keep_alive: bool) -> None:
        self._backend = backend
        self._keep_alive = keep_alive
        self._lock = threading.Lock()
        self._sync: tuple[int, EngineClient] | None = None
        self._by_loop: dict[int, tuple[asyncio.AbstractEventLoop, AsyncEngineClient]] = {}

    def sync(self) -> EngineClient:
        """Return the client for threads."""
        kept = self._sync
        if kept is not None and kept[0] == os.getpid():
            return kept[1]
        with self._lock:
            if self._sync is None or self._sync[0] != os.getpid():
                http = openai.DefaultHttpxClient(**self._http_settings(), event_hooks={"response": [tap_response]})
                self._sync = (os.getpid(), EngineClient(**self._settings(), http_client=http))
            return self._sync[1]

    def on_loop(self) -> AsyncEngineClient:
        """Return the client for the running loop."""
        loop = asyncio.get_running_loop()
        kept = self._by_loop.get(id(loop))
        if kept is not None and kept[0] is loop:
            return kept[1]
        with self._lock:
            self._by_loop = {key: pair for key, pair in self._by_loop.items() if not pair[0].is_closed()}
            http = openai.DefaultAsyncHttpxClient(**self._http_settings(), event_hooks={"response": [atap_response]})
            client = AsyncEngineClient(**self._settings(), http_client=http)
            self._by_loop[id(loop)] = (loop, client)
            return client

    def _settings(self) -> dict[str, Any]:
        # Retries are ours: each is an attempt of one call, in our queue, and in its record.
        return {
            "api_key": self._backend.api_key or NO_KEY,
            "base_url": self._backend.url,
            "max_retries": 0,
            # What is tapped must not be compressed.
            "default_headers": {"Accept-Encoding": "identity"},
        }

    def _http_settings(self) -> dict[str, Any]:
        limits = httpx2.Limits(
            max_connections=None,
            max_keepalive_connections=None if self._keep_alive else 0,
            keepalive_expiry=KEEP_ALIVE_S,
        )
        # Without TLS there is nothing to verify, and loading certificates for each loop costs 20 ms.
        return {"limits": limits, "verify": self._backend.url.startswith("https")}

    def close(self) -> None:
        """Close what can be closed from here; other loops close theirs when they next run."""
        with self._lock:
            if self._sync is not None and self._sync[0] == os.getpid():
                self._sync[1].close()
            for loop, client in self._by_loop.values():
                if loop.is_running():
                    asyncio.run_coroutine_threadsafe(client.close(), loop)
            self._sync, self._by_loop = None, {}


Original = Callable[[], Any]


class SdkSender:
    """One ``request`` of the OpenAI SDK, to be sent to whichever backend is chosen.

    Args:
        clients: The clients of each backend, by name.
        caller: The SDK client that the code called.
        original: Sends the request as the code meant it.
        options: The SDK's request options.
        form: The SDK's other arguments (``cast_to``, ``stream``, ``stream_cls``).
        assemble: Stream from the engine even where the caller does not, to see the first token.
    """

    def __init__(
        self,
        clients: Mapping[str, EngineClients],
        caller: openai.OpenAI | openai.AsyncOpenAI,
        original: Original,
        options: Any,
        form: Mapping[str, Any],
        *,
        assemble: bool,
    ) -> None:
        self.max_attempts = 1 + options.get_max_retries(caller.max_retries)
        self._clients = clients
        self._caller = caller
        self._original = original
        self._options = options
        self._form = form
        self._may_assemble = assemble

    def send(self, flight: Flight) -> Any:
        """Send from this thread."""
        if flight.external:
            response = self._original()
            flight.finish()
            return response
        assert flight.backend is not None
        client = self._clients[flight.backend].sync()
        with self._tapped(flight) as (tap, options):
            response = client.request(options=options, **self._form)
            if isinstance(tap.stream, TappedStream) and tap.mode == "stream":
                tap.stream.prime()
        tap.hand_over()
        return response

    async def asend(self, flight: Flight) -> Any:
        """Send from this task."""
        if flight.external:
            response = await self._original()
            flight.finish()
            return response
        assert flight.backend is not None
        client = self._clients[flight.backend].on_loop()
        with self._tapped(flight) as (tap, options):
            response = await client.request(options=options, **self._form)
            if isinstance(tap.stream, AsyncTappedStream) and tap.mode == "stream":
                await tap.stream.prime()
        tap.hand_over()
        return response

    @contextmanager
    def _tapped(self, flight: Flight) -> Iterator[tuple[Tap, Any]]:
        fields = flight.request_fields()
        body, mode, strip = self._body(flight, fields)
        tap = Tap(flight, mode, strip_usage=strip)
        token = TAP.set(tap)
        try:
            yield tap, self._rewritten(body, fields)
        except json.JSONDecodeError as error:
            raise AttemptFailed(error) from error
        except wire.Garbage as error:
            raise AttemptFailed(openai.APIError(str(error), NO_REQUEST, body=error.body)) from error
        except httpx2.HTTPError as error:  # while the stream was primed
            raise attempt_failed(_as_sdk_error(error)) or error from error
        except openai.APIError as error:
            failure = attempt_failed(error)
            if failure is None:
                flight.answered()
                raise
            if tap.begun:
                flight.broke(error)
                raise
            raise failure from error
        finally:
            TAP.reset(token)

    def _body(self, flight: Flight, fields: Mapping[str, Any]) -> tuple[dict[str, Any], Mode, bool]:
        asked = {**self._parameters(flight), **self._options.json_data, "model": flight.model}
        flight.sends(asked)
        body = {**with_fields(asked, fields), "model": flight.model}
        mode: Mode = "stream" if body.get("stream") else "plain"
        if self._may_assemble and wire.can_assemble(body):
            mode, body["stream"] = "assemble", True
        streams = body.get("stream_options") or {}
        strip = mode == "stream" and not streams.get("include_usage") and flight.counts_streams
        if strip or mode == "assemble":
            body["stream_options"] = {**streams, "include_usage": True}
        return body, mode, strip

    def _parameters(self, flight: Flight) -> Mapping[str, Any]:
        """Return what the mapping sets, but not against what the caller gave under either of a field's names."""
        given = dict(flight.parameters)
        given |= given.pop("extra_body", {})
        limits = {"max_tokens", "max_completion_tokens"}
        if limits & set(self._options.json_data):
            given = {name: value for name, value in given.items() if name not in limits}
        return given

    def _rewritten(self, body: dict[str, Any], fields: Mapping[str, Any]) -> Any:
        extra = self._options.extra_json
        if extra:  # the SDK lays the caller's ``extra_body`` over the body, whole objects over ours
            hidden = {name: value for name, value in fields.items() if name in extra and isinstance(value, Mapping)}
            extra = with_fields(extra, hidden)
        options = self._options.model_copy(update={"json_data": body, "extra_json": extra})
        if isinstance(options.timeout, openai.NotGiven):
            options.timeout = self._caller.timeout
        if isinstance(options.headers, Mapping):
            options.headers = {name: value for name, value in options.headers.items() if not _is_secret(name)}
        options.max_retries = 0
        return options


def timeout_of(caller: openai.OpenAI | openai.AsyncOpenAI, options: Any) -> CallerTimeout | None:
    """Return how long the caller's client would wait for an answer of an engine; ``None``: without end."""
    given = caller.timeout if isinstance(options.timeout, openai.NotGiven) else options.timeout
    seconds = given if isinstance(given, int | float) else getattr(given, "read", None)
    return None if seconds is None else CallerTimeout(seconds, _timed_out)


def _timed_out(waited_for: str) -> openai.APITimeoutError:
    error = openai.APITimeoutError(request=NO_REQUEST)
    error.add_note(waited_for)
    return error


def _is_secret(header: str) -> bool:
    return any(part in header.lower() for part in _SECRETS)


def attempt_failed(error: openai.APIError) -> AttemptFailed | None:
    """Return how *error* counts as a failed attempt; ``None`` where trying again cannot help."""
    if isinstance(error, openai.APITimeoutError):
        return AttemptFailed(error, unreachable=isinstance(error.__cause__, httpx2.ConnectTimeout))
    if isinstance(error, openai.APIConnectionError):
        return AttemptFailed(error, unreachable=True)
    if not isinstance(error, openai.APIStatusError):
        return None
    status, retry_after_s = error.status_code, _retry_after_s(error.response.headers.get("retry-after"))
    if status == HTTPStatus.NOT_FOUND:
        return AttemptFailed(error, elsewhere=True)
    if status in _RETRIED_STATUS or status >= 500:
        overloaded = status == HTTPStatus.TOO_MANY_REQUESTS or (status == 503 and retry_after_s is not None)
        return AttemptFailed(error, overloaded=overloaded, retry_after_s=retry_after_s)
    return None


def _as_sdk_error(error: httpx2.HTTPError) -> openai.APIConnectionError:
    """Return what the SDK would have raised, had it been reading the stream."""
    if isinstance(error, httpx2.TimeoutException):
        return openai.APITimeoutError(request=NO_REQUEST)
    return openai.APIConnectionError(message=f"{type(error).__name__}: {error}", request=NO_REQUEST)


def _retry_after_s(header: str | None) -> float | None:
    """Return a ``Retry-After`` header in seconds, whether it gives seconds or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None
