"""What ``cached_tokens`` of an answer say of what we believed: the only evidence where the engine has no events.

Engines cache whole blocks and always compute the last token, so a little less than believed is no contradiction. How
much a block holds shows in the answers: all they ever found is a multiple of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd, inf

COARSE_TOKENS = 128
"""The largest block that is usual (vLLM's on CPUs); smaller ones are recognised by what answers found."""


@dataclass(frozen=True, slots=True)
class HitReport:
    """Counts over the answers so far, in tokens of their prompts."""

    claimed_tokens: int
    """What we believed to be cached when the calls went."""
    verified_tokens: int
    """Of these, what was."""
    surplus_tokens: int
    """What was cached though we did not believe it: evicted later than we thought, or another process's."""
    contradicted: int
    """Answers that found less than we believed."""


class HitCheck:
    """Compares expected tokens with answers, and counts both."""

    def __init__(self) -> None:
        self.block_tokens: int | None = None
        """By the engine's events; ``None`` without any."""
        self.claimed_tokens = 0.0
        self.verified_tokens = 0.0
        self.surplus_tokens = 0.0
        self.contradicted = 0
        self._divisor = 0
        """Of all that was ever found."""

    @property
    def slack_tokens(self) -> int:
        """By so much less than believed may be found though nothing was evicted."""
        return self.block_tokens or min(self._divisor or COARSE_TOKENS, COARSE_TOKENS)

    def first_lost(self, believed: Iterable[float], cached_tokens: int, prompt_tokens: float = inf) -> int | None:
        """Return the first piece of a prompt that was not wholly found; ``None``: all that was believed was.

        Args:
            believed: Tokens of each piece that we believed to be cached, from the beginning of the prompt.
            cached_tokens: What the engine found.
            prompt_tokens: Of all the prompt; the last of them it does not look for.
        """
        self._divisor = gcd(self._divisor, cached_tokens)
        most = cached_tokens + self.slack_tokens
        end, lost = 0.0, None
        for index, tokens in enumerate(believed):
            end += tokens
            if lost is None and min(end, prompt_tokens - 1) >= most:
                lost = index
        self.claimed_tokens += end
        self.verified_tokens += min(end, cached_tokens)
        self.surplus_tokens += max(0.0, cached_tokens - end)
        self.contradicted += lost is not None
        return lost

    def testimony(self) -> HitReport:
        """Return the counts so far."""
        return HitReport(
            round(self.claimed_tokens), round(self.verified_tokens), round(self.surplus_tokens), self.contradicted
        )
