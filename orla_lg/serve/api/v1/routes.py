"""The routes of v1 that are no other API's."""

from __future__ import annotations

from typing import Protocol

from starlette.routing import Route

from orla_lg.core.guard.guard import Guard
from orla_lg.orla import Orla
from orla_lg.serve.access.access import Access
from orla_lg.serve.api.v1.execute import ExecuteEndpoint
from orla_lg.serve.api.v1.resources import V1Resources
from orla_lg.serve.gateway.calls import Gateway
from orla_lg.serve.posted.applying import PostedThings


class ApiServer(Protocol):
    """What the routes need of a server."""

    orla: Orla
    access: Access
    gateway: Gateway
    posted: PostedThings


def routes(server: ApiServer) -> list[Route]:
    """Return them; what is posted holds from now on."""
    guard: Guard = server.orla.core.serving.guard
    resources = V1Resources(server.posted, guard, server.access, server.gateway.sessions)
    server.posted.followers.append(resources.follow)
    execute = Route(ExecuteEndpoint.PATH, ExecuteEndpoint(server.gateway, server.posted), methods=["POST"])
    return [execute, *resources.routes()]
