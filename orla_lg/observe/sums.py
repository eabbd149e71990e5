"""What records add up to: counts, tokens and times of calls, by stage and backend, under names that are bounded."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

from orla_lg.core.boundary.plain import shown
from orla_lg.core.record import Record

MOST_STAGES = 1_000
"""Further stages are one: clients of the gateway name their own."""
MOST_BACKENDS, MOST_KINDS = 1_000, 100
OTHER, UNREGISTERED, NO_STAGE = "other", "unregistered", "(none)"
MOST_CHARS = 100
"""Of a label's value."""

TIMES_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Bounds of what calls wait and take, in seconds."""
TOKEN_TIMES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
"""The same of one token after the first."""

REFUSED = frozenset({
    "AccessDenied", "BudgetExceeded", "CallRefused", "DeadlineExceeded", "MappingError", "OrlaClosed", "PolicyError",
    "QueueFull",
})  # fmt: skip
"""Errors of calls that no engine was asked."""
CANCELLED = frozenset({"abandoned", "CancelledError", "ClientGone", "GeneratorExit", "KeyboardInterrupt"})
"""Errors of calls that nothing waits for any more."""


def kind_of(error: str) -> str:
    """Return the name of the class of a record's error, which its text begins with."""
    kind = error.partition(":")[0]
    return kind if kind.isidentifier() and len(kind) <= MOST_CHARS else OTHER


def status_of(record: Record) -> str:
    """Return how a call ended: ``ok``, ``refused``, ``cancelled`` or ``error``."""
    if record.error is None:
        return "ok"
    kind = kind_of(record.error)
    return "refused" if kind in REFUSED else "cancelled" if kind in CANCELLED else "error"


def decision_of(record: Record) -> str:
    """Return what placed a call: a mapping (``mapped``) or its ``code``; nothing did: ``external``, ``none``."""
    if record.external:
        return "external"
    if record.mapper is None:
        return "none"
    return "code" if record.mapper == "code" else "mapped"


class BoundedNames:
    """Names as the values of a label: so many at most, and any further one is another's.

    Args:
        most: So many.
        beyond: The name of all others.
        empty: The name of what has none.
    """

    def __init__(self, most: int, beyond: str, empty: str = "") -> None:
        self._most, self._beyond = most, beyond
        self._known = {"": empty}

    def of(self, name: str) -> str:
        """Return the value for a name."""
        found = self._known.get(name)
        if found is None:
            if len(self._known) > self._most:
                return self._beyond
            found = self._known[name] = shown(name, MOST_CHARS)
        return found


class Distribution:
    """How values are distributed over bounds."""

    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Return how many values are within each bound, as Prometheus has it."""
        found, sum_up = list[tuple[str, float]](), 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            sum_up += count
            found.append((bound, sum_up))
        return found


class StageSums:
    """The calls of one stage at one backend."""

    __slots__ = ("cached", "completion", "duration", "first_token", "prompt", "statuses", "usd", "wait")

    def __init__(self) -> None:
        self.statuses = dict[str, int]()
        self.wait, self.first_token, self.duration = (Distribution(TIMES_S) for _ in range(3))
        self.prompt = self.cached = self.completion = 0
        self.usd = 0.0


class BackendSums:
    """The calls of one backend."""

    __slots__ = ("errors", "latency", "per_token", "retries")

    def __init__(self) -> None:
        self.errors = Counter[str]()
        self.latency, self.per_token = Distribution(TIMES_S), Distribution(TOKEN_TIMES_S)
        self.retries = 0


class CallSums:
    """All calls. Called with each record; read by ``stages`` and ``backends`` when it is asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.stage_names = BoundedNames(MOST_STAGES, OTHER, NO_STAGE)
        self.backend_names = BoundedNames(MOST_BACKENDS, UNREGISTERED, UNREGISTERED)
        self._kinds = BoundedNames(MOST_KINDS, OTHER, OTHER)
        self._stages = dict[tuple[str, str], StageSums]()
        self._backends = dict[str, BackendSums]()
        self._known = dict[tuple[str, str | None], tuple[StageSums, BackendSums]]()
        """The same by the names in records, which are as many as the labels' values."""
        self._decisions = Counter[str]()
        self.closed = False

    def __call__(self, record: Record) -> None:
        """Count a call that ended."""
        if self.closed:
            return
        with self._lock:
            found = self._known.get((record.stage, record.backend))
            stage, backend = found or self._named(record)
            self._decisions[decision_of(record)] += 1
            self._add_to_stage(stage, record)
            self._add_to_backend(backend, record)

    def _named(self, record: Record) -> tuple[StageSums, BackendSums]:
        """Return where a record is added, and know it again unless its stage is one of the many others."""
        stage, backend = self.stage_names.of(record.stage), self.backend_names.of(record.backend or "")
        found = (
            self._stages.setdefault((stage, backend), StageSums()),
            self._backends.setdefault(backend, BackendSums()),
        )
        if stage != OTHER and backend != UNREGISTERED:
            self._known[record.stage, record.backend] = found
        return found

    def _add_to_stage(self, sums: StageSums, record: Record) -> None:
        status = status_of(record)
        sums.statuses[status] = sums.statuses.get(status, 0) + 1
        sums.wait.add(record.queue_wait_s)
        sums.duration.add(record.duration_s)
        if record.ttft_s is not None:
            sums.first_token.add(record.ttft_s)
        if record.prompt_tokens is not None:
            sums.prompt += record.prompt_tokens
            sums.cached += record.cached_tokens or 0
            sums.completion += record.completion_tokens or 0
        if record.cost_usd:
            sums.usd += record.cost_usd

    def _add_to_backend(self, sums: BackendSums, record: Record) -> None:
        if record.error is not None:
            sums.errors[self._kinds.of(kind_of(record.error))] += 1
        if not record.attempts:
            return
        service_s = max(0.0, record.duration_s - record.queue_wait_s)
        sums.latency.add(service_s)
        sums.retries += record.attempts - 1
        tokens = record.completion_tokens or 0
        if record.ttft_s is not None and tokens > 1 and record.attempts == 1 and record.error is None:
            sums.per_token.add(max(0.0, service_s - record.ttft_s) / (tokens - 1))

    # Read while calls go on: a figure may be of a call more than another one

    def stages(self) -> Iterator[tuple[tuple[str, str], StageSums]]:
        """Yield the sums by stage and backend."""
        with self._lock:
            return iter(list(self._stages.items()))

    def backends(self) -> Iterator[tuple[str, BackendSums]]:
        """Yield the sums by backend."""
        with self._lock:
            return iter(list(self._backends.items()))

    def decisions(self) -> dict[str, int]:
        """Return how often what placed a call."""
        with self._lock:
            return dict(self._decisions)
