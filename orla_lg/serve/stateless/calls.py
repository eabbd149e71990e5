"""The calls of a gateway without state: as those of a core's own, but that the core elsewhere decides about them."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from orla_lg.clients.fitting import Fit, fitting
from orla_lg.clients.question import Question
from orla_lg.core.inflight import InFlightCall
from orla_lg.link.call import LinkedCall
from orla_lg.serve.access.access import Caller
from orla_lg.serve.gateway.calls import STRICT, Gateway, GatewayRequest
from orla_lg.serve.gateway.identity import CallSource
from orla_lg.serve.gateway.sender import EngineReply


class LinkedGateway(Gateway):
    """What the routes of a gateway share whose core is elsewhere."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._replies = WeakKeyDictionary[EngineReply, InFlightCall]()
        """What is being passed on, each with its call."""

    async def answered(self, request: GatewayRequest, inflight: InFlightCall) -> EngineReply:
        """Live a call's life until the beginning of its answer is there."""
        reply = await super().answered(request, inflight)
        if reply.response is not None:
            self._replies[reply] = inflight
        return reply

    async def end_all(self, backend: str) -> None:
        """End what is under way to a backend: the grants for it are over, and belong to others."""
        for reply, inflight in list(self._replies.items()):
            if inflight.backend == backend and reply.response is not None:
                reply.response.close()  # its reader hears of that, and of a connection that ends it does not
        await self.links.abort(backend)

    def _place(self, inflight: InFlightCall, source: CallSource, caller: Caller) -> None:
        """Have the core know in whose name the call is made, and that its model's name may place it."""
        assert isinstance(inflight, LinkedCall)
        inflight.key, inflight.tags, inflight.by_name = caller.key_id, source.tags, True

    def _fit(self, inflight: InFlightCall, question: Question, request: GatewayRequest) -> Fit | None:
        """Return what knows the backends that the request can be said to; the key's are the core's to look at."""
        return fitting(inflight, question, STRICT)
