"""What speaks against a warm-up now: an engine that is unwell or busy, a cache that has it all, or a poor bargain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from orla_lg.core.cache.slots.swap import Slot
from orla_lg.core.cache.slots.table import SlotTable
from orla_lg.core.engine.backend import Capability
from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.engine.capabilities import EngineStats
from orla_lg.core.engine.speed import PREFILL_TOKENS_PER_S
from orla_lg.core.prefetch.book import Refused, Stakes, WarmUp, is_worth
from orla_lg.core.prefetch.prompts import Prompt

if TYPE_CHECKING:
    from orla_lg.core.scheduler import Desk

FULL = 0.9
"""So much of an engine's KV cache in the hands of running calls leaves no room."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a policy would have warmed on one backend."""

    workflow: str
    stage: tuple[str, str] | None
    """Graph and stage whose beginning it is about; ``None``: the workflow's own last prompt."""
    chance: float
    due_s: float
    """When (monotonic) the call is expected; ``inf``: not known."""


class Weighing:
    """Weighs what is wished of one backend. Under its desk's lock.

    Args:
        desk: The backend's.
        clock: Monotonic seconds.
        settings: What warm-ups may take.
    """

    def __init__(self, desk: Desk, clock: Callable[[], float], settings: WarmUp) -> None:
        self.heard_s = clock()
        """When the engine last served a call of ours."""
        self._desk = desk
        self._clock = clock
        self._settings = settings

    def why_not(self, wish: Wish, prompt: Prompt, load: EngineStats | None) -> Refused | None:
        """Return what speaks against a warm-up now; ``None``: nothing does."""
        desk = self._desk
        if not desk.health.can(Capability.WARM) or desk.health.state() is not Circuit.CLOSED or desk.queue.paused:
            return Refused.UNWELL
        if wish.due_s <= self._clock():
            return Refused.LATE
        if not self.has_room() or _is_full(load):
            return Refused.BUSY
        if (needless := self.needless(wish.workflow, prompt)) is not None:
            return needless
        missing = self.missing(wish.workflow, prompt)
        evicts = self._evicts(wish.workflow, prompt, missing)
        if evicts is None:
            return Refused.BUSY
        stakes = Stakes(
            wish.chance,
            missing,
            desk.pace.speed.prefill_tokens_per_s or PREFILL_TOKENS_PER_S,
            desk.queue.in_flight,
            evicts,
            wish.due_s - self._clock(),
        )
        return None if is_worth(stakes) else Refused.NOT_WORTH

    def has_room(self, entering: int = 0) -> bool:
        """Whether a warm-up would be in nobody's way, *entering* more calls in flight."""
        queue, settings = self._desk.queue, self._settings
        in_flight = queue.in_flight + entering
        if queue.waiting or self._desk.ledger.slots is not None:
            return not (queue.waiting or in_flight)
        takes = min(queue.engine_takes, inf if queue.max_concurrency is None else queue.max_concurrency)
        return in_flight < settings.room * takes if takes < inf else not in_flight

    def needless(self, workflow: str, prompt: Prompt) -> Refused | None:
        """Return why a prompt is not worth a request, however idle the engine is; ``None``: it may be worth one."""
        least_tokens = self._settings.least_tokens
        if prompt.tokens < least_tokens:
            return Refused.SHORT
        return Refused.THERE if self.missing(workflow, prompt) < least_tokens else None

    def missing(self, workflow: str, prompt: Prompt) -> float:
        """Return the tokens of a prompt that its call would not find in the cache, as far as we believe."""
        probe, ledger = self._desk.health.probe, self._desk.ledger
        told = probe is not None and bool(probe.incarnation)
        if not told and self._clock() - self.heard_s > self._settings.trust_s:
            return prompt.tokens
        if ledger.slots is None:
            found = ledger.cache.find(prompt.ask, workflow)
            return prompt.tokens - sum(piece.there_tokens for piece in found if piece.filled)
        there = ledger.slots.reusable(workflow, prompt.ask.prefix)
        return prompt.tokens - in_common_tokens(prompt, there)

    def _evicts(self, workflow: str, prompt: Prompt, missing: float) -> float | None:
        """Return the tokens that a warm-up would drive out; ``None`` where it finds no place, or nobody may leave."""
        ledger, limit = self._desk.ledger, self._desk.admission.capacity.limit
        if ledger.slots is None:
            full = ledger.cache.in_use_tokens + missing > limit
            return None if full else max(0.0, ledger.cache.tokens + missing - limit)
        slot = self.place(ledger.slots, workflow, prompt)
        if slot is None:
            return None
        return max(0.0, slot.tokens - in_common_tokens(prompt, slot.common(prompt.ask.prefix)))

    def place(self, slots: SlotTable, workflow: str, prompt: Prompt) -> Slot | None:
        """Return the slot for a warm-up, if there is one; never one that was just warmed for somebody else."""
        return slots.lendable(workflow, prompt.ask.prefix, self._clock(), self._desk.warming.book.owes)


def in_common_tokens(prompt: Prompt, messages: int) -> float:
    """Return the tokens of a prompt's first *messages* messages, by their length."""
    pieces = prompt.ask.pieces
    every = sum(chars for _, chars in pieces)
    return prompt.tokens * sum(chars for _, chars in pieces[:messages]) / every if every else 0.0


def _is_full(load: EngineStats | None) -> bool:
    """Whether an engine says that it has no room, for reasons of its own or of others that use it."""
    return load is not None and ((load.kv_usage or 0.0) > FULL or bool(load.waiting))
