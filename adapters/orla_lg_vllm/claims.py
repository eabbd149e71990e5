"""What is noted of cached blocks: a request's chain, a block's holding, a stage's chains.

This file runs inside the engine: it imports the standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from orla_lg_vllm.bands import Band

Owner = tuple[str, str]
"""A workflow, and its stage."""


@dataclass(eq=False, slots=True)
class Chain:
    """What one request left in the cache; of a dead one, what no later request had."""

    owner: Owner
    bands: dict[int, Band] = field(default_factory=dict)
    """The natural band of each block, in the order of the prompt. Never rising."""
    pinned: set[int] = field(default_factory=set)
    until_s: float = 0.0
    """When its pin ends."""
    ended_s: float = 0.0
    """When the request ended; later ones that began after it may take its place."""
    released: bool = False
    suspended: bool = False
    """Whether its workflow must make room for others, and comes back when there is some."""

    def claim(self, block: int) -> Band:
        """Return what this chain claims for one of its blocks."""
        natural = self.bands[block]
        if block in self.pinned:
            return Band.PINNED
        if self.released:  # others may begin with the same system prompt, but nothing else of it is theirs
            natural = Band.HISTORY if natural is Band.SYSTEM else Band.DEAD
        return min(natural, Band.SPARE) if self.suspended else natural


_DESCENDING = tuple(reversed(Band))


@dataclass(eq=False, slots=True)
class BlockClaims:
    """What is claimed for one block."""

    chains: set[Chain] = field(default_factory=set)
    claims: list[int] = field(default_factory=lambda: [0] * len(Band))
    """How many chains claim each band."""
    anonymous: Band = Band.DEAD
    """What a request without a workflow claims that used it, until the block is given away; ``DEAD`` if none did."""

    @property
    def band(self) -> Band:
        """The highest that is claimed.

        A system prompt is worth more than history because others begin with it, too. One that a single workflow
        has is worth no more than what follows it; else those of workflows long gone would fill the pool.
        """
        top = Band.DEAD
        for band in _DESCENDING:
            if self.claims[band]:
                top = band
                break
        if top is Band.SYSTEM and not self.shared:
            return Band.HISTORY
        return max(top, self.anonymous)

    @property
    def shared(self) -> bool:
        """Whether several workflows, or one and a request without any, have it."""
        if self.anonymous or len(self.chains) < 2:
            return bool(self.anonymous and self.chains)
        first = next(iter(self.chains)).owner[0]
        return any(chain.owner[0] != first for chain in self.chains)


@dataclass(eq=False, slots=True)
class OwnerChains:
    """What one owner has."""

    chains: list[Chain] = field(default_factory=list)
    """Live or released; several where calls of the stage overlapped in time."""
    dead: Chain | None = None
    """What later calls of the stage made obsolete."""

    def every(self) -> list[Chain]:
        """Return all chains, the dead one last."""
        return self.chains if self.dead is None else [*self.chains, self.dead]


@dataclass(frozen=True, slots=True)
class Left:
    """What a request leaves in the cache when it ends."""

    owner: Owner
    blocks: Sequence[int]
    """In the order of the prompt."""
    bands: Sequence[Band]
    """Of each block, never rising."""
    began_s: float
    keep_s: float | None = None
    """For how long to pin it; 0 if it is of no further use, ``None`` where nothing was said."""
    released: bool = False
    """Whether its workflow was released meanwhile."""
    whole: bool = True
    """Whether it ended by itself; one that was aborted or pushed out makes nothing obsolete."""
