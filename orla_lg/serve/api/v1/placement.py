"""Where an execute goes: to the backend that it names, unless it asks for a quality which that one does not have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orla_lg.core.call import CHARS_PER_TOKEN, Assignment, Call
from orla_lg.core.mapping import AUTO, BY_NAME
from orla_lg.core.placement.view import BackendView, find
from orla_lg.errors import MappingError
from orla_lg.serve.posted.items import PostedStage
from orla_lg.serve.posted.stages import given


def _nothing(stage: str) -> PostedStage | None:
    return None


@dataclass(frozen=True, slots=True)
class NamedBackend:
    """The mapper of one execute. A name that is no backend's is left to the mappings, and read as a model's.

    Args:
        name: Of the backend.
        accuracy: The quality that it needs, 0 to 1; ``None``: any.
        is_strict: A backend without that quality does not take it.
        may_use: Whether the caller's key allows a backend.
        posted: Returns what is posted for a stage.
    """

    name: str
    accuracy: float | None = None
    is_strict: bool = False
    may_use: Callable[[str], bool] = bool
    posted: Callable[[str], PostedStage | None] = _nothing

    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:
        """Return where the call runs; ``None`` where the name is no backend's.

        Raises:
            MappingError: No backend has the quality that it insists on.
        """
        chosen = self._chosen(call, backends)
        return None if chosen is None else given(chosen, self.posted(call.identity.stage), call, backends)

    def _chosen(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:
        named = find(backends, self.name)
        if self.accuracy is None or (named is None and self.name != AUTO):
            return None if named is None else Assignment(named.name, mapper=BY_NAME, reason="the execute names it")
        able = [each for each in backends if (each.quality or 0.0) >= self.accuracy and self.may_use(each.name)]
        if named is not None and (named in able or not (able or self.is_strict)):
            reached = "has" if named in able else "is named, and no backend has"
            return Assignment(named.name, mapper=BY_NAME, reason=f"it {reached} quality {self.accuracy:g}")
        if able:
            cheapest = min(able, key=lambda each: _price(call, each))
            return Assignment(cheapest.name, mapper=BY_NAME, reason=f"the cheapest of quality {self.accuracy:g}")
        if self.is_strict:
            known = ", ".join(f"{each.name}: {each.quality}" for each in backends if each.quality is not None)
            raise MappingError(
                f"no backend has quality {self.accuracy:g} (accuracy_policy strict); {known or 'none'}"
            )
        return None


def _price(call: Call, backend: BackendView) -> float:
    """Return what a call is expected to cost on a backend, in millionths of a dollar."""
    prompt_tokens, cost = call.ask.prompt_chars / CHARS_PER_TOKEN, backend.cost
    return prompt_tokens * cost.input_per_mtoken + call.expected_answer_tokens * cost.output_per_mtoken
