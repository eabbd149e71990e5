"""Variants of the mapping as v2 has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orla_lg.serve.api.v2.errors import answering_errors, missing, wrong
from orla_lg.serve.api.v2.reading import body_of, given
from orla_lg.serve.past_calls.moments import rfc3339
from orla_lg.serve.posted.applying import PostedThings
from orla_lg.serve.posted.book import Posted
from orla_lg.serve.posted.items import PostedMapping, read_item

PATH = "/api/v1/mappings"

FIELDS = dict.fromkeys(PostedMapping.model_fields)


class MappingVariants:
    """The routes of variants.

    Args:
        posted: What is posted.
    """

    def __init__(self, posted: PostedThings) -> None:
        self._posted = posted

    def routes(self) -> list[Route]:
        """Return them."""
        one = f"{PATH}/{{name:path}}"
        return [
            Route(PATH, answering_errors(self.list), methods=["GET"]),
            Route(PATH, answering_errors(self.put), methods=["POST"]),
            Route(one, answering_errors(self.get), methods=["GET"]),
            Route(one, answering_errors(self.delete), methods=["DELETE"]),
        ]

    async def put(self, request: Request) -> Response:
        """Create a variant, or replace the one of its name."""
        said = given(await body_of(request), FIELDS)
        if not said.get("name"):
            raise wrong("name is required")
        if not said.get("overrides"):
            raise wrong("overrides must map at least one stage to a backend")
        return JSONResponse(shown(await self._posted.put(read_item(PostedMapping, said))), 201)

    async def list(self, _request: Request) -> Response:
        """List all variants, those of the configuration file among them, by name."""
        found = {name: shown(each) for name, each in self._posted.items.of(PostedMapping).items()}
        found |= {name: of_file(name, each) for name, each in self._posted.reloader.file.variants.items()}
        return JSONResponse({"mappings": [found[name] for name in sorted(found)]})

    async def get(self, request: Request) -> Response:
        """Return one variant."""
        name = request.path_params["name"]
        if (table := self._posted.reloader.file.variants.get(name)) is not None:
            return JSONResponse(of_file(name, table))
        if (stored := self._posted.items.get(PostedMapping, name)) is None:
            raise missing("mapping", name)
        return JSONResponse(shown(stored))

    async def delete(self, request: Request) -> Response:
        """Remove a variant."""
        await self._posted.remove(PostedMapping, request.path_params["name"])
        return Response(status_code=204)


def of_file(name: str, table: Any) -> dict[str, Any]:
    """Return a variant of the configuration file, with what of it v2 can say: stages that go to one backend."""
    entries = table.items() if isinstance(table, Mapping) else ()
    return {"name": name, "overrides": {stage: to for stage, to in entries if isinstance(to, str)}, "source": "file"}


def shown(stored: Posted[PostedMapping]) -> dict[str, Any]:
    """Return a variant as v2 writes it."""
    times = {"created_at": rfc3339(stored.created_s), "updated_at": rfc3339(stored.updated_s)}
    return {**stored.item.model_dump(mode="json"), **times, "source": "api"}
