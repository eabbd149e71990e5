"""Step 6, dispatch: whether and where to try again. Only before the first token, bounded, with jitter."""

from __future__ import annotations

import random
from dataclasses import dataclass

from orla_lg.core.call import Assignment

MAX_RETRY_AFTER_S = 30.0


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
    ) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.unreachable = unreachable
        """No engine answered: its process may be gone, and its cache with it."""
        self.overloaded = overloaded
        """The engine is well and said: not now."""
        self.elsewhere = elsewhere
        """Only another backend may do better: this one no longer serves the model."""
        self.retry_after_s = retry_after_s
        """What the engine asked us to wait, in seconds."""


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
        self, failure: AttemptFailed, assignment: Assignment, tried: list[str], max_attempts: int
    ) -> Retry | None:
        """Return the next attempt, or ``None`` to give up.

        An alternative that was not tried yet is tried at once; otherwise the same backend after a pause.

        Args:
            failure: What the last attempt met.
            assignment: Where the call may run.
            tried: Backends tried so far, one entry an attempt.
            max_attempts: Attempts in all, the first included.
        """
        untried = [name for name in assignment.alternatives if name not in tried]
        if untried:
            return Retry(untried[0], 0.0)
        if failure.elsewhere or len(tried) >= max_attempts:
            return None
        return Retry(assignment.backend, self.delay_s(len(tried), failure.retry_after_s))

    def delay_s(self, attempts: int, retry_after_s: float | None) -> float:
        """Return the pause after *attempts* attempts, in seconds."""
        if retry_after_s is not None:
            return min(retry_after_s, MAX_RETRY_AFTER_S)
        return random.uniform(0.5, 1.0) * min(self.cap_s, self.base_s * 2.0 ** (attempts - 1))
