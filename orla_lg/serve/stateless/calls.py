"""The calls of a gateway without state: as those of a core's own, but that the core elsewhere decides about them."""

from __future__ import annotations

from orla_lg.clients.fitting import Fit, fitting
from orla_lg.clients.question import Question
from orla_lg.core.inflight import InFlightCall
from orla_lg.link.call import LinkedCall
from orla_lg.serve.access.access import Caller
from orla_lg.serve.gateway.calls import STRICT, Gateway, GatewayRequest
from orla_lg.serve.gateway.identity import CallSource


class LinkedGateway(Gateway):
    """What the routes of a gateway share whose core is elsewhere."""

    def _place(self, inflight: InFlightCall, source: CallSource, caller: Caller) -> None:
        """Have the core know in whose name the call is made, and that its model's name may place it."""
        assert isinstance(inflight, LinkedCall)
        inflight.key, inflight.tags, inflight.by_name = caller.key_id, source.tags, True

    def _fit(self, inflight: InFlightCall, question: Question, request: GatewayRequest) -> Fit | None:
        """Return what knows the backends that the request can be said to; the key's are the core's to look at."""
        return fitting(inflight, question, STRICT)
