"""Errors as v1's clients read them: a text, and the name of the request."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from orla_lg.serve.api.errors import Handler, answering, request_name
from orla_lg.serve.api.v1.answer import error
from orla_lg.serve.gateway.answers import Failed


def answering_errors(handler: Handler) -> Handler:
    """Return *handler* with its errors said in the answer."""
    return answering(handler, refusal)


def refusal(request: Request, said: Failed) -> Response:
    """Return the answer that says what was wrong."""
    return JSONResponse(error(said.message, request_name(request)), said.status)
