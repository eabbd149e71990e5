"""When who waits calls again: learned from how long workflows stayed away, and how many never came back.

What a workflow waits for is known by its stage and, while one runs, by its tool's name; on a thread it waits for a
human. For each such *reason* a histogram of doubling times counts who came back after how long, and who never did.
From it follow the chance that somebody who has waited so long already will still come (what is counted longer than
that, over all that are), the usual time, and the time in which nine in ten are back.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from math import log2

from orla_lg.core.memory import Returns
from orla_lg.core.newest import Newest

FIRST_S = 0.01
BUCKETS = 26
"""Doubling from 10 ms: the last begins at four days."""

KEEP_REASONS = 10_000
KEEP_AWAY = 100_000
FADE_AT = 64.0
"""So many returns of one reason; then all halve, so that what was learned long ago counts less."""

BEFORE = (1.0, 0.25)
"""Counted as came and never came before anything was seen: most come back."""


@dataclass(eq=False, slots=True)
class _Reason:
    """How long those who waited for the same stayed away."""

    counts: list[float] = field(default_factory=lambda: [0.0] * BUCKETS)
    never: float = 0.0
    beginning: Returns | None = None
    """What is known of waits that begin, until something is learned: it is asked for at every call."""

    def learn(self, seconds: float | None) -> None:
        self.beginning = None
        if seconds is None:
            self.never += 1
        else:
            self.counts[_bucket(seconds)] += 1
        if sum(self.counts) + self.never >= FADE_AT:
            self.counts = [count / 2 for count in self.counts]
            self.never /= 2

    def begins(self) -> Returns:
        if self.beginning is None:
            self.beginning = self.returns(0.0)
        return self.beginning

    def returns(self, waited_s: float) -> Returns:
        later = list(self.counts)
        for bucket in range(_bucket(waited_s) if waited_s > 0 else 0):
            later[bucket] = 0.0
        come, never = sum(later), self.never
        chance = (come + BEFORE[0]) / (come + never + sum(BEFORE))
        if not come:
            return Returns(chance)
        return Returns(chance, _share(later, 0.5 * come), _share(later, 0.9 * come))


def _bucket(seconds: float) -> int:
    return min(BUCKETS - 1, max(0, int(log2(seconds / FIRST_S)) + 1)) if seconds > FIRST_S else 0


def _share(counts: list[float], wanted: float) -> float:
    """Return the seconds within which *wanted* of those counted came."""
    seen = 0.0
    for bucket, count in enumerate(counts):
        if count and seen + count >= wanted:
            start = 0.0 if bucket == 0 else float(FIRST_S * 2 ** (bucket - 1))
            return start + (float(FIRST_S * 2**bucket) - start) * (wanted - seen) / count
        seen += count
    return float(FIRST_S * 2**BUCKETS)


@dataclass(frozen=True, slots=True)
class _Away:
    reason: str
    since_s: float


class ReturnBook:
    """Who is away, since when and why. Any thread may call; every method is short."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reasons = Newest[str, _Reason](KEEP_REASONS)
        self._away = Newest[str, _Away](KEEP_AWAY)

    def waits(self, workflow: str, reason: str, now: float) -> Returns:
        """Note that a workflow waits from now on; returns what is known of such waits."""
        with self._lock:
            before = self._away.get(workflow)
            if before is not None and before.reason != reason:  # it waited for one thing, and now for another
                self._of(before.reason).learn(None)
            self._away.set(workflow, _Away(reason, now))
            return self._of(reason).begins()

    def came(self, workflow: str, now: float) -> None:
        """Note that it calls again."""
        with self._lock:
            away = self._away.pop(workflow)
            if away is not None:
                self._of(away.reason).learn(now - away.since_s)

    def gone(self, workflow: str) -> None:
        """Note that it never will."""
        with self._lock:
            away = self._away.pop(workflow)
            if away is not None:
                self._of(away.reason).learn(None)

    def took(self, reason: str, seconds: float) -> None:
        """Note how long something took that is waited for: a tool, by its name."""
        with self._lock:
            self._of(reason).learn(seconds)

    def usual(self, reason: str) -> Returns:
        """Return what is known of waits for *reason* that begin."""
        with self._lock:
            return self._of(reason).begins()

    def expected(self, workflow: str, now: float) -> Returns:
        """Return what is known of a workflow that may wait already."""
        with self._lock:
            away = self._away.get(workflow)
            return Returns() if away is None else self._of(away.reason).returns(now - away.since_s)

    def check_integrity(self) -> None:
        """Assert the invariants."""
        with self._lock:
            assert len(self._away) <= KEEP_AWAY and len(self._reasons) <= KEEP_REASONS
            for reason in self._reasons.values():
                assert reason.never >= 0 and min(reason.counts) >= 0, reason
                assert sum(reason.counts) + reason.never < FADE_AT, f"did not fade: {reason}"

    def _of(self, reason: str) -> _Reason:
        known = self._reasons.get(reason)
        if known is None:
            self._reasons.set(reason, known := _Reason())
        return known


def after_stage(graph: str, stage: str) -> str:
    """Return the reason of a workflow between a stage's call and its next one."""
    return f"stage {graph}/{stage}"


def of_tool(name: str) -> str:
    """Return the reason of a workflow that waits for a tool."""
    return f"tool {name}"


HUMAN, IDLE = "human", "idle"
"""The reasons of interrupted threads, and of those whose run ended."""
