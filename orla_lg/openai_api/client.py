"""Step 6 on the OpenAI wire: clients per backend and loop, and one request carried."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import httpx2
import openai

from orla_lg.core.call import OBJECT, CallerTimeout
from orla_lg.core.engine.backend import Backend, with_fields
from orla_lg.core.inflight import InFlightCall
from orla_lg.openai_api.agreement import Agreement
from orla_lg.openai_api.dialect import STREAM_OPTIONS, Dialect, may_refuse, parted
from orla_lg.openai_api.failures import FAILURES, NO_REQUEST, give_up
from orla_lg.openai_api.home import Home, Upgrade, beside_trace, certificates, headers_of, query_of
from orla_lg.wires import chat
from orla_lg.wires.tap import TAP, AsyncTappedStream, Hides, Mode, Tap, TappedStream, atap_response, tap_response
from orla_lg.wires.watching import AnswerWatch, Late

NO_KEY = "none"
"""Sent where a backend has no key: the SDK insists on one, engines without authentication ignore it."""

KEEP_ALIVE_S = 4.0
"""An idle connection is let go after so long: uvicorn (vLLM, SGLang) closes it after five seconds, and a request that
is sent at that very moment is lost."""


PROGRAM = f"OpenAI/Python {openai.__version__}"
"""The program's name that engines get to know: the caller's SDK's."""


class EngineHttp(openai.DefaultHttpxClient):
    """The HTTP client for one backend; interception lets it through."""

    send = httpx2.Client.send  # bound before anything replaces it on the base class


class AsyncEngineHttp(openai.DefaultAsyncHttpxClient):
    """``EngineHttp`` for one event loop."""

    send = httpx2.AsyncClient.send


class EngineClient(openai.OpenAI):
    """The SDK's client for one backend; interception lets it through."""

    request = openai.OpenAI.request  # bound before anything replaces it on the base class
    user_agent = PROGRAM

    @property
    def http(self) -> httpx2.Client:
        """What it sends by, for requests that are not the SDK's."""
        return self._client


class AsyncEngineClient(openai.AsyncOpenAI):
    """``EngineClient`` for one event loop."""

    request = openai.AsyncOpenAI.request
    user_agent = PROGRAM

    @property
    def http(self) -> httpx2.AsyncClient:
        """What it sends by, for requests that are not the SDK's."""
        return self._client


class EngineClients:
    """The SDK clients of one backend: one for all threads, and one per event loop.

    A connection pool belongs to the loop that made it, and to the process: both are made anew when either
    is another one.
    """

    def __init__(self, backend: Backend, *, keep_alive: bool) -> None:
        self.backend = backend
        self.dialect = Dialect(backend)
        """Of its chat completions."""
        self._dialects = {"chat": self.dialect}
        self.agreement = Agreement(backend)
        """Whether its answers are the same when they are streamed."""
        self.headers = frozenset(name.lower() for name in backend.forward_headers)
        """What is carried of the caller's beyond what always is (``home.HEADERS``)."""
        self.query = frozenset(backend.forward_query)
        self.headers_sent: dict[str, tuple[object, httpx2.Headers]] = {}
        """Of the newest request on each wire that was not the SDK's: what was carried, and all headers."""
        self._home = Home(backend)
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
                http = EngineHttp(
                    **self._http_settings(),
                    event_hooks={"request": [self._home.heed_request], "response": [tap_response]},
                )
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
            http = AsyncEngineHttp(
                **self._http_settings(),
                event_hooks={"request": [self._home.aheed_request], "response": [atap_response]},
            )
            client = AsyncEngineClient(**self._settings(), http_client=http)
            self._by_loop[id(loop)] = (loop, client)
            return client

    def dialect_of(self, wire: str) -> Dialect:
        """Return what the engine turned out not to take on one wire, by the wire's name."""
        known = self._dialects.get(wire)
        return known or self._dialects.setdefault(wire, Dialect(self.backend))

    def _settings(self) -> dict[str, Any]:
        # Retries are ours: each is an attempt of one call, in our queue, and in its record.
        return {
            "api_key": self.backend.api_key or NO_KEY,
            "base_url": self.backend.url,
            "max_retries": 0,
        }

    def _http_settings(self) -> dict[str, Any]:
        limits = httpx2.Limits(
            max_connections=None,
            max_keepalive_connections=None if self._keep_alive else 0,
            keepalive_expiry=KEEP_ALIVE_S,
        )
        # What is tapped must not be compressed. The HTTP client's own headers cost a request less than the SDK's.
        return {
            "limits": limits,
            "verify": certificates() if self._home.verified else False,
            "headers": {"Accept-Encoding": "identity"},
        }

    def upgrade(self) -> None:
        """Ask with clients that verify certificates from now on: the backend redirects to TLS."""
        with self._lock:
            self._sync, self._by_loop = None, {}

    def abort(self) -> None:
        """End all requests under way, from any thread: their connections are shut, and each reader finds that out."""
        with self._lock:
            clients: list[httpx2.Client | httpx2.AsyncClient] = []
            if self._sync is not None and self._sync[0] == os.getpid():
                clients.append(self._sync[1].http)
            clients += [client.http for _, client in self._by_loop.values()]
        for client in clients:
            for connected in sockets_of(client):
                with contextlib.suppress(OSError):  # it ended by itself
                    connected.shutdown(socket.SHUT_RDWR)
                connected.close()

    def close(self) -> None:
        """Close what can be closed from here; other loops close theirs when they next run."""
        with self._lock:
            if self._sync is not None and self._sync[0] == os.getpid():
                self._sync[1].close()
            for loop, client in self._by_loop.values():
                if loop.is_running():
                    asyncio.run_coroutine_threadsafe(client.close(), loop)
            self._sync, self._by_loop = None, {}


def sockets_of(client: httpx2.Client | httpx2.AsyncClient) -> Iterator[socket.socket]:
    """Yield copies of the sockets of an HTTP client's connections; a request has no other name on the network."""
    transports = [client._transport, *client._mounts.values()]
    for transport in transports:
        for connection in list(getattr(getattr(transport, "_pool", None), "connections", ())):
            stream = getattr(getattr(connection, "_connection", None), "_network_stream", None)
            connected = None if stream is None else stream.get_extra_info("socket")
            if connected is not None and (descriptor := connected.fileno()) >= 0:
                with contextlib.suppress(OSError):  # closed since
                    yield socket.socket(fileno=os.dup(descriptor))


Original = Callable[[], Any]

Agrees = Callable[[EngineClients, InFlightCall, Mapping[str, Any]], bool | None]
"""``pair_check.PairChecks.agrees``."""


class SdkSender:
    """One ``request`` of the OpenAI SDK, to be sent to whichever backend is chosen.

    Args:
        clients: The clients of each backend, by name.
        caller: The SDK client that the code called.
        original: Sends the request as the code meant it.
        options: The SDK's request options.
        form: The SDK's other arguments (``cast_to``, ``stream``, ``stream_cls``).
        assemble: Stream from the engine even where the caller does not, to see the first token.
        shows_counts: Let the caller have the token counts of a stream for which it did not ask.
        watch: Hears the answer as it comes; for one that wants tool calls an answer is streamed from the engine too,
            where its backend allows it.
        agrees: Says whether an engine's answers are the same when they are streamed, for backends that leave it open.
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
        shows_counts: bool = False,
        watch: AnswerWatch | None = None,
        agrees: Agrees | None = None,
    ) -> None:
        self.max_attempts = 1 + options.get_max_retries(caller.max_retries)
        self._clients = clients
        self._caller = caller
        self._original = original
        self._options = options
        self._form = form
        self._may_assemble = assemble
        self._shows_counts = shows_counts
        self._watch = watch
        self._agrees = agrees

    def send(self, inflight: InFlightCall) -> Any:
        """Send from this thread."""
        if inflight.external:
            response = self._original()
            inflight.finish()
            return response
        outgoing = self._outgoing(inflight)
        try:
            try:
                tap, response = self._send_once(inflight, outgoing)
            except openai.APIStatusError as refusal:
                if not outgoing.may_cause(refusal):
                    raise
                tap, response = self._send_once(inflight, self._without_ours(outgoing))
                outgoing.refused(refusal)
        except FAILURES as error:
            give_up(inflight, error)
        outgoing.note(tap)
        tap.hand_over()
        return response

    def _send_once(self, inflight: InFlightCall, outgoing: Outgoing) -> tuple[Tap, Any]:
        early = outgoing.clients.backend.early_tools
        tap = Tap(inflight, outgoing.mode, hides=outgoing.hides, watch=self._watch, early=early)
        token = TAP.set(tap)
        try:
            try:
                response = outgoing.clients.sync().request(options=outgoing.options, **self._form)
            except Upgrade:
                outgoing.clients.upgrade()
                response = outgoing.clients.sync().request(options=outgoing.options, **self._form)
            if isinstance(tap.stream, TappedStream) and tap.mode == "stream":
                tap.stream.prime()
        finally:
            TAP.reset(token)
        return tap, response

    async def asend(self, inflight: InFlightCall) -> Any:
        """Send from this task."""
        if inflight.external:
            response = await self._original()
            inflight.finish()
            return response
        outgoing = self._outgoing(inflight)
        try:
            try:
                tap, response = await self._asend_once(inflight, outgoing)
            except openai.APIStatusError as refusal:
                if not outgoing.may_cause(refusal):
                    raise
                tap, response = await self._asend_once(inflight, self._without_ours(outgoing))
                outgoing.refused(refusal)
        except FAILURES as error:
            give_up(inflight, error)
        outgoing.note(tap)
        tap.hand_over()
        return response

    async def _asend_once(self, inflight: InFlightCall, outgoing: Outgoing) -> tuple[Tap, Any]:
        early = outgoing.clients.backend.early_tools
        tap = Tap(inflight, outgoing.mode, hides=outgoing.hides, watch=self._watch, early=early)
        token = TAP.set(tap)
        try:
            try:
                response = await outgoing.clients.on_loop().request(options=outgoing.options, **self._form)
            except Upgrade:
                outgoing.clients.upgrade()
                response = await outgoing.clients.on_loop().request(options=outgoing.options, **self._form)
            if isinstance(tap.stream, AsyncTappedStream) and tap.mode == "stream":
                await tap.stream.prime()
        finally:
            TAP.reset(token)
        return tap, response

    def _outgoing(self, inflight: InFlightCall) -> Outgoing:
        assert inflight.backend is not None and inflight.assignment is not None
        clients = self._clients[inflight.backend]
        assert inflight.model is not None
        asked = chat.CHAT.with_model(self._options.json_data, inflight.model, inflight.assignment.parameters)
        inflight.sends(asked)
        dialect, said = clients.dialect, self._said(asked)
        fields: Mapping[str, Any] = inflight.request_fields()
        if dialect.refused:
            fields = dialect.without_refused(fields)
        body = with_fields(asked, fields)
        body["model"] = asked["model"]
        guards, added = parted(fields, asked)
        mode, streams = _mode_of(said), said.get(STREAM_OPTIONS) or {}
        hides: Hides | None = None
        watch = self._watch if self._watch is not None and self._watch.wants_calls else None
        late = Late.OFF if watch is not None and not clients.backend.early_tools else None
        if not isinstance(streams, OBJECT):
            pass  # the engine says what is wrong with it
        elif mode == "plain":
            wanted = self._may_assemble or watch is not None
            comes_whole = self._comes_whole(inflight, clients, said) if wanted else None
            late = late or comes_whole
            if wanted and comes_whole is None:
                mode, body["stream"] = "assemble", True
                body[STREAM_OPTIONS] = {**streams, "include_usage": True}
                added |= {"stream", STREAM_OPTIONS}
        elif not streams.get("include_usage") and STREAM_OPTIONS not in dialect.refused and inflight.counts_streams:
            hides = chat.is_unreadable_usage if self._shows_counts and not streams else chat.is_usage_only
            body[STREAM_OPTIONS] = {**streams, "include_usage": True}
            added.add(STREAM_OPTIONS)
        if watch is not None and late is not None:
            watch.comes_late(late)
        options = self._options_for(clients, body, fields)
        if (tracer := inflight.services.tracer) is not None:
            traced = tracer.sending(inflight.call, inflight.backend, inflight.attempts)
            options.headers = beside_trace(options.headers, traced)
        return Outgoing(clients, options, mode, hides, added, asked, guards)

    def _comes_whole(self, inflight: InFlightCall, clients: EngineClients, said: Mapping[str, Any]) -> Late | None:
        """Return why an answer in one piece is not streamed from the engine, for its caller or its watch."""
        backend = clients.backend
        if not (clients.dialect.assembles and chat.can_assemble(said)):
            return Late.REQUEST
        if self._may_assemble:
            return None
        if not backend.early_tools:
            return Late.OFF
        if backend.assemble is not None:
            return None if backend.assemble else Late.NOT_ASSEMBLED
        agrees = None if self._agrees is None else self._agrees(clients, inflight, said)
        return Late.PENDING if agrees is None else None if agrees else Late.DIFFERENT

    def _without_ours(self, outgoing: Outgoing) -> Outgoing:
        """Return the same request with nothing added but what keeps workflows apart."""
        clients, asked, guards = outgoing.clients, outgoing.asked, outgoing.guards
        options = self._options_for(clients, with_fields(asked, guards), guards)
        options.headers = outgoing.options.headers
        return Outgoing(clients, options, _mode_of(self._said(asked)))

    def _said(self, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what the caller asks for in all: the SDK lays ``extra_body`` over the body."""
        extra = self._options.extra_json
        return {**asked, **extra} if extra else asked

    def _options_for(self, clients: EngineClients, body: dict[str, Any], fields: Mapping[str, Any]) -> Any:
        given, caller = self._options, self._caller
        extra = given.extra_json
        if extra:  # whole objects of the caller's would lie over ours
            hidden = {name: value for name, value in fields.items() if name in extra and isinstance(value, Mapping)}
            extra = with_fields(extra, hidden)
            if STREAM_OPTIONS in extra and STREAM_OPTIONS in body:
                extra = {**extra, STREAM_OPTIONS: body[STREAM_OPTIONS]}
        return given.model_copy(
            update={
                "json_data": body,
                "extra_json": extra,
                "timeout": caller.timeout if isinstance(given.timeout, openai.NotGiven) else given.timeout,
                "headers": headers_of(caller, given.headers, clients.headers),
                "params": query_of(caller, given.params, clients.query),
                "max_retries": 0,
            }
        )


def timeout_of(caller: openai.OpenAI | openai.AsyncOpenAI, options: Any) -> CallerTimeout | None:
    """Return how long the caller's client would wait for an answer of an engine; ``None``: without end."""
    given = caller.timeout if isinstance(options.timeout, openai.NotGiven) else options.timeout
    seconds = given if isinstance(given, int | float) else getattr(given, "read", None)
    return None if seconds is None else CallerTimeout(seconds, _timed_out)


def _timed_out(waited_for: str) -> openai.APITimeoutError:
    error = openai.APITimeoutError(request=NO_REQUEST)
    error.add_note(waited_for)
    return error


class Outgoing(NamedTuple):
    """One request as it is sent to one backend."""

    clients: EngineClients
    options: Any
    """The SDK's."""
    mode: Mode
    hides: Hides | None = None
    """Events that the engine sends because of what we added, and that the caller does not get."""
    added: Collection[str] = ()
    """Fields of the body that the caller did not ask for, and that may be left out."""
    asked: Mapping[str, Any] = MappingProxyType({})
    """The body without them."""
    guards: Mapping[str, Any] = MappingProxyType({})
    """Fields that may not be left out."""

    def may_cause(self, refusal: openai.APIStatusError) -> bool:
        """Whether the engine may have refused what we added."""
        return may_refuse(self.added, refusal.status_code, refusal.response.text)

    def refused(self, refusal: openai.APIStatusError) -> None:
        """Note that the same request was taken without what we added."""
        self.clients.dialect.learn(self.added, refusal.response.text, refusal.status_code)

    def note(self, tap: Tap) -> None:
        """Note what came, where it is there already and says something: whole answers are expected to be counted."""
        if tap.complete and (tap.mode == "assemble" or (tap.mode == "plain" and not tap.counted)):
            self.clients.dialect.answered(assembled=tap.mode == "assemble", counted=tap.counted)


def _mode_of(body: Mapping[str, Any]) -> Mode:
    return "stream" if body.get("stream") else "plain"
