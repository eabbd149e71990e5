"""Errors as v1's clients read them: a text, and the name of the request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from orla_lg.errors import OrlaError
from orla_lg.serve.api.v1.answer import error
from orla_lg.serve.gateway import answers
from orla_lg.serve.posted.applying import NotPosted
from orla_lg.serve.posted.book import PostedFull
from orla_lg.serve.posted.joining import NamedByFile
from orla_lg.serve.store.store import Conflict, StoreUnavailable

Handler = Callable[[Request], Awaitable[Response]]

STATUS: dict[type[OrlaError], int] = {
    NamedByFile: 409, Conflict: 409, NotPosted: 404, PostedFull: 507, StoreUnavailable: 503,
}  # fmt: skip


def answering_errors(handler: Handler) -> Handler:
    """Return *handler* with its errors said in the answer."""

    async def answered(request: Request) -> Response:
        try:
            return await handler(request)
        except OrlaError as fault:
            return refusal(request, fault)

    return answered


def refusal(request: Request, fault: OrlaError) -> Response:
    """Return the answer that says what was wrong."""
    status = next((STATUS[kind] for kind in type(fault).__mro__ if kind in STATUS), None)
    said = answers.failed(fault, None) if status is None else answers.Failed(status, f"{fault}")
    assert said is not None, "each of our errors has an answer"
    name = answers.request_id(dict(request.headers.raw), "").decode("latin-1")
    return JSONResponse(error(said.message, name), said.status, {"x-request-id": name} if name else None)
