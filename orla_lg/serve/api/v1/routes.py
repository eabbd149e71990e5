"""The routes of v1 that are no other API's."""

from __future__ import annotations

from starlette.routing import Route

from orla_lg.core.guard.guard import Guard
from orla_lg.serve.api.v1.execute import ExecuteEndpoint
from orla_lg.serve.api.v1.resources import V1Resources
from orla_lg.serve.api.v1.workflows import RegisteredGraphs
from orla_lg.serve.gateway.calls import Gateway
from orla_lg.serve.posted.applying import PostedThings


def v1_routes(posted: PostedThings, guard: Guard, gateway: Gateway) -> list[Route]:
    """Return them; labels flow along the graphs that are registered from now on.

    Args:
        posted: What is posted.
        guard: Follows labels, and knows the policies.
        gateway: Of all calls.
    """
    resources = V1Resources(posted, guard, gateway.sessions)
    posted.followers.append(RegisteredGraphs(guard.set_graph).follow)
    return [
        Route(ExecuteEndpoint.PATH, ExecuteEndpoint(gateway, posted), methods=["POST"]),
        *resources.routes(),
    ]
