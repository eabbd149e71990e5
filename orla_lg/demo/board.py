"""What the demo shows, as plain state: fed by orla_lg's events, read by the views. No terminal here."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from orla_lg.core.operation.statistics import Statistics
from orla_lg.core.record import CallEvent, Happening, Record

STAGES = ("classify", "policy_check", "route_ticket", "reply")

Sink = Callable[["Line"], None]


@dataclass(frozen=True, slots=True)
class Line:
    """Something worth telling, in one line."""

    at_s: float
    """Seconds since the start."""
    ticket: int | None
    stage: str
    kind: str
    """``queue``, ``token``, ``done``, ``tool``, ``fact``, ``end`` or ``error``."""
    text: str


@dataclass(eq=False, slots=True)
class StageState:
    """What goes on in one stage."""

    inside: int = 0
    """Tickets whose node runs: its calls, its tools, its own code."""
    left: int = 0
    waiting: set[str] = field(default_factory=set)
    running: set[str] = field(default_factory=set)
    records: list[Record] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class BackendTickets:
    """Whose calls are at one backend, by ticket number in order of arrival."""

    waiting: dict[str, int] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)


class Board:
    """The demo at one moment. Events come from any thread; a view reads under ``lock``."""

    def __init__(self, tickets: int, started_s: float, *, arm: str = "", keep_lines: int = 200) -> None:
        self.lock = threading.RLock()
        self.arm = arm
        """What is watched, where there are several: ``1 of 2: bare``."""
        self.tickets = tickets
        self.started_s = started_s
        self.now_s = started_s
        self.done = 0
        self.failed = 0
        self.stages = {name: StageState() for name in STAGES}
        self.backends: dict[str, BackendTickets] = {}
        self.queues: frozenset[str] = frozenset()
        """The backends with a queue of orla_lg's; elsewhere calls wait in the engine, unseen."""
        self.urgent: set[int] = set()
        """Tickets whose later stages go first."""
        self.tools: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()
        self.lines: deque[Line] = deque(maxlen=keep_lines)
        self.statistics: Statistics | None = None
        self.sink: Sink | None = None
        """Told every line, where lines are all there is."""
        self._numbers: dict[str, int] = {}
        self._wait_began_s: dict[str, float] = {}

    def expect(self, run: str, number: int) -> None:
        """Say which ticket a run works on."""
        with self.lock:
            self._numbers[run] = number

    def note(self, at_s: float, run: str | None, stage: str, kind: str, text: str) -> None:
        """Add a line."""
        with self.lock:
            self.now_s = max(self.now_s, at_s)
            line = Line(at_s - self.started_s, self._numbers.get(run or ""), stage, kind, text)
            self.lines.append(line)
        if self.sink is not None:
            self.sink(line)

    def hear(self, event: CallEvent) -> None:
        """Take in an event of orla_lg; this is the listener."""
        handler = _HANDLERS.get(event.kind)
        if handler is not None:
            with self.lock:
                handler(self, event)

    def _stage(self, event: CallEvent) -> StageState:
        return self.stages.setdefault(event.stage, StageState())

    def _backend(self, event: CallEvent) -> BackendTickets:
        return self.backends.setdefault(event.backend or "elsewhere", BackendTickets())

    def _tell(self, event: CallEvent, kind: str, text: str) -> None:
        self.note(event.at_s, event.run, event.stage, kind, text)

    # One method for each kind of event

    def _entered(self, event: CallEvent) -> None:
        if event.stage in self.stages:
            self.stages[event.stage].inside += 1

    def _left(self, event: CallEvent) -> None:
        if event.stage in self.stages:
            self.stages[event.stage].inside -= 1
            self.stages[event.stage].left += event.detail == "done"

    def _queued(self, event: CallEvent) -> None:
        call = event.call or ""
        self._stage(event).waiting.add(call)
        self._backend(event).waiting[call] = self._numbers.get(event.run or "", 0)
        self._wait_began_s[call] = event.at_s

    def _dispatched(self, event: CallEvent) -> None:
        call, stage, backend = event.call or "", self._stage(event), self._backend(event)
        stage.waiting.discard(call)
        stage.running.add(call)
        backend.waiting.pop(call, None)
        backend.running[call] = self._numbers.get(event.run or "", 0)
        waited_s = event.at_s - self._wait_began_s.pop(call, event.at_s)
        if waited_s >= 0.1 and event.backend in self.queues:
            self._tell(event, "queue", f"waited {waited_s:.1f} s for {event.backend}")

    def _finished(self, event: CallEvent) -> None:
        call, stage, backend = event.call or "", self._stage(event), self._backend(event)
        for calls in (stage.waiting, stage.running):
            calls.discard(call)
        backend.waiting.pop(call, None)
        backend.running.pop(call, None)
        if event.record is not None:
            stage.records.append(event.record)
            self._tell(event, "error" if event.record.error else "done", _told(event.record))

    def _tool_started(self, event: CallEvent) -> None:
        self.tools[event.detail] += 1
        self._tell(event, "tool", f"calls {event.detail}")

    def _ended(self, event: CallEvent) -> None:
        self.done += event.detail == "done"
        self.failed += event.detail != "done"
        self._tell(event, "end", f"{event.detail}{': its cache is given up' if self.queues else ''}")

    # What the graph's own results tell

    def classified(self, at_s: float, run: str, found: Any) -> None:
        """Note how a ticket was classified."""
        with self.lock:
            if found.category in ("billing", "technical"):
                self.urgent.add(self._numbers.get(run, 0))
        escalated = ", escalated" if found.needs_escalation else ""
        self.note(at_s, run, "classify", "fact", f"{found.category}{escalated}: {found.product}")

    def fell_back(self, stages: list[str]) -> None:
        """Note that stages replaced a model's answer."""
        with self.lock:
            self.fallbacks.update(stages)

    def records(self) -> list[Record]:
        """Return the records of all stages."""
        with self.lock:
            return [record for stage in self.stages.values() for record in stage.records]


_HANDLERS: dict[Happening, Callable[[Board, CallEvent], None]] = {
    Happening.NODE_ENTERED: Board._entered,
    Happening.NODE_LEFT: Board._left,
    Happening.QUEUED: Board._queued,
    Happening.DISPATCHED: Board._dispatched,
    Happening.FINISHED: Board._finished,
    Happening.TOOL_STARTED: Board._tool_started,
    Happening.RUN_ENDED: Board._ended,
}


def _told(record: Record) -> str:
    if record.error:
        return record.error
    first = "" if record.ttft_s is None else f"first token {record.ttft_s:.2f} s, "
    cached = f"{record.cached_tokens or 0} of {record.prompt_tokens or 0} cached"
    return f"{first}{cached}, {record.completion_tokens or 0} generated"
