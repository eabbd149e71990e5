"""One HTTP request of a model's client, to be sent to whichever backend is chosen.

It goes in the caller's wire where the backend's engine speaks it, else as a chat completion. What comes back is a
response of the caller's HTTP library, an engine's final error too: the caller's client makes its own error of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import lru_cache
from typing import Any

import httpx2

from orla_lg.clients import translation
from orla_lg.clients.asked import Asked
from orla_lg.clients.backend_request import BackendRequest, address_of, request_to
from orla_lg.clients.libraries import HTTPX2, Answered
from orla_lg.clients.sending import PassedBy
from orla_lg.core.engine.retry import AttemptFailed
from orla_lg.core.inflight import InFlightCall
from orla_lg.errors import BackendUnavailable
from orla_lg.openai_api.client import NO_KEY, EngineClients
from orla_lg.openai_api.failures import failed_status
from orla_lg.openai_api.home import TRACE, Upgrade
from orla_lg.wires import reading
from orla_lg.wires.tap import TAP, AsyncTappedStream, Tap, TappedStream
from orla_lg.wires.watching import AnswerWatch, Late
from orla_lg.wires.wire import Wire

EngineRequest = BackendRequest[EngineClients]
"""One request as it is sent to one backend."""

FAILURES = (BackendUnavailable, json.JSONDecodeError, reading.Garbage, httpx2.HTTPError)
"""What an attempt may fail with before anything of an answer has reached the caller, beside an error's status."""

_FRAMES = frozenset({b"content-encoding", b"content-length", b"transfer-encoding"})
"""Headers that say how an engine's bytes came, where others go on."""

_OF_THE_BODY = _FRAMES | {b"content-type"}

SHOWN_CHARS = 500
"""Of an engine's error, in records."""


class ErrorStatus(Exception):
    """An engine answered with an error.

    Args:
        response: The engine's, read.
    """

    def __init__(self, response: httpx2.Response) -> None:
        self.text = response.text
        super().__init__(f"{response.status_code} - {self.text[:SHOWN_CHARS]}")
        self.status = response.status_code
        self.response: Any = response
        """The caller's, once it is final."""


class HttpSender:
    """One request.

    Args:
        clients: The clients of each backend, by name.
        asked: The request.
        original: Sends it as the code meant it.
        max_attempts: So often the caller's client would try.
        passes_back: Whether the caller's client sends a request that goes where its code says.
        watch: Hears the answer as it comes.
    """

    def __init__(
        self,
        clients: Mapping[str, EngineClients],
        asked: Asked,
        original: Callable[[], Any],
        *,
        max_attempts: int,
        passes_back: bool,
        watch: AnswerWatch | None = None,
    ) -> None:
        self.max_attempts = max_attempts
        self._clients = clients
        self._asked = asked
        self._original = original
        self._passes_back = passes_back
        self._watch = watch

    def send(self, inflight: InFlightCall) -> Any:
        """Send from this thread."""
        if inflight.external:
            if self._passes_back:
                return PassedBy(inflight, self._asked.body)
            response = self._original()
            inflight.finish()
            return response
        outgoing = self._outgoing(inflight)
        try:
            try:
                return self._send_once(inflight, outgoing)
            except ErrorStatus as refusal:
                if not outgoing.may_cause(refusal.status, refusal.text):
                    raise
                response = self._send_once(inflight, outgoing.without_ours())
                outgoing.refused(refusal.status, refusal.text)
                return response
        except (ErrorStatus, *FAILURES) as error:
            self._give_up(inflight, outgoing, error)

    def _send_once(self, inflight: InFlightCall, outgoing: EngineRequest) -> Any:
        tap, traced = _tap(inflight, outgoing, self._watch), _traced(inflight)
        token, began_s = TAP.set(tap), time.perf_counter()
        try:
            try:
                response = outgoing.to.sync().http.send(_request(outgoing, self._asked, traced), stream=True)
            except Upgrade:
                outgoing.to.upgrade()
                response = outgoing.to.sync().http.send(_request(outgoing, self._asked, traced), stream=True)
        finally:
            TAP.reset(token)
        try:
            if not response.is_success:
                response.read()
                raise ErrorStatus(response)
            if isinstance(tap.stream, TappedStream) and tap.mode == "stream":
                tap.stream.prime()
                made = self._streamed(inflight, outgoing, response, began_s)
            else:
                made = self._whole(outgoing, response, response.read(), began_s)
        except BaseException:
            response.close()
            raise
        tap.hand_over()
        return made

    async def asend(self, inflight: InFlightCall) -> Any:
        """Send from this task."""
        if inflight.external:
            if self._passes_back:
                return PassedBy(inflight, self._asked.body)
            response = await self._original()
            inflight.finish()
            return response
        outgoing = self._outgoing(inflight)
        try:
            try:
                return await self._asend_once(inflight, outgoing)
            except ErrorStatus as refusal:
                if not outgoing.may_cause(refusal.status, refusal.text):
                    raise
                response = await self._asend_once(inflight, outgoing.without_ours())
                outgoing.refused(refusal.status, refusal.text)
                return response
        except (ErrorStatus, *FAILURES) as error:
            self._give_up(inflight, outgoing, error)

    async def _asend_once(self, inflight: InFlightCall, outgoing: EngineRequest) -> Any:
        tap, traced = _tap(inflight, outgoing, self._watch), _traced(inflight)
        token, began_s = TAP.set(tap), time.perf_counter()
        try:
            try:
                response = await outgoing.to.on_loop().http.send(_request(outgoing, self._asked, traced), stream=True)
            except Upgrade:
                outgoing.to.upgrade()
                response = await outgoing.to.on_loop().http.send(_request(outgoing, self._asked, traced), stream=True)
        finally:
            TAP.reset(token)
        try:
            if not response.is_success:
                await response.aread()
                raise ErrorStatus(response)
            if isinstance(tap.stream, AsyncTappedStream) and tap.mode == "stream":
                await tap.stream.prime()
                made = self._streamed(inflight, outgoing, response, began_s)
            else:
                made = self._whole(outgoing, response, await response.aread(), began_s)
        except BaseException:
            await response.aclose()
            raise
        tap.hand_over()
        return made

    # What goes out

    def _outgoing(self, inflight: InFlightCall) -> EngineRequest:
        assert inflight.scheduler is not None
        return request_to(self._clients[inflight.scheduler.backend.name], inflight, self._asked)

    # What comes back

    def _streamed(
        self, inflight: InFlightCall, outgoing: EngineRequest, response: httpx2.Response, began_s: float
    ) -> Any:
        asked, turning, content_type = self._asked, None, None
        if asked.library is HTTPX2 and not outgoing.translates:
            return _as_the_callers(response, asked)
        if outgoing.translates:
            turning = translation.StreamTranslation(inflight, asked.wire, asked.body)
            content_type = translation.CONTENT_TYPES[asked.wire.framing]
        library = asked.library
        kind = library.sync if isinstance(response.stream, httpx2.SyncByteStream) else library.asynchronous
        answered = _answered(response, began_s, content_type)
        stream = kind(response, asked.request, turning)
        return library.streamed(answered, stream, asked.request, asked.encoding)

    def _whole(self, outgoing: EngineRequest, response: httpx2.Response, content: bytes, began_s: float) -> Any:
        asked, content_type = self._asked, None
        if asked.library is HTTPX2 and not (outgoing.translates or asked.unread):
            return _as_the_callers(response, asked)
        if outgoing.translates:
            content, content_type = translation.answer(content, asked.wire, asked.body), b"application/json"
        answered = _answered(response, began_s, content_type)
        return asked.library.whole(answered, content, asked.request, asked.encoding, unread=asked.unread)

    def _refused(self, outgoing: EngineRequest, error: ErrorStatus) -> Any:
        asked, response, content_type = self._asked, error.response, None
        content = response.content
        if outgoing.translates:
            content = translation.refusal(content, error.status, asked.wire)
            content_type = b"application/json"
        answered = _answered(response, time.perf_counter(), content_type)
        return asked.library.whole(answered, content, asked.request, asked.encoding, unread=asked.unread)

    def _give_up(self, inflight: InFlightCall, outgoing: EngineRequest, error: Exception) -> Any:
        """Say how an attempt failed.

        Raises:
            AttemptFailed: Trying again may help.
            ErrorStatus: It cannot; the engine's answer is the caller's.
        """
        library, request = self._asked.library, self._asked.request
        if isinstance(error, BackendUnavailable):  # redirected to where it must not go
            raise AttemptFailed(error, elsewhere=True) from error
        if isinstance(error, ErrorStatus):
            status, headers = error.status, error.response.headers
            error.response = self._refused(outgoing, error)
            if (failure := failed_status(error, status, headers)) is not None:
                raise failure from error
            inflight.answered()
            raise error
        if isinstance(error, httpx2.HTTPError):
            mapped = library.error(error, request)
            timed_out = isinstance(error, httpx2.TimeoutException) and not isinstance(error, httpx2.ConnectTimeout)
            raise AttemptFailed(mapped, unreachable=not timed_out) from error
        raise AttemptFailed(library.failed("RemoteProtocolError", f"{error}", request)) from error


def _tap(inflight: InFlightCall, outgoing: EngineRequest, watch: AnswerWatch | None) -> Tap:
    early = outgoing.to.backend.early_tools
    if watch is not None and watch.wants_calls and (outgoing.mode == "plain" or not early):
        watch.comes_late(Late.CLIENT if early else Late.OFF)
    return Tap(inflight, outgoing.mode, hides=outgoing.hides, wire=outgoing.wire, watch=watch, early=early)


def _traced(inflight: InFlightCall) -> Mapping[str, str]:
    """Return the headers that tell the engine of the call's trace."""
    tracer = inflight.services.tracer
    return {} if tracer is None else tracer.sending(inflight.call, inflight.backend, inflight.attempts)


def _as_the_callers(response: httpx2.Response, asked: Asked) -> httpx2.Response:
    """Return an engine's response to a caller that knows the library, as the answer to the caller's own request."""
    response.request, response.default_encoding, response.history = asked.request, asked.encoding, []
    return response


def _answered(response: httpx2.Response, began_s: float, content_type: bytes | None) -> Answered:
    """Return what an engine answered, without what held for its own bytes only."""
    headers = response.headers.raw
    if content_type is not None:
        headers = [(name, value) for name, value in headers if name.lower() not in _OF_THE_BODY]
        headers.append((b"content-type", content_type))
    elif "content-encoding" in response.headers:  # of an error; what is tapped was unpacked
        headers = [(name, value) for name, value in headers if name.lower() not in _FRAMES]
    came = response.extensions
    said: dict[str, Any] = {name: came[name] for name in ("http_version", "reason_phrase") if name in came}
    return Answered(response.status_code, headers, timedelta(seconds=time.perf_counter() - began_s), said)


def _request(outgoing: EngineRequest, asked: Asked, traced: Mapping[str, str]) -> httpx2.Request:
    """Return the request to the engine."""
    clients, content = outgoing.to, outgoing.content()
    url = url_of(clients.backend.url, outgoing.wire)
    if query := asked.query(clients.query):
        url = url.copy_merge_params(query)
    headers = httpx2.Headers(_headers(outgoing, url, asked.headers(clients.headers)))
    headers["Content-Length"] = str(len(content))
    if traced:
        for name in TRACE & headers.keys():
            del headers[name]
        headers.update(traced)
    return httpx2.Request(
        "POST", url, headers=headers, stream=httpx2.ByteStream(content), extensions={"timeout": dict(asked.timeouts)}
    )


def _headers(outgoing: EngineRequest, url: httpx2.URL, carried: tuple[tuple[bytes, bytes], ...]) -> httpx2.Headers:
    """Return the headers but the content's length; they are mostly those of the request before."""
    clients, wire = outgoing.to, outgoing.wire
    known = clients.headers_sent.get(wire.name)
    if known is not None and known[0] == carried:
        return known[1]
    headers = httpx2.Headers({"Host": url.netloc.decode("ascii"), "Content-Type": "application/json"})
    headers.update(carried)
    headers |= {"Accept-Encoding": "identity", "Connection": "keep-alive"}
    headers.update(wire.headers(clients.backend.api_key or NO_KEY))
    clients.headers_sent[wire.name] = carried, headers
    return headers


@lru_cache(maxsize=256)
def url_of(base: str, wire: Wire) -> httpx2.URL:
    """Return where a backend serves *wire*, whose OpenAI-compatible base is *base*."""
    return httpx2.URL(address_of(base, wire))
