"""What lies ahead of a run: a graph's structure (``GraphStructure``) with what was learned of it (``Estimates``).

Structure says what may follow, experience how likely each is. A choice of which nothing was seen yet is taken to fall
on all its targets alike; this guess weighs as much as one turn seen. Figures are computed again only after enough was
learned, so that asking costs a look into a table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from orla_lg.core.identity import NAMESPACE_SEPARATOR
from orla_lg.core.lookahead.estimates import NOTHING_LEARNED, Estimates, Learned
from orla_lg.core.lookahead.structure import END, START, Edge, GraphStructure, around, end_of, is_terminal, start_of

PATIENCE = 0.1
"""Figures are computed again when this share more was learned, ..."""

MAX_PATIENCE = 10
"""... but after so many runs for each stage at the latest, because the means follow in some fifty."""

MAX_HOPS = 8
"""How many stages without a call are passed in search of the next call."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """What is expected of a run from where it is now."""

    stages: Mapping[str, float]
    """Stages that come next, and how likely each does; several may run side by side."""
    backends: Mapping[str, float]
    """Backends of the next model calls after the present stages', and how likely each is one of them."""
    remaining_s: float | None
    """Service still expected until its end, in seconds; ``None`` while nothing is known."""


@dataclass(frozen=True, slots=True)
class StageOutlook:
    """A stage of a graph: what may follow, how likely, and what was learned of it."""

    stage: str
    next: Mapping[str, float]
    """Stages that follow, and how likely each does; ``"__end__"`` is the end of the graph."""
    waits_for: tuple[str, ...]
    """Stages that must all have ended before it starts."""
    looping: bool
    """It may come round to itself."""
    learned: Learned


@dataclass(frozen=True)
class _Figures:
    """All that is computed of a graph, at one moment."""

    learned: Mapping[str, Learned] = field(default_factory=dict)
    chances: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Forecast:
    """What lies ahead in one graph; any thread may ask."""

    def __init__(self, graph: str, structure: GraphStructure, homes: Mapping[str, str], estimates: Estimates) -> None:
        self.graph = graph
        self.structure = structure
        self.homes = homes
        """By stage, where its mapping sends it as far as that is fixed: a guess while nothing was seen."""
        self._estimates = estimates
        self._now = _Figures()
        self._due = 0

    def next_stages(self, stages: Collection[str]) -> dict[str, float]:
        """Return the stages that follow *stages*, and how likely each does."""
        chances = self._figures().chances
        found: dict[str, float] = {}
        for stage in innermost(stages):
            for target, chance in _through_edges(chances, stage).items():
                if target != END:
                    found[target] = max(found.get(target, 0.0), chance)
        return found

    def next_backends(self, stages: Collection[str]) -> dict[str, float]:
        """Return where the next calls after *stages* go, and how likely one of them goes there.

        A stage goes where its calls went lately, or, if it made none yet, where its mapping says.
        """
        found: dict[str, float] = {}
        for (_, backend), chance in self.next_calls(stages).items():
            found[backend] = min(1.0, found.get(backend, 0.0) + chance)
        return found

    def next_calls(self, stages: Collection[str]) -> dict[tuple[str, str], float]:
        """Return the stages whose calls come next after *stages*, with their backends, and how likely each is."""
        now = self._figures()
        found: dict[tuple[str, str], float] = {}
        reached = dict.fromkeys(innermost(stages), 1.0)
        for _ in range(MAX_HOPS):
            onward: dict[str, float] = {}
            for stage, mass in reached.items():
                for target, chance in _through_edges(now.chances, stage).items():
                    if homes := self._backends(target, now):
                        for backend, share in homes.items():
                            call = (target, backend)
                            found[call] = min(1.0, found.get(call, 0.0) + mass * chance * share)
                    elif target != END:
                        onward[target] = min(1.0, onward.get(target, 0.0) + mass * chance)
            reached = onward
        return found

    def _backends(self, stage: str, now: _Figures) -> Mapping[str, float]:
        """Return where a stage's calls go; nothing for one that makes none."""
        learned = now.learned.get(stage, NOTHING_LEARNED)
        if learned.backends or learned.calls == 0:
            return learned.backends
        return {self.homes[stage]: 1.0} if stage in self.homes else {}

    def stages(self) -> list[StageOutlook]:
        """Return all stages, in the order of the graph; those only seen at run time last."""
        now = self._figures()
        looping = self.structure.looping()
        known = [*self.structure.stages, *(each for each in now.chances if each not in self.structure.edges)]
        return [
            StageOutlook(
                stage,
                _through_edges(now.chances, stage),
                tuple(sorted(self.structure.joins.get(stage, ()))),
                stage in looping,
                now.learned.get(stage, NOTHING_LEARNED),
            )
            for stage in known
            if not is_terminal(stage)
        ]

    # Computing

    def _figures(self) -> _Figures:
        seen = self._estimates.lessons(self.graph)
        if seen >= self._due:
            self._now = self._compute()  # replaced whole: other threads see the old figures meanwhile
            self._due = seen + 1 + min(int(seen * PATIENCE), MAX_PATIENCE * len(self._now.chances))
        return self._now

    def _compute(self) -> _Figures:
        learned = self._reachable()
        chances: dict[str, Mapping[str, float]] = {}
        for stage in learned:
            inside = start_of(stage)
            if stage and not is_terminal(stage) and inside in learned:
                chances[stage] = {inside: 1.0}
                chances[end_of(stage)] = _chances(self.structure.edges.get(stage), learned[stage], around(stage))
            else:
                chances[stage] = _chances(self.structure.edges.get(stage), learned[stage], around(stage))
        return _Figures(learned, chances)

    def _reachable(self) -> dict[str, Learned]:
        """Return what was learned of every stage that is written or was ever seen to follow one."""
        learned: dict[str, Learned] = {}
        ahead = [START, *self.structure.edges]
        while ahead:
            stage = ahead.pop()
            if stage in learned or stage.rpartition(NAMESPACE_SEPARATOR)[2] == END:
                continue
            known = self._estimates.learned(self.graph, stage)
            learned[stage] = known
            ahead += known.moves
            inside = start_of(stage)
            if not is_terminal(stage) and self._estimates.learned(self.graph, inside).turns:
                ahead.append(inside)
        return learned


def _chances(edge: Edge | None, learned: Learned, outer: str) -> dict[str, float]:
    """Return what follows a stage and how likely; the end of its graph has what the others leave."""
    edge, end = edge or Edge(), end_of(outer)
    guess = 1.0 / (learned.turns + 1.0)
    chances = dict.fromkeys(edge.perhaps, guess / len(edge.perhaps) if edge.perhaps else 0.0)
    for target, times in learned.moves.items():
        chances[target] = min(1.0, chances.get(target, 0.0) + times / (learned.turns + 1.0))
    chances.update(dict.fromkeys(edge.always, 1.0))
    if (left := 1.0 - sum(chance for target, chance in chances.items() if target != end)) > 0:
        chances[end] = left
    return {target: chance for target, chance in chances.items() if chance > 0}


def _through_edges(chances: Mapping[str, Mapping[str, float]], stage: str) -> dict[str, float]:
    """Return the stages that follow one, seen through the ends of graphs inside others; ``END`` is the end of all.

    Ends may lead to one another in a circle, if a graph that makes no calls runs again and again.
    """
    found: dict[str, float] = {}
    ahead, passed = dict(chances.get(stage, {})), Counter[str]()
    while ahead:
        target, chance = ahead.popitem()
        if target == END or not is_terminal(target):
            found[target] = min(1.0, found.get(target, 0.0) + chance)
        elif passed[target] < MAX_HOPS:
            passed[target] += 1
            for beyond, share in chances.get(target, {}).items():
                ahead[beyond] = min(1.0, ahead.get(beyond, 0.0) + chance * share)
    return found


def innermost(stages: Collection[str]) -> list[str]:
    """Return *stages* without those around others of them."""
    outer = {around(stage) for stage in stages}
    return [stage for stage in stages if stage not in outer]
