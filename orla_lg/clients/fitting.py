"""Requests that a backend cannot be asked: those of a wire that its engine does not speak, and that is no chat."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal, Protocol, get_args

from orla_lg.clients.question import Question
from orla_lg.core.call import Assignment
from orla_lg.core.inflight import InFlightCall
from orla_lg.errors import MappingError
from orla_lg.wires.chat import CHAT
from orla_lg.wires.wire import Untranslatable

log = logging.getLogger("orla_lg")

Untranslated = Literal["external", "error"]
"""It goes where the code sends it, recorded as external, or it ends with a ``MappingError`` before it queues."""

UNTRANSLATED: tuple[Untranslated, ...] = get_args(Untranslated)


class Leniency(Protocol):
    """Whether a request that cannot be said to its backend may go where its code says."""

    @property
    def untranslatable(self) -> str:
        """``external``: it may; ``error``: it fails."""
        ...

    def is_first(self, field: str) -> bool:
        """Whether *field* keeps a request from being translated for the first time."""
        ...


Fit = Callable[[Assignment], Assignment | None]


def fitting(inflight: InFlightCall, asked: Question, site: Leniency) -> Fit | None:
    """Return what takes out of the call's assignment where its request cannot be said; ``None`` if it always can."""
    if asked.wire is CHAT:
        return None

    return WireFitting(inflight, asked, site)


class WireFitting:
    """Knows which backends one request can be said to."""

    def __init__(self, inflight: InFlightCall, asked: Question, site: Leniency) -> None:
        self._inflight, self._asked, self._site = inflight, asked, site

    def __call__(self, assignment: Assignment) -> Assignment | None:
        """Return what is left of an assignment; ``None`` where the request goes where its code says.

        Raises:
            MappingError: Nothing is, and the call is not to pass.
        """
        named = (assignment.backend, *assignment.alternatives)
        spoken = self._spoken(named)
        if len(spoken) == len(named):
            return assignment
        try:
            return assignment if self._asked.translated else None
        except Untranslatable as error:
            return _without(self._inflight, self._asked, self._site, assignment, spoken, error)

    def able(self) -> list[str] | None:
        """Return the backends that the request can be said to; ``None``: all."""
        schedulers = self._inflight.services.schedulers
        spoken = self._spoken(schedulers)
        if len(spoken) == len(schedulers) or self._asked.is_translatable:
            return None
        return spoken

    def _spoken(self, names: Iterable[str]) -> list[str]:
        schedulers, asked = self._inflight.services.schedulers, self._asked
        return [name for name in names if asked.wire_for(schedulers[name]) is asked.wire]


def _without(
    inflight: InFlightCall,
    asked: Question,
    site: Leniency,
    assignment: Assignment,
    spoken: list[str],
    error: Untranslatable,
) -> Assignment | None:
    """Return *assignment* with the backends that speak the wire alone.

    Raises:
        MappingError: There are none, and the call is not to pass.
    """
    if spoken:
        first, *others = spoken
        reason = assignment.reason if first == assignment.backend else f"{assignment.reason}; {error}"
        return replace(assignment, backend=first, alternatives=tuple(others), reason=reason)
    if site.untranslatable == "error":
        raise untranslatable(inflight, asked, error) from error
    if site.is_first(error.field):
        log.warning(
            "stage %r asks by %s for what backend %r cannot be asked: %s. Such calls go where their code says, past "
            "queues and limits; untranslatable='error' makes them fail instead. This is logged once for each field",
            inflight.call.identity.stage, asked.wire.title, assignment.backend, error,
        )  # fmt: skip
    inflight.why_external = f"{error}"
    return None


def untranslatable(inflight: InFlightCall, asked: Question, error: Untranslatable) -> MappingError:
    """Return the error of a call whose request cannot be said to a backend that it is mapped to."""
    schedulers = inflight.services.schedulers
    able = [name for name, scheduler in schedulers.items() if asked.wire_for(scheduler) is asked.wire]
    slots = [name for name, scheduler in schedulers.items() if name not in able and asked.is_spoken_by(scheduler)]
    beside = f" ({', '.join(slots)} too, but with slots or tenants apart, which chat alone can name)" if slots else ""
    may_pass = inflight.call.may_pass
    passing = ", or let such requests go where their code says (untranslatable='external')" if may_pass else ""
    stage = inflight.call.identity.stage
    subject = f"stage {stage!r}" if stage else "the call"
    return MappingError(
        f"{subject} asks by {asked.wire.title}, and {error}. Backends that can be asked "
        f"by {asked.wire.title}: {', '.join(able) or 'none'}{beside}; map the stage to one{passing}"
    )
