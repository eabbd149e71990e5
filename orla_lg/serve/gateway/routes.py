"""The gateway's routes."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import unquote

from starlette.routing import Route

from orla_lg.core.serving import Serving
from orla_lg.serve.access.access import Access
from orla_lg.serve.gateway.answering import Answering, Receive, Scope, Send
from orla_lg.serve.gateway.answers import JSON, Failed
from orla_lg.serve.gateway.calls import CallEndpoint, Gateway, PathNames
from orla_lg.serve.gateway.models import ModelsEndpoint
from orla_lg.serve.gateway.no_route import missing, refused
from orla_lg.serve.gateway.settings import GatewaySettings
from orla_lg.serve.gateway.token_counts import CountEndpoint
from orla_lg.wires.chat import CHAT
from orla_lg.wires.completions import COMPLETIONS
from orla_lg.wires.embeddings import EMBEDDINGS
from orla_lg.wires.messages import MESSAGES
from orla_lg.wires.responses import RESPONSES

WIRES = {
    "/v1/chat/completions": CHAT,
    "/v1/messages": MESSAGES,
    "/v1/responses": RESPONSES,
    "/v1/completions": COMPLETIONS,
    "/v1/embeddings": EMBEDDINGS,
}
PREFIX = "/w/"
MODELS, COUNTS = "/v1/models", "/v1/messages/count_tokens"


def routes(serving: Serving, access: Access, settings: GatewaySettings, *, scope: Any = "use") -> list[Route]:
    """Return the routes of a gateway over a core.

    Args:
        serving: The core.
        access: Who may call.
        settings: What is borne.
    """
    return routes_of(Gateway(serving, access, settings))


def routes_of(gateway: Gateway) -> list[Route]:
    """Return the routes of a gateway; closing it (``Gateway.aclose``) is for what made it."""
    calls = {path: CallEndpoint(gateway, wire) for path, wire in WIRES.items()}
    counts, models = CountEndpoint(gateway), ModelsEndpoint(gateway)
    prefixed = Prefixed({**calls, COUNTS: counts}, models)
    return [
        *(Route(path, endpoint, methods=["POST"]) for path, endpoint in calls.items()),
        Route(COUNTS, counts, methods=["POST"]),
        Route(MODELS, models, methods=["GET"]),
        Route(MODELS + "/{name:path}", models, methods=["GET"]),
        Route(PREFIX + "{rest:path}", prefixed, methods=["POST", "GET"]),
        Route("/", Greeting(), methods=["GET"]),
    ]


class Shortcut:
    """An application in front of another one, which answers the calls itself: routing costs a tenth of a call.

    Args:
        app: Gets all other requests.
        gateway: Of the routes.
    """

    def __init__(self, app: Any, gateway: Gateway) -> None:
        self._app = app
        self._calls = {path: CallEndpoint(gateway, wire) for path, wire in WIRES.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        endpoint = self._calls.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        await (self._app if endpoint is None else endpoint)(scope, receive, send)


class Prefixed:
    """The routes below ``/w/<workflow>[/s/<stage>]``, for clients that can be given a base URL and nothing else.

    Args:
        posts: The endpoints of POST by their paths.
        models: The one of GET.
    """

    def __init__(self, posts: dict[str, Any], models: ModelsEndpoint) -> None:
        self._posts = posts
        self._models = models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        names, path = parted(scope)
        if scope["method"] == "POST" and (endpoint := self._posts.get(path)) is not None:
            await endpoint.answer(scope, receive, send, names)
        elif scope["method"] in ("GET", "HEAD") and (path == MODELS or path.startswith(MODELS + "/")):
            await self._models.answer(scope, send, path.removeprefix(MODELS).removeprefix("/"))
        else:
            known = path in self._posts or path.startswith(MODELS)
            method = refused(scope["method"], "POST" if path in self._posts else "GET")
            said = Failed(405, method) if known else Failed(404, missing(path, [*self._posts, MODELS]))
            await Answering(send, "none", MESSAGES if "/message" in path else CHAT).say(said)


def parted(scope: Scope) -> tuple[PathNames, str]:
    """Return the workflow and the stage that a path begins with, and what follows; names may hold ``%2F``."""
    raw = scope.get("raw_path") or scope["path"].encode()
    segments = [unquote(each) for each in raw.decode("latin-1").partition("?")[0].split("/")]
    workflow, rest = segments[2] if len(segments) > 2 else None, segments[3:]
    stage = None
    if len(rest) >= 2 and rest[0] == "s":
        stage, rest = rest[1], rest[2:]
    return (workflow, stage), "/" + "/".join(rest)


class Greeting:
    """What clients ask for before their first call, to see whether something is there."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        content = json.dumps({"name": "orla_lg", "models": MODELS}).encode()
        headers = [JSON, (b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else content})
