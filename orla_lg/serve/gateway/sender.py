"""One request of the gateway, to be sent to whichever backend is chosen.

It goes in the caller's wire where the backend's engine speaks it, else as a chat completion. A stream is read up to
its first event before its caller gets anything: an engine that dies during prefill is found out while the call can
still be tried elsewhere.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

import aiohttp
import httpx2

from orla_lg.clients import translation
from orla_lg.clients.backend_request import BackendRequest, request_to
from orla_lg.clients.question import Question
from orla_lg.core.engine.retry import NEVER_S, NOT_IMPLEMENTED, AttemptFailed
from orla_lg.core.inflight import InFlightCall
from orla_lg.errors import BackendUnavailable
from orla_lg.openai_api.failures import failed_status
from orla_lg.openai_api.home import carries, query_among
from orla_lg.serve.gateway.answers import JSON, Header, UpstreamError, UpstreamGarbled, UpstreamSilent, kept
from orla_lg.serve.gateway.silence import SilenceBound, SilenceWatch
from orla_lg.serve.gateway.upstream import BackendLink, BackendLinks, Carried
from orla_lg.wires import reading
from orla_lg.wires.tap import Tap

FAILURES = (
    aiohttp.ClientError,
    TimeoutError,
    httpx2.HTTPError,
    json.JSONDecodeError,
    reading.Garbage,
    BackendUnavailable,
)
"""What an attempt may fail with before anything of an answer has reached the caller, beside an error's status."""

NO_SUCH_ROUTE = (404, 405, 501)
"""What a server answers at a path that it does not have."""

_CONNECTING = (aiohttp.ConnectionTimeoutError,)

_AT_ONCE: tuple[Header, ...] = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))

Outgoing = BackendRequest[BackendLink]


@dataclass(eq=False, slots=True, weakref_slot=True)
class EngineReply:
    """What goes back to the caller; a stream is read on from ``response``."""

    headers: list[Header]
    content: bytes
    """All of the answer, or the beginning of a stream."""
    tap: Tap
    response: aiohttp.ClientResponse | None = None
    """``None``: there is no more of it."""
    turning: translation.StreamTranslation | None = None
    reading: bool = False
    """Whether it is waited for the engine, and not for the caller."""
    over: bool = False
    """Whether the engine has said all."""

    async def more(self) -> bytes | None:
        """Return what comes next of a stream, which may be nothing; ``None`` after its end.

        Raises:
            Exception: It broke off.
        """
        tap, response, turning = self.tap, self.response, self.turning
        if response is None or self.over:
            return None
        try:
            try:
                self.reading = True
                data = await response.content.readany()
                self.reading = False
                if data:
                    passing = tap.feed(data)
                    return passing if turning is None or not passing else turning.feed(passing)
            except (aiohttp.ClientError, TimeoutError):
                if not tap.ended:
                    raise
            self.over = True
            return _closing(tap, turning, response)
        except Exception as error:  # whatever broke it, the call ends with it
            tap.broke(error)
            raise

    def silent(self) -> None:
        """Note that for too long nothing came: of the engine, or the caller took nothing."""
        if self.reading:
            self.tap.broke(UpstreamSilent("the engine said nothing for too long"))

    def close(self) -> None:
        """Let go of the engine: a stream that is not at its end is ended there too."""
        if self.response is not None:
            if self.tap.complete:
                self.response.release()
            else:
                self.response.close()
            self.tap.closed()


def _closing(tap: Tap, turning: translation.StreamTranslation | None, response: aiohttp.ClientResponse) -> bytes:
    last = tap.last(response)  # type: ignore[arg-type]  # of a response it reads but the headers
    return last if turning is None else turning.feed(last) + turning.end()


class GatewaySender:
    """One request.

    Args:
        links: To the backends.
        question: The request.
        raw_headers: Of the caller.
        query: Of the caller.
        max_attempts: So often it is tried.
        silence: How long an engine may say nothing.
    """

    def __init__(
        self,
        links: BackendLinks,
        question: Question,
        raw_headers: list[Header],
        query: list[tuple[str, str]],
        max_attempts: int,
        silence: SilenceWatch,
    ) -> None:
        self.max_attempts = max_attempts
        self._links = links
        self._silence = silence
        self._question = question
        self._raw_headers = raw_headers
        self._query = query

    def send(self, inflight: InFlightCall) -> Any:
        """Refuse: the gateway has one loop, and no thread of a caller."""
        raise RuntimeError("a request of the gateway is sent from its event loop")

    async def asend(self, inflight: InFlightCall) -> EngineReply:
        """Send from this task."""
        assert inflight.scheduler is not None
        outgoing = request_to(self._links.of(inflight.scheduler), inflight, self._question)
        try:
            try:
                return await self._send_once(inflight, outgoing)
            except UpstreamError as refusal:
                if not outgoing.may_cause(refusal.status, refusal.text):
                    raise
                reply = await self._send_once(inflight, outgoing.without_ours())
                outgoing.refused(refusal.status, refusal.text)
                return reply
        except UpstreamError as error:
            _refused(inflight, outgoing, error)
        except FAILURES as error:
            _failed(error)

    async def _send_once(self, inflight: InFlightCall, outgoing: Outgoing) -> EngineReply:
        with self._silence.bound() as bound:
            return await self._answer_to(inflight, outgoing, bound)

    async def _answer_to(self, inflight: InFlightCall, outgoing: Outgoing, bound: SilenceBound) -> EngineReply:
        tap = Tap(inflight, outgoing.mode, hides=outgoing.hides, wire=outgoing.wire)
        tracer = inflight.services.tracer
        traced = None if tracer is None else tracer.sending(inflight.call, inflight.backend, inflight.attempts)
        response = await outgoing.to.send(outgoing, self._carried(outgoing), self._carried_query(outgoing), traced)
        bound.heard = True
        try:
            if not 200 <= response.status < 300:
                raise UpstreamError(response.status, response.raw_headers, await response.read())
            headers = kept(response.raw_headers)
            if outgoing.mode == "plain":
                content = await response.read()
                content = tap.feed(content) + tap.last(response)  # type: ignore[arg-type]
                if outgoing.translates:
                    content = translation.answer(content, self._question.wire, self._question.body)
                    headers.append(JSON)
                else:
                    headers.append(_content_type(response))
                return EngineReply(headers, content, tap)
            return await self._begun(inflight, outgoing, response, tap, headers)
        except BaseException:
            response.close()
            raise

    async def _begun(
        self,
        inflight: InFlightCall,
        outgoing: Outgoing,
        response: aiohttp.ClientResponse,
        tap: Tap,
        headers: list[Header],
    ) -> EngineReply:
        """Read a stream up to its first event."""
        question, turning = self._question, None
        if outgoing.translates:
            turning = translation.StreamTranslation(inflight, question.wire, question.body)
            headers.append((b"content-type", translation.CONTENT_TYPES[question.wire.framing]))
        else:
            headers.append(_content_type(response))
        _pass_at_once(headers)
        primed = b""
        while not tap.begun:
            data = await response.content.readany()
            if not data:
                return EngineReply(headers, primed + _closing(tap, turning, response), tap)
            passing = tap.feed(data)
            primed += passing if turning is None else turning.feed(passing)
        return EngineReply(headers, primed, tap, response, turning)

    def _carried(self, outgoing: Outgoing) -> Carried:
        named = outgoing.to.named
        if outgoing.question.wire.carries:
            named |= outgoing.question.wire.carries
        return tuple([each for each in self._raw_headers if carries(each[0], named)])

    def _carried_query(self, outgoing: Outgoing) -> dict[str, Any]:
        return query_among(self._query, outgoing.to.query) if self._query else {}


def _pass_at_once(headers: list[Header]) -> None:
    """Have proxies between here and the caller pass a stream on as it comes, where the engine says nothing of it."""
    names = [name for name, _ in headers]
    headers.extend(each for each in _AT_ONCE if each[0] not in names)


def _content_type(response: aiohttp.ClientResponse) -> Header:
    return (b"content-type", response.headers.get("content-type", "application/json").encode("latin-1", "replace"))


def _refused(inflight: InFlightCall, outgoing: Outgoing, error: UpstreamError) -> NoReturn:
    """Say what an engine's error means: another attempt, or the caller's answer."""
    if error.status in NO_SUCH_ROUTE and not error.says_why():
        wire, name = outgoing.wire, outgoing.to.backend.name
        said = f"backend {name!r} does not serve {wire.title}: its engine answers {error.status} at /{wire.path}"
        error = UpstreamError(
            error.status,
            [JSON if each[0] == JSON[0] else each for each in error.headers],
            json.dumps(wire.error(error.status, said)).encode(),
        )
    if outgoing.translates:
        error.translated(outgoing.question.wire)
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in error.headers}
    if (failure := failed_status(error, error.status, headers)) is not None:
        if error.status in NOT_IMPLEMENTED and headers.get("x-should-retry") != "true":
            failure.retry_after_s = NEVER_S  # the caller is told so; a wrapped call is tried as often as without us
        raise failure from error
    inflight.answered()
    raise error


def _failed(error: Exception) -> NoReturn:
    """Say how an attempt failed that no engine answered."""
    if isinstance(error, BackendUnavailable):  # redirected to where it must not go
        raise AttemptFailed(error, elsewhere=True) from error
    if isinstance(error, TimeoutError) and not isinstance(error, _CONNECTING):
        raise AttemptFailed(UpstreamSilent("the engine said nothing for too long")) from error
    if isinstance(error, aiohttp.ClientError | TimeoutError | httpx2.HTTPError):
        raise AttemptFailed(BackendUnavailable(f"{type(error).__name__}: {error}"), unreachable=True) from error
    raise AttemptFailed(UpstreamGarbled(f"what the engine sent is no answer: {error}")) from error
