"""What ``cached_tokens`` of an answer say of what we believed.

Engines cache whole blocks and always compute the last token, so a little less than believed is no contradiction. How
much a block holds shows in the answers: all they ever found is a multiple of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd, inf

COARSE_TOKENS = 128
"""The largest block that is usual (vLLM's on CPUs); smaller ones are recognised by what answers found."""


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
        end = 0.0
        for index, tokens in enumerate(believed):
            end += tokens
            if min(end, prompt_tokens - 1) >= most:
                return index
        return None
