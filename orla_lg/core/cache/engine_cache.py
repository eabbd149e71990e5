"""The interface between the scheduler and an engine's cache, the same for both kinds of engine.

``PrefixTreeCache`` is for engines with a prefix tree that all workflows share (vLLM, SGLang, hosted APIs),
``SlotCache`` for engines with slots of one owner each (llama.cpp). The scheduler holds one of them and chooses again
when a probe says that the engine changed; no caller asks which it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from orla_lg.core.cache.verification import OrderLog, VerificationCounts
from orla_lg.core.call import Ask, Call, Usage
from orla_lg.core.engine.backend import Capability, Effect, Probe
from orla_lg.core.engine.speed import Speed
from orla_lg.core.memory.events import CacheAction, Doing, Holding
from orla_lg.core.queues import BackendQueue, Queued


@dataclass(frozen=True, slots=True)
class MemoryStatistics:
    """What one backend's cache is believed to hold, at one moment."""

    workflows: int
    """Workflows believed to hold cache there."""
    tokens: int
    """What they are believed to hold, in tokens; what they share counts once."""
    slots: int | None
    """``None`` on engines without slots."""
    slots_held: int
    effects: dict[str, int]
    """Per ``verb:effect``, and ``linger:effect`` for how long a model is to stay, how often."""
    saved: int
    """Slots' contents kept on the engine's disk."""
    truth: VerificationCounts
    """What was expected, against what ``cached_tokens`` verified."""


@dataclass(frozen=True, slots=True)
class Resident:
    """A workflow with a claim, at one moment."""

    workflow: str
    tokens: int
    """Of it, believed to be in the cache."""
    doing: Doing
    tenant: str | None = None


@dataclass(frozen=True, slots=True)
class AdmissionStatistics:
    """An admission at one moment."""

    limit_tokens: int | None
    """What may be wanted at once; ``None`` while nothing is known."""
    in_use_tokens: int
    """By calls in flight, their expected answers included."""
    wanted_tokens: int
    """In use, or counted on by workflows that wait for something else."""
    growth_tokens: int
    """What all these are expected to grow by."""
    losses: int
    """How often an answer found much less in the cache than it should."""
    lapsed: int
    """References given up for others, of those that waited too long for a tool or a human."""
    workflows: tuple[Resident, ...]


@dataclass(eq=False, slots=True)
class PrefetchLease:
    """The place that a prefetch holds in a cache: the one that its workflow's call would have."""

    ask: Ask
    slot: int | None = None
    """``None`` on engines without slots."""
    fresh: bool = False
    """The slot's old tokens must not be reused."""


@dataclass(frozen=True, eq=False, slots=True)
class Loan:
    """What one engine wrote of a workflow, for another one that reads the same files."""

    workflow: str
    name: str
    """What the file holds."""
    prefix: tuple[int, ...]
    """Chained message hashes of the prompt that left it."""
    tokens: int
    ended: Callable[[], None] = field(repr=False)
    """Called, under a lock, when the file is not needed there any more."""


class EngineCache(Protocol):
    """One engine's KV cache: which call may use it next, what it holds of each workflow. Under the backend's lock."""

    slots: int
    """How many slots the engine has; 0 on engines without."""
    prefetches_alone: bool
    """A prefetch runs only while no call is in flight."""

    @property
    def again_at_s(self) -> float:
        """When to choose again if nothing happens before; monotonic, ``inf`` for never."""
        ...

    @property
    def waiting_for_prefix(self) -> int:
        """How many calls waited for another one's prefill when it was last chosen."""
        ...

    def learned(self, probe: Probe, offers: Callable[[Capability], bool]) -> None:
        """Follow what the engine says of itself."""
        ...

    # Calls

    @property
    def lets_all(self) -> bool:
        """Whether any call that comes alone may enter now: ``choose`` would return it."""
        ...

    def choose(self, queue: BackendQueue, now: float, speed: Speed) -> Queued | None:
        """Return the call that goes next, or ``None`` if none may now; ``again_at_s`` says when to look again."""
        ...

    def enter(self, queued: Queued, now: float, speed: Speed) -> float:
        """Let a call in, setting its ``expected`` and, on engines with slots, its ``lease``.

        Returns the tokens that the engine is believed to give up for it, beyond what it holds.
        """
        ...

    def first_token(self, queued: Queued) -> bool:
        """Note that a call's prefill is done; returns whether other calls may have waited for it."""
        ...

    def leave(self, queued: Queued, usage: Usage | None, now: float, *, tokens: int, followed: bool) -> None:
        """Give back what a call used. Idempotent.

        Args:
            queued: The call.
            usage: What the engine counted, if it did.
            now: Monotonic seconds.
            tokens: What the call left in the cache; 0 if it cannot have reached the engine.
            followed: Whether its workflow goes on, and so counts on what was left.
        """
        ...

    def expected(self, call: Call, ask: Ask) -> float:
        """Return how many tokens of a call's prompt are there, those that other calls are prefilling included.

        Args:
            call: The call.
            ask: Its request, with the prefixes that it can find here (``isolation``).
        """
        ...

    # Workflows

    def apply(self, action: CacheAction) -> OrderLog | None:
        """Carry out what a policy asks for; returns the trail for the engine's answer, if it is to be asked."""
        ...

    def took_effect(self, action: CacheAction, order_log: OrderLog, effect: Effect, now: float) -> None:
        """Follow what the engine says it did."""
        ...

    def turned(self, workflow: str, doing: Doing, now: float) -> None:
        """Note what a workflow waits for, outside of any model."""
        ...

    def forget(self, workflow: str) -> None:
        """Drop what is known of a workflow that will not come back."""
        ...

    def lose(self) -> None:
        """Expect no contents any more: the engine may have been restarted."""
        ...

    def close(self) -> None:
        """End it: the engine keeps its cache in another way now."""
        ...

    def tidy(self) -> None:
        """Use a quiet moment of the engine for what waits for one."""
        ...

    # Moves of workflows between engines

    @property
    def shelf(self) -> str:
        """The same, and not empty, for engines that restore what the others of them saved."""
        ...

    def lend(self, workflow: str, now: float, lent: Callable[[Loan | None], None]) -> bool:
        """Have what is here of a workflow written for another engine of the same shelf, where that is worth it.

        Args:
            workflow: The one that is moved; no call of it is open here.
            now: Monotonic seconds.
            lent: Called without the lock, from any thread, when it is written; with ``None`` where that failed.

        Returns whether *lent* will be called.
        """
        ...

    def borrow(self, loan: Loan, now: float) -> None:
        """Have the workflow's next call restored from what another engine wrote, until that is used or not of use."""
        ...

    # Prefetches

    def missing(self, workflow: str, ask: Ask, tokens: int) -> float:
        """Return the tokens of a prompt of *tokens* that its call would not find."""
        ...

    def evicts(
        self, workflow: str, ask: Ask, tokens: int, missing: float, now: float, spared: Callable[[str], bool]
    ) -> float | None:
        """Return the tokens that a prefetch would drive out; ``None`` where it finds no place.

        Args:
            workflow: The prefetch's.
            ask: Its prompt.
            tokens: The prompt's length.
            missing: Of these, those not in the cache.
            now: Monotonic seconds.
            spared: Says of a workflow whether its cache must not go.
        """
        ...

    def acquire_prefetch(
        self, workflow: str, ask: Ask, tokens: int, now: float, spared: Callable[[str], bool]
    ) -> PrefetchLease:
        """Give a prefetch the place that ``evicts`` found, under the same lock."""
        ...

    def release_prefetch(self, prefetch: PrefetchLease, tokens: int) -> None:
        """End a prefetch; *tokens* of its prompt are in the cache now, 0 if that is not known."""
        ...

    def recall(self, slot: int, workflow: str, prefix: tuple[int, ...], tokens: int, used_s: float) -> None:
        """Note what a workflow left in a slot under a core before this one, unless the slot was used since.

        Args:
            slot: Its number.
            workflow: Whose call was the last in it.
            prefix: Of that call's prompt.
            tokens: What it left there.
            used_s: When it ended (monotonic).
        """
        ...

    def next_expiry_s(self, now: float) -> float:
        """Return when (monotonic) a place may be taken that is held now; ``inf`` if none is."""
        ...

    # Looking

    def tokens_of(self, workflow: str) -> int:
        """Return how many tokens of a workflow are believed to be there."""
        ...

    def workflows(self) -> dict[str, int]:
        """Return the workflows believed to have something there, and how many tokens."""
        ...

    def interrupted(self) -> set[str]:
        """Return the workflows known here to wait for a human."""
        ...

    def holdings(self) -> list[Holding]:
        """Return which workflows without a call in flight could give up what, where that can be asked for."""
        ...

    def statistics(self) -> MemoryStatistics:
        """Return a snapshot."""
        ...

    def admission_statistics(self) -> AdmissionStatistics | None:
        """Return a snapshot of how calls are admitted; ``None`` on engines with slots."""
        ...

    def check_integrity(self) -> None:
        """Assert the invariants."""
        ...
