"""Held requests leave vLLM's queue for one step, under any load, and the promises of suspension hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orla_lg_vllm.bands import Band
from orla_lg_vllm.suspension import SuspensionSettings
from tests.vllm_plugin.scheduler import FakeCall, FakeScheduler, Fcfs, Priority, Status

PATIENCE_S = 30.0
BLOCKS = 21  # one is vLLM's own, so the reserve is 2
POOL = BLOCKS - 1


def engine_of(queue: Any = None, blocks: int = BLOCKS, seats: int = 4) -> FakeScheduler:
    return FakeScheduler(blocks, seats, Fcfs() if queue is None else queue, SuspensionSettings(PATIENCE_S))


def call(name: str, workflow: str, blocks: int, engine: FakeScheduler, priority: int = 0) -> FakeCall:
    words = [f"{workflow or name}{number}" for number in range(blocks - 1)]  # the last block is half full
    engine.now_s += 0.01
    made = FakeCall(name, workflow, words, engine.now_s, priority)
    engine.add(made)
    return made


def queue(engine: FakeScheduler) -> list[str]:
    return [each.request_id for each in engine.waiting]


@pytest.mark.parametrize("kind", [Fcfs, Priority])
def test_held_requests_are_hidden_while_a_step_is_planned_and_back_in_their_places(kind: Any) -> None:
    engine = engine_of(kind())
    call("a1", "a", 8, engine)
    engine.step()
    call("b", "b", 12, engine)
    call("a2", "a", 9, engine)
    call("c", "c", 12, engine)
    seen: list[list[str]] = []
    engine.before_schedule = lambda: seen.append(queue(engine))  # type: ignore[method-assign]
    engine.step()
    assert seen == [["a2"]]
    assert queue(engine) == ["b", "c"] and [each.request_id for each in engine.running] == ["a1", "a2"]


def test_one_that_was_shown_and_found_no_seat_keeps_its_place_among_the_held() -> None:
    engine = engine_of(seats=1)
    call("a1", "a", 8, engine)
    engine.step()
    call("b", "b", 12, engine)
    call("a2", "a", 9, engine)
    call("c", "c", 12, engine)
    engine.step()
    assert queue(engine) == ["b", "a2", "c"]


def test_by_priority_a_held_request_that_came_later_still_stands_before_less_urgent_ones() -> None:
    engine = engine_of(Priority())
    call("a", "a", 10, engine)
    engine.step()
    call("late", "x", 12, engine, priority=5)
    call("urgent", "y", 12, engine, priority=-5)
    engine.step()
    assert queue(engine) == ["urgent", "late"]


def test_an_aborted_held_request_is_gone_for_good() -> None:
    engine = engine_of()
    call("a", "a", 10, engine)
    engine.step()
    call("b", "b", 12, engine)
    call("c", "c", 12, engine)
    engine.step()
    engine.finish("b", whole=False)
    engine.step()
    assert queue(engine) == ["c"]
    engine.finish("a")
    engine.step()
    assert [each.request_id for each in engine.running] == ["c"] and not engine.waiting


def test_held_requests_come_back_when_the_scheduler_fails() -> None:
    engine = engine_of()
    call("a", "a", 10, engine)
    engine.step()
    call("b", "b", 12, engine)

    def fail() -> None:
        raise RuntimeError("planned")

    engine.before_schedule = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="planned"):
        engine.step()
    assert queue(engine) == ["b"]


def test_who_waits_for_a_grammar_is_left_to_the_scheduler_and_never_in_the_way() -> None:
    engine = engine_of()
    made = call("a", "a", 18, engine)
    made.status, made.structured_output_request = (
        Status.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR,
        SimpleNamespace(grammar=None),
    )
    call("b", "b", 18, engine)
    engine.step()
    assert [each.request_id for each in engine.running] == ["b"] and queue(engine) == ["a"]


def test_what_a_suspended_workflow_shares_with_a_resident_stays() -> None:
    engine = engine_of(blocks=31)
    for workflow in ("a", "b"):
        words = ["system", f"{workflow}1", f"{workflow}2", f"{workflow}3"]
        engine.add(FakeCall(workflow, workflow, words, engine.now_s))
        engine.step()
        engine.finish(workflow)
        engine.now_s += 1
    suspension = engine.keeper.suspension
    assert suspension is not None
    suspension.suspend("a")
    bands = [engine.keeper.ledger.band(block) for block in engine.keeper.ledger.blocks_of("a")]
    assert sorted(bands) == [Band.SPARE] * 3 + [Band.HISTORY]
    engine.keeper.check_integrity()


def test_what_two_calls_share_is_counted_once_so_that_the_second_takes_no_mere_part_of_an_idle_workflow() -> None:
    engine = engine_of()
    call("idle", "idle", 4, engine)
    engine.step()
    engine.finish("idle")
    call("a0", "a", 13, engine)
    engine.step()
    call("a1", "a", 15, engine)
    call("a2", "a", 17, engine)  # lacks 3 blocks behind a1, which brings 2 of them, and 5 without
    engine.step()
    assert [each.request_id for each in engine.running] == ["a0", "a1", "a2"]
    assert engine.keeper.suspension is not None
    assert engine.keeper.suspension.suspended == {"idle"}


def test_paused_the_scheduler_is_left_alone() -> None:
    engine = engine_of()
    call("a", "a", 10, engine)
    engine.step()
    call("b", "b", 12, engine)
    engine.pause_state = 1
    seen: list[list[str]] = []
    engine.before_schedule = lambda: seen.append(queue(engine))  # type: ignore[method-assign]
    engine.step()
    assert seen == [["b"]]


class Load(RuleBasedStateMachine):
    """Workflows whose calls grow, end, are aborted and pushed out, on a pool that is too small for all of them."""

    @initialize(by_priority=st.booleans())
    def start(self, by_priority: bool) -> None:
        self.engine = engine_of(Priority() if by_priority else Fcfs())
        self.suspension: Any = self.engine.keeper.suspension
        self.engine.before_schedule = self._look  # type: ignore[method-assign]
        self.lengths: dict[str, int] = {}
        self.calls = 0
        self.shown: list[str] = []
        self.untouchable: set[int] = set()

    @rule(workflow=st.sampled_from(["u", "v", "w", "x", ""]), more=st.integers(1, 6), priority=st.integers(-1, 1))
    def ask(self, workflow: str, more: int, priority: int) -> None:
        self.calls += 1
        name = workflow or f"nobody{self.calls}"
        length = self.lengths.get(name, 1) + more
        length = more + 1 if length > POOL // 2 else length  # its context was begun anew
        self.lengths[name] = length
        self.engine.now_s += 0.01
        stem = name if length > more + 1 else f"{name}{self.calls}-"
        made = FakeCall(
            f"r{self.calls}", workflow, [f"{stem}{n}" for n in range(length)], self.engine.now_s, priority
        )
        self.engine.add(made)

    @rule()
    def step(self) -> None:
        before, ran = queue(self.engine), len(self.engine.running)
        fits = sum(-(-each.num_tokens // 16) for each in self.engine.requests.values()) + 2
        roomy = fits <= self.suspension._room.spare_blocks()
        overdue = {
            each.request_id for each in self.engine.waiting if self.engine.now_s - each.arrival_time >= PATIENCE_S
        }
        self.engine.taken = []
        self.engine.step()
        held = set(before) - set(self.shown)
        began = {each.request_id for each in self.engine.running}
        if roomy:
            assert not held, "somebody is held while all fits"
        if before and not ran:
            assert self.engine.running, "nothing runs, and nobody goes"
        # With no seat free when it was planned nobody was looked at, even if one was pushed out then.
        if max(ran, len(began)) < self.engine.max_num_running_reqs and overdue & held:
            # Who waited for too long is held only behind one that the pool cannot hold beside what runs.
            assert set(before) & set(self.shown) - began, "one that waited for too long was passed"
        if isinstance(self.engine.waiting, Fcfs):
            stayed = [name for name in queue(self.engine) if name in before]
            assert stayed == [name for name in before if name in stayed], "the queue is in another order"
        lost = {block.block_id for block in self.engine.taken} & self.untouchable
        assert not lost, f"workflows without a call lost {lost}, and kept the rest"

    def _look(self) -> None:
        """Note what the scheduler is shown, and what is protected and of no use to what is shown."""
        self.shown = queue(self.engine)
        busy = {each.workflow for each in [*self.engine.running, *self.engine.waiting]}
        ledger = self.engine.keeper.ledger
        self.untouchable = {
            block
            for workflow in set(self.suspension.residents) - busy
            if not ledger.is_ordered(workflow)
            for block in ledger.blocks_of(workflow)
            if ledger.band(block) > Band.SPARE
        }

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data(), whole=st.booleans())
    def finish(self, data: st.DataObject, whole: bool) -> None:
        able = [name for name, each in self.engine.requests.items() if not whole or each.status is Status.RUNNING]
        if able:
            name = data.draw(st.sampled_from(able))
            self.engine.finish(name, whole=whole)
            assert name not in queue(self.engine)

    @precondition(lambda self: self.engine.running)
    @rule()
    def push_out(self) -> None:
        self.engine.preempt(self.engine.running[-1])

    @rule(verb=st.sampled_from(["release", "flush", "pin"]), workflow=st.sampled_from(["u", "v"]))
    def order(self, verb: str, workflow: str) -> None:
        running = {
            each.request_id: [block.block_id for block in each.blocks]
            for each in self.engine.running
            if each.workflow == workflow
        }
        self.engine.keeper.order(verb, workflow, 3.0 if verb == "pin" else None, running)

    @rule(seconds=st.sampled_from([1.0, 12.0, 31.0]))
    def wait(self, seconds: float) -> None:
        self.engine.now_s += seconds

    @invariant()
    def nobody_is_lost(self) -> None:
        known = queue(self.engine) + [each.request_id for each in self.engine.running]
        assert sorted(known) == sorted(self.engine.requests)

    @invariant()
    def the_books_are_right(self) -> None:
        self.engine.keeper.check_integrity()
        self.suspension.check_integrity()
        running = {each.workflow for each in self.engine.running if each.workflow}
        assert {each for each in self.suspension.residents if self.suspension.is_running(each)} == running

    @invariant()
    def what_is_protected_is_a_residents(self) -> None:
        ledger, residents = self.engine.keeper.ledger, self.suspension.residents
        for workflow in ledger.workflows():
            if workflow not in residents:
                protected = [b for b in ledger.blocks_of(workflow) if ledger.band(b) > Band.SPARE]
                assert all(ledger.is_shared(b, workflow) for b in protected), f"{workflow} keeps a part"


TestLoad = Load.TestCase
TestLoad.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)

pytestmark = pytest.mark.timeout(300)
