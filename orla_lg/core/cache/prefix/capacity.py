"""How many tokens an engine's KV cache holds: by its probe, or learned from what it lost.

Small increases and one large decrease (after Chiu and Jain, 1989), as TCP finds out about a network: an answer that
found much less in the cache than we believed means that we believed too much to fit; answers that found what they
should, though nearly as much was used since as we allow, let us try a little more. An engine with a size in its probe
is held to at most that; it may be less where others share it.

What is decreased is not the limit as it stands, but the size that would have been *enough* for what was lost: a cache
that evicts what was used longest ago still holds a piece if it has room for all that was used since (Mattson's stack
distance, 1970). What is lost shows that the engine has less than that, so the limit never falls below ``DECREASE`` of
the true size, be there ever so many losses, and however little was wanted at the time.

Engines cache whole blocks and always compute the last token, so a little less than believed is no contradiction. How
much a block holds shows in the answers: all they ever found is a multiple of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd, inf

DECREASE = 0.85
INCREASE = 0.02
"""Of the limit, for each good answer that a much smaller cache could not have given."""

NEARLY_FULL = 0.9
"""Of the limit: what so large a cache was needed for shows that the limit may be too low."""

SLACK_TOKENS = 128.0
SLACK = 0.25
"""Engines cache by blocks and compute the last token anyway: so much less found than expected is no loss."""

CACHES = 0.5
"""Once so much of a prompt was found, the engine does cache; before, a loss says nothing of its size."""

LEAST = 0.6
"""Of the size in an engine's probe."""

ROUNDING = 0.97
"""The limit is so much of the size that an engine tells: blocks that are not full hold less."""

COARSE_TOKENS = 128
"""The largest block that is usual (vLLM's on CPUs); smaller ones are recognised by what answers found."""


class Capacity:
    """The limit for what is wanted at once, in tokens; ``inf`` while nothing is known."""

    def __init__(self) -> None:
        self.told: float | None = None
        self.limit = inf
        self.losses = 0
        """How often an answer found much less than it should."""
        self._caches = False

    def tell(self, kv_tokens: int | None) -> None:
        """Take in what the engine says it holds."""
        told = None if kv_tokens is None else kv_tokens * ROUNDING
        if told != self.told:
            self.told, self.limit = told, inf if told is None else told

    @property
    def most(self) -> float:
        """What it can be at most."""
        return inf if self.told is None else self.told

    @property
    def least(self) -> float:
        """What is believed whatever happens: others that share an engine can have but a part of it."""
        return 0.0 if self.told is None else LEAST * self.told

    def lost(self, expected_tokens: float, cached_tokens: int) -> bool:
        """Whether an answer found so much less in the cache that something was evicted."""
        return expected_tokens - cached_tokens > max(SLACK_TOKENS, SLACK * expected_tokens)

    def found(self, expected_tokens: float, cached_tokens: int, enough_tokens: float) -> None:
        """Learn from an answer.

        Args:
            expected_tokens: Of its prompt, what we believed to be cached when it went.
            cached_tokens: What was.
            enough_tokens: A cache of this size would have kept all of that.
        """
        if self.lost(expected_tokens, cached_tokens):
            self.losses += 1
            if self._caches:  # calls that lost side by side say the same: the limit is decreased once, not by each
                self.limit = max(min(self.limit, DECREASE * enough_tokens), self.least)
            return
        self._caches = self._caches or cached_tokens > max(SLACK_TOKENS, CACHES * expected_tokens)
        if enough_tokens > NEARLY_FULL * self.limit:
            self.limit = min(self.most, self.limit * (1 + INCREASE))


class HitCheck:
    """Compares expected tokens with answers."""

    def __init__(self) -> None:
        self._divisor = 0
        """Of all that was ever found."""

    @property
    def slack_tokens(self) -> int:
        """By so much less than believed may be found though nothing was evicted."""
        return min(self._divisor or COARSE_TOKENS, COARSE_TOKENS)

    def first_lost(self, believed: Iterable[float], cached_tokens: int, prompt_tokens: float = inf) -> int | None:
        """Return the first piece of a prompt that was not wholly found; ``None``: all that was believed was.

        Args:
            believed: Tokens of each piece that we believed to be cached, from the beginning of the prompt.
            cached_tokens: What the engine found.
            prompt_tokens: Of all the prompt; the last of them it does not look for.
        """
        self._divisor = gcd(self._divisor, cached_tokens)
        most = cached_tokens + self.slack_tokens
        if prompt_tokens - 1 < most:
            return None
        end = 0.0
        for index, tokens in enumerate(believed):
            end += tokens
            if end >= most:
                return index
        return None
