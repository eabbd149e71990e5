"""What a run has had of the engines, and what it still needs: its place among the others, for policies that share."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from math import exp2, log2

HALF_LIFE_S = 60.0
"""After so long, service received counts half: a run that was served much long ago is not punished for ever."""

_ARRIVALS = itertools.count(1)


@dataclass(eq=False, slots=True)
class RunShare:
    """One run's place among the others; for a call outside any run, its own."""

    arrived_s: float = 0.0
    """Monotonic seconds."""
    graph: str = ""
    visit: int = 1
    """How often it has been in the stage that it entered last."""
    order: int = field(default_factory=_ARRIVALS.__next__)
    """Arrival number among all runs."""
    tokens_served: float = 0.0
    """What its calls had of the engines so far, in tokens, as of ``served_s``; older service counts less."""
    served_s: float = 0.0
    expects: Callable[[], float | None] | None = field(default=None, repr=False)
    """Computes ``remaining_s``; ``None`` once that is done."""
    ends: Callable[[str, int], float] | None = field(default=None, repr=False)
    """What ``final_odds`` asks; ``None`` outside a run."""
    _remaining_s: float | None = field(default=None, init=False)

    @property
    def remaining_s(self) -> float | None:
        """Service still expected until the run's end, in seconds; ``None`` while nothing is known.

        It is computed once for each node that the run enters, and only if something reads it.
        """
        if (expects := self.expects) is not None:
            self._remaining_s = expects()
            if self.expects is expects:  # else the run entered another node meanwhile
                self.expects = None
        return self._remaining_s

    @remaining_s.setter
    def remaining_s(self, seconds: float | None) -> None:
        self._remaining_s, self.expects = seconds, None

    def final_odds(self, stage: str, nth: int) -> float:
        """Return how likely the run's *nth* call of a stage is the last of the run; 0 while nothing is known."""
        return self.ends(stage, nth) if self.ends is not None and nth else 0.0

    def serve(self, tokens: float, now: float) -> None:
        """Note that a call of the run took *tokens* of an engine's work."""
        self.tokens_served = self.attained(now) + tokens
        self.served_s = now

    def attained(self, now: float) -> float:
        """Return the service received, in tokens, with half its weight gone every ``HALF_LIFE_S``."""
        return self.tokens_served * exp2((self.served_s - now) / HALF_LIFE_S)

    @property
    def magnitude(self) -> float:
        """The binary logarithm of the service received, as it would weigh at the clock's zero.

        As all service ages alike, of two runs with some service the one with less of it has the smaller magnitude, at
        any time.
        """
        return log2(self.tokens_served) + self.served_s / HALF_LIFE_S
