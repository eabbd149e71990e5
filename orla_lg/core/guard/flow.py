"""Which labels lie behind which stage of one graph: along its edges, up to stages that take a label off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from orla_lg.core.boundary.stage_keys import parted
from orla_lg.core.boundary.stage_rules import around as around_key
from orla_lg.core.boundary.stage_rules import whole_names
from orla_lg.core.lookahead.structure import END, START, GraphStructure, around, end_of, is_terminal, start_of

NONE: frozenset[str] = frozenset()


class StageLabels(NamedTuple):
    """What is said of the data of a stage."""

    labels: frozenset[str] = NONE
    """That it brings in: its calls carry them, and what follows on it does."""
    declassifies: frozenset[str] = NONE
    """That it takes off: its own calls still carry them, what follows on it does not."""


NO_LABELS = StageLabels()

KEEP_WAYS = 10_000
"""Of one graph, what lies behind a stage for a label; labels may be what callers claim."""

Moves = frozenset[tuple[str, str]]


class LabelledGraph:
    """One graph, with what is said of its stages in it and in tables beside it.

    What is not written in the graph is taken to lead everywhere: a stage whose code chooses (an open edge), one that
    leads nowhere, and a graph that could not be read.

    Args:
        structure: The graph as written.
        table: What is said of stages elsewhere, by name.
    """

    def __init__(self, structure: GraphStructure, table: Mapping[str, StageLabels]) -> None:
        self.structure = structure
        self.table = table
        self.is_known = START in structure.edges
        self._everywhere = frozenset({*structure.edges, END})
        self._behind: dict[tuple[str, str, bool], frozenset[str]] = {}

    def said(self, stage: str) -> StageLabels:
        """Return what is said of a stage itself."""
        structure, labels, declassifies = self.structure, NONE, NONE
        node = parted(stage)[0]
        for name in whole_names(node):
            labels |= structure.labels.get(name, NONE)
            declassifies |= structure.declassifies.get(name, NONE)
            if (beside := self.table.get(name)) is not None:
                labels, declassifies = labels | beside.labels, declassifies | beside.declassifies
        return StageLabels(labels, declassifies)

    def own(self, stage: str) -> frozenset[str]:
        """Return the labels of a stage and of the stages that it runs in."""
        node, labels = parted(stage)[0], NONE
        while node:
            labels |= self.said(node).labels
            node = around_key(node)
        return labels

    def place(self, stage: str) -> str:
        """Return where in the graph a stage is: the stage, or the innermost one around it that is written there.

        Empty where none is.
        """
        node = parted(stage)[0]
        while node and node not in self.structure.edges:
            node = around_key(node)
        return node if self.is_known else ""

    def reaches(self, source: str, label: str, target: str, *, wraps: bool, moves: Moves = frozenset()) -> bool:
        """Whether *target* lies behind *source* on some way on which nothing takes *label* off.

        Args:
            source: A stage, or ``START``.
            label: The label.
            target: A stage, or ``END``.
            wraps: Whether another run follows on the end.
            moves: What a run did that is not written.
        """
        if moves:
            return target in self._found(source, label, wraps, moves)
        behind = self._behind.get((source, label, wraps))
        if behind is None:
            if len(self._behind) >= KEEP_WAYS:
                self._behind = {}
            behind = self._behind[source, label, wraps] = self._found(source, label, wraps, moves)
        return target in behind

    def _found(self, source: str, label: str, wraps: bool, moves: Moves) -> frozenset[str]:
        found, ahead = set[str](), [source]
        beyond: dict[str, list[str]] = {}
        for one, other in moves:
            beyond.setdefault(one, []).append(other)
        while ahead:
            stage = ahead.pop()
            fresh = {*self._onward(stage, label, wraps=wraps), *self._beyond(stage, label, beyond)} - found
            found |= fresh
            ahead += fresh
        return frozenset(found)

    def _onward(self, stage: str, label: str, *, wraps: bool) -> Iterable[str]:
        """Return where a label goes from a stage that carries it."""
        structure = self.structure
        if stage == END:
            return (START,) if wraps else ()
        if is_terminal(stage) and stage == end_of(around(stage)):
            return self._out_of(around(stage), label)
        inside = start_of(stage)
        inner = (inside,) if inside in structure.edges and not is_terminal(stage) else ()
        return (*inner, *self._out_of(stage, label))

    def _out_of(self, stage: str, label: str) -> Iterable[str]:
        if label in self.said(stage).declassifies:
            return ()
        edge = self.structure.edges.get(stage)
        following = NONE if edge is None else edge.always | edge.perhaps
        return following if edge is not None and following and not edge.open else self._everywhere

    def _beyond(self, stage: str, label: str, moves: Mapping[str, Iterable[str]]) -> Iterable[str]:
        return () if label in self.said(stage).declassifies else moves.get(stage, ())

    def unwritten(self, moves: Iterable[tuple[str, str]]) -> Moves:
        """Return those of a run's moves that are not written in the graph; the first one of a run is none."""
        edges = self.structure.edges
        return frozenset(
            (one, other)
            for one, other in moves
            if not is_terminal(one)
            and (edge := edges.get(one)) is not None
            and not (edge.open or other in edge.always or other in edge.perhaps)
        )
