"""Who may run while the pool is short: whole workflows are suspended, so that the others keep all of theirs.

Agents whose contexts do not fit into the pool together take it from each other bit by bit: each call evicts a
part of everybody else's, each comes back to find some of its own gone, and all of them recompute. No order of
eviction helps, since what runs fills the pool. It is the thrashing that operating systems met in the 1960s, and
the cure is theirs: load control. Let only as many go on as their working sets fit (Denning, *The working set
model for program behavior*, 1968; *Thrashing: its causes and prevention*, 1968), and take everything from one
rather than a part from each. ThunderAgent pauses whole agent programs so, above the engine. Here the engine's
scheduler does it, which alone knows to the block what is spare.

    resident    from the moment a call of it is scheduled; its blocks are protected, between its calls, too
    suspended   what it has is spare; it comes back only when there is room for all of it
    spare       free blocks that are dead, of suspended workflows, or of requests without a workflow

    a waiting call of a ...          goes
    ... resident                     as ever; what it lacks is taken from other residents, whole, idle ones first
    ... new or suspended workflow    in its turn, when it fits into what is spare and leaves ``RESERVE`` of the pool
    ... such a one, come too long ago or while nothing runs             as a resident does
    ... request without a workflow   as ever: it is never held back

What runs is never touched. While all that waits fits into what is spare, nothing is looked at and nobody is held.
Everything here is a plain decision on plain state, taken between two steps of the engine: of the pool it is told
through ``Room``. This file runs inside the engine: it imports the standard library only.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple, Protocol

SUSPEND_VARIABLE = "ORLA_VLLM_SUSPEND"
"""``off`` in the engine's environment leaves only the bands; ``on`` is what holds where nothing is said."""

PATIENCE_VARIABLE = "ORLA_VLLM_PATIENCE_S"
"""In the engine's environment: after how many seconds a held call goes all the same."""

PATIENCE_S = 30.0

RESERVE = 0.1
"""The part of the pool that must be left when a workflow enters, since it and all others will grow."""

IDLE_S = 10.0
"""For how long a workflow stays resident between two calls unless it says more: longer than most tools take."""


@dataclass(frozen=True, slots=True)
class SuspensionSettings:
    """How the engine's owner wants it."""

    patience_s: float = PATIENCE_S


def settings_of(environment: Mapping[str, str] = os.environ) -> SuspensionSettings | None:
    """Return what the engine's environment says of suspension; ``None`` if it is switched off.

    Raises:
        ValueError: A variable has a value that means nothing; the message names it and what would be right.
    """
    switch = environment.get(SUSPEND_VARIABLE, "on")
    if switch not in ("on", "off"):
        raise ValueError(f"{SUSPEND_VARIABLE} must be on or off, got {switch!r}")
    said = environment.get(PATIENCE_VARIABLE, str(PATIENCE_S))
    try:
        patience_s = float(said)
    except ValueError:
        patience_s = -1.0
    if not (isfinite(patience_s) and patience_s >= 0):
        raise ValueError(f"{PATIENCE_VARIABLE} must be a number of seconds, such as {PATIENCE_S:.0f}; got {said!r}")
    return SuspensionSettings(patience_s) if switch == "on" else None


class Room(Protocol):
    """What is asked of the pool, and told to it."""

    def free_blocks(self) -> int:
        """Return how many blocks no running request holds."""
        ...

    def spare_blocks(self) -> int:
        """Return how many of the free ones no resident has."""
        ...

    def knows(self, workflow: str) -> bool:
        """Whether anything of a workflow is in the cache."""
        ...

    def is_kept(self, workflow: str) -> bool:
        """Whether somebody ordered it to be pinned, and its time is not over."""
        ...

    def suspend(self, workflow: str, *, pins: bool) -> None:
        """Make spare what only this workflow has, with *pins* also what is pinned."""
        ...

    def resume(self, workflow: str) -> None:
        """Protect again what is left of a workflow."""
        ...


@dataclass(frozen=True, slots=True)
class Lack:
    """What a waiting request needs that it does not have."""

    spare: int
    """Blocks it will take from those that are spare: new ones, and its own while it is suspended."""
    kept: int = 0
    """Free blocks that it will find in the cache, protected until now."""


@dataclass(frozen=True, slots=True)
class Asking:
    """A request that waits and could be scheduled."""

    request_id: str
    workflow: str
    """Empty for one without."""
    hashes: Sequence[Hashable]
    """What its whole blocks are called, each after all that stands before its end."""
    came_s: float
    lack: Callable[[Set[Hashable]], Lack]
    """Looks into the cache, so it is called only where it decides something; told what will be there besides."""


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """The engine just before it plans a step."""

    now_s: float
    asking: Sequence[Asking]
    """In the order in which they would be scheduled."""
    seats: int
    """How many more requests may run."""
    growth_blocks: int
    """What those that run lack for their prompts and the next token."""
    running: bool
    """Whether any request runs."""


class ResidentStay(NamedTuple):
    """For how long a resident stays so while it has no call, in seconds of the clock."""

    until_s: float = 0.0
    expected_s: float = 0.0
    """Until when its last call said that it would be of use."""


class Suspension:
    """Who is resident, who is suspended, and who is held back.

    Invariants: a workflow is resident or suspended, or neither while it has nothing in the cache; one of which a
    request runs is resident.

    Args:
        room: The pool.
        pool_blocks: Its size.
        settings: How the owner wants it.
    """

    def __init__(self, room: Room, pool_blocks: int, settings: SuspensionSettings) -> None:
        self.settings = settings
        self.reserve_blocks = int(pool_blocks * RESERVE)
        self.residents: OrderedDict[str, ResidentStay] = OrderedDict()
        """The one least recently used first."""
        self.suspended: set[str] = set()
        self.held: frozenset[str] = frozenset()
        """Of the last step, by id of the request."""
        self.suspensions = 0
        """How often a workflow was suspended to make room."""
        self._room = room
        self._running: dict[str, set[str]] = {}

    # What happens

    def begins(self, request_id: str, workflow: str) -> None:
        """Note that a request was scheduled: its workflow is resident."""
        self._running.setdefault(workflow, set()).add(request_id)
        if workflow not in self.residents:
            self.suspended.discard(workflow)
            self._room.resume(workflow)
        self.residents[workflow] = ResidentStay()
        self.residents.move_to_end(workflow)

    def ends(self, request_id: str, workflow: str, now_s: float, keep_s: float | None) -> None:
        """Note that a request gives its blocks back; one that never ran changes nothing.

        Args:
            request_id: Which.
            workflow: Whose.
            now_s: The time.
            keep_s: For how long it said it would be of use; 0 if its workflow will not come back.
        """
        running = self._running.get(workflow, set())
        if request_id not in running:
            return
        running.discard(request_id)
        if not running:
            del self._running[workflow]
        said_s = keep_s or 0.0
        # A long wait, such as for a human, must not keep others out for longer than anybody waits.
        stays_s = max(min(said_s, self.settings.patience_s), IDLE_S)
        self.residents[workflow] = ResidentStay(now_s + stays_s, now_s + said_s)
        self.residents.move_to_end(workflow)
        if keep_s == 0:
            self.leaves(workflow)

    def stays(self, workflow: str) -> None:
        """Note that somebody ordered a workflow to be pinned: it is the last to be suspended until that ends."""
        self.suspended.discard(workflow)
        self._room.resume(workflow)
        self.residents.setdefault(workflow, ResidentStay())

    def leaves(self, workflow: str) -> None:
        """Note that a workflow was released or flushed: nothing of it is protected, unless it still runs."""
        self.suspended.discard(workflow)
        if workflow not in self._running and self.residents.pop(workflow, None) is not None:
            self._room.suspend(workflow, pins=True)

    def clear(self) -> None:
        """Forget all that do not run: the cache is empty."""
        self.suspended.clear()
        for workflow in [each for each in self.residents if each not in self._running]:
            del self.residents[workflow]

    # The decision

    def all_fits(self, wanted_blocks: int) -> bool:
        """Whether there is nothing to decide.

        Args:
            wanted_blocks: What all that run and wait would take if they found nothing in the cache.
        """
        fits = wanted_blocks + self.reserve_blocks <= self._room.spare_blocks()
        if fits:
            self.held = frozenset()
        return fits

    def plan(self, step: PlannedStep) -> frozenset[str]:
        """Return which waiting requests are held back at this step; suspend whose place the others take."""
        self._look_around(step)
        self.held = frozenset(_Turn(self, self._room, step).held())
        return self.held

    def is_running(self, workflow: str) -> bool:
        """Whether a request of it runs."""
        return workflow in self._running

    def suspend(self, workflow: str, *, pins: bool = True) -> None:
        """Take everything from a resident of which nothing runs; without *pins*, leave it what is pinned."""
        assert workflow not in self._running, f"{workflow} runs and cannot be suspended"
        del self.residents[workflow]
        self.suspended.add(workflow)
        self._room.suspend(workflow, pins=pins)

    def statistics(self) -> dict[str, Any]:
        """Return the state now, in counts."""
        return {
            "resident_workflows": len(self.residents),
            "suspended_workflows": len(self.suspended),
            "held_requests": len(self.held),
            "suspensions": self.suspensions,
        }

    def check_integrity(self) -> None:
        """Assert the invariants."""
        assert self._running.keys() <= self.residents.keys(), "a workflow runs and is not resident"
        assert not self.suspended & self.residents.keys(), "a workflow is resident and suspended"
        assert all(self._running.values()), "a workflow without requests is said to run"

    def _look_around(self, step: PlannedStep) -> None:
        """Forget whom the cache has forgotten, and let those go who have been away for too long."""
        waiting = {each.workflow for each in step.asking}
        for workflow, stay in list(self.residents.items()):
            if workflow in self._running or workflow in waiting:
                continue
            if not self._room.knows(workflow):
                del self.residents[workflow]
            elif stay.until_s <= step.now_s and not self._room.is_kept(workflow):
                self.suspend(workflow, pins=False)
        self.suspended = {each for each in self.suspended if each in waiting or self._room.knows(each)}


class _Turn:
    """One decision: goes through the waiting requests in their order, with what is left in hand."""

    def __init__(self, suspension: Suspension, room: Room, step: PlannedStep) -> None:
        self._all, self._room, self._step = suspension, room, step
        self._promised = step.growth_blocks
        """Spare blocks that those who run or go will take."""
        self._promised_kept = 0
        """Protected ones that those who go will take."""
        self._coming: set[Hashable] = set()
        """What those who go will have in use: whoever goes after them finds it there."""
        self._seats = step.seats
        self._someone_goes = step.running
        self._entry_is_open = True
        """Until the first who must wait outside: after it, others would only keep it waiting."""
        self._first: dict[str, int] = {}
        for place, each in enumerate(step.asking):
            self._first.setdefault(each.workflow, place)
        self._victims = self._in_order_of_loss()

    def held(self) -> Iterator[str]:
        """Yield who is held back."""
        self._make_room(0, place=-1)  # for what runs already
        for place, each in enumerate(self._step.asking):
            if not self._goes(each, place):
                yield each.request_id

    def _goes(self, each: Asking, place: int) -> bool:
        inside = not each.workflow or each.workflow in self._all.residents
        if self._seats <= 0:
            return inside  # vLLM looks at none of them
        overdue = self._step.now_s - each.came_s >= self._all.settings.patience_s
        if not (inside or overdue or self._entry_is_open):
            return False
        lack = each.lack(self._coming)
        if inside or overdue or not self._someone_goes:
            self._enter_at_any_rate(each, lack, place)
            return True
        if lack.spare + self._all.reserve_blocks > self._spare():
            self._entry_is_open = False
            return False
        self._count(each, lack)
        return True

    def _enter_at_any_rate(self, each: Asking, lack: Lack, place: int) -> None:
        fits = lack.spare + lack.kept + self._promised + self._promised_kept <= self._room.free_blocks()
        if not fits:  # then vLLM schedules neither it nor any after it, so there is nothing to make room for
            self._seats = 0
            return
        self._make_room(lack.spare, place)
        self._count(each, lack)

    def _count(self, each: Asking, lack: Lack) -> None:
        self._coming.update(each.hashes)
        self._promised += lack.spare
        self._promised_kept += lack.kept
        self._seats -= 1
        self._someone_goes = True

    def _spare(self) -> int:
        return self._room.spare_blocks() - self._promised

    def _make_room(self, blocks: int, place: int) -> None:
        """Suspend residents until so many blocks are spare; of those who wait, only who waits behind *place*."""
        while self._spare() < blocks and self._victims:
            if self._first.get(self._victims[0], place + 1) <= place:
                return
            self._all.suspend(self._victims.pop(0))
            self._all.suspensions += 1

    def _in_order_of_loss(self) -> list[str]:
        """Return the residents that could be suspended: who has no call, the longest unused first; then who waits.

        Who said that it comes back about now goes after those who said nothing, or who are late, and after it who was
        ordered to be pinned: pins are soft. Of those who wait, the last in the queue is the first to lose its place.
        Which one it is hardly matters; what matters is that it gives up everything (measured: oldest, youngest and
        least recently used differ by a few hundredths).
        """
        able = [each for each in self._all.residents if not self._all.is_running(each)]
        idle = [each for each in able if each not in self._first]
        idle.sort(key=self._promise)
        return idle + sorted((each for each in able if each in self._first), key=lambda each: -self._first[each])

    def _promise(self, resident: str) -> tuple[bool, bool]:
        expected_s = self._all.residents[resident].expected_s
        return self._room.is_kept(resident), expected_s > self._step.now_s
