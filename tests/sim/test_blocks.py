"""The block pool, against a model that keeps every order in a plain list."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orla_lg_sim.blocks import BlockPool, PoolStatistics, chain

BLOCKS = 6


def named(pool: BlockPool, *values: int) -> list[int]:
    """Take blocks, name them, give them back tail first, as a sequence does."""
    blocks = pool.take(len(values))
    for block, value in zip(blocks, values, strict=True):
        pool.name(block, value)
    pool.give_back(reversed(blocks))
    return blocks


def test_a_chain_is_equal_as_far_as_the_tokens_are() -> None:
    first, second = chain([1, 2, 3, 4, 5, 6, 7], 2), chain([1, 2, 3, 9, 5, 6], 2)
    assert len(first) == len(second) == 3
    assert first[0] == second[0]
    assert first[1] != second[1] and first[2] != second[2], "a block stands for all before it too"
    assert chain([1], 2) == []


def test_a_chain_is_the_same_in_another_process() -> None:
    code = "from orla_lg_sim.blocks import chain; print(chain([7, 8, 9, 10], 2))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(chain([7, 8, 9, 10], 2))


def test_the_tail_of_a_prefix_goes_before_its_head() -> None:
    pool = BlockPool(3)
    named(pool, 10, 11, 12)
    pool.give_back(pool.take(1))
    assert len(pool.find([10, 11, 12])) == 2
    assert pool.evictions == 1


def test_what_holds_nothing_known_is_taken_first() -> None:
    pool = BlockPool(3)
    named(pool, 10, 11)
    pool.give_back(pool.take(1))
    assert len(pool.find([10, 11])) == 2
    assert pool.statistics() == PoolStatistics(held=0, plain=1, cached=2, pinned=0, evictions=0)


def test_use_makes_recent() -> None:
    pool = BlockPool(2)
    named(pool, 10)
    named(pool, 20)
    found = pool.find([10])
    pool.hold(found)
    pool.give_back(found)
    pool.take(1)
    assert pool.find([10]) and not pool.find([20])


def test_two_blocks_of_one_hash_are_found_as_the_older_and_lost_one_by_one() -> None:
    lost: list[int] = []
    pool = BlockPool(3, lost.append)
    older, newer = pool.take(2)
    pool.name(older, 10)
    pool.name(newer, 10)
    assert pool.find([10]) == [older]
    pool.give_back([older])
    pool.take(2)
    assert pool.find([10]) == [newer] and not lost
    pool.give_back([newer])
    pool.take(1)
    assert not pool.find([10]) and lost == [10]
    pool.check_integrity()


def test_pins_go_last_and_the_demoted_first() -> None:
    pool = BlockPool(3)
    for value in (10, 20, 30):
        named(pool, value)
    assert pool.pin(10) and not pool.pin(99)
    assert pool.demote(30)
    taken = [pool.take(1) for _ in range(2)]
    assert pool.find([10]) and not pool.find([20]) and not pool.find([30])
    pool.take(1)
    assert not pool.find([10]), "a pin does not make an engine stand still"
    for blocks in taken:
        pool.give_back(blocks)
    pool.check_integrity()


def test_taking_more_than_is_free_is_our_mistake() -> None:
    pool = BlockPool(1)
    with pytest.raises(AssertionError, match="2 blocks asked, 1 free"):
        pool.take(2)


class PoolMachine(RuleBasedStateMachine):
    """The model keeps the free blocks as one list in the order of their eviction."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.refs = [0] * BLOCKS
        self.hashes: list[int | None] = [None] * BLOCKS
        self.pinned: set[int] = set()
        self.order = list(range(BLOCKS))
        self.held: list[list[int]] = []

    def next_out(self) -> int:
        plain = [block for block in self.order if self.hashes[block] is None]
        loose = [block for block in self.order if block not in self.pinned]
        return (plain or loose or self.order)[0]

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def take_and_name(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, len(self.order)))
        expected = []
        for _ in range(count):
            block = self.next_out()
            self.order.remove(block)
            self.hashes[block], self.refs[block] = None, 1
            self.pinned.discard(block)
            expected.append(block)
        taken = self.pool.take(count)
        assert taken == expected
        for block in taken:
            if (value := data.draw(st.none() | st.integers(1, 5))) is not None:
                self.pool.name(block, value)
                self.hashes[block] = value
        self.held.append(taken)

    @rule(value=st.integers(1, 5))
    def find_and_hold(self, value: int) -> None:
        found = self.pool.find([value])
        assert bool(found) == (value in self.hashes)
        assert all(self.hashes[block] == value for block in found)
        self.pool.hold(found)
        for block in found:
            self.refs[block] += 1
            if block in self.order:
                self.order.remove(block)
        if found:
            self.held.append(found)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.give_back(reversed(blocks))
        for block in reversed(blocks):
            self.refs[block] -= 1
            if not self.refs[block]:
                self.order.insert(len(self.order) if self.hashes[block] is not None else 0, block)

    @rule(value=st.integers(1, 5))
    def pin(self, value: int) -> None:
        mine = {block for block, known in enumerate(self.hashes) if known == value}
        assert self.pool.pin(value) == bool(mine)
        for block in sorted(mine - self.pinned, key=self.age):  # the pinned have an order of their own
            if block in self.order:
                self.order.append(self.order.pop(self.order.index(block)))
        self.pinned |= mine

    def age(self, block: int) -> int:
        return self.pool._blocks_of(self.hashes[block] or 0).index(block)

    @rule(value=st.integers(1, 5))
    def forget(self, value: int) -> None:
        mine = [block for block, known in enumerate(self.hashes) if known == value]
        for block in sorted(mine, key=self.age):
            if block in self.order:
                self.order.append(self.order.pop(self.order.index(block)))
        assert self.pool.forget(value) == bool(mine)
        for block in mine:
            self.hashes[block] = None
            self.pinned.discard(block)

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert self.pool.free == len(self.order)
        assert self.pool.held == sum(count > 0 for count in self.refs)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
