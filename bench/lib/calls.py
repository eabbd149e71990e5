"""What an arm's turn showed, and what it would have shown with a cache in which everything stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.lib.figures import percentile


@dataclass(frozen=True, slots=True)
class CallSeen:
    """One model call; times are seconds after the turn's begin."""

    session: int
    number: int
    called_s: float
    """When the node called its model, or would have but for a cap on sessions: a wait for its turn is part of the
    call, in our queue as at a cap's door."""
    first_s: float
    ended_s: float
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int

    def since(self, begin_s: float) -> CallSeen:
        """Return the same with times after *begin_s*."""
        return replace(self, **{name: getattr(self, name) - begin_s for name in ("called_s", "first_s", "ended_s")})


@dataclass(frozen=True, slots=True)
class JobSeen:
    """One session; waiting to be let in, where an arm makes it wait, is part of it."""

    session: int
    arrived_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class Turn:
    """One arm with one seed."""

    arm: str
    seed: int
    shared_tokens: int
    calls: list[CallSeen]
    jobs: list[JobSeen]
    others: float = 0.0
    """What other processes took of the machine meanwhile, 0 to 1."""
    place: str = ""
    """Where, if an experiment has several places."""
    more: dict[str, Any] = field(default_factory=dict)
    """What only one experiment has."""

    @property
    def returning(self) -> list[CallSeen]:
        """The calls that are not a session's first."""
        return [call for call in self.calls if call.number]


Calls = Callable[[Turn], Sequence[CallSeen]]


def every(turn: Turn) -> Sequence[CallSeen]:
    return turn.calls


def returning(turn: Turn) -> Sequence[CallSeen]:
    return turn.returning


def ttfts_s(calls: Iterable[CallSeen]) -> list[float]:
    """Return how long each call waited for its first token, our queue included."""
    return [call.first_s - call.called_s for call in calls]


def ttft_s(share: float, of: Calls = every) -> Callable[[Turn], float]:
    """Return a figure of a turn: a quantile of the waits for the first token."""
    return lambda turn: percentile(ttfts_s(of(turn)), share)


def recomputed(calls: Iterable[CallSeen]) -> int:
    """Return the prompt tokens that were not found in the cache."""
    return sum(call.prompt_tokens - call.cached_tokens for call in calls)


def makespan_s(jobs: Sequence[JobSeen]) -> float:
    """Return the time from the first session's arrival to the last one's end."""
    return max(job.ended_s for job in jobs) - min(job.arrived_s for job in jobs)


def common(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with."""
    return next((n for n, each in enumerate(zip(*prompts, strict=False)) if len({*each}) > 1), min(map(len, prompts)))


def bound(calls: Sequence[CallSeen], shared_tokens: int, block_tokens: int) -> int:
    """Return how many prompt tokens an engine must compute in whose cache everything stays.

    A cache finds whole blocks, of a prompt all but the last token, and of an answer all but the last token, which
    no step has read. So a call finds what its session's call before left, in whole blocks; a session's first call
    finds the prefix in common; the first of all finds nothing.
    """
    before: dict[int, int] = {}
    must = 0
    for call in sorted(calls, key=lambda call: (call.number, call.called_s)):
        known = before.get(call.session, shared_tokens if before else 0)
        must += call.prompt_tokens - min(known, call.prompt_tokens - 1) // block_tokens * block_tokens
        before[call.session] = call.prompt_tokens + call.answer_tokens - 1
    return must


def needed_tokens(turn: Turn) -> int:
    """Return what all sessions of a turn hold at their ends together, the prefix in common counted once."""
    last = {call.session: call for call in sorted(turn.calls, key=lambda call: call.number)}
    own = sum(call.prompt_tokens + call.answer_tokens - turn.shared_tokens for call in last.values())
    return turn.shared_tokens + own


def peak_tokens(turn: Turn) -> int:
    """Return the most that sessions under way held at one moment, had nothing been evicted."""
    steps: list[tuple[float, int]] = []
    for job in turn.jobs:
        held = 0
        own = [call for call in turn.calls if call.session == job.session]
        for call in sorted(own, key=lambda call: call.number):
            holds = call.prompt_tokens + call.answer_tokens - turn.shared_tokens
            steps.append((call.called_s, holds - held))
            held = holds
        steps.append((job.ended_s, -held))
    total = most = 0
    for _, change in sorted(steps):
        total += change
        most = max(most, total)
    return most + turn.shared_tokens
