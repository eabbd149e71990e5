"""The few settings of v2: outside services that map stages and order queues, and how often prices are read again."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orla_lg.serve.api.errors import Handler
from orla_lg.serve.api.v2.errors import answering_errors, wrong
from orla_lg.serve.api.v2.reading import body_of, given
from orla_lg.serve.posted.applying import PostedThings
from orla_lg.serve.posted.items import HOOK_MS, REFRESH_MS, PostedSetting, read_item
from orla_lg.serve.posted.outside import COSTS, SCHEDULER_POLICY, STAGE_MAPPER

SERVICES = {"/api/v1/scheduler/policy": SCHEDULER_POLICY, "/api/v1/stage-mapper": STAGE_MAPPER}
PRICES = "/api/v1/costs/policy"


class OperatorSettings:
    """The routes of settings.

    Args:
        posted: What is posted.
    """

    def __init__(self, posted: PostedThings) -> None:
        self._posted = posted

    def routes(self) -> list[Route]:
        """Return them."""
        return [
            *(
                Route(path, answering_errors(handler), methods=[method])
                for path, name in SERVICES.items()
                for method, handler in (("GET", self._reading(name)), ("PUT", self._writing(name)))
            ),
            Route(PRICES, answering_errors(self.prices), methods=["GET"]),
            Route(PRICES, answering_errors(self.put_prices), methods=["PUT"]),
        ]

    def _reading(self, name: str) -> Handler:
        async def read(_request: Request) -> Response:
            return JSONResponse(service(self._setting(name)))

        return read

    def _writing(self, name: str) -> Handler:
        async def write(request: Request) -> Response:
            said = given(await body_of(request), {"url": None, "timeout_ms": None, "enabled": None})
            if said.pop("enabled", True) is False:  # what a client read before and sends back
                said["url"] = ""
            timeout_ms = said.get("timeout_ms", 0)
            if isinstance(timeout_ms, int) and timeout_ms < 0:
                raise wrong("timeout_ms must not be negative")
            said["timeout_ms"] = timeout_ms or HOOK_MS
            stored = await self._posted.put(read_item(PostedSetting, {**said, "name": name}))
            return JSONResponse(service(stored.item))

        return write

    async def prices(self, _request: Request) -> Response:
        """Say how often prices are read again."""
        return JSONResponse({"refresh_interval_ms": self._setting(COSTS).refresh_interval_ms})

    async def put_prices(self, request: Request) -> Response:
        """Change how often."""
        said = given(await body_of(request), {"refresh_interval_ms": None})
        said["refresh_interval_ms"] = said.get("refresh_interval_ms") or REFRESH_MS
        stored = await self._posted.put(read_item(PostedSetting, {**said, "name": COSTS}))
        return JSONResponse({"refresh_interval_ms": stored.item.refresh_interval_ms})

    def _setting(self, name: str) -> PostedSetting:
        stored = self._posted.items.get(PostedSetting, name)
        return read_item(PostedSetting, {"name": name}) if stored is None else stored.item


def service(setting: PostedSetting) -> dict[str, Any]:
    """Return an outside service as v2 writes it."""
    return {"url": setting.url, "timeout_ms": setting.timeout_ms, "enabled": bool(setting.url)}
