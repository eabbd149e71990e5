"""The expected longest path through a graph with chances on its edges; loops included. Pure functions.

From a stage the longest path is what it costs itself and the longest path of what follows. Where a choice is made,
each target counts by its chance; where several start at once, the longest counts, since the graph goes on when all
are done. One rule says both: let the targets share a run's future, longest first, each taking what its chance allows.
Targets that always start (chance 1) take all that is left; exclusive ones (chances that sum to 1) give the mean.
This is the critical path of project planning (Kelley and Walker, 1959) by expected lengths.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

MAX_ROUNDS = 100
"""A loop is followed no further: code without an exit, or one never seen, would take for ever."""

TOLERANCE = 1e-4
"""A loop's lengths are known when a round changes them by a smaller share."""

Chances = Mapping[str, Mapping[str, float]]
"""By stage, those that may follow and how likely each does; what is missing to 1 is the end."""


def longest_paths(costs: Mapping[str, float], chances: Chances) -> dict[str, float]:
    """Return for each stage of *chances* the expected longest path to the end, its own cost included.

    Args:
        costs: By stage, in any unit; the result has the same. A stage without one costs nothing.
        chances: Which stages follow; a target that has no entry itself is an end.
    """
    onward = {stage: [target for target in targets if target in chances] for stage, targets in chances.items()}
    paths: dict[str, float] = {}
    for component in components(onward):  # what follows comes first, so only loops need more than one round
        looping = len(component) > 1 or component[0] in onward[component[0]]
        for _ in range(MAX_ROUNDS if looping else 1):
            change = 0.0
            for stage in reversed(component):  # deepest first: most of what follows is then known already
                length = costs.get(stage, 0.0) + _shared(chances[stage], paths)
                change = max(change, abs(length - paths.get(stage, 0.0)) / (length or 1.0))
                paths[stage] = length
            if change < TOLERANCE:
                break
    return paths


def _shared(targets: Mapping[str, float], paths: Mapping[str, float]) -> float:
    left, length = 1.0, 0.0
    found = [(paths.get(target, 0.0), chance) for target, chance in targets.items()]
    if len(found) > 1:
        found.sort(reverse=True)
    for path, chance in found:
        length += min(chance, left) * path
        left -= chance
        if left <= 0:
            break
    return length


def components(onward: Mapping[str, Collection[str]]) -> list[list[str]]:
    """Return the strongly connected components, each after all that it leads to (Tarjan, 1972)."""
    found: list[list[str]] = []
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_: list[str] = []
    is_open: set[str] = set()
    for root in onward:
        path: list[tuple[str, Iterator[str]]] = [] if root in order else [(root, iter(onward[root]))]
        while path:
            stage, targets = path[-1]
            if stage not in order:
                order[stage] = lowest[stage] = len(order)
                open_.append(stage)
                is_open.add(stage)
            for target in targets:
                if target not in order:
                    path.append((target, iter(onward[target])))
                    break
                if target in is_open:
                    lowest[stage] = min(lowest[stage], lowest[target])
            else:
                path.pop()
                if path:
                    above = path[-1][0]
                    lowest[above] = min(lowest[above], lowest[stage])
                if lowest[stage] == order[stage]:
                    cut = open_.index(stage)
                    found.append(open_[cut:])
                    is_open.difference_update(found[-1])
                    del open_[cut:]
    return found
