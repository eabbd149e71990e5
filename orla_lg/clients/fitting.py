"""Requests that a backend cannot be asked: those of a wire that its engine does not speak, and that is no chat."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from orla_lg.clients.question import Question
from orla_lg.core.call import Assignment
from orla_lg.core.inflight import InFlightCall
from orla_lg.errors import MappingError
from orla_lg.wires.chat import CHAT
from orla_lg.wires.wire import Untranslatable

log = logging.getLogger("orla_lg")


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

    def fit(assignment: Assignment) -> Assignment | None:
        schedulers = inflight.services.schedulers
        named = (assignment.backend, *assignment.alternatives)
        spoken = [name for name in named if asked.wire_for(schedulers[name]) is asked.wire]
        if len(spoken) == len(named):
            return assignment
        try:
            return assignment if asked.translated else None
        except Untranslatable as error:
            return _without(inflight, asked, site, assignment, spoken, error)

    return fit


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
    return MappingError(
        f"stage {inflight.call.identity.stage!r} asks by {asked.wire.title}, and {error}. Backends that can be asked "
        f"by {asked.wire.title}: {', '.join(able) or 'none'}{beside}; map the stage to one{passing}"
    )
