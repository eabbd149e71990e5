"""What no route takes: answered as the caller reads errors, with what was probably meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from orla_lg.errors import did_you_mean
from orla_lg.serve.gateway.answers import Failed, refusal
from orla_lg.wires.chat import CHAT
from orla_lg.wires.messages import MESSAGES

_BELOW_V1 = ("/chat/", "/completions", "/embeddings", "/models", "/responses")


async def no_route(request: Request, error: Exception) -> Response:
    """Answer a request for which there is no route, or not with its method."""
    assert isinstance(error, HTTPException)
    path, allowed = request.url.path, (error.headers or {}).get("Allow", "")
    known = [route.path for route in request.app.routes if isinstance(route, Route) and "{" not in route.path]
    message = missing(path, known) if error.status_code == 404 else refused(request.method, allowed)
    said = Failed(error.status_code, message)
    wire = MESSAGES if "/message" in path or "anthropic-version" in request.headers else CHAT
    headers, content = refusal(said, wire)
    answered = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
    return Response(content, said.status, {**(error.headers or {}), **answered})


ON_ERROR: Mapping[Any, Any] = {404: no_route, 405: no_route}
"""What an application with the gateway's routes has as ``exception_handlers``."""


def missing(path: str, known: Iterable[str]) -> str:
    """Return that there is no such route, and what may have been meant.

    Args:
        path: What was asked for.
        known: The paths that there are.
    """
    said, known = f"there is no route {path!r:.200}", {each for each in known if each != "/"}
    if path.startswith(_BELOW_V1) and (f"/v1{path}" in known or path.startswith("/models/")):
        return f"{said}: it is /v1{path:.200}; the base URL of OpenAI's clients ends in /v1"
    if path.startswith("/messages") and f"/v1{path}" in known:
        return f"{said}: it is /v1{path:.200}"
    if path.startswith("/v1/v1/"):
        return f"{said}: it is {path[3:]:.200}; Anthropic's clients add /v1 themselves, their base URL is without"
    if path.startswith("/v1/responses/"):
        return f"{said}: answers are not kept, so none can be asked for, continued or deleted"
    return said + did_you_mean(path if path.startswith("/v1/") else f"/v1{path}", known)


def refused(method: str, allowed: str) -> str:
    """Return that a route does not take a method."""
    return f"method {method!r:.20} is not taken here" + (f", but {allowed}" if allowed else "")
