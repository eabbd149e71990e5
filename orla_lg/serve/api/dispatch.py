"""The routes of both of Orla's APIs; a backend that is posted is v1's where it has a type."""

from __future__ import annotations

from typing import Protocol

from starlette.routing import Route

from orla_lg.orla import Orla
from orla_lg.serve.access.access import Access
from orla_lg.serve.api.v1.backends import registering
from orla_lg.serve.api.v1.routes import v1_routes
from orla_lg.serve.api.v2.backends import Backends
from orla_lg.serve.api.v2.mappings import MappingVariants
from orla_lg.serve.api.v2.observations import Observations
from orla_lg.serve.api.v2.settings import OperatorSettings
from orla_lg.serve.api.v2.stages import Stages
from orla_lg.serve.api.v2.tools import Tools
from orla_lg.serve.gateway.calls import Gateway
from orla_lg.serve.past_calls.captures import CaptureBook
from orla_lg.serve.past_calls.completions import CompletionBook
from orla_lg.serve.posted.applying import PostedThings
from orla_lg.serve.posted.fetching import OutsideClient
from orla_lg.serve.settings import ServeSettings


class ApiServer(Protocol):
    """What the routes need of a server."""

    settings: ServeSettings
    orla: Orla
    access: Access
    gateway: Gateway
    posted: PostedThings
    completions: CompletionBook
    captures: CaptureBook | None
    outside: OutsideClient


def api_routes(server: ApiServer) -> list[Route]:
    """Return them."""
    serving, posted = server.orla.core.serving, server.posted
    tools = Tools(posted, serving, server.access, server.gateway.settings, server.completions, server.outside)
    return [
        *Observations(serving, server.completions, server.captures).routes(),
        *tools.routes(),
        *OperatorSettings(posted).routes(),
        *Stages(posted, server.completions, keeps_prompts=server.settings.table.keep_prompts).routes(),
        *MappingVariants(posted).routes(),
        *Backends(posted, serving, tools.state, registering(posted)).routes(),
        *v1_routes(posted, serving.guard, server.gateway),
    ]
