"""How an account that several pools share stands in the store, and how much of it a pool may take.

Each pool's share says how much is spent and promised there at most. The shares of all pools together never exceed the
limit, and a pool spends within its share, so nothing need be known of what another one spends. A share grows only
with what no other share has, by compare-and-set.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, NamedTuple

from orla_lg.core.limits.limits import FIGURES, Limit
from orla_lg.core.limits.usage import NOTHING, Scope, figures_of

log = logging.getLogger("orla_lg")

SLICES = "slices/"
"""Of the entries in the store; the account's name follows."""

AT_ONCE = "at-once/"
"""Of the accounts of a key's calls at once; the key's id follows."""

WANTS_S = 3.0
"""A pool that wants more says so again; what was not repeated for so long is over."""

FINE = 1e9
"""Parts of dollars and seconds are shared out in so many steps."""

Figures = tuple[float, ...]
"""A number for each of ``FIGURES``, in their order."""

NONE: Figures = figures_of(NOTHING)
UNBOUND: Figures = (math.inf,) * len(FIGURES)

_DIGITS = tuple(max(9, each.digits) for each in FIGURES.values())


class Sharing(Enum):
    """What becomes of what a pool uses."""

    FOR_GOOD = "for good"
    """It is spent."""
    WINDOW = "window"
    """It comes back when the window has passed."""
    AT_ONCE = "at once"
    """It comes back when the call ends."""


class Share(NamedTuple):
    """What one pool has of an account."""

    epoch: int
    """Of the core that wrote it; a core of an older one leaves it alone."""
    hand: Figures
    """At most this is spent and promised at the pool."""
    wants: Figures = NONE
    """What a call there needs that it cannot get."""
    wants_since_s: float = 0.0
    """Seconds since 1970, as the next one; 0: it wants nothing."""
    at_s: float = 0.0
    is_settled: bool = False
    """All of it is spent, and none of it comes back before a window passes."""
    is_over: bool = False
    """Its run has ended there."""
    back_s: float = -1.0
    """What is used comes back after so long; 0: when its call ends; below 0: never."""

    def is_wanting(self, wall_s: float) -> bool:
        """Whether it wants more, and said so lately."""
        return self.wants_since_s > 0 and wall_s - self.at_s < WANTS_S


Shares = Mapping[str, Share]
"""By pool."""


def bounds(limit: Limit, scope: Scope | None = None) -> Figures:
    """Return what is shared of each figure; infinity where there is no bound, or where the clock keeps it."""
    found = (None if scope is Scope.RUN and name == "wall_s" else getattr(limit, name) for name in FIGURES)
    return tuple(math.inf if bound is None else float(bound) for bound in found)


# Arithmetic


def plus(one: Figures, other: Figures) -> Figures:
    """Return the sum, rounded far below any price."""
    return _rounded([a + b for a, b in zip(one, other, strict=True)])


def minus(one: Figures, other: Figures) -> Figures:
    """Return the difference."""
    return _rounded([a - b for a, b in zip(one, other, strict=True)])


def least(one: Figures, other: Figures) -> Figures:
    """Return the smaller of each."""
    return _rounded([min(a, b) for a, b in zip(one, other, strict=True)])


def most(one: Figures, other: Figures) -> Figures:
    """Return the larger of each."""
    return _rounded([max(a, b) for a, b in zip(one, other, strict=True)])


def total(each: Iterable[Figures]) -> Figures:
    """Return the sum of several."""
    found = NONE
    for one in each:
        found = plus(found, one)
    return found


def times(one: Figures, by: int) -> Figures:
    """Return so many times as much."""
    return _rounded([each * by for each in one])


def fits(asked: Figures, room: Figures) -> bool:
    """Whether there is room for all of it."""
    return all(a <= b for a, b in zip(asked, room, strict=True))


def _rounded(values: list[float]) -> Figures:
    return tuple(map(round, values, _DIGITS))


def free_of(room: Figures, worth: Figures, calls: int, cores: int) -> Figures:
    """Return how much a pool takes beyond what it has spent and promised.

    What *calls* calls need, within an equal part of half of what there is; but at least what one call needs, and
    nothing where that is not there.

    Args:
        room: What no other pool has.
        worth: What one call needs.
        calls: So many are expected until the next look.
        cores: Over so many an equal part is counted.
    """
    if not fits(worth, room):
        return NONE
    found = []
    for figure, left, one in zip(FIGURES.values(), room, worth, strict=True):
        if math.isinf(left):
            found.append(0.0)
            continue
        part = min(one * calls, left / (2 * max(1, cores)))
        part = math.floor(part) if figure.whole else math.floor(part * FINE) / FINE
        found.append(min(left, max(one, part)))
    return _rounded(found)


# In the store


def packed(shares: Shares) -> bytes:
    """Return an entry's value."""
    return json.dumps({pool: list(share) for pool, share in shares.items()}).encode()


def unpacked(name: str, value: bytes) -> dict[str, Share] | None:
    """Return what ``packed`` packed; ``None`` for what cannot be read, of which nothing may be taken."""
    try:
        entry = json.loads(value)
        return {str(pool): _share(fields) for pool, fields in entry.items()}
    except (ValueError, TypeError, AttributeError) as error:
        log.warning(
            "the shares of %s in the store cannot be read (%s); nothing more is taken of it", name[:200], error
        )
        return None


def _share(fields: Any) -> Share:
    epoch, hand, wants, since_s, at_s, settled, over, back_s = fields
    return Share(
        int(epoch), _read_figures(hand), _read_figures(wants), float(since_s), float(at_s), settled is True,
        over is True, float(back_s),
    )  # fmt: skip


def _read_figures(said: Any) -> Figures:
    return tuple(float(each) for _, each in zip(FIGURES, said, strict=True))
