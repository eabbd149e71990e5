"""What was learned of one stage of one graph: means, by visit and by round where that matters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orla_lg.core.lookahead.estimates_file import Stored

MAX_VISITS = 32
"""Later visits of a stage count as this one."""

OLD_WEIGHT = 50
"""Means weigh what is new like one in so many, once they have seen as many."""

START_WEIGHT = 3
"""What a stage begins with that others had learned weighs as much as so many of its own."""

KEEP_TURNS = 200.0
"""Of a stage's turns no more are remembered: then all counts are halved, and what is new weighs more."""

ROUNDS = (0, 1, 2, 3, 4, 8, 8, 8, 8, 16)
"""By number of a call among those of its stage in its run, the last of the numbers that count as the same: the first
four are told apart, those up to the eighth count together, and so do all later ones."""

DOUBT = 2
"""Odds weigh as if so many runs more had gone on: one run that ended here says little."""

LATELY = 0.1
"""Weight of a stage's newest call in where its calls go."""


@dataclass(eq=False, slots=True)
class Mean:
    """A mean that forgets slowly."""

    value: float = 0.0
    seen: int = 0

    def learn(self, value: float) -> None:
        """Take in one more."""
        seen = self.seen = self.seen + 1
        self.value += (value - self.value) / (seen if seen < OLD_WEIGHT else OLD_WEIGHT)

    def lighter(self) -> Mean:
        """Return the same mean for a stage that begins with it."""
        return Mean(self.value, min(self.seen, START_WEIGHT))


@dataclass(eq=False, slots=True)
class StageEstimates:
    """What is known of one stage of one graph."""

    answer_tokens: Mean = field(default_factory=Mean)
    service_s: Mean = field(default_factory=Mean)
    remaining_s: dict[int, Mean] = field(default_factory=dict)
    """By visit: service from here to the end of the run, this stage's own included."""
    growth_tokens: dict[int, Mean] = field(default_factory=dict)
    """By visit: what the run's longest context still grew by after a call here."""
    final: dict[int, Mean] = field(default_factory=dict)
    """By round (``round_of``): how often no call of the run followed."""
    calls: Mean = field(default_factory=Mean)
    """Of one visit."""
    other_s: Mean = field(default_factory=Mean)
    """Of one visit: what its calls did not take."""
    tool_s: Mean = field(default_factory=Mean)
    """Of one run of a tool."""
    visits: Mean = field(default_factory=Mean)
    """Of a run that comes by."""
    turns: float = 0.0
    """Steps in which it ran; those long ago count less."""
    moves: dict[str, float] = field(default_factory=dict)
    """By stage, in how many of these turns it followed."""
    backends: dict[str, float] = field(default_factory=dict)
    """By backend, the share of the stage's calls that went there lately."""


_MEANS = ("answer_tokens", "service_s", "calls", "other_s", "tool_s", "visits")
_BY_VISIT = ("remaining_s", "growth_tokens", "final")


def written(known: StageEstimates) -> dict[str, Any]:
    """Return estimates as the file holds them."""

    def pair(mean: Mean) -> list[float]:
        return [round(mean.value, 6), mean.seen]

    return {
        **{name: pair(getattr(known, name)) for name in _MEANS},
        **{name: {str(visit): pair(mean) for visit, mean in getattr(known, name).items()} for name in _BY_VISIT},
        "turns": known.turns,
        "moves": known.moves.copy(),
        "backends": {name: round(share, 6) for name, share in known.backends.items()},
    }


def stage_read(stored: Stored) -> StageEstimates:
    """Return the estimates that the file holds."""
    known = StageEstimates(
        turns=stored.number("turns"), moves=stored.numbers("moves"), backends=stored.numbers("backends")
    )
    for name in _MEANS:
        setattr(known, name, Mean(*stored.mean(name)))
    for name in _BY_VISIT:
        setattr(known, name, {visit: Mean(*mean) for visit, mean in stored.means(name, MAX_VISITS).items()})
    return known


def begun_with(common: StageEstimates) -> StageEstimates:
    """Return estimates that begin with the means of *common*; what follows a stage, and where it goes, is its own."""
    known = StageEstimates()
    for name in _MEANS:
        setattr(known, name, getattr(common, name).lighter())
    for name in _BY_VISIT:
        setattr(known, name, {visit: mean.lighter() for visit, mean in getattr(common, name).items()})
    return known


def of_visit(by_visit: dict[int, Mean], visit: int) -> Mean:
    """Return the mean of a visit; a new one where there is none."""
    if (mean := by_visit.get(visit)) is None:
        mean = by_visit[visit] = Mean()
    return mean


def nearest(by_visit: Mapping[int, Mean], visit: int) -> float | None:
    """Return what is known of the visit nearest to *visit*."""
    return by_visit[nearest_of(by_visit, visit)].value if by_visit else None


def nearest_of(by_visit: Mapping[int, Mean], visit: int) -> int:
    """Return the visit nearest to *visit* of which something is known."""
    return visit if visit in by_visit else min(by_visit, key=lambda known: abs(known - visit))


def round_of(nth: int) -> int:
    """Return what the *nth* call of a stage in a run counts as."""
    return ROUNDS[nth] if nth < len(ROUNDS) else ROUNDS[-1]


def odds_of(share: Mean) -> float:
    """Return the odds that runs which end here are this share of all."""
    return max(0.0, min(1.0, share.value * share.seen / (share.seen + DOUBT)))


def seen(mean: Mean) -> float | None:
    """Return a mean's value; ``None`` where nothing was seen."""
    return mean.value if mean.seen else None


def lean(shares: dict[str, float], towards: str) -> None:
    """Let *towards* have more of the shares; one that fell to nothing is dropped."""
    if not shares:
        shares[towards] = 1.0
    for name in list(shares):
        shares[name] *= 1 - LATELY
        if shares[name] < 0.01:
            del shares[name]
    shares[towards] = shares.get(towards, 0.0) + LATELY


def halve(known: StageEstimates) -> None:
    """Let what is old of a stage's turns weigh less."""
    while known.turns > KEEP_TURNS:
        known.turns /= 2
        known.moves = {stage: times / 2 for stage, times in known.moves.items() if times >= 0.1}
