"""Step 4, queue: one queue per backend, one sub-queue per stage, and the grants that empty them.

Every decision here is a plain method on plain state: it mutates and returns the calls that may go now.
The caller holds the backend's lock around it and wakes them afterwards, so nothing here waits, and the
rules can be tested without threads or loops.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol

from orla_lg.core.boundary.plain import counted
from orla_lg.core.boundary.stage_rules import StageRules
from orla_lg.core.cache.slots.table import SlotLease
from orla_lg.core.cache.verification import ExpectedTokens
from orla_lg.core.call import Call
from orla_lg.core.identity import ANY_STAGE
from orla_lg.core.prefetch.prompts import Prompt
from orla_lg.core.steps import Waiter
from orla_lg.errors import PolicyError, QueueFull

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
    turn: Waiter | None = None
    """Set by whoever must wait; done when the call is granted."""
    rank: Sortable = ()
    """By the request policy, with ``order`` at the end: among equals the first come goes first. A new tuple each time
    it is computed."""
    marks: dict[int, float] | None = None
    """What policies remember of it, by a number of their own; few do, so there is none until then."""
    held: str = ""
    """Why it could not go when it was last looked at; empty: for want of a place."""
    expected: ExpectedTokens | None = None
    """What it should find in the cache, from its grant on."""
    prompt: Prompt | None = None
    """What it sent, as far as a warm-up may need it."""
    lease: SlotLease | None = None
    """The slot given with the grant, on engines with slots."""


Sortable = tuple[Any, ...]


class StagePolicy(Protocol):
    """Which stage's sub-queue is served next: asked at every dispatch, or like a request policy if it is ``steady``.

    It may have besides, as may a request policy, what a Protocol cannot leave open: ``steady: bool``, the keys of two
    calls keep their order while both wait; ``follows_service: bool``, a key changes when a call of the same workflow
    ends; ``granted(head) -> None``, called with each call that goes.
    """

    def key(self, head: Queued, now: float) -> Sortable:
        """Return the sort key of a sub-queue by its head; *now* in monotonic seconds."""
        ...


class RequestPolicy(Protocol):
    """Which call inside a sub-queue goes next; asked when the call arrives or its hints change."""

    def key(self, head: Queued, now: float) -> Sortable:
        """Return the sort key of a call; *now* in monotonic seconds."""
        ...


@dataclass(frozen=True, slots=True)
class Policies:
    """The policies of one backend."""

    stage: StagePolicy
    requests: Mapping[str, RequestPolicy]
    """By stage; ``"*"`` is any other."""
    rules: StageRules[RequestPolicy] = field(init=False, repr=False, compare=False)
    """The same: a node's policy is also that of the stages inside it."""

    keep_account: bool = field(init=False)
    """Whether one of them wants to know which calls go."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", StageRules(self.requests))
        asking = any(hasattr(each, "granted") for each in (self.stage, *self.requests.values()))
        object.__setattr__(self, "keep_account", asking)

    def of(self, stage: str) -> RequestPolicy:
        """Return the policy that orders the calls of *stage*."""
        found = self.rules.find(stage)
        return self.requests[ANY_STAGE] if found is None else found.entry

    def granted(self, queued: Queued) -> None:
        """Report the call that goes now to policies that keep account; a fault of theirs is logged."""
        stage, request = self.stage, self.of(queued.call.identity.stage)
        for each in (stage,) if request is stage else (stage, request):
            if (report := getattr(each, "granted", None)) is not None:
                try:
                    report(queued)
                except Exception:  # a policy may be the user's code; its fault must not lose a grant
                    log.exception("policy %r failed in granted(); the call goes all the same", type(each).__name__)


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
    """Of the grants, those given out of turn because the caller already held one."""
    refused: int
    paused: bool = False
    """Nothing is granted until somebody resumes it."""


class SubQueue:
    """The waiting calls of one stage: a heap of their ranks.

    A rank ends with the call's ``order``, which finds the call, so the heap holds numbers only: the garbage collector
    leaves such tuples alone, and with a hundred thousand calls that is what its pauses are made of.

    The rank of a call that left, or got another one, stays in the heap until it surfaces. When such ranks are the
    greater part, the heap is rebuilt, so memory follows the calls that wait, at an amortised constant cost.
    """

    __slots__ = ("_heap", "calls", "turn")

    def __init__(self) -> None:
        self.calls: dict[int, Queued] = {}
        """The calls by ``Queued.order``."""
        self.turn: Sortable | None = None
        """Its place in the ``StageOrder``."""
        self._heap: list[Sortable] = []

    def add(self, queued: Queued) -> None:
        """Take in a call, or one that is here already and got another rank.

        Raises:
            TypeError: Its rank cannot be compared with the others'; it is not in then.
        """
        rank = queued.rank
        try:
            heapq.heappush(self._heap, rank)
        except BaseException:
            self._heap = [each for each in self._heap if each is not rank]
            heapq.heapify(self._heap)
            raise
        self.calls[queued.order] = queued
        self._sweep()

    def remove(self, queued: Queued) -> None:
        """Let a call go."""
        del self.calls[queued.order]
        self._sweep()

    def _sweep(self) -> None:
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self.calls):
            self._heap = [rank for rank in self._heap if self._call(rank) is not None]
            heapq.heapify(self._heap)

    def _call(self, rank: Sortable) -> Queued | None:
        queued = self.calls.get(rank[-1])
        return queued if queued is not None and queued.rank is rank else None

    def head(self) -> Queued:
        """Return the call to go first; there must be one."""
        while (queued := self._call(self._heap[0])) is None:
            heapq.heappop(self._heap)
        return queued

    def check_integrity(self) -> None:
        """Assert that each waiting call has one rank in the heap, and that the heap is not mostly stale."""
        live = [rank for rank in self._heap if self._call(rank) is not None]
        assert sorted(rank[-1] for rank in live) == sorted(self.calls)
        assert len(self._heap) <= max(64, 2 * len(self.calls)) + 1, "stale ranks are swept"

    def __len__(self) -> int:
        return len(self.calls)

    def in_order(self) -> Iterator[Queued]:
        """Yield the calls, first the one to go first, at the cost of those that are taken.

        A heap read best first: the children of a rank come after it, so they join once it has been read.
        """
        frontier = [(self._heap[0], 0)] if self._heap else []
        while frontier:
            rank, at = heapq.heappop(frontier)
            for child in (2 * at + 1, 2 * at + 2):
                if child < len(self._heap):
                    heapq.heappush(frontier, (self._heap[child], child))
            if (queued := self._call(rank)) is not None:
                yield queued

    def __iter__(self) -> Iterator[Queued]:
        return iter(self.calls.values())


class StageOrder:
    """Which sub-queue is served next under a steady stage policy: a heap of what it said of their heads.

    Whoever changes a sub-queue doubts it; it is judged again when the next call is asked for. So a dispatch costs the
    logarithm of the number of stages.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Sortable, Sortable, str]] = []
        self._doubted: set[str] = set()
        self.doubt: Callable[[str], None] = self._doubted.add
        """Note that a sub-queue may have another head, or its head another key."""

    def first(self, stages: dict[str, SubQueue], policy: StagePolicy, now: float) -> Queued | None:
        """Return the call to go next; ``None`` if nobody waits.

        Raises:
            Exception: What the policy raises, or a comparison of its keys; all is judged anew then.
        """
        try:
            for stage in self._doubted:
                if (sub_queue := stages.get(stage)) is not None:
                    self._judge(stage, sub_queue, policy, now)
        except BaseException:
            self._heap = []
            self._doubted.update(stages)
            raise
        self._doubted.clear()
        while self._heap:
            sub_queue = stages.get(self._heap[0][2])
            if sub_queue is not None and sub_queue.turn is self._heap[0]:
                return sub_queue.head()
            heapq.heappop(self._heap)
        return None

    def _judge(self, stage: str, sub_queue: SubQueue, policy: StagePolicy, now: float) -> None:
        head = sub_queue.head()
        turn = sub_queue.turn = (policy.key(head, now), head.rank, stage)
        heapq.heappush(self._heap, turn)

    def sweep(self, stages: dict[str, SubQueue]) -> None:
        """Forget what is stale once it is the greater part."""
        if len(self._doubted) > 64 + 2 * len(stages):
            self._doubted.intersection_update(stages)
        if len(self._heap) > 64 + 2 * len(stages):
            self._heap = [turn for turn in self._heap if turn[2] in stages and stages[turn[2]].turn is turn]
            heapq.heapify(self._heap)


@dataclass(eq=False)
class BackendQueue:
    """The two-level queue of one backend.

    Invariants: ``in_flight`` counts granted calls; a stage has a sub-queue only while a call waits in it;
    ``by_workflow`` indexes exactly the waiting calls. ``check_integrity`` asserts them.
    """

    name: str
    policies: Policies
    capacity: int
    max_concurrency: int | None = None
    engine_takes: float = inf
    """So many at once, as far as its load told (``window``); more would only wait in its own queue."""
    paused: bool = False
    may_grant: Callable[[], bool] | None = None
    """Whether this core may grant anything now; ``None``: always, no other core could (``serve.store.lease``)."""
    in_flight: int = 0
    kept_back: int = 0
    """Places that nothing is granted: requests that another core granted may be in them (``serve.link.orphans``)."""
    hushed: bool = False
    """Nothing is granted for a moment: the engine's reports are to count no call on its way (``serve.link.hush``)."""
    granted: int = 0
    extra: int = 0
    refused: int = 0
    next_order: int = 0
    stages: dict[str, SubQueue] = field(default_factory=dict)
    by_workflow: dict[str, dict[int, str]] = field(default_factory=dict)
    """Waiting calls per workflow: the stage of each, by ``order``."""
    waiting: int = 0
    order: StageOrder = field(default_factory=StageOrder)
    """Kept up while the stage policy is steady."""
    failed_policy: StagePolicy | None = None
    """The stage policy whose failure was logged last."""

    def enter(self, call: Call, now: float, *, order: int | None = None, refuses: bool = True) -> Queued:
        """Put a call into its stage's sub-queue.

        Args:
            call: The call.
            now: Monotonic seconds.
            order: Its arrival number, when it has one.
            refuses: Whether the capacity holds for it: not for one that will not wait.

        Raises:
            QueueFull: As many calls wait as ``capacity`` allows.
        """
        if refuses and self.waiting >= self.capacity and (self.waiting or not self.has_room()):
            self.refused += 1
            raise QueueFull(
                f"backend {self.name!r} has {counted(self.waiting, 'call')} waiting, its capacity is "
                f"{self.capacity}; {counted(self.in_flight, 'call')} in flight"
            )
        if order is None:
            order = self.next_order = self.next_order + 1
        queued = Queued(call, order)
        self._place(queued, now)
        self.by_workflow.setdefault(call.identity.workflow, {})[queued.order] = call.identity.stage
        self.waiting += 1
        return queued

    def pass_through(self, call: Call, now: float, *, order: int | None = None) -> Queued:
        """Take in a call that is granted at once: where none waits it is the next by any policy."""
        if order is None:
            order = self.next_order = self.next_order + 1
        queued = Queued(call, order)
        self._rank(queued, now)
        return queued

    def _place(self, queued: Queued, now: float) -> None:
        stage = queued.call.identity.stage
        sub_queue = self.stages.get(stage) or SubQueue()
        self._rank(queued, now, sub_queue)
        self.stages[stage] = sub_queue
        self.order.doubt(stage)

    def _rank(self, queued: Queued, now: float, sub_queue: SubQueue | None = None) -> None:
        """Give a call the rank of this moment, and its place by it in a sub-queue.

        Raises:
            PolicyError: The request policy failed, or its keys cannot be compared; the queue is as before.
        """
        stage, before = queued.call.identity.stage, queued.rank
        policy = self.policies.of(stage)
        try:
            key = policy.key(queued, now)
            queued.rank = (*(key if isinstance(key, tuple) else (key,)), queued.order)
            if sub_queue is not None:
                sub_queue.add(queued)
        except Exception as error:  # a policy may be the user's code
            queued.rank = before
            where = f"call {queued.call.id} of stage {stage!r} on backend {self.name!r}"
            fault = f"{type(error).__name__}: {error}"
            raise PolicyError(f"request policy {type(policy).__name__} cannot order {where}: {fault}") from error
        except BaseException:
            queued.rank = before
            raise

    def has_room(self) -> bool:
        """Whether another call may be granted: nobody paused the backend, and neither bound is reached."""
        bound = self.engine_takes if self.max_concurrency is None else min(self.max_concurrency, self.engine_takes)
        if self.paused or self.hushed or self.in_flight + self.kept_back >= bound:
            return False
        return self.may_grant is None or self.may_grant()

    def next(
        self, now: float, eligible: Iterable[str] | None = None, without: Collection[Queued] = ()
    ) -> Queued | None:
        """Return the call to go next, or ``None``.

        Args:
            now: Monotonic seconds, for policies that age.
            eligible: Workflows that may enter; ``None`` means all.
            without: Calls that had better not go now, whatever their workflow may.
        """
        if without:
            able = self.waiting_of(self.by_workflow if eligible is None else eligible)
            return self._first_of([queued for queued in able if queued not in without], now)
        if eligible is not None:
            return self._first_of(self.waiting_of(eligible), now)
        if self.waiting == 1:  # it goes next by any policy
            (sub_queue,) = self.stages.values()
            return sub_queue.head()
        stage_policy = self.policies.stage
        if not getattr(stage_policy, "steady", False):
            return self._first_of(self.heads(), now)
        try:
            return self.order.first(self.stages, stage_policy, now)
        except Exception:  # noqa: BLE001 - the policy's, and told in the log
            self._log_failure()
            return min(self.heads(), key=lambda queued: queued.order, default=None)

    def heads(self) -> list[Queued]:
        """Return the call of each stage that goes first there."""
        return [sub_queue.head() for sub_queue in self.stages.values()]

    def _first_of(self, able: list[Queued], now: float) -> Queued | None:
        return self._in_order(able, now)[0] if able else None

    def candidates(self, now: float, also: Iterable[Queued] = ()) -> list[Queued]:
        """Return the heads of all stages and others beside them, in the order of the policies."""
        return self._in_order(list(dict.fromkeys((*self.heads(), *also))), now)

    def first_of_stage(self, stage: str, most: int) -> list[Queued]:
        """Return the calls of a stage to go first, in order, *most* of them at most."""
        return list(itertools.islice(self.stages[stage].in_order(), most))

    def _in_order(self, queued: list[Queued], now: float) -> list[Queued]:
        """Order calls by the stage policy, then by their rank; if it fails, by their arrival."""
        if len(queued) < 2:
            return queued
        stage_policy = self.policies.stage
        try:
            return sorted(queued, key=lambda each: (stage_policy.key(each, now), each.rank))
        except Exception:  # noqa: BLE001 - the policy's, and told in the log
            self._log_failure()
            return sorted(queued, key=lambda each: each.order)

    def _log_failure(self) -> None:  # the callers here are others than those that wait: none of them pays for it
        policy = self.policies.stage
        if policy is not self.failed_policy:
            self.failed_policy = policy
            log.exception(
                "stage policy %s failed on backend %r: first come, first served wherever it does; what it raises is "
                "not logged again", type(policy).__name__, self.name,
            )  # fmt: skip

    def waiting_of(self, workflows: Iterable[str]) -> list[Queued]:
        """Return the waiting calls of some workflows."""
        found = [(order, stage) for w in workflows for order, stage in self.by_workflow.get(w, {}).items()]
        return [self.stages[stage].calls[order] for order, stage in found]

    def grant(self, queued: Queued, *, extra: bool = False) -> Queued:
        """Give *queued* its place on the backend."""
        assert queued.waiting, "only a waiting call can be granted"
        if self.waiting:
            self._stop_waiting(queued)
        queued.waiting = False
        queued.granted, queued.extra = True, extra
        self.in_flight += 1
        self.granted += 1
        self.extra += extra
        if self.policies.keep_account:
            self.policies.granted(queued)
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
        stage = queued.call.identity.stage
        self.stages[stage].remove(queued)
        if not self.stages[stage].calls:
            del self.stages[stage]
        self.order.doubt(stage)
        self.order.sweep(self.stages)

    # What changes while calls wait

    def reorder(self, now: float, workflow: str, touched: Callable[[Call], bool]) -> None:
        """Rank those waiting calls of a workflow again whose hints changed."""
        for queued in self.waiting_of([workflow]):
            if touched(queued.call):
                self._place(queued, now)

    def served(self, workflow: str, now: float) -> None:
        """Rank a workflow's waiting calls again after it was served, where their policy looks at that."""
        stage_follows = getattr(self.policies.stage, "follows_service", False)
        for queued in self.waiting_of([workflow]):
            stage = queued.call.identity.stage
            if getattr(self.policies.of(stage), "follows_service", False):
                self._place(queued, now)
            if stage_follows:
                self.order.doubt(stage)

    def change_policies(self, policies: Policies, now: float) -> None:
        """Order all waiting calls by other policies; none is lost, and each keeps its arrival number.

        A policy that fails on one of them changes nothing: its error is raised, and the order is as before.
        """
        before, ranks = (self.policies, self.stages, self.order), [(queued, queued.rank) for queued in self]
        self.policies, self.stages, self.order = policies, {}, StageOrder()
        try:
            for queued, _ in ranks:
                self._place(queued, now)
        except BaseException:
            self.policies, self.stages, self.order = before
            for queued, rank in ranks:
                queued.rank = rank
            raise

    def first(self, count: int, now: float) -> list[Queued]:
        """Return the *count* waiting calls that would go first if places came free now, in that order."""
        stage_policy = self.policies.stage
        in_order = (sub_queue.in_order() for sub_queue in self.stages.values())
        try:  # a merge compares heads, as ``next`` does
            merged = heapq.merge(*in_order, key=lambda q: (stage_policy.key(q, now), q.rank))
            return list(itertools.islice(merged, count))
        except Exception:  # noqa: BLE001 - the policy's, and told in the log
            self._log_failure()
            return heapq.nsmallest(count, self, key=lambda q: q.order)

    def __iter__(self) -> Iterator[Queued]:
        return (queued for sub_queue in self.stages.values() for queued in sub_queue)

    def statistics(self) -> QueueStatistics:
        """Return a snapshot."""
        return QueueStatistics(
            waiting=self.waiting,
            waiting_by_stage={stage: len(sub_queue) for stage, sub_queue in self.stages.items()},
            in_flight=self.in_flight,
            max_concurrency=self.max_concurrency,
            capacity=self.capacity,
            granted=self.granted,
            extra=self.extra,
            refused=self.refused,
            paused=self.paused,
        )

    def check_integrity(self) -> None:
        """Assert the invariants; for tests and for a doubtful moment."""
        live = list(self)
        assert len(live) == self.waiting, (len(live), self.waiting)
        assert all(queued.waiting and not queued.granted for queued in live)
        assert all(self.stages.values()), "no empty sub-queue is kept"
        assert all(self.by_workflow.values()), "no empty index is kept"
        indexed = {id(queued) for queued in self.waiting_of(self.by_workflow)}
        assert indexed == {id(queued) for queued in live}
        for sub_queue in self.stages.values():
            sub_queue.check_integrity()
        assert self.in_flight >= 0
