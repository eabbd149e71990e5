"""What numbers on a benchmark's command line may be: a wrong one is told at once, not by a traceback later.

Each is a ``type`` for ``add_argument``.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from math import isfinite
from typing import TypeVar

Number = TypeVar("Number", int, float)


def count(said: str) -> int:
    """Read a whole number, 1 or more."""
    return _read(said, int, lambda value: value >= 1, "a whole number, 1 or more")


def whole(said: str) -> int:
    """Read a whole number, 0 or more."""
    return _read(said, int, lambda value: value >= 0, "a whole number, 0 or more")


def folds(said: str) -> int:
    """Read into how many parts something is split."""
    return _read(said, int, lambda value: value >= 2, "a whole number, 2 or more")


def port(said: str) -> int:
    """Read a port; 0 is a free one."""
    return _read(said, int, lambda value: 0 <= value <= 65_535, "a port, 0 to 65535")


def amount(said: str) -> float:
    """Read a number, 0 or more."""
    return _read(said, float, lambda value: value >= 0, "a number, 0 or more")


def above_zero(said: str) -> float:
    """Read a number above 0."""
    return _read(said, float, lambda value: value > 0, "a number above 0")


def share(said: str) -> float:
    """Read a part of the whole."""
    return _read(said, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _read(said: str, kind: Callable[[str], Number], fits: Callable[[Number], bool], what: str) -> Number:
    try:
        value = kind(said)
    except ValueError:
        raise ArgumentTypeError(f"expected {what}, got {said!r}") from None
    if not (isfinite(value) and fits(value)):
        raise ArgumentTypeError(f"expected {what}, got {said!r}")
    return value
