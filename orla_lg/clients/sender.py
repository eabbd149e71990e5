"""One HTTP request of a model's client, to be sent to whichever backend is chosen.

It goes in the caller's wire where the backend's engine speaks it, else as a chat completion. What comes back is a
response of the caller's HTTP library, an engine's final error too: the caller's client makes its own error of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from functools import lru_cache
from typing import Any, NamedTuple

import httpx2

from orla_lg.clients import translation
from orla_lg.clients.asked import Asked
from orla_lg.clients.fitting import untranslatable
from orla_lg.clients.libraries import HTTPX2, Answered
from orla_lg.clients.sending import PassedBy
from orla_lg.core.call import OBJECT
from orla_lg.core.engine.backend import with_fields
from orla_lg.core.engine.retry import AttemptFailed
from orla_lg.core.inflight import InFlightCall
from orla_lg.errors import BackendUnavailable
from orla_lg.openai_api.client import NO_KEY, EngineClients
from orla_lg.openai_api.dialect import STREAM_OPTIONS, Dialect, may_refuse, parted
from orla_lg.openai_api.failures import failed_status
from orla_lg.openai_api.home import Upgrade
from orla_lg.wires import chat, reading
from orla_lg.wires.chat import CHAT
from orla_lg.wires.tap import TAP, AsyncTappedStream, Hides, Mode, Tap, TappedStream
from orla_lg.wires.wire import Untranslatable, Wire

FAILURES = (BackendUnavailable, json.JSONDecodeError, reading.Garbage, httpx2.HTTPError)
"""What an attempt may fail with before anything of an answer has reached the caller, beside an error's status."""

_FRAMES = frozenset({b"content-encoding", b"content-length", b"transfer-encoding"})
"""Headers that say how an engine's bytes came, where others go on."""

_OF_THE_BODY = _FRAMES | {b"content-type"}

_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

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
    """

    def __init__(
        self,
        clients: Mapping[str, EngineClients],
        asked: Asked,
        original: Callable[[], Any],
        *,
        max_attempts: int,
        passes_back: bool,
    ) -> None:
        self.max_attempts = max_attempts
        self._clients = clients
        self._asked = asked
        self._original = original
        self._passes_back = passes_back

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
                if not outgoing.may_cause(refusal):
                    raise
                response = self._send_once(inflight, self._without_ours(outgoing))
                outgoing.refused(refusal)
                return response
        except (ErrorStatus, *FAILURES) as error:
            self._give_up(inflight, outgoing, error)

    def _send_once(self, inflight: InFlightCall, outgoing: EngineRequest) -> Any:
        tap = Tap(inflight, outgoing.mode, hides=outgoing.hides, wire=outgoing.wire)
        token, began_s = TAP.set(tap), time.perf_counter()
        try:
            try:
                response = outgoing.clients.sync().http.send(outgoing.request(), stream=True)
            except Upgrade:
                outgoing.clients.upgrade()
                response = outgoing.clients.sync().http.send(outgoing.request(), stream=True)
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
                if not outgoing.may_cause(refusal):
                    raise
                response = await self._asend_once(inflight, self._without_ours(outgoing))
                outgoing.refused(refusal)
                return response
        except (ErrorStatus, *FAILURES) as error:
            self._give_up(inflight, outgoing, error)

    async def _asend_once(self, inflight: InFlightCall, outgoing: EngineRequest) -> Any:
        tap = Tap(inflight, outgoing.mode, hides=outgoing.hides, wire=outgoing.wire)
        token, began_s = TAP.set(tap), time.perf_counter()
        try:
            try:
                response = await outgoing.clients.on_loop().http.send(outgoing.request(), stream=True)
            except Upgrade:
                outgoing.clients.upgrade()
                response = await outgoing.clients.on_loop().http.send(outgoing.request(), stream=True)
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
        assert inflight.scheduler is not None and inflight.assignment is not None and inflight.model is not None
        asked, clients = self._asked, self._clients[inflight.scheduler.backend.name]
        wire = asked.wire_for(inflight.scheduler)
        mode: Mode = "stream" if asked.wire.streams(asked.body) else "plain"
        meant = asked.body if wire is asked.wire else self._translated(inflight, mode)
        said = wire.with_model(meant, inflight.model, inflight.assignment.parameters)
        self._note_prompt(inflight, said, wire)
        dialect = clients.dialect_of(wire.name)
        fields: Mapping[str, Any] = {} if wire.embeds else wire.fields(inflight.request_fields())
        if dialect.refused:
            fields = dialect.without_refused(fields)
        body = with_fields(said, fields)
        body["model"] = said["model"]
        guards, added = parted(fields, said)
        hides: Hides | None = None
        options = body.get(STREAM_OPTIONS) or {}
        wants = mode == "stream" and wire.counts_on_demand and STREAM_OPTIONS not in dialect.refused
        counts = inflight.counts_streams or not asked.wire.counts_on_demand  # such a stream always ends with counts
        if wants and counts and isinstance(options, OBJECT) and not options.get("include_usage"):
            body[STREAM_OPTIONS] = {**options, "include_usage": True}
            added.add(STREAM_OPTIONS)
            hides = chat.is_usage_only if wire is asked.wire else None
        return EngineRequest(clients, dialect, asked, wire, body, mode, hides, added, said, guards)

    def _translated(self, inflight: InFlightCall, mode: Mode) -> Mapping[str, Any]:
        """Return the request as a chat completion's, streamed where the caller's is."""
        try:
            said = {name: value for name, value in self._asked.translated.items() if name != "stream"}
        except Untranslatable as error:  # known to the mapping already, unless the engine became another one since
            raise untranslatable(inflight, self._asked, error) from error
        return {**said, "stream": True} if mode == "stream" else said

    def _note_prompt(self, inflight: InFlightCall, said: Mapping[str, Any], wire: Wire) -> None:
        """Note what the request begins with, as a chat completion: so it may be warmed later."""
        if wire is CHAT:
            inflight.sends(said)
        elif wire.templated and not wire.embeds and self._asked.is_translatable:
            inflight.sends({**self._asked.translated, "model": said["model"]})

    def _without_ours(self, outgoing: EngineRequest) -> EngineRequest:
        """Return the same request with nothing added but what keeps workflows apart."""
        body = with_fields(outgoing.said, outgoing.guards)
        return outgoing._replace(body=body, hides=None, added=())

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


def _as_the_callers(response: httpx2.Response, asked: Asked) -> httpx2.Response:
    """Return an engine's response to a caller that knows the library, as the answer to the caller's own request."""
    response.request, response.default_encoding, response.history = asked.request, asked.encoding, []
    return response


def _written(body: Mapping[str, Any]) -> bytes:
    try:
        return _COMPACT.encode(body).encode()
    except UnicodeEncodeError:  # half a character, as JSON can escape it
        return json.dumps(body).encode()


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


class EngineRequest(NamedTuple):
    """One request as it is sent to one backend."""

    clients: EngineClients
    dialect: Dialect
    asked: Asked
    wire: Wire
    """The engine's."""
    body: Mapping[str, Any]
    mode: Mode
    hides: Hides | None
    """Events that the engine sends because of what we added, and that the caller does not get."""
    added: Collection[str]
    """Fields of the body that the caller did not ask for, and that may be left out."""
    said: Mapping[str, Any]
    """The body without them."""
    guards: Mapping[str, Any]
    """Fields that may not be left out."""

    @property
    def translates(self) -> bool:
        """Whether the engine is asked in another wire than the caller's."""
        return self.wire is not self.asked.wire

    def request(self) -> httpx2.Request:
        """Return the request to the engine."""
        clients, asked, content = self.clients, self.asked, _written(self.body)
        url = url_of(clients.backend.url, self.wire)
        if query := asked.query(clients.query):
            url = url.copy_merge_params(query)
        headers = httpx2.Headers(self._headers(url, asked.headers(clients.headers)))
        headers["Content-Length"] = str(len(content))
        return httpx2.Request(
            "POST", url, headers=headers, stream=httpx2.ByteStream(content),
            extensions={"timeout": dict(asked.timeouts)},
        )  # fmt: skip

    def _headers(self, url: httpx2.URL, carried: tuple[tuple[bytes, bytes], ...]) -> httpx2.Headers:
        """Return the headers but the content's length; they are mostly those of the request before."""
        clients, wire = self.clients, self.wire
        known = clients.headers_sent.get(wire.name)
        if known is not None and known[0] == carried:
            return known[1]
        headers = httpx2.Headers({"Host": url.netloc.decode("ascii"), "Content-Type": "application/json"})
        headers.update(carried)
        headers |= {"Accept-Encoding": "identity", "Connection": "keep-alive"}
        headers.update(wire.headers(clients.backend.api_key or NO_KEY))
        clients.headers_sent[wire.name] = carried, headers
        return headers

    def may_cause(self, refusal: ErrorStatus) -> bool:
        """Whether the engine may have refused what we added."""
        return may_refuse(self.added, refusal.status, refusal.text)

    def refused(self, refusal: ErrorStatus) -> None:
        """Note that the same request was taken without what we added."""
        self.dialect.learn(self.added, refusal.text, refusal.status)


@lru_cache(maxsize=256)
def url_of(base: str, wire: Wire) -> httpx2.URL:
    """Return where a backend serves *wire*, whose OpenAI-compatible base is *base*."""
    base, path = base.rstrip("/"), wire.path
    if path.startswith("v1/"):
        return httpx2.URL(f"{base}/{path.removeprefix('v1/')}")
    return httpx2.URL(f"{base.removesuffix('/v1')}/{path}")
