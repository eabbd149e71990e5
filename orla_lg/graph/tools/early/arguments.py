"""A tool's validated arguments: when those of two calls are the same, and kept apart from what a body may change."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional ones, and those by name."""

_SCALARS = (str, int, float, bool, type(None))


def apart(arguments: Arguments) -> Arguments:
    """Return a copy that shares nothing with *arguments* that can be changed.

    Raises:
        Exception: A value cannot be copied.
    """
    args, kwargs = arguments
    for each in (*args, *kwargs.values()):
        if type(each) not in _SCALARS:
            return copy.deepcopy(args), copy.deepcopy(dict(kwargs))
    return args, dict(kwargs)


def are_equal(one: Arguments, other: Arguments) -> bool:
    """Whether two calls have the same arguments: 1, 1.0 and ``True`` are three."""
    try:
        return _same(list(one[0]), list(other[0])) and _same(dict(one[1]), dict(other[1]))
    except Exception:  # noqa: BLE001 - values may be of the user's classes, whose comparison may raise anything
        return False


def are_said_alike(one: Any, other: Any) -> bool:
    """Whether two parsed JSON texts say the same."""
    return _same(one, other)


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
