"""Ids of calls."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable


def call_ids() -> Callable[[], str]:
    """Return a source of ids for calls; 48 random bits in front keep those of other processes and machines apart."""
    replica, numbers = secrets.token_hex(6), itertools.count(1)
    return lambda: f"{replica}-{next(numbers)}"
