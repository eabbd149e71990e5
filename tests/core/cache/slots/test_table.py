from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import inf
from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orla_lg.core.cache.slots.files import Saved, SavedPool
from orla_lg.core.cache.slots.swap import Slot, Swap, Swaps
from orla_lg.core.cache.slots.table import SlotLease, SlotTable
from orla_lg.core.engine.backend import Effect
from orla_lg.core.identity import tenant_of, workflow_key
from orla_lg.core.memory.events import Doing

WORKFLOWS = st.sampled_from(["u", "v", workflow_key("u", "acme"), workflow_key("v", "zenith")])
PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple)


@dataclass(frozen=True)
class Tokens:
    """What the engine really holds somewhere: whose, after how many flushes of his, and what prompt it was."""

    owner: str
    flushes: int
    prompt: tuple[int, ...]


@dataclass(eq=False)
class Sitting:
    workflow: str
    lease: SlotLease
    prompt: tuple[int, ...]
    flushes: int
    then: Counter[str]
    """Everybody's flushes when it sat down: what is flushed later it may still find."""


@dataclass(eq=False)
class Moving:
    """A swap under way."""

    slot: int
    save: Saved | None
    swap: Swap
    doomed: bool = False
    """The engine died after it was ordered."""


class SlotMachine(RuleBasedStateMachine):
    """``SlotTable`` against what an engine would really hold in its slots and files."""

    isolated: ClassVar[bool] = False

    @initialize(count=st.integers(1, 4), names=st.integers(0, 3))
    def start(self, count: int, names: int) -> None:
        pool = SavedPool("test", names, max_age_s=50.0) if names else None
        self.table, self.now = SlotTable(count, swaps=Swaps(pool), isolated=self.isolated), 0.0
        self.pool = pool or SavedPool("none", 0)
        self.flushes: Counter[str] = Counter()
        self.contents: dict[int, Tokens | None] = dict.fromkeys(range(count))
        self.files: dict[str, Tokens | None] = {}
        self.sitting: list[Sitting] = []
        self.moving: list[Moving] = []
        self.strays: dict[str, str] = {}
        """Calls that the engine places itself, and whose they are; only where tenants are isolated."""
        if self.isolated:
            self.contents = dict.fromkeys(range(count), Tokens(workflow_key("u", "before"), 0, (0,)))

    # Naive answers

    def may_be_taken(self, slot: Slot) -> bool:
        if not slot.held:
            return True
        alone = sum(other.owner == slot.owner for other in self.table.slots) == 1
        hold_s = self.table.hold_s if alone else self.table.spare_hold_s
        if self.table.swaps.saves:
            hold_s = min(hold_s, self.table.swaps.loss_s(slot, self.now))
        return self.now >= slot.last_used_s + hold_s

    def rank(self, slot: Slot, workflow: str) -> int | None:
        if slot.ahead is not None and not slot.busy and slot.owner == workflow:
            return 0
        if slot.busy or slot.moving:
            return None
        if slot.owner in (workflow, None):
            return 0 if slot.owner == workflow else 1
        return 2 if self.may_be_taken(slot) else None

    def may_be_reused(self, tokens: Tokens | None, workflow: str) -> bool:
        if tokens is None:
            return True
        if self.isolated and tenant_of(tokens.owner) != tenant_of(workflow):
            return False
        return tokens.flushes == self.flushes[tokens.owner]

    # Calls

    @rule(workflow=WORKFLOWS, hold=st.booleans(), prompt=PROMPTS)
    def lease(self, workflow: str, hold: bool, prompt: tuple[int, ...]) -> None:
        ranks = {slot.index: self.rank(slot, workflow) for slot in self.table.slots}
        allowed = [rank for rank in ranks.values() if rank is not None]
        losses = {s.index: self.table.swaps.loss_s(s, self.now) for s in self.table.slots if ranks[s.index] == 2}
        eligible = self.table.eligible(self.now)
        lease = self.table.acquire(workflow, prompt, self.now, hold=hold)
        assert (lease is not None) == bool(allowed) == (eligible is None or workflow in eligible)
        if lease is None:
            return
        assert ranks[lease.slot] == min(allowed)
        assert lease.how == ("reused", "claimed", "reclaimed")[min(allowed)]
        if min(allowed) == 2:
            assert losses[lease.slot] == min(losses.values()), "a slot was taken whose loss costs more"
        self.sitting.append(Sitting(workflow, lease, prompt, self.flushes[workflow], self.flushes.copy()))
        if lease.swap is None:
            assert not lease.reuses or self.may_be_reused(self.contents[lease.slot], workflow), (
                "flushed tokens, or another tenant's, may be reused"
            )
            return
        if lease.swap in [each.swap for each in self.moving]:
            return  # its save ahead of need
        if lease.swap.restore is not None:
            assert self.files[lease.swap.restore.name].owner == workflow
        self.moving.append(Moving(lease.slot, lease.swap.save, lease.swap))

    @rule(workflow=WORKFLOWS, prompt=PROMPTS, tokens=st.sampled_from([900, 9000]))
    def call_that_goes_well(self, workflow: str, prompt: tuple[int, ...], tokens: int) -> None:
        """What happens most: everything above in a row, so that states far off are reached."""
        before = len(self.sitting)
        self.lease(workflow, True, prompt)
        if len(self.sitting) == before:
            return
        sat = self.sitting.pop()
        for moving in [each for each in self.moving if each.swap is sat.lease.swap]:
            while moving in self.moving:
                self.answer(moving, well=not moving.doomed)
        self.contents[sat.lease.slot] = Tokens(workflow, sat.flushes, prompt)
        self.table.release_lease(sat.lease, prompt, tokens, self.now, hold=True)
        self.now += self.table.hold_s

    @precondition(lambda self: self.sitting)
    @rule(data=st.data(), hold=st.booleans())
    def leave(self, data: st.DataObject, hold: bool) -> None:
        """A call ends; one whose swap is still under way was cancelled, and never reached the engine."""
        sat = data.draw(st.sampled_from(self.sitting))
        waits = any(each.swap is sat.lease.swap for each in self.moving)
        tokens = 0 if waits else data.draw(st.sampled_from([0, 900, 9000]))
        if tokens:
            self.contents[sat.lease.slot] = Tokens(sat.workflow, sat.flushes, sat.prompt)
        self.sitting.remove(sat)
        self.table.release_lease(sat.lease, sat.prompt, tokens, self.now, hold=hold)
        slot = self.table.slots[sat.lease.slot]
        assert hold or not slot.held
        assert slot.owner in (sat.workflow, None)

    @rule(workflow=WORKFLOWS, doing=st.sampled_from([Doing.HUMAN, Doing.IDLE]))
    def turned(self, workflow: str, doing: Doing) -> None:
        self.table.turned(workflow, doing)

    @rule(workflow=WORKFLOWS)
    def release(self, workflow: str) -> None:
        held = sum(slot.held and slot.owner == workflow for slot in self.table.slots)
        assert self.table.release(workflow) == held

    @rule(workflow=WORKFLOWS)
    def flush(self, workflow: str) -> None:
        def others() -> list[str]:
            slots = [repr(slot) for slot in self.table.slots if slot.index not in mine]
            return slots + [repr(entry) for entry in self.pool._entries.values() if entry.owner != workflow]

        mine = [slot.index for slot in self.table.slots if slot.owner == workflow]
        before = others()
        self.table.flush(workflow)
        self.flushes[workflow] += 1
        assert others() == before

    # The engine's answers

    @precondition(lambda self: self.moving)
    @rule(data=st.data(), well=st.booleans())
    def the_engine_answers(self, data: st.DataObject, well: bool) -> None:
        moving = data.draw(st.sampled_from(self.moving))
        self.answer(moving, well=well and not moving.doomed)

    def answer(self, moving: Moving, *, well: bool) -> None:
        moving.doomed = False
        if moving.save is not None:
            self.answer_save(moving, moving.save, well)
            moving.save = None
        elif moving.swap.restore is not None and moving.swap.effect is None:
            self.answer_restore(moving, moving.swap, moving.swap.restore, well)
        if moving.swap.restore is None or moving.swap.effect is not None:
            self.end(moving)

    def answer_save(self, moving: Moving, entry: Saved, well: bool) -> None:
        assert not any(each.save is entry for each in self.moving if each is not moving)
        self.files[entry.name] = self.contents[moving.slot] if well else None
        self.table.swaps.saved(entry, self.now, Effect.SAVED if well else Effect.FAILED, 0.01)

    def answer_restore(self, moving: Moving, swap: Swap, entry: Saved, well: bool) -> None:
        held = self.files[entry.name]
        assert held is not None and held.owner == swap.workflow, "another one's file"
        self.contents[moving.slot] = held if well else None
        effect = Effect.RESTORED if well else Effect.FAILED
        self.table.swaps.restored(swap, self.table.slots[moving.slot], self.now, effect, 0.01)

    @precondition(lambda self: self.moving)
    @rule(data=st.data())
    def orders_are_given_up(self, data: st.DataObject) -> None:
        """The background loop ends in the middle of a swap."""
        moving = data.draw(st.sampled_from(self.moving))
        if moving.save is not None:
            self.answer_save(moving, moving.save, well=False)
        self.end(moving)

    def end(self, moving: Moving) -> None:
        self.moving.remove(moving)
        self.table.swapped(moving.swap, self.now)
        sat = next((each for each in self.sitting if each.lease.swap is moving.swap), None)
        if sat is not None and sat.flushes == self.flushes[sat.workflow] and sat.lease.reuses:
            held = self.contents[moving.slot]
            assert held is None or held.flushes >= sat.then[held.owner], "flushed tokens may be reused"
            strange = self.isolated and held is not None and tenant_of(held.owner) != tenant_of(sat.workflow)
            assert not strange, "another tenant's tokens may be reused"
            assert sat.lease.action != "restored" or (held is not None and held.owner == sat.workflow)

    @rule(restarted=st.booleans())
    def the_engine_is_gone(self, restarted: bool) -> None:
        self.table.lose_contents()
        if restarted:
            self.contents = dict.fromkeys(self.contents)
            for each in self.moving:
                each.doomed = True

    # Tidying

    @rule(clean=st.booleans())
    def erase(self, clean: bool) -> None:
        for index in self.table.start_erasing():
            assert index not in {each.lease.slot for each in self.sitting} | {each.slot for each in self.moving}
            if clean:
                self.contents[index] = None
            self.table.erased(index, clean=clean)

    @rule(well=st.booleans())
    def empty(self, well: bool) -> None:
        order = self.table.start_emptying(self.now)
        if order is None:
            return
        index, name = order
        assert self.contents[index] is None and name not in self.pool._entries
        if well:
            self.files[name] = None
        self.table.emptied(index, name, ok=well)

    @rule()
    def save_ahead(self) -> None:
        for swap in self.table.start_saving_ahead(self.now):
            assert not any(each.slot == swap.slot for each in self.moving)
            swap.begun = True
            self.moving.append(Moving(swap.slot, swap.save, swap))

    @rule(seconds=st.sampled_from([0.05, 0.5, 5.0, 40.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    # Always

    @invariant()
    def sound(self) -> None:
        self.table.check_integrity()
        assert {slot.index for slot in self.table.slots if slot.busy} == {each.lease.slot for each in self.sitting}
        assert {slot.index for slot in self.table.slots if slot.moving} == {each.slot for each in self.moving}

    @invariant()
    def what_is_believed_is_there(self) -> None:
        for slot in self.table.slots:
            if slot.prefix and not slot.moving and not slot.busy and not slot.mixed:
                held = self.contents[slot.index]
                assert held is not None and (held.owner, held.prompt) == (slot.owner, slot.prefix)
                assert held.flushes == self.flushes[held.owner]
        for entry in self.pool._entries.values():
            if entry.ready and not entry.dropped:
                assert self.files[entry.name] == Tokens(entry.owner, self.flushes[entry.owner], entry.prefix)

    @invariant()
    def the_next_to_look_at(self) -> None:
        held = [slot for slot in self.table.slots if slot.held and slot.idle]
        expiry = self.table.next_expiry_s(self.now)
        assert (expiry == inf) == (not held)
        assert (expiry <= self.now) == any(self.may_be_taken(slot) for slot in held)


class IsolatedSlotMachine(SlotMachine):
    """The same where no tenant may find another one's tokens: not what lay there before, nor what strays leave."""

    isolated = True

    @rule(workflow=WORKFLOWS)
    def a_call_that_cannot_wait(self, workflow: str) -> None:
        lease = self.table.acquire(workflow, (0,), self.now, hold=True, must=True)
        if lease is None:
            assert all(slot.busy or slot.moving for slot in self.table.slots), "a slot was left"
            self.strays[name := f"stray{len(self.strays)}-{self.now}"] = workflow
            self.table.strayed(name)
        elif lease.swap is None:
            assert not lease.reuses or self.may_be_reused(self.contents[lease.slot], workflow)
            self.sitting.append(Sitting(workflow, lease, (0,), self.flushes[workflow], self.flushes.copy()))
        else:
            self.sitting.append(Sitting(workflow, lease, (0,), self.flushes[workflow], self.flushes.copy()))
            if lease.swap not in [each.swap for each in self.moving]:
                self.moving.append(Moving(lease.slot, lease.swap.save, lease.swap))

    @precondition(lambda self: self.strays)
    @rule(data=st.data(), ends=st.booleans())
    def the_engine_places_a_stray(self, data: st.DataObject, ends: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.strays)))
        taken = {each.lease.slot for each in self.sitting} | {each.slot for each in self.moving}
        if free := sorted(self.contents.keys() - taken):
            workflow, slot = self.strays[name], data.draw(st.sampled_from(free))
            self.contents[slot] = Tokens(workflow, self.flushes[workflow], (9,))
        if ends:
            del self.strays[name]
            self.table.stray_ended(name)


SlotMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestSlots = SlotMachine.TestCase
IsolatedSlotMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestIsolatedSlots = IsolatedSlotMachine.TestCase


def sat(
    table: SlotTable, workflow: str, prefix: tuple[int, ...] = (), now: float = 0.0, hold: bool = True
) -> SlotLease:
    lease = table.acquire(workflow, prefix, now, hold=hold)
    assert lease is not None
    return lease


def test_a_branch_returns_to_the_slot_that_shares_most_of_its_prompt() -> None:
    table = SlotTable(3)
    leases = [sat(table, "w") for _ in range(2)]
    table.release_lease(leases[0], (1, 2, 3), 5, 0.0, hold=True)
    table.release_lease(leases[1], (1, 9), 5, 1.0, hold=True)
    assert table.acquire("w", (1, 2, 4), 2.0, hold=True) == SlotLease(0, "reused", fresh=False)


def test_a_clean_slot_goes_before_one_that_still_has_flushed_tokens() -> None:
    table = SlotTable(2)
    table.release_lease(sat(table, "w"), (), 5, 0.0, hold=True)
    table.flush("w")
    assert table.acquire("v", (), 0.0, hold=True) == SlotLease(1, "claimed", fresh=False)
    assert table.acquire("u", (), 0.0, hold=True) == SlotLease(0, "claimed", fresh=True)


def test_the_longest_unused_of_the_remembered_slots_goes_first() -> None:
    table = SlotTable(2)
    for now, workflow in enumerate("uv"):
        table.release_lease(sat(table, workflow, now=now, hold=False), (), 5, now, hold=False)
    assert sat(table, "w", now=9.0).slot == 0


def test_a_second_slot_of_a_workflow_goes_before_the_favour_of_another_ends() -> None:
    table = SlotTable(3)
    leases = [sat(table, workflow, now=now) for now, workflow in enumerate("uvv")]
    for slot, lease in enumerate(leases):
        table.release_lease(lease, (), 5, slot, hold=True)
    assert table.eligible(5.0) is None
    assert sat(table, "w", now=4.0).slot == 1
    assert table.eligible(4.0) == {"u", "v"} and table.acquire("x", (), 4.0, hold=True) is None
    assert table.acquire("x", (), 5.0, hold=True) == SlotLease(0, "reclaimed", fresh=False)


def test_what_is_saved_counts_as_there_only_while_it_would_be_restored() -> None:
    table = SlotTable(1, swaps=Swaps(SavedPool("test", 1)))
    table.release_lease(sat(table, "w"), (1, 2), 5000, 0.0, hold=True)
    table.turned("w", Doing.HUMAN)
    (ahead,) = table.start_saving_ahead(0.0)
    assert ahead.save is not None
    table.swaps.saved(ahead.save, 0.0, Effect.SAVED)
    table.swapped(ahead, 0.0)
    table.lose_contents()
    assert table.reusable("w", (1, 2, 3)) == 2
    assert table.reusable("v", (1, 2, 3)) == 0, "only its owner's"
    table.swaps.able = False  # the engine was started without a folder to save to
    assert table.reusable("w", (1, 2, 3)) == 0


def test_what_another_tenant_may_have_left_is_not_saved_as_a_workflows_own() -> None:
    table = SlotTable(1, swaps=Swaps(SavedPool("test", 2)), isolated=True)
    mine, other = workflow_key("u", "acme"), workflow_key("u", "zenith")
    lease = sat(table, mine, (1,))
    table.strayed("call")
    table.release_lease(lease, (1,), 9000, 1.0, hold=True)
    table.stray_ended("call")
    taken = table.acquire(other, (2,), 100.0, hold=True)
    assert taken is not None and taken.how == "reclaimed" and taken.swap is None
    assert taken.fresh and taken.strange and not taken.reuses


def test_one_tenants_workflows_go_on_sharing_their_slots_tokens() -> None:
    table = SlotTable(1, isolated=True)
    table.release_lease(sat(table, workflow_key("u", "acme")), (1,), 900, 0.0, hold=False)
    again = sat(table, workflow_key("v", "acme"), now=1.0)
    assert (again.how, again.fresh) == ("reclaimed", False)
