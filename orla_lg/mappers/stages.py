"""The stages of a graph as far as they show before it runs, and tables by stage held against them.

A node with code of its own may run any graph inside it, so what it could hold is not held against a table; what is
misspelt, or can never decide anything, is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from orla_lg.core.boundary.stage_rules import StageRules, place_names
from orla_lg.core.identity import ANY_STAGE, NAMESPACE_SEPARATOR
from orla_lg.errors import did_you_mean, shown

NEARLY = 0.7
"""How much two names have in common of which one is taken for the other, misspelt (``difflib``'s ratio)."""


@dataclass(frozen=True)
class KnownStages:
    """The stages that a graph shows before it runs; those that call models are what iterating yields."""

    callers: tuple[str, ...]
    """Nodes with code of their own, by key: it may call a model, or a graph that does."""
    groups: tuple[str, ...] = ()
    """Nodes that are a graph and nothing else: only what is inside calls."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.callers)

    @cached_property
    def names(self) -> frozenset[str]:
        """All that a table may call a node by."""
        return frozenset(name for place in self._places for name in place_names(place))

    @cached_property
    def _places(self) -> frozenset[str]:
        """Nodes, and the nodes around them."""
        parts = (place.split(NAMESPACE_SEPARATOR) for place in (*self.callers, *self.groups))
        return frozenset(NAMESPACE_SEPARATOR.join(each[:n]) for each in parts for n in range(1, len(each) + 1))

    @cached_property
    def _open(self) -> frozenset[str]:
        """Names of nodes that may hold more than shows."""
        return frozenset(name for place in self.callers for name in place_names(place))

    def may_be(self, name: str) -> bool:
        """Whether *name* could be a stage that shows only when the graph runs, and is not one misspelt."""
        if not all(name.split(NAMESPACE_SEPARATOR)):
            return False
        around, _, rest = name.rpartition(NAMESPACE_SEPARATOR)
        while around and around not in self.names:
            around, _, inner = around.rpartition(NAMESPACE_SEPARATOR)
            rest = f"{inner}{NAMESPACE_SEPARATOR}{rest}"
        first = rest.partition(NAMESPACE_SEPARATOR)[0]
        return around in self._open and not difflib.get_close_matches(first, self._in(around), n=1, cutoff=NEARLY)

    def _in(self, around: str) -> set[str]:
        """Return the names of the nodes right inside those called *around*."""
        pairs = (place.rpartition(NAMESPACE_SEPARATOR) for place in self._places)
        return {node for outer, _, node in pairs if around in place_names(outer)}


def check_stages(
    rules: Mapping[str, object], known: Iterable[str], *, said_by: str = "the mapping", of: str = "the graph"
) -> list[str]:
    """Return a fault for every name in *rules* that decides nothing in a graph.

    Args:
        rules: By stage.
        known: The stages of the graph.
        said_by: What to call the rules.
        of: What to call the graph.
    """
    stages = known if isinstance(known, KnownStages) else KnownStages(tuple(known))
    table = rules if isinstance(rules, StageRules) else StageRules(rules)
    deciding = {ruling.name for stage in stages if (ruling := table.find(stage)) is not None}
    faults = []
    for name in table:
        if name == ANY_STAGE or name in deciding:
            continue
        if name in stages.names:
            faults.append(
                f"{said_by} names stage {shown(name)}, which decides nothing: {_nearer(name, table, stages)}"
            )
        elif not stages.may_be(name):
            near = did_you_mean(name, stages.names)
            faults.append(f"{said_by} names stage {shown(name)}, which {of} does not have{near}")
    return faults


def _nearer(name: str, table: StageRules[object], stages: KnownStages) -> str:
    """Return what decides the stages that *name* would cover."""
    decided = []
    for stage in stages:
        ruling = table.find(stage)
        parts = stage.split(NAMESPACE_SEPARATOR)
        around = (NAMESPACE_SEPARATOR.join(parts[: n + 1]) for n in range(len(parts)))
        if ruling is not None and any(name in place_names(place) for place in around):
            decided.append(f"{stage!r} is decided by {ruling.name!r}")
    return ", ".join(decided) or "no node in it calls a model"
