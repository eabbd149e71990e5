"""When a workflow that waits calls again: learned from how long workflows stayed away, and how many never came back.

What a workflow waits for is known by its stage and, once one was started, by its tool's name; on a thread it waits
for a human. For each such *reason* a histogram of doubling times counts how many came back after how long, and how
many never did. From it follow the usual time, the time in which nine in ten are back, and the chance that a workflow
still comes that has waited so long already: what is counted longer than that, over all that are and those that never
came.

Where nothing was counted yet a fixed guess holds, the *prior*: by the kind of wait, and halved from time to time. It
weighs as much as one or two waits that were seen, so a few are enough to outweigh it; and it holds again for a wait
longer than all before it. All that values a cache asks here: memory policies, slots, saved files.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import log2

from orla_lg.core.boundary.bounded_dict import BoundedDict
from orla_lg.core.memory.events import Doing, Returns

Odds = Callable[[str, Doing | None, float, float], float]
"""The chance, 0 to 1, that a workflow calls again: by its name, what it does, since when, and now (both monotonic
seconds). ``ReturnBook.chance`` is one."""

CHANCE: Mapping[Doing | None, float] = {
    Doing.GENERATING: 1.0,
    Doing.TOOL: 0.95,
    Doing.HUMAN: 0.6,
    Doing.IDLE: 0.3,
    None: 0.0,
}
"""The prior of a wait that begins; ``None`` is a call outside any run, which is not repeated."""

HALVES_AFTER_S: Mapping[Doing | None, float] = {Doing.TOOL: 600.0, Doing.HUMAN: 86_400.0, Doing.IDLE: 7200.0}
"""A workflow that stayed away for so long is half as likely to come back."""

PRIOR_WAITS = 1.25
"""How many waits that were seen the prior weighs."""

FIRST_S = 0.01
BUCKETS = 26
"""Doubling from 10 ms: the last begins at four days."""

LEAST_SEEN = 0.25
"""How many waits must have been longer, older ones weighing less, for the rest of one to be known."""

KEEP_REASONS = 10_000
KEEP_AWAY = 100_000
FADE_AT = 64.0
"""So many returns of one reason; then all halve, so that what was learned long ago counts less."""


def prior(doing: Doing | None, waited_s: float) -> float:
    """Return the chance that a workflow calls again of which only what it does is known, and for how long."""
    half_s = HALVES_AFTER_S.get(doing)
    return CHANCE[doing] * (1.0 if half_s is None else 0.5 ** (max(0.0, waited_s) / half_s))


@dataclass(eq=False, slots=True)
class _Reason:
    """How long workflows stayed away that waited for the same."""

    doing: Doing
    """The kind of wait."""
    counts: list[float] = field(default_factory=lambda: [0.0] * BUCKETS)
    come: float = 0.0
    """The sum of ``counts``."""
    never: float = 0.0
    beginning: Returns | None = None
    """What is known of waits that begin, until something is learned: it is asked for at every call."""

    def learn(self, seconds: float | None) -> None:
        """Count a wait of so many seconds; ``None``: it never ended."""
        self.beginning = None
        if seconds is None:
            self.never += 1
        else:
            self.counts[_bucket(seconds)] += 1
            self.come += 1
        if self.come + self.never >= FADE_AT:
            self.counts = [count / 2 for count in self.counts]
            self.come, self.never = sum(self.counts), self.never / 2

    def begins(self) -> Returns:
        """Return what is known of waits that begin."""
        if self.beginning is None:
            come = self.come
            chance = (come + PRIOR_WAITS * CHANCE[self.doing]) / (come + self.never + PRIOR_WAITS)
            within = _shares(self.counts, 0.5 * come, 0.9 * come) if come else ()
            self.beginning = Returns(chance, *within)
        return self.beginning

    def rest_s(self, waited_s: float) -> float | None:
        """Return the seconds after which half of those are back that wait longer than so long; ``None``: none did."""
        bucket = _bucket(waited_s)
        start, end = _bounds(bucket)
        own = self.counts[bucket] * min(1.0, max(0.0, end - waited_s) / (end - start))
        longer = [0.0] * bucket + [own, *self.counts[bucket + 1 :]]
        come = sum(longer)
        if come < LEAST_SEEN:
            return None
        (half_s,) = _shares(longer, 0.5 * come)
        if own >= 0.5 * come:  # it lies in what is left of this bucket
            half_s = waited_s + (end - waited_s) * 0.5 * come / own
        return max(0.0, half_s - waited_s)

    def chance(self, waited_s: float) -> float:
        """Return the chance that a workflow still comes that has waited so long."""
        come = sum(self.counts[_bucket(waited_s) :])
        return (come + PRIOR_WAITS * prior(self.doing, waited_s)) / (come + self.never + PRIOR_WAITS)


def _bucket(seconds: float) -> int:
    return min(BUCKETS - 1, max(0, int(log2(seconds / FIRST_S)) + 1)) if seconds > FIRST_S else 0


def _bounds(bucket: int) -> tuple[float, float]:
    """Return the seconds at which a bucket begins and ends."""
    return 0.0 if bucket == 0 else float(FIRST_S * 2 ** (bucket - 1)), float(FIRST_S * 2**bucket)


def _shares(counts: list[float], *wanted: float) -> list[float]:
    """Return the seconds within which so many of those counted came, for each of *wanted*."""
    within, come = list[float](), list(itertools.accumulate(counts))
    for share in wanted:
        bucket = bisect.bisect_left(come, share)
        if bucket == BUCKETS:
            within.append(float(FIRST_S * 2**BUCKETS))
            continue
        count, (start, end) = counts[bucket], _bounds(bucket)
        within.append(start + (end - start) * (share - (come[bucket] - count)) / count)
    return within


@dataclass(eq=False, slots=True)
class _Use:
    """A tool that was started while its workflow waited."""

    since_s: float
    took_s: float | None = None
    """``None`` while it runs."""


@dataclass(eq=False, slots=True)
class _Away:
    reason: str
    since_s: float
    tools: dict[str, _Use] = field(default_factory=dict)
    """By reason; the one started last is last."""

    def newest(self) -> tuple[str, float]:
        """Return what the workflow waits for, as precisely as that is known, and since when."""
        if not self.tools:
            return self.reason, self.since_s
        tool = next(reversed(self.tools))
        return tool, self.tools[tool].since_s


class ReturnBook:
    """Which workflows are away, since when and why. Any thread may call, under a backend's lock too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """Innermost: no other lock is taken under it."""
        self._reasons = BoundedDict[str, _Reason](KEEP_REASONS)
        self._away = BoundedDict[str, _Away](KEEP_AWAY)

    # What happens

    def waits(self, workflow: str, reason: str, now: float) -> Returns:
        """Note that a workflow waits from now on; returns what is known of such waits."""
        with self._lock:
            before = self._away.get(workflow)
            if before is not None and before.reason != reason:  # it waited for one thing, and now for another
                self._never_came(before)
            self._away.set(workflow, _Away(reason, now))
            known = self._reasons.get(reason) or self._of(reason)
            return known.beginning or known.begins()

    def uses(self, workflow: str, tool: str, now: float) -> Returns:
        """Note that a tool of a workflow starts; returns what is known of waits for it."""
        reason = of_tool(tool)
        with self._lock:
            away = self._away.get(workflow)
            if away is not None:
                away.tools.pop(reason, None)
                away.tools[reason] = _Use(now)
            return self._of(reason).begins()

    def used(self, workflow: str, tool: str, seconds: float) -> None:
        """Note that a tool of a workflow ended after so many seconds.

        While the workflow waits for it, that counts once it calls again: a tool that ended but is never followed by
        a call was not waited for.
        """
        reason = of_tool(tool)
        with self._lock:
            away = self._away.get(workflow)
            if away is not None and reason in away.tools:
                away.tools[reason].took_s = seconds
            else:  # another call of the workflow is open, or came meanwhile
                self._of(reason).learn(seconds)

    def came(self, workflow: str, now: float) -> None:
        """Note that a workflow calls again."""
        if self._away.get(workflow) is None:
            return
        with self._lock:
            away = self._away.pop(workflow)
            if away is None:
                return
            self._of(away.reason).learn(now - away.since_s)
            for reason, use in away.tools.items():
                if use.took_s is not None:  # else another branch calls, and it counts when it ends
                    self._of(reason).learn(use.took_s)

    def gone(self, workflow: str) -> None:
        """Note that it never will."""
        with self._lock:
            away = self._away.pop(workflow)
            if away is not None:
                self._never_came(away)

    def _never_came(self, away: _Away) -> None:
        for reason in (away.reason, *away.tools):
            self._of(reason).learn(None)

    # What is known

    def usual(self, reason: str) -> Returns:
        """Return what is known of waits for *reason* that begin."""
        with self._lock:
            known = self._reasons.get(reason) or self._of(reason)
            return known.beginning or known.begins()

    def rest(self, running: Sequence[tuple[str, float]], at_once: int = 0) -> Returns:
        """Return when a workflow calls again that waits for several tools.

        It calls once the last of them ended. What is still to begin takes the place of the one that ends first. Of
        tools that were never seen to take so long nothing is known, so that the time may turn out longer.

        Args:
            running: The tools in the order of their calls, by name and for how many seconds each runs already.
            at_once: How many run beside each other; 0: all.
        """
        with self._lock:
            reasons = [(self._of(of_tool(name)), ran_s) for name, ran_s in running]
            rests = [(reason.rest_s(ran_s), ran_s > 0) for reason, ran_s in reasons]
            chance = min((reason.begins().chance for reason, _ in reasons), default=1.0)
        if all(rest_s is None for rest_s, _ in rests):
            return Returns(chance)
        places = [0.0] * min(at_once or len(rests), len(rests))
        for rest_s, runs in rests:
            free_s, rest_s = heappop(places), rest_s or 0.0
            heappush(places, max(free_s, rest_s) if runs else free_s + rest_s)
        return Returns(chance, max(places))

    def chance(self, workflow: str, doing: Doing | None, since_s: float, now: float) -> float:
        """Return the chance that a workflow calls again (``Odds``).

        Args:
            workflow: Which.
            doing: What it does, as far as the asker knows. Where the book knows of another kind of wait, or of none,
                the prior of this one holds.
            since_s: Since when it does that, likewise; monotonic seconds.
            now: Monotonic seconds.
        """
        if doing in HALVES_AFTER_S:
            with self._lock:
                away = self._away.get(workflow)
                if away is not None:
                    reason, since_s = away.newest()
                    known = self._of(reason)
                    if known.doing is doing:
                        return known.chance(now - since_s)
        return prior(doing, now - since_s)

    def check_integrity(self) -> None:
        """Assert the invariants."""
        with self._lock:
            assert len(self._away) <= KEEP_AWAY and len(self._reasons) <= KEEP_REASONS
            for reason in self._reasons.values():
                assert reason.never >= 0 and min(reason.counts) >= 0, reason
                assert abs(sum(reason.counts) - reason.come) < 1e-6, reason
                assert sum(reason.counts) + reason.never < FADE_AT, f"did not fade: {reason}"

    def _of(self, reason: str) -> _Reason:
        known = self._reasons.get(reason)
        if known is None:
            self._reasons.set(reason, known := _Reason(ON_THREAD.get(reason, Doing.TOOL)))
        return known


def after_stage(graph: str, stage: str) -> str:
    """Return the reason of a workflow between a stage's call and its next one."""
    return f"stage {graph}/{stage}"


def of_tool(name: str) -> str:
    """Return the reason of a workflow that waits for a tool."""
    return f"tool {name}"


HUMAN, IDLE = "human", "idle"
"""The reasons of interrupted threads, and of threads after their run."""

ON_THREAD: Mapping[str, Doing] = {HUMAN: Doing.HUMAN, IDLE: Doing.IDLE}
"""What a thread does that waits for these; for whatever else waits, a run is open."""
