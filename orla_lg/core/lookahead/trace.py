"""The way one run really takes through its graph: which stage followed which, and what each visit took.

LangGraph works in steps: all nodes of a step run side by side, and the next step's start when all have ended. So who
follows whom is read from two steps in a row. Where several stages ran before, the structure says which of them may
lead to the one that starts; if it allows none (the code chose freely), it followed all of them.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

from orla_lg.core.identity import NAMESPACE_SEPARATOR, stage_key
from orla_lg.core.lookahead.structure import GraphStructure, around, start_of


@dataclass(frozen=True, slots=True)
class Visit:
    """One execution of a node that has ended."""

    stage: str
    calls: int
    other_s: float | None
    """Seconds that no call of its own took: tools, code. ``None`` where nodes ran inside it."""


@dataclass(eq=False, slots=True)
class _Open:
    """One execution of a node under way."""

    stage: str
    entered_s: float
    calls: int = 0
    calls_s: float = 0.0
    around_others: bool = False


@dataclass(eq=False, slots=True)
class _Scope:
    """One graph under way: the whole, or one inside a node."""

    before: set[str]
    """Stages of the step before."""
    now: set[str] = field(default_factory=set)
    """Stages of this step."""
    step: int | None = None
    running: int = 0


class RunTrace:
    """Follows one run; nodes may start and end in several threads."""

    def __init__(self, outlook: GraphStructure) -> None:
        self.moves: Counter[tuple[str, str]] = Counter()
        """How often a stage was followed by another."""
        self.turns: Counter[str] = Counter()
        """Steps in which a stage ran, however often; and how often a graph began."""
        self.visits: list[Visit] = []
        self._outlook = outlook
        self._lock = threading.Lock()
        self._scopes: dict[str, _Scope] = {}
        self._open: dict[str, _Open] = {}
        self.latest: tuple[str, ...] = ()
        """Stages of the whole graph's newest step."""

    def entered(self, namespace: str, step: int | None, now: float) -> None:
        """Note that a node starts.

        Args:
            namespace: Its checkpoint namespace, with ids.
            step: LangGraph's; ``None`` where it does not tell steps apart (tasks of an entrypoint): those that run
                side by side are then one step.
            now: Monotonic seconds.
        """
        stage, outer = stage_key(namespace), _around(namespace)
        with self._lock:
            scope = self._scopes.get(outer) or self._begin(outer, around(stage))
            if scope.now and (step != scope.step if step is not None else not scope.running):
                scope.before, scope.now = scope.now, set()
            scope.step = step
            scope.running += 1
            if stage not in scope.now:
                scope.now.add(stage)
                self.turns[stage] += 1
                for earlier in self._leading_to(stage, scope.before):
                    self.moves[earlier, stage] += 1
            self._open[namespace] = _Open(stage, now)
            if not outer:
                self.latest = tuple(scope.now)

    def _begin(self, outer: str, stage: str) -> _Scope:
        scope = self._scopes[outer] = _Scope({start_of(stage)})
        self.turns[start_of(stage)] += 1
        if outer in self._open:
            self._open[outer].around_others = True
        return scope

    def _leading_to(self, stage: str, before: set[str]) -> list[str]:
        ways = self._outlook.ways
        written = [
            each for each in before if (way := ways.get(each)) and (stage in way.always or stage in way.perhaps)
        ]
        return written or list(before)

    def called(self, namespace: str, seconds: float) -> None:
        """Note that a call of a node that is under way took *seconds*, its waiting included."""
        with self._lock:
            if (visit := self._open.get(namespace)) is not None:
                visit.calls += 1
                visit.calls_s += seconds

    def left(self, namespace: str, now: float) -> None:
        """Note that a node ended, and with it the graph inside."""
        with self._lock:
            visit = self._open.pop(namespace, None)
            self._scopes.pop(namespace, None)
            if visit is None:
                return
            if (scope := self._scopes.get(_around(namespace))) is not None:
                scope.running -= 1
            other_s = None if visit.around_others else max(0.0, now - visit.entered_s - visit.calls_s)
            self.visits.append(Visit(visit.stage, visit.calls, other_s))


def _around(namespace: str) -> str:
    """Return the namespace around one, without the counter of a graph called more than once in a node."""
    parts = namespace.split(NAMESPACE_SEPARATOR)[:-1]
    while parts and parts[-1].isdigit():
        parts.pop()
    return NAMESPACE_SEPARATOR.join(parts)
