"""A backend as v1 has it: an engine, with its prices in an object of their own. What is posted again is replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from orla_lg.serve.api.errors import Handler
from orla_lg.serve.api.v1.errors import answering_errors
from orla_lg.serve.api.v2.backends import flattened
from orla_lg.serve.gateway.bodies import parsed
from orla_lg.serve.posted.applying import PostedThings
from orla_lg.serve.posted.items import PostedBackend, read_item

ONE_CALL = 1
"""What a backend runs at once if nothing is said of it: ``pyorla`` sends more only."""


def backend_in(body: Mapping[str, Any]) -> PostedBackend:
    """Return the backend that a registration says.

    Raises:
        RequestRefused, ConfigError: It says none.
    """
    said = {name: value for name, value in flattened(body).items() if value is not None}
    bound = said.get("max_concurrency")
    said["max_concurrency"] = ONE_CALL if bound in (None, 0) else bound
    if not said.get("queue_capacity"):
        said.pop("queue_capacity", None)
    return read_item(PostedBackend, said)


def registering(posted: PostedThings) -> Handler:
    """Return what answers a registration: one of the same name is replaced."""

    async def register(request: Request) -> Response:
        stored = await posted.put(backend_in(parsed(await request.body())))
        return JSONResponse({**stored.item.model_dump(mode="json"), "success": True})

    return answering_errors(register)
