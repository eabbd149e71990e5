"""A graph's structure as nodes and arrows: stages with a graph inside are replaced by what is inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from orla_lg.core.boundary.plain import shown
from orla_lg.core.lookahead.structure import END, START, GraphStructure, around, end_of, is_terminal, start_of
from orla_lg.serve.page.live_state import MOST_CHARS

MOST_NODES = 200
"""Of one graph, drawn."""


def drawn(name: str, structure: GraphStructure, homes: Mapping[str, str]) -> dict[str, Any]:
    """Return a graph as the page draws it."""
    holders = {around(stage) for stage in structure.edges} - {""}
    stages = [stage for stage in structure.stages if stage not in holders][:MOST_NODES]
    known = {START, END, *stages}
    arrows = dict[tuple[str, str], bool]()
    for stage in (START, *stages):
        for target, is_sure in _onward(structure, stage, holders):
            if target in known:
                arrows[stage, target] = arrows.get((stage, target), False) or is_sure
    return {
        "name": shown(name, MOST_CHARS),
        "stages": [
            {
                "name": shown(stage, MOST_CHARS),
                "home": shown(homes.get(stage, ""), MOST_CHARS),
                "open": structure.edges[stage].open,
            }
            for stage in stages
        ],
        "arrows": [[shown(one, MOST_CHARS), shown(other, MOST_CHARS), sure] for (one, other), sure in arrows.items()],
        "more": max(0, len(structure.stages) - len(holders) - len(stages)),
    }


def _onward(structure: GraphStructure, stage: str, holders: set[str]) -> Iterator[tuple[str, bool]]:
    """Yield what follows a stage, through the borders of graphs inside others, and whether it always does."""
    todo, seen = [(stage, True)], {stage}
    while todo:
        here, sure = todo.pop()
        edge = structure.edges.get(here)
        if edge is None:
            continue
        guessed = frozenset[str]() if edge.open else edge.perhaps
        leads_nowhere = not (edge.always or edge.perhaps or edge.open)
        always = frozenset({end_of(around(here))}) if leads_nowhere else edge.always  # its graph ends there
        for target in sorted(always | guessed):
            is_sure = sure and target in always
            border = _border(target, holders)
            if border is None:
                yield target, is_sure
            elif border not in seen:
                seen.add(border)
                todo.append((border, is_sure))


def _border(target: str, holders: set[str]) -> str | None:
    """Return where to go on from a border of a graph inside another one; ``None`` where *target* is none."""
    if target in holders:
        return start_of(target)
    outer = around(target)
    return outer if outer and is_terminal(target) and target == end_of(outer) else None
