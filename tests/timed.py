"""What is promised within a time: a machine that does something else may be late at one moment, but not at each."""

from __future__ import annotations

from collections.abc import Callable

TRIES = 6


def within(limit_s: float, took_s: Callable[[], float], tries: int = TRIES) -> None:
    """Assert that what *took_s* does and times takes less than *limit_s* seconds at one of some tries."""
    took = list[float]()
    while not took or min(took) >= limit_s:
        assert len(took) < tries, f"within {limit_s} s at none of {tries} tries: {took}"
        took.append(took_s())
