"""The open calls, tools and nodes of a core, by stage and by workflow, as its ``CallEvent`` values tell them.

The book is filled while a page is open. What began before that is read from the queues and the open runs; a call that
was at its engine then shows when it ends.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from orla_lg.core.boundary.bounded_dict import BoundedDict
from orla_lg.core.boundary.plain import shown
from orla_lg.core.call import Call
from orla_lg.core.identity import workflow_key
from orla_lg.core.record import CallEvent, Happening, Record
from orla_lg.core.workflow import RunState
from orla_lg.serve.page.live_state import MOST_CHARS, LiveChanges, LiveRun, LiveSpan, LiveStage, LiveWorkflow, span_of

MOST_CALLS = 20_000
"""So many open calls are followed one by one."""
MOST_WORKFLOWS = 500
"""The longest unseen without anything open goes first."""
MOST_STAGES = 1_000
MOST_RUNS = 5_000
MOST_ENDS = 10_000
"""Of so many calls the time of their end is kept; records do not have it."""
MOST_TOOLS = 2_000
MOST_SPANS = 300
"""Of one workflow, shown at once: the newest."""

OTHERS = "…"
"""The stage that stands for those beyond ``MOST_STAGES``."""


class LiveCalls:
    """What is open now. Any thread may tell and ask.

    Args:
        run_of: Returns an open run by its id.
    """

    def __init__(self, run_of: Callable[[str], RunState | None]) -> None:
        self._run_of = run_of
        self._lock = threading.Lock()
        self._stages: dict[tuple[str, str], LiveStage] = {}
        self._workflows: OrderedDict[str, LiveWorkflow] = OrderedDict()
        self._by_number: dict[int, LiveWorkflow] = {}
        self._number = 0
        self._runs: dict[str, LiveRun] = {}
        self._calls: dict[str, LiveSpan] = {}
        self._ends = BoundedDict[str, float](MOST_ENDS)
        self._tools: deque[LiveSpan] = deque(maxlen=MOST_TOOLS)
        self._tool_number = 0
        self._new_stages: list[LiveStage] = []
        self._changed_stages: dict[LiveStage, None] = {}
        self._changed_workflows: dict[LiveWorkflow, None] = {}
        self._gone: list[int] = []
        self._changed_spans: dict[int, dict[str, dict[str, Any]]] = {}
        """By workflow that is watched."""

    # What is told

    def heard(self, event: CallEvent) -> None:
        """Take in an event: the listener of ``RecordBook.subscribe``."""
        handle = _HANDLERS.get(event.kind)
        if handle is not None:
            with self._lock:
                handle(self, event)

    def _run_started(self, event: CallEvent) -> None:
        if event.run is not None:
            self._run(event.run, event)

    def _run_ended(self, event: CallEvent) -> None:
        known = None if event.run is None else self._runs.pop(event.run, None)
        if known is None or event.run is None:
            return
        for stage, times in known.inside.items():
            self._count(self._stage(known.graph, stage), "inside", -times)
        for tool in known.tools:
            self._end_tool(tool, event.at_s)
        known.workflow.runs.pop(event.run, None)
        self._touch(known.workflow, event.at_s)

    def _node(self, event: CallEvent) -> None:
        run = self._run(event.run, event)
        state = None if event.run is None else self._run_of(event.run)
        if run is not None and state is not None:
            self._stands(run, state)

    def _stands(self, run: LiveRun, state: RunState) -> None:
        """Count the nodes that a run is in, as it knows them: on another connection they are all told again."""
        for stage in {*run.inside, *state.now_in}:
            now = max(0, state.now_in.get(stage, 0))
            self._count(self._stage(run.graph, stage), "inside", now - run.inside[stage])
            run.inside[stage] = now

    def _tool_started(self, event: CallEvent) -> None:
        run = self._run(event.run, event)
        if run is None:
            return
        self._tool_number += 1
        stage = self._stage(run.graph, event.stage)
        tool = LiveSpan(f"tool-{self._tool_number}", stage, run.workflow, event.at_s, sent_s=event.at_s)
        tool.tool = shown(event.detail or "tool", MOST_CHARS)
        run.tools.append(tool)
        self._tools.append(tool)
        self._put(tool, "tools")

    def _tool_ended(self, event: CallEvent) -> None:
        run = self._runs.get(event.run or "")
        if run is None:
            return
        name = shown(event.detail, MOST_CHARS)
        mine = [tool for tool in run.tools if tool.stage.stage == shown(event.stage, MOST_CHARS)]
        found = next((tool for tool in mine if tool.tool == name), mine[0] if mine else None)
        if found is not None:
            run.tools.remove(found)
            self._end_tool(found, event.at_s)

    def _end_tool(self, tool: LiveSpan, at_s: float) -> None:
        tool.ended_s = at_s
        self._put(tool, "")

    def _queued(self, event: CallEvent) -> None:
        call = self._call(event)
        if call is not None:
            call.sent_s = call.first_s = None
            self._put(call, "waiting")

    def _dispatched(self, event: CallEvent) -> None:
        call = self._call(event)
        if call is not None:
            call.sent_s, call.first_s = event.at_s, None
            self._put(call, "prefill")

    def _first_token(self, event: CallEvent) -> None:
        call = self._call(event)
        if call is not None:
            call.first_s = event.at_s
            self._put(call, "decode")

    def _finished(self, event: CallEvent) -> None:
        record = event.record
        if record is None:
            return
        call = self._calls.pop(record.id, None)
        self._ends.set(record.id, event.at_s)
        if call is None:
            graph = self._graph_of(event)
            workflow, stage = self._workflow(record.key, graph, event.at_s), self._stage(graph, event.stage)
        else:
            workflow, stage = call.workflow, call.stage
            self._put(call, "", tells=False)
        workflow.calls += 1
        workflow.failed += record.error is not None
        self._touch(workflow, event.at_s)
        self._count(stage, "done", 1)
        self._count(stage, "failed", int(record.error is not None))
        if (spans := self._changed_spans.get(workflow.number)) is not None:
            spans[record.id] = span_of(record, event.at_s)

    # What began before

    def seed(self, runs: Iterable[RunState], waiting: Iterable[tuple[str, Call]], records: Iterable[Record]) -> None:
        """Take in what was there before the first event: open runs, calls in backends' queues, kept records."""
        with self._lock:
            for record in records:
                workflow = self._workflow(record.key, "", 0.0)
                workflow.calls += 1
                workflow.failed += record.error is not None
            for run in runs:
                if (seen := self._known_run(run)) is not None:
                    self._stands(seen, run)
            for backend, call in waiting:
                is_known = call.id in self._calls or self._ends.get(call.id) is not None
                if is_known or len(self._calls) >= MOST_CALLS:
                    continue
                who = call.identity
                graph = self._runs[who.run].graph if who.run in self._runs else call.standing.graph
                workflow = self._workflow(who.workflow, graph, call.arrived_s)
                span = LiveSpan(call.id, self._stage(graph, who.stage), workflow, call.arrived_s, backend)
                self._calls[call.id] = span
                self._put(span, "waiting")

    def waiting(self) -> Counter[str]:
        """Return how many calls are believed to wait at each backend."""
        with self._lock:
            return Counter(call.backend for call in self._calls.values() if call.phase == "waiting")

    def keep_waiting(self, backend: str, ids: set[str]) -> None:
        """Let go of calls that no longer wait at a backend: one that is taken back ends without an event."""
        with self._lock:
            for call in [each for each in self._calls.values() if each.phase == "waiting"]:
                if call.backend == backend and call.id not in ids:
                    del self._calls[call.id]
                    self._put(call, "")

    # What is asked

    def take(self, *, workflows: bool = True) -> LiveChanges:
        """Return what changed since the last look; without *workflows* their changes are kept for a later one."""
        with self._lock:
            rows, gone = (list(self._changed_workflows), self._gone) if workflows else ([], [])
            found = LiveChanges(
                self._new_stages, list(self._changed_stages), rows, gone,
                {number: list(spans.values()) for number, spans in self._changed_spans.items() if spans},
            )  # fmt: skip
            self._new_stages, self._changed_stages = [], {}
            if workflows:
                self._changed_workflows, self._gone = {}, []
            for spans in self._changed_spans.values():
                spans.clear()
            return found

    def all_now(self) -> tuple[list[LiveStage], list[LiveWorkflow]]:
        """Return all stages and workflows."""
        with self._lock:
            return list(self._stages.values()), list(self._workflows.values())

    def watch(self, numbers: Iterable[int]) -> None:
        """Note changes of spans of these workflows from now on, and of no others."""
        with self._lock:
            self._changed_spans = {number: self._changed_spans.get(number, {}) for number in numbers}

    def spans(self, number: int, records: Iterable[Record]) -> list[dict[str, Any]] | None:
        """Return the newest spans of a workflow; ``None`` where it is not known.

        Args:
            number: Of the workflow.
            records: Those that are kept, the oldest first.
        """
        with self._lock:
            workflow = self._by_number.get(number)
            if workflow is None:
                return None
            ends = dict(self._ends.items())
            open_now = [call.as_dict() for call in self._calls.values() if call.workflow is workflow]
            tools = [tool.as_dict() for tool in self._tools if tool.workflow is workflow]
        kept = [span_of(record, ends.get(record.id)) for record in records if record.key == workflow.key]
        return [*kept[-MOST_SPANS:], *tools[-MOST_SPANS:], *open_now[-MOST_SPANS:]]

    def number_of(self, name: str, tenant: str | None) -> int | None:
        """Return the number of a workflow that is followed."""
        with self._lock:
            known = self._workflows.get(workflow_key(name, tenant))
            return None if known is None else known.number

    # Under the lock

    def _call(self, event: CallEvent) -> LiveSpan | None:
        if event.call is None or self._ends.get(event.call) is not None:
            return None
        call = self._calls.get(event.call)
        if call is None:
            if len(self._calls) >= MOST_CALLS:
                return None
            graph = self._graph_of(event)
            workflow = self._workflow(workflow_key(event.workflow, event.tenant), graph, event.at_s)
            if event.run is not None and event.run in self._runs:
                self._belongs(event.run, self._runs[event.run], workflow)
            stage = self._stage(graph, event.stage)
            call = self._calls[event.call] = LiveSpan(event.call, stage, workflow, event.at_s)
        call.backend = event.backend or ""
        return call

    def _belongs(self, run_id: str, run: LiveRun, workflow: LiveWorkflow) -> None:
        """Let a run be of its call's workflow: whose tenant it is may show with its first call only."""
        before = run.workflow
        if before is not workflow:
            before.runs.pop(run_id, None)
            run.workflow, workflow.runs[run_id] = workflow, None
            if before.is_open or before.calls:
                self._touch(before, before.last_s)
            else:
                self._forget(before)

    def _graph_of(self, event: CallEvent) -> str:
        run = self._run(event.run, event)
        return "" if run is None else run.graph

    def _run(self, run_id: str | None, event: CallEvent) -> LiveRun | None:
        known = None if run_id is None else self._runs.get(run_id)
        if known is not None or run_id is None:
            return known
        state = self._run_of(run_id)
        return None if state is None else self._known_run(state, event.at_s)

    def _known_run(self, state: RunState, at_s: float = 0.0) -> LiveRun | None:
        known = self._runs.get(state.id)
        if known is None and len(self._runs) < MOST_RUNS:
            graph = shown(state.trace.graph, MOST_CHARS)
            workflow = self._workflow(state.workflow, graph, at_s)
            workflow.runs[state.id] = None
            known = self._runs[state.id] = LiveRun(workflow, graph)
        return known

    def _workflow(self, key: str, graph: str, at_s: float) -> LiveWorkflow:
        known = self._workflows.get(key)
        if known is None:
            self._number += 1
            known = self._workflows[key] = self._by_number[self._number] = LiveWorkflow(self._number, key)
            self._make_room()
        known.graph = graph or known.graph
        self._touch(known, at_s)
        return known

    def _make_room(self) -> None:
        if len(self._workflows) <= MOST_WORKFLOWS:
            return
        oldest = next((each for each in self._workflows.values() if not each.is_open), None)
        if oldest is None:
            oldest = next(iter(self._workflows.values()))
        self._forget(oldest)

    def _forget(self, workflow: LiveWorkflow) -> None:
        if self._by_number.pop(workflow.number, None) is not None:
            del self._workflows[workflow.key]
            self._changed_workflows.pop(workflow, None)
            self._gone.append(workflow.number)

    def _touch(self, workflow: LiveWorkflow, at_s: float) -> None:
        if self._by_number.get(workflow.number) is workflow:
            workflow.last_s = max(workflow.last_s, at_s)
            self._workflows.move_to_end(workflow.key)
            self._changed_workflows[workflow] = None

    def _stage(self, graph: str, stage: str) -> LiveStage:
        graph, stage = shown(graph, MOST_CHARS), shown(stage, MOST_CHARS)
        known = self._stages.get((graph, stage))
        if known is None:
            if len(self._stages) >= MOST_STAGES:
                graph, stage = "", OTHERS
            known = self._stages.get((graph, stage))
            if known is None:
                known = self._stages[graph, stage] = LiveStage(len(self._stages), graph, stage)
                self._new_stages.append(known)
        return known

    def _count(self, stage: LiveStage, what: str, by: int) -> None:
        if by:
            setattr(stage, what, getattr(stage, what) + by)
            self._changed_stages[stage] = None

    def _put(self, span: LiveSpan, phase: str, *, tells: bool = True) -> None:
        """Have a span counted where it is now."""
        workflow, before = span.workflow, span.phase
        if before != phase:
            span.phase = phase
            for name, by in ((before, -1), (phase, 1)):
                if name:
                    self._count(span.stage, name, by)
                    setattr(workflow, name, getattr(workflow, name) + by)
            self._touch(workflow, span.ended_s or span.first_s or span.sent_s or span.began_s)
        if tells and (spans := self._changed_spans.get(workflow.number)) is not None:
            spans[span.id] = span.as_dict()


_HANDLERS: Mapping[Happening, Callable[[LiveCalls, CallEvent], None]] = {
    Happening.RUN_STARTED: LiveCalls._run_started,
    Happening.RUN_ENDED: LiveCalls._run_ended,
    Happening.NODE_ENTERED: LiveCalls._node,
    Happening.NODE_LEFT: LiveCalls._node,
    Happening.TOOL_STARTED: LiveCalls._tool_started,
    Happening.TOOL_ENDED: LiveCalls._tool_ended,
    Happening.QUEUED: LiveCalls._queued,
    Happening.DISPATCHED: LiveCalls._dispatched,
    Happening.FIRST_TOKEN: LiveCalls._first_token,
    Happening.FINISHED: LiveCalls._finished,
}
