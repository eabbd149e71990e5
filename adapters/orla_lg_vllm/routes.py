"""The routes of the plugin: ``POST /v1/orla/kv/{pin,release,flush,stat}`` in vLLM's own server.

An endpoint plugin of vLLM, which it loads only if ``VLLM_PLUGINS`` names it. Below ``/v1`` the server's API key
guards the routes like all others. An order goes to every engine process, since each has a cache of its own, and
is carried out between two of its steps.

This file runs inside the engine's server: beside the standard library it imports what vLLM's plugins are made
for, its web framework.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from orla_lg_vllm.keeper import VERBS, Answer

UNSUPPORTED = 501
SCHEDULERS = "--scheduler-cls orla_lg_vllm.scheduler.OrlaAsyncScheduler"
_STRONGEST = ("unsupported", "deferred", "pinned", "demoted", "freed", "stat", "failed")
"""Of the effects in several engines, the first of these is told."""


class OrlaRoutes:
    """What vLLM's plugin loader makes and attaches."""

    name = "orla_lg"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the routes to vLLM's application."""
        for verb in VERBS:
            app.add_route(f"/v1/orla/kv/{verb}", _route(verb), methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Keep what reaches the engine processes."""
        state.orla_engine = engine_client


def _route(verb: str) -> Any:
    async def answer(request: Request) -> JSONResponse:
        try:
            workflow, ttl_s = read_order(verb, await request.body())
        except ValueError as error:
            return JSONResponse({"effect": "failed", "reason": str(error)}, status_code=400)
        told = merged(await _asked(request.app.state.orla_engine, verb, workflow, ttl_s))
        return JSONResponse(told, status_code=UNSUPPORTED if told["effect"] == "unsupported" else 200)

    return answer


async def _asked(client: Any, verb: str, workflow: str, ttl_s: float | None) -> Sequence[Answer]:
    try:
        answers: Sequence[Answer] = await client.engine_core.call_utility_all_async("orla_kv", verb, workflow, ttl_s)
    except Exception as error:  # vLLM names no type for a call that its engine does not know; others go on
        if "orla_kv" not in str(error):
            raise
        # Only our schedulers teach the engine this call.
        reason = f"the engine was not started with {SCHEDULERS}"
        return [{"effect": "unsupported", "reason": reason}]
    return answers


def read_order(verb: str, body: bytes) -> tuple[str, float | None]:
    """Return a request's workflow and how long it is to be pinned, in seconds.

    Raises:
        ValueError: It is not as it should be; the message says what would be right.
    """
    try:
        order = json.loads(body or b"{}")
    except ValueError as error:
        raise ValueError(f"the body is no JSON: {error}") from error
    if not isinstance(order, Mapping):
        raise ValueError(f'the body must be an object such as {{"workflow": "w1"}}, got {type(order).__name__}')
    known = ("workflow", "ttl_s") if verb == "pin" else ("workflow",)
    if unknown := set(order) - set(known):
        raise ValueError(f"{verb} knows the fields {', '.join(known)}; got {', '.join(sorted(unknown))}")
    workflow, ttl_s = order.get("workflow", ""), order.get("ttl_s")
    if not isinstance(workflow, str) or not (workflow or (verb == "stat" and "workflow" not in order)):
        raise ValueError(f'{verb} needs "workflow", the name of one as a string, got {workflow!r}')
    number = isinstance(ttl_s, int | float) and not isinstance(ttl_s, bool)
    if ttl_s is not None and not (number and isfinite(ttl_s) and ttl_s > 0):
        raise ValueError(f'"ttl_s" must be a number of seconds above 0, got {ttl_s!r}')
    return workflow, None if ttl_s is None else float(ttl_s)


def merged(answers: Sequence[Answer]) -> Answer:
    """Return one answer for those of all engine processes: their counts added up."""
    first = min(answers, key=lambda answer: _STRONGEST.index(answer["effect"]))
    added = {name: _sum([answer.get(name) for answer in answers], value) for name, value in first.items()}
    return {**added, **{name: first[name] for name in ("block_tokens",) if name in first}}


def _sum(values: Sequence[Any], first: Any) -> Any:
    if isinstance(first, Mapping):
        return {name: _sum([(value or {}).get(name) for value in values], part) for name, part in first.items()}
    if isinstance(first, str):
        return first
    return sum(value or 0 for value in values)
