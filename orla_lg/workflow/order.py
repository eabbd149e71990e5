"""Which stage comes after which: cycles, names that are nobody's, and what lies behind a stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

from orla_lg.errors import did_you_mean

Needs = Mapping[str, Collection[str]]
"""By stage, the stages that must be done before it starts."""


def faults_of(names: Sequence[str], needs: Needs) -> list[str]:
    """Return what is wrong with the stages and dependencies of a workflow taken together."""
    faults = [] if names else ["it has no stages; add some by add_stage"]
    faults += [f"{count} stages are named {name!r}" for name, count in Counter(names).items() if count > 1]
    for stage, needed in needs.items():
        for name in (stage, *needed):
            if name not in names:
                which = f"stage {stage!r} needs {name!r}, which" if name != stage else f"{name!r} has needs, but"
                faults.append(f"{which} was not added by add_stage{did_you_mean(name, names)}")
    if (cycle := cycle_of(needs)) is not None:
        faults.append(f"its dependencies form a cycle: {' → '.join(map(repr, cycle))}")
    return faults


def cycle_of(needs: Needs) -> list[str] | None:
    """Return the stages of a cycle in the order in which they would run, the first again at the end."""
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def before(stage: str, needs: Needs) -> frozenset[str]:
    """Return all stages that are done when *stage* starts, near and far; *needs* has no cycle."""
    found: set[str] = set()
    todo = list(needs.get(stage, ()))
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += needs.get(name, ())
    return frozenset(found)
