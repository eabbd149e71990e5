"""What graphs report between their calls: runs, nodes and tools begin and end.

The workflow book learns which runs are open, the lookahead what comes next and how long it takes, the memory manager
what may be kept, freed or warmed for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from orla_lg.core.accounting.updates import RecordUpdates
from orla_lg.core.background import Clock
from orla_lg.core.call import Call
from orla_lg.core.guard.flow import NONE
from orla_lg.core.guard.guard import Guard
from orla_lg.core.identity import workflow_key
from orla_lg.core.lookahead.forecast import Ahead, Forecast
from orla_lg.core.lookahead.lookahead import Lookahead
from orla_lg.core.memory.events import CacheEvent, EventKind, Returns, SplitPrompt
from orla_lg.core.memory.manager import MemoryManager
from orla_lg.core.record import CallEvent, Happening, RecordBook
from orla_lg.core.workflow import Outcome, RunState, WorkflowBook


class GraphProgress:
    """Where a core hears of its graphs; any thread may report.

    Args:
        book: The open runs.
        lookahead: Learns the graphs' ways, and says what comes next.
        memory: Hears what may change what should be cached.
        records: Its listeners hear of runs.
        updates: Writes at a run's end what its records still lack.
        clock: Monotonic seconds.
        guard: Follows the labels of what runs enter.
        looks_ahead: Whether it is of use to know that a stage's calls come soon.
    """

    def __init__(
        self,
        book: WorkflowBook,
        lookahead: Lookahead,
        memory: MemoryManager,
        records: RecordBook,
        updates: RecordUpdates,
        clock: Clock,
        guard: Guard,
        *,
        looks_ahead: bool,
    ) -> None:
        self._book = book
        self._lookahead = lookahead
        self._memory = memory
        self._records = records
        self._updates = updates
        self._clock = clock
        self.guard = guard
        guard.changed.append(memory.forget_prompts)
        self._looks_ahead = looks_ahead

    # Runs

    def run_started(
        self,
        run: str,
        *,
        thread: str | None,
        tenant: str | None = None,
        parent: str | None = None,
        graph: str = "",
        forecast: Forecast | None = None,
    ) -> RunState:
        """Open a run of a root graph, of *tenant* if that is known; *graph* names one without a *forecast*."""
        state = self._book.run_started(run, thread=thread, tenant=tenant, parent=parent)
        state.standing.arrived_s = self._clock()
        self._lookahead.began(state, graph, forecast)
        if state.returned:
            self._memory.signal([CacheEvent(EventKind.RESUMED, state.workflow)])
        if self._records.heard:
            self._tell(Happening.RUN_STARTED, state)
        return state

    def run_ended(self, run: str, outcome: Outcome) -> None:
        """Close a run; its workflow's cache is released or flushed."""
        state = self._book.run(run)
        if state is None:
            return
        ended = state.ends(outcome)
        if self.guard.flow.follows:
            self.guard.flow.run_ended(state, ended)
        self._memory.signal(self._book.run_ended(run, ended))
        for workflow in state.workflows:
            self._updates.run_ended(workflow)
        if ended is Outcome.DONE:
            self._lookahead.done(state)
        if self._records.heard:
            self._tell(Happening.RUN_ENDED, state, detail=str(ended))

    def ahead(self, run: str) -> Ahead | None:
        """Return what is expected of a run; ``None`` if it is not open."""
        state = self._book.run(run)
        return None if state is None else self._lookahead.ahead(state)

    def thread_deleted(self, thread_id: str, tenant: str | None = None) -> None:
        """Free what a tenant's deleted thread kept."""
        if self.guard.flow.follows:
            self.guard.flow.over(workflow_key(thread_id, tenant))
        self._memory.signal(self._book.thread_deleted(thread_id, tenant))

    # Nodes

    def node_entered(
        self, run: RunState, stage: str, namespace: str = "", step: int | None = None,
        labels: frozenset[str] = NONE,
    ) -> None:  # fmt: skip
        """Note that a node of a run starts.

        Args:
            run: Its run.
            stage: Its stage.
            namespace: Of this execution, with ids; without one, the stage runs once at a time.
            step: LangGraph's; ``None`` where steps are not told.
            labels: Of its data, beside those that are declared of the stage.
        """
        run.now_in[stage] += 1
        self._lookahead.entered(run, stage, namespace or stage, step)
        if labels:
            self.guard.claims(labels)
        if self.guard.flow.follows:
            self.guard.flow.entered(run, stage, labels)
        looks_ahead = self._looks_ahead and self._memory.heeds_stages()
        if looks_ahead and self._lookahead.estimates.calls(run.trace.graph, stage) == 0:
            self._tell_ahead(run, stage)

    def node_left(self, run: RunState, stage: str, namespace: str = "") -> None:
        """Note that a node of a run ended, well or not."""
        run.now_in[stage] -= 1
        self._lookahead.left(run, namespace or stage)

    def stage_busy(self, call: Call) -> None:
        """Note that a call went to its engine: meanwhile the stage after it may be prepared for.

        Asked for where the memory manager heeds stages.
        """
        if not self._looks_ahead or call.identity.run is None:
            return
        run = self._book.run(call.identity.run)
        if run is not None:
            self._tell_ahead(run, call.identity.stage)

    def _tell_ahead(self, run: RunState, stage: str) -> None:
        ahead = self._lookahead.next_calls(run)
        if not ahead:
            return
        graph = run.trace.graph
        usual = self._lookahead.estimates.learned(graph, stage)
        took = (usual.service_s if usual.calls else None, usual.other_s)
        busy_s = None if took == (None, None) else sum(filter(None, took))
        self._memory.signal(
            [
                CacheEvent(
                    EventKind.STAGE_BUSY, run.workflow, graph=graph, stage=stage, ahead=ahead,
                    returns=Returns(usual_s=busy_s),
                )
            ]
        )  # fmt: skip

    def stage_flushed(self, workflow: str, run: str | None, backends: Iterable[str]) -> None:
        """Free what a workflow cached where a stage ran that is done, and says that no other one needs it.

        The memory policy hears of it as of a call that is done, with the hint ``flush`` (``EventKind.CALL_DONE``).
        """
        self._memory.signal([CacheEvent(EventKind.CALL_DONE, workflow, name, "flush") for name in backends])

    # Tools

    def tool_started(self, run: RunState, stage: str, name: str) -> None:
        """Note that a tool of a run starts."""
        self._memory.signal(
            [CacheEvent(EventKind.TOOL_STARTED, run.workflow, graph=run.trace.graph, stage=stage, tool=name)]
        )

    def tool_ended(self, run: RunState, stage: str, name: str, seconds: float) -> None:
        """Learn how long a tool of a run took, in *seconds*, ended well or not; the memory policy hears nothing."""
        self._lookahead.used_tool(run, stage, seconds)
        self._memory.returns.used(run.workflow, name, seconds)

    def prompt_split(self, run: RunState, split: SplitPrompt) -> bool:
        """Note what is certain of the prompt after a call of a run; returns whether that can be warmed.

        The memory policy hears of it, as ``EventKind.TOOL_ENDED``, where results are there and other tools still run.
        """
        if not (self.guard.may_extend(run, split.stage[1]) and self._memory.extend(split)):
            return False
        if split.results and split.running:
            self._memory.signal(
                [
                    CacheEvent(
                        EventKind.TOOL_ENDED, split.workflow, split.backend, graph=split.stage[0],
                        stage=split.stage[1], call=split.call, running=split.running, at_once=split.at_once,
                    )
                ]
            )  # fmt: skip
        return True

    def why_never_warmed(self) -> Mapping[str, str | None]:
        """Return of each backend why no prompt is ever prefilled there; ``None`` where one may be."""
        return self._memory.why_never_warmed()

    def _tell(self, kind: Happening, run: RunState, *, detail: str = "") -> None:
        self._records.tell(CallEvent(kind, self._clock(), run.name, run.id, detail=detail, tenant=run.tenant))
