from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orla_lg.core.slots import Seat, Slot, SlotTable

WORKFLOWS = st.sampled_from("uvwx")


class SlotMachine(RuleBasedStateMachine):
    """``SlotTable`` against what an engine would really hold in each slot, and the table in the docstring."""

    @initialize(count=st.integers(1, 4))
    def start(self, count: int) -> None:
        self.table, self.now = SlotTable(count), 0.0
        self.flushes: Counter[str] = Counter()
        self.contents: dict[int, tuple[str, int] | None] = dict.fromkeys(range(count))
        """Per slot whose tokens the engine holds, and after how many flushes of that workflow."""
        self.sitting: dict[int, tuple[str, int]] = {}

    def rank(self, slot: Slot, workflow: str) -> int | None:
        if slot.busy or slot.erasing:
            return None
        if slot.owner == workflow:
            return 0
        if slot.owner is None:
            return 1
        if not slot.held:
            return 2
        idle_s = self.now - slot.last_used_s
        if sum(other.owner == slot.owner for other in self.table.slots) > 1:
            return 3 if idle_s >= self.table.spare_hold_s else None
        return 4 if idle_s >= self.table.hold_s else None

    @rule(workflow=WORKFLOWS, hold=st.booleans(), prefix=st.lists(st.integers(0, 2), max_size=3))
    def seat(self, workflow: str, hold: bool, prefix: list[int]) -> None:
        ranks = {slot.index: self.rank(slot, workflow) for slot in self.table.slots}
        allowed = [rank for rank in ranks.values() if rank is not None]
        eligible = self.table.eligible(self.now)
        seat = self.table.seat(workflow, tuple(prefix), self.now, hold=hold)
        assert (seat is not None) == bool(allowed) == (eligible is None or workflow in eligible)
        if seat is None:
            return
        assert ranks[seat.slot] == min(allowed)
        assert seat.how == {0: "reused", 1: "claimed"}.get(min(allowed), "reclaimed")
        held = self.contents[seat.slot]
        if held is not None and self.flushes[held[0]] > held[1]:
            assert seat.fresh, "flushed tokens may be reused"
        self.sitting[seat.slot] = (workflow, self.flushes[workflow])

    @precondition(lambda self: self.sitting)
    @rule(data=st.data(), tokens=st.sampled_from([0, 7]), hold=st.booleans())
    def vacate(self, data: st.DataObject, tokens: int, hold: bool) -> None:
        index = data.draw(st.sampled_from(sorted(self.sitting)))
        sat = self.sitting.pop(index)
        if tokens:
            self.contents[index] = sat
        self.table.vacate(index, (1,), tokens, self.now, hold=hold)
        assert hold or not self.table.slots[index].held

    @rule(workflow=WORKFLOWS)
    def release(self, workflow: str) -> None:
        held = sum(slot.held and slot.owner == workflow for slot in self.table.slots)
        assert self.table.release(workflow) == held

    @rule(workflow=WORKFLOWS)
    def flush(self, workflow: str) -> None:
        others = [repr(slot) for slot in self.table.slots if slot.owner != workflow]
        before = [slot.index for slot in self.table.slots if slot.owner == workflow]
        self.table.flush(workflow)
        self.flushes[workflow] += 1
        assert others == [repr(slot) for slot in self.table.slots if slot.index not in before]

    @rule()
    def start_erasing(self) -> None:
        for index in self.table.start_erasing():
            assert index not in self.sitting

    @rule(clean=st.booleans())
    def erased(self, clean: bool) -> None:
        for slot in self.table.slots:
            if slot.erasing:
                if clean:
                    self.contents[slot.index] = None
                self.table.erased(slot.index, clean=clean)
                return

    @rule(restarted=st.booleans())
    def lose_contents(self, restarted: bool) -> None:
        self.table.lose_contents()
        if restarted:
            self.contents = dict.fromkeys(self.contents)

    @rule(seconds=st.sampled_from([0.5, 5.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def sound(self) -> None:
        self.table.check_integrity()
        assert {slot.index for slot in self.table.slots if slot.busy} == set(self.sitting)
        due = [
            slot.last_used_s
            + (
                self.table.spare_hold_s
                if [s.owner for s in self.table.slots].count(slot.owner) > 1
                else self.table.hold_s
            )
            for slot in self.table.slots
            if slot.held and not (slot.busy or slot.erasing)
        ]
        assert self.table.next_expiry_s() == min(due, default=None)


SlotMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestSlots = SlotMachine.TestCase


def test_a_branch_returns_to_the_slot_that_shares_most_of_its_prompt() -> None:
    table = SlotTable(3)
    for slot, prefix in enumerate([(1, 2, 3), (1, 9)]):
        assert table.seat("w", (), 0.0, hold=True).slot == slot
        table.slots[slot].prefix = prefix
    table.vacate(0, (1, 2, 3), 5, 0.0, hold=True)
    table.vacate(1, (1, 9), 5, 1.0, hold=True)
    assert table.seat("w", (1, 2, 4), 2.0, hold=True) == Seat(0, "reused", fresh=False)


def test_a_clean_slot_goes_before_one_that_still_has_flushed_tokens() -> None:
    table = SlotTable(2)
    table.seat("w", (), 0.0, hold=True)
    table.vacate(0, (), 5, 0.0, hold=True)
    table.flush("w")
    assert table.seat("v", (), 0.0, hold=True) == Seat(1, "claimed", fresh=False)
    assert table.seat("u", (), 0.0, hold=True) == Seat(0, "claimed", fresh=True)


def test_the_longest_unused_of_the_remembered_slots_goes_first() -> None:
    table = SlotTable(2)
    for now, workflow in enumerate("uv"):
        table.vacate(table.seat(workflow, (), now, hold=False).slot, (), 5, now, hold=False)
    assert table.seat("w", (), 9.0, hold=True).slot == 0


def test_a_second_slot_of_a_workflow_goes_before_the_favour_of_another_ends() -> None:
    table = SlotTable(3)
    for now, workflow in enumerate("uvv"):
        table.seat(workflow, (), now, hold=True)
    for slot in range(3):
        table.vacate(slot, (), 5, slot, hold=True)
    assert table.eligible(5.0) is None
    assert table.seat("w", (), 4.0, hold=True).slot == 1
    assert table.eligible(4.0) == {"u", "v"} and table.seat("x", (), 4.0, hold=True) is None
    assert table.seat("x", (), 5.0, hold=True) == Seat(0, "reclaimed", fresh=False)
