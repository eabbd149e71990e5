"""How fast a backend answers, learned from its own calls: moving averages, newest weighing most."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import overload

WEIGHT = 0.1
"""Of the newest call; the last twenty or so count."""

FADES = 0.95
"""What a call weighs beside the one after it, where two figures are learned from one: the last forty or so count."""

LEAST_CALLS, LEAST_APART, MOST_ERROR = 4.0, 0.02, 0.25
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


class SpeedMeter:
    """Learns a ``Speed``."""

    def __init__(self) -> None:
        self.speed = NO_SPEED
        self.whole = WholeAnswers()
        """The calls that did not show their time to the first token."""

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens a second, measured where calls show it, else as far as their answers' times tell.

        A learned one is for what a wrong figure costs little: whether a prefetch is sent, not where a call goes.
        """
        return self.speed.prefill_tokens_per_s or self.whole.prefill_tokens_per_s()

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
                self.whole.note(service_s, fresh_tokens, completion_tokens)
        self.speed = Speed(
            averaged(now.service_s, service_s),
            averaged(now.prefill_tokens_per_s, prefill),
            averaged(now.decode_tokens_per_s, decode),
            averaged(now.completion_tokens, completion_tokens),
        )


class WholeAnswers:
    """What calls whose answers came in one piece show of prefill: how their time depends on their tokens.

    ``seconds = fresh tokens / prefill + completion tokens / decoding``, each side over the seconds so that each call
    counts alike, solved by least squares; newer calls weigh more. Calls with much the same share of both tell nothing
    of either, and calls beside a varying load do not fit: then the figure is uncertain, and there is none.
    """

    __slots__ = ("_both", "_calls", "_completion", "_completion_2", "_fresh", "_fresh_2")

    def __init__(self) -> None:
        self._calls = self._fresh = self._completion = 0.0
        self._fresh_2 = self._both = self._completion_2 = 0.0
        """Sums, faded: of calls, of their tokens a second, and of products of these."""

    def note(self, service_s: float, fresh_tokens: int, completion_tokens: int) -> None:
        """Take in one call."""
        fresh, completion = fresh_tokens / service_s, completion_tokens / service_s
        self._calls = FADES * self._calls + 1.0
        self._fresh = FADES * self._fresh + fresh
        self._completion = FADES * self._completion + completion
        self._fresh_2 = FADES * self._fresh_2 + fresh * fresh
        self._both = FADES * self._both + fresh * completion
        self._completion_2 = FADES * self._completion_2 + completion * completion

    def prefill_tokens_per_s(self) -> float | None:
        """Return the pace of prefill; ``None`` where it is uncertain."""
        apart = self._fresh_2 * self._completion_2 - self._both**2
        if self._calls < LEAST_CALLS or apart <= LEAST_APART * self._fresh_2 * self._completion_2:
            return None
        token_s = (self._fresh * self._completion_2 - self._completion * self._both) / apart
        decoded_s = (self._completion * self._fresh_2 - self._fresh * self._both) / apart
        if token_s <= 0 or decoded_s <= 0:
            return None
        missed = max(0.0, self._calls - token_s * self._fresh - decoded_s * self._completion)
        error_s = sqrt(missed / (self._calls - 2) * self._completion_2 / apart)
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
