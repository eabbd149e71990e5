"""What a workflow's cache is worth: the chance that it is wanted again, times the seconds to get it back.

That is the loss to be expected of taking it away. The chance is in ``returns``, the prices are here.
"""

from __future__ import annotations

from orla_lg.core.engine.speed import PREFILL_TOKENS_PER_S, SpeedMeter, averaged

SAVE_S, RESTORE_S = 0.1, 0.05
"""Until an order was measured: some thousand tokens of a small model, on a disk."""

WEIGHT = 0.2
"""Of the newest order."""


class Prices:
    """What getting a cache back takes on one backend, in seconds: learned from its calls and its orders."""

    def __init__(self, speed_meter: SpeedMeter | None = None) -> None:
        self.save_s, self.restore_s = SAVE_S, RESTORE_S
        self._speed_meter = speed_meter

    def saved(self, took_s: float) -> None:
        """Learn from a save, waiting for the engine's batch included."""
        self.save_s = averaged(self.save_s, took_s, WEIGHT)

    def restored(self, took_s: float) -> None:
        """Learn from a restore."""
        self.restore_s = averaged(self.restore_s, took_s, WEIGHT)

    def recompute_s(self, tokens: float) -> float:
        """Return what prefilling so many tokens takes."""
        known = None if self._speed_meter is None else self._speed_meter.speed.prefill_tokens_per_s
        return tokens / (known or PREFILL_TOKENS_PER_S)

    def back_s(self, tokens: float) -> float:
        """Return what it takes to have so many tokens again that are saved: a restore, or less."""
        return min(self.restore_s, self.recompute_s(tokens))
