"""The path that one run really takes through its graph: which stage followed which, and what each visit took.

LangGraph works in steps: all nodes of a step run side by side, and the next step's start when all have ended. So two
steps in a row show which stage followed which. Where several stages ran before, the structure says which of them may
lead to the one that starts; if it allows none (the code chose freely), it followed all of them. A graph in a tool
counts as a node of that name, from its first node's start to the end of the node that runs the tool.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass, field

from orla_lg.core.boundary.stage_keys import GRAPH_ID, stage_key
from orla_lg.core.identity import ID_SEPARATOR, NAMESPACE_SEPARATOR
from orla_lg.core.lookahead.structure import NO_STRUCTURE, GraphStructure, around, start_of

_ENTERED, _CALLED, _LEFT = "entered", "called", "left"

_Event = tuple[str, str, int | None, float]
"""Kind, namespace, step, and when it was; of a call, how long it took."""

_IN_A_TOOL = ID_SEPARATOR + GRAPH_ID

MAX_EVENTS = 256
"""Events of a run that may wait to become part of its path."""


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


@dataclass(eq=False, slots=True)
class Path:
    """The way that a run took through its graph so far."""

    moves: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often a stage was followed by another."""
    turns: Counter[str] = field(default_factory=Counter)
    """Steps in which a stage ran, however often; and how often a graph began."""
    visits: list[Visit] = field(default_factory=list)
    latest: tuple[str, ...] = ()
    """Stages of the whole graph's newest step."""


class RunTrace:
    """The nodes and calls of one run so far, in the order in which they started and ended, in whatever thread.

    Events are only noted; ``path`` derives from them which stage followed which, when that is asked for.
    """

    def __init__(self, structure: GraphStructure = NO_STRUCTURE, graph: str = "") -> None:
        self.graph = graph
        self.structure = structure
        """Of the run's graph; set before its first event."""
        self.served_s = 0.0
        """The service that its calls have had. This and what follows is guarded by the lock of the estimates."""
        self.entries: list[tuple[str, int, float]] = []
        """Each stage entered, the visit, and ``served_s`` at that moment."""
        self.visits: dict[str, int] = {}
        """By stage, how often it was entered."""
        self.contexts: list[tuple[str, int, int]] = []
        """Of each call: stage, visit, and its prompt and answer in tokens."""
        self.begun: dict[str, int] = {}
        """By stage, how many of its calls began."""
        self.answered: list[tuple[str, int]] = []
        """Of each call that went well, in the order in which they ended: its stage, and which of its calls it was."""
        self.followed = 0
        """So many of these ended before another call began: none of them was the run's last."""
        self._events: deque[_Event] = deque()
        """Not yet part of the path."""
        self._path = Path()
        self._lock = threading.Lock()
        self._scopes: dict[str, _Scope] = {}
        self._open: dict[str, _Open] = {}
        self._in_tools: dict[str, list[str]] = {}
        """Graphs in tools, by the node that runs these."""

    # Noting

    def entered(self, namespace: str, step: int | None, now: float) -> None:
        """Note that a node starts.

        Args:
            namespace: Its checkpoint namespace, with ids.
            step: LangGraph's; ``None`` where there are none (tasks of an entrypoint): those that run side by side are
                then one step.
            now: Monotonic seconds.
        """
        self._events.append((_ENTERED, namespace, step, now))

    def called(self, namespace: str, seconds: float) -> None:
        """Note that a call of a node that is under way took *seconds*, its waiting included."""
        self._events.append((_CALLED, namespace, None, seconds))

    def left(self, namespace: str, now: float) -> None:
        """Note that a node ended, and with it the graph inside."""
        self._events.append((_LEFT, namespace, None, now))
        if len(self._events) >= MAX_EVENTS:
            self.path()

    # Deriving

    def path(self) -> Path:
        """Return the run's path, with all that was noted so far."""
        if self._events:
            with self._lock:
                while self._events:
                    kind, namespace, step, seconds = self._events.popleft()
                    if kind is _ENTERED:
                        self._enter(namespace, step, seconds)
                    elif kind is _LEFT:
                        self._leave(namespace, seconds)
                    elif (visit := self._open.get(namespace)) is not None:
                        visit.calls += 1
                        visit.calls_s += seconds
        return self._path

    def _enter(self, namespace: str, step: int | None, now: float) -> None:
        path, stage, outer = self._path, stage_key(namespace), _around(namespace)
        if outer.endswith(_IN_A_TOOL) and outer not in self._open:
            self._enter(outer, None, now)
            self._in_tools.setdefault(_around(outer), []).append(outer)
        scope = self._scopes.get(outer) or self._begin(outer, around(stage))
        if scope.now and (step != scope.step if step is not None else not scope.running):
            scope.before, scope.now = scope.now, set()
        scope.step = step
        scope.running += 1
        if stage not in scope.now:
            scope.now.add(stage)
            path.turns[stage] += 1
            for earlier in self._leading_to(stage, scope.before):
                path.moves[earlier, stage] += 1
        self._open[namespace] = _Open(stage, now)
        if not outer:
            path.latest = tuple(scope.now)

    def _begin(self, outer: str, stage: str) -> _Scope:
        start = start_of(stage)
        scope = self._scopes[outer] = _Scope({start})
        self._path.turns[start] += 1
        if outer in self._open:
            self._open[outer].around_others = True
        return scope

    def _leading_to(self, stage: str, before: set[str]) -> list[str]:
        edges = self.structure.edges
        written = [
            each for each in before if (edge := edges.get(each)) and (stage in edge.always or stage in edge.perhaps)
        ]
        return written or list(before)

    def _leave(self, namespace: str, now: float) -> None:
        for graph in self._in_tools.pop(namespace, ()):
            self._leave(graph, now)
        visit = self._open.pop(namespace, None)
        self._scopes.pop(namespace, None)
        if visit is None:
            return
        if (scope := self._scopes.get(_around(namespace))) is not None:
            scope.running -= 1
        other_s = None if visit.around_others else max(0.0, now - visit.entered_s - visit.calls_s)
        self._path.visits.append(Visit(visit.stage, visit.calls, other_s))


def _around(namespace: str) -> str:
    """Return the namespace around one, without the counter of a graph called more than once in a node."""
    parts = namespace.split(NAMESPACE_SEPARATOR)[:-1]
    while parts and parts[-1].isdigit():
        parts.pop()
    return NAMESPACE_SEPARATOR.join(parts)
