"""What workflows count on finding in an engine's cache, and which of them give that up first for others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from orla_lg.core.residency import Piece, Residency

PATIENCE_S = 30.0
"""What takes longer has taken too long."""


class Doing(StrEnum):
    """What a workflow with a claim waits for."""

    GENERATING = "generating"
    TOOL = "tool"
    """Its nodes run, but no call of its own."""
    HUMAN = "human"
    IDLE = "idle"


LAPSES_AFTER_S: Mapping[Doing, float] = {Doing.TOOL: PATIENCE_S, Doing.HUMAN: 0.0, Doing.IDLE: 0.0}
"""Of such a wait, others may have the place."""


@dataclass(eq=False, slots=True)
class Claim:
    """What a workflow counts on finding in the cache."""

    leaves: dict[str, Piece] = field(default_factory=dict)
    """By stage, the end of its last call."""
    holds: bool = False
    """Its leaves are claimed; else their place is anybody's."""
    in_flight: int = 0
    doing: Doing = Doing.GENERATING
    since_s: float = 0.0
    grows_tokens: float = 0.0
    """What its longest context is expected to grow by until its run ends."""

    def pieces(self) -> set[Piece]:
        """Return all that it counts on."""
        return {piece for leaf in self.leaves.values() for piece in leaf.path()}


class Claims:
    """The claims on one engine's cache, by workflow. ``check_integrity`` asserts what the parts promise."""

    def __init__(self, cache: Residency) -> None:
        self.by_workflow: dict[str, Claim] = {}
        self.grows_tokens = 0.0
        """What all of them are expected to grow by."""
        self.lapsed = 0
        """How many were given up for others."""
        self._cache = cache
        self._resting: dict[Doing, OrderedDict[Claim, None]] = {doing: OrderedDict() for doing in Doing}
        """Those that hold, without a call in flight, by what they wait for; whoever waits longest is first."""

    def __contains__(self, workflow: str) -> bool:
        return workflow in self.by_workflow

    # Calls

    def enter(self, workflow: str, grows_tokens: float) -> None:
        """Note that a call of the workflow goes; after it, its context is expected to grow by so much."""
        claim = self.by_workflow.setdefault(workflow, Claim())
        self._stir(claim)
        claim.in_flight += 1
        claim.doing = Doing.GENERATING
        self._expect(claim, grows_tokens)

    def leave(self, workflow: str, stage: str, leaf: Piece | None, now: float, *, followed: bool) -> None:
        """Note that a call of the workflow ended.

        Args:
            workflow: Whose.
            stage: The call's.
            leaf: The end of what it left in the cache; ``None``: nothing.
            now: Monotonic seconds.
            followed: Whether the workflow goes on, and so counts on that.
        """
        claim = self.by_workflow[workflow]
        claim.in_flight -= 1
        if leaf is not None and followed:
            self._keep(claim, stage, leaf)
        if claim.in_flight:
            return
        if followed and claim.leaves:
            self._rest(claim, Doing.TOOL, now)
        else:
            self.forget(workflow)

    def _keep(self, claim: Claim, stage: str, leaf: Piece) -> None:
        """Count on what the stage's last call left, and no more on what the one before did."""
        before = claim.leaves.get(stage)
        claim.leaves[stage] = leaf
        if not claim.holds:
            claim.holds = True
            for each in claim.leaves.values():
                self._cache.claim(each)
            return
        self._cache.claim(leaf)
        if before is not None:
            self._cache.disclaim(before)

    def _expect(self, claim: Claim, grows_tokens: float) -> None:
        self.grows_tokens += grows_tokens - claim.grows_tokens
        claim.grows_tokens = grows_tokens

    # Between calls

    def turned(self, workflow: str, doing: Doing, now: float) -> None:
        """Note what a workflow without a call in flight waits for now."""
        claim = self.by_workflow.get(workflow)
        if claim is not None and not claim.in_flight:
            self._stir(claim)
            self._rest(claim, doing, now)

    def _rest(self, claim: Claim, doing: Doing, now: float) -> None:
        claim.doing, claim.since_s = doing, now
        if claim.holds:
            self._resting[doing][claim] = None
        else:
            self._expect(claim, 0.0)

    def _stir(self, claim: Claim) -> None:
        self._resting[claim.doing].pop(claim, None)

    def lapse_one(self, now: float) -> None:
        """Give up the claim of whoever waits longest for a human, for nobody, or too long for a tool."""
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

    def _release(self, claim: Claim) -> None:
        if claim.holds:
            claim.holds = False
            for leaf in claim.leaves.values():
                self._cache.disclaim(leaf)
        if not claim.in_flight:
            self._stir(claim)
            self._expect(claim, 0.0)

    def forget(self, workflow: str) -> None:
        """Let a workflow's claim go for good; calls of it in flight go on."""
        if (claim := self.by_workflow.get(workflow)) is not None:
            self._release(claim)
            claim.leaves = {}
            if not claim.in_flight:
                del self.by_workflow[workflow]

    def forget_all(self) -> None:
        """Let all claims go."""
        for workflow in list(self.by_workflow):
            self.forget(workflow)

    def check_integrity(self) -> None:
        """Assert the invariants."""
        claims = set(self.by_workflow.values())
        assert all(claim.in_flight or claim.leaves for claim in claims)
        for doing, line in self._resting.items():
            assert set(line) == {c for c in claims if c.holds and not c.in_flight and c.doing is doing}
            assert list(line) == sorted(line, key=lambda claim: claim.since_s)
        grows = sum(claim.grows_tokens for claim in claims)
        assert abs(grows - self.grows_tokens) < 1e-3 * (1 + grows), (grows, self.grows_tokens)
        held = [c for c in claims if c.holds]
        assert all(piece.claims for claim in held for piece in claim.pieces())
        if not claims:
            assert abs(self._cache.wanted_tokens) < 1e-3, self._cache.wanted_tokens
