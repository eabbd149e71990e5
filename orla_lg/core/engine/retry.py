"""Step 6, dispatch: whether and where to try again. Only before the first token, bounded, with jitter."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import inf, isfinite

from orla_lg.core.call import Assignment

MAX_RETRY_AFTER_S = 120.0
"""An engine that asks for a longer pause is not waited for: its error comes out at once, as from the OpenAI SDK."""

NEVER_S = MAX_RETRY_AFTER_S + 1
"""A pause that is not waited for."""

NOT_IMPLEMENTED = frozenset({501, 505})
"""HTTP statuses of an engine that is well, and will never do what was asked of it; another backend may."""


class AttemptFailed(Exception):
    """An attempt ended before its first token, and another one may succeed.

    Raised by the edge that speaks to the engine, always ``from`` the cause; it never reaches a caller.
    """

    def __init__(
        self,
        cause: Exception,
        *,
        unreachable: bool = False,
        overloaded: bool = False,
        elsewhere: bool = False,
        retry_after_s: float | None = None,
        moved: bool = False,
    ) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.unreachable = unreachable
        """No engine answered: its process may be gone, and its cache with it."""
        self.overloaded = overloaded
        """The engine is well and does not do it: not now, or never."""
        self.elsewhere = elsewhere
        """Only another backend may do better: this one no longer serves the model."""
        self.retry_after_s = retry_after_s
        """What the engine asked us to wait, in seconds."""
        self.moved = moved
        """Nothing was tried: the call waited, and its workflow was moved meanwhile (``placement.moves``)."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Try on *backend* after *delay_s* seconds."""

    backend: str
    delay_s: float


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with full jitter, within bounds."""

    base_s: float = 0.25
    cap_s: float = 4.0

    def next(
        self, failure: AttemptFailed, assignment: Assignment, tried: list[str], max_attempts: int, left_s: float = inf
    ) -> Retry | None:
        """Return the next attempt, or ``None`` to give up.

        An alternative that was not tried yet is tried at once; otherwise the same backend after a pause.

        Args:
            failure: What the last attempt met.
            assignment: Where the call may run.
            tried: Backends tried so far, one entry an attempt.
            max_attempts: Attempts in all, the first included.
            left_s: Seconds that the call may still wait.
        """
        untried = [name for name in assignment.alternatives if name not in tried]
        if untried:
            return Retry(untried[0], 0.0)
        if failure.elsewhere or len(tried) >= max_attempts:
            return None
        asked_s = failure.retry_after_s
        if asked_s is not None and isfinite(asked_s) and asked_s > min(MAX_RETRY_AFTER_S, left_s):
            return None
        delay_s = self.delay_s(len(tried), asked_s)
        if delay_s != asked_s:  # a pause of our own leaves time for the attempt that follows
            delay_s = min(delay_s, max(0.0, left_s / 2))
        return Retry(assignment.backend, delay_s)

    def delay_s(self, attempts: int, retry_after_s: float | None) -> float:
        """Return the pause after *attempts* attempts, in seconds: what the engine asks for, if that is a pause."""
        if retry_after_s is not None and 0 < retry_after_s < inf:
            return min(retry_after_s, MAX_RETRY_AFTER_S)
        return random.uniform(0.5, 1.0) * min(self.cap_s, self.base_s * 2.0 ** (attempts - 1))
