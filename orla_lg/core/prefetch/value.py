"""What speaks against a warm-up now: an engine that is unwell or busy, a cache that has it all, or a poor bargain."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Protocol

from orla_lg.core.cache.engine_cache import EngineCache
from orla_lg.core.cache.isolation import Isolation
from orla_lg.core.cache.verification import OrderBook
from orla_lg.core.engine.backend import Backend, BackendAdapter, Capability
from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.engine.capabilities import EngineStats
from orla_lg.core.engine.health import Health
from orla_lg.core.engine.load import LoadWatch
from orla_lg.core.engine.speed import PREFILL_TOKENS_PER_S, SpeedMeter
from orla_lg.core.prefetch.book import PrefetchBargain, PrefetchBook, SkipReason, WarmUp, is_worth
from orla_lg.core.prefetch.prompts import Prompt
from orla_lg.core.queues import BackendQueue

LONG_WAIT_S = 1.0
"""What is certain of a next prompt is prefilled if its call comes no sooner than that, or than the prefill ends: what
a prefetch that is given up has computed is mostly there for its call."""

FULL = 0.9
"""So much of an engine's KV cache in the hands of running calls leaves no room."""


RequestKey = tuple[str, tuple[str, str] | None, bool]
"""A workflow, a stage, and whether its next prompt is meant: the one that follows on a call's answer."""


@dataclass(frozen=True, slots=True)
class PrefetchRequest:
    """What a policy would have warmed on one backend."""

    workflow: str
    stage: tuple[str, str] | None
    """Graph and stage that it is the beginning of; ``None``: the workflow's own last prompt."""
    chance: float
    due_s: float
    """When (monotonic) the call is expected; ``inf``: not known."""
    next_of: str = ""
    """The id of a call of the stage: what is certain of the prompt after that one is meant."""

    @property
    def key(self) -> RequestKey:
        """What it replaces an earlier request by."""
        return self.workflow, self.stage, bool(self.next_of)


class PrefetchedEngine(Protocol):
    """What prefetches need of the scheduler of their backend."""

    backend: Backend
    adapter: BackendAdapter
    lock: threading.Lock
    queue: BackendQueue
    cache: EngineCache
    orders: OrderBook
    isolation: Isolation
    health: Health
    load: LoadWatch | None
    """What the engine says of its load; ``None`` where it says nothing."""
    speed_meter: SpeedMeter

    def changing(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock for a change; the calls that may go after it are granted and woken."""
        ...


class PrefetchValue:
    """Whether prefetches on one backend are worth it. Under its scheduler's lock.

    Args:
        scheduler: The backend's.
        clock: Monotonic seconds.
        settings: What warm-ups may take.
        book: Which workflows were warmed and did not call yet: their cache is spared.
    """

    def __init__(
        self, scheduler: PrefetchedEngine, clock: Callable[[], float], settings: WarmUp, book: PrefetchBook
    ) -> None:
        self._book = book
        self.heard_s = clock()
        """When the engine last served a call of ours."""
        self._scheduler = scheduler
        self._clock = clock
        self._settings = settings

    def why_not(self, request: PrefetchRequest, prompt: Prompt, load: EngineStats | None) -> SkipReason | None:
        """Return what speaks against a warm-up now; ``None``: nothing does."""
        scheduler = self._scheduler
        if (
            not scheduler.health.can(Capability.WARM)
            or scheduler.health.state() is not Circuit.CLOSED
            or scheduler.queue.paused
        ):
            return SkipReason.UNWELL
        if request.due_s <= self._clock():
            return SkipReason.LATE
        if not self.has_room() or _is_full(load):
            return SkipReason.BUSY
        if (needless := self.needless(request.workflow, prompt)) is not None:
            return needless
        missing = self.missing(request.workflow, prompt)
        evicts = scheduler.cache.evicts(
            request.workflow, prompt.ask, prompt.tokens, missing, self._clock(), self._book.owes
        )
        if evicts is None:
            return SkipReason.BUSY
        tokens_per_s = scheduler.speed_meter.prefill_tokens_per_s or PREFILL_TOKENS_PER_S
        if request.next_of and request.due_s - self._clock() < min(LONG_WAIT_S, missing / tokens_per_s):
            return SkipReason.SHORT_WAIT
        stakes = PrefetchBargain(
            request.chance,
            missing,
            tokens_per_s,
            max(scheduler.queue.in_flight, 0 if load is None else load.running or 0),
            evicts,
            request.due_s - self._clock(),
        )
        return None if is_worth(stakes) else SkipReason.NOT_WORTH

    def has_room(self, entering: int = 0) -> bool:
        """Whether a warm-up would hold up no call, *entering* more calls in flight."""
        queue, settings = self._scheduler.queue, self._settings
        if queue.may_grant is not None and not queue.may_grant():
            return False
        in_flight = queue.in_flight + entering
        if queue.waiting or self._scheduler.cache.prefetches_alone:
            return not (queue.waiting or in_flight)
        takes = min(queue.engine_takes, inf if queue.max_concurrency is None else queue.max_concurrency)
        return in_flight < settings.room * takes if takes < inf else not in_flight

    def needless(self, workflow: str, prompt: Prompt) -> SkipReason | None:
        """Return why a prompt is not worth a request, however idle the engine is; ``None``: it may be worth one."""
        least_tokens = self._settings.least_tokens
        if prompt.tokens < least_tokens:
            return SkipReason.SHORT
        return SkipReason.THERE if self.missing(workflow, prompt) < least_tokens else None

    def missing(self, workflow: str, prompt: Prompt) -> float:
        """Return the tokens of a prompt that its call would not find in the cache, as far as we believe.

        Where calls found less than was believed, as others use the engine too, that part of what is believed to be
        there is taken to be gone. A prefetch of what is there after all costs the engine next to nothing.
        """
        probe = self._scheduler.health.probe
        told = probe is not None and bool(probe.incarnation)
        if not told and self._clock() - self.heard_s > self._settings.trust_s:
            return prompt.tokens
        missing = self._scheduler.cache.missing(workflow, prompt.ask, prompt.tokens)
        return missing + self._scheduler.orders.lost_share * (prompt.tokens - missing)


def _is_full(load: EngineStats | None) -> bool:
    """Whether an engine says that it has no room, for reasons of its own or of others that use it."""
    return load is not None and ((load.kv_usage or 0.0) > FULL or bool(load.waiting))
