"""Whose each cached block is, and so which band it belongs to.

A *chain* is what one finished request left in the cache, from the prompt's first block on. Each of its blocks
has a claim of that chain: its natural band, ``PINNED``, or ``DEAD`` once nobody is expected to come back. A
block stands in the highest band that any chain claims for it, so it is never worse off for being shared.

    request ends      ->  a chain, or the chain before it grown; what only the earlier had is dead
    release           ->  its chains claim DEAD, and HISTORY for system prompts; all stays until it is needed
    pin               ->  its chains claim PINNED, from their beginning on, as far as the budget goes
    flush             ->  its claims are gone; what nobody else claims is forgotten by the cache, too
    block given away  ->  every claim on it is gone, and with their last block chains, owners and workflows

The sizes are bounded by the pool: as many chains are kept as there are blocks. All methods run in the engine's
own thread, between its steps. This file imports the standard library only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf

from orla_lg_vllm.bands import Band
from orla_lg_vllm.claims import BlockClaims, Chain, Left, Owner, OwnerChains

PINNED_SHARE = 0.5
"""At most this part of the pool is pinned: the rest serves everybody else, and pins beyond it would only push
each other out, as least recently used ones do."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a workflow has in the cache, in blocks."""

    blocks: int
    shared: int
    """How many of them others claim, too."""
    pinned: int
    dead: int
    """How many are the first to go."""


class Ledger:
    """Chains, and what they claim.

    Invariants: a chain has a claim on each of its blocks and on no other; a holding's counts are those of its
    chains; an owner or workflow without blocks is not known; no more blocks are pinned than the budget allows.

    Args:
        blocks: How many the pool has.
        is_free: Tells whether a block lies in the free queue.
        moved: Told each free block that now stands in another band.
        anonymous: What a request without a workflow claims for its blocks.
    """

    def __init__(
        self,
        blocks: int,
        is_free: Callable[[int], bool],
        moved: Callable[[int], None],
        anonymous: Band = Band.HISTORY,
    ) -> None:
        self._anonymous = anonymous
        self.budget_blocks = int(blocks * PINNED_SHARE)
        self.pinned_blocks = 0
        self._is_free = is_free
        self._moved = moved
        self._most_chains = blocks
        self._holdings: dict[int, BlockClaims] = {}
        self._workflows: dict[str, dict[str, OwnerChains]] = {}
        self._recent: OrderedDict[Chain, None] = OrderedDict()
        """All chains but dead ones, the one longest unused first."""
        self._orders: dict[str, float] = {}
        """Until when a workflow is to be pinned; also what it leaves from now on."""
        self.next_expiry_s = inf
        """When a pin may end next."""

    # Questions

    def band(self, block: int) -> Band:
        """Return where a cached block belongs; one that nobody claims is dead."""
        holding = self._holdings.get(block)
        return Band.DEAD if holding is None else holding.band

    def workflows(self) -> Iterable[str]:
        """Return those that have something in the cache."""
        return self._workflows.keys()

    def knows(self, workflow: str) -> bool:
        """Whether it has something in the cache."""
        return workflow in self._workflows

    def blocks_of(self, workflow: str) -> list[int]:
        """Return what a workflow claims, what must go first at the front: a chain's end before its beginning."""
        found = [block for chain in self._chains(workflow) for block in reversed(chain.bands)]
        return list(dict.fromkeys(found))

    def is_shared(self, block: int, workflow: str) -> bool:
        """Whether anybody but *workflow* claims the block."""
        holding = self._holdings.get(block)
        if holding is None:
            return False
        return bool(holding.anonymous) or any(chain.owner[0] != workflow for chain in holding.chains)

    def is_claimed(self, block: int) -> bool:
        """Whether anybody at all claims the block."""
        return block in self._holdings

    def is_ordered(self, workflow: str) -> bool:
        """Whether there is an order to pin it."""
        return workflow in self._orders

    # Events

    def note_anonymous(self, blocks: Iterable[int]) -> None:
        """Note that a request without a workflow left *blocks*; they are in use while this is said."""
        for block in blocks:
            self._holdings.setdefault(block, BlockClaims()).anonymous = self._anonymous

    def note_left(self, left: Left, now_s: float) -> None:
        """Note what a request left when it ended."""
        if not left.blocks:
            return
        stage = self._workflows.setdefault(left.owner[0], {}).setdefault(left.owner[1], OwnerChains())
        chain = self._predecessor(stage, left) if left.whole else None
        if chain is None:
            chain = Chain(left.owner)
            stage.chains.append(chain)
        self._cut(stage, chain, _common(chain, left.blocks))
        self._wake(chain)  # after that, lest what is cut off be worth more for a moment, and move for nothing
        self._grow(stage, chain, left)
        chain.ended_s = now_s
        self._recent[chain] = None
        self._recent.move_to_end(chain)
        self._unpin(chain)
        until_s = max(now_s + left.keep_s if left.keep_s else 0.0, self._orders.get(left.owner[0], 0.0))
        if left.released or (left.keep_s == 0 and not until_s):
            self._claim_anew(chain, released=True)
        else:
            self._pin(chain, until_s)
        self._tidy(left.owner)
        self._forget_the_oldest()

    def note_taken(self, block: int) -> None:
        """Drop every claim on a block that is given away."""
        holding = self._holdings.get(block)
        if holding is not None:
            for chain in list(holding.chains):
                self._drop(chain, block)
                if not chain.bands:
                    self._tidy(chain.owner)
            self._holdings.pop(block, None)

    def clear(self) -> None:
        """Forget everything: the cache is empty."""
        for kept in (self._holdings, self._workflows, self._recent, self._orders):
            kept.clear()
        self.pinned_blocks, self.next_expiry_s = 0, inf

    # Orders

    def pin(self, workflow: str, until_s: float) -> None:
        """Pin what a workflow has and what it will leave, as far as the budget goes."""
        self._orders[workflow] = until_s
        for chain in self._alive(workflow):
            self._wake(chain)
            self._pin(chain, until_s)

    def release(self, workflow: str) -> None:
        """Let all that a workflow has be the first to go."""
        self._orders.pop(workflow, None)
        for chain in self._alive(workflow):
            self._unpin(chain)
            self._claim_anew(chain, released=True)

    def suspend(self, workflow: str, *, pins: bool) -> None:
        """Let what a workflow has be worth less than what residents have; with *pins*, also what is pinned."""
        for chain in self._alive(workflow):
            if pins:
                self._unpin(chain)
            self._claim_anew(chain, suspended=True)

    def resume(self, workflow: str) -> None:
        """Let what is left of a workflow be worth again what it was."""
        for chain in self._alive(workflow):
            self._claim_anew(chain, suspended=False)

    def flush(self, workflow: str) -> list[int]:
        """Drop a workflow's claims; return the blocks that now nobody claims, a chain's end first."""
        self._orders.pop(workflow, None)
        blocks = self.blocks_of(workflow)
        for chain in self._chains(workflow):
            self._forget(chain)
        return [block for block in blocks if not self.is_claimed(block)]

    def expire(self, now_s: float) -> None:
        """End the pins whose time is over."""
        for workflow in [each for each, until_s in self._orders.items() if until_s <= now_s]:
            del self._orders[workflow]
        for chain in [each for each in self._recent if each.until_s and each.until_s <= now_s]:
            self._unpin(chain)
        self.next_expiry_s = min(self._ends(), default=inf)

    # The state now

    def statistics(self, workflow: str) -> Holdings:
        """Count what a workflow has."""
        blocks = self.blocks_of(workflow)
        return Holdings(
            blocks=len(blocks),
            shared=sum(self.is_shared(block, workflow) for block in blocks),
            pinned=sum(self._holdings[block].claims[Band.PINNED] > 0 for block in blocks),
            dead=sum(self.band(block) is Band.DEAD for block in blocks),
        )

    def check_integrity(self) -> None:
        """Assert the invariants."""
        counts = {block: [0] * len(Band) for block in self._holdings}
        for workflow in self._workflows:
            for chain in self._chains(workflow):
                assert chain.bands, f"an empty chain of {chain.owner}"
                bands = list(chain.bands.values())
                assert bands == sorted(bands, reverse=True), f"the bands of a chain of {chain.owner} rise: {bands}"
                assert chain.pinned <= set(chain.bands) and (chain.until_s > 0 or not chain.pinned)
                for block in chain.bands:
                    assert chain in self._holdings[block].chains
                    counts[block][chain.claim(block)] += 1
            assert all(stage.every() for stage in self._workflows[workflow].values()), f"an empty stage of {workflow}"
        assert all(self._workflows.values()), "a workflow without stages is known"
        for block, holding in self._holdings.items():
            assert holding.claims == counts[block] and sum(holding.claims) == len(holding.chains), block
            assert holding.chains or holding.anonymous, f"nobody claims block {block}, but it is noted"
        assert self.pinned_blocks == sum(holding.claims[Band.PINNED] > 0 for holding in self._holdings.values())
        assert self.pinned_blocks <= self.budget_blocks
        live = {chain for known in self._workflows.values() for stage in known.values() for chain in stage.chains}
        assert live == set(self._recent) and len(live) <= self._most_chains

    # Inside: chains

    def _chains(self, workflow: str) -> list[Chain]:
        return [chain for stage in self._workflows.get(workflow, {}).values() for chain in stage.every()]

    def _alive(self, workflow: str) -> list[Chain]:
        return [chain for stage in self._workflows.get(workflow, {}).values() for chain in stage.chains]

    def _predecessor(self, stage: OwnerChains, left: Left) -> Chain | None:
        """Return the chain that a request went on from: of those ended when it began, the one most alike.

        Calls of a stage that overlap in time are branches, each with a chain of its own. A call that begins
        otherwise than all before it takes the place of one all the same: its stage has changed its prompt.
        """
        ended = [chain for chain in stage.chains if chain.ended_s <= left.began_s]
        return max(ended, key=lambda chain: _common(chain, left.blocks), default=None)

    def _cut(self, stage: OwnerChains, chain: Chain, length: int) -> None:
        """Shorten a chain to *length* blocks; what it had beyond them is dead."""
        tail = list(chain.bands)[length:]
        if tail and stage.dead is None:
            stage.dead = Chain(chain.owner, released=True)
        for block in reversed(tail):
            assert stage.dead is not None
            self._claim(stage.dead, block, Band.DEAD)
            self._drop(chain, block)

    def _grow(self, stage: OwnerChains, chain: Chain, left: Left) -> None:
        """Let a chain be what a request left, which begins with all that the chain has."""
        for block, band in zip(left.blocks, left.bands, strict=True):
            if stage.dead is not None and block in stage.dead.bands:
                self._drop(stage.dead, block)
            self._claim(chain, block, band)
        for other in list(stage.chains):
            contained = other is not chain and not other.until_s and other.bands.keys() <= chain.bands.keys()
            if contained:
                self._forget(other)

    def _wake(self, chain: Chain) -> None:
        if chain.released:
            self._claim_anew(chain, released=False)

    def _claim_anew(self, chain: Chain, *, released: bool | None = None, suspended: bool | None = None) -> None:
        before = [(block, chain.claim(block)) for block in reversed(chain.bands)]
        chain.released = chain.released if released is None else released
        chain.suspended = chain.suspended if suspended is None else suspended
        for block, old in before:
            self._shift(chain, block, old, chain.claim(block))

    def _pin(self, chain: Chain, until_s: float) -> None:
        if not until_s:
            return
        room, fits = self.budget_blocks - self.pinned_blocks, []
        for block in chain.bands:
            room -= self._holdings[block].claims[Band.PINNED] == 0
            if room < 0:
                break
            fits.append(block)
        for block in reversed(fits):
            old = chain.claim(block)
            chain.pinned.add(block)
            self._shift(chain, block, old, Band.PINNED)
        chain.until_s = until_s
        self.next_expiry_s = min(self.next_expiry_s, until_s)

    def _unpin(self, chain: Chain) -> None:
        chain.until_s = 0.0
        for block in [each for each in reversed(chain.bands) if each in chain.pinned]:
            chain.pinned.discard(block)
            self._shift(chain, block, Band.PINNED, chain.claim(block))

    def _ends(self) -> Iterator[float]:
        yield from self._orders.values()
        yield from (chain.until_s for chain in self._recent if chain.until_s)

    def _forget(self, chain: Chain) -> None:
        for block in reversed(list(chain.bands)):
            self._drop(chain, block)
        self._tidy(chain.owner)

    def _forget_the_oldest(self) -> None:
        while len(self._recent) > self._most_chains:
            self._forget(next(iter(self._recent)))

    # Inside: claims

    def _claim(self, chain: Chain, block: int, band: Band) -> None:
        old = chain.claim(block) if block in chain.bands else None
        chain.bands[block] = band
        self._shift(chain, block, old, chain.claim(block))

    def _drop(self, chain: Chain, block: int) -> None:
        old = chain.claim(block)
        del chain.bands[block]
        chain.pinned.discard(block)
        self._shift(chain, block, old, None)

    def _shift(self, chain: Chain, block: int, old: Band | None, new: Band | None) -> None:
        """Change a chain's claim on a block; ``None`` is none. The block moves if it now stands elsewhere."""
        if old is new:
            return
        holding = self._holdings.get(block)
        if holding is None:
            holding = self._holdings[block] = BlockClaims()
        # Most shifts are of blocks still in use, which find their band when they become free.
        before = holding.band if self._is_free(block) else None
        was_pinned = holding.claims[Band.PINNED] > 0
        if old is None:
            holding.chains.add(chain)
        else:
            holding.claims[old] -= 1
        if new is None:
            holding.chains.discard(chain)
        else:
            holding.claims[new] += 1
        self.pinned_blocks += (holding.claims[Band.PINNED] > 0) - was_pinned
        if not holding.chains and not holding.anonymous:
            del self._holdings[block]
        if before is not None and self.band(block) is not before:
            self._moved(block)

    def _tidy(self, owner: Owner) -> None:
        """Forget what has no blocks any more."""
        workflow, name = owner
        known = self._workflows.get(workflow, {})
        if (stage := known.get(name)) is None:
            return
        for chain in stage.chains:
            if not chain.bands:
                self._recent.pop(chain, None)
        stage.chains = [chain for chain in stage.chains if chain.bands]
        if stage.dead is not None and not stage.dead.bands:
            stage.dead = None
        if not stage.every():
            del known[name]
        if not known:
            self._workflows.pop(workflow, None)
            self._orders.pop(workflow, None)


def _common(chain: Chain, blocks: Sequence[int]) -> int:
    """Return how many blocks a chain and a request have in common from the first on."""
    length = 0
    for ours, theirs in zip(chain.bands, blocks, strict=False):
        if ours != theirs:
            break
        length += 1
    return length
