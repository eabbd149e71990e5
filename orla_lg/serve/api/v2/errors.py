"""Errors as v2's clients read them: OpenAI's envelope, whose type follows the status."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from orla_lg.serve.api.errors import Handler, answering
from orla_lg.serve.gateway.answers import Failed, RequestRefused
from orla_lg.serve.posted.applying import NotPosted

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
    """Return *handler* with its errors said in the answer."""
    return answering(handler, refusal)


def refusal(_request: Request, said: Failed) -> Response:
    """Return the answer that says what was wrong."""
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
