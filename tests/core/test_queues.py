from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from orla_lg.core.lookahead.run_share import RunShare
from orla_lg.core.policies import policies
from orla_lg.core.queues import BackendQueue, Policies, Queued, SubQueue
from orla_lg.errors import PolicyError, QueueFull
from tests.core.fakes import a_call

POLICIES = st.sampled_from(
    ["fcfs", "workflow_fcfs", "priority", "sjf", "edf", "las", "shortest_remaining", "final_first"]
)
ODDS = {("a", 1): 1.0, ("a", 2): 0.5, ("b", 1): 1 / 64}
"""That a run's call of this stage and number is its last; 0 for others, of which nothing is known."""
STAGES, WORKFLOWS = st.sampled_from("abc"), st.sampled_from("uvw")


class QueueMachine(RuleBasedStateMachine):
    """``BackendQueue`` against a list that is sorted anew every time."""

    calls = Bundle("calls")

    @initialize(stage=POLICIES, request=POLICIES, capacity=st.integers(0, 6), bound=st.none() | st.integers(1, 3))
    def start(self, stage: str, request: str, capacity: int, bound: int | None) -> None:
        self.queue = BackendQueue("b", policies("b", stage, request), capacity, bound)
        self.stage, self.request = stage, request
        self.standings = {workflow: RunShare() for workflow in "uvw"}
        for workflow in "uv":
            self.standings[workflow].ends = lambda stage, nth: ODDS.get((stage, nth), 0.0)
        self.waiting: list[Queued] = []
        self.granted: list[Queued] = []
        self.ever_granted = 0

    def room(self) -> bool:
        return len(self.granted) < (self.queue.max_concurrency or math.inf)

    def key(self, name: str, queued: Queued) -> tuple[float, ...]:
        """What the policy of that name should go by, said in another way."""
        call = queued.call
        run = call.standing
        return {
            "fcfs": (),
            "workflow_fcfs": (run.order,),
            "priority": (-(call.priority - call.arrived_s / 30),),
            "sjf": (len(call.ask.messages[0]["content"]) / 4 + 256,),
            "edf": (math.inf if call.hints.deadline_s is None else call.arrived_s + call.hints.deadline_s,),
            "las": (len(bin(int(run.tokens_served))) if run.tokens_served else 0, run.order),  # all served at zero
            "final_first": (run.order - 64 * ODDS.get((call.identity.stage, call.nth), 0),),
            "shortest_remaining": (math.inf if run.remaining_s is None else run.remaining_s, run.order),
        }[name] + (queued.order,)

    def expected(self, eligible: list[str] | None) -> Queued | None:
        able = self.waiting if eligible is None else [q for q in self.waiting if q.call.identity.workflow in eligible]
        stages: dict[str, Queued] = {}
        for queued in sorted(able, key=lambda q: self.key(self.request, q)):
            stages.setdefault(queued.call.identity.stage, queued)
        heads = able if eligible is not None else list(stages.values())
        return min(heads, key=lambda q: (self.key(self.stage, q), self.key(self.request, q)), default=None)

    @rule(
        target=calls,
        stage=STAGES,
        workflow=WORKFLOWS,
        priority=st.none() | st.integers(-2, 2),
        chars=st.integers(0, 40),
        deadline_s=st.none() | st.integers(1, 9),
        arrived_s=st.integers(0, 90),
        nth=st.integers(0, 3),
    )
    def enter(
        self,
        stage: str,
        workflow: str,
        priority: int | None,
        chars: int,
        deadline_s: int | None,
        arrived_s: int,
        nth: int,
    ) -> Queued | None:
        call = a_call(workflow, stage, chars=chars, priority=priority, deadline_s=deadline_s)
        call.standing, call.arrived_s = self.standings[workflow], arrived_s
        call.nth = nth if workflow != "w" else 0
        full = len(self.waiting) >= self.queue.capacity and bool(self.waiting or not self.room())
        if full:
            with pytest.raises(QueueFull):
                self.queue.enter(call, 0.0)
            return None
        self.waiting.append(self.queue.enter(call, 0.0))
        return self.waiting[-1]

    @rule(eligible=st.none() | st.lists(WORKFLOWS, unique=True))
    def serve(self, eligible: list[str] | None) -> None:
        chosen = self.queue.next(0.0, eligible)
        assert chosen is self.expected(eligible)
        if chosen is not None and self.queue.has_room():
            self.grant(chosen)

    def grant(self, queued: Queued, *, extra: bool = False) -> None:
        self.queue.grant(queued, extra=extra)
        self.ever_granted += 1
        self.waiting.remove(queued)
        self.granted.append(queued)

    @rule(queued=calls)
    def grant_out_of_turn(self, queued: Queued | None) -> None:
        if queued in self.waiting:
            self.grant(queued, extra=True)
        elif queued is not None:
            with pytest.raises(AssertionError):
                self.queue.grant(queued)

    @rule(queued=calls)
    def leave(self, queued: Queued | None) -> None:
        if queued is None:
            return
        was_in = queued in self.waiting or queued in self.granted
        assert self.queue.leave(queued) is was_in
        self.waiting, self.granted = ([q for q in some if q is not queued] for some in (self.waiting, self.granted))

    @rule(target=calls, queued=consumes(calls))
    def come_back(self, queued: Queued | None) -> Queued | None:
        if queued not in self.granted or len(self.waiting) >= self.queue.capacity:
            return queued
        self.leave(queued)
        self.waiting.append(self.queue.enter(queued.call, 0.0, order=queued.order))
        return self.waiting[-1]

    @rule(workflow=WORKFLOWS, priority=st.integers(-3, 3))
    def reorder(self, workflow: str, priority: int) -> None:
        def touched(call: object) -> bool:
            if call.identity.workflow != workflow:
                return False
            call.hints = type(call.hints)(priority=priority)
            return True

        self.queue.reorder(0.0, workflow, touched)

    @rule(workflow=WORKFLOWS, tokens=st.integers(0, 9000), remaining_s=st.none() | st.integers(0, 5))
    def a_run_is_served(self, workflow: str, tokens: int, remaining_s: int | None) -> None:
        standing = self.standings[workflow]
        standing.serve(tokens, 0.0)
        standing.remaining_s = remaining_s
        self.queue.served(workflow, 0.0)

    @rule(stage=POLICIES, request=POLICIES)
    def change_policies(self, stage: str, request: str) -> None:
        self.stage, self.request = stage, request
        self.queue.change_policies(policies("b", stage, request), 0.0)

    @invariant()
    def sound(self) -> None:
        self.queue.check_integrity()
        assert self.queue.waiting == len(self.waiting) <= max(1, self.queue.capacity)
        assert (self.queue.in_flight, self.queue.granted) == (len(self.granted), self.ever_granted)
        if self.queue.max_concurrency is not None:
            assert sum(not q.extra for q in self.granted) <= self.queue.max_concurrency
        assert self.queue.statistics().waiting == sum(self.queue.statistics().waiting_by_stage.values())


QueueMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestQueue = QueueMachine.TestCase


def queue(**rest: object) -> BackendQueue:
    return BackendQueue("b", policies("b", "fcfs", rest.pop("request", "fcfs")), rest.pop("capacity", 10_000), **rest)


def test_full_queue_says_its_numbers() -> None:
    small = queue(capacity=1, max_concurrency=1)
    small.grant(small.enter(a_call(), 0.0))
    small.enter(a_call(), 0.0)
    with pytest.raises(QueueFull, match=r"'b' has 1 call waiting, its capacity is 1; 1 call in flight"):
        small.enter(a_call(), 0.0)
    assert small.statistics().refused == 1


def test_cancelled_calls_do_not_pile_up_behind_a_waiting_head() -> None:
    long = queue()
    long.enter(a_call(), 0.0)
    for _ in range(1000):
        long.leave(long.enter(a_call(), 0.0))
    assert len(long.stages["node"]._heap) <= 65


class Shortest:
    def key(self, head: Queued, now: float) -> tuple[object, ...]:
        return (head.call.ask.prompt_chars,)


class Soonest:
    def key(self, head: Queued, now: float) -> tuple[object, ...]:
        return (head.call.deadline_at_s,)


def test_a_policy_of_ones_own_is_first_come_first_served_among_equals() -> None:
    shortest = queue(request=Shortest())
    came = [shortest.enter(a_call(chars=n), 0.0) for n in (5, 3, 3, 3, 3, 4)]
    served = [shortest.grant(shortest.next(0.0)).order for _ in came]
    assert served == [2, 3, 4, 5, 6, 1]


def test_keys_that_cannot_be_compared_hurt_only_their_caller() -> None:
    soonest = queue(request=Soonest())
    first = soonest.enter(a_call(), 0.0)
    with pytest.raises(
        PolicyError, match=r"request policy Soonest cannot order call .* of stage .*: TypeError: '<' not"
    ):
        soonest.enter(a_call(deadline_s=1.0), 0.0)
    soonest.check_integrity()
    assert soonest.next(0.0) is first


def test_a_stage_policy_that_fails_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    broken = BackendQueue("b", policies("b", Soonest(), "fcfs"), 10)
    first = broken.enter(a_call(stage="x"), 0.0)
    broken.enter(a_call(stage="y", deadline_s=1.0), 0.0)
    for _ in range(3):
        assert broken.next(0.0) is first
    (logged,) = caplog.records
    assert "stage policy Soonest failed on backend 'b': first come, first served" in logged.getMessage()


@dataclass
class Unhashable:
    """A policy of a user's that keeps account, and fails at it."""

    fails: bool = True
    seen: int = 0

    def key(self, head: Queued, now: float) -> tuple[int]:
        return (head.order,)

    def granted(self, queued: Queued) -> None:
        self.seen += 1
        if self.fails:
            raise ValueError("no account")


@pytest.mark.parametrize("fails", [False, True])
def test_a_policy_that_fails_at_its_account_loses_no_grant(fails: bool, caplog: pytest.LogCaptureFixture) -> None:
    policy = Unhashable(fails)
    queue = BackendQueue("b", Policies(policy, {"*": policy}), 10, 1)
    queued = queue.enter(a_call("w"), 0.0)
    assert queue.grant(queued) is queued and queue.in_flight == 1 and policy.seen == 1
    assert queue.leave(queued) and queue.in_flight == 0
    assert ("failed in granted()" in caplog.text) is fails


def test_stale_ranks_are_swept_when_calls_come_too() -> None:
    sub_queue = SubQueue()
    left = [Queued(a_call(), order, rank=(order,)) for order in range(64)]
    for queued in left:
        sub_queue.add(queued)
    for queued in left:
        sub_queue.remove(queued)
    for order in (64, 65):
        sub_queue.add(Queued(a_call(), order, rank=(order,)))
        sub_queue.check_integrity()
