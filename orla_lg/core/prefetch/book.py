"""Whether a warm-up is worth it: the rule, its settings, and what came of those that were made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf

from orla_lg.arguments import answering
from orla_lg.core.boundary import checked
from orla_lg.errors import ConfigError, shown

SLOWS = 0.3
"""So much of a prefill's time each call is held up that the engine decodes beside it: they share its steps."""

NOTICE_S = 0.1
"""What a warm-up may cost a call that comes while it runs: until the engine notices that it was given up."""


@answering
@dataclass(frozen=True, slots=True)
class WarmUp:
    """What warm-ups may take.

    Raises:
        ConfigError: A figure is out of its range.
    """

    keep_chars: int = 16_000_000
    """Of prompts, for each backend. Prompts are kept for nothing else, and not beyond their workflow."""
    room: float = 0.5
    """An engine has room while fewer calls are in flight than this part of what it takes at once. Where that is not
    known, and on engines with slots, it has room only while there are none."""
    least_tokens: int = 192
    """Less than that is not worth a request."""
    trust_s: float = 600.0
    """An engine that cannot tell when it was started is believed to hold what it held for so long after its last
    answer."""
    priced: bool = False
    """Whether backends with a price for input are warmed. What that costs is counted in ``WarmStatistics``; neither
    limits nor ``costs`` see it."""

    def __post_init__(self) -> None:
        for name in ("keep_chars", "least_tokens", "trust_s"):
            if getattr(self, name) != inf:
                checked.number(f"warm_up: {name}", getattr(self, name), least=0)
        if not 0 < checked.number("warm_up: room", self.room) <= 1:
            raise ConfigError(f"warm_up: room must be above 0 and at most 1, got {self.room}")


class SkipReason(StrEnum):
    """Why what a policy requested was not warmed."""

    ENGINE = "engine"
    """It cannot, did not say that it can, or is any server that speaks OpenAI's API: it may be paid by the token."""
    PRICED = "priced"
    UNWELL = "unwell"
    """The engine does not answer, its circuit is open, or the backend is paused."""
    UNKNOWN = "unknown"
    """No prompt is kept that could be warmed."""
    SHORT = "short"
    """It has fewer tokens than are worth a request (``WarmUp.least_tokens``), wherever they are."""
    THERE = "there"
    """All but a little of it is believed to be in the cache."""
    BUSY = "busy"
    """Calls wait, or too much is in flight; it is looked at again when a call ends."""
    LATE = "late"
    """The call was to be there by now."""
    SHORT_WAIT = "short_wait"
    """Of a split prompt: the tools that still run usually end before the prefill would."""
    NOT_WORTH = "not_worth"


@dataclass(frozen=True, slots=True)
class PrefetchBargain:
    """What is to be gained by a warm-up, and what lost."""

    chance: float
    """That the call comes which begins like this."""
    missing_tokens: float
    """So much of the prompt is not believed to be in the cache."""
    tokens_per_s: float
    """That the engine prefills."""
    beside: int = 0
    """Calls that the engine runs, those of others included as far as it says."""
    evicts_tokens: float = 0.0
    """What the engine would give up for it."""
    within_s: float = inf
    """When the call is expected, in seconds from now."""


def is_worth(stakes: PrefetchBargain) -> bool:
    """Return whether the seconds that the call is expected to save exceed those that others lose.

    gain = chance × (prefill of what is missing, or the time until the call if that is shorter)
    cost = prefill × ``SLOWS`` × calls beside it + (1 − chance) × prefill of what it evicts + ``NOTICE_S``

    What it evicts counts only for the case that the call does not come: if it does, it would have evicted the same.
    """
    prefill_s = stakes.missing_tokens / stakes.tokens_per_s
    gain_s = stakes.chance * min(prefill_s, stakes.within_s)
    evicted_s = stakes.evicts_tokens / stakes.tokens_per_s
    return gain_s > prefill_s * SLOWS * stakes.beside + (1 - stakes.chance) * evicted_s + NOTICE_S


@dataclass(frozen=True, slots=True)
class WarmStatistics:
    """A backend's warm-ups at one moment. ``warmed_tokens`` = used + wasted + those still waiting for their call."""

    started: int = 0
    done: int = 0
    given_up: int = 0
    """Because a call came."""
    failed: int = 0
    """The engine would not, or broke off."""
    refused: dict[str, int] = field(default_factory=dict)
    """By reason (``SkipReason``), how often what a policy requested was not begun."""
    warmed_tokens: int = 0
    """Computed by those that were done, and by those given up as far as their calls found it."""
    used_tokens: int = 0
    """Of these, found by the call that they were for: its ``cached_tokens``, less what was there before."""
    wasted_tokens: int = 0
    cost_usd: float = 0.0
    kept_prompts: int = 0
    kept_chars: int = 0
    split_started: int = 0
    """Of those started, how many were of split prompts: next ones, as far as they are certain while tools run."""
    split_warmed_tokens: int = 0
    """Of ``warmed_tokens``, likewise."""
    split_used_tokens: int = 0
    """Of ``used_tokens``, likewise."""


Prefix = tuple[int, ...]
"""The messages of a prompt as chained hashes (``Ask.prefix``)."""


@dataclass(frozen=True, slots=True)
class Prefetched:
    """What a warm-up computed for a call that is still to come."""

    had_tokens: int
    """Of its prompt, in the cache before."""
    computed_tokens: int
    """Of one that was given up: at most."""
    done: bool = True
    """``False``: it was given up, and how much it computed shows only in what is found."""
    split: bool = False
    """It was of a prompt that follows on the answer of a call whose tools ran."""

    def used_by(self, cached_tokens: int) -> int:
        """Return how much of it a call found."""
        return max(0, min(self.computed_tokens, cached_tokens - self.had_tokens))


class PrefetchBook:
    """What warm-ups computed, and whether the calls that they were for found it. Under the backend's lock."""

    def __init__(self) -> None:
        self.started = self.done = self.given_up = self.failed = 0
        self.refused: Counter[str] = Counter()
        self.cost_usd = 0.0
        self.split_started = 0
        self._warmed = self._used = self._wasted = 0
        self._split_warmed = self._split_used = 0
        self._owed: dict[str, dict[Prefix, Prefetched]] = {}
        """By workflow, and what was warmed of the call that is to come."""

    def warmed(self, workflow: str, prefix: Prefix, owed: Prefetched) -> None:
        """Note what a warm-up computed for the workflow's next call that begins with *prefix*."""
        self.done += 1
        self._add(owed.computed_tokens, split=owed.split)
        waiting = self._owed.setdefault(workflow, {})
        before = waiting.get(prefix)
        if before is not None:  # evicted since, or a part of this one: the call will show
            computed = before.computed_tokens if before.done else before.used_by(owed.had_tokens)
            self._add(0 if before.done else computed, split=before.split)
            owed = Prefetched(before.had_tokens, computed + owed.computed_tokens, split=owed.split)
        waiting[prefix] = owed

    def gave_up(self, workflow: str, prefix: Prefix, at_most: Prefetched | None) -> None:
        """Note that a warm-up was given up; ``None``: before it reached the engine."""
        self.given_up += 1
        if at_most is not None:
            self._owed.setdefault(workflow, {}).setdefault(prefix, at_most)

    def owes(self, workflow: str) -> bool:
        """Whether something was warmed for a call of the workflow that did not come yet."""
        return any(owed.done for owed in self._owed.get(workflow, {}).values())

    def called(self, workflow: str, prefix: Prefix, cached_tokens: int | None) -> None:
        """Hold a call with a prompt against what was warmed for it; engines that do not count leave that open."""
        waiting = self._owed.get(workflow)
        if waiting is None or cached_tokens is None:
            return
        for warmed in [warmed for warmed in waiting if prefix[: len(warmed)] == warmed]:
            owed = waiting.pop(warmed)
            used = owed.used_by(cached_tokens)
            self._used += used
            self._split_used += used if owed.split else 0
            if owed.done:
                self._wasted += owed.computed_tokens - used
            else:
                self._add(used, split=owed.split)
        if not waiting:
            del self._owed[workflow]

    def _add(self, tokens: int, *, split: bool) -> None:
        self._warmed += tokens
        self._split_warmed += tokens if split else 0

    def forget(self, workflow: str) -> None:
        """Note that a workflow's calls will not come any more."""
        self._wasted += sum(owed.computed_tokens for owed in self._owed.pop(workflow, {}).values() if owed.done)

    def statistics(self, kept_prompts: int, kept_chars: int) -> WarmStatistics:
        """Return a snapshot."""
        return WarmStatistics(
            self.started,
            self.done,
            self.given_up,
            self.failed,
            {str(reason): times for reason, times in self.refused.items()},
            self._warmed,
            self._used,
            self._wasted,
            self.cost_usd,
            kept_prompts,
            kept_chars,
            self.split_started,
            self._split_warmed,
            self._split_used,
        )


def settings_of(chosen: bool | WarmUp) -> WarmUp | None:
    """Return what ``warm_up=`` means; ``None``: no warm-ups.

    Raises:
        ConfigError: It is neither a truth value nor settings.
    """
    if isinstance(chosen, WarmUp):
        return chosen
    if not isinstance(chosen, bool):
        raise ConfigError(f"warm_up must be true, false or WarmUp(...), got {shown(chosen)}")
    return WarmUp() if chosen else None
