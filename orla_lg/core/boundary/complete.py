"""Tables with an entry for each member of an enumeration, or each name of another table: checked when imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

K = TypeVar("K", bound=str)
V = TypeVar("V")


def complete(names: Iterable[K], table: Mapping[K, V], what: str) -> Mapping[K, V]:
    """Return *table*, which has an entry for each of *names* and no other.

    Args:
        names: The members of an enumeration, or the keys of the table that this one follows.
        table: By name.
        what: Names the table in the error.

    Raises:
        TypeError: An entry is missing, or one stands for a name that there is not.
    """
    wanted = list(names)
    if missing := [str(name) for name in wanted if name not in table]:
        raise TypeError(f"{what} has no entry for {', '.join(missing)}: add one")
    if unknown := [str(name) for name in table if name not in wanted]:
        raise TypeError(f"{what} has an entry for {', '.join(unknown)}, which there is not: remove it")
    return table
