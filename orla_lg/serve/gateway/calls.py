"""The gateway's calls: a request on a wire becomes a call of the core, and its answer goes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from orla_lg.clients.fitting import Fit, fitting
from orla_lg.clients.question import EssentialQuestion, Question
from orla_lg.core.call import Assignment, Hints
from orla_lg.core.guard.access import CallAccess
from orla_lg.core.identity import Identity, workflow_key
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.mapping import Mapper
from orla_lg.core.serving import Serving
from orla_lg.core.steps import adrive
from orla_lg.serve.access.access import Access, Caller
from orla_lg.serve.access.budgets import HeldSlot
from orla_lg.serve.access.keys import KeyScope
from orla_lg.serve.gateway.answering import Answering, DisconnectWatch, Receive, Scope, Send
from orla_lg.serve.gateway.answers import Header, RequestRefused
from orla_lg.serve.gateway.bodies import parsed
from orla_lg.serve.gateway.identity import CallSource, source_of
from orla_lg.serve.gateway.placing import place_by_name
from orla_lg.serve.gateway.sender import EngineReply, GatewaySender
from orla_lg.serve.gateway.sessions import CallerSession, SessionBook
from orla_lg.serve.gateway.settings import GatewaySettings
from orla_lg.serve.gateway.silence import SilenceWatch
from orla_lg.serve.gateway.upstream import BackendLinks
from orla_lg.serve.http.guard import CALLER, is_loopback
from orla_lg.serve.past_calls.captures import CaptureBook, Capturing
from orla_lg.serve.past_calls.completions import CompletionBook
from orla_lg.serve.posted.effects import StageEffects
from orla_lg.serve.posted.stages import DEFAULT_STAGE
from orla_lg.wires.wire import Wire

PathNames = tuple[str | None, str | None]

_NOBODYS: frozenset[str] = frozenset()
_NOWHERE: PathNames = (None, None)


class ClientGone(Exception):
    """The client closed its connection before its request was whole."""


class _Strict:
    """The gateway's requests have nowhere else to go."""

    untranslatable = "error"

    def is_first(self, field: str) -> bool:
        return False


STRICT = _Strict()


class GatewayRequest(NamedTuple):
    """One request, read."""

    wire: Wire
    headers: dict[bytes, bytes]
    raw_headers: list[Header]
    query: bytes
    path: PathNames
    caller: Caller
    body: dict[str, Any]
    origin: Mapping[str, Any] | None = None
    """What says where it comes from, as a chat completion's body would; ``None``: the body."""
    mappers: Sequence[Mapper] = ()
    """Asked where it goes before the mapping that holds for all."""
    narrows: Callable[[Assignment], Assignment] | None = None
    """Takes out of an assignment what the request may not use, beside what its key does not allow."""


class Gateway:
    """What all routes of the gateway share.

    Args:
        serving: The core.
        access: Who may call.
        settings: What is borne.
        scope: What a key must allow.
    """

    def __init__(
        self, serving: Serving, access: Access, settings: GatewaySettings, scope: KeyScope = KeyScope.USE
    ) -> None:
        self.serving = serving
        self.settings = settings
        self.sessions = SessionBook(serving, settings.session_idle_s, settings.max_sessions)
        self.links = BackendLinks()
        self.silence = SilenceWatch(settings.answer_timeout_s)
        self.access = access
        self.effects: StageEffects | None = None
        """What posted stages put into requests; ``None``: nothing."""
        self.completions: CompletionBook | None = None
        """Where the tags of calls are noted."""
        self.captures: CaptureBook | None = None
        """Where requests and answers of stages that ask for it are kept; ``None``: nowhere."""
        self._scope = scope

    async def aclose(self) -> None:
        """End all sessions, and close the connections to the backends."""
        self.sessions.close()
        await self.links.close()

    # What comes in

    def admit(self, scope: Scope) -> Caller:
        """Return what the sender of a request may do.

        Raises:
            Denied: It may not.
        """
        found = scope.get(CALLER)
        if isinstance(found, Caller):
            return found
        return self.access.admit(scope["headers"], scope=self._scope, loopback=is_loopback(scope.get("client")))

    async def read(self, scope: Scope, receive: Receive, wire: Wire, path: PathNames) -> GatewayRequest:
        """Return a request.

        Raises:
            OrlaError: It is refused.
            ClientGone: Its client went.
        """
        raw: list[Header] = scope["headers"]
        caller = self.admit(scope)
        headers, content = dict(raw), await _content(receive)
        if (encoding := headers.get(b"content-encoding", b"identity")) != b"identity":
            raise RequestRefused(415, f"a body with Content-Encoding {encoding.decode('latin-1')!r:.100} is not read")
        body = parsed(content)
        if not wire.asks(body):
            raise RequestRefused(400, f"the request is none of {wire.title}: it asks a model for nothing")
        return GatewayRequest(wire, headers, raw, scope["query_string"], path, caller, body)

    # A call

    def arrive(self, request: GatewayRequest, call_id: str) -> tuple[InFlightCall, CallerSession | None]:
        """Return the call that a request becomes, and its session.

        Raises:
            OrlaError: Its hints, its stage or its tenant cannot be.
        """
        serving = self.serving
        source, hints = self._source(request)
        if self.effects is not None:
            self.effects.apply(source.stage, request.wire, request.body)
        if source.tags and self.completions is not None:
            self.completions.tag(call_id, source.tags)
        ask = request.wire.ask_of(request.body)
        identity, session = self._identified(source, hints.tenant or None, call_id)
        try:
            inflight = serving.arrive(
                identity, ask, call_id=call_id, said=hints, mappers=request.mappers,
                layers=self.access.layers(request.caller),
            )  # fmt: skip
        except BaseException:
            if session is not None:
                self.sessions.leave(session)
            raise
        inflight.holds = _NOBODYS
        if serving.services.guard is not None or source.labels:
            inflight.call.access = self._access(source, request.caller)
        self._place(inflight, source, request.caller)
        return inflight, session

    def _access(self, source: CallSource, caller: Caller) -> CallAccess:
        """Return what access policies need to know of a request: what it claims can only narrow."""
        guard = self.serving.guard
        guard.claims(source.labels)
        subject = guard.subject_of(caller.tags, source.tags, trusted=caller.key_id is None)
        return CallAccess(subject, labels=source.labels)

    def _place(self, inflight: InFlightCall, source: CallSource, caller: Caller) -> None:
        """Have a call placed by its model's name where no mapping names its stage."""
        place_by_name(self.serving, inflight)

    def arrive_alone(self, request: GatewayRequest, call_id: str) -> InFlightCall:
        """Return what a request asks for as a call that is mapped and no more.

        Raises:
            OrlaError: Its hints, its stage or its tenant cannot be.
        """
        source, hints = self._source(request)
        ask = request.wire.ask_of(request.body)
        identity = Identity(f"call-{call_id}", stage=source.stage)
        inflight = self.serving.arrive(identity, ask, call_id=call_id, said=hints)
        if (guard := self.serving.services.guard) is not None:
            access = inflight.call.access = self._access(source, request.caller)
            if source.workflow is not None and guard.flow.follows:
                workflow = workflow_key(source.workflow, hints.tenant)
                labels = guard.flow.carried(workflow, None, source.stage, access.labels, lasts=False)
                inflight.call.access = replace(access, labels=labels)
        place_by_name(self.serving, inflight)
        return inflight

    def _source(self, request: GatewayRequest) -> tuple[CallSource, Hints]:
        """Return what a request says of itself, as far as its key allows it to."""
        caller, said = request.caller, request.body if request.origin is None else request.origin
        source = source_of(request.headers, said, request.path, self.settings)
        caller.check_stage(source.stage)
        caller.tags_with(source.tags)
        hints = source.hints
        if (tenant := caller.tenant_of(hints.tenant)) != hints.tenant:
            hints = replace(hints, tenant=tenant)
        return source, hints

    def _identified(
        self, source: CallSource, tenant: str | None, call_id: str
    ) -> tuple[Identity, CallerSession | None]:
        if source.workflow is None:
            return Identity(workflow_key(f"call-{call_id}", tenant), stage=source.stage), None
        session = self.sessions.enter(source.workflow, tenant)
        if session is not None and source.final:
            session.final = True
        run = None if session is None else session.run
        return Identity(workflow_key(source.workflow, tenant), run, source.stage, thread=True), session

    def capturing(self, request: GatewayRequest, inflight: InFlightCall) -> Capturing | None:
        """Return what keeps a call's request and answer, where its stage asks for that."""
        if self.captures is None or self.effects is None:
            return None
        posted = self.effects.find(inflight.call.identity.stage)
        return None if posted is None or not posted.capture_io else Capturing(self.captures, request.body)

    async def answered(self, request: GatewayRequest, inflight: InFlightCall) -> EngineReply:
        """Live a call's life until the beginning of its answer is there."""
        question = EssentialQuestion(request.wire, request.body)
        inflight.fit = self._fit(inflight, question, request)
        query = parse_qsl(request.query.decode("latin-1")) if request.query else []
        sender = GatewaySender(
            self.links, question, request.raw_headers, query, self.settings.max_attempts, self.silence
        )
        reply: EngineReply = await adrive(self.serving.serve(inflight, sender))
        return reply

    def _fit(self, inflight: InFlightCall, question: Question, request: GatewayRequest) -> Fit | None:
        """Return what takes out of an assignment where the request cannot go: another wire's, or not its key's."""
        fit = fitting(inflight, question, STRICT)
        by_key = None if request.caller.backends is None else request.caller.narrow
        narrowing = [each for each in (by_key, request.narrows) if each is not None]
        if not narrowing:
            return fit

        def all_of_them(assignment: Assignment) -> Assignment | None:
            for narrow in narrowing:
                assignment = narrow(assignment)
            return assignment if fit is None else fit(assignment)

        return all_of_them


def kept(capturing: Capturing, inflight: InFlightCall) -> None:
    """Keep a call's request and answer."""
    identity = inflight.call.identity
    capturing.end(
        inflight.call.id, identity.stage or DEFAULT_STAGE, identity.name, identity.tenant or None, inflight.backend
    )


async def _content(receive: Receive) -> bytes:
    """Return a request's body; how long it may be, and take, is the access layer's to say."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)


class CallEndpoint:
    """The route of one wire: an ASGI application.

    Args:
        gateway: Of all routes.
        wire: Its wire.
    """

    def __init__(self, gateway: Gateway, wire: Wire) -> None:
        self._gateway = gateway
        self._wire = wire

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self.answer(scope, receive, send, _NOWHERE)

    async def answer(self, scope: Scope, receive: Receive, send: Send, path: PathNames) -> None:
        """Answer one request below a path's prefix."""
        gateway, call_id = self._gateway, self._gateway.serving.new_id()
        task, inflight, session = asyncio.current_task(), None, None
        assert task is not None
        watch: DisconnectWatch | None = None
        slot: HeldSlot | None = None
        wire = self.wire_of(scope, call_id)
        answering = Answering(send, call_id, wire)
        try:
            try:
                request = self.looked_at(await gateway.read(scope, receive, wire, path))
                slot = await gateway.access.entered(request.caller)
                watch = DisconnectWatch(receive, task)
                inflight, session = gateway.arrive(request, call_id)
                self.arrived(request, inflight, session)
                if gateway.captures is not None:
                    answering.capturing = gateway.capturing(request, inflight)
                reply = await gateway.answered(request, inflight)
            except ClientGone:
                return
            except Exception as error:  # noqa: BLE001 - whatever it is, the caller has an answer; see ``refuse``
                await answering.refuse(error, inflight, dict(scope["headers"]))
                return
            await answering.reply(reply, inflight, request.headers, gateway.silence)
        except asyncio.CancelledError:
            if watch is None or not watch.gone:
                raise
            task.uncancel()
        finally:
            if watch is not None:
                watch.end()
            if answering.capturing is not None and inflight is not None:
                kept(answering.capturing, inflight)
            if session is not None:
                gateway.sessions.leave(session)
            if slot is not None:
                slot.release()

    # What another API of Orla's does otherwise

    def wire_of(self, scope: Scope, call_id: str) -> Wire:
        """Return the wire of one request."""
        return self._wire

    def looked_at(self, request: GatewayRequest) -> GatewayRequest:
        """Return a request with what else is known of it.

        Raises:
            OrlaError: It is refused.
        """
        return request

    def arrived(self, request: GatewayRequest, inflight: InFlightCall, session: CallerSession | None) -> None:
        """Take note of the call that a request became."""
