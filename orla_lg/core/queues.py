"""Step 4, queue: one queue per backend, one sub-queue per stage, and the grants that empty them.

Every decision here is a plain method on plain state: it mutates and returns the calls that may go now.
The caller holds the backend's lock around it and wakes them afterwards, so nothing here waits, and the
rules can be tested without threads or loops.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from orla_lg.core.call import Call
from orla_lg.core.policies import RequestPolicy, Sortable, StagePolicy
from orla_lg.errors import QueueFull

log = logging.getLogger("orla_lg")


@dataclass(eq=False, slots=True)
class Queued:
    """A call's place in a queue, and later its grant.

    It waits, or is granted, or (for good) neither.
    """

    call: Call
    order: int
    """Arrival number on this backend; a call that comes back after a failed attempt keeps it."""
    waiting: bool = True
    granted: bool = False
    extra: bool = False
    """Granted out of turn, because its caller already holds a grant here; may exceed ``max_concurrency``."""
    running: bool = False
    """Its workflow runs, so it keeps the cache slot it gets."""
    turn: Future[None] | None = None
    """Set by whoever must wait; done when the call is granted."""
    rank: Sortable = ()
    """By the request policy; among equals the first come goes first."""

    def __lt__(self, other: Queued) -> bool:
        return self.rank < other.rank


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """A queue at one moment."""

    waiting: int
    waiting_by_stage: dict[str, int]
    in_flight: int
    max_concurrency: int | None
    capacity: int
    granted: int
    """Grants given since the start."""
    extra: int
    """Of these, given out of turn to callers who already held one."""
    refused: int


@dataclass(eq=False)
class BackendQueue:
    """The two-level queue of one backend.

    Invariants: ``in_flight`` counts granted calls; a stage has a sub-queue only while it has a live
    entry in it; ``by_workflow`` indexes exactly the waiting calls. ``check_integrity`` asserts them.
    """

    name: str
    stage_policy: StagePolicy
    request_policy: RequestPolicy
    capacity: int
    max_concurrency: int | None = None
    in_flight: int = 0
    granted: int = 0
    extra: int = 0
    refused: int = 0
    next_order: int = 0
    stages: dict[str, list[Queued]] = field(default_factory=dict)
    """Per stage a heap by the request policy, its head waiting; others that left go when they surface."""
    by_workflow: dict[str, dict[int, Queued]] = field(default_factory=dict)
    """Waiting calls per workflow, by ``order``."""
    waiting: int = 0

    def enter(self, call: Call, now: float, *, order: int | None = None) -> Queued:
        """Put a call into its stage's sub-queue.

        Raises:
            QueueFull: As many calls wait as ``capacity`` allows.
        """
        if self.waiting >= self.capacity and (self.waiting or not self.has_room()):
            self.refused += 1
            raise QueueFull(
                f"backend {self.name!r} has {self.waiting} calls waiting, its capacity is {self.capacity}; "
                f"{self.in_flight} are in flight"
            )
        queued = Queued(call, self._take_order() if order is None else order)
        queued.rank = self._rank(queued, now)
        heap = self.stages.setdefault(call.identity.stage, [])
        try:
            heapq.heappush(heap, queued)
        except BaseException:  # the policy's keys cannot be compared: this caller is told, and nobody else suffers
            heap.remove(queued)
            raise
        self.by_workflow.setdefault(call.identity.workflow, {})[queued.order] = queued
        self.waiting += 1
        return queued

    def _rank(self, queued: Queued, now: float) -> Sortable:
        return (*self.request_policy.key(queued, now), queued.order)

    def _take_order(self) -> int:
        self.next_order += 1
        return self.next_order

    def has_room(self) -> bool:
        """Whether another grant fits under ``max_concurrency``."""
        return self.max_concurrency is None or self.in_flight < self.max_concurrency

    def next(self, now: float, eligible: Iterable[str] | None = None) -> Queued | None:
        """Return the call to go next, or ``None``.

        Args:
            now: Monotonic seconds, for policies that age.
            eligible: Workflows that may enter; ``None`` means all.
        """
        heads = self._heads() if eligible is None else self._waiting_of(eligible)
        if len(heads) < 2:
            return heads[0] if heads else None
        try:
            return min(heads, key=lambda q: (self.stage_policy.key(q, now), q.rank))
        except Exception:  # the callers here are others than those that wait
            log.exception("stage policy %r failed; first come, first served", self.stage_policy)
            return min(heads, key=lambda q: q.order)

    def _heads(self) -> list[Queued]:
        return [heap[0] for heap in self.stages.values()]

    def _waiting_of(self, workflows: Iterable[str]) -> list[Queued]:
        return [queued for w in workflows for queued in self.by_workflow.get(w, {}).values()]

    def grant(self, queued: Queued, *, extra: bool = False) -> Queued:
        """Give *queued* its place on the backend."""
        assert queued.waiting, "only a waiting call can be granted"
        self._stop_waiting(queued)
        queued.granted, queued.extra = True, extra
        self.in_flight += 1
        self.granted += 1
        self.extra += extra
        return queued

    def leave(self, queued: Queued) -> bool:
        """Take the call out, waiting or granted; returns whether it was still in. Idempotent."""
        if queued.waiting:
            self._stop_waiting(queued)
            return True
        if queued.granted:
            queued.granted = False
            self.in_flight -= 1
            return True
        return False

    def _stop_waiting(self, queued: Queued) -> None:
        queued.waiting = False
        self.waiting -= 1
        mine = self.by_workflow[queued.call.identity.workflow]
        del mine[queued.order]
        if not mine:
            del self.by_workflow[queued.call.identity.workflow]
        self._compact(queued.call.identity.stage)

    def _compact(self, stage: str) -> None:
        # Cancelled calls stay in their heap until they surface. When they are the greater part of it, it
        # is rebuilt, so memory follows the calls that wait, at an amortised constant cost.
        heap = self.stages[stage]
        while heap and not heap[0].waiting:
            heapq.heappop(heap)
        if len(heap) > 64 and len(heap) > 2 * self.waiting:
            heap[:] = [queued for queued in heap if queued.waiting]
            heapq.heapify(heap)
        if not heap:
            del self.stages[stage]

    def reorder(self, now: float, touched: Callable[[Call], bool]) -> None:
        """Compute the rank of waiting calls again after their hints changed."""
        for heap in self.stages.values():
            live = [queued for queued in heap if queued.waiting]
            changed = [queued for queued in live if touched(queued.call)]
            for queued in changed:
                queued.rank = self._rank(queued, now)
            if changed:
                heap[:] = live
                heapq.heapify(heap)

    def statistics(self) -> QueueStatistics:
        """Return a snapshot."""
        by_stage = {stage: sum(q.waiting for q in heap) for stage, heap in self.stages.items()}
        return QueueStatistics(
            waiting=self.waiting,
            waiting_by_stage={stage: n for stage, n in by_stage.items() if n},
            in_flight=self.in_flight,
            max_concurrency=self.max_concurrency,
            capacity=self.capacity,
            granted=self.granted,
            extra=self.extra,
            refused=self.refused,
        )

    def check_integrity(self) -> None:
        """Assert the invariants; for tests and for a doubtful moment."""
        live = [queued for heap in self.stages.values() for queued in heap if queued.waiting]
        assert len(live) == self.waiting, (len(live), self.waiting)
        indexed = [queued for mine in self.by_workflow.values() for queued in mine.values()]
        assert {id(q) for q in live} == {id(q) for q in indexed}
        assert all(self.by_workflow.values()), "no empty index is kept"
        assert all(heap[0].waiting for heap in self.stages.values()), "a sub-queue's head waits"
        assert self.in_flight >= 0
        assert all(not queued.granted for queued in live)
