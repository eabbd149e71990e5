"""What workflows count on finding in an engine's cache, and which of them give that up first for others.

A workflow *owns* the path of every stage's newest call. While it *holds*, others must leave room for that (a claim);
a workflow that is released still owns what is there, and may find it again. What the engine did for a workflow
(freed, demoted, pinned) is noted here and carried to the pieces that it owns alone.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf

from orla_lg.core.cache.gate import PATIENCE_S
from orla_lg.core.cache.prefix.eviction import PrefixNode
from orla_lg.core.cache.prefix.tree import PrefixTree
from orla_lg.core.memory.events import Doing, Holding

LEFT_BEHIND = 16
"""So many of a workflow's newest abandoned branches are remembered as its own, at least; at most twice as many."""

MARK_EVERY_S = 10.0
"""How finely the age of what no workflow owns is known."""


LAPSES_AFTER_S: Mapping[Doing, float] = {Doing.TOOL: PATIENCE_S, Doing.HUMAN: 0.0, Doing.IDLE: 0.0}
"""Of such a wait, others may have the place."""


@dataclass(eq=False, slots=True)
class Reference:
    """What a workflow counts on finding in the cache."""

    workflow: str
    leaves: dict[str, PrefixNode] = field(default_factory=dict)
    """By stage, the end of its last call."""
    left: list[PrefixNode] = field(default_factory=list)
    """Ends of earlier calls that no later one goes on from."""
    holds: bool = False
    """Its leaves are referenced; else their place is free to all."""
    in_flight: int = 0
    doing: Doing = Doing.GENERATING
    since_s: float = 0.0
    grows_tokens: float = 0.0
    """What its longest context is expected to grow by until its run ends."""
    pinned: list[PrefixNode] = field(default_factory=list)
    """Leaves that the engine promised to keep."""
    pinned_until_s: float = -inf

    def pieces(self) -> set[PrefixNode]:
        """Return all that it counts on."""
        return {piece for leaf in self.leaves.values() for piece in leaf.path()}


class References:
    """The references to one engine's cache, by workflow. ``check_integrity`` asserts the invariants of the parts."""

    def __init__(self, cache: PrefixTree) -> None:
        self.by_workflow: OrderedDict[str, Reference] = OrderedDict()
        """Of those without a call in flight, the one that turned longest ago is first."""
        self.grows_tokens = 0.0
        """What all of them are expected to grow by."""
        self.lapsed = 0
        """How many were given up for others."""
        self.cache = cache
        self._resting: dict[Doing, OrderedDict[Reference, None]] = {doing: OrderedDict() for doing in Doing}
        """Those that hold, without a call in flight, by what they wait for; the one that waits longest is first."""
        self._pinned: dict[Reference, None] = {}
        self._marks: deque[tuple[float, float]] = deque()
        """Times, and how much had gone out of use by then: they tell the age of a piece."""

    def __contains__(self, workflow: str) -> bool:
        return workflow in self.by_workflow

    # Calls

    def enter(self, workflow: str, grows_tokens: float) -> None:
        """Note that a call of the workflow goes; after it, its context is expected to grow by so much."""
        reference = self.by_workflow.get(workflow)
        if reference is None:
            reference = self.by_workflow[workflow] = Reference(workflow)
        self._stir(reference)
        reference.in_flight += 1
        reference.doing = Doing.GENERATING
        if grows_tokens != reference.grows_tokens:
            self._expect(reference, grows_tokens)

    def leave(self, workflow: str, stage: str, leaf: PrefixNode | None, now: float, *, followed: bool) -> None:
        """Note that a call of the workflow ended.

        Args:
            workflow: The call's.
            stage: The call's.
            leaf: The end of what it left in the cache; ``None``: nothing.
            now: Monotonic seconds.
            followed: Whether the workflow goes on, and so counts on that.
        """
        reference = self.by_workflow[workflow]
        reference.in_flight -= 1
        self._mark(now)
        if leaf is not None and followed:
            self._keep(reference, stage, leaf)
        if reference.in_flight:
            return
        if followed and reference.leaves:
            self._rest(reference, Doing.TOOL, now)
        else:
            self.forget(workflow)

    def _keep(self, reference: Reference, stage: str, leaf: PrefixNode) -> None:
        """Count on what the stage's last call left, and no more on what the one before did."""
        before = reference.leaves.get(stage)
        grown = before is not None and leaf.follows(before)
        until = before if grown else None
        self.cache.eviction_order.own(leaf, until)
        if reference.holds:
            self.cache.claim(leaf, until)
        if before is not None and not grown:
            self._leave_behind(reference, before)
        reference.leaves[stage] = leaf
        if not reference.holds:
            reference.holds = True
            for each in reference.leaves.values():
                self.cache.claim(each)
        if reference.pinned:
            self._pin(reference)

    def _leave_behind(self, reference: Reference, leaf: PrefixNode) -> None:
        if reference.holds:
            self.cache.disclaim(leaf)
        self.cache.eviction_order.disown(leaf)
        reference.left.append(leaf)
        if len(reference.left) >= 2 * LEFT_BEHIND:
            reference.left = [each for each in reference.left if each.alive and not each.owners][-LEFT_BEHIND:]

    def _expect(self, reference: Reference, grows_tokens: float) -> None:
        self.grows_tokens += grows_tokens - reference.grows_tokens
        reference.grows_tokens = grows_tokens

    # Between calls

    def turned(self, workflow: str, doing: Doing, now: float) -> None:
        """Note what a workflow without a call in flight waits for now."""
        reference = self.by_workflow.get(workflow)
        if reference is not None and not reference.in_flight:
            self._stir(reference)
            self._rest(reference, doing, now)

    def _rest(self, reference: Reference, doing: Doing, now: float) -> None:
        reference.doing, reference.since_s = doing, now
        self.by_workflow.move_to_end(reference.workflow)
        if reference.holds:
            self._resting[doing][reference] = None
        else:
            self._expect(reference, 0.0)

    def _stir(self, reference: Reference) -> None:
        self._resting[reference.doing].pop(reference, None)

    def lapse_one(self, now: float) -> None:
        """Drop the reference of the workflow that waits longest for a human, for nothing, or too long for a tool."""
        longest = [next(iter(self._resting[doing])) for doing in LAPSES_AFTER_S if self._resting[doing]]
        able = [reference for reference in longest if now - reference.since_s >= LAPSES_AFTER_S[reference.doing]]
        if able:
            self._release(min(able, key=lambda reference: reference.since_s))
            self.lapsed += 1

    # Giving up

    def release(self, workflow: str) -> None:
        """Let others have a workflow's cache evicted; what is not evicted it may find again."""
        if (reference := self.by_workflow.get(workflow)) is not None:
            self._release(reference)

    def _release(self, reference: Reference) -> None:
        if reference.holds:
            reference.holds = False
            for leaf in reference.leaves.values():
                self.cache.disclaim(leaf)
        if not reference.in_flight:
            self._stir(reference)
            self._expect(reference, 0.0)

    def forget(self, workflow: str) -> None:
        """Drop a workflow's reference for good; calls of it in flight go on."""
        if (reference := self.by_workflow.get(workflow)) is not None:
            self._release(reference)
            if reference.pinned:
                self._unpin(reference)
            for leaf in reference.leaves.values():
                self.cache.eviction_order.disown(leaf)
            reference.leaves, reference.left = {}, []
            if not reference.in_flight:
                del self.by_workflow[workflow]

    def forget_all(self) -> None:
        """Drop all references."""
        for workflow in list(self.by_workflow):
            self.forget(workflow)

    def forget_older_than(self, before_s: float) -> None:
        """Forget workflows that turned before then (monotonic seconds), and what was not owned or used since."""
        old = []
        for workflow, reference in self.by_workflow.items():
            if not reference.in_flight:
                if reference.since_s >= before_s:
                    break
                old.append(workflow)
        for workflow in old:
            self.forget(workflow)
        flow = -inf
        while self._marks and self._marks[0][0] < before_s:
            flow = self._marks.popleft()[1]
        for piece in [piece for piece in self.cache.eviction_order if not piece.owners and piece.idle_from < flow]:
            if piece.alive and not any(child.owners for child in piece.children()):
                self.cache.eviction_order.lose(piece)

    def _mark(self, now: float) -> None:
        if not self._marks or now - self._marks[-1][0] >= MARK_EVERY_S:
            self._marks.append((now, self.cache.flow_tokens))

    # What the engine did

    def freed(self, workflow: str) -> None:
        """Note that the engine forgot what the workflow had alone; calls of it in flight keep theirs."""
        reference = self.by_workflow.get(workflow)
        if reference is not None:
            for top in list(self._alone(reference)):
                if top.alive:
                    self.cache.eviction_order.lose(top)
            self.forget(workflow)

    def demoted(self, workflow: str) -> None:
        """Note that the engine gives up first what the workflow has alone."""
        reference = self.by_workflow.get(workflow)
        if reference is not None:
            self._unpin(reference)
            for top in list(self._alone(reference)):
                self.cache.eviction_order.demote(top)

    def pinned(self, workflow: str, until_s: float) -> None:
        """Note that the engine gives up last what the workflow has, until then (monotonic seconds)."""
        reference = self.by_workflow.get(workflow)
        if reference is not None:
            reference.pinned_until_s = until_s
            self._pin(reference)

    def _pin(self, reference: Reference) -> None:
        before, reference.pinned = reference.pinned, list(reference.leaves.values())
        for leaf in reference.pinned:
            self.cache.eviction_order.pin(leaf)
        for leaf in before:
            self.cache.eviction_order.unpin(leaf)
        if reference.pinned:
            self._pinned[reference] = None

    def _unpin(self, reference: Reference) -> None:
        self._pinned.pop(reference, None)
        for leaf in reference.pinned:
            self.cache.eviction_order.unpin(leaf)
        reference.pinned, reference.pinned_until_s = [], -inf

    def expire(self, now: float) -> None:
        """End the pins whose time is over."""
        if self._pinned:
            for reference in [reference for reference in self._pinned if reference.pinned_until_s <= now]:
                self._unpin(reference)

    def _alone(self, reference: Reference) -> Iterator[PrefixNode]:
        """Return the idle pieces where what only this workflow has begins."""
        mine = Counter(piece for leaf in reference.leaves.values() for piece in leaf.path())
        for leaf in (*reference.leaves.values(), *reference.left):
            top = None
            for piece in leaf.path():
                if piece.owners != mine[piece]:
                    break
                top = piece if piece.idle else top
            if top is not None:
                yield top

    # Looking

    def shared_tokens(self, pieces: Iterable[PrefixNode], workflow: str) -> float:
        """Return the tokens of those pieces, from the first on, that lie on the path of another workflow too."""
        mine, reference = dict[PrefixNode, int](), self.by_workflow.get(workflow)
        leaves, shared = [] if reference is None else list(reference.leaves.values()), 0.0
        for piece in pieces:
            if piece.owners <= len(leaves):  # they may all be its own
                mine = mine or Counter(each for leaf in leaves for each in leaf.path())
                if piece.owners <= mine.get(piece, 0):
                    break  # and no other one's goes on from there
            shared += piece.tokens
        return shared

    def tokens_of(self, workflow: str) -> int:
        """Return how many tokens of a workflow are believed to be in the cache."""
        holding = self.holding(workflow)
        return 0 if holding is None else holding.tokens

    def holding(self, workflow: str) -> Holding | None:
        """Return what a workflow has; ``None`` if it is not known here."""
        reference = self.by_workflow.get(workflow)
        return None if reference is None else self._holding(reference)

    def holdings(self) -> list[Holding]:
        """Return what each workflow has, the one that turned longest ago first."""
        return [self._holding(reference) for reference in self.by_workflow.values()]

    def _holding(self, reference: Reference) -> Holding:
        tokens, alone = self._sum(reference)
        obsolete = sum(piece.there_tokens for piece in self._left(reference)) if reference.left else 0.0
        return Holding(
            reference.workflow, round(tokens), round(alone), round(obsolete), reference.doing, reference.since_s
        )

    @staticmethod
    def _sum(reference: Reference) -> tuple[float, float]:
        """Return what lies on the workflow's paths, and what of it on no other's."""
        tokens = alone = 0.0
        if len(reference.leaves) == 1:  # as nearly always, and then there is nothing to count twice
            for piece in next(iter(reference.leaves.values())).path():
                if piece.alive:
                    tokens += piece.tokens
                    alone += piece.tokens if piece.owners == 1 else 0.0
            return tokens, alone
        mine = Counter(piece for leaf in reference.leaves.values() for piece in leaf.path())
        for piece, times in mine.items():
            tokens += piece.there_tokens
            alone += piece.there_tokens if piece.owners == times else 0.0
        return tokens, alone

    @staticmethod
    def _left(reference: Reference) -> set[PrefixNode]:
        return {piece for leaf in reference.left for piece in leaf.path() if not piece.owners}

    def check_integrity(self) -> None:
        """Assert the invariants."""
        references = set(self.by_workflow.values())
        assert all(reference.workflow == name for name, reference in self.by_workflow.items())
        assert all(reference.in_flight or reference.leaves for reference in references)
        for doing, line in self._resting.items():
            assert set(line) == {c for c in references if c.holds and not c.in_flight and c.doing is doing}
            assert list(line) == sorted(line, key=lambda reference: reference.since_s)
        quiet = [reference.since_s for reference in self.by_workflow.values() if not reference.in_flight]
        assert quiet == sorted(quiet), "whoever turned longest ago is first"
        grows = sum(reference.grows_tokens for reference in references)
        assert abs(grows - self.grows_tokens) < 1e-3 * (1 + grows), (grows, self.grows_tokens)
        self._check_pieces(references)
        if not references:
            beyond = self.cache.wanted_tokens - self.cache.in_use_tokens  # what a warm-up uses has no reference
            assert abs(beyond) < 1e-3, beyond

    def _check_pieces(self, references: set[Reference]) -> None:
        """Assert that every piece has the counts of leaves that own, reference and pin it."""
        leaves = [(leaf, reference.holds) for reference in references for leaf in reference.leaves.values()]
        owned = Counter(piece for leaf, _ in leaves for piece in leaf.path())
        claimed = Counter(piece for leaf, holds in leaves if holds for piece in leaf.path())
        pinned = Counter(piece for reference in references for leaf in reference.pinned for piece in leaf.path())
        eviction_order = self.cache.eviction_order
        for piece in {*eviction_order.pieces.values(), *eviction_order.missed.values(), *owned}:
            assert piece.owners == owned[piece], "owned by leaves that are no more, or not by those that are"
            assert piece.claims == claimed[piece]
            assert piece.pins == pinned[piece]
        assert set(self._pinned) == {reference for reference in references if reference.pinned}
