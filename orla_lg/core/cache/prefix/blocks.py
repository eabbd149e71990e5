"""What the engine's own events show of the pieces: which blocks hold them, and what goes with a block given up.

An event names a block by a hash of its tokens and all before them, and the block before it; so where a block lies in
its prompt follows from the chain. The request's label is the workflow of that prompt. A workflow with several calls
in flight has several prompts, and which of them a block belongs to is not known: each of them is cut when it goes.
All doubts are resolved like that: rather too little is believed than too much.

Blocks that are found, not computed, have no event. Where they hold the pieces of other calls, these are the
same pieces; where only the tokens are the same (two messages that begin alike), the first block that a call does
compute leads back to them. Blocks that are computed though they are there already (equal answers to equal prompts)
have events on some engines only (vLLM). So what had no event of a call that ended may lie in any block that follows
what it shares with others, and is believed until one of those goes. (What equal calls of one workflow at once leave
may be believed for too long: blocks of the one look like blocks of the other.)

An answer may come back in the next prompt in other tokens than it was generated in: without what was thought before
it, for one. The blocks that were computed for the prompt then stand for it, and the others for nothing any more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from orla_lg.core.cache.prefix.nodes import PrefixNode
from orla_lg.core.cache.prefix.tree import CacheHandle, PrefixTree
from orla_lg.core.engine.capabilities import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent

MAX_LATE = 10_000
"""Ended calls with last events to come; of more, the oldest are not waited for."""


@dataclass(eq=False, slots=True)
class CachedBlock:
    """A block in the engine's cache."""

    parent: Hashable | None
    begin_tokens: int
    """How much of its prompt lies before it; too little where its beginning is not known."""
    end_tokens: int
    leaves: tuple[PrefixNode, ...]
    """The ends of the calls that it may lie on the path of."""
    copies: int = 1
    """Calls that computed the same side by side each have their own."""


@dataclass(eq=False, slots=True)
class ExpectedBlocks:
    """A call with events of its blocks coming in, or soon to come."""

    stay: CacheHandle
    began: int
    """Calls and ends are numbered in their order."""
    known_tokens: float
    """Of its prompt, what was believed to be there, and did not go before the call came to it."""
    ended: int | None = None
    tip_tokens: float | None = None
    """Where its last block ends; ``None`` while it is in flight."""
    told_tokens: float = 0.0
    """Up to there, its blocks are known: by events, or since they hold what it shares with calls before it."""

    @property
    def anchor(self) -> PrefixNode | None:
        """The last piece that it shares with calls before it."""
        fresh, path = self.stay.fresh, self.stay.path
        return fresh[0].parent if fresh else path[-1] if path else None


@dataclass(frozen=True, slots=True)
class BlockStatistics:
    """Counts of the events so far."""

    blocks: int
    """In the cache, by the events."""
    stored: int
    removed: int
    unknown: int
    """Blocks given up without an event before that they were stored."""
    gaps: int
    """How often events were lost for good."""


class CachedBlocks:
    """The blocks of one engine's cache, and the pieces that lie in them. Under the backend's lock.

    Does nothing until ``listening`` is set: without events nothing asks for it.
    """

    def __init__(self, cache: PrefixTree) -> None:
        self._cache = cache
        self._blocks: dict[Hashable, CachedBlock] = {}
        self._tips: dict[PrefixNode, Hashable] = {}
        """The last block with an event of each call, by the end of the call."""
        self._calls: dict[str, list[ExpectedBlocks]] = {}
        self._numbers = 0
        self._late: OrderedDict[ExpectedBlocks, str] = OrderedDict()
        self._late_after: dict[PrefixNode | None, dict[ExpectedBlocks, None]] = {}
        """The same, by their anchors."""
        self._stored = self._removed = self._unknown = self._gaps = 0

    @property
    def listening(self) -> bool:
        """Whether events are coming in."""
        return self._cache.told

    @listening.setter
    def listening(self, told: bool) -> None:
        self._cache.told = told

    @property
    def follows_calls(self) -> bool:
        """Whether blocks of a call are awaited."""
        return bool(self._calls)

    # Calls

    def began(self, workflow: str, stay: CacheHandle) -> None:
        """Note that a call is about to go: blocks that its workflow stores from now on may be its own."""
        if self.listening:
            self._calls.setdefault(workflow, []).append(ExpectedBlocks(stay, self._next(), stay.expected_tokens))

    def ended(self, workflow: str, stay: CacheHandle, cached_tokens: int | None, *, reached: bool) -> None:
        """Note that a call ended, after ``PrefixTree.end``; events of its last blocks may still be on their way.

        Args:
            workflow: The call's.
            stay: The call's.
            cached_tokens: Of its prompt, what the engine found; ``None`` where it did not say.
            reached: Whether it can have got to the engine.
        """
        for call in self._calls.get(workflow, ()):
            if call.stay is stay:
                call.ended = self._next()
                call.tip_tokens = sum(piece.tokens for piece in stay.answer.path())
                shared_tokens = 0.0 if call.anchor is None else sum(piece.tokens for piece in call.anchor.path())
                call.told_tokens = max(call.told_tokens, min(shared_tokens, call.known_tokens))
                if not reached or self._is_told(call):
                    self._done(workflow, call)
                    return
                self._late[call] = workflow
                self._late_after.setdefault(call.anchor, {})[call] = None
        while len(self._late) > MAX_LATE:
            call, name = next(iter(self._late.items()))
            self._done(name, call)

    def _next(self) -> int:
        self._numbers += 1
        return self._numbers

    def _done(self, workflow: str, call: ExpectedBlocks) -> None:
        """Expect no more blocks of a call."""
        if self._late.pop(call, None) is not None:
            beside = self._late_after[call.anchor]
            del beside[call]
            if not beside:
                del self._late_after[call.anchor]
        self._calls[workflow].remove(call)
        if not self._calls[workflow]:
            del self._calls[workflow]

    @property
    def _block_tokens(self) -> int:
        return self._cache.witness.block_tokens or 1

    # Events

    def apply(self, event: KVEvent) -> None:
        """Take in the engine's next event."""
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
                self._tips.clear()
                self._cache.shrink(0.0)  # what calls in flight use, they compute

    def _store(self, event: BlocksStored) -> None:
        self._stored += len(event.hashes)
        self._cache.witness.block_tokens = event.block_tokens
        before = None if event.parent is None else self._blocks.get(event.parent)
        begin = 0 if before is None else before.end_tokens
        end = begin + event.block_tokens * len(event.hashes)
        calls = list(self._candidates(event.workflow, begin + event.block_tokens))
        leaves = tuple(call.stay.answer for call in calls)
        self._lead_back(before, calls, event.workflow or "")
        if before is not None and len(calls) == 1:
            self._replace(before, event, calls[0].stay)
        self._tips.update(dict.fromkeys(leaves, event.hashes[-1]))
        parent = event.parent
        for nth, value in enumerate(event.hashes):
            at = begin + nth * event.block_tokens
            known = self._blocks.get(value)
            if known is None:
                self._blocks[value] = CachedBlock(parent, at, at + event.block_tokens, leaves)
            else:
                known.copies += 1
                known.leaves += tuple(leaf for leaf in leaves if leaf not in known.leaves)
            parent = value
        for call in calls:
            if len(calls) == 1:
                call.told_tokens = max(call.told_tokens, end)
            reaches = call.tip_tokens is not None and end + event.block_tokens > call.tip_tokens
            if reaches and not any(other.began > (call.ended or 0) for other in calls):  # else it is of a later call
                self._done(event.workflow or "", call)

    def _candidates(self, workflow: str | None, end_tokens: int) -> Iterator[ExpectedBlocks]:
        """Return the calls that a block may be of; not those that a later call has gone on from."""
        calls = self._calls.get(workflow or "", ())
        inside = {piece for call in calls for piece in call.stay.path} if len(calls) > 1 else set()
        for call in calls:
            fits = call.tip_tokens is None or call.tip_tokens >= end_tokens
            if fits and call.stay.answer not in inside:
                yield call

    def _lead_back(self, block: CachedBlock | None, calls: list[ExpectedBlocks], workflow: str) -> None:
        """Put blocks that calls found unexpectedly, or without an event, on their paths."""
        for call in calls:
            leaf, each, path = call.stay.answer, block, set(call.stay.path)
            before = [late for late in self._calls[workflow] if late.ended is not None and late.stay.answer in path]
            known_tokens = min([call.known_tokens, *(late.told_tokens for late in before)])
            while each is not None and each.end_tokens > known_tokens and leaf not in each.leaves:
                each.leaves += (leaf,)
                each = None if each.parent is None else self._blocks.get(each.parent)
            for late in before if len(calls) == 1 else ():
                self._done(workflow, late)

    def _replace(self, before: CachedBlock, event: BlocksStored, stay: CacheHandle) -> None:
        """Let blocks stand for nothing of a call that did not find them, and computed others in their place."""
        for piece in stay.path:
            tip = self._tips.get(piece)
            if tip is None or len(list(piece.children())) > 1:  # another prompt may go on from what was generated
                continue
            beyond = list(self._beyond(tip, before))
            if beyond and self._blocks[beyond[-1]].parent == event.parent and beyond[-1] != event.hashes[0]:
                del self._tips[piece]
                for value in beyond:
                    block = self._blocks[value]
                    block.leaves = tuple(leaf for leaf in block.leaves if leaf is not piece)

    def _beyond(self, tip: Hashable | None, before: CachedBlock) -> Iterator[Hashable]:
        """Return the blocks from a tip back to where another block ends."""
        block = self._blocks.get(tip)
        while block is not None and block.end_tokens > before.end_tokens:
            yield tip
            tip = block.parent
            block = self._blocks.get(tip)

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
        for call in self._may_lie_in(block):
            call.tip_tokens = min(call.tip_tokens or 0.0, block.begin_tokens)
            self._cache.shelf.cut(call.stay.answer, block.begin_tokens)
            if self._is_told(call):
                self._done(self._late[call], call)
        for leaf in block.leaves:
            used = self._cache.shelf.cut(leaf, block.begin_tokens)
            if used is not None:
                self._went_before(used, block.begin_tokens)
            if self._tips.get(leaf) == value:
                self._step_back(leaf, block.parent)

    def _went_before(self, used: PrefixNode, begin_tokens: float) -> None:
        """Note that calls in flight do not find all that was believed when they went."""
        for call in (call for calls in self._calls.values() for call in calls if call.ended is None):
            if used in call.stay.path:
                call.known_tokens = min(call.known_tokens, begin_tokens)

    def _step_back(self, leaf: PrefixNode, parent: Hashable | None) -> None:
        before = None if parent is None else self._blocks.get(parent)
        if before is not None and leaf in before.leaves:
            self._tips[leaf] = parent
        else:
            del self._tips[leaf]

    def _may_lie_in(self, block: CachedBlock) -> list[ExpectedBlocks]:
        """Return the ended calls of which tokens without an event may lie in a block."""
        if not self._late:
            return []
        before = {None, *(piece for leaf in block.leaves for piece in leaf.path())} & self._late_after.keys()
        late = [call for piece in before for call in self._late_after[piece]]
        begin, end = block.begin_tokens, block.end_tokens
        return [call for call in late if call.told_tokens < end and begin < (call.tip_tokens or 0.0)]

    def _is_told(self, call: ExpectedBlocks) -> bool:
        """Whether all full blocks of a call that ended are known."""
        return call.tip_tokens is not None and call.told_tokens + self._block_tokens > call.tip_tokens

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
        assert sum(map(len, self._late_after.values())) == len(self._late) and all(self._late_after.values())
        assert all(call in self._late_after[call.anchor] for call in self._late)
        assert all(leaf in self._blocks[tip].leaves for leaf, tip in self._tips.items())
