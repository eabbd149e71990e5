"""The graph as written, in the core's terms: which stage may follow which. The graph's side reads it at ``wrap``.

A stage that holds a graph of its own (``sub``) has that graph's stages below its key (``sub|inner``). Where they
begin and end is written ``sub|__start__`` and ``sub|__end__``; for the whole graph ``__start__`` and ``__end__``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from orla_lg.core.identity import NAMESPACE_SEPARATOR

START, END = "__start__", "__end__"


@dataclass(frozen=True, slots=True)
class Edge:
    """Where a stage leads."""

    always: frozenset[str] = frozenset()
    """Stages that start whenever this one has ended; where one of them waits for others, then after these."""
    perhaps: frozenset[str] = frozenset()
    """Stages of which some start, as the node or a function decides; the end may be among them."""
    open: bool = False
    """The code may name any stage: ``perhaps`` is then a guess, all stages of its graph and the end."""


@dataclass(frozen=True)
class GraphStructure:
    """What lies behind every stage of one graph, as far as that shows before anything runs."""

    edges: Mapping[str, Edge] = field(default_factory=dict)
    """By stage, and by the beginnings ``__start__`` of the graph and of the graphs inside it."""
    joins: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """By stage, those it waits for."""
    labels: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """By stage, the labels of the data that it brings in (``core.guard``); only stages that have some."""
    declassifies: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """By stage, the labels that what it hands on has no more; only stages that do."""

    @property
    def stages(self) -> list[str]:
        """All stages, in the order of the graph."""
        return [stage for stage in self.edges if not is_terminal(stage)]

    def looping(self) -> frozenset[str]:
        """Return the stages that can come round to themselves; an open edge makes no loop by itself."""
        onward = {
            stage: (edge.always if edge.open else edge.always | edge.perhaps) & self.edges.keys()
            for stage, edge in self.edges.items()
        }

        def behind(stage: str) -> set[str]:
            found, ahead = set[str](), [stage]
            while ahead:
                fresh = onward[ahead.pop()] - found
                found |= fresh
                ahead += fresh
            return found

        return frozenset(stage for stage in onward if stage in behind(stage))


NO_STRUCTURE = GraphStructure()
"""Of a graph that nothing is known of."""


def is_terminal(stage: str) -> bool:
    """Whether *stage* is a beginning or an end, where nothing runs."""
    return stage.rpartition(NAMESPACE_SEPARATOR)[2] in (START, END)


def start_of(stage: str) -> str:
    """Return where the graph inside *stage* begins; of the whole graph if *stage* is empty."""
    return f"{stage}{NAMESPACE_SEPARATOR}{START}" if stage else START


def end_of(stage: str) -> str:
    """Return where the graph inside *stage* ends; of the whole graph if *stage* is empty."""
    return f"{stage}{NAMESPACE_SEPARATOR}{END}" if stage else END


def around(stage: str) -> str:
    """Return the stage whose graph *stage* belongs to; empty for the whole graph."""
    return stage.rpartition(NAMESPACE_SEPARATOR)[0]
