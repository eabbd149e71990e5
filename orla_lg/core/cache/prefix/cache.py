"""``EngineCache`` for engines with a prefix tree: admission decides, the tree and its references say what is there.

A call goes when what it needs fits beside what other workflows count on (``admission``); what it leaves is in the
tree (``tree``), and its workflow refers to it (``references``)
until its run is over, or the engine was asked to let go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf

from orla_lg.core.boundary.complete import complete
from orla_lg.core.cache.engine_cache import AdmissionStatistics, Loan, MemoryStatistics, PrefetchLease
from orla_lg.core.cache.prefix.admission import Admission
from orla_lg.core.cache.prefix.eviction import Eviction
from orla_lg.core.cache.prefix.references import References
from orla_lg.core.cache.prefix.tree import FILLED, TOKENS, CacheHandle, PrefixTree
from orla_lg.core.cache.verification import Order, OrderBook, OrderLog
from orla_lg.core.call import Ask, Call, Usage
from orla_lg.core.engine.backend import Capability, Effect, Probe
from orla_lg.core.engine.speed import Speed
from orla_lg.core.lookahead.estimates import Estimates
from orla_lg.core.memory.events import CacheAction, Doing, Holding
from orla_lg.core.memory.verbs import VERBS
from orla_lg.core.queues import BackendQueue, Queued

FORGET_AFTER_S = 86_400.0
"""What was not used or turned to for a day is believed to be gone."""

SWEEP_EVERY_S = 60.0

_FOLLOWS: Mapping[Effect, Callable[[References, str, float], None] | None] = complete(
    Effect,
    {
        Effect.FREED: lambda references, workflow, until_s: references.freed(workflow),
        Effect.DEMOTED: lambda references, workflow, until_s: references.demoted(workflow),
        Effect.PINNED: lambda references, workflow, until_s: references.pinned(workflow, until_s),
        Effect.SAVED: None,
        Effect.RESTORED: None,
        Effect.WARMED: None,
        Effect.DEFERRED: None,
        Effect.FAILED: None,
        Effect.UNSUPPORTED: None,
        Effect.UNKNOWN: None,
    },
    "_FOLLOWS in orla_lg.core.cache.prefix.cache",
)
"""How the references of a workflow follow an effect; ``None``: they stay as they are."""


class PrefixTreeCache:
    """A prefix tree shared by all workflows.

    Args:
        orders: What was asked of the engine.
        estimates: What calls and graphs usually take.
        holds: Whether calls wait for what they need; else they are only accounted for.
    """

    slots = 0
    prefetches_alone = False
    shelf = ""
    """Such engines save nothing for each other."""

    def __init__(self, orders: OrderBook, estimates: Estimates | None = None, *, holds: bool = True) -> None:
        self.orders = orders
        self.tree = PrefixTree()
        self.references = References(self.tree)
        self.admission = Admission(estimates or Estimates(), self.references, holds=holds)
        self._sweep_at_s = 0.0
        self._leaving: dict[str, OrderLog] = {}
        """Workflows that are forgotten once the orders on their way have come to an end."""
        self._lent: dict[PrefetchLease, CacheHandle] = {}
        self.choose: Callable[[BackendQueue, float, Speed], Queued | None] = self.admission.choose
        """Return the call that goes next, or ``None`` if none fits now."""
        self.first_token: Callable[[Queued], bool] = self.admission.first_token
        """Note that a call's prefill is done; returns whether other calls may have waited for it."""

    @property
    def lets_all(self) -> bool:
        """Whether any call that comes alone may enter now."""
        return self.admission.lets_all

    @property
    def again_at_s(self) -> float:
        """When to choose again if nothing happens before; monotonic."""
        return self.admission.again_at_s

    @property
    def waiting_for_prefix(self) -> int:
        """How many calls waited for another one's prefill when it was last chosen."""
        return len(self.admission.gated)

    def learned(self, probe: Probe, offers: Callable[[Capability], bool]) -> None:
        """Follow how large the engine's cache is, and in which order it evicts."""
        self.tree.eviction_order.order = Eviction.BANDED if offers(Capability.PIN) else Eviction.LRU
        self.admission.capacity.tell(probe.kv_tokens)

    # Calls

    def enter(self, queued: Queued, now: float, speed: Speed) -> float:
        """Let a call in; returns the tokens that the engine gives up for it."""
        workflow, call = queued.call.identity.workflow, queued.call
        found = self.tree.find(call.ask, call.identity.prompt_owner)
        filled = list(filter(FILLED, found))
        there = sum(map(TOKENS, filled))
        shared = self.references.shared_tokens(filled, workflow) if filled else 0.0
        queued.expected = self.orders.claim(workflow, round(there), round(shared), now)
        return self.admission.enter(queued, now, speed.prefill_tokens_per_s, found)

    def leave(self, queued: Queued, usage: Usage | None, now: float, *, tokens: int, followed: bool) -> None:
        """Give back what a call used, and keep a reference to what it left if its workflow goes on."""
        self.admission.leave(queued, now, usage, reached=tokens > 0, followed=followed)
        if tokens:
            self.orders.called(queued.call.identity.workflow, queued.call.id)
        self.references.expire(now)
        if now >= self._sweep_at_s:
            self._sweep_at_s = now + SWEEP_EVERY_S
            self.references.forget_older_than(now - FORGET_AFTER_S)

    def expected(self, call: Call, ask: Ask) -> float:
        """Return how many tokens of a call's prompt are there, those being prefilled included."""
        return self.tree.there_tokens(ask, call.identity.prompt_owner)

    # Workflows

    def apply(self, action: CacheAction) -> OrderLog | None:
        """Release the workflow's references where the verb ends them; returns the log of what the engine is asked."""
        if VERBS[action.verb].releases:
            self.references.release(action.workflow)
        return self.orders.asks(action.workflow, action.verb)

    def took_effect(self, action: CacheAction, order_log: OrderLog, effect: Effect, now: float) -> None:
        """Follow what the engine says it did, unless a later call says more of what is there."""
        workflow, until_s = action.workflow, now + (inf if action.ttl_s is None else action.ttl_s)
        self.orders.answered(order_log, Order(action.verb, effect, until_s))
        newest = self.orders.order_logs.get(workflow) or self._leaving.get(workflow)
        if newest in (order_log, None) and (follow := _FOLLOWS[effect]) is not None:
            follow(self.references, workflow, until_s)
        if not order_log.waits and self._leaving.get(workflow) is order_log:
            del self._leaving[workflow]
            if self.orders.order_logs.get(workflow) is None:  # else it came back meanwhile, under the same name
                self.references.forget(workflow)

    def turned(self, workflow: str, doing: Doing, now: float) -> None:
        """Note what a workflow waits for, outside of any model."""
        self.references.turned(workflow, doing, now)

    def forget(self, workflow: str) -> None:
        """Drop all that is known of a workflow that will not come back.

        What it holds is known until the orders on their way have come to an end: an engine that frees it then must
        be believed.
        """
        order_log = self.orders.forget(workflow)
        if order_log is not None and order_log.waits:
            self.references.release(workflow)
            self._leaving[workflow] = order_log
        elif workflow not in self._leaving:
            self.references.forget(workflow)

    def lose(self) -> None:
        """Expect no contents any more; what a call in flight will not find says nothing about the cache's size."""
        self.references.forget_all()
        self.tree.clear()
        self.admission.engine_lost()

    def close(self) -> None:
        """Expect no contents any more."""
        self.lose()

    def tidy(self) -> None:
        """Do nothing: the engine evicts by itself."""

    # Moves

    def lend(self, workflow: str, now: float, lent: Callable[[Loan | None], None]) -> bool:
        """Return False: nothing is written."""
        return False

    def borrow(self, loan: Loan, now: float) -> None:
        """Give it back: nothing is restored."""
        loan.ended()

    # Prefetches

    def missing(self, workflow: str, ask: Ask, tokens: int) -> float:
        """Return the tokens of a prompt that its call would not find."""
        return tokens - sum(piece.there_tokens for piece in self.tree.find(ask, workflow) if piece.filled)

    def evicts(
        self, workflow: str, ask: Ask, tokens: int, missing: float, now: float, spared: Callable[[str], bool]
    ) -> float | None:
        """Return the tokens that a prefetch would drive out; ``None`` where calls in flight leave no room."""
        limit = self.admission.capacity.limit
        full = self.tree.in_use_tokens + missing > limit
        return None if full else max(0.0, self.tree.tokens + missing - limit)

    def acquire_prefetch(
        self, workflow: str, ask: Ask, tokens: int, now: float, spared: Callable[[str], bool]
    ) -> PrefetchLease:
        """Have a prefetch's prompt in use, as a call's would be."""
        lease = PrefetchLease(ask)
        self._lent[lease] = self.tree.begin(ask, 0.0, workflow)
        return lease

    def release_prefetch(self, prefetch: PrefetchLease, tokens: int) -> None:
        """End a prefetch: what was filled stays, what was not goes."""
        handle = self._lent.pop(prefetch)
        if tokens:
            self.tree.filled(handle)
        self.tree.undo(handle)  # the answer that never was, and what was not filled

    def recall(self, slot: int, workflow: str, prefix: tuple[int, ...], tokens: int, used_s: float) -> None:
        """Do nothing: an engine without slots finds by itself what it has."""

    def next_expiry_s(self, now: float) -> float:
        """Return ``inf``: room comes when calls end."""
        return inf

    # Looking

    def tokens_of(self, workflow: str) -> int:
        """Return how many tokens of a workflow are believed to be there."""
        return self.references.tokens_of(workflow)

    def workflows(self) -> dict[str, int]:
        """Return the workflows believed to have something there, and how many tokens."""
        return {name: self.references.tokens_of(name) for name in self.references.by_workflow}

    def interrupted(self) -> set[str]:
        """Return the workflows that wait for a human."""
        return {each.workflow for each in self.references.holdings() if each.doing is Doing.HUMAN}

    def holdings(self) -> list[Holding]:
        """Return which workflows without a call in flight could give up what."""
        return [each for each in self.references.holdings() if each.doing is not Doing.GENERATING]

    def statistics(self) -> MemoryStatistics:
        """Return a snapshot."""
        return MemoryStatistics(
            workflows=len(self.references.by_workflow),
            tokens=round(self.tree.tokens),
            slots=None,
            slots_held=0,
            effects=dict(self.orders.counts),
            saved=0,
            truth=self.orders.truth(),
        )

    def admission_statistics(self) -> AdmissionStatistics | None:
        """Return a snapshot of how calls are admitted."""
        return self.admission.statistics()

    def check_integrity(self) -> None:
        """Assert the invariants of tree, references and admission, and that only calls and prefetches use tokens."""
        self.orders.check_integrity()
        assert all(order_log.waits for order_log in self._leaving.values()), self._leaving
        self.admission.check_integrity(
            sum(piece.tokens for handle in self._lent.values() for piece in (*handle.path, handle.answer))
        )
