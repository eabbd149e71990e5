"""How fast a backend answers, learned from its own calls: moving averages, newest weighing most."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import overload

WEIGHT = 0.1
"""Of the newest call; the last twenty or so count."""

FADES = 0.95
"""What a call weighs beside the one after it, where two figures are learned from one: the last forty or so count."""

KEEP_WHOLE = 60

LEAST_CALLS, LEAST_APART, MOST_ERROR = 5, 0.02, 0.25
"""So many calls at least, so different from each other, tell both figures, and so well: the error of the mean of one
is at most that part of it."""


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


WholeAnswer = tuple[float, int, int]
"""A call's seconds, and its fresh and its completion tokens."""


class SpeedMeter:
    """Learns a ``Speed``."""

    def __init__(self) -> None:
        self.speed = NO_SPEED
        self._whole = deque[WholeAnswer](maxlen=KEEP_WHOLE)
        """The calls that did not show their time to the first token, the newest last."""

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens a second, measured where calls show it, else as far as their answers' times tell.

        A learned one is for what a wrong figure costs little: whether a prefetch is sent, not where a call goes.
        """
        return self.speed.prefill_tokens_per_s or prefill_of_whole(tuple(self._whole))

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
            if fresh_tokens is not None:
                self._whole.append((service_s, fresh_tokens, completion_tokens))
        self.speed = Speed(
            averaged(now.service_s, service_s),
            now.prefill_tokens_per_s if prefill is None else averaged(now.prefill_tokens_per_s, prefill),
            now.decode_tokens_per_s if decode is None else averaged(now.decode_tokens_per_s, decode),
            averaged(now.completion_tokens, completion_tokens),
        )


def prefill_of_whole(calls: Sequence[WholeAnswer]) -> float | None:
    """Return the pace of prefill that calls show whose answers came in one piece, the newest last.

    ``seconds = fresh tokens / prefill + completion tokens / decoding``, each side over the seconds so that each call
    counts alike, solved by least squares; newer calls weigh more. Calls with much the same share of both tell nothing
    of either, and calls beside a varying load do not fit: then the figure is uncertain, and there is none.
    """
    weight, weights = 1.0, 0.0
    fresh_1 = completion_1 = fresh_2 = both = completion_2 = 0.0
    for service_s, fresh_tokens, completion_tokens in reversed(calls):
        fresh, completion = fresh_tokens / service_s, completion_tokens / service_s
        weights, fresh_1, completion_1 = (
            weights + weight,
            fresh_1 + weight * fresh,
            completion_1 + weight * completion,
        )
        fresh_2, completion_2 = fresh_2 + weight * fresh**2, completion_2 + weight * completion**2
        both, weight = both + weight * fresh * completion, weight * FADES
    apart = fresh_2 * completion_2 - both**2
    if len(calls) < LEAST_CALLS or apart <= LEAST_APART * fresh_2 * completion_2:
        return None
    token_s = (fresh_1 * completion_2 - completion_1 * both) / apart
    decoded_s = (completion_1 * fresh_2 - fresh_1 * both) / apart
    if token_s <= 0 or decoded_s <= 0:
        return None
    missed = max(0.0, weights - token_s * fresh_1 - decoded_s * completion_1)
    error_s = sqrt(missed / (weights - 2) * completion_2 / apart)
    return 1 / token_s if error_s < MOST_ERROR * token_s else None


@overload
def averaged(known: float | None, new: float, weight: float = ...) -> float: ...
@overload
def averaged(known: float | None, new: float | None, weight: float = ...) -> float | None: ...
def averaged(known: float | None, new: float | None, weight: float = WEIGHT) -> float | None:
    """Return a moving average with one more value, of that weight; the first value is the average."""
    if new is None or known is None:
        return known if new is None else float(new)
    return known + weight * (new - known)
