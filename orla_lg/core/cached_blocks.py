"""What the engine's own events say of the pieces: which blocks hold them, and what goes with a block given up.

An event names a block by a hash of its tokens and all before them, and the block before it; so where a block lies in
its prompt follows from the chain. Whose prompt that is, the request said: its label is the workflow. A workflow with
several calls in flight has several prompts, and which of them a block belongs to cannot be told: each of them is cut
when it goes. All doubts are resolved like that: rather too little is believed than too much.

Blocks that are found, not computed, are told by no event. Where they hold the pieces of other calls, these are the
same pieces; where only the tokens are the same (two messages that begin alike), the first block that a call does
compute leads back to them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from orla_lg.core.control import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent
from orla_lg.core.pieces import Piece
from orla_lg.core.residency import Residency, Stay

MAX_LATE = 10_000
"""Calls that ended, and whose last events we wait for; of more, the oldest are not waited for."""


@dataclass(eq=False, slots=True)
class Block:
    """A block in the engine's cache."""

    parent: Hashable | None
    begin_tokens: int
    """How much of its prompt lies before it; too little where its beginning is not known."""
    end_tokens: int
    leaves: tuple[Piece, ...]
    """The ends of the calls that it may lie on the path of."""
    copies: int = 1
    """Calls that computed the same side by side each have their own."""


@dataclass(eq=False, slots=True)
class Expected:
    """A call whose blocks are being told, or soon will be."""

    stay: Stay
    tip_tokens: float | None = None
    """Where its last block ends; ``None`` while it is in flight."""


@dataclass(frozen=True, slots=True)
class BlockStatistics:
    """What the events told so far."""

    blocks: int
    """In the cache, as far as events told."""
    stored: int
    removed: int
    unknown: int
    """Blocks given up of which nobody had told that they were there."""
    gaps: int
    """How often events were lost for good."""


class CachedBlocks:
    """The blocks of one engine's cache, and the pieces that lie in them. Under the backend's lock.

    Does nothing until ``listening`` is set: without events nobody asks for it.
    """

    def __init__(self, cache: Residency) -> None:
        self.listening = False
        self._cache = cache
        self._blocks: dict[Hashable, Block] = {}
        self._calls: dict[str, list[Expected]] = {}
        self._late: OrderedDict[Expected, str] = OrderedDict()
        self._stored = self._removed = self._unknown = self._gaps = 0

    # Calls

    def began(self, workflow: str, stay: Stay) -> None:
        """Note that a call is about to go: blocks that its workflow stores from now on may be its own."""
        if self.listening:
            self._calls.setdefault(workflow, []).append(Expected(stay))

    def ended(self, workflow: str, stay: Stay, cached_tokens: int | None, *, reached: bool) -> None:
        """Note that a call ended, after ``Residency.end``; events of its last blocks may still be on their way.

        Args:
            workflow: Whose.
            stay: The call's.
            cached_tokens: Of its prompt, what the engine found; ``None`` where it did not say.
            reached: Whether it can have got to the engine.
        """
        for call in self._calls.get(workflow, ()):
            if call.stay is stay:
                call.tip_tokens = sum(piece.tokens for piece in stay.answer.path())
                if not reached or call.tip_tokens < (cached_tokens or 0) + self._block_tokens:
                    self._done(workflow, call)
                    return
                self._late[call] = workflow
        while len(self._late) > MAX_LATE:
            call, name = next(iter(self._late.items()))
            self._done(name, call)

    def _done(self, workflow: str, call: Expected) -> None:
        """Expect no more blocks of a call."""
        self._late.pop(call, None)
        self._calls[workflow].remove(call)
        if not self._calls[workflow]:
            del self._calls[workflow]

    @property
    def _block_tokens(self) -> int:
        return self._cache.witness.block_tokens or 1

    # Events

    def apply(self, event: KVEvent) -> None:
        """Take in what the engine told next."""
        match event:
            case BlocksStored():
                self._store(event)
            case BlocksRemoved():
                self._removed += len(event.hashes)
                for value in event.hashes:
                    self._remove(value)
            case BlocksCleared():
                self._gaps += event.missed
                self._blocks.clear()
                self._cache.shrink(0.0)  # what calls in flight use, they compute

    def _store(self, event: BlocksStored) -> None:
        self._stored += len(event.hashes)
        self._cache.witness.block_tokens = event.block_tokens
        before = None if event.parent is None else self._blocks.get(event.parent)
        begin = 0 if before is None else before.end_tokens
        end = begin + event.block_tokens * len(event.hashes)
        calls = list(self._candidates(event.workflow, begin + event.block_tokens))
        leaves = tuple(call.stay.answer for call in calls)
        self._lead_back(before, calls)
        parent = event.parent
        for nth, value in enumerate(event.hashes):
            at = begin + nth * event.block_tokens
            known = self._blocks.get(value)
            if known is None:
                self._blocks[value] = Block(parent, at, at + event.block_tokens, leaves)
            else:
                known.copies += 1
                known.leaves += tuple(leaf for leaf in leaves if leaf not in known.leaves)
            parent = value
        for call in calls:
            if call.tip_tokens is not None and end + event.block_tokens > call.tip_tokens:
                self._done(event.workflow or "", call)

    def _candidates(self, workflow: str | None, end_tokens: int) -> Iterator[Expected]:
        """Return the calls that a block may be of; not those that a later call has gone on from."""
        calls = self._calls.get(workflow or "", ())
        inside = {piece for call in calls for piece in call.stay.path} if len(calls) > 1 else set()
        for call in calls:
            fits = call.tip_tokens is None or call.tip_tokens >= end_tokens
            if fits and call.stay.answer not in inside:
                yield call

    def _lead_back(self, block: Block | None, calls: list[Expected]) -> None:
        """Let blocks that calls found, though we did not believe it, lie on their paths."""
        for call in calls:
            leaf, each = call.stay.answer, block
            while each is not None and each.end_tokens > call.stay.expected_tokens and leaf not in each.leaves:
                each.leaves += (leaf,)
                each = None if each.parent is None else self._blocks.get(each.parent)

    def _remove(self, value: Hashable) -> None:
        block = self._blocks.get(value)
        if block is None:
            self._unknown += 1  # stored before we listened: something goes, and most likely what is next
            self._cache.shrink(self._cache.tokens - self._block_tokens)
            return
        block.copies -= 1
        if block.copies:
            return
        del self._blocks[value]
        for leaf in block.leaves:
            self._cache.shelf.cut(leaf, block.begin_tokens)

    def statistics(self) -> BlockStatistics:
        """Return a snapshot."""
        return BlockStatistics(len(self._blocks), self._stored, self._removed, self._unknown, self._gaps)

    def check_integrity(self) -> None:
        """Assert the invariants."""
        assert all(block.copies > 0 and block.begin_tokens < block.end_tokens for block in self._blocks.values())
        calls = [call for each in self._calls.values() for call in each]
        assert all(self._calls.values()) and len(calls) == len(set(calls))
        assert set(self._late) == {call for call in calls if call.tip_tokens is not None}
        assert len(self._late) <= MAX_LATE
