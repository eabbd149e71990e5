"""Where calls go that come from no graph: their model's name says it where no mapping names their stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from orla_lg.core.call import Assignment, Call
from orla_lg.core.identity import ANY_STAGE, Identity
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.mapping import Consultation, Mapper, named_in_code
from orla_lg.core.placement.embeddings import beside, naming
from orla_lg.core.placement.view import BackendView
from orla_lg.core.serving import Serving
from orla_lg.core.steps import Steps


class _NamedInRequest:
    """The mapper that is asked last where no chat model is meant: the model's name says where it goes."""

    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:
        return named_in_code(call.ask.model, backends)


class _OfAnyStage:
    """The mapper that is asked last about a call of no stage: the model's name first, then what holds for any stage.

    Args:
        mappers: Asked as about a call of that stage.
        stage: ``"*"``, or its embeddings.
    """

    def __init__(self, mappers: Sequence[Mapper], stage: str) -> None:
        self._mappers, self._stage = mappers, stage

    def foretell(self, stage: str) -> None:
        """Say nothing beforehand: no backend is waited for on its account."""

    def consult(self, call: Call, backends: Sequence[BackendView], ask: Consultation) -> Steps:
        if any(view.probe is None for view in backends):  # it may yet say that it serves the model
            return None
        if not call.ask.embeds and (meant := named_in_code(call.ask.model, backends)) is not None:
            return meant
        asked = replace(call, identity=replace(call.identity, stage=self._stage))
        for mapper in self._mappers:
            chosen: Assignment | None = yield from ask.mapper(mapper, asked, backends)
            if chosen is not None:
                return chosen
        return None


_NAMED_IN_REQUEST = _NamedInRequest()
_ANY_EMBEDDINGS = beside(Identity("", stage=ANY_STAGE)).stage


def place_by_name(serving: Serving, inflight: InFlightCall) -> None:
    """Have a call placed by its model's name where no mapping names its stage, and by ``"*"`` if it has none."""
    call, more = inflight.call, list[Mapper]()
    if call.ask.embeds:
        more.append(_NAMED_IN_REQUEST)
    if not call.identity.stage:
        chain = serving.mappings.chain((), call.hints.variant)
        stage = _ANY_EMBEDDINGS if call.ask.embeds else ANY_STAGE
        chain = naming(chain, stage) if call.ask.embeds else chain
        if chain:
            more.append(_OfAnyStage(chain, stage))
    if more:
        inflight.mappers = (*inflight.mappers, *more)
