"""Backends as v2 has them: created, listed, changed field by field, removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orla_lg.core.engine.backend import Backend
from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.serving import Serving
from orla_lg.errors import shown
from orla_lg.serve.api.errors import Handler
from orla_lg.serve.api.v2.errors import answering_errors, missing, wrong
from orla_lg.serve.api.v2.reading import body_of, given
from orla_lg.serve.past_calls.moments import rfc3339
from orla_lg.serve.posted.applying import PostedThings
from orla_lg.serve.posted.book import Posted
from orla_lg.serve.posted.items import PostedBackend, read_item
from orla_lg.serve.posted.joining import NamedByFile, named_by
from orla_lg.serve.store.store import ABSENT, Conflict

PATH = "/api/v1/backends"

FIELDS = {name: None for name in PostedBackend.model_fields if name != "queue_capacity"}

STATES = {Circuit.CLOSED: "closed", Circuit.OPEN: "open", Circuit.HALF_OPEN: "half-open"}

CLEARED = ("cost_source", "api_key_env_var", "input_cost_per_mtoken", "output_cost_per_mtoken",
           "cache_read_cost_per_mtoken", "quality", "rate_per_second")  # fmt: skip
"""What PATCH clears with an empty text, or with null."""

FIXED = ("name", "kind")
"""What is another backend where it differs."""

_PRICES = ("input_cost_per_mtoken", "output_cost_per_mtoken")


class Backends:
    """The routes of backends.

    Args:
        posted: What is posted.
        serving: The core.
        tool_state: Returns the circuit of a tool.
        register: v1's ``POST``, of a body with a ``type``.
    """

    def __init__(
        self,
        posted: PostedThings,
        serving: Serving,
        tool_state: Callable[[str], Circuit],
        register: Handler | None = None,
    ) -> None:
        self._posted, self._serving, self._tool_state, self._register = posted, serving, tool_state, register

    def routes(self) -> list[Route]:
        """Return them."""
        one = f"{PATH}/{{name:path}}"
        return [
            Route(PATH, answering_errors(self.list), methods=["GET"]),
            Route(PATH, self.create, methods=["POST"]),
            Route(one, answering_errors(self.get), methods=["GET"]),
            Route(one, answering_errors(self.patch), methods=["PATCH"]),
            Route(one, answering_errors(self.delete), methods=["DELETE"]),
        ]

    async def create(self, request: Request) -> Response:
        """Create a backend: v1's where the body has a type, else v2's."""
        if self._register is not None and await _has_type(request):
            return await self._register(request)
        return await answering_errors(self._create)(request)

    async def _create(self, request: Request) -> Response:
        said = given(await body_of(request), FIELDS)
        for name in ("name", "endpoint", "max_concurrency"):
            if said.get(name) in (None, ""):
                raise wrong("max_concurrency must be >= 1" if name == "max_concurrency" else f"{name} is required")
        item = read_item(PostedBackend, said)
        if item.kind == "llm" and not item.model_id:
            raise wrong("model_id is required for kind=llm")
        if self._posted.items.get(PostedBackend, item.name) is not None:
            raise Conflict(f"there is a backend {item.name!r} already; PATCH changes it")
        stored = await self._posted.put(item, expected=ABSENT)
        return JSONResponse({**self._shown(stored), "success": True}, 201)

    async def list(self, _request: Request) -> Response:
        """List all backends, those of the configuration file among them, by name."""
        found = {name: self._shown(each) for name, each in self._posted.items.of(PostedBackend).items()}
        file, tables = self._posted.reloader.file, self._posted.reloader.file.written.get("backends", {})
        found.update({each.name: self._of_file(each, tables.get(each.name, {})) for each in file.backends})
        return JSONResponse({"backends": [found[name] for name in sorted(found)]})

    async def get(self, request: Request) -> Response:
        """Return one backend."""
        return JSONResponse(self._found(request.path_params["name"]))

    async def patch(self, request: Request) -> Response:
        """Change the fields that the body has."""
        name, body = request.path_params["name"], flattened(await body_of(request))
        given(body, FIELDS)
        before = self._stored(name)
        said = {each: _cleared(each, value) for each, value in body.items() if value is not None or each in CLEARED}
        for each in FIXED:
            if each in said and said[each] != getattr(before.item, each):
                raise wrong(f"{each} cannot be changed; DELETE the backend and create another one")
        if said.get("max_concurrency") == 0:
            raise wrong("max_concurrency must be >= 1")
        stored = await self._posted.put(before.item.changed(**said), expected=before.version)
        return JSONResponse({**self._shown(stored), "success": True})

    async def delete(self, request: Request) -> Response:
        """Remove a backend; calls that wait or run there go on."""
        await self._posted.remove(PostedBackend, request.path_params["name"])
        return Response(status_code=204)

    def _stored(self, name: str) -> Posted[PostedBackend]:
        if (stored := self._posted.items.get(PostedBackend, name)) is not None:
            return stored
        if said := named_by(self._posted.reloader.file, PostedBackend.kind_, name):
            raise NamedByFile(said)
        raise missing("backend", name)

    def _found(self, name: str) -> dict[str, Any]:
        file = self._posted.reloader.file
        if (mine := next((each for each in file.backends if each.name == name), None)) is not None:
            return self._of_file(mine, file.written.get("backends", {}).get(name, {}))
        if (stored := self._posted.items.get(PostedBackend, name)) is None:
            raise missing("backend", name)
        return self._shown(stored)

    def _shown(self, stored: Posted[PostedBackend]) -> dict[str, Any]:
        said = stored.item.model_dump(mode="json")
        said["model_id"], said["tool_kind"] = said["model_id"] or None, said["tool_kind"] or None
        said["cost_source"] = said["cost_source"] or None
        times = {"created_at": rfc3339(stored.created_s), "updated_at": rfc3339(stored.updated_s)}
        return {**said, **times, **self._now(stored.item.name), "source": "api"}

    def _of_file(self, backend: Backend, table: Mapping[str, Any]) -> dict[str, Any]:
        """Return a backend of the configuration file in the same fields."""
        cost = backend.cost
        return {
            "name": backend.name, "endpoint": backend.url, "kind": "llm", "type": backend.engine,
            "model_id": backend.model, "api_key_env_var": table.get("api_key_env") or "",
            "max_concurrency": backend.max_concurrency, "queue_capacity": backend.capacity,
            "quality": backend.quality, "rate_per_second": None, "input_cost_per_mtoken": cost.input_per_mtoken,
            "output_cost_per_mtoken": cost.output_per_mtoken,
            "cache_read_cost_per_mtoken": cost.cached_input_per_mtoken, "cost_source": None,
            "tool_kind": None, "rates": {}, **self._now(backend.name), "source": "file",
        }  # fmt: skip

    def _now(self, name: str) -> dict[str, Any]:
        if name not in self._serving.schedulers:
            fault = self._posted.reloader.posted.faults.get(name)
            return {
                "circuit_breaker": STATES[self._tool_state(name)],
                **({} if fault is None else {"left_out": fault}),
            }
        scheduler = self._serving.schedulers[name]
        return {"circuit_breaker": STATES[scheduler.health.breaker.state(self._serving.clock())]}


def flattened(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is said of a backend with the prices of v1's ``cost_model`` as fields of its own.

    Raises:
        RequestRefused: The prices are none.
    """
    said = dict(body)
    prices = said.pop("cost_model", None)
    if prices is None:
        return said
    if not isinstance(prices, Mapping) or not set(prices) <= set(_PRICES):
        raise wrong(f"cost_model must have {' and '.join(_PRICES)}, got {shown(prices)}")
    return {**said, **prices}


def _cleared(name: str, value: Any) -> Any:
    if value not in (None, ""):
        return value
    return PostedBackend.model_fields[name].default if name in PostedBackend.model_fields else value


async def _has_type(request: Request) -> bool:
    try:
        return "type" in await body_of(request)
    except Exception:  # noqa: BLE001 - v2 says what is wrong with it
        return False
