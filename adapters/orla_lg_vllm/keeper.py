"""What the plugin does in a scheduler: it keeps the ledger, orders the free blocks by it, and carries out orders.

The scheduler (``scheduler.py``) tells it what ends, the pool what is given away, and the routes (``routes.py``)
what is wanted. An answer says what happened, never what was meant to. This file runs inside the engine and is
given vLLM's objects; it imports the standard library only, so all of it can be tried without vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any, Protocol

from orla_lg_vllm.bands import Band, BandedQueue, Block
from orla_lg_vllm.claims import Left
from orla_lg_vllm.ledger import Ledger
from orla_lg_vllm.segments import Labels, bands_of
from orla_lg_vllm.suspension import Suspension, SuspensionSettings

VERBS = ("pin", "release", "flush", "stat")

Answer = dict[str, Any]
"""As it becomes JSON: ``effect``, counts, and ``reason`` where something could not be done."""

Running = Mapping[str, Sequence[int]]
"""A workflow's running requests, by id, and the blocks of each."""


class Pool(Protocol):
    """What is used of vLLM's ``BlockPool``."""

    blocks: Sequence[Any]
    free_block_queue: Any

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Make the prefix cache forget blocks."""
        ...


@dataclass(frozen=True, slots=True)
class Ending:
    """A request that gives its blocks back."""

    request_id: str
    labels: Labels
    blocks: Sequence[int]
    """In the order of the prompt."""
    prompt_tokens: int
    began_s: float
    whole: bool
    """Whether it ended by itself, not aborted and not pushed out by another."""


class Keeper:
    """The banded queue and the ledger of one pool.

    Args:
        pool: Whose free queue is replaced.
        block_tokens: The size of its blocks, in tokens.
        clock: Seconds; the one that requests' arrivals are stamped with.
        settings: How workflows are suspended; ``None`` if they never are.
    """

    def __init__(
        self,
        pool: Pool,
        block_tokens: int,
        clock: Callable[[], float] = time.time,
        settings: SuspensionSettings | None = None,
    ) -> None:
        self._pool = pool
        self._block_tokens = block_tokens
        self._clock = clock
        self._later: dict[str, str] = {}
        """Running requests whose workflow was flushed or released: what becomes of theirs when they end."""
        anonymous = Band.HISTORY if settings is None else Band.SPARE
        self.ledger = Ledger(len(pool.blocks), self._is_free, self._moved, anonymous)
        self.queue = BandedQueue(pool.free_block_queue.get_all_free_blocks(), self._band_of, self._taken)
        pool.free_block_queue = self.queue
        room = _Room(self.ledger, self.queue)
        self.suspension = None if settings is None else Suspension(room, len(pool.blocks), settings)

    # What the scheduler tells

    def ends(self, ending: Ending) -> None:
        """Note what a request leaves, just before its blocks become free."""
        blocks = self._cached(ending.blocks)
        later, labels = self._later.pop(ending.request_id, None), ending.labels
        if later == "flush":
            self._forget([block for block in blocks if not self.ledger.is_claimed(block)], in_use=1)
        elif not labels.workflow:
            self.ledger.note_anonymous(blocks)
        else:
            bands = bands_of(labels, ending.prompt_tokens, len(blocks), self._block_tokens)
            owner, released = (labels.workflow, labels.stage), later == "release"
            left = Left(owner, blocks, bands, ending.began_s, labels.keep_s, released, ending.whole)
            self.ledger.note_left(left, self._clock())
        if self.suspension is not None and labels.workflow:
            keep_s = 0.0 if later else labels.keep_s
            self.suspension.ends(ending.request_id, labels.workflow, self._clock(), keep_s)

    def expire(self) -> None:
        """End pins whose time is over; costs nothing while there are none."""
        if self._clock() >= self.ledger.next_expiry_s:
            self.ledger.expire(self._clock())

    def emptied(self) -> None:
        """Note that the whole cache was forgotten."""
        self.ledger.clear()
        if self.suspension is not None:
            self.suspension.clear()
        self.queue.empty(self.queue.get_all_free_blocks())

    def give_up(self) -> None:
        """Go on as a plain list, least recently used first: what is noted cannot be trusted any more."""
        self.ledger.clear()
        self.queue.flatten()

    # Orders

    def order(self, verb: str, workflow: str, ttl_s: float | None, running: Running) -> Answer:
        """Carry out one order; all happens between two steps of the engine."""
        self.expire()
        if verb == "pin":
            return self._pin(workflow, ttl_s, running)
        if verb == "release":
            return self._release(workflow, running)
        if verb == "flush":
            return self._flush(workflow, running)
        return self._totals() if not workflow else {"effect": "stat", **self._counts(workflow, running)}

    def _pin(self, workflow: str, ttl_s: float | None, running: Running) -> Answer:
        if not running and not self.ledger.knows(workflow):
            return self._told("failed", workflow, running, "nothing of this workflow is in the cache")
        self.ledger.pin(workflow, inf if ttl_s is None else self._clock() + ttl_s)
        if self.suspension is not None:
            self.suspension.stays(workflow)
        held = self.ledger.statistics(workflow)
        left_out = held.blocks - held.pinned - held.dead
        over = f"{left_out} blocks were left out: at most {self.ledger.budget_blocks} of the pool may be pinned"
        effect = "pinned" if held.pinned else "deferred" if not held.blocks else "failed"
        return {**self._told(effect, workflow, running, over if left_out else ""), "left_out_blocks": left_out}

    def _release(self, workflow: str, running: Running) -> Answer:
        known = self.ledger.knows(workflow)
        self.ledger.release(workflow)
        self._leaves(workflow)
        self._later = dict.fromkeys(running, "release") | self._later  # a flush that waits is more than this
        return self._told("deferred" if running and not known else "demoted", workflow, running)

    def _flush(self, workflow: str, running: Running) -> Answer:
        before = self.ledger.statistics(workflow)
        theirs = {block for blocks in running.values() for block in self._cached(blocks)}
        self._leaves(workflow)
        unclaimed = [block for block in self.ledger.flush(workflow) if block not in theirs]
        freed = self._forget(unclaimed, in_use=0)
        self._later |= dict.fromkeys(running, "flush")
        shared = before.shared + len(unclaimed) - freed  # what others' running requests hold, they will claim
        answer = self._told("deferred" if running else "freed", workflow, running)
        return {**answer, "freed_blocks": freed, "deferred_blocks": len(theirs), "shared_blocks": shared}

    def _leaves(self, workflow: str) -> None:
        if self.suspension is not None:
            self.suspension.leaves(workflow)

    # The state now

    def _told(self, effect: str, workflow: str, running: Running, reason: str = "") -> Answer:
        return {"effect": effect, **({"reason": reason} if reason else {}), **self._counts(workflow, running)}

    def _counts(self, workflow: str, running: Running) -> Answer:
        held = self.ledger.statistics(workflow)
        counts = {f"{name}_blocks" if name != "blocks" else name: count for name, count in asdict(held).items()}
        return {**counts, "resident_tokens": held.blocks * self._block_tokens, "running": len(running)}

    def _totals(self) -> Answer:
        free, queue = {band.name.lower(): self.queue.band(band) for band in Band}, self.queue
        return {
            "effect": "stat",
            "blocks": len(self._pool.blocks) - 1,  # vLLM keeps one for itself
            "block_tokens": self._block_tokens,
            "free_blocks": queue.num_free_blocks,
            "bands": {name: sum(block.block_hash is not None for block in blocks) for name, blocks in free.items()},
            "evicted_blocks": {band.name.lower(): queue.evicted[band] for band in Band},
            "reused_blocks": queue.reused,
            "workflows": len(list(self.ledger.workflows())),
            "pinned_blocks": self.ledger.pinned_blocks,
            "pin_budget_blocks": self.ledger.budget_blocks,
            **({} if self.suspension is None else {"suspension": self.suspension.statistics()}),
        }

    def check_integrity(self) -> None:
        """Assert the invariants of the queue and the ledger."""
        self.ledger.check_integrity()
        self.queue.check_integrity()
        if self.suspension is not None:
            self.suspension.check_integrity()

    # Inside

    def _cached(self, blocks: Sequence[int]) -> list[int]:
        """Return the leading blocks that the prefix cache can find; the last may be filled in part."""
        found = []
        for block in blocks:
            if self._pool.blocks[block].block_hash is None:
                break
            found.append(block)
        return found

    def _forget(self, blocks: Sequence[int], *, in_use: int) -> int:
        """Make the cache forget blocks that exactly *in_use* requests hold; return how many those were."""
        gone = [block for block in blocks if self._pool.blocks[block].ref_cnt == in_use]
        self._pool.evict_blocks(set(gone))
        self.queue.empty([block for block in map(self._block, gone) if block in self.queue])
        return len(gone)

    def _block(self, block: int) -> Block:
        found: Block = self._pool.blocks[block]
        return found

    def _band_of(self, block: Block) -> Band:
        return self.ledger.band(block.block_id)

    def _taken(self, block: Block) -> None:
        self.ledger.note_taken(block.block_id)

    def _is_free(self, block: int) -> bool:
        return self._pool.blocks[block] in self.queue

    def _moved(self, block: int) -> None:
        self.queue.move(self._block(block))


class _Room:
    """The pool as ``Suspension`` sees it."""

    def __init__(self, ledger: Ledger, queue: BandedQueue) -> None:
        self._ledger, self._queue = ledger, queue

    def free_blocks(self) -> int:
        return self._queue.num_free_blocks

    def spare_blocks(self) -> int:
        return self._queue.counts[Band.DEAD] + self._queue.counts[Band.SPARE]

    def knows(self, workflow: str) -> bool:
        return self._ledger.knows(workflow)

    def is_kept(self, workflow: str) -> bool:
        return self._ledger.is_ordered(workflow)

    def suspend(self, workflow: str, *, pins: bool) -> None:
        self._ledger.suspend(workflow, pins=pins)

    def resume(self, workflow: str) -> None:
        self._ledger.resume(workflow)
