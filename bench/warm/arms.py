"""The arms: what decides about the cache; and what a turn of an arm showed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from bench.lib.calls import CallSeen
from bench.lib.client import connected
from orla_lg import Backend, Orla


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to serve a graph."""

    name: str
    wrapped: bool = True
    warm_up: bool = False
    max_saved: int = 0
    """Slots that the engine may keep on its disk; 0: none, so that what is lost must be computed."""


BARE, AGAIN = Arm("bare", wrapped=False), Arm("bare again", wrapped=False)
COLD, WARM = Arm("orla, no warm-ups"), Arm("orla, warm-ups", warm_up=True)
SAVED = Arm("orla, slots saved", warm_up=True, max_saved=64)
ARMS = {arm.name: arm for arm in (BARE, AGAIN, COLD, WARM, SAVED)}


@dataclass(frozen=True, slots=True)
class WarmUps:
    """What became of a turn's warm-ups; fields as in ``orla_lg.WarmStatistics``."""

    started: int = 0
    done: int = 0
    given_up: int = 0
    failed: int = 0
    warmed_tokens: int = 0
    used_tokens: int = 0
    wasted_tokens: int = 0
    refused: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Measured:
    """One turn of an arm: the same load as every other arm of its round."""

    situation: str
    place: str
    arm: str
    seed: int
    calls: list[CallSeen]
    """Number 0: a call that nothing can be warmed for, which counts for the makespan only."""
    makespan_s: float
    warm_ups: WarmUps
    others: float = 0.0
    """What other processes took of the machine meanwhile, 0 to 1."""

    @property
    def counted(self) -> list[CallSeen]:
        """The calls that the situation is about."""
        return [call for call in self.calls if call.number]


def orla_of(arm: Arm, backends: Sequence[Backend], mapper: dict[str, str]) -> AbstractContextManager[Orla | None]:
    """Return the arm's ``Orla``, connected; ``None`` inside for a bare one."""
    return connected(backends, mapper, wrapped=arm.wrapped, warm_up=arm.warm_up)


def warm_ups_of(orla: Orla | None, backend: str) -> WarmUps:
    """Return what an ``Orla`` counted until now."""
    if orla is None:
        return WarmUps()
    said = orla.statistics().backends[backend].warm_ups
    return WarmUps(**{name: getattr(said, name) for name in WarmUps.__dataclass_fields__})
