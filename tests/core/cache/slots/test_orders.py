"""Slots that change hands at a desk: what the engine is told, in which order, and what is left when it fails."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from orla_lg.core.cache.slots.table import SlotLease, SlotTable
from orla_lg.core.call import Ask, Call, Usage
from orla_lg.core.engine.backend import Backend, Capability, Effect, Probe, Support
from orla_lg.core.engine.capabilities import Copied
from orla_lg.core.memory.events import CacheAction, Doing, Verb
from orla_lg.core.policies import policies
from orla_lg.core.queues import Queued
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.core.steps import Wait
from tests.core.fakes import Engine, HandBackground, HandClock, a_call

CAN = dict.fromkeys((Capability.SAVE_RESTORE, Capability.FLUSH_WORKFLOW), Support.NATIVE)


class Store(Engine):
    """An engine that takes every order, but those it is told to fail."""

    def __init__(self, slots: int = 1) -> None:
        super().__init__(Probe(models=("m",), slots=slots, capabilities=CAN, weights="m.gguf"))
        self.told: list[str] = []
        self.fails: set[str] = set()
        self.holds: int | None = None
        """What it says every slot holds when it is saved."""

    async def erase(self, slot: int) -> Effect:
        return self.take(f"erase {slot}", Effect.FREED)

    async def save(self, slot: int, name: str) -> Copied:
        return Copied(self.take(f"save {slot} {name[-1]}", Effect.SAVED), self.holds)

    async def restore(self, slot: int, name: str) -> Effect:
        return self.take(f"restore {slot} {name[-1]}", Effect.RESTORED)

    def take(self, order: str, effect: Effect) -> Effect:
        self.told.append(order)
        return Effect.FAILED if order.split()[0] in self.fails else effect


class AtDesk:
    """A desk whose engine has said that it can save."""

    def __init__(self, slots: int = 1, *, max_saved: int = 4) -> None:
        self.engine, clock = Store(slots), HandClock()
        self.background = HandBackground(clock)
        backend = Backend("b", "http://b/v1", max_saved=max_saved)
        self.scheduler = BackendScheduler(backend, self.engine, self.background, clock, policies("b", "fcfs", "fcfs"))
        self.scheduler.health._learn(self.engine.says)

    def enter(self, workflow: str) -> Queued:
        return self.scheduler.enter(calls(workflow), order=None, running=True, holds_grant=False)

    def leave(self, queued: Queued, tokens: int = 9000) -> None:
        usage = Usage(tokens, 0, 1) if tokens else None
        self.scheduler.leave(queued, usage=usage, tokens=tokens, followed=lambda: True)
        self.scheduler.check_integrity()

    def call(self, workflow: str, tokens: int = 9000) -> SlotLease:
        """Let a workflow call and its call end."""
        queued = self.enter(workflow)
        self.background.advance(1.0)
        assert queued.granted
        self.background.do_all()
        lease = self.lease(queued)
        self.leave(queued, tokens)
        self.background.do_all()
        self.background.advance(1.0)
        return lease

    def lease(self, queued: Queued) -> SlotLease:
        lease = queued.lease
        assert lease is not None
        return lease

    @property
    def effects(self) -> dict[str, int]:
        return self.scheduler.cache.statistics().effects

    @property
    def table(self) -> SlotTable:
        assert self.scheduler.cache.table is not None
        return self.scheduler.cache.table


def calls(workflow: str) -> Call:
    call = a_call(workflow)
    call.ask = Ask("auto", [{"role": "user", "content": workflow * 36_000}])
    return call


def test_who_must_leave_is_saved_and_restored_when_it_is_back() -> None:
    at = AtDesk()
    assert [at.call(each).action for each in "uvu"] == ["claimed", "reclaimed", "restored"]
    assert at.engine.told == ["save 0 0", "save 0 1", "restore 0 0"]
    assert at.effects == {"save:saved": 2, "restore:restored": 1}
    assert at.scheduler.cache.statistics().saved == 2


def test_what_is_saved_already_is_not_saved_again() -> None:
    at = AtDesk()
    for workflow in "uv":
        at.call(workflow)
    at.call("u", tokens=0)  # it did not get as far as the engine: the slot holds what was restored
    at.engine.told.clear()
    assert at.call("v").action == "restored"
    assert at.engine.told == ["restore 0 1"]


def test_the_slot_is_locked_until_the_engine_answered() -> None:
    at = AtDesk(slots=2)
    at.call("u")
    at.call("v")
    queued = at.enter("w")
    at.background.advance(1.0)
    assert queued.granted and at.table.slots[0].moving and at.table.slots[0].owner == "w"
    swap = at.lease(queued).swap
    assert swap is not None and not swap.ended.done()
    at.background.do_all()
    assert swap.ended.done() and not at.table.slots[0].moving
    at.leave(queued)


def test_a_call_cancelled_in_the_middle_leaves_the_swap_to_its_end() -> None:
    at = AtDesk()
    for workflow in "uv":
        at.call(workflow)
    queued = at.enter("u")
    at.background.advance(1.0)
    swap = at.lease(queued).swap
    assert swap is not None
    asyncio.run(cancelled(Wait(swap.ended, None)))
    at.leave(queued, tokens=0)
    assert at.table.slots[0].moving and not at.table.slots[0].busy
    other = at.enter("w")
    assert not other.granted, "nobody may sit where the engine still writes"
    at.background.do_all()
    assert at.engine.told[-1] == "restore 0 0" and at.effects["restore:restored"] == 1
    at.background.advance(1.0)
    assert other.granted
    at.background.do_all()
    at.leave(other)


async def cancelled(wait: Wait) -> None:
    waiting = asyncio.ensure_future(wait.arun())  # noqa: TID251
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()


def test_a_save_that_fails_loses_the_contents_and_the_call_goes_on() -> None:
    at = AtDesk()
    at.call("u")
    at.engine.fails = {"save"}
    assert at.call("v").action == "reclaimed"
    assert at.effects == {"save:failed": 1} and at.scheduler.cache.statistics().saved == 0
    at.engine.fails = set()
    assert at.call("u").action == "reclaimed", "there is nothing to restore"


def test_a_restore_that_fails_is_told_and_not_tried_again_once_the_engine_answered() -> None:
    at = AtDesk()
    for workflow in "uv":
        at.call(workflow)
    at.engine.fails = {"restore"}
    lease = at.call("u", tokens=0)
    assert (lease.action, lease.reuses) == ("recomputed", True)
    assert at.call("v", tokens=0).action == "recomputed"
    assert at.call("u").action == "recomputed", "the engine had not answered: its files may be there"
    at.engine.fails = {"restore", "save"}
    assert at.call("v").action == "recomputed"
    assert [at.call(each).action for each in "uv"] == ["reclaimed", "reclaimed"], "it answered, and could not"
    assert at.effects["restore:failed"] == 4


def test_what_is_about_to_be_read_is_not_overwritten_before() -> None:
    at = AtDesk(max_saved=1)
    at.call("u", tokens=5000)
    at.call("v", tokens=9000)
    assert at.call("u").action == "restored"
    assert at.engine.told == ["save 0 0", "restore 0 0"], "who is worth more finds no name while it is read"


def test_a_flush_reaches_the_workflows_own_file_and_it_is_emptied() -> None:
    at = AtDesk()
    for workflow in "uvw":
        at.call(workflow)
    at.engine.told.clear()
    at.scheduler.apply(CacheAction(Verb.FLUSH, "u"))
    at.background.do_all()
    assert at.engine.told == [], "there is no empty slot to overwrite it with"
    at.scheduler.apply(CacheAction(Verb.FLUSH, "w"))
    at.background.do_all()
    assert at.engine.told == ["erase 0", "save 0 0"]
    assert at.effects["flush:freed"] == 2 and at.effects["flush:deferred"] == 1
    assert at.call("v").action == "restored", "another workflow's file is as it was"


def test_whoever_waits_for_a_human_is_saved_ahead_and_may_sit_down_meanwhile() -> None:
    at = AtDesk(slots=2)
    at.call("u")
    at.scheduler.turned("u", Doing.HUMAN)
    queued = at.enter("u")
    lease = at.lease(queued)
    assert (lease.slot, lease.action) == (0, "reused") and lease.swap is not None and not lease.swap.ended.done()
    at.background.do_all()
    assert lease.swap.ended.done() and at.engine.told == ["save 0 0"]
    at.leave(queued)


def test_an_engine_started_anew_keeps_files_and_one_with_other_weights_none() -> None:
    at = AtDesk()
    for workflow in "uv":
        at.call(workflow)
    with at.scheduler.lock:
        at.scheduler.forgotten()
    assert at.call("u").action == "restored"
    at.scheduler.health._learn(Probe(models=("m",), slots=1, capabilities=CAN, weights="other.gguf"))
    with at.scheduler.lock:
        at.scheduler.forgotten()
    assert at.call("v").action == "reclaimed" and at.scheduler.cache.statistics().saved == 0


# A restart that nobody noticed


@pytest.mark.parametrize(
    ("first", "then", "all_is_lost"),
    [("", "", True), ("first", "second", True), ("first", "first", False)],
    ids=["cannot tell", "was restarted", "was not"],
)
def test_a_slot_that_holds_next_to_nothing_is_not_kept_and_the_engine_is_asked_what_happened(
    first: str, then: str, all_is_lost: bool
) -> None:
    at = AtDesk(slots=2)
    at.scheduler.health._learn(replace(at.engine.says, incarnation=first))  # type: ignore[type-var]
    for workflow in "uv":
        at.call(workflow)
    at.engine.says = replace(at.engine.says, incarnation=then)  # type: ignore[type-var]
    at.engine.holds = 0
    assert at.call("w").action == "reclaimed"
    assert at.effects == {"save:failed": 1} and at.scheduler.cache.statistics().saved == 0
    tokens = {slot.owner: slot.tokens for slot in at.table.slots}
    assert tokens == {"w": 9000, "v": 0 if all_is_lost else 9000}
    at.engine.holds = None
    assert at.call("u").action == "reclaimed", "there is nothing to restore"


@pytest.mark.parametrize(("holds", "kept"), [(4500, True), (4499, False)])
def test_what_is_saved_ahead_is_believed_if_it_is_about_what_it_should_be(holds: int, kept: bool) -> None:
    at = AtDesk(slots=2)
    at.engine.says = replace(at.engine.says, incarnation="first")  # type: ignore[type-var]
    at.scheduler.health._learn(at.engine.says)  # type: ignore[arg-type]
    at.call("u")
    at.engine.holds = holds
    at.scheduler.turned("u", Doing.HUMAN)
    at.background.do_all()
    assert at.table.slots[0].tokens == (9000 if kept else 0)
    assert at.effects == {"save:saved" if kept else "save:failed": 1}
    at.scheduler.check_integrity()


def test_a_file_is_not_emptied_with_a_slot_that_is_not_empty() -> None:
    at = AtDesk(slots=2)
    for workflow in "uvw":
        at.call(workflow)
    at.engine.holds = 7
    for workflow in "uw":
        at.scheduler.apply(CacheAction(Verb.FLUSH, workflow))
    at.background.do_all()
    assert at.effects["flush:failed"] == 1, "the file would hold those tokens"
    at.engine.holds = 0
    at.call("v")
    assert at.effects["flush:freed"] == 2


# Where nothing is moved


@pytest.mark.parametrize(("max_saved", "able"), [(0, True), (4, False)])
def test_without_files_nothing_is_saved(max_saved: int, able: bool) -> None:
    at = AtDesk(max_saved=max_saved)
    if not able:
        at.scheduler.health._learn(Probe(models=("m",), slots=1))
    at.call("u")
    queued = at.enter("v")
    assert not queued.granted, "holding is worth its time where what is lost is lost"
    at.background.advance(5.0)
    assert queued.granted and at.lease(queued).swap is None
    at.leave(queued)
    assert at.engine.told == [] and at.scheduler.cache.statistics().saved == 0


def test_a_closed_orla_starts_no_swap_and_leaves_nothing_locked() -> None:
    at = AtDesk()
    at.call("u")
    at.background.closed = True
    queued = at.enter("v")
    at.background.advance(1.0)
    swap = at.lease(queued).swap
    assert swap is not None and swap.ended.done() and not at.table.slots[0].moving
    at.leave(queued)
