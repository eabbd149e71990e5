"""By declared need: a stage says what it needs, and which of the backends that can it prefers.

The declarative mapping of the Orla announcement: ``{"needs": ["tools", "context>16k"], "prefer": "cheapest"}``.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orla_lg.arguments import answering
from orla_lg.core.call import Assignment, Call, Considered
from orla_lg.core.engine.backend import Capability
from orla_lg.core.placement.view import BackendView
from orla_lg.errors import NAME_CHARS, ConfigError, MappingError, did_you_mean, shown

NEED_KEYS = ("needs", "prefer")

_COMPARISON = re.compile(r"(?P<what>\w+)\s*(?P<how>[<>]=?)\s*(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?P<unit>k?)")
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le,
}  # fmt: skip
_FIGURES: Mapping[str, Callable[[BackendView], float | None]] = {
    "context": lambda view: view.probe.context_tokens if view.probe else None,
    "quality": lambda view: view.quality,
    "input_cost": lambda view: view.cost.input_per_mtoken,
    "output_cost": lambda view: view.cost.output_per_mtoken,
}
"""What a comparison may be about; ``None`` where the backend does not say."""

_PREFERENCES: Mapping[str, Callable[[BackendView], float]] = {
    "cheapest": lambda view: view.cost.input_per_mtoken + view.cost.output_per_mtoken,
    "best": lambda view: -(view.quality or 0.0),
    "least_loaded": lambda view: (view.waiting + view.in_flight) / (view.max_concurrency or 1),
    "first": lambda view: 0.0,
}
"""The smallest goes first; equals in the order of the configuration."""


VISION = "vision"


@dataclass(frozen=True, slots=True)
class Need:
    """One requirement, as it was written."""

    text: str
    met: Callable[[BackendView], bool]

    @classmethod
    def parse(cls, text: str) -> Need:
        """Read ``tools``, ``context>16k``, ``quality >= 0.8``.

        Raises:
            ConfigError: It is none of these.
        """
        if not isinstance(text, str) or len(text) > NAME_CHARS:
            raise ConfigError(f"need {shown(text)}: expected text such as 'tools' or 'context>16k'")
        known = {str(capability) for capability in Capability} | {VISION}
        if text == VISION:
            return cls(text, lambda view: view.probe is None or view.probe.vision is not False)
        if text in set(Capability):
            capability = Capability(text)
            return cls(text, lambda view: view.probe is None or view.probe.can(capability))
        if (found := _COMPARISON.fullmatch(text)) is None or found["what"] not in _FIGURES:
            word = found["what"] if found else text
            if found is None and any(text.startswith(figure) for figure in _FIGURES):
                raise ConfigError(f"need {shown(text)}: compare with a number, as in 'context>16k' or 'quality>=0.8'")
            raise ConfigError(f"need {shown(text)} is unknown{did_you_mean(word, known | set(_FIGURES))}")
        figure, holds = _FIGURES[found["what"]], _OPERATORS[found["how"]]
        bound = float(found["number"]) * (1024 if found["unit"] else 1)

        def met(view: BackendView) -> bool:
            value = figure(view)
            return value is not None and holds(value, bound)

        return cls(text, met)


@answering
class NeedMapper:
    """Takes the preferred backend among those that meet every need; the others are its alternatives."""

    def __init__(self, needs: Sequence[str] = (), prefer: str = "first") -> None:
        if not isinstance(needs, Sequence) or isinstance(needs, str | bytes):
            raise ConfigError(f"needs must be a list, as in ['tools', 'context>16k'], got {shown(needs)}")
        self.needs = tuple(Need.parse(need) for need in needs)
        if not isinstance(prefer, str) or prefer not in _PREFERENCES:
            raise ConfigError(f"preference {shown(prefer)} is unknown{did_you_mean(prefer, _PREFERENCES)}")
        self.prefer = prefer

    @classmethod
    def of(cls, where: str, given: Mapping[str, Any]) -> NeedMapper:
        """Build from a table's ``needs`` and ``prefer``."""
        needs = given.get("needs", ())
        try:
            return cls([needs] if isinstance(needs, str) else needs, given.get("prefer", "first"))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    def check_needs(self, backends: Sequence[BackendView]) -> list[str]:
        """Return a fault if no backend meets the needs; nothing while one of them was not probed yet."""
        lacks = self._lacks(backends)
        known = all(view.probe is not None for view in backends)
        return [_unmet(lacks)] if known and all(lacks.values()) else []

    def _lacks(self, backends: Sequence[BackendView]) -> dict[str, list[str]]:
        return {view.name: [need.text for need in self.needs if not need.met(view)] for view in backends}

    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:  # noqa: D102
        lacks = self._lacks(backends)
        rank = _PREFERENCES[self.prefer]
        able = sorted((view for view in backends if not lacks[view.name]), key=rank)
        if not able:
            raise MappingError(f"stage {call.identity.stage!r}: {_unmet(lacks)}")
        considered = tuple(
            Considered(view.name, {self.prefer: rank(view)}, _verdict(lacks[view.name], chosen=view is able[0]))
            for view in backends
        )
        asked = ", ".join(need.text for need in self.needs) or "nothing"
        reason = f"needs {asked}; {self.prefer} of {len(able)}"
        others = tuple(view.name for view in able[1:])
        return Assignment(able[0].name, None, "need", reason, others, considered=considered)


def _unmet(lacks: Mapping[str, Sequence[str]]) -> str:
    faults = "; ".join(f"{name!r} lacks {', '.join(missing)}" for name, missing in lacks.items())
    return f"no backend meets its needs: {faults}"


def _verdict(lacks: Sequence[str], *, chosen: bool) -> str:
    if lacks:
        return f"lacks {', '.join(lacks)}"
    return "chosen" if chosen else "alternative"
