"""The models that callers may name: backends, what they serve, and their aliases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from orla_lg.core.mapping import AUTO
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.serve.access.access import Caller, Denied
from orla_lg.serve.gateway import answers
from orla_lg.serve.gateway.answering import Answering, Receive, Scope, Send
from orla_lg.serve.gateway.answers import JSON, Failed
from orla_lg.serve.gateway.calls import Gateway
from orla_lg.wires.chat import CHAT
from orla_lg.wires.messages import MESSAGES

CREATED, CREATED_AT = 1_700_000_000, "2023-11-14T22:13:20Z"
"""Engines do not say when a model was made; clients want a number."""


class ModelsEndpoint:
    """``GET /v1/models`` and ``/v1/models/{id}``, in a shape that OpenAI's and Anthropic's clients both read.

    Args:
        gateway: Of all routes.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self.answer(scope, send, scope["path_params"].get("name", ""))

    async def answer(self, scope: Scope, send: Send, name: str) -> None:
        """Answer with one model, or with all where *name* is empty."""
        gateway, headers = self._gateway, dict(scope["headers"])
        wire = MESSAGES if b"anthropic-version" in headers else CHAT
        answering = Answering(send, gateway.serving.new_id(), wire)
        try:
            caller = gateway.admit(scope)
        except Denied as error:
            await answering.refuse(error, None, headers)
            return
        known = dict(self._models(caller))
        if name and name not in known:
            said = Failed(404, f"model {name!r:.200} is neither a backend nor served by one", "model_not_found")
            await answering.say(said)
            return
        listed = [_shown(each, owner) for each, owner in known.items()]
        whole: dict[str, Any] = {
            "object": "list", "data": listed, "has_more": False, "first_id": listed[0]["id"] if listed else None,
            "last_id": listed[-1]["id"] if listed else None,
        }  # fmt: skip
        content = json.dumps(_shown(name, known[name]) if name else whole).encode()
        await answering.whole(200, [JSON, *answers.named(headers, "models", wire)], content)

    def _models(self, caller: Caller) -> Iterator[tuple[str, str]]:
        """Yield the names that mean a backend, with the backend's; the first of each counts."""
        schedulers = [each for name, each in self._gateway.serving.schedulers.items() if caller.may_use(name)]
        if schedulers:
            yield AUTO, schedulers[0].backend.name
        seen: set[str] = {AUTO}
        for names in (_own, _served):
            for scheduler in schedulers:
                for name in names(scheduler):
                    if name not in seen:
                        seen.add(name)
                        yield name, scheduler.backend.name


def _own(scheduler: BackendScheduler) -> list[str]:
    return [scheduler.backend.name]


def _served(scheduler: BackendScheduler) -> list[str]:
    backend, probe = scheduler.backend, scheduler.health.probe
    scheduler.health.connect()
    own = [] if backend.model is None else [backend.model]
    return [*own, *backend.aliases, *(() if probe is None else probe.models)]


def _shown(name: str, owner: str) -> dict[str, Any]:
    return {
        "id": name, "object": "model", "created": CREATED, "owned_by": owner, "type": "model", "display_name": name,
        "created_at": CREATED_AT,
    }  # fmt: skip
