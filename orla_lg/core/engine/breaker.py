"""When a backend is left alone: a circuit breaker (Nygard, *Release It!*), one per backend.

*Closed*, calls go. After ``failures`` failed attempts in a row it *opens*: calls are refused at once, so that
they go elsewhere instead of waiting for an engine that is down. After a pause it is *half open*: one call
tries, the others wait for what comes of it. Any sign of life closes it; a failure opens it again, for twice as
long if the engine did something for it: a refused connection costs it nothing, and may be tried every second.

Plain state: the backend's lock guards it, and time comes as an argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Circuit(StrEnum):
    """The state of a breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When to open, and for how long."""

    failures: int = 5
    """Failed attempts in a row that open it."""
    pause_s: float = 1.0
    """How long it stays open the first time; twice as long after each trial that cost the engine something."""
    max_pause_s: float = 30.0
    trial_s: float = 10.0
    """How long a trial may stay without news before another call may try."""


class Breaker:
    """Opened exactly while ``opened_s`` is set; a trial is out exactly until ``_trial_until_s``."""

    def __init__(self, policy: BreakerPolicy | None = None) -> None:
        self.policy = policy or BreakerPolicy()
        self.opened_s: float | None = None
        self.failures = 0
        """Failures in a row."""
        self.trips = 0
        """How often it opened; a trial that fails is the same outage."""
        self.reason = ""
        """The message of the last failure."""
        self._pause_s = self.policy.pause_s
        self._trial_until_s = 0.0

    def state(self, now: float) -> Circuit:
        """Return the state at *now*, in monotonic seconds."""
        if self.opened_s is None:
            return Circuit.CLOSED
        return Circuit.OPEN if now < self.retry_at_s else Circuit.HALF_OPEN

    @property
    def retry_at_s(self) -> float:
        """When the next trial may start."""
        return 0.0 if self.opened_s is None else self.opened_s + self._pause_s

    def admit(self, now: float) -> bool:
        """Whether a call may go now; in a half-open circuit that makes it the trial."""
        match self.state(now):
            case Circuit.CLOSED:
                return True
            case Circuit.HALF_OPEN if now >= self._trial_until_s:
                self._trial_until_s = now + self.policy.trial_s
                return True
        return False

    def succeeded(self) -> bool:
        """Note a sign of life; returns whether that closed the circuit."""
        was_open = self.opened_s is not None
        self.opened_s, self.failures, self._pause_s, self._trial_until_s = None, 0, self.policy.pause_s, 0.0
        return was_open

    def failed(self, now: float, reason: str, *, unreachable: bool = False) -> bool:
        """Note a failed attempt; returns whether that opened the circuit, for the first time or again.

        Attempts that began before it opened fail late; they do not keep it open longer.

        Args:
            now: Monotonic seconds.
            reason: For the error of refused calls.
            unreachable: No engine answered at all.
        """
        self.failures += 1
        self.reason = reason
        state = self.state(now)
        if state is Circuit.OPEN or (state is Circuit.CLOSED and self.failures < self.policy.failures):
            return False
        if state is Circuit.HALF_OPEN and not unreachable:
            self._pause_s = min(2 * self._pause_s, self.policy.max_pause_s)
        self.trips += state is Circuit.CLOSED
        self.opened_s, self._trial_until_s = now, 0.0
        return True

    def check_integrity(self) -> None:
        """Assert the invariants."""
        assert self.policy.pause_s <= self._pause_s <= max(self.policy.pause_s, self.policy.max_pause_s)
        assert self.opened_s is None or self.failures >= self.policy.failures
        assert self.opened_s is not None or self._trial_until_s == 0.0
