"""The least that an ``EngineCache`` can be: calls go first come first served, and nothing is held."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from orla_lg.core.cache.engine_cache import Loan, MemoryStatistics, PrefetchLease
from orla_lg.core.cache.prefix.admission import AdmissionStatistics
from orla_lg.core.cache.verification import ExpectedTokens, OrderLog, VerificationCounts
from orla_lg.core.call import Ask, Call, Usage
from orla_lg.core.engine.backend import Capability, Effect, Probe
from orla_lg.core.engine.speed import Speed
from orla_lg.core.memory.events import CacheAction, Doing, Holding
from orla_lg.core.queues import BackendQueue, Queued


class NaiveCache:
    """Lets every call in, in the queue's order, and expects nothing of the engine."""

    prefetches_alone = False
    lets_all = True
    again_at_s = inf
    waiting_for_prefix = 0

    def __init__(self, slots: int = 0) -> None:
        self.slots = slots
        self.inside: set[Queued] = set()
        self.closed = False

    def learned(self, probe: Probe, offers: Callable[[Capability], bool]) -> None:
        assert not self.closed, "a cache that was closed learns nothing more"

    def choose(self, queue: BackendQueue, now: float, speed: Speed) -> Queued | None:
        assert not self.closed, "a cache that was closed lets no call in"
        return queue.next(now)

    def enter(self, queued: Queued, now: float, speed: Speed) -> float:
        assert not self.closed and queued not in self.inside, "a call enters once"
        self.inside.add(queued)
        queued.expected = ExpectedTokens(0, 0, None, None)
        return 0.0

    def first_token(self, queued: Queued) -> bool:
        return False

    def leave(self, queued: Queued, usage: Usage | None, now: float, *, tokens: int, followed: bool) -> None:
        self.inside.remove(queued)

    def expected(self, call: Call, ask: Ask) -> float:
        return 0.0

    def apply(self, action: CacheAction) -> OrderLog | None:
        return None

    def took_effect(self, action: CacheAction, order_log: OrderLog, effect: Effect, now: float) -> None:
        raise AssertionError("no order was opened here")

    def turned(self, workflow: str, doing: Doing, now: float) -> None:
        pass

    def forget(self, workflow: str) -> None:
        pass

    def lose(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def tidy(self) -> None:
        pass

    shelf = ""

    def lend(self, workflow: str, now: float, lent: Callable[[Loan | None], None]) -> bool:
        return False

    def borrow(self, loan: Loan, now: float) -> None:
        raise AssertionError("there is no shelf here")

    def missing(self, workflow: str, ask: Ask, tokens: int) -> float:
        return tokens

    def evicts(
        self, workflow: str, ask: Ask, tokens: int, missing: float, now: float, spared: Callable[[str], bool]
    ) -> float | None:
        return None

    def acquire_prefetch(
        self, workflow: str, ask: Ask, tokens: int, now: float, spared: Callable[[str], bool]
    ) -> PrefetchLease:
        raise AssertionError("no place was found for a prefetch")

    def release_prefetch(self, prefetch: PrefetchLease, tokens: int) -> None:
        raise AssertionError("no prefetch has a place")

    def recall(self, slot: int, workflow: str, prefix: tuple[int, ...], tokens: int, used_s: float) -> None:
        """Nothing is known of any slot."""

    def next_expiry_s(self, now: float) -> float:
        return inf

    def tokens_of(self, workflow: str) -> int:
        return 0

    def workflows(self) -> dict[str, int]:
        return {}

    def interrupted(self) -> set[str]:
        return set()

    def holdings(self) -> list[Holding]:
        return []

    def statistics(self) -> MemoryStatistics:
        return MemoryStatistics(0, 0, self.slots or None, 0, {}, 0, VerificationCounts(0, 0, {}, {}))

    def admission_statistics(self) -> AdmissionStatistics | None:
        return None

    def check_integrity(self) -> None:
        assert all(queued.granted for queued in self.inside)
