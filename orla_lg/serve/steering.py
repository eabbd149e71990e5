"""The routes that change the running server. Only what ``http_guard`` lets through comes here, with its scope."""

from __future__ import annotations

import json
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orla_lg.errors import OrlaError
from orla_lg.link.messages import PATH, UPGRADE

RELOAD = "/v1/orla/reload"


class Controlled(Protocol):
    """What is changed."""

    async def reload(self, *, dry_run: bool) -> str:
        """Load the configuration again, and return what changed, or would."""
        ...


def control_routes(server: Controlled) -> list[Route]:
    """Return the routes."""

    async def reload(request: Request) -> Response:
        try:
            asked = _asked(await request.body())
        except ValueError as error:
            return _failed(400, str(error))
        try:
            return JSONResponse({"ok": True, "dry_run": asked, "changes": await server.reload(dry_run=asked)})
        except OrlaError as error:
            return _failed(409, str(error))

    async def link(_request: Request) -> Response:
        said = f"a link begins with an HTTP/1.1 upgrade to {UPGRADE}; Orla.remote(...) opens one"
        return JSONResponse({"error": {"message": said}}, 426, headers={"upgrade": UPGRADE, "connection": "upgrade"})

    return [Route(RELOAD, reload, methods=["POST"]), Route(PATH, link, methods=["GET", "POST"])]


def _asked(body: bytes) -> bool:
    """Return whether only what would change is asked for.

    Raises:
        ValueError: It is no such request.
    """
    said: Any = json.loads(body or b"{}")
    dry_run = said.get("dry_run", False) if isinstance(said, dict) else None
    if not isinstance(dry_run, bool) or not isinstance(said, dict) or set(said) - {"dry_run"}:
        raise ValueError('expected {"dry_run": true} or {"dry_run": false}')
    return dry_run


def _failed(status: int, message: str) -> Response:
    return JSONResponse({"ok": False, "error": {"message": message}}, status)
