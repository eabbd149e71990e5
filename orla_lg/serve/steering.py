"""The routes that show and change the running server; ``http.guard`` lets only what has the scope come here."""

from __future__ import annotations

import json
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orla_lg.control import protocol
from orla_lg.control.commands import carry_out
from orla_lg.control.protocol import ControlReply, CoreRole
from orla_lg.control.state import state
from orla_lg.errors import OrlaError
from orla_lg.link.messages import PATH, UPGRADE
from orla_lg.orla import Orla

RELOAD = "/v1/orla/reload"
STATE, CONTROL = "/v1/orla/state", "/v1/orla/control"


class Controlled(Protocol):
    """What is looked at, and changed."""

    orla: Orla

    @property
    def role(self) -> CoreRole:
        """Which of its pool's servers it is."""
        ...

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

    async def look(_request: Request) -> Response:
        return _reply(ControlReply(ok=True, state=state(server.orla.core.serving), core=server.role))

    async def control(request: Request) -> Response:
        """Carry out a request of the control protocol; one that asks for a state again and again gets it once."""
        try:
            return _reply(await carry_out(server.orla.core.serving, protocol.parse(await request.body())))
        except OrlaError as error:
            return _reply(ControlReply(ok=False, error=str(error)), 409)

    async def link(_request: Request) -> Response:
        said = f"a link begins with an HTTP/1.1 upgrade to {UPGRADE}; Orla.remote(...) opens one"
        return JSONResponse({"error": {"message": said}}, 426, headers={"upgrade": UPGRADE, "connection": "upgrade"})

    return [
        Route(STATE, look),
        Route(CONTROL, control, methods=["POST"]),
        Route(RELOAD, reload, methods=["POST"]),
        Route(PATH, link, methods=["GET", "POST"]),
    ]


def _reply(reply: ControlReply, status: int = 200) -> Response:
    return Response(protocol.encode(reply), status, media_type="application/json")


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
