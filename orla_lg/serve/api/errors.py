"""What an error of ours is in an answer of either API: one status for each kind, whatever form its clients read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from orla_lg.errors import OrlaError
from orla_lg.serve.gateway import answers
from orla_lg.serve.posted.applying import NotPosted
from orla_lg.serve.posted.book import PostedFull
from orla_lg.serve.posted.joining import NamedByFile
from orla_lg.serve.store.store import Conflict, StoreUnavailable

Handler = Callable[[Request], Awaitable[Response]]

STATUS: dict[type[OrlaError], int] = {
    NamedByFile: 409, Conflict: 409, NotPosted: 404, PostedFull: 507, StoreUnavailable: 503,
}  # fmt: skip


def failed(fault: OrlaError) -> answers.Failed:
    """Return status and text of an error."""
    status = next((STATUS[kind] for kind in type(fault).__mro__ if kind in STATUS), None)
    said = answers.failed(fault, None) if status is None else answers.Failed(status, f"{fault}")
    assert said is not None, "each of our errors has an answer"
    return said


def request_name(request: Request) -> str:
    """Return the name that a request carries; empty where it has none."""
    return answers.request_id(dict(request.headers.raw), "").decode("latin-1")


def answering(handler: Handler, refusal: Callable[[Request, answers.Failed], Response]) -> Handler:
    """Return *handler* with its errors said in the answer, and the name of the request."""

    async def answered(request: Request) -> Response:
        try:
            response = await handler(request)
        except OrlaError as fault:
            response = refusal(request, failed(fault))
        if name := request_name(request):
            response.headers.setdefault("x-request-id", name)
        return response

    return answered
