"""What a workflow's cache is worth: the chance that it is wanted again, and what it takes to get it back.

Both together are the loss to be expected of taking it away, in seconds. Odds may be replaced by learned ones:
whatever is called like ``chance_of_return`` will do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from orla_lg.core.claims import Doing
from orla_lg.core.pace import PREFILL_TOKENS_PER_S

if TYPE_CHECKING:
    from orla_lg.core.pace import Pace

Odds = Callable[[str, Doing | None, float], float]
"""The chance, 0 to 1, that a workflow calls again: by its name, what it does, and for how many seconds already."""

CHANCE: Mapping[Doing | None, float] = {
    Doing.GENERATING: 1.0,
    Doing.TOOL: 0.95,
    Doing.HUMAN: 0.6,
    Doing.IDLE: 0.3,
    None: 0.0,
}
"""Of return, at first; ``None`` is a call outside any run, which nobody can repeat."""

HALVES_AFTER_S: Mapping[Doing | None, float] = {Doing.TOOL: 600.0, Doing.HUMAN: 86_400.0, Doing.IDLE: 7200.0}
"""Whoever stayed away for so long is half as likely to come back."""

SAVE_S, RESTORE_S = 0.1, 0.05
"""For as long as no order told better: some thousand tokens of a small model, on a disk."""

WEIGHT = 0.2
"""Of the newest order."""


def chance_of_return(workflow: str, doing: Doing | None, idle_s: float) -> float:
    """Return the usual odds by what the workflow does; its name tells nothing here."""
    half_s = HALVES_AFTER_S.get(doing)
    return CHANCE[doing] * (1.0 if half_s is None else 0.5 ** (max(0.0, idle_s) / half_s))


class Prices:
    """What getting a cache back takes on one backend, in seconds: learned from its calls and its orders."""

    def __init__(self, pace: Pace | None = None) -> None:
        self.save_s, self.restore_s = SAVE_S, RESTORE_S
        self._pace = pace

    def saved(self, took_s: float) -> None:
        """Learn from a save, waiting for the engine's batch included."""
        self.save_s += WEIGHT * (took_s - self.save_s)

    def restored(self, took_s: float) -> None:
        """Learn from a restore."""
        self.restore_s += WEIGHT * (took_s - self.restore_s)

    def recompute_s(self, tokens: float) -> float:
        """Return what prefilling so many tokens takes."""
        known = None if self._pace is None else self._pace.speed.prefill_tokens_per_s
        return tokens / (known or PREFILL_TOKENS_PER_S)

    def back_s(self, tokens: float) -> float:
        """Return what it takes to have so many tokens again that are saved: a restore, or less."""
        return min(self.restore_s, self.recompute_s(tokens))
