"""What no route takes: answered as the caller reads errors, with what was probably meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from orla_lg.serve.gateway.answers import Failed, refusal
from orla_lg.wires.chat import CHAT
from orla_lg.wires.messages import MESSAGES

_BELOW_V1 = ("/chat/", "/completions", "/embeddings", "/models", "/responses")


async def no_route(request: Request, error: Exception) -> Response:
    """Answer a request for which there is no route, or not with its method."""
    assert isinstance(error, HTTPException)
    path, allowed = request.url.path, (error.headers or {}).get("Allow", "")
    said = Failed(error.status_code, missing(path) if error.status_code == 404 else refused(request.method, allowed))
    wire = MESSAGES if "/messages" in path or "anthropic-version" in request.headers else CHAT
    headers, content = refusal(said, wire)
    answered = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
    return Response(content, said.status, {**(error.headers or {}), **answered})


ON_ERROR: Mapping[Any, Any] = {404: no_route, 405: no_route}
"""What an application with the gateway's routes has as ``exception_handlers``."""


def missing(path: str) -> str:
    """Return that there is no such route, and what may have been meant."""
    said = f"there is no route {path!r:.200}"
    if path.startswith(_BELOW_V1):
        return f"{said}: it is /v1{path:.200}; the base URL of OpenAI's clients ends in /v1"
    if path.startswith("/messages"):
        return f"{said}: it is /v1{path:.200}"
    if path.startswith("/v1/v1/"):
        return f"{said}: it is {path[3:]:.200}; Anthropic's clients add /v1 themselves, their base URL is without"
    if path.startswith("/v1/responses/"):
        return f"{said}: answers are not kept, so none can be asked for, continued or deleted"
    return said


def refused(method: str, allowed: str) -> str:
    """Return that a route does not take a method."""
    return f"method {method!r:.20} is not taken here" + (f", but {allowed}" if allowed else "")
