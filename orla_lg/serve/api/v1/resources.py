"""Policies, access checks, skills and workflows of v1: posted, listed, asked about and removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orla_lg.core.guard.guard import Guard
from orla_lg.core.guard.labels import KEEP_GRAPHS, label_names
from orla_lg.core.guard.policies import AccessPolicy, Verdict
from orla_lg.core.identity import workflow_key
from orla_lg.serve.access.access import Caller, Denied
from orla_lg.serve.api.v1.errors import answering_errors
from orla_lg.serve.api.v1.request import checked_labels, checked_names
from orla_lg.serve.api.v1.skills import NOT_REGISTERED, bounds_of
from orla_lg.serve.gateway.answers import RequestRefused
from orla_lg.serve.gateway.bodies import parsed
from orla_lg.serve.gateway.identity import safe_name
from orla_lg.serve.gateway.sessions import SessionBook
from orla_lg.serve.http.guard import CALLER
from orla_lg.serve.posted.applying import PostedThings
from orla_lg.serve.posted.items import PostedPolicy, PostedSkill, PostedWorkflow, read_item

MOST_WORKFLOWS = KEEP_GRAPHS
"""Registered and not complete. Of more, those whose registration is the oldest are forgotten."""

FORGOTTEN_AT_ONCE = 10


@dataclass(frozen=True, slots=True)
class V1Resources:
    """The routes of v1 beside those of backends and executes.

    Args:
        posted: What is posted.
        guard: What policies say.
        sessions: The workflows of the gateway's callers.
    """

    posted: PostedThings
    guard: Guard
    sessions: SessionBook

    def routes(self) -> list[Route]:
        """Return them."""
        taken = {
            ("POST", "/api/v1/policies"): self.add_policy,
            ("GET", "/api/v1/policies"): self.list_policies,
            ("DELETE", "/api/v1/policies/{name:path}"): self.remove_policy,
            ("POST", "/api/v1/access/check"): self.check_access,
            ("POST", "/api/v1/skills"): self.register_skill,
            ("GET", "/api/v1/skills"): self.list_skills,
            ("DELETE", "/api/v1/skills/{name:path}"): self.remove_skill,
            ("POST", "/api/v1/workflows"): self.register_workflow,
            ("POST", "/api/v1/workflow/complete"): self.complete_workflow,
        }
        return [Route(path, answering_errors(each), methods=[method]) for (method, path), each in taken.items()]

    # Policies

    async def add_policy(self, request: Request) -> Response:
        """Install a policy; one of its name is replaced."""
        await self.posted.put(read_item(PostedPolicy, await _body(request)))
        return _done()

    async def list_policies(self, _request: Request) -> Response:
        """Return the policies that hold, those of the configuration among them."""
        return JSONResponse({"policies": [_shown(each) for each in self.guard.policies]})

    async def remove_policy(self, request: Request) -> Response:
        """Remove a policy that was posted."""
        await self.posted.remove(PostedPolicy, request.path_params["name"])
        return _done()

    async def check_access(self, request: Request) -> Response:
        """Return whether a call would be allowed; that it would not is no error."""
        verdict = self._checked(_caller(request), await _body(request))
        return JSONResponse({"allowed": verdict.allowed, "reason": "" if verdict.allowed else verdict.reason})

    def _checked(self, caller: Caller, body: Mapping[str, Any]) -> Verdict:
        checked_labels(body)
        tags: Mapping[str, str] = body.get("tags") or {}
        labels = label_names("data_labels", body.get("data_labels") or ())
        backend, skill = _text(body, "backend"), _text(body, "skill_id")
        tools = checked_names("tools", body.get("tools") or ())
        try:
            caller.tags_with(tags)
            if backend is not None:
                caller.check_backend(backend)
        except Denied as denied:
            return Verdict(False, "", denied.message)
        if skill:
            if (bounds := bounds_of(skill, self.posted.items)) is None:
                return Verdict(False, "", NOT_REGISTERED.format(skill))
            if fault := bounds.fault(backend=backend, tools=tools, labels=labels):
                return Verdict(False, "", fault)
        subject = self.guard.subject_of(caller.tags, tags, trusted=caller.key_id is None)
        return self.guard.verdict(subject, backend=backend, tools=tools, labels=labels, skill=skill)

    # Skills

    async def register_skill(self, request: Request) -> Response:
        """Register a skill's manifest; one of its name is replaced."""
        await self.posted.put(read_item(PostedSkill, await _body(request)))
        return _done()

    async def list_skills(self, _request: Request) -> Response:
        """Return the manifests."""
        skills = [each.item.model_dump(mode="json") for each in self.posted.items.of(PostedSkill).values()]
        return JSONResponse({"skills": skills})

    async def remove_skill(self, request: Request) -> Response:
        """Remove a manifest."""
        await self.posted.remove(PostedSkill, request.path_params["name"])
        return _done()

    # Workflows

    async def register_workflow(self, request: Request) -> Response:
        """Note the graph of a workflow; what was registered of it before is replaced."""
        body, caller = await _body(request), _caller(request)
        item = read_item(PostedWorkflow, {**body, "workflow_id": _key(body, caller)})
        for name in list(self._oldest(beside=item.key)):
            await self.posted.remove(PostedWorkflow, name)
        await self.posted.put(item)
        return _done()

    def _oldest(self, *, beside: str) -> Iterator[str]:
        """Yield the workflows to forget, where there would be too many with another one."""
        known = self.posted.items.of(PostedWorkflow)
        if beside not in known and len(known) >= MOST_WORKFLOWS:
            yield from sorted(known, key=lambda name: known[name].updated_s)[:FORGOTTEN_AT_ONCE]

    async def complete_workflow(self, request: Request) -> Response:
        """End a workflow: its session is over, and its cache goes unless its calls said that it stays.

        One that is not known is no fault: workflows without edges are never registered.
        """
        body, caller = await _body(request), _caller(request)
        key, name = _key(body, caller), safe_name(body.get("workflow_id"))
        assert name is not None
        self.sessions.complete(name, caller.tenant_of(None))
        if self.posted.items.get(PostedWorkflow, key) is not None:
            await self.posted.remove(PostedWorkflow, key)
        return _done()


def _caller(request: Request) -> Caller:
    found: Caller = request.scope[CALLER]
    return found


async def _body(request: Request) -> dict[str, Any]:
    return parsed(await request.body())


def _done() -> Response:
    return JSONResponse({"success": True})


def _text(body: Mapping[str, Any], name: str) -> str | None:
    said = body.get(name)
    if said is not None and not isinstance(said, str):
        raise RequestRefused(400, f"{name} must be a text")
    return said or None


def _key(body: Mapping[str, Any], caller: Caller) -> str:
    """Return under which name a workflow is kept: no other tenant's has it."""
    name = safe_name(body.get("workflow_id"))
    if name is None:
        raise RequestRefused(400, "workflow_id is missing; it is the name of a workflow")
    return workflow_key(name, caller.tenant_of(None))


def _shown(policy: AccessPolicy) -> dict[str, Any]:
    return {
        "name": policy.name, "subjects": list(policy.subjects), "resources": list(policy.resources),
        "action": policy.action,
    }  # fmt: skip
