"""Stages as v2 has them: put whole, changed field by field, removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orla_lg.serve.api.v2.errors import answering_errors, missing, wrong
from orla_lg.serve.api.v2.reading import body_of, given
from orla_lg.serve.past_calls.completions import CompletionBook
from orla_lg.serve.past_calls.moments import rfc3339
from orla_lg.serve.posted.applying import PostedThings
from orla_lg.serve.posted.book import Posted
from orla_lg.serve.posted.items import PostedStage, read_item
from orla_lg.serve.store.store import ABSENT

PATH = "/api/v1/stages"

FIELDS = dict.fromkeys(PostedStage.model_fields)


class Stages:
    """The routes of stages.

    Args:
        posted: What is posted.
        book: Knows the stages of past calls, which are there without having been posted.
        keeps_prompts: Whether the server was allowed to keep requests and answers.
    """

    def __init__(self, posted: PostedThings, book: CompletionBook, *, keeps_prompts: bool) -> None:
        self._posted, self._book, self._keeps_prompts = posted, book, keeps_prompts

    def routes(self) -> list[Route]:
        """Return them; what is below a stage comes before."""
        one = f"{PATH}/{{name:path}}"
        return [
            Route(PATH, answering_errors(self.list), methods=["GET"]),
            Route(one, answering_errors(self.get), methods=["GET"]),
            Route(one, answering_errors(self.put), methods=["PUT"]),
            Route(one, answering_errors(self.patch), methods=["PATCH"]),
            Route(one, answering_errors(self.delete), methods=["DELETE"]),
        ]

    async def list(self, _request: Request) -> Response:
        """List all stages that are posted, that the configuration file maps, or that calls were of, by name."""
        found = {name: bare(name, "call") for name in self._book.stages()}
        found |= {name: shown(each) for name, each in self._posted.items.of(PostedStage).items()}
        for name, to in self._of_file().items():
            found[name] = {**found.get(name, bare(name, "file")), "backend": to, "source": "file"}
        return JSONResponse({"stages": [found[name] for name in sorted(found)]})

    async def get(self, request: Request) -> Response:
        """Return one stage."""
        name = request.path_params["name"]
        stored, to = self._posted.items.get(PostedStage, name), self._of_file().get(name)
        if stored is None and to is None and name not in self._book.stages():
            raise missing("stage", name)
        said = bare(name, "call") if stored is None else shown(stored)
        return JSONResponse(said if to is None else {**said, "backend": to, "source": "file"})

    async def put(self, request: Request) -> Response:
        """Create a stage, or replace it: what the body leaves out is reset."""
        said = given(await body_of(request), FIELDS)
        return await self._put(self._checked({**said, "id": self._named(request, said)}))

    async def patch(self, request: Request) -> Response:
        """Change the fields that the body has; an empty text clears one."""
        said = given(await body_of(request), FIELDS)
        name = self._named(request, said)
        before = self._posted.items.get(PostedStage, name)
        if before is None and name not in self._book.stages() | self._of_file().keys():
            raise missing("stage", name)
        changed = (PostedStage(id=name) if before is None else before.item).changed(**said)
        version = ABSENT if before is None else before.version
        return await self._put(self._checked(changed.model_dump(mode="json")), expected=version)

    async def delete(self, request: Request) -> Response:
        """Remove a stage."""
        await self._posted.remove(PostedStage, request.path_params["name"])
        return Response(status_code=204)

    async def _put(self, item: PostedStage, expected: int | None = None) -> Response:
        return JSONResponse(shown(await self._posted.put(item, expected=expected)))

    def _checked(self, said: Mapping[str, Any]) -> PostedStage:
        item = read_item(PostedStage, said)
        if item.capture_io and not self._keeps_prompts:
            raise wrong("capture_io keeps what callers write: the server allows it with [serve] keep_prompts = true")
        return item

    def _named(self, request: Request, said: Mapping[str, Any]) -> str:
        name = str(request.path_params["name"])
        if said.get("id", name) != name:
            raise wrong(f"id is {name!r} by the path")
        return name

    def _of_file(self) -> dict[str, str]:
        """Return where the configuration file sends stages: the first backend of each that it names."""
        mapping = self._posted.reloader.file.mapping
        return {name: _first(to) for name, to in mapping.items()} if isinstance(mapping, Mapping) else {}


def _first(to: Any) -> str:
    if isinstance(to, Mapping):
        to = to.get("to", "")
    if isinstance(to, list | tuple):
        to = to[0] if to else ""
    return to if isinstance(to, str) else ""


def bare(name: str, source: str) -> dict[str, Any]:
    """Return a stage of which nothing is posted, in the same fields."""
    return {**PostedStage(id=name).model_dump(mode="json"), "source": source}


def shown(stored: Posted[PostedStage]) -> dict[str, Any]:
    """Return a stage as v2 writes it."""
    times = {"created_at": rfc3339(stored.created_s), "updated_at": rfc3339(stored.updated_s)}
    return {**stored.item.model_dump(mode="json"), **times, "source": "api"}
