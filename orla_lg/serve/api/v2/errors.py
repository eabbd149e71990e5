"""Errors as v2's clients read them: OpenAI's envelope, whose type follows the status."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from orla_lg.errors import OrlaError
from orla_lg.serve.gateway import answers
from orla_lg.serve.gateway.answers import RequestRefused
from orla_lg.serve.posted.applying import NotPosted
from orla_lg.serve.posted.book import PostedFull
from orla_lg.serve.posted.joining import NamedByFile
from orla_lg.serve.store.store import Conflict, StoreUnavailable

Handler = Callable[[Request], Awaitable[Response]]

STATUS: dict[type[Exception], int] = {
    NamedByFile: 409, Conflict: 409, PostedFull: 409, NotPosted: 404, StoreUnavailable: 503,
}  # fmt: skip

TYPES = {
    400: "invalid_request_error", 401: "permission_denied", 403: "permission_denied", 404: "not_found",
    413: "invalid_request_error", 415: "invalid_request_error", 422: "invalid_request_error",
    429: "rate_limit_exceeded",
}  # fmt: skip


def error(status: int, message: str) -> Response:
    """Return an answer that says what was wrong."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "api_error")
    return JSONResponse({"error": {"message": message, "type": kind}}, status)


def answering_errors(handler: Handler) -> Handler:
    """Return *handler* with its errors said in the answer, and the name of the request."""

    async def answered(request: Request) -> Response:
        try:
            response = await handler(request)
        except OrlaError as fault:
            response = refusal(fault)
        if named := answers.request_id(dict(request.headers.raw), ""):
            response.headers.setdefault("x-request-id", named.decode("latin-1"))
        return response

    return answered


def refusal(fault: OrlaError) -> Response:
    """Return the answer that says what was wrong."""
    status = next((STATUS[kind] for kind in type(fault).__mro__ if kind in STATUS), None)
    if status is not None:
        return error(status, f"{fault}")
    said = answers.failed(fault, None)
    assert said is not None, "each of our errors has an answer"
    response = error(said.status, said.message)
    if said.retry_after_s is not None:
        response.headers["retry-after"] = str(max(1, round(said.retry_after_s)))
    return response


def missing(noun: str, name: str) -> NotPosted:
    """Return the error of what does not exist."""
    return NotPosted(f"there is no {noun} {name!r}")


def wrong(message: str) -> RequestRefused:
    """Return the error of a request that cannot be."""
    return RequestRefused(400, message)
