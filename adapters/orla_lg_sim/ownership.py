"""Whose the blocks are, and which of them are to be kept: what a workflow-aware engine adds to a block pool.

Kept by hash, so nothing here changes when a block is found again in another place. A hash may have several
owners: a common system prompt belongs to every workflow that used it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from math import inf

from orla_lg_sim.blocks import BlockPool, Hash


@dataclass(eq=False, slots=True)
class _Pin:
    until_s: float
    hashes: dict[Hash, None] = field(default_factory=dict)


class Ownership:
    """Owners and pins of a pool's hashes. Sets are dicts: their order is the order of the prefix."""

    def __init__(self, blocks: int) -> None:
        self.pool = BlockPool(blocks, self._forgotten)
        self._owners: dict[Hash, dict[str, None]] = {}
        self._owned: dict[str, dict[Hash, None]] = {}
        self._pins: dict[str | int, _Pin] = {}
        """By the workflow that a pin is for; those for a prefix or for everything are numbered."""
        self._numbers = count()
        self.residents: dict[str, None] = {}
        """Workflows whose cache is kept whole (``residents``), least recently used first."""

    def use(self, workflow: str) -> None:
        """Make a workflow resident, or the one used last."""
        self.residents.pop(workflow, None)
        self.residents[workflow] = None

    def idle_of_residents(self) -> set[int]:
        """Return the blocks that residents own and nobody holds."""
        return self.pool.idle_with(value for name in self.residents for value in self._owned.get(name, ()))

    def claim(self, workflow: str, value: Hash) -> None:
        """Make a workflow one of the owners of *value*."""
        self._owned.setdefault(workflow, {})[value] = None
        self._owners.setdefault(value, {})[workflow] = None
        if (pin := self._pins.get(workflow)) is not None:
            pin.hashes[value] = None
            self.pool.pin(value)

    def owned(self, workflow: str) -> list[Hash]:
        """Return what a workflow has in the cache, shared or not."""
        return list(self._owned.get(workflow, ()))

    def alone(self, workflow: str) -> list[Hash]:
        """Return what a workflow has in the cache and no other has."""
        return [value for value in self.owned(workflow) if len(self._owners[value]) == 1]

    def shared_by(self, value: Hash) -> int:
        """Return how many workflows own *value*."""
        return len(self._owners.get(value, ()))

    # Each returns how many hashes it concerned.

    def pin_workflow(self, workflow: str, until_s: float = inf) -> int:
        """Keep what a workflow has, and what it will have until *until_s*."""
        self._unpin(workflow)
        return self._pin(workflow, self.owned(workflow), until_s)

    def pin(self, hashes: Iterable[Hash], until_s: float = inf) -> int:
        """Keep *hashes* until *until_s*; an earlier pin of the same that was not for a workflow is over."""
        wanted = list(hashes)
        self._let_go(wanted, [name for name in self._pins if isinstance(name, int)])
        return self._pin(next(self._numbers), wanted, until_s)

    def release_workflow(self, workflow: str) -> int:
        """End a workflow's pin; what only it has is evicted next."""
        self.residents.pop(workflow, None)
        self._unpin(workflow)
        return self._demote(self.alone(workflow))

    def release(self, hashes: Iterable[Hash]) -> int:
        """End the pins of *hashes*; they are evicted next."""
        wanted = list(hashes)
        self._let_go(wanted, list(self._pins))
        return self._demote(wanted)

    def flush_workflow(self, workflow: str) -> int:
        """Forget what only this workflow has; it owns nothing afterwards."""
        self.residents.pop(workflow, None)
        self._unpin(workflow)
        alone, owned = self.alone(workflow), self.owned(workflow)
        for value in owned:
            self._disown(workflow, value)
        return self.flush(alone)

    def flush(self, hashes: Iterable[Hash]) -> int:
        """Forget *hashes*, whoever has them."""
        return sum(self.pool.forget(value) for value in hashes)

    def expire(self, now_s: float) -> None:
        """End the pins whose time is over."""
        for name in [name for name, pin in self._pins.items() if pin.until_s <= now_s]:
            self._unpin(name)

    @property
    def pinned(self) -> int:
        """How many hashes are kept by a pin."""
        return len({value for pin in self._pins.values() for value in pin.hashes})

    @property
    def has_pins(self) -> bool:
        """Whether ``expire`` may have something to do."""
        return bool(self._pins)

    def workflows(self) -> dict[str, int]:
        """Return how many hashes each workflow owns."""
        return {workflow: len(owned) for workflow, owned in self._owned.items()}

    def check_integrity(self) -> None:
        """Assert that owners and owned agree, and that only what is known has owners or pins."""
        known = set(self.pool.all_known())
        pairs = {(workflow, value) for workflow, owned in self._owned.items() for value in owned}
        assert pairs == {(workflow, value) for value, owners in self._owners.items() for workflow in owners}
        assert {value for _, value in pairs} <= known
        assert all(set(pin.hashes) <= known for pin in self._pins.values())

    # Inside

    def _pin(self, name: str | int, hashes: Iterable[Hash], until_s: float) -> int:
        kept = [value for value in hashes if self.pool.pin(value)]
        if kept or isinstance(name, str):
            self._pins[name] = _Pin(until_s, dict.fromkeys(kept))
        return len(kept)

    def _let_go(self, hashes: Iterable[Hash], names: Iterable[str | int]) -> None:
        """Take *hashes* out of some pins; whether they stay pinned in the pool is seen to by the caller."""
        for name in names:
            pin = self._pins[name]
            for value in hashes:
                pin.hashes.pop(value, None)
            if not pin.hashes and isinstance(name, int):
                del self._pins[name]

    def _unpin(self, name: str | int) -> None:
        pin = self._pins.pop(name, None)
        for value in pin.hashes if pin is not None else ():
            if not any(value in other.hashes for other in self._pins.values()):
                self.pool.unpin(value)

    def _demote(self, hashes: Iterable[Hash]) -> int:
        free = [value for value in hashes if not any(value in pin.hashes for pin in self._pins.values())]
        # The last one demoted is the first to go, so the end of a prefix goes before its beginning.
        return sum(self.pool.demote(value) for value in free)

    def _disown(self, workflow: str, value: Hash) -> None:
        owners, owned = self._owners[value], self._owned[workflow]
        del owners[workflow], owned[value]
        if not owners:
            del self._owners[value]
        if not owned:
            del self._owned[workflow]

    def _forgotten(self, value: Hash) -> None:
        for workflow in list(self._owners.get(value, ())):
            self._disown(workflow, value)
        for pin in self._pins.values():
            pin.hashes.pop(value, None)
