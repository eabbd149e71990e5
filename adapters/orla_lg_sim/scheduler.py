"""What runs in the next step: vLLM's rules for admission, chunks, blocks and preemption.

A request has computed some of its tokens and must compute all that are known (the prompt, and what it has
generated) before a new one comes out. Each step

1. every decoding member computes one token; one whose blocks are full takes a new block,
2. a prefill that did not fit into the last step goes on,
3. waiting requests are admitted, as long as tokens, seats and blocks suffice,

within ``max_batch_tokens``. Where a member of 1 or 2 finds no block, the least urgent member loses all of its
own and waits again (preemption by recomputation), and nobody is admitted in that step.

A chunk takes whatever the step has left, so nobody is admitted behind it: at most one prefill is unfinished.
While a member decodes nothing about it is touched from step to step. After step ``s`` it has computed
``computed + s - joined`` tokens; the steps at which it needs a block or ends are known beforehand and stand in
two tables. So a step costs what changes in it, not what runs in it.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain, islice

from orla_lg_sim.blocks import BlockPool, Hash
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.request import Event, Kind, SimRequest
from orla_lg_sim.residents import Residents

_FIRST_OWN_HASH = 1 << 64
"""Hashes of tokens are below; blocks that nobody else can have are named from here."""


@dataclass(eq=False, slots=True)
class Member:
    """A request inside the engine."""

    request: SimRequest
    order: int
    """Of arrival."""
    arrived_s: float
    ready_s: float
    """When the server had it ready to be scheduled."""
    blocks: list[int] = field(default_factory=list)
    named: int = 0
    """How many of the blocks, from the first, others can find."""
    own_hashes: list[Hash] = field(default_factory=list)
    """Of the blocks past those that ``request.hashes`` names."""
    computed: int = 0
    generated: int = 0
    joined: int = 0
    """The step after which ``computed`` and ``generated`` were right."""
    last: int = 0
    """The step of its last token, once it decodes."""
    decoding: bool = False
    gone: bool = False
    cached_tokens: int | None = None
    preemptions: int = 0

    @property
    def known_tokens(self) -> int:
        """How many tokens must be computed before a new one comes out."""
        return self.request.prompt_tokens + self.generated

    @property
    def urgency(self) -> tuple[int, float, int]:
        """Sorts the most urgent first: the lowest number, then the earliest."""
        return self.request.priority, self.arrived_s, self.order

    def settle(self, step: int) -> None:
        """Bring the counts of a decoding member up to the end of *step*."""
        self.computed += step - self.joined
        self.generated += step - self.joined
        self.joined = step

    def event(self, kind: Kind, at_s: float, tokens: int) -> Event:
        """Return what just happened to it."""
        asked = self.request
        return Event(kind, asked.id, at_s, tokens, asked.prompt_tokens, self.cached_tokens or 0, self.preemptions)


@dataclass(eq=False, slots=True)
class EngineStep:
    """The composition of one step."""

    number: int
    decoding: int = 0
    context_tokens: int = 0
    """In the contexts of those that decode, together."""
    held_blocks: int = 0
    """By all that run, those that several share counted once."""
    prefilled: int = 0
    """Requests that prefill in this step."""
    prefill_tokens: int = 0
    prefill_pairs: float = 0.0
    """Pairs of a prefilled token and a token at or before it."""
    first: list[Member] = field(default_factory=list)
    """Those whose prefill this step completes."""
    told: list[tuple[Member, int]] = field(default_factory=list)
    """Tokens of this step that somebody wants to hear of, by their number in the answer."""
    last: list[Member] = field(default_factory=list)
    """Those whose last token this step brings."""
    preempted: int = 0


class Scheduler:
    """Waiting and running requests; ``compose`` says what the next step does.

    Args:
        parameters: The engine's limits.
        pool: Its KV cache.
        claim: Told each hash that a workflow computed or found.
        residents: Whose calls may start; ``None``: everybody's.
    """

    def __init__(
        self,
        parameters: EngineParameters,
        pool: BlockPool,
        claim: Callable[[str, Hash], None],
        residents: Residents | None = None,
    ) -> None:
        self.pool = pool
        self.residents = residents
        self.running: dict[Member, None] = {}
        """In the order of admission; here until the last token is out."""
        self.step = 0
        """Steps composed so far."""
        self.preempted: list[Member] = []
        """Since somebody last emptied the list."""
        self.prefix_queries = self.prefix_hits = self.preemptions = 0
        self._limits = parameters
        self._claim = claim
        self._block_tokens = parameters.block_tokens
        self._reserve = int(parameters.watermark * parameters.kv_blocks)
        self._waiting: list[tuple[tuple[int, float, int], Member]] = []
        self._prefilling: Member | None = None
        self._decoding = 0
        self._context_base = 0
        """Sum of ``computed - joined`` over all that decode: their contexts in step ``s`` are this + n * s."""
        self._watched: dict[Member, None] = {}
        self._full_at: defaultdict[int, list[Member]] = defaultdict(list)
        self._ends_at: defaultdict[int, list[Member]] = defaultdict(list)
        self._next_own_hash = _FIRST_OWN_HASH

    @property
    def waiting(self) -> int:
        """How many requests wait, those preempted included."""
        return len(self._waiting)

    def enqueue(self, member: Member) -> None:
        """Let a request wait, at the place that its urgency gives it."""
        key = member.urgency if self._limits.priority else (0, member.arrived_s, member.order)
        heapq.heappush(self._waiting, (key, member))

    def compose(self) -> EngineStep | None:
        """Decide what the next step does and give it its blocks; ``None`` if there is nothing to do."""
        if not self.running and not self._waiting:
            return None
        step = EngineStep(self.step + 1)
        self._grow(step)
        budget = self._limits.max_batch_tokens - self._decoding
        budget -= self._go_on(step, budget)
        if not step.preempted:
            self._admit(step, budget)
        if not (self._decoding or step.prefill_tokens):
            return None
        self._close(step)
        return step

    def retire(self, member: Member) -> None:
        """Take out a member that has ended, in whichever state it is."""
        member.gone = True
        if member in self.running:
            self._vacate(member)
        else:
            self._stop_waiting(member)

    def members(self) -> Iterable[Member]:
        """Return all that wait or run."""
        return [*self.running, *(member for _, member in self._waiting)]

    def check_integrity(self) -> None:
        """Assert that blocks, seats and counts agree."""
        self.pool.check_integrity()
        held = [block for member in self.running for block in member.blocks]
        assert len(set(held)) == self.pool.held, "a block is held by nobody"
        assert len(self.running) <= self._limits.max_running
        decoding = [member for member in self.running if member.decoding]
        assert len(decoding) == self._decoding
        assert sum(member.computed - member.joined for member in decoding) == self._context_base
        for member in decoding:
            assert member.computed + self.step - member.joined <= len(member.blocks) * self._block_tokens
        assert all(not member.blocks for _, member in self._waiting)
        assert self._prefilling is None or self._prefilling in self.running

    # The three parts of a step

    def _grow(self, step: EngineStep) -> None:
        """Give a block to each member that has filled its last one."""
        full = [member for member in self._full_at.pop(step.number, ()) if self._is_full(member)]
        if len(full) > self.pool.free:  # who comes too late matters only now
            seats = {member: seat for seat, member in enumerate(self.running)}
            full.sort(key=seats.__getitem__)
        for member in full:
            if member.decoding and self._make_room(1, member, step):
                self._name_full(member, len(member.blocks))
                member.blocks += self.pool.take(1)
                self._expect_full(member, step.number + self._block_tokens)

    def _go_on(self, step: EngineStep, budget: int) -> int:
        """Go on with a prefill that was begun before; returns the tokens it takes."""
        member = self._prefilling
        if member is None:
            return 0
        wanted = self._blocks_for(member, budget) - len(member.blocks)
        return self._prefill(member, step, budget) if self._make_room(wanted, member, step) else 0

    def _admit(self, step: EngineStep, budget: int) -> None:
        """Let those who wait begin, in their order; the first who finds no room holds up all behind."""
        while budget > 0 and self._waiting and len(self.running) < self._limits.max_running:
            member = self._waiting[0][1] if self.residents is None else self._allowed(self.residents)
            if member is None:
                return
            found = self._find(member)
            # The whole prompt must fit, even if only a chunk of it is computed now.
            wanted = self._needs(member, found) + self.pool.idle_among(found)
            if wanted + (self._reserve if self.running else 0) > self.pool.free:
                return
            if self.residents is not None:
                running = {each.request.workflow for each in self.running}
                self.residents.starts(member.request.workflow, self._needs(member, found), found, running)
            self._stop_waiting(member)
            self._seat(member, found)
            budget -= self._prefill(member, step, budget)

    def _allowed(self, residents: Residents) -> Member | None:
        """Return who begins next where not everybody may: residents first, in their order."""
        in_order = [member for _, member in sorted(self._waiting)]
        for member in sorted(in_order, key=lambda member: member.request.workflow not in residents):
            found, workflow = self._find(member), member.request.workflow
            if residents.may_start(workflow, self._needs(member, found), found, running=bool(self.running)):
                return member
        return None

    def _needs(self, member: Member, found: list[int]) -> int:
        """Return how many new blocks the whole prompt takes."""
        return -(-member.known_tokens // self._block_tokens) - len(found)

    def _stop_waiting(self, member: Member) -> None:
        self._waiting = [entry for entry in self._waiting if entry[1] is not member]
        heapq.heapify(self._waiting)

    def _close(self, step: EngineStep) -> None:
        """Count what the step does, then move members on to what they do in the next one."""
        number = self.step = step.number
        step.decoding, step.held_blocks = self._decoding, self.pool.held
        step.context_tokens = self._context_base + self._decoding * number
        step.told = [(member, member.generated + number - member.joined) for member in self._watched]
        for member in step.first:
            self._begin_decoding(member, step)
        for member in self._ends_at.pop(number, ()):
            if member.decoding and member.last == number:
                self._stop_decoding(member, number)
                step.last.append(member)

    # Members

    def _find(self, member: Member) -> list[int]:
        if not self._limits.prefix_caching:
            return []
        # The last token is always computed: its result is what is wanted.
        limit = (member.known_tokens - 1) // self._block_tokens
        return self.pool.find(islice(chain(member.request.hashes, member.own_hashes), limit))

    def _seat(self, member: Member, found: list[int]) -> None:
        self.running[member] = None
        self.pool.hold(found)
        member.blocks, member.named = found, len(found)
        member.computed = len(found) * self._block_tokens
        if member.cached_tokens is None:
            member.cached_tokens = min(member.computed, member.request.prompt_tokens)
            self.prefix_queries += member.request.prompt_tokens
            self.prefix_hits += member.cached_tokens
        if member.request.workflow is not None:
            for index in range(len(found)):
                self._claim(member.request.workflow, self._hash(member, index))

    def _prefill(self, member: Member, step: EngineStep, budget: int) -> int:
        tokens = min(member.known_tokens - member.computed, budget)
        member.blocks += self.pool.take(self._blocks_for(member, budget) - len(member.blocks))
        step.prefilled += 1
        step.prefill_tokens += tokens
        step.prefill_pairs += tokens * (member.computed + (tokens + 1) / 2)
        member.computed += tokens
        # Named before they are computed: who is admitted next in this very step finds them, as in vLLM.
        self._name_full(member, member.computed // self._block_tokens)
        done = member.computed == member.known_tokens
        self._prefilling = None if done else member
        if done:
            step.first.append(member)
        return tokens

    def _begin_decoding(self, member: Member, step: EngineStep) -> None:
        member.generated += 1
        if member.generated == 1 or member.request.watched:
            step.told.append((member, member.generated))
        member.joined = step.number
        member.last = step.number + member.request.output_tokens - member.generated
        if member.last == step.number:
            step.last.append(member)
            return
        member.decoding = True
        self._decoding += 1
        self._context_base += member.computed - member.joined
        if member.request.watched:
            self._watched[member] = None
        self._ends_at[member.last].append(member)
        self._expect_full(member, step.number + 1 + len(member.blocks) * self._block_tokens - member.computed)

    def _stop_decoding(self, member: Member, step: int) -> None:
        """Make the counts right up to *step*, the last one it took part in."""
        self._decoding -= 1
        self._context_base -= member.computed - member.joined
        self._watched.pop(member, None)
        member.settle(step)
        member.decoding = False

    def _expect_full(self, member: Member, step: int) -> None:
        if step <= member.last:
            self._full_at[step].append(member)

    def _is_full(self, member: Member) -> bool:
        """Whether a note that it will be full is still true; it may have been preempted since."""
        computed = member.computed + self.step - member.joined
        return member.decoding and computed == len(member.blocks) * self._block_tokens

    # Blocks

    def _blocks_for(self, member: Member, budget: int) -> int:
        tokens = min(member.known_tokens, member.computed + budget)
        return -(-tokens // self._block_tokens)

    def _make_room(self, blocks: int, member: Member, step: EngineStep) -> bool:
        """Preempt until *blocks* are free; False if *member* itself had to go."""
        while self.pool.free < blocks:
            victim = self._least_urgent()
            self._preempt(victim, step)
            if victim is member:
                return False
        return True

    def _least_urgent(self) -> Member:
        # Who waits only for its last token to come out has nothing left to lose.
        active = (member for member in reversed(self.running) if member.decoding or member is self._prefilling)
        return max(active, key=lambda member: member.urgency) if self._limits.priority else next(active)

    def _preempt(self, member: Member, step: EngineStep) -> None:
        self._vacate(member)
        member.preemptions += 1
        self.preemptions += 1
        step.preempted += 1
        self.preempted.append(member)
        self.enqueue(member)

    def _vacate(self, member: Member) -> None:
        """Take a member's seat and blocks; what it computed can be found until it is overwritten."""
        if member.decoding:
            self._stop_decoding(member, self.step)
        if member is self._prefilling:
            self._prefilling = None
        self._name_full(member, member.computed // self._block_tokens)
        self.pool.give_back(reversed(member.blocks))
        member.blocks, member.named, member.computed = [], 0, 0
        del self.running[member]

    def _name_full(self, member: Member, full: int) -> None:
        """Let others find the first *full* blocks of a member."""
        if not self._limits.prefix_caching:
            return
        for index in range(member.named, full):
            value = self._hash(member, index)
            self.pool.name(member.blocks[index], value)
            if member.request.workflow is not None:
                self._claim(member.request.workflow, value)
        member.named = max(member.named, full)

    def _hash(self, member: Member, index: int) -> Hash:
        shared = member.request.hashes
        if index < len(shared):
            return shared[index]
        own = member.own_hashes
        while len(own) <= index - len(shared):
            own.append(self._next_own_hash)
            self._next_own_hash += 1
        return own[index - len(shared)]
