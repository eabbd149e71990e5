"""The arithmetic of every benchmark: quantiles, medians with their extremes, and arms compared round by round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Generic, NamedTuple, Protocol, TypeVar


class InRound(Protocol):
    """A turn: one arm with one seed."""

    @property
    def arm(self) -> str: ...
    @property
    def seed(self) -> int: ...


T = TypeVar("T", bound=InRound)
Arm = TypeVar("Arm")


class Spread(NamedTuple):
    """A median with the extremes, over rounds, seeds or blocks."""

    middle: float
    least: float
    most: float

    def shown(self, form: str = ".2f", *, bold: bool = False, always: bool = True) -> str:
        """Return ``middle (least … most)``; where *always* is off and nothing differs as shown, the middle alone."""
        middle, least, most = (f"{value:{form}}" for value in self)
        said = f"**{middle}**" if bold else middle
        return f"{said} ({least} … {most})" if always or least != most else said


def spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def percentile(values: Sequence[float], share: float) -> float:
    """Return a quantile, interpolated between the two values around it; of nothing it is 0."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def at_rank(values: Sequence[float], share: float) -> float:
    """Return the value that this share of *values* does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def ratios(mine: Iterable[float], others: Iterable[float]) -> list[float]:
    """Return pair by pair a figure over another one; two that are nothing are equal."""
    return [a / b if b else 1.0 for a, b in zip(mine, others, strict=True)]


class Column(NamedTuple):
    """A figure of a turn as tables show it."""

    title: str
    of: Callable[[Any], float]
    form: str = ",.2f"


class Rounds(Generic[T]):
    """Turns by arm and round. Only rounds that every arm has had count: a broken one compares nothing."""

    def __init__(self, turns: Iterable[T], order: Sequence[str] = (), must: Iterable[str] = ()) -> None:
        self._turns: Mapping[tuple[str, int], T] = {(turn.arm, turn.seed): turn for turn in turns}
        found = dict.fromkeys(arm for arm, _ in self._turns)
        self.arms = [*(arm for arm in order if arm in found), *(arm for arm in found if arm not in order)]
        wanted = {*self.arms, *must}
        seeds = sorted({seed for _, seed in self._turns})
        self.seeds = [seed for seed in seeds if all((arm, seed) in self._turns for arm in wanted)]

    def of(self, arm: str) -> list[T]:
        """Return an arm's turns, one for each round; none of an arm that was not run."""
        return [self._turns[arm, seed] for seed in self.seeds] if arm in self.arms else []

    def all(self) -> list[T]:
        return [turn for arm in self.arms for turn in self.of(arm)]

    def column(self, arm: str, figure: Callable[[T], float]) -> list[float]:
        """Return a figure of an arm for each round."""
        return [figure(turn) for turn in self.of(arm)]

    def ratios(self, arm: str, against: str, figure: Callable[[T], float]) -> list[float]:
        """Return an arm's figure over another arm's, round by round."""
        return ratios(self.column(arm, figure), self.column(against, figure))

    def ratio(self, arm: str, against: str, figure: Callable[[T], float]) -> float:
        """Return the median of those."""
        return median(self.ratios(arm, against, figure))

    def table(
        self, title: str, columns: Sequence[Column], *, heads: Sequence[str] = (),
        cells: Callable[[list[T]], Sequence[str]] = lambda turns: (), **shown: bool,
    ) -> list[str]:  # fmt: skip
        """Return a row for each arm: medians over the rounds with the extremes, then *cells* of its turns."""
        rows = []
        for arm in self.arms:
            figures = (spread(self.column(arm, of)).shown(form, **shown) for _, of, form in columns)
            rows.append([arm, *figures, *cells(self.of(arm))])
        return table([title, *(column.title for column in columns), *heads], rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def rotated(arms: Sequence[Arm], by: int) -> list[Arm]:
    """Return all arms, beginning with another one in each round, so that a slow minute is no arm's own."""
    first = by % len(arms)
    return [*arms[first:], *arms[:first]]
