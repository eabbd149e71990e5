"""The pieces that an engine may give up: in which order, which workflows own them, and what goes when one goes.

The order is that of the engines: lines by band, in each of them whatever went out of use first in front. Pins and
demotions move pieces between bands for as long as they are idle; a call through a piece makes it usual again.

There may be hundreds of thousands of them, so a piece carries its own links: its place in a list, and its place among
the pieces that come after the same beginning. Neither costs an object of its own, and both change in constant time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from itertools import chain

MAX_OWNERS = 1000
"""Known of those that a model answered after one beginning; the oldest are forgotten."""


class EvictionBand(IntEnum):
    """Which idle pieces an engine gives up before which."""

    FIRST = 0
    """Released by their workflow, or dead on an engine that looks for that."""
    USUAL = 1
    PINNED = 2


@dataclass(eq=False, slots=True, repr=False)
class PrefixNode:
    """The tokens of one message after certain others."""

    key: object
    """Its chained hash; for an answer that no prompt repeated yet, something of its own."""
    parent: PrefixNode | None
    tokens: float
    counted: bool = False
    """The engine counted them; else they are an estimate."""
    users: int = 0
    """Calls in flight through it."""
    claims: int = 0
    """Leaves that count on it: ends of the last calls of workflows that others must leave room for."""
    owners: int = 0
    """Leaves with it on their path, whether others must leave room for it or not."""
    pins: int = 0
    """Leaves that the engine promised to keep."""
    filled: bool = False
    """Its prefill is done: a call through it had its first token, or ended."""
    alive: bool = True
    idle_from: float = 0.0
    """What ``PrefixTree.flow_tokens`` was when it was used last."""
    idle: bool = False
    """It is in a list."""
    band: EvictionBand = EvictionBand.USUAL
    """Of that list, or of the one in which it was last."""
    said: dict[str, PrefixNode | None] | None = None
    """By prompt owner, the answer that a model gave after it, as long as no prompt of that owner repeated it.
    ``None``: there were several, or one was repeated; which other one a prompt repeats is not known."""
    before: PrefixNode | None = None
    """The node before it in its list, which is given up sooner."""
    behind: PrefixNode | None = None
    """The node after it in its list, which is given up later."""
    child: PrefixNode | None = None
    """The youngest of those alive that come right after it."""
    elder: PrefixNode | None = None
    """The next older one after the same parent."""
    younger: PrefixNode | None = None

    @property
    def there_tokens(self) -> float:
        """What is believed to be there."""
        return self.tokens if self.alive else 0.0

    def answer_to(self, prompt_owner: str) -> PrefixNode | None:
        """Return what a model said to somebody after it, if that can be told and has no name yet."""
        return None if self.said is None else self.said.get(prompt_owner)

    def answered(self, prompt_owner: str, answer: PrefixNode) -> None:
        """Expect the next message in a prompt of theirs to be that answer, if it is the only one they got here."""
        said = self.said = self.said or {}
        said[prompt_owner] = None if prompt_owner in said else answer
        if len(said) > MAX_OWNERS:
            del said[next(iter(said))]

    def follows(self, other: PrefixNode) -> bool:
        """Whether *other* is on its path."""
        piece: PrefixNode | None = self
        while piece is not None and piece is not other:
            piece = piece.parent
        return piece is other

    def path(self) -> Iterator[PrefixNode]:
        """Return this piece and all before it, the nearest first."""
        piece: PrefixNode | None = self
        while piece is not None:
            yield piece
            piece = piece.parent

    def children(self) -> Iterator[PrefixNode]:
        """Return those alive that come right after it, the youngest first."""
        piece = self.child
        while piece is not None:
            yield piece
            piece = piece.elder

    def join(self) -> None:
        """Become the youngest child of its parent."""
        parent = self.parent
        if parent is None:
            return
        self.elder, self.younger = parent.child, None
        if parent.child is not None:
            parent.child.younger = self
        parent.child = self

    def part(self) -> None:
        """Be a child of its parent no more."""
        if self.younger is not None:
            self.younger.elder = self.elder
        elif self.parent is not None and self.parent.child is self:
            self.parent.child = self.elder
        if self.elder is not None:
            self.elder.younger = self.younger
        self.elder = self.younger = None


class LruList:
    """Idle pieces of one band, those that are given up first in front."""

    __slots__ = ("first", "last")

    def __init__(self) -> None:
        self.first: PrefixNode | None = None
        self.last: PrefixNode | None = None

    def __iter__(self) -> Iterator[PrefixNode]:
        piece = self.first
        while piece is not None:
            yield piece
            piece = piece.behind

    def append(self, *pieces: PrefixNode) -> None:
        """Put pieces behind all others, in this order."""
        last = self.last
        for piece in pieces:
            piece.before, piece.behind = last, None
            if last is None:
                self.first = piece
            else:
                last.behind = piece
            last = piece
        self.last = last

    def remove(self, piece: PrefixNode) -> None:
        """Take a piece out, wherever it is."""
        before, behind = piece.before, piece.behind
        if before is None:
            self.first = behind
        else:
            before.behind = behind
        if behind is None:
            self.last = before
        else:
            behind.before = before
        piece.before = piece.behind = None


class Eviction(StrEnum):
    """In which order an engine gives up what is idle."""

    LRU = "lru"
    """What was used longest ago first."""
    BANDED = "banded"
    """What no workflow owns first, then by kind: that one piece is lost says nothing about those used before it."""


class EvictionOrder:
    """The pieces of one engine that are believed to be there, and those that are missed.

    Every piece in ``pieces`` is alive and so is its parent; idle ones are in exactly one line. ``missed`` has what
    was lost though a workflow owns it.
    """

    def __init__(self, order: Eviction = Eviction.LRU) -> None:
        self.order = order
        self.pieces: dict[object, PrefixNode] = {}
        self.missed: dict[object, PrefixNode] = {}
        self.changes = 0
        """Grows with each change of what is there, in use or missed, and of how long it is."""
        self.idle_tokens = 0.0
        self.obsolete_tokens = 0.0
        """Tokens of idle nodes that no workflow owns."""
        self._lines = tuple(LruList() for _ in EvictionBand)

    def __iter__(self) -> Iterator[PrefixNode]:
        """Return the idle pieces, those that the engine gives up first in front."""
        return chain.from_iterable(self._lines)

    def first(self) -> PrefixNode | None:
        """Return what the engine gives up next."""
        for line in self._lines:
            if line.first is not None:
                return line.first
        return None

    # Coming and going

    def live(self, piece: PrefixNode) -> None:
        """Believe that a piece is there, or will be when the call that brings it is through."""
        self.missed.pop(piece.key, None)
        piece.alive = True
        self.pieces[piece.key] = piece
        piece.join()

    def put(self, pieces: Iterable[PrefixNode]) -> None:
        """Let pieces be given up from now on, in this order, after all others of their bands."""
        unowned = EvictionBand.FIRST if self.order is Eviction.BANDED else EvictionBand.USUAL
        idle_tokens = obsolete_tokens = 0.0
        bands: tuple[list[PrefixNode], ...] = ([], [], [])
        for piece in pieces:
            band = EvictionBand.PINNED if piece.pins else EvictionBand.USUAL if piece.owners else unowned
            bands[band].append(piece)
            piece.band = band
            piece.idle = True
            idle_tokens += piece.tokens
            if not piece.owners:
                obsolete_tokens += piece.tokens
        for line, ones in zip(self._lines, bands, strict=True):
            line.append(*ones)
        self.idle_tokens += idle_tokens
        self.obsolete_tokens += obsolete_tokens

    def take(self, pieces: Iterable[PrefixNode]) -> None:
        """Let idle pieces not be given up: a call uses them."""
        idle_tokens = obsolete_tokens = 0.0
        for piece in pieces:
            piece.idle = False
            self._lines[piece.band].remove(piece)
            idle_tokens += piece.tokens
            if not piece.owners:
                obsolete_tokens += piece.tokens
        self.idle_tokens -= idle_tokens
        self.obsolete_tokens -= obsolete_tokens

    def lose(self, piece: PrefixNode) -> None:
        """Believe a piece gone, and all that comes after it: nothing finds that any more.

        There may be thousands after it, so this is as plain as can be, and leaves the links that die with a parent.
        """
        piece.part()
        self.changes += 1
        pieces, lines, lost = self.pieces, self._lines, [piece]
        idle_tokens = obsolete_tokens = 0.0
        for each in lost:  # which grows meanwhile
            child, each.child = each.child, None
            while child is not None:
                lost.append(child)
                elder, child.elder, child.younger = child.elder, None, None
                child = elder
            if each.idle:
                each.idle = False
                lines[each.band].remove(each)
                idle_tokens += each.tokens
                if not each.owners:
                    obsolete_tokens += each.tokens
            each.alive = False
            if pieces.get(each.key) is each:
                del pieces[each.key]
            if each.owners and not each.users and each.key not in pieces:
                self.missed[each.key] = each
        self.idle_tokens -= idle_tokens
        self.obsolete_tokens -= obsolete_tokens

    def lose_older(self, idle_from: float) -> None:
        """Believe gone whatever is given up before a piece that was idle from then on."""
        first, usual = self._lines[EvictionBand.FIRST], self._lines[EvictionBand.USUAL]
        while first.first is not None:
            self.lose(first.first)
        while usual.first is not None and usual.first.idle_from < idle_from:
            self.lose(usual.first)

    # Owners

    def own(self, leaf: PrefixNode, until: PrefixNode | None = None) -> None:
        """Note that a workflow's newest call ended in *leaf*; what lies before *until* it owns already."""
        piece: PrefixNode | None = leaf
        while piece is not None and piece is not until:
            piece.owners += 1
            if piece.owners == 1 and piece.idle:
                self.obsolete_tokens -= piece.tokens
                if self.order is Eviction.BANDED:
                    self._move(piece)
            piece = piece.parent

    def disown(self, leaf: PrefixNode) -> None:
        """Note that it did not, or is no longer the newest."""
        each: PrefixNode | None = leaf
        while each is not None:
            piece, each = each, each.parent
            piece.owners -= 1
            if piece.owners:
                continue
            if piece.idle:
                self.obsolete_tokens += piece.tokens
                if self.order is Eviction.BANDED:
                    self._move(piece)
            elif not piece.alive and self.missed.get(piece.key) is piece:
                del self.missed[piece.key]
                self.changes += 1

    def _move(self, piece: PrefixNode) -> None:
        """Put an idle piece where those like it wait, on an engine whose order depends on owners."""
        if not piece.pins:
            self._lines[piece.band].remove(piece)
            piece.band = EvictionBand.USUAL if piece.owners else EvictionBand.FIRST
            self._lines[piece.band].append(piece)

    def pin(self, leaf: PrefixNode) -> None:
        """Believe that the path to a piece is given up last."""
        for piece in leaf.path():
            piece.pins += 1
            if piece.idle and piece.pins == 1:
                self._put_again(piece)

    def unpin(self, leaf: PrefixNode) -> None:
        """Believe that it is not; it counts as just used."""
        for piece in leaf.path():
            piece.pins -= 1
            if piece.idle and not piece.pins:
                self._put_again(piece)

    def _put_again(self, piece: PrefixNode) -> None:
        self.take([piece])
        self.put([piece])

    def demote(self, piece: PrefixNode) -> None:
        """Believe that an idle piece and all that comes after it are given up first, the end before the beginning."""
        below, order = [piece], list[PrefixNode]()
        while below:
            order.append(below.pop())
            below.extend(order[-1].children())
        for each in reversed(order):
            if each.idle and not each.pins:
                self._lines[each.band].remove(each)
                each.band = EvictionBand.FIRST
                self._lines[EvictionBand.FIRST].append(each)

    def check_integrity(self) -> None:
        """Assert what the class says."""
        idle = list(self)
        assert len(idle) == len(set(idle)) == sum(piece.idle for piece in self.pieces.values())
        for band, line in zip(EvictionBand, self._lines, strict=True):
            assert all(piece.idle and piece.alive and not piece.users and piece.band is band for piece in line)
        for key, piece in self.pieces.items():
            assert piece.alive and piece.key == key and key not in self.missed
            assert piece.parent is None or not piece.parent.alive or piece in piece.parent.children()
            assert piece.parent is None or piece.parent.alive or piece.users, "nothing finds what is after a gap"
        assert all(not piece.alive and piece.owners and not piece.users for piece in self.missed.values())
        assert all(self.missed[piece.key] is piece for piece in self.missed.values())
        for kept, ones in (
            (self.idle_tokens, idle),
            (self.obsolete_tokens, [piece for piece in idle if not piece.owners]),
        ):
            assert abs(sum(piece.there_tokens for piece in ones) - kept) < 1e-3 * (1 + kept)
