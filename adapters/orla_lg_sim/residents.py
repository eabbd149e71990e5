"""Whose cache is kept whole: what a scheduler can do that knows workflows, beyond the order of eviction.

When what runs needs the whole pool, no order of eviction helps: everybody's next call throws out what somebody else
comes back for. So workflows are *resident* or not. What residents have is protected. Where it must give way, one of
them is suspended, gives up all, and comes back only when there is room for all of it; the others find theirs.

    resident       from its first call that starts until it is released, flushed or suspended
    suspended      the least recently used resident without a running call, when another one's call lacks spare blocks
    held back      a call of a workflow that is not resident, unless so many blocks are spare that a part of the pool
                   stays so, or nothing runs

Requests without a workflow are never held back. The idea is ThunderAgent's, which pauses programs on a timer; here it
is decided whenever a request could start, by what the pool holds at that moment.
"""

from __future__ import annotations

from collections.abc import Sequence

from orla_lg_sim.ownership import Ownership


class Residents:
    """Which workflows' calls may start.

    Args:
        ownership: Whose the pool's blocks are.
        spare_blocks: So many blocks must stay spare when a workflow becomes resident beside others.
    """

    def __init__(self, ownership: Ownership, spare_blocks: int) -> None:
        self.suspensions = 0
        self._ownership = ownership
        self._spare_blocks = spare_blocks

    def __contains__(self, workflow: str | None) -> bool:
        return workflow is None or workflow in self._ownership.residents

    def may_start(self, workflow: str | None, needs: int, found: Sequence[int], *, running: bool) -> bool:
        """Return whether a call may start.

        Args:
            workflow: Whose.
            needs: New blocks for its prompt.
            found: Blocks of its prompt that are in the cache.
            running: Whether anything runs.
        """
        if workflow in self or not running:
            return True
        return self._spare(found) - needs >= self._spare_blocks

    def starts(self, workflow: str | None, needs: int, found: Sequence[int], running: set[str | None]) -> None:
        """Note that a call starts, and suspend others until what it needs is spare.

        Args:
            workflow: Whose.
            needs: New blocks for its prompt.
            found: Blocks of its prompt that are in the cache.
            running: Workflows with a running call; these are not suspended.
        """
        if workflow is not None:
            self._ownership.use(workflow)
        able = [each for each in self._ownership.residents if each not in running and each != workflow]
        for each in able:
            if self._spare(found) >= needs:
                break
            self._ownership.release_workflow(each)
            self.suspensions += 1

    def _spare(self, found: Sequence[int]) -> int:
        """Return how many free blocks are neither a resident's nor among *found*."""
        kept = self._ownership.idle_of_residents().union(self._ownership.pool.idle(found))
        return self._ownership.pool.free - len(kept)
