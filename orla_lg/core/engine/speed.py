"""How fast a backend answers, learned from its own calls: moving averages, newest weighing most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

WEIGHT = 0.1
"""Of the newest call; the last twenty or so count."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What a backend's calls took lately; ``None`` until one was measured."""

    service_s: float | None = None
    """From dispatch to the last token."""
    prefill_tokens_per_s: float | None = None
    """Prompt tokens that were not cached, over what the engine says they took, else over TTFT: that includes what the
    engine let the call wait."""
    decode_tokens_per_s: float | None = None
    """Of one call, beside whatever else ran; too low where answers come in one piece, their prefill counted in."""
    completion_tokens: float | None = None


NO_SPEED = Speed()

PREFILL_TOKENS_PER_S, DECODE_TOKENS_PER_S = 1000.0, 30.0
USUAL = Speed(5.0, PREFILL_TOKENS_PER_S, DECODE_TOKENS_PER_S, completion_tokens=128.0)
"""Until a call was measured; the same for all backends, so that it favours none."""


class SpeedMeter:
    """Learns a ``Speed``."""

    def __init__(self) -> None:
        self.speed = NO_SPEED

    def note(
        self, *, service_s: float, prefill_s: float | None, fresh_tokens: int | None, completion_tokens: int | None
    ) -> None:
        """Take in one call that went well; times in seconds."""
        now, prefill, decode = self.speed, None, None
        if prefill_s and fresh_tokens:
            prefill = fresh_tokens / prefill_s
        if prefill_s is not None and completion_tokens and completion_tokens > 1 and service_s > prefill_s:
            decode = (completion_tokens - 1) / (service_s - prefill_s)
        elif prefill_s is None and completion_tokens and service_s > 0:  # its prefill counts as decoding
            decode = completion_tokens / service_s
        self.speed = Speed(
            averaged(now.service_s, service_s),
            averaged(now.prefill_tokens_per_s, prefill),
            averaged(now.decode_tokens_per_s, decode),
            averaged(now.completion_tokens, completion_tokens),
        )


@overload
def averaged(known: float | None, new: float, weight: float = ...) -> float: ...
@overload
def averaged(known: float | None, new: float | None, weight: float = ...) -> float | None: ...
def averaged(known: float | None, new: float | None, weight: float = WEIGHT) -> float | None:
    """Return a moving average with one more value, of that weight; the first value is the average."""
    if new is None or known is None:
        return known if new is None else float(new)
    return known + weight * (new - known)
