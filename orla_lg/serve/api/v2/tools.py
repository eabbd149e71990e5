"""``POST /v1/tools/{kind}``: a call of a tool that was posted as a backend, queued, bounded and accounted for.

The caller's JSON goes to the tool as it is. The tool answers ``payload``, and beside it ``usage`` (amounts by name,
priced by the backend's ``rates``), ``cost_usd`` (what it costs, where the tool knows better) and ``metadata``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from math import ceil, isfinite
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orla_lg import config
from orla_lg.core.boundary.checked import is_number
from orla_lg.core.engine.breaker import Breaker, BreakerPolicy, Circuit
from orla_lg.core.serving import Serving
from orla_lg.errors import AccessDenied, BackendUnavailable, QueueFull
from orla_lg.serve.access.access import Access, Caller
from orla_lg.serve.api.v2.errors import answering_errors, error, wrong
from orla_lg.serve.api.v2.reading import body_of
from orla_lg.serve.gateway.answers import RequestRefused
from orla_lg.serve.gateway.identity import source_of
from orla_lg.serve.gateway.settings import GatewaySettings
from orla_lg.serve.http.guard import CALLER
from orla_lg.serve.past_calls.completions import Completion, CompletionBook
from orla_lg.serve.posted.applying import PostedThings
from orla_lg.serve.posted.fetching import OutsideClient, OutsideFault
from orla_lg.serve.posted.items import PostedBackend
from orla_lg.serve.posted.stages import DEFAULT_STAGE, StageBook

log = logging.getLogger("orla_lg")

PATH = "/v1/tools/{kind:path}"

MOST_BYTES = 64 << 20
"""Of a tool's answer."""

MOST_WAITING = 1000
"""Calls of one tool that wait, unless its ``queue_capacity`` says otherwise."""

BREAKER = BreakerPolicy(failures=5, pause_s=5.0, max_pause_s=60.0)
"""When a tool is left alone, and for how long."""


@dataclass(eq=False)
class ToolQueue:
    """The calls of one tool: so many at once, the others in the order in which they came."""

    places: int
    capacity: int
    rate: float | None = None
    """Calls a second; ``None``: any number."""
    breaker: Breaker = field(default_factory=lambda: Breaker(BREAKER))
    waiting: int = 0

    def __post_init__(self) -> None:
        self._room = asyncio.Semaphore(self.places)
        self._next_s = 0.0

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        """Wait for a place, and hold it while the block runs.

        Raises:
            QueueFull: Too many wait.
        """
        if self._room.locked() and self.waiting >= self.capacity:
            raise QueueFull(f"tool {name!r} has {self.waiting} calls waiting, as many as may")
        self.waiting += 1
        try:
            await self._room.acquire()
        finally:
            self.waiting -= 1
        try:
            await self._paced()
            yield
        finally:
            self._room.release()

    async def _paced(self) -> None:
        """Wait until the rate allows another call."""
        if self.rate:
            now = asyncio.get_running_loop().time()
            begins_s = max(now, self._next_s)
            self._next_s = begins_s + 1 / self.rate
            await asyncio.sleep(begins_s - now)


class Tools:
    """The route of tools.

    Args:
        posted: What is posted.
        serving: The core, whose guard is asked.
        access: Whose calls are counted.
        settings: How calls say where they are from, and how long an answer may take.
        book: Where calls are noted.
        client: Asks the tools.
    """

    def __init__(
        self,
        posted: PostedThings,
        serving: Serving,
        access: Access,
        settings: GatewaySettings,
        book: CompletionBook,
        client: OutsideClient,
    ) -> None:
        self._posted, self._serving, self._access = posted, serving, access
        self._settings, self._book, self._client = settings, book, client
        self._queues = dict[str, ToolQueue]()

    def state(self, backend: str) -> Circuit:
        """Return whether a tool is called at present."""
        queue = self._queues.get(backend)
        return Circuit.CLOSED if queue is None else queue.breaker.state(self._serving.clock())

    def routes(self) -> list[Route]:
        """Return it."""
        return [Route(PATH, answering_errors(self.call), methods=["POST"])]

    async def call(self, request: Request) -> Response:
        """Call a tool."""
        kind, body = request.path_params["kind"], await body_of(request)
        caller: Caller = request.scope[CALLER]
        source = source_of(dict(request.headers.raw), {}, (None, None), self._settings)
        stage = source.stage or DEFAULT_STAGE
        caller.check_stage(source.stage)
        tags = caller.tags_with(source.tags)
        backend = self._backend(kind, stage)
        caller.check_backend(backend.name)
        self._check(caller, source.tags, source.labels, stage, backend.name, kind)
        slot = await self._access.entered(caller)
        try:
            call_id = self._serving.new_id()
            answer = await self._called(backend, body, call_id, stage, source.workflow or f"call-{call_id}", tags)
        finally:
            slot.release()
        return answer

    def _backend(self, kind: str, stage: str) -> PostedBackend:
        """Return the tool that a stage is mapped to.

        Raises:
            RequestRefused: It is mapped to none, or to another kind.
        """
        posted = StageBook(self._posted.items).find(stage)
        if posted is None or not posted.backend:
            raise wrong(f"stage {stage!r} has no backend mapping; PUT /api/v1/stages/{stage} gives it a tool")
        stored = self._posted.items.get(PostedBackend, posted.backend)
        if stored is None:
            if posted.backend in self._serving.schedulers:
                raise wrong(f"backend {posted.backend!r} is of kind llm; this route calls tools")
            raise RequestRefused(502, f"backend {posted.backend!r} is not registered")
        backend = stored.item
        if backend.kind != "tool":
            raise wrong(f"backend {backend.name!r} is of kind llm; this route calls tools")
        if backend.tool_kind != kind:
            raise wrong(f"backend {backend.name!r} has tool_kind {backend.tool_kind!r}; {kind!r} was asked for")
        return backend

    def _check(
        self,
        caller: Caller,
        tags: Mapping[str, str],
        labels: frozenset[str],
        stage: str,
        backend: str,
        kind: str,
    ) -> None:
        """Refuse a call that the access policies do not allow.

        Raises:
            AccessDenied: They do not.
        """
        guard = self._serving.services.guard
        if guard is None:
            return
        subject = guard.subject_of(caller.tags, tags, trusted=caller.key_id is None)
        carried = labels | frozenset(self._posted.reloader.stages.labelled.get(stage, ()))
        said = guard.verdict(subject, backend=backend, tools=(kind,), labels=carried)
        if not said.allowed:
            raise AccessDenied(f"stage {stage!r} on tool {backend!r}: {said.reason}", rule=said.rule)

    def _queue(self, backend: PostedBackend) -> ToolQueue:
        places = backend.max_concurrency or 1
        capacity = MOST_WAITING if backend.queue_capacity is None else backend.queue_capacity
        queue, given = self._queues.get(backend.name), (places, capacity, backend.rate_per_second or None)
        if queue is None or (queue.places, queue.capacity, queue.rate) != given:
            queue = self._queues[backend.name] = ToolQueue(*given)
        return queue

    async def _called(
        self, backend: PostedBackend, body: Any, call_id: str, stage: str, workflow: str, tags: Mapping[str, str]
    ) -> Response:
        queue, clock = self._queue(backend), self._serving.clock
        if not queue.breaker.admit(clock()):
            refused = error(503, f"tool {backend.name!r} failed too often and is left alone: {queue.breaker.reason}")
            refused.headers["retry-after"] = str(max(1, ceil(queue.breaker.retry_at_s - clock())))
            return refused
        entered_s = clock()
        async with queue.turn(backend.name):
            began_s, answer, fault = clock(), None, None
            try:
                answer = checked(await self._asked(backend, body))
                queue.breaker.succeeded()
            except OutsideFault as failed:
                fault = failed
                if failed.status is None or failed.status >= 500:
                    queue.breaker.failed(clock(), str(failed))
                else:
                    queue.breaker.succeeded()
            took_s = clock() - began_s
        usage = {} if answer is None else usage_in(answer)
        cost = None if answer is None else cost_of(answer, usage, backend)
        self._book.add(
            Completion(
                call_id, stage, workflow, None, backend.name, "", None if fault is None else str(fault), took_s, cost,
                time.time(), queue_wait_s=began_s - entered_s, tool_kind=backend.tool_kind, usage=usage, tags=tags,
            )
        )  # fmt: skip
        if fault is not None:
            return error(504 if fault.kind == "timeout" else 502, f"tool {backend.name!r}: {fault}")
        return JSONResponse(answer, headers={"x-orla-completion-id": call_id, "x-orla-backend": backend.name})

    async def _asked(self, backend: PostedBackend, body: Any) -> Any:
        self._posted.allowed.check_url("endpoint", backend.endpoint)
        headers, variable = {}, backend.api_key_env_var
        if variable:
            self._posted.allowed.check_key(variable, backend.endpoint)
            if not (key := config.key_in(variable)):
                raise BackendUnavailable(f"tool {backend.name!r}: the variable {variable!r} is not set")
            headers["Authorization"] = f"Bearer {key}"
        return await self._client.ask(
            "POST", backend.endpoint, body, timeout_s=self._settings.answer_timeout_s, headers=headers,
            most_bytes=MOST_BYTES,
        )  # fmt: skip


def checked(answer: Any) -> dict[str, Any]:
    """Return a tool's answer, with what of it callers get.

    Raises:
        OutsideFault: It is none.
    """
    if not isinstance(answer, dict) or "payload" not in answer:
        raise OutsideFault("error", "the answer is no object with 'payload'")
    return {name: answer[name] for name in ("payload", "usage", "cost_usd", "metadata") if name in answer}


def usage_in(answer: Mapping[str, Any]) -> dict[str, float]:
    """Return the amounts in an answer that are some."""
    said = answer.get("usage")
    entries = said.items() if isinstance(said, dict) else ()
    return {str(name): float(amount) for name, amount in entries if is_number(amount) and isfinite(amount)}


def cost_of(answer: Mapping[str, Any], usage: Mapping[str, float], backend: PostedBackend) -> float | None:
    """Return what a call costs: what the tool says, else its usage at the backend's rates; ``None``: not known."""
    said = answer.get("cost_usd")
    if said is not None:
        return float(said) if is_number(said) and isfinite(said) and said >= 0 else None
    priced = [amount * backend.rates[name] for name, amount in usage.items() if name in backend.rates]
    total = sum(priced)
    return total if priced and isfinite(total) and total >= 0 else None
