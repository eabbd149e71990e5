"""A table by stage, and what of it decides each stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from orla_lg.core.identity import ANY_STAGE, NAMESPACE_SEPARATOR

T = TypeVar("T")

KEEP_STAGES = 4096
"""Of so many stages a table remembers what decides them."""


def place_names(place: str) -> Iterator[str]:
    """Yield what a table may call a place in a graph: its whole key, then shorter ends of it, to the node's name.

    A graph that runs inside another one is thereby found by its own names, whatever lies around it.
    """
    while place:
        yield place
        place = place.partition(NAMESPACE_SEPARATOR)[2]


@dataclass(frozen=True, slots=True)
class Ruling(Generic[T]):
    """The entry of a table that decides a stage."""

    name: str
    """The entry's name in the table."""
    place: str
    """What the name covers: the stage itself, or the node around it; for ``"*"``, the stage."""
    entry: T


class StageRules(Mapping[str, T]):
    """A table by stage, read once: the most specific name decides, else the nearest enclosing node's, else ``"*"``.

    Of ``desk|support|model`` these names are asked for in turn: ``desk|support|model``, ``support|model``, ``model``;
    then of the node around it ``desk|support``, ``support``; then ``desk``; then ``"*"``. A call outside any graph is
    in no stage: nothing decides it.
    """

    __slots__ = ("_entries", "find")

    def __init__(self, entries: Mapping[str, T]) -> None:
        self._entries = dict(entries)
        self.find: Callable[[str], Ruling[T] | None] = _Rulings(self._entries).__getitem__
        """Return what decides a stage; each call asks it, so it is a dictionary's own method."""

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return repr(self._entries)


class _Rulings(dict[str, Ruling[T] | None]):
    """What decides each stage that was asked for, worked out the first time."""

    def __init__(self, entries: Mapping[str, T]) -> None:
        super().__init__()
        self._entries = entries

    def __missing__(self, stage: str) -> Ruling[T] | None:
        if len(self) >= KEEP_STAGES:
            self.clear()
        found = self[stage] = self._look(stage)
        return found

    def _look(self, stage: str) -> Ruling[T] | None:
        place = stage
        while place:
            for name in place_names(place):
                if name in self._entries:
                    return Ruling(name, place, self._entries[name])
            place = place.rpartition(NAMESPACE_SEPARATOR)[0]
        is_any = bool(stage) and ANY_STAGE in self._entries
        return Ruling(ANY_STAGE, stage, self._entries[ANY_STAGE]) if is_any else None
