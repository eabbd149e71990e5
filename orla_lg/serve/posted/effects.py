"""What posted stages put into the gateway's requests: a prompt in the place of the caller's, and an effort."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from orla_lg.errors import MappingError
from orla_lg.serve.posted.items import PostedStage
from orla_lg.serve.posted.stages import StageBook
from orla_lg.wires.completions import COMPLETIONS
from orla_lg.wires.messages import MESSAGES
from orla_lg.wires.responses import RESPONSES
from orla_lg.wires.wire import Wire

INSTRUCTING = ("system", "developer")


class HasStages(Protocol):
    """What has the posted stages as they are now."""

    stages: StageBook


class StageEffects:
    """What holds for the requests of a stage.

    Args:
        source: Has the stages.
    """

    def __init__(self, source: HasStages) -> None:
        self._source = source

    def find(self, stage: str) -> PostedStage | None:
        """Return what is posted for a stage; what cannot be read, the mapping refuses."""
        stages = self._source.stages
        if stages.is_empty:
            return None
        try:
            return stages.find(stage)
        except MappingError:
            return None

    def apply(self, stage: str, wire: Wire, body: dict[str, Any]) -> None:
        """Put into a request what is posted for its stage."""
        if self._source.stages.is_empty:
            return
        posted = self.find(stage)
        if posted is None or wire.embeds:
            return
        if posted.reasoning_effort:  # it comes with the mapping, which never goes against what a caller wrote
            body.pop("reasoning_effort", None)
            if isinstance(reasoning := body.get("reasoning"), Mapping):
                body["reasoning"] = {name: value for name, value in reasoning.items() if name != "effort"}
        if posted.prompt:
            instruct(wire, body, posted.prompt)


def instruct(wire: Wire, body: dict[str, Any], prompt: str) -> None:
    """Put a prompt in the place of a request's leading instructions, else before all; a completion has none."""
    if wire is COMPLETIONS:
        return
    if wire is MESSAGES:
        body["system"] = prompt
    elif wire is RESPONSES:
        said = body.get("input")
        if "instructions" not in body and isinstance(said, list) and _instructs(said):
            body["input"] = [{**said[0], "content": prompt}, *said[1:]]
        else:
            body["instructions"] = prompt
    else:
        said = body.get("messages")
        before = said if isinstance(said, list) else []
        if _instructs(before):
            body["messages"] = [{**before[0], "content": prompt}, *before[1:]]
        else:
            body["messages"] = [{"role": "system", "content": prompt}, *before]


def _instructs(messages: list[Any]) -> bool:
    first = messages[0] if messages else None
    return isinstance(first, Mapping) and first.get("role") in INSTRUCTING
