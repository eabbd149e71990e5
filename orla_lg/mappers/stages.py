"""The stages of a graph as far as they show before it runs, and tables by stage held against them.

A node with code of its own may run any graph inside it, so what it could hold is not held against a table; what is
misspelt, or can never decide anything, is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from orla_lg.core.boundary.stage_keys import EMBEDDINGS, graphs_in, parted, with_part
from orla_lg.core.boundary.stage_rules import StageRules, around, place_names
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
    tool_nodes: tuple[str, ...] = ()
    """Of the callers, those that run tools: what graphs these run may show only when they do."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.callers)

    @cached_property
    def names(self) -> frozenset[str]:
        """All that a table may call a node by."""
        return frozenset(name for place in self._places for name in place_names(place))

    @cached_property
    def _places(self) -> frozenset[str]:
        """Nodes, and the nodes around them."""
        found = set[str]()
        for each in (*self.callers, *self.groups):
            place = each
            while place and place not in found:
                found.add(place)
                place = around(place)
        return frozenset(found)

    @cached_property
    def _open(self) -> frozenset[str]:
        """Names of nodes that may hold more than shows."""
        return frozenset(name for place in self.callers for name in place_names(place))

    @cached_property
    def _running_tools(self) -> frozenset[str]:
        return frozenset(name for place in self.tool_nodes for name in place_names(place))

    def may_be(self, name: str) -> bool:
        """Whether *name* could be a stage that shows only when the graph runs, and is not one misspelt."""
        parts = name.split(NAMESPACE_SEPARATOR)
        if not all(parts):
            return False
        known = next((n for n in range(len(parts) - 1, 0, -1) if _joined(parts[:n]) in self.names), 0)
        outer, first = _joined(parts[:known]), parts[known]
        return outer in self._open and not difflib.get_close_matches(first, self._in(outer), n=1, cutoff=NEARLY)

    def is_in_tools(self, name: str) -> bool:
        """Whether *name* is that of a place inside a node that runs tools: of a graph there, which need not show."""
        parts = name.split(NAMESPACE_SEPARATOR)
        return all(parts) and any(_joined(parts[:n]) in self._running_tools for n in range(1, len(parts)))

    def _in(self, outer: str) -> set[str]:
        """Return the names of the nodes right inside those called *outer*, and of those in graphs in their tools."""
        found = set[str]()
        for place in self._places:
            holder = around(place)
            while graphs_in(holder)[-1:] == (holder.count(NAMESPACE_SEPARATOR),) and outer not in place_names(holder):
                holder = around(holder)
            if outer in place_names(holder):
                found.add(place.rpartition(NAMESPACE_SEPARATOR)[2])
        return found


def _joined(parts: Sequence[str]) -> str:
    return NAMESPACE_SEPARATOR.join(parts)


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
    asked = (key for stage in stages for key in (stage, with_part(stage, EMBEDDINGS)))
    deciding = {ruling.name for key in asked if (ruling := table.find(key)) is not None}
    faults = []
    for name in table:
        node, part = parted(name)
        if part not in ("", EMBEDDINGS):
            faults.append(f"{said_by} names stage {shown(name)}; behind a node only {EMBEDDINGS!r} may stand")
            continue
        if node == ANY_STAGE or name in deciding or stages.is_in_tools(node):
            continue
        if node in stages.names:
            faults.append(
                f"{said_by} names stage {shown(name)}, which decides nothing: {_nearer(name, table, stages)}"
            )
        elif not stages.may_be(node):
            near = did_you_mean(name, [with_part(each, part) for each in stages.names] if part else stages.names)
            faults.append(f"{said_by} names stage {shown(name)}, which {of} does not have{near}")
    return faults


def doubted(rules: Iterable[str], stages: KnownStages, *, said_by: str = "the mapping") -> list[str]:
    """Return a note for every name in *rules* of what no tool of a graph is seen to hold, but is nearly like it."""
    notes = []
    for name in rules:
        node, _ = parted(name)
        if node not in stages.names and stages.is_in_tools(node):
            near = difflib.get_close_matches(node, stages.names, n=1, cutoff=NEARLY)
            notes += [
                f"{said_by} names stage {shown(name)}, which does not show in the graph; {each!r} is the nearest: is "
                f"it meant?"
                for each in near
            ]
    return notes


def _nearer(name: str, table: StageRules[object], stages: KnownStages) -> str:
    """Return what decides the stages that *name* would cover."""
    decided = []
    node, part = parted(name)
    for stage in stages:
        ruling, place, covered = table.find(with_part(stage, part)), stage, False
        while place and not covered:
            covered = node in place_names(place)
            place = around(place)
        if ruling is not None and covered:
            decided.append(f"{stage!r} is decided by {ruling.name!r}")
    return ", ".join(decided) or "no node in it calls a model"
