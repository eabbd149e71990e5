"""``POST /v1/messages/count_tokens``: how long a prompt is, without a call."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from orla_lg.clients.question import EssentialQuestion, Question
from orla_lg.core.call import CHARS_PER_TOKEN
from orla_lg.core.engine.backend import Capability
from orla_lg.core.engine.capabilities import Tokenizing
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.mapping import Consultation, assign
from orla_lg.core.placement.candidates import BackendCandidates
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.core.steps import Steps, adrive
from orla_lg.errors import MappingError, OrlaError
from orla_lg.serve.gateway import answers
from orla_lg.serve.gateway.answering import Answering, Receive, Scope, Send
from orla_lg.serve.gateway.answers import JSON
from orla_lg.serve.gateway.calls import ClientGone, Gateway, PathNames
from orla_lg.wires.messages import MESSAGES

PATIENCE_S = 5.0
"""So long an engine may take for it."""

MESSAGE_TOKENS = 4
"""What a chat template puts around each message, about."""


class CountEndpoint:
    """Counts by the tokenizer of the engine that the request would go to, else by its length.

    Args:
        gateway: Of all routes.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self.answer(scope, receive, send, (None, None))

    async def answer(self, scope: Scope, receive: Receive, send: Send, path: PathNames) -> None:
        """Answer one request below a path's prefix."""
        gateway, call_id = self._gateway, self._gateway.serving.new_id()
        answering, headers = Answering(send, call_id, MESSAGES), dict(scope["headers"])
        inflight: InFlightCall | None = None
        try:
            request = await gateway.read(scope, receive, MESSAGES, path)
            inflight = gateway.arrive_alone(request, call_id)
            tokens = await _counted(inflight, EssentialQuestion(MESSAGES, request.body))
        except ClientGone:
            return
        except OrlaError as error:
            await answering.refuse(error, inflight, headers)
            return
        content = json.dumps({"input_tokens": tokens}).encode()
        await answering.whole(200, [JSON, *answers.named(headers, call_id, MESSAGES)], content)


async def _counted(inflight: InFlightCall, question: Question) -> int:
    services, ask = inflight.services, inflight.call.ask
    candidates = BackendCandidates(services.schedulers, inflight.call, services.clock)
    consultation = Consultation(services.background, _asks_no_model)
    assignment = await adrive(assign(inflight.call, inflight.mappers, candidates, consultation))
    if services.guard is not None:
        assignment = services.guard.narrowed(inflight.call, assignment)
    scheduler = services.schedulers[assignment.backend]
    if (
        question.is_translatable
        and (tokens := await _tokenized(scheduler, inflight, question.translated)) is not None
    ):
        return tokens
    chars = ask.prompt_chars + ask.tools_chars
    return chars // CHARS_PER_TOKEN + MESSAGE_TOKENS * len(ask.messages) + 1


async def _tokenized(scheduler: BackendScheduler, inflight: InFlightCall, body: Mapping[str, Any]) -> int | None:
    adapter, probe = scheduler.adapter, scheduler.health.probe
    if probe is None or not probe.can(Capability.TOKENIZE) or not isinstance(adapter, Tokenizing):
        return None
    model = scheduler.backend.model or next(iter(probe.models), inflight.call.ask.model)
    tokenizing = inflight.services.background.submit(_length(adapter, {**body, "model": model}))
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.wrap_future(tokenizing)
    except (OrlaError, TimeoutError):
        return None


async def _length(adapter: Tokenizing, body: Mapping[str, Any]) -> int:
    return len(await adapter.tokenize(body))


def _asks_no_model(backend: str, body: Mapping[str, Any], stage: str, timeout_s: float) -> Steps:
    raise MappingError(f"stage {stage!r}: no model is asked to count tokens")
