"""A table by stage, and what of it decides each stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Generic, TypeVar

from orla_lg.core.boundary.stage_keys import StageKey, graphs_in, key_of, parted, with_part
from orla_lg.core.identity import ANY_STAGE, NAMESPACE_SEPARATOR

T = TypeVar("T")

KEEP_STAGES = 4096
"""Of so many stages a table remembers what decides them."""


MOST_LEFT_OUT = 5
"""Of graphs in tools that lie in one another, each of so many may be left out; those further out only together."""


def place_names(place: str) -> Iterator[str]:
    """Yield what a table may call a place in a graph: its whole key, then shorter ends of it, to the node's name.

    A graph that runs inside another one is thereby found by its own names, whatever lies around it.
    """
    for name, _ in _names(place):
        yield name


def whole_names(stage: str) -> list[str]:
    """Return a stage's key, and after it those that leave out names of graphs in tools."""
    return [name for name, named in _names(stage) if name == named] if graphs_in(stage) else [stage]


def around(place: str) -> str:
    """Return the place around one; empty for the whole graph."""
    parts = place.split(NAMESPACE_SEPARATOR)[:-1]
    return key_of(parts, tuple(n for n in graphs_in(place) if n < len(parts)))


def _names(place: str) -> Iterator[tuple[str, str]]:
    """Yield what a table may call a place, most specific first, each with the place that it names thereby."""
    if graphs_in(place):
        for name, named, _ in _names_in_tools(place):
            yield name, named
        return
    name = place
    while name:
        yield name, place
        name = name.partition(NAMESPACE_SEPARATOR)[2]


def _deciding(stage: str) -> Iterator[tuple[str, str]]:
    """Yield the names that may decide a stage, in the order in which they are asked for, each with what it names.

    In graphs in tools the names that say the innermost graph come first, from the stage outwards to that graph; then
    the others, as if it had no name.
    """
    place = stage
    if graphs := graphs_in(stage):
        innermost = graphs[-1]
        while graphs_in(place)[-1:] == (innermost,):
            yield from ((name, named) for name, named, said in _names_in_tools(place) if innermost in said)
            place = around(place)
        parts = stage.split(NAMESPACE_SEPARATOR)
        yield from _deciding(_only(parts, graphs, graphs[:-1]))
        return
    while place:
        yield from _names(place)
        place = around(place)


def _names_in_tools(place: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return the names of a place that lies in graphs in tools, with the graphs that each says: any may be left out.

    A name with more of them is more specific, then a longer one, then one of graphs further in. It names the place
    without those that it leaves out, so that what it says holds for all that differ in these only.
    """
    parts, graphs = place.split(NAMESPACE_SEPARATOR), graphs_in(place)
    inner = [n for n in graphs if n < len(parts) - 1]
    far, near = inner[:-MOST_LEFT_OUT], inner[-MOST_LEFT_OUT:]
    found: dict[str, tuple[int, int, tuple[int, ...]]] = {}
    for choice in product(*(((n,), ()) for n in near), (tuple(far), ())):
        left_out = {n for some in choice for n in some}
        kept = [n for n in range(len(parts)) if n not in left_out]
        for start in range(len(kept)):
            said = tuple(n for n in kept[start:] if n in graphs)
            rank = (len(said), len(kept) - start, said[::-1])
            name = NAMESPACE_SEPARATOR.join(parts[n] for n in kept[start:])
            found[name] = max(found.get(name, rank), rank)
    ordered = sorted(found, key=found.__getitem__, reverse=True)
    return [(name, _only(parts, graphs, said := found[name][2][::-1]), said) for name in ordered]


def _only(parts: list[str], graphs: tuple[int, ...], named: tuple[int, ...]) -> str:
    """Return the place of *parts* with no other graphs in tools than the *named* ones."""
    kept = [n for n in range(len(parts)) if n not in graphs or n in named]
    return key_of([parts[n] for n in kept], tuple(at for at, n in enumerate(kept) if n in named))


@dataclass(frozen=True, slots=True)
class Ruling(Generic[T]):
    """The entry of a table that decides a stage."""

    name: str
    """The entry's name in the table."""
    place: str
    """What the name covers: the stage itself, or the node around it; for ``"*"``, the stage. Graphs in tools that the
    name leaves out are left out here: it covers their stages together."""
    entry: T


class StageRules(Mapping[str, T]):
    """A table by stage, read once: the most specific name decides, else the nearest enclosing node's, else ``"*"``.

    Of ``desk|support|model`` these names are asked for in turn: ``desk|support|model``, ``support|model``, ``model``;
    then of the node around it ``desk|support``, ``support``; then ``desk``; then ``"*"``. A call outside any graph is
    in no stage: nothing decides it.

    Of a graph that runs inside a tool the name may be left out, but what says it comes first:
    ``tools|researcher|model`` is found as ``tools|researcher|model``, ``researcher|model``, ``tools|researcher``,
    ``researcher``; then as ``tools|model``, ``model``; then ``tools``.

    Embeddings are decided by entries of their own, ``retrieve:embeddings`` or ``*:embeddings``, and by no others.
    """

    __slots__ = ("_entries", "_in_tools", "_rulings")

    def __init__(self, entries: Mapping[str, T]) -> None:
        self._entries = dict(entries)
        self._rulings, self._in_tools = _Rulings(self._entries), _Rulings(self._entries)

    def find(self, stage: str) -> Ruling[T] | None:
        """Return what decides a stage."""
        # Apart, since a key with names of graphs equals the same text without.
        return self._in_tools[stage] if type(stage) is StageKey else self._rulings[stage]

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
        node, part = parted(stage)
        for name, named in _deciding(node):
            if (name := name + part) in self._entries:
                return Ruling(name, with_part(named, part), self._entries[name])
        is_any = bool(node) and (any_stage := ANY_STAGE + part) in self._entries
        return Ruling(any_stage, stage, self._entries[any_stage]) if is_any else None
