"""A message's tokens in an engine's cache, and the LRU lists in which idle ones wait to be given up.

There may be hundreds of thousands of them, so a piece carries its own links: its place in a list, and its place among
the pieces that come after the same beginning. Neither costs an object of its own, and both change in constant time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

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
    """In its list: given up sooner."""
    behind: PrefixNode | None = None
    """In its list: given up later."""
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

    def append(self, piece: PrefixNode) -> None:
        """Put a piece behind all others."""
        piece.before, piece.behind = self.last, None
        if self.last is None:
            self.first = piece
        else:
            self.last.behind = piece
        self.last = piece

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
