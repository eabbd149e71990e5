"""The order in which free blocks are given away: by band, and within a band the least recently used first.

    dead  <  spare  <  tool output  <  history  <  system prompt  <  pinned
    ^ taken first                                                 ^ taken last

vLLM keeps its free blocks in one linked list, the least recently used at the front: a workflow that waits for
a tool goes to the back at once, and a system prompt that all share stands no better than an answer nobody will
read again. ``BandedQueue`` is that list with fences in it. It offers the methods of vLLM's
``FreeKVCacheBlockQueue`` and uses the links in its blocks, so removing any block still takes one step.

This file runs inside the engine: it imports the standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Protocol


class Band(IntEnum):
    """What a block holds, by how long it should be kept."""

    DEAD = 0
    """Nothing that anybody is known to come back for."""
    SPARE = 1
    """Of workflows that are suspended (``suspension.py``), and of requests without one."""
    TOOL = 2
    """From the first tool output on."""
    HISTORY = 3
    """What was said, and everything of which nobody said what it is."""
    SYSTEM = 4
    """The system prompt."""
    PINNED = 5
    """Asked to be kept; taken nevertheless when nothing else is free."""


class Block(Protocol):
    """What is used of vLLM's ``KVCacheBlock``."""

    block_id: int
    ref_cnt: int
    """How many running requests hold it; only at 0 it may lie in the queue."""
    prev_free_block: Block | None
    next_free_block: Block | None

    @property
    def block_hash(self) -> bytes | None:
        """Under which the prefix cache finds it; ``None`` where it holds nothing worth finding."""
        ...


class _Fence:
    """The begin of a band, or the end of the list: a block that is none."""

    block_id = -1
    ref_cnt = 0
    block_hash: bytes | None = None

    def __init__(self) -> None:
        self.prev_free_block: Block | None = None
        self.next_free_block: Block | None = None


class BandedQueue:
    """vLLM's free list, its blocks in bands.

    Invariants: every free block lies between the fence that begins its band and the next one; only blocks in
    the list have links; ``num_free_blocks`` counts them, and ``counts`` those of each band, fences not included.

    Args:
        blocks: Those that are free now, in the order in which they are to be taken.
        band_of: Tells where a cached block belongs that becomes free.
        taken: Told each block that was given away, while its hash still stands.
    """

    def __init__(
        self, blocks: Sequence[Block], band_of: Callable[[Block], Band], taken: Callable[[Block], None]
    ) -> None:
        self.num_free_blocks = 0
        self.counts = [0] * len(Band)
        self.reused = 0
        """How often a request found a free block in the cache."""
        self.evicted = [0] * len(Band)
        """How many cached blocks of each band were given away."""
        self._band_of = band_of
        self._taken = taken
        self._places: dict[int, Band] = {}
        """Where each free block lies, by its id."""
        self._fences: list[Block] = [_Fence() for _ in range(len(Band) + 1)]
        for before, after in zip(self._fences, self._fences[1:], strict=False):
            before.next_free_block, after.prev_free_block = after, before
        for block in blocks:
            self._insert(block, Band.DEAD, before=self._fences[Band.DEAD + 1])

    # What vLLM calls

    def popleft(self) -> Block:
        """Give away one block.

        Raises:
            ValueError: None is free.
        """
        block = next(self._walk(self._fences[0].next_free_block), None)
        if block is None:
            raise ValueError("no free blocks available")
        self._unlink(block)
        if block.block_hash is not None:
            self.evicted[self._band_of(block)] += 1
            self._taken(block)
        return block

    def popleft_n(self, n: int) -> list[Block]:
        """Give away *n* blocks."""
        return [self.popleft() for _ in range(n)]

    def remove(self, block: Block) -> None:
        """Take *block* out: a request found it in the cache."""
        self._unlink(block)
        self.reused += 1

    def append(self, block: Block) -> None:
        """Put a block that became free at the end of its band."""
        band = Band.DEAD if block.block_hash is None else self._band_of(block)
        self._insert(block, band, before=self._fences[band + 1])

    def append_n(self, blocks: Sequence[Block]) -> None:
        """Put blocks that became free at the ends of their bands, in this order."""
        for block in blocks:
            self.append(block)

    def prepend_n(self, blocks: Sequence[Block]) -> None:
        """Put blocks that hold nothing at the very front, in this order."""
        first = self._fences[0].next_free_block
        assert first is not None
        for block in blocks:
            self._insert(block, Band.DEAD, before=first)

    def get_all_free_blocks(self) -> list[Block]:
        """Return the free blocks in the order in which they will be taken."""
        return list(self._walk(self._fences[0].next_free_block))

    def iter_blocks_after(self, cursor: Block | None) -> Iterator[Block]:
        """Yield the free blocks that will be taken after *cursor*; all for ``None``."""
        return self._walk((self._fences[0] if cursor is None else cursor).next_free_block)

    # What the ledger calls

    def __contains__(self, block: Block) -> bool:
        return block.next_free_block is not None

    def place(self, block: Block) -> Band:
        """Return the band in which a free block lies."""
        return self._places[block.block_id]

    def move(self, block: Block) -> None:
        """Put a free block where it now belongs, as the most recently used of its band."""
        self._unlink(block)
        self.append(block)

    def empty(self, blocks: Sequence[Block]) -> None:
        """Put free blocks that no longer hold anything at the very front."""
        for block in blocks:
            self._unlink(block)
        self.prepend_n(blocks)

    def flatten(self) -> None:
        """Have one band from now on, as vLLM's own list."""
        self._band_of, self._taken = (lambda block: Band.HISTORY), (lambda block: None)

    def band(self, band: Band) -> list[Block]:
        """Return the free blocks of one band, the next to be taken first."""
        found, block = [], self._fences[band].next_free_block
        while block is not self._fences[band + 1]:
            assert block is not None
            found.append(block)
            block = block.next_free_block
        return found

    def check_integrity(self) -> None:
        """Assert the invariants."""
        total = 0
        for band in Band:
            assert self.counts[band] == len(self.band(band)), f"{self.counts[band]} blocks counted in {band.name}"
            for block in self.band(band):
                total += 1
                assert block.ref_cnt == 0, f"block {block.block_id} is free and in use"
                assert block.next_free_block is not None and block.next_free_block.prev_free_block is block
                expected = Band.DEAD if block.block_hash is None else self._band_of(block)
                assert expected is band, f"block {block.block_id} lies in {band.name}, not in {expected.name}"
        assert total == self.num_free_blocks, f"{total} blocks in the list, {self.num_free_blocks} counted"

    # Inside

    def _unlink(self, block: Block) -> None:
        before, after = block.prev_free_block, block.next_free_block
        if before is None or after is None:
            raise RuntimeError(f"block {block.block_id} is not in the free queue")
        before.next_free_block, after.prev_free_block = after, before
        block.prev_free_block = block.next_free_block = None
        self.num_free_blocks -= 1
        self.counts[self._places.pop(block.block_id)] -= 1

    def _insert(self, block: Block, band: Band, *, before: Block) -> None:
        previous = before.prev_free_block
        assert previous is not None
        previous.next_free_block = before.prev_free_block = block
        block.prev_free_block, block.next_free_block = previous, before
        self.num_free_blocks += 1
        self._places[block.block_id] = band
        self.counts[band] += 1

    def _walk(self, block: Block | None) -> Iterator[Block]:
        while block is not None:
            if not isinstance(block, _Fence):
                yield block
            block = block.next_free_block
