"""Owners and pins: what one workflow has, and nothing that another has too."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from orla_lg_sim.ownership import Ownership


def filled(*claims: tuple[str, int], blocks: int = 8) -> Ownership:
    """Make hashes known, free again, and owned."""
    kept = Ownership(blocks)
    for value in dict.fromkeys(value for _, value in claims):
        (block,) = kept.pool.take(1)
        kept.pool.name(block, value)
        kept.pool.give_back([block])
    for workflow, value in claims:
        kept.claim(workflow, value)
    return kept


def test_a_flush_takes_only_what_nobody_else_has() -> None:
    kept = filled(("a", 1), ("b", 1), ("a", 2))
    assert kept.alone("a") == [2] and kept.shared_by(1) == 2
    assert kept.flush_workflow("a") == 1
    assert kept.pool.find([1]) and not kept.pool.find([2])
    assert kept.workflows() == {"b": 1}
    assert kept.flush_workflow("b") == 1 and not kept.pool.known
    kept.check_integrity()


def test_a_released_workflow_goes_first_tail_before_head() -> None:
    kept = filled(("a", 1), ("a", 2), ("b", 3), blocks=3)
    assert kept.release_workflow("a") == 2
    kept.pool.take(1)
    assert kept.pool.find([1]) and not kept.pool.find([2]) and kept.pool.find([3])
    kept.pool.take(1)
    assert not kept.pool.find([1]) and kept.pool.find([3])


def test_a_pin_holds_what_comes_later_too_and_ends_in_time() -> None:
    kept = filled(("a", 1), ("b", 2), blocks=3)
    assert kept.pin_workflow("a", until_s=10.0) == 1
    (block,) = kept.pool.take(1)
    kept.pool.name(block, 3)
    kept.claim("a", 3)
    kept.pool.give_back([block])
    assert kept.pinned == 2
    kept.expire(9.0)
    assert kept.has_pins
    kept.expire(10.0)
    assert not kept.has_pins and kept.pinned == 0 and kept.pool.statistics().pinned == 0


def test_what_another_pin_holds_stays_pinned() -> None:
    kept = filled(("a", 1), ("b", 1))
    kept.pin_workflow("a")
    kept.pin_workflow("b")
    assert kept.release_workflow("a") == 0
    assert kept.pool.statistics().pinned == 1
    assert kept.release([1]) == 1 and kept.pool.statistics().pinned == 0


def test_pins_of_prefixes_end_each_in_its_own_time() -> None:
    kept = filled(("a", 1), ("b", 2))
    kept.pin([1], until_s=5.0)
    kept.pin([2], until_s=50.0)
    kept.expire(5.0)
    assert kept.pinned == 1 and kept.pool.statistics().pinned == 1
    kept.pin([2], until_s=6.0)  # the later order counts
    kept.expire(6.0)
    assert not kept.has_pins and kept.pool.statistics().pinned == 0


class OwnershipMachine(RuleBasedStateMachine):
    """Orders in any sequence: owners and pins only ever speak of what the pool knows."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = Ownership(4)
        self.held: list[int] = []

    @rule(value=st.integers(1, 5), workflow=st.sampled_from("ab"))
    def compute(self, value: int, workflow: str) -> None:
        if not self.kept.pool.find([value]) and self.kept.pool.free:
            (block,) = self.kept.pool.take(1)
            self.kept.pool.name(block, value)
            self.held.append(block)
        if self.kept.pool.find([value]):
            self.kept.claim(workflow, value)

    @rule()
    def end(self) -> None:
        self.kept.pool.give_back(self.held)
        self.held.clear()

    @rule(workflow=st.sampled_from("ab"), until_s=st.floats(0, 10))
    def pin_workflow(self, workflow: str, until_s: float) -> None:
        assert self.kept.pin_workflow(workflow, until_s) == len(self.kept.owned(workflow))

    @rule(values=st.sets(st.integers(1, 5)), until_s=st.floats(0, 10))
    def pin(self, values: set[int], until_s: float) -> None:
        self.kept.pin(values, until_s)

    @rule(values=st.sets(st.integers(1, 5)))
    def release(self, values: set[int]) -> None:
        self.kept.release(values)

    @rule(workflow=st.sampled_from("ab"))
    def release_workflow(self, workflow: str) -> None:
        self.kept.release_workflow(workflow)

    @rule(workflow=st.sampled_from("ab"))
    def flush_workflow(self, workflow: str) -> None:
        others = {value for value in self.kept.owned(workflow) if self.kept.shared_by(value) > 1}
        self.kept.flush_workflow(workflow)
        assert all(self.kept.pool.find([value]) for value in others)
        assert not self.kept.owned(workflow)

    @rule(now_s=st.floats(0, 20))
    def expire(self, now_s: float) -> None:
        self.kept.expire(now_s)

    @invariant()
    def agrees(self) -> None:
        self.kept.check_integrity()
        self.kept.pool.check_integrity()
        assert self.kept.pool.statistics().pinned <= self.kept.pinned
        assert self.kept.pool._pins == {
            block
            for pin in self.kept._pins.values()
            for value in pin.hashes
            for block in self.kept.pool.find([value])
        }


TestOwnership = OwnershipMachine.TestCase
TestOwnership.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
