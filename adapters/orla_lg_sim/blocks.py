"""The KV cache as a pool of blocks, with the eviction order of vLLM's.

A block holds a fixed number of tokens. A full one is known by a *hash* that stands for its tokens and all
tokens before them, so equal prefixes meet in the same block. Every block is in exactly one place:

    held      by one or more sequences: ``refs > 0``
    plain     free, and nothing known in it: taken first
    cached    free, but its hash is known: taken in order of last use, least recently used first
    pinned    as cached, but taken only when nothing else is left

A sequence gives its blocks back tail first, so of one prefix the end is lost before the beginning; the
beginning is what others share.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Hash = int
"""Stands for a block's tokens and all before them; see ``chain``."""


def chain(tokens: Sequence[int], block_tokens: int) -> list[Hash]:
    """Return the hash of every full block of *tokens*; equal beginnings have equal hashes, in every process."""
    hashes, before = [], 0
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        before = hash((before, *tokens[start : start + block_tokens]))
        hashes.append(before)
    return hashes


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """What a pool's blocks are in at one moment."""

    held: int
    plain: int
    cached: int
    pinned: int
    evictions: int
    """Cached blocks taken for something else since the pool was made."""


class BlockPool:
    """Ref-counted blocks; what is free stays findable by its hash until it is taken.

    Args:
        blocks: How many there are.
        forgotten: Told each hash of which the last block has gone.
    """

    def __init__(self, blocks: int, forgotten: Callable[[Hash], None] | None = None) -> None:
        self.blocks = blocks
        self.evictions = 0
        self._forgotten = forgotten
        self._refs = [0] * blocks
        self._hash: list[Hash | None] = [None] * blocks
        # A hash has one block nearly always; two sequences that computed the same make it a list, oldest first.
        self._known: dict[Hash, int | list[int]] = {}
        self._plain = deque(range(blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._pinned_free: OrderedDict[int, None] = OrderedDict()
        self._pins: set[int] = set()

    @property
    def free(self) -> int:
        """How many blocks can be taken."""
        return len(self._plain) + len(self._cached) + len(self._pinned_free)

    @property
    def held(self) -> int:
        """How many blocks running sequences hold."""
        return self.blocks - self.free

    @property
    def known(self) -> int:
        """How many different hashes can be found."""
        return len(self._known)

    def find(self, hashes: Iterable[Hash]) -> list[int]:
        """Return the blocks of the longest known prefix of *hashes*; they may be lost unless held at once."""
        found, known = [], self._known
        for value in hashes:
            block = known.get(value)
            if block is None:
                break
            found.append(block if type(block) is int else block[0])  # type: ignore[index]
        return found

    def idle_among(self, blocks: Iterable[int]) -> int:
        """Return how many of *blocks* nobody holds, so that holding them makes fewer free."""
        refs = self._refs
        return sum(not refs[block] for block in blocks)

    def idle(self, blocks: Iterable[int]) -> set[int]:
        """Return those of *blocks* that nobody holds."""
        return {block for block in blocks if not self._refs[block]}

    def idle_with(self, hashes: Iterable[Hash]) -> set[int]:
        """Return the blocks with one of *hashes* that nobody holds."""
        return self.idle(block for value in hashes for block in self._blocks_of(value))

    def hold(self, blocks: Iterable[int]) -> None:
        """Count one more holder of each block."""
        refs = self._refs
        for block in blocks:
            if not refs[block]:
                del self._place(block)[block]
            refs[block] += 1

    def take(self, count: int) -> list[int]:
        """Return *count* blocks to write into, held once; whatever was known in them is forgotten."""
        assert count <= self.free, f"{count} blocks asked, {self.free} free"
        refs, plain, taken = self._refs, self._plain, []
        for _ in range(count):
            if plain:
                block = plain.popleft()
            else:
                block, _nothing = (self._cached or self._pinned_free).popitem(last=False)
                self._unname(block)
                self.evictions += 1
            refs[block] = 1
            taken.append(block)
        return taken

    def name(self, block: int, value: Hash) -> None:
        """Make a held, full block findable by its hash."""
        assert self._refs[block] and self._hash[block] is None
        self._hash[block] = value
        same = self._known.get(value)
        if same is None:
            self._known[value] = block
        else:
            self._known[value] = [*([same] if isinstance(same, int) else same), block]

    def give_back(self, blocks: Iterable[int]) -> None:
        """Count one holder less of each block; the first of them will be evicted first."""
        refs, hashes, plain, cached = self._refs, self._hash, self._plain, self._cached
        for block in blocks:
            refs[block] -= 1
            if refs[block]:
                continue
            if hashes[block] is None:
                plain.appendleft(block)
            elif block in self._pins:
                self._pinned_free[block] = None
            else:
                cached[block] = None

    # What an engine with a hand on its cache can do to single hashes.

    def pin(self, value: Hash) -> bool:
        """Evict this last; returns whether it is known."""
        blocks = self._blocks_of(value)
        for block in blocks:
            self._pins.add(block)
            if self._cached.pop(block, self) is None:
                self._pinned_free[block] = None
        return bool(blocks)

    def unpin(self, value: Hash) -> None:
        """End a pin; the block counts as just used."""
        for block in self._blocks_of(value):
            self._pins.discard(block)
            if self._pinned_free.pop(block, self) is None:
                self._cached[block] = None

    def demote(self, value: Hash) -> bool:
        """End a pin and evict this next; returns whether it is known."""
        self.unpin(value)
        blocks = self._blocks_of(value)
        for block in blocks:
            if block in self._cached:
                self._cached.move_to_end(block, last=False)
        return bool(blocks)

    def forget(self, value: Hash) -> bool:
        """Make a hash unfindable now, even where a sequence still holds the block; returns whether it was known."""
        blocks = self._blocks_of(value)
        for block in blocks:
            if not self._refs[block]:
                del self._place(block)[block]
                self._plain.append(block)
            self._unname(block)
        return bool(blocks)

    def all_known(self) -> list[Hash]:
        """Return every hash that can be found."""
        return list(self._known)

    def statistics(self) -> PoolStatistics:
        """Return how many blocks are where."""
        cached, pinned = len(self._cached), len(self._pinned_free)
        return PoolStatistics(self.held, len(self._plain), cached, pinned, self.evictions)

    def check_integrity(self) -> None:
        """Assert what the module's description says."""
        free = [*self._plain, *self._cached, *self._pinned_free]
        assert len(free) == len(set(free)) == self.free
        assert {block for block in range(self.blocks) if not self._refs[block]} == set(free)
        assert all(count >= 0 for count in self._refs)
        assert all(self._hash[block] is None for block in self._plain)
        assert all(self._hash[block] is not None for block in (*self._cached, *self._pinned_free, *self._pins))
        named = {block: value for block, value in enumerate(self._hash) if value is not None}
        assert {block: value for value in self._known for block in self._blocks_of(value)} == named
        assert set(self._pinned_free) <= self._pins and not self._pins & set(self._cached)

    # Inside

    def _blocks_of(self, value: Hash) -> list[int]:
        found = self._known.get(value, [])
        return [found] if isinstance(found, int) else list(found)

    def _place(self, block: int) -> OrderedDict[int, None]:
        """Return where a free block with a hash is."""
        return self._pinned_free if block in self._pins else self._cached

    def _unname(self, block: int) -> None:
        value = self._hash[block]
        assert value is not None
        self._hash[block] = None
        self._pins.discard(block)
        rest = [other for other in self._blocks_of(value) if other != block]
        if rest:
            self._known[value] = rest if len(rest) > 1 else rest[0]
            return
        del self._known[value]
        if self._forgotten is not None:
            self._forgotten(value)
