"""The newest calls and what was said of them, as v2's clients ask for them: by stage, since a moment.

A call costs an entry in a list; all the rest is worked out when it is asked for. What is kept is this process's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import floor

from orla_lg.core.boundary.bounded_dict import BoundedDict
from orla_lg.core.record import Record
from orla_lg.serve.posted.stages import DEFAULT_STAGE

KEEP = 10_000
"""Of the newest calls, and of what was said of them."""

NO_TAGS: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class Completion:
    """A call that reached a backend, and ended."""

    id: str
    stage: str
    workflow: str
    tenant: str | None
    backend: str
    mapping: str
    error: str | None
    latency_s: float
    """From its dispatch to its end."""
    cost_usd: float | None
    ended_s: float
    """Seconds since 1970."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    queue_wait_s: float = 0.0
    ttft_s: float | None = None
    tool_kind: str | None = None
    usage: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Feedback:
    """What was said of a call."""

    completion: str
    stage: str
    workflow: str | None
    rating: float | None
    labels: Sequence[str]
    notes: str
    at_s: float


@dataclass(frozen=True, slots=True)
class StageFigures:
    """The calls of one stage on one backend, summed up; times in seconds."""

    backend: str
    count: int
    errors: int
    mean_s: float
    p50_s: float
    p95_s: float
    cost_usd: float


class CompletionBook:
    """The newest completions and the feedback on them. Any thread may use it.

    Args:
        keep: So many of each.
        clock: Seconds since 1970.
    """

    def __init__(self, keep: int = KEEP, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._kept = deque[tuple[float, Record | Completion]](maxlen=keep)
        self._feedback = deque[Feedback](maxlen=keep)
        self._tags = BoundedDict[str, Mapping[str, str]](keep)

    def note(self, record: Record) -> None:
        """Note a call that ended (``RecordBook.followers``)."""
        self._kept.append((self._clock(), record))

    def add(self, completion: Completion) -> None:
        """Note a call that has no record: of a tool."""
        self._kept.append((completion.ended_s, completion))

    def tag(self, call_id: str, tags: Mapping[str, str]) -> None:
        """Note the tags that a call came with."""
        self._tags.set(call_id, tags)

    def tags_of(self, call_id: str) -> Mapping[str, str]:
        """Return the tags that a call came with."""
        return self._tags.get(call_id) or NO_TAGS

    def now(self) -> float:
        """Return this moment."""
        return round(self._clock(), 6)

    def said(self, feedback: Feedback) -> None:
        """Note what was said of a call."""
        self._feedback.append(feedback)

    def completions(self, *, stage: str | None = None, since_s: float = 0.0) -> Iterator[Completion]:
        """Yield the completions that ended after *since_s*, the newest first."""
        for precise_s, found in reversed(self._kept.copy()):
            ended_s = round(precise_s, 6)  # as it is written, so that a caller can go on from there
            if ended_s <= since_s:
                continue
            if isinstance(found, Completion):
                made: Completion | None = found
            else:
                made = self._of(found, ended_s)
            if made is not None and stage in (None, made.stage):
                yield made

    def stages(self) -> set[str]:
        """Return the stages of the calls that are kept."""
        return {
            found.stage or DEFAULT_STAGE
            for _, found in self._kept.copy()
            if isinstance(found, Completion) or not found.external
        }

    def feedback(self, stage: str, since_s: float = 0.0) -> Iterator[Feedback]:
        """Yield what was said of a stage's calls after *since_s*, the newest first."""
        for found in reversed(self._feedback.copy()):
            if found.stage == stage and found.at_s > since_s:
                yield found

    def _of(self, record: Record, ended_s: float) -> Completion | None:
        """Return a record as a completion; ``None`` for a call that reached no backend of ours."""
        if record.external or record.backend is None or not record.attempts:
            return None
        return Completion(
            record.id, record.stage or DEFAULT_STAGE, record.workflow, record.tenant, record.backend,
            record.variant or "", record.error, max(0.0, record.duration_s - record.queue_wait_s), record.cost_usd,
            ended_s, record.prompt_tokens, record.completion_tokens, record.cached_tokens, record.queue_wait_s,
            record.ttft_s, tags=self.tags_of(record.id),
        )  # fmt: skip


def figures(completions: Iterator[Completion]) -> list[StageFigures]:
    """Return what completions took and cost on each backend, by name."""
    by_backend: dict[str, list[Completion]] = {}
    for each in completions:
        by_backend.setdefault(each.backend, []).append(each)
    return [_summed(name, found) for name, found in sorted(by_backend.items())]


def _summed(backend: str, found: Sequence[Completion]) -> StageFigures:
    times = sorted(each.latency_s for each in found)
    return StageFigures(
        backend, len(found), sum(each.error is not None for each in found), sum(times) / len(times),
        percentile(times, 0.5), percentile(times, 0.95), sum(each.cost_usd or 0.0 for each in found),
    )  # fmt: skip


def percentile(ordered: Sequence[float], part: float) -> float:
    """Return the value below which a part of the ordered values lies, between two of them in proportion."""
    at = part * (len(ordered) - 1)
    below = floor(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)
