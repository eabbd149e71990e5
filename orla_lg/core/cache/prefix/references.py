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
        claim = self.by_workflow.get(workflow)
        if claim is None:
            claim = self.by_workflow[workflow] = Reference(workflow)
        self._stir(claim)
        claim.in_flight += 1
        claim.doing = Doing.GENERATING
        if grows_tokens != claim.grows_tokens:
            self._expect(claim, grows_tokens)

    def leave(self, workflow: str, stage: str, leaf: PrefixNode | None, now: float, *, followed: bool) -> None:
        """Note that a call of the workflow ended.

        Args:
            workflow: The call's.
            stage: The call's.
            leaf: The end of what it left in the cache; ``None``: nothing.
            now: Monotonic seconds.
            followed: Whether the workflow goes on, and so counts on that.
        """
        claim = self.by_workflow[workflow]
        claim.in_flight -= 1
        self._mark(now)
        if leaf is not None and followed:
            self._keep(claim, stage, leaf)
        if claim.in_flight:
            return
        if followed and claim.leaves:
            self._rest(claim, Doing.TOOL, now)
        else:
            self.forget(workflow)

    def _keep(self, claim: Reference, stage: str, leaf: PrefixNode) -> None:
        """Count on what the stage's last call left, and no more on what the one before did."""
        before = claim.leaves.get(stage)
        grown = before is not None and leaf.follows(before)
        until = before if grown else None
        self.cache.shelf.own(leaf, until)
        if claim.holds:
            self.cache.claim(leaf, until)
        if before is not None and not grown:
            self._leave_behind(claim, before)
        claim.leaves[stage] = leaf
        if not claim.holds:
            claim.holds = True
            for each in claim.leaves.values():
                self.cache.claim(each)
        if claim.pinned:
            self._pin(claim)

    def _leave_behind(self, claim: Reference, leaf: PrefixNode) -> None:
        if claim.holds:
            self.cache.disclaim(leaf)
        self.cache.shelf.disown(leaf)
        claim.left.append(leaf)
        if len(claim.left) >= 2 * LEFT_BEHIND:
            claim.left = [each for each in claim.left if each.alive and not each.owners][-LEFT_BEHIND:]

    def _expect(self, claim: Reference, grows_tokens: float) -> None:
        self.grows_tokens += grows_tokens - claim.grows_tokens
        claim.grows_tokens = grows_tokens

    # Between calls

    def turned(self, workflow: str, doing: Doing, now: float) -> None:
        """Note what a workflow without a call in flight waits for now."""
        claim = self.by_workflow.get(workflow)
        if claim is not None and not claim.in_flight:
            self._stir(claim)
            self._rest(claim, doing, now)

    def _rest(self, claim: Reference, doing: Doing, now: float) -> None:
        claim.doing, claim.since_s = doing, now
        self.by_workflow.move_to_end(claim.workflow)
        if claim.holds:
            self._resting[doing][claim] = None
        else:
            self._expect(claim, 0.0)

    def _stir(self, claim: Reference) -> None:
        self._resting[claim.doing].pop(claim, None)

    def lapse_one(self, now: float) -> None:
        """Drop the reference of the workflow that waits longest for a human, for nothing, or too long for a tool."""
        longest = [next(iter(self._resting[doing])) for doing in LAPSES_AFTER_S if self._resting[doing]]
        able = [claim for claim in longest if now - claim.since_s >= LAPSES_AFTER_S[claim.doing]]
        if able:
            self._release(min(able, key=lambda claim: claim.since_s))
            self.lapsed += 1

    # Giving up

    def release(self, workflow: str) -> None:
        """Let others have a workflow's cache evicted; what is not evicted it may find again."""
        if (claim := self.by_workflow.get(workflow)) is not None:
            self._release(claim)

    def _release(self, claim: Reference) -> None:
        if claim.holds:
            claim.holds = False
            for leaf in claim.leaves.values():
                self.cache.disclaim(leaf)
        if not claim.in_flight:
            self._stir(claim)
            self._expect(claim, 0.0)

    def forget(self, workflow: str) -> None:
        """Drop a workflow's reference for good; calls of it in flight go on."""
        if (claim := self.by_workflow.get(workflow)) is not None:
            self._release(claim)
            if claim.pinned:
                self._unpin(claim)
            for leaf in claim.leaves.values():
                self.cache.shelf.disown(leaf)
            claim.leaves, claim.left = {}, []
            if not claim.in_flight:
                del self.by_workflow[workflow]

    def forget_all(self) -> None:
        """Drop all references."""
        for workflow in list(self.by_workflow):
            self.forget(workflow)

    def forget_older_than(self, before_s: float) -> None:
        """Forget workflows that turned before then (monotonic seconds), and what was not owned or used since."""
        old = []
        for workflow, claim in self.by_workflow.items():
            if not claim.in_flight:
                if claim.since_s >= before_s:
                    break
                old.append(workflow)
        for workflow in old:
            self.forget(workflow)
        flow = -inf
        while self._marks and self._marks[0][0] < before_s:
            flow = self._marks.popleft()[1]
        for piece in [piece for piece in self.cache.shelf if not piece.owners and piece.idle_from < flow]:
            if piece.alive and not any(child.owners for child in piece.children()):
                self.cache.shelf.lose(piece)

    def _mark(self, now: float) -> None:
        if not self._marks or now - self._marks[-1][0] >= MARK_EVERY_S:
            self._marks.append((now, self.cache.flow_tokens))

    # What the engine did

    def freed(self, workflow: str) -> None:
        """Note that the engine forgot what the workflow had alone; calls of it in flight keep theirs."""
        claim = self.by_workflow.get(workflow)
        if claim is not None:
            for top in list(self._alone(claim)):
                if top.alive:
                    self.cache.shelf.lose(top)
            self.forget(workflow)

    def demoted(self, workflow: str) -> None:
        """Note that the engine gives up first what the workflow has alone."""
        claim = self.by_workflow.get(workflow)
        if claim is not None:
            self._unpin(claim)
            for top in list(self._alone(claim)):
                self.cache.shelf.demote(top)

    def pinned(self, workflow: str, until_s: float) -> None:
        """Note that the engine gives up last what the workflow has, until then (monotonic seconds)."""
        claim = self.by_workflow.get(workflow)
        if claim is not None:
            claim.pinned_until_s = until_s
            self._pin(claim)

    def _pin(self, claim: Reference) -> None:
        before, claim.pinned = claim.pinned, list(claim.leaves.values())
        for leaf in claim.pinned:
            self.cache.shelf.pin(leaf)
        for leaf in before:
            self.cache.shelf.unpin(leaf)
        if claim.pinned:
            self._pinned[claim] = None

    def _unpin(self, claim: Reference) -> None:
        self._pinned.pop(claim, None)
        for leaf in claim.pinned:
            self.cache.shelf.unpin(leaf)
        claim.pinned, claim.pinned_until_s = [], -inf

    def expire(self, now: float) -> None:
        """End the pins whose time is over."""
        if self._pinned:
            for claim in [claim for claim in self._pinned if claim.pinned_until_s <= now]:
                self._unpin(claim)

    def _alone(self, claim: Reference) -> Iterator[PrefixNode]:
        """Return the idle pieces where what only this workflow has begins."""
        mine = Counter(piece for leaf in claim.leaves.values() for piece in leaf.path())
        for leaf in (*claim.leaves.values(), *claim.left):
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
        mine, claim = dict[PrefixNode, int](), self.by_workflow.get(workflow)
        leaves, shared = [] if claim is None else list(claim.leaves.values()), 0.0
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
        claim = self.by_workflow.get(workflow)
        return None if claim is None else self._holding(claim)

    def holdings(self) -> list[Holding]:
        """Return what each workflow has, the one that turned longest ago first."""
        return [self._holding(claim) for claim in self.by_workflow.values()]

    def _holding(self, claim: Reference) -> Holding:
        tokens, alone = self._sum(claim)
        obsolete = sum(piece.there_tokens for piece in self._left(claim)) if claim.left else 0.0
        return Holding(claim.workflow, round(tokens), round(alone), round(obsolete), claim.doing, claim.since_s)

    @staticmethod
    def _sum(claim: Reference) -> tuple[float, float]:
        """Return what lies on the workflow's paths, and what of it on no other's."""
        tokens = alone = 0.0
        if len(claim.leaves) == 1:  # as nearly always, and then there is nothing to count twice
            for piece in next(iter(claim.leaves.values())).path():
                if piece.alive:
                    tokens += piece.tokens
                    alone += piece.tokens if piece.owners == 1 else 0.0
            return tokens, alone
        mine = Counter(piece for leaf in claim.leaves.values() for piece in leaf.path())
        for piece, times in mine.items():
            tokens += piece.there_tokens
            alone += piece.there_tokens if piece.owners == times else 0.0
        return tokens, alone

    @staticmethod
    def _left(claim: Reference) -> set[PrefixNode]:
        return {piece for leaf in claim.left for piece in leaf.path() if not piece.owners}

    def check_integrity(self) -> None:
        """Assert the invariants."""
        claims = set(self.by_workflow.values())
        assert all(claim.workflow == name for name, claim in self.by_workflow.items())
        assert all(claim.in_flight or claim.leaves for claim in claims)
        for doing, line in self._resting.items():
            assert set(line) == {c for c in claims if c.holds and not c.in_flight and c.doing is doing}
            assert list(line) == sorted(line, key=lambda claim: claim.since_s)
        quiet = [claim.since_s for claim in self.by_workflow.values() if not claim.in_flight]
        assert quiet == sorted(quiet), "whoever turned longest ago is first"
        grows = sum(claim.grows_tokens for claim in claims)
        assert abs(grows - self.grows_tokens) < 1e-3 * (1 + grows), (grows, self.grows_tokens)
        self._check_pieces(claims)
        if not claims:
            beyond = self.cache.wanted_tokens - self.cache.in_use_tokens  # what a warm-up uses has no reference
            assert abs(beyond) < 1e-3, beyond

    def _check_pieces(self, claims: set[Reference]) -> None:
        """Assert that every piece has the counts of leaves that own, reference and pin it."""
        leaves = [(leaf, claim.holds) for claim in claims for leaf in claim.leaves.values()]
        owned = Counter(piece for leaf, _ in leaves for piece in leaf.path())
        claimed = Counter(piece for leaf, holds in leaves if holds for piece in leaf.path())
        pinned = Counter(piece for claim in claims for leaf in claim.pinned for piece in leaf.path())
        shelf = self.cache.shelf
        for piece in {*shelf.pieces.values(), *shelf.missed.values(), *owned}:
            assert piece.owners == owned[piece], "owned by leaves that are no more, or not by those that are"
            assert piece.claims == claimed[piece]
            assert piece.pins == pinned[piece]
        assert set(self._pinned) == {claim for claim in claims if claim.pinned}
