"""What numbers a benchmark's command line takes: a wrong one ends it at once, with a line that says what is right.

Each is a ``type`` for ``add_argument``.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from math import isfinite
from typing import TypeVar

Number = TypeVar("Number", int, float)


def _read(kind: Callable[[str], Number], fits: Callable[[Number], bool], what: str) -> Callable[[str], Number]:
    def read(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            raise ArgumentTypeError(f"expected {what}, got {text!r}") from None
        if not (isfinite(value) and fits(value)):
            raise ArgumentTypeError(f"expected {what}, got {text!r}")
        return value

    return read


count = _read(int, lambda value: value >= 1, "a whole number, 1 or more")
whole = _read(int, lambda value: value >= 0, "a whole number, 0 or more")
folds = _read(int, lambda value: value >= 2, "a whole number, 2 or more")
port = _read(int, lambda value: 0 <= value <= 65_535, "a port, 0 to 65535")
amount = _read(float, lambda value: value >= 0, "a number, 0 or more")
above_zero = _read(float, lambda value: value > 0, "a number above 0")
share = _read(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
