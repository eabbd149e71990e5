"""``GET /metrics``: the core's metrics, and the server's own; and changes by API, counted as they are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from orla_lg.observe import metrics
from orla_lg.observe.counts import ControlCounts
from orla_lg.observe.prometheus import counter, gauge
from orla_lg.orla import Orla
from orla_lg.serve.http.guard import READS
from orla_lg.serve.http.health import METRICS, CoreState, Receive, Scope, Send
from orla_lg.serve.link.roster import Replica
from orla_lg.serve.store.lease import CoreLease

API, OWN = "/api/v1/", "/v1/orla/"

RESOURCES = frozenset({
    "backends", "stages", "mappings", "policies", "skills", "workflows", "workflow", "costs", "scheduler",
    "stage-mapper", "control", "reload", "settings",
})  # fmt: skip
"""What can be changed, as its path begins; anything else is ``other``."""

NO_CHANGE = frozenset({"access", "execute"})
"""What is asked by POST, and changes nothing."""


class ReplicaHost(Protocol):
    """What has replicas."""

    replicas: dict[str, Replica]


class Watched(Protocol):
    """A server."""

    orla: Orla
    lease: CoreLease

    @property
    def host(self) -> ReplicaHost:
        """Its links."""
        ...

    @property
    def state(self) -> CoreState:
        """What it is at."""
        ...

    @property
    def under_way(self) -> int:
        """How many HTTP requests have no whole answer yet."""
        ...


class ServerMetrics(Collector):
    """A server's registry, and what in it is the server's own.

    Args:
        server: Whose.
    """

    def __init__(self, server: Watched) -> None:
        self.registry = CollectorRegistry()
        self._server = server
        self._core = metrics(server.orla, self.registry)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    @property
    def counts(self) -> ControlCounts:
        """What no record tells of."""
        return self._core.counts

    def close(self) -> None:
        """Count no more. Idempotent."""
        self._core.close()

    def describe(self) -> Iterator[Metric]:
        """Yield nothing: the registry is this server's alone."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield the server's own metrics as they are now."""
        server = self._server
        ready = gauge("orla_server_ready", "Whether the server takes calls (1) or not (0).")
        ready.add_metric([], server.state is CoreState.READY)
        yield ready
        store = gauge("orla_store_answers", "Whether the store answered when it was asked last (1) or not (0).")
        store.add_metric([], not server.lease.store_away)
        yield store
        outages = counter("orla_store_outages", "How often the store did not renew the core's lease.")
        outages.add_metric([], server.lease.outages)
        yield outages
        requests = gauge("orla_server_requests_under_way", "HTTP requests without a whole answer.")
        requests.add_metric([], server.under_way)
        yield requests
        links = gauge("orla_links", "Linked processes, by whether they are connected or lost.", ["state"])
        replicas = list(server.host.replicas.values())
        connected = sum(each.session is not None for each in replicas)
        links.add_metric(["connected"], connected)
        links.add_metric(["lost"], len(replicas) - connected)
        yield links


def metrics_routes(found: ServerMetrics) -> list[Route]:
    """Return the route."""

    async def scrape(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        content = await asyncio.to_thread(encode, found.registry)  # statistics take locks
        return Response(content, headers={"content-type": content_type})

    return [Route(METRICS, scrape)]


class MutationCount:
    """Counts requests that change something, by what came of them: an ASGI application around the one that answers.

    Args:
        app: Answers.
        counts: Where to.
    """

    def __init__(self, app: Any, counts: ControlCounts) -> None:
        self._app = app
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        resource = _changed(scope)
        if resource is None:
            await self._app(scope, receive, send)
            return

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._counts.mutation(resource, scope["method"], _outcome(message["status"]))
            await send(message)

        await self._app(scope, receive, counted)


def _changed(scope: Scope) -> str | None:
    """Return what a request changes; ``None``: nothing."""
    if scope["type"] != "http" or scope["method"] in READS:
        return None
    path: str = scope["path"]
    prefix = next((each for each in (API, OWN) if path.startswith(each)), None)
    if prefix is None:
        return None
    resource = path.removeprefix(prefix).partition("/")[0]
    if resource in NO_CHANGE:
        return None
    return resource if resource in RESOURCES else "other"


def _outcome(status: int) -> str:
    return "ok" if status < 400 else "refused" if status < 500 else "error"
