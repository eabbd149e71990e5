"""Limits over pools: never exceeded in sum, whatever dies, freezes or is lost, and usable to the last."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from orla_lg.core.limits.limits import Limit
from orla_lg.core.limits.usage import Amount, Scope
from orla_lg.serve.pools.shares import NONE, SLICES, Share, Sharing, bounds, free_of, packed, unpacked
from tests.serve.pools.sharing import EqualPart, Forgetful, PoolCore, WholeLimit, World

STEPS = settings(max_examples=25, stateful_step_count=40, deadline=None)
CONTROL = settings(max_examples=300, stateful_step_count=40, deadline=None, phases=[Phase.generate])
FAULTS = st.lists(st.sampled_from(["lost", "late", "away", "", ""]), max_size=3)
CORES = st.integers(0, 3)


class Pools(RuleBasedStateMachine):
    """Two to four cores, and all that may happen to them."""

    limits: Any = st.sampled_from([Limit(calls=1), Limit(calls=7), Limit(tokens=1000), Limit(calls=9, tokens=400)])
    is_at_once = False
    made: type[PoolCore] = PoolCore
    world: World

    @initialize(data=st.data(), pools=st.integers(2, 4))
    def begin(self, data: st.DataObject, pools: int) -> None:
        self.world = World(data.draw(self.limits), pools, is_at_once=self.is_at_once, made=self.made)

    def _pool(self, number: int) -> str:
        return self.world.pools[number % len(self.world.pools)]

    @rule(number=CORES, tokens=st.integers(1, 300), times=st.integers(1, 4))
    def calls_come(self, number: int, tokens: int, times: int) -> None:
        core = self.world.cores[self._pool(number)]
        for _ in range(times):
            if core in self.world.live and core is not None:
                self.world.call(core, Amount(calls=1, tokens=tokens))

    @rule(numbers=st.sets(CORES, min_size=1), steps=st.integers(2, 10), tokens=st.integers(1, 60))
    def calls_come_and_end_for_a_while(self, numbers: set[int], steps: int, tokens: int) -> None:
        for _ in range(steps):
            for number in sorted(numbers):
                self.calls_come(number, tokens, 2)
            self.world.check()
            for call in self.world.running[::2]:
                self.world.end(call)
            self.world.pass_time(0.25)

    @rule(number=CORES)
    def an_old_core_lets_one_in(self, number: int) -> None:
        for old in self.world.old:
            if not old.is_frozen and old.pool == self._pool(number):
                old.enter(Amount(calls=1, tokens=10))  # no replica takes its grant

    @rule(place=st.integers(0, 50), fails=st.booleans())
    def a_call_ends(self, place: int, fails: bool) -> None:
        if self.world.running:
            self.world.end(self.world.running[place % len(self.world.running)], fails=fails)

    @rule(seconds=st.sampled_from([0.25, 0.5, 1.0, 3.0, 12.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule()
    def all_look(self) -> None:
        self.world.work()

    @rule(number=CORES)
    def spent_is_kept(self, number: int) -> None:
        self.world.keep_spent(self._pool(number))

    @rule(faults=FAULTS)
    def the_store_fails(self, faults: list[str]) -> None:
        self.world.store.faults += faults

    @rule()
    def what_was_late_arrives(self) -> None:
        self.world.store.arrive()

    @rule(number=CORES)
    def a_core_dies(self, number: int) -> None:
        self.world.die(self._pool(number))

    @rule(number=CORES)
    def a_core_freezes(self, number: int) -> None:
        self.world.freeze(self._pool(number))

    @rule(number=CORES)
    def a_core_thaws(self, number: int) -> None:
        self.world.thaw(self._pool(number))

    @rule(number=CORES)
    def the_next_takes_over(self, number: int) -> None:
        self.world.take_over(self._pool(number))

    @invariant()
    def nothing_exceeds_the_limit(self) -> None:
        self.world.check()

    @invariant()
    def the_shares_fit(self) -> None:
        self.world.store.faults, faults = [], self.world.store.faults
        for key, entry in self.world.store.scan(SLICES).items():
            assert unpacked(key, entry.value) is not None
        self.world.store.faults = faults


class PoolsInAWindow(Pools):
    limits = st.sampled_from([Limit(calls=3, per_s=4.0), Limit(tokens=700, per_s=10.0)])


class PoolsAtOnce(Pools):
    limits = st.sampled_from([Limit(calls=1), Limit(calls=2), Limit(calls=6)])
    is_at_once = True


@pytest.mark.parametrize("machine", [Pools, PoolsInAWindow, PoolsAtOnce])
def test_no_sum_exceeds_its_limit(machine: type[Pools]) -> None:
    run_state_machine_as_test(machine, settings=STEPS)


@pytest.mark.parametrize("machine", [Pools, PoolsInAWindow, PoolsAtOnce])
def test_with_the_whole_limit_at_each_core_it_does(machine: type[Pools]) -> None:
    control = type("Control", (machine,), {"made": WholeLimit})
    with pytest.raises(AssertionError):
        run_state_machine_as_test(control, settings=CONTROL)


def test_where_the_next_core_does_not_heed_its_pools_share_it_does() -> None:
    control = type("Control", (Pools,), {"made": Forgetful})
    with pytest.raises(AssertionError):
        run_state_machine_as_test(control, settings=CONTROL)


# All of it can be used


def demanded(world: World, core: PoolCore, amount: Amount, seconds: float) -> int:
    """Have calls come to one core, one each step, and end at once; returns how many were let in."""
    found, until_s = 0, world.time.s + seconds
    while world.time.s < until_s:
        for _ in range(3):
            call = world.call(core, amount)
            if call is not None:
                world.end(call)
                found += 1
        world.pass_time(0.25)
        world.check()
    return found


@pytest.mark.parametrize("pools", [2, 3, 4])
@pytest.mark.parametrize("calls", [1, 2, 3, 50])
def test_one_core_can_use_all_of_a_limit(pools: int, calls: int) -> None:
    world = World(Limit(calls=calls), pools)
    first, *others = world.live
    for other in others:  # they took something, and left it
        world.call(other, Amount(calls=1)) and world.work()
    used = len(world.running)
    for call in list(world.running):
        world.end(call)
    assert used + demanded(world, first, Amount(calls=1), 30.0) == calls


def test_of_tokens_less_than_one_call_needs_is_left() -> None:
    world = World(Limit(tokens=1000), 3)
    assert demanded(world, world.live[0], Amount(calls=1, tokens=70), 20.0) == 1000 // 70


def test_with_equal_parts_it_cannot() -> None:
    world = World(Limit(calls=50), 4, made=EqualPart)
    assert demanded(world, world.live[0], Amount(calls=1), 30.0) == 12
    world = World(Limit(calls=1), 4, made=EqualPart)
    assert demanded(world, world.live[0], Amount(calls=1), 30.0) == 0


def test_a_window_comes_back_for_whichever_core_needs_it() -> None:
    world = World(Limit(calls=10, per_s=4.0), 2)
    first, second = world.live
    assert demanded(world, first, Amount(calls=1), 3.0) == 10
    world.pass_time(6.0)
    assert demanded(world, second, Amount(calls=1), 3.0) == 10


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_no_core_starves_where_calls_at_once_are_fewer_than_cores(limit: int) -> None:
    world = World(Limit(calls=limit), 4, is_at_once=True)
    served = dict.fromkeys(world.pools, 0)
    for _ in range(240):
        for core in world.live:
            call = world.call(core, Amount(calls=1))
            served[core.pool] += call is not None
        world.check()
        world.pass_time(0.25)
        for call in list(world.running):
            world.end(call)
    assert min(served.values()) >= 5, served
    assert sum(served.values()) >= 240 * limit * 0.5, served


def test_no_core_starves_of_a_small_window() -> None:
    world = World(Limit(calls=2, per_s=1.0), 3)
    served = dict.fromkeys(world.pools, 0)
    for _ in range(400):
        for core in world.live:
            if (call := world.call(core, Amount(calls=1))) is not None:
                served[core.pool] += 1
                world.end(call)
        world.check()
        world.pass_time(0.25)
    assert min(served.values()) >= 5, served


# What dies


def test_what_a_dead_core_may_have_spent_counts_as_spent() -> None:
    world = World(Limit(calls=100), 2)
    first, second = world.live
    assert demanded(world, first, Amount(calls=1), 3.0) >= 20
    spent = world.used().calls
    world.die(first.pool)  # in the second before its spent entries were written
    world.take_over(first.pool)
    next_one = world.cores[first.pool]
    assert next_one is not None
    after = demanded(world, next_one, Amount(calls=1), 40.0) + demanded(world, second, Amount(calls=1), 40.0)
    assert 100 - spent - 30 <= after <= 100 - spent
    world.check()


def test_a_core_that_ends_in_good_order_leaves_nothing_behind() -> None:
    world = World(Limit(calls=100), 2)
    first, second = world.live
    demanded(world, first, Amount(calls=1), 3.0)
    world.keep_spent(first.pool)
    first.slices.close()
    spent = world.used().calls
    world.die(first.pool)
    world.take_over(first.pool)
    assert demanded(world, second, Amount(calls=1), 60.0) == 100 - spent


def test_calls_at_once_of_a_dead_pool_come_back_once_its_replicas_have_hung_up() -> None:
    world = World(Limit(calls=4), 2, is_at_once=True)
    first, second = world.live
    world.call(first, Amount(calls=1))
    world.work()
    while len(world.running) < 4:
        world.call(first, Amount(calls=1))
        world.pass_time(0.25)
    world.die(first.pool)
    world.pass_time(3.0)
    assert world.call(second, Amount(calls=1)) is None
    for _ in range(120):
        world.call(second, Amount(calls=1))
        world.check()
        world.pass_time(0.25)
    assert len([call for call in world.running if call.core is second]) == 4


class OneAfterTheOther(World):
    """Cores do not look at the same instant."""

    def work(self) -> None:
        for core in self.live:
            core.slices.work()
            self.time.s += 0.01
        self.grant()


@pytest.mark.parametrize("pools", [3, 5])
def test_they_come_back_although_several_pools_look_for_its_core(pools: int) -> None:
    world = OneAfterTheOther(Limit(calls=4), pools, is_at_once=True)
    first, *others = world.live
    while len(world.running) < 4:
        world.call(first, Amount(calls=1))
        world.pass_time(0.25)
    world.die(first.pool)
    for _ in range(120):
        for core in others:
            world.call(core, Amount(calls=1))
        world.check()
        world.pass_time(0.25)
    assert len([call for call in world.running if call.core in others]) == 4


def test_a_store_that_is_away_leaves_what_is_in_hand() -> None:
    world = World(Limit(calls=1000), 2)
    core = world.live[0]
    demanded(world, core, Amount(calls=1), 5.0)
    world.store.faults = ["away"] * 1000
    found = demanded(world, core, Amount(calls=1), 12.0)
    assert 0 < found < 500
    assert demanded(world, core, Amount(calls=1), 12.0) == 0
    world.check()


def test_of_what_comes_back_by_itself_nothing_is_spent_once_another_pool_may_have_it() -> None:
    world = World(Limit(calls=1000, per_s=1000.0), 2)
    core = world.live[0]
    demanded(world, core, Amount(calls=1), 5.0)
    world.store.faults = ["away"] * 1000
    world.pass_time(10.0)
    assert demanded(world, core, Amount(calls=1), 2.0) == 0


# What it costs


def test_a_busy_limit_takes_a_few_operations_each_second() -> None:
    world = World(Limit(calls=1_000_000), 4)
    core = world.live[0]
    demanded(world, core, Amount(calls=1), 5.0)
    before = sum(world.store.counts.values())
    found = demanded(world, core, Amount(calls=1), 20.0)
    assert found >= 200
    # others: a lease each, and the directory now and then
    assert (sum(world.store.counts.values()) - before) / 20.0 <= 6.0


def test_what_is_not_used_takes_no_operations_but_the_lease() -> None:
    world = World(Limit(calls=1000), 2)
    demanded(world, world.live[0], Amount(calls=1), 2.0)
    world.pass_time(5.0)
    before = world.store.counts["get"] + world.store.counts["put"]
    world.pass_time(30.0)
    assert world.store.counts["get"] + world.store.counts["put"] == before


# The arithmetic


def test_a_slice_is_an_equal_part_of_half_of_what_is_left_and_one_call_at_least() -> None:
    one = (1.0, 10.0, 0.0, 0.0)
    limit = bounds(Limit(calls=100, tokens=10_000))
    assert free_of(limit, one, 1000, 4) == (12, 1250, 0, 0)
    assert free_of(limit, one, 3, 4) == (3, 30, 0, 0)
    assert free_of((1, 10, limit[2], limit[3]), one, 3, 64) == (1, 10, 0, 0)
    assert free_of((0, 10, limit[2], limit[3]), one, 3, 64) == NONE
    assert free_of((1, 9, limit[2], limit[3]), one, 3, 64) == NONE


def test_a_runs_time_is_kept_by_the_clock_and_shared_out_by_none() -> None:
    assert bounds(Limit(wall_s=5.0), Scope.RUN)[3] == float("inf")
    assert bounds(Limit(wall_s=5.0), Scope.STAGE)[3] == 5.0


def test_an_entry_is_read_as_it_was_written(caplog: pytest.LogCaptureFixture) -> None:
    shares = {"a": Share(3, (1, 2, 0.5, 0), (1, 0, 0, 0), 5.0, 6.0, True, False, 60.0), "b": Share(1, NONE)}
    assert unpacked("n", packed(shares)) == shares
    for broken in (b"", b"[]", b'{"a": 1}', b'{"a": [1, 2]}'):
        assert unpacked("n", broken) is None
    assert "cannot be read" in caplog.text
    assert Sharing.WINDOW.value == "window"
