"""``POST /api/v1/execute``: a call of the gateway's in another form. It goes the way of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orla_lg.core.inflight import InFlightCall
from orla_lg.serve.api.v1 import request as execute
from orla_lg.serve.api.v1.placement import NamedBackend
from orla_lg.serve.api.v1.skills import NOT_REGISTERED, SkillBounds, bounds_of, denied
from orla_lg.serve.api.v1.wire import ExecuteWire
from orla_lg.serve.gateway import answers
from orla_lg.serve.gateway.answering import Scope
from orla_lg.serve.gateway.calls import CallEndpoint, Gateway, GatewayRequest
from orla_lg.serve.gateway.sessions import CallerSession
from orla_lg.serve.posted.applying import PostedThings
from orla_lg.serve.posted.effects import StageEffects
from orla_lg.wires.wire import Wire


class ExecuteEndpoint(CallEndpoint):
    """The route of executes.

    Args:
        gateway: Of all calls.
        posted: Knows the manifests of skills.
    """

    PATH = "/api/v1/execute"

    def __init__(self, gateway: Gateway, posted: PostedThings) -> None:
        super().__init__(gateway, ExecuteWire())
        self._posted = posted
        self._guard = gateway.serving.guard
        self._stages = StageEffects(posted.reloader)

    def wire_of(self, scope: Scope, call_id: str) -> Wire:
        """Return the wire of one execute, which knows how its caller may name it."""
        return ExecuteWire(answers.request_id(dict(scope["headers"]), call_id).decode("latin-1"))

    def looked_at(self, request: GatewayRequest) -> GatewayRequest:
        """Return an execute with its origin, and with the mapper that knows its backend.

        Raises:
            RequestRefused: It is none.
            Denied: Its skill may not use what it asks for, or a tag contradicts its key's.
        """
        body, caller = request.body, request.caller
        execute.checked(body)
        tags: Mapping[str, str] = body.get("tags") or {}
        caller.tags_with(tags)
        claimed = {name: value for name, value in tags.items() if name not in caller.tags}
        mapper = NamedBackend(
            body["backend"], body.get("accuracy"), body.get("accuracy_policy") == "strict", caller.may_use,
            self._stages.find,
        )  # fmt: skip
        bounds = self._bounds(body)
        return request._replace(
            origin=execute.origin({**body, "tags": claimed}),
            mappers=(mapper,),
            narrows=None if bounds is None else bounds.narrow,
        )

    def _bounds(self, body: Mapping[str, Any]) -> SkillBounds | None:
        """Return what the skill of an execute may use; ``None`` for one of no skill.

        Raises:
            Denied: It is not registered, or asks for tools or labels that its manifest does not name.
        """
        if not (skill := body.get("skill_id")):
            return None
        bounds = bounds_of(skill, self._posted.items)
        labels = body.get("data_labels") or ()
        fault = (
            NOT_REGISTERED.format(skill)
            if bounds is None
            else bounds.fault(tools=execute.names(body.get("tools")), labels=labels)
        )
        if fault is not None:
            raise denied(fault)
        return bounds

    def arrived(self, request: GatewayRequest, inflight: InFlightCall, session: CallerSession | None) -> None:
        """Have the answer know its call, policies its tags and skill, and the session what becomes of its cache."""
        assert isinstance(request.wire, ExecuteWire)
        request.wire.inflight = inflight
        if (access := inflight.call.access) is not None:
            caller, tags = request.caller, request.body.get("tags") or {}
            # The gateway's own tags have letters that any log can carry; to v1's policies they are what is written.
            subject = self._guard.subject_of(caller.tags, tags, trusted=caller.key_id is None)
            inflight.call.access = replace(access, subject=subject, skill=request.body.get("skill_id") or None)
        if session is not None and (flushes := execute.flushes(request.body)) is not None:
            session.flushes = flushes
