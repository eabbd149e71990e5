"""Who is known: every run from start to end, and the workflow (thread or run) that it belongs to.

The book turns what LangGraph tells (a run started, was interrupted, ended; a thread was deleted) and what
we do (a call went to a backend) into ``CacheEvent`` values for the memory manager. It returns them; the
caller delivers them outside the lock.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from orla_lg.core.call import Call, Hints, Usage
from orla_lg.core.identity import NAMESPACE_SEPARATOR, TENANT_MARK, Identity, tenant_of, workflow_key, workflow_name
from orla_lg.core.limits.limits import LimitScope
from orla_lg.core.limits.usage import Accounts
from orla_lg.core.lookahead.forecast import Forecast
from orla_lg.core.lookahead.run_share import RunShare
from orla_lg.core.lookahead.trace import RunTrace
from orla_lg.core.memory.events import CacheEvent, EventKind, Returns


class Outcome(StrEnum):
    """How a run ended."""

    DONE = "done"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    CANCELLED = "cancelled"
    ABANDONED = "abandoned"


@dataclass(eq=False, slots=True)
class RunState:
    """One execution of a root graph."""

    id: str
    workflow: str
    """The key of the workflow that its newest call belongs to; before any, of its own tenant's."""
    parent: str | None = None
    """The key of the workflow whose node started this run, when it is a workflow of its own."""
    tenant: str | None = None
    """What its configuration names; calls that name none are of this one. ``None``: nothing was named so far."""
    others: tuple[str, ...] = ()
    """Keys of further workflows it runs in, since calls of it named other tenants."""
    settled: bool = False
    """A call showed that ``workflow`` is one it runs in; until then the run may turn out to be another tenant's."""
    returned: bool = False
    """It runs on a thread that was idle or interrupted."""
    interrupted: bool = False
    priority: float | None = None
    """Set by ``orla.prioritize``."""
    standing: RunShare = field(default_factory=RunShare)
    trace: RunTrace = field(default_factory=RunTrace)
    forecast: Forecast | None = None
    """What is expected of its graph; ``None`` where that is not known."""
    now_in: Counter[str] = field(default_factory=Counter)
    """Stages with a node under way, and how many of them."""
    layer: LimitScope | None = None
    """The limits of its graph."""
    accounts: Accounts = field(default_factory=dict)
    """What its own limits are kept by (``limits.book``)."""
    unread: dict[str, tuple[str, Callable[[str], None]]] = field(default_factory=dict)
    """Its calls whose streams are being read, by id: the execution of a node that reads, and what ends the call."""

    @property
    def name(self) -> str:
        """Its workflow as users know it."""
        return workflow_name(self.workflow)

    @property
    def workflows(self) -> tuple[str, ...]:
        """The keys of all workflows that it runs in."""
        return (self.workflow, *self.others)

    def key(self, tenant: str | None) -> str:
        """Return the key of the workflow that a call of it belongs to which names *tenant*, or none."""
        tenant = (self.tenant if tenant is None else tenant) or ""
        if not tenant and not self.workflow.startswith(TENANT_MARK):
            return self.workflow
        return self.workflow if tenant == tenant_of(self.workflow) else workflow_key(self.name, tenant)

    def stages(self) -> list[str]:
        """Return the stages it is in now."""
        return [stage for stage, nodes in list(self.now_in.items()) if nodes > 0]

    def failed(self, namespace: str, error: str) -> None:
        """End the calls whose streams an execution of a node left open when it raised; all, where it is empty.

        Its exception holds them in a cycle until the collector runs, and they hold what the next call may wait for.
        """
        for within, finish in list(self.unread.values()):
            if not namespace or within == namespace or within.startswith(namespace + NAMESPACE_SEPARATOR):
                finish(error)

    def ends(self, told: Outcome) -> Outcome:
        """Return how the run really ends: LangGraph tells an interrupted one as done."""
        return Outcome.INTERRUPTED if told is Outcome.DONE and self.interrupted else told


def of_tenant(identity: Identity, hints: Hints, run: RunState | None) -> tuple[Identity, Hints]:
    """Let a call belong to the workflow of the tenant that its hints name, else of its run's."""
    tenant = hints.tenant
    if tenant is None and run is not None:
        tenant = run.tenant
    if tenant or (identity.workflow.startswith(TENANT_MARK) and identity.tenant):
        key = workflow_key(identity.name, tenant)
        identity = identity if key == identity.workflow else replace(identity, workflow=key)
        hints = hints if tenant == hints.tenant else replace(hints, tenant=tenant)
    return identity, hints


@dataclass(eq=False, slots=True)
class WorkflowState:
    """What shares KV cache. Idle exactly when no run is open; only threads stay known while idle."""

    id: str
    """Its key."""
    thread: bool
    runs: set[str] = field(default_factory=set)
    backends: dict[str, set[str]] = field(default_factory=dict)
    """Backends it did not leave yet, with the ids of the calls open there."""


@dataclass(frozen=True, slots=True)
class WorkflowStatistics:
    """The book at one moment."""

    runs: int
    running: int
    idle: int
    outcomes: dict[str, int]


class WorkflowBook:
    """All runs and workflows of one ``Orla``; bounded by ``max_idle`` remembered threads."""

    def __init__(self, *, max_idle: int = 10_000) -> None:
        self._lock = threading.Lock()
        runs = self._runs = dict[str, RunState]()
        self.run: Callable[[str], RunState | None] = runs.get
        """Return an open run; asked for so often that it is the dictionary's own method."""
        workflows = self._workflows = dict[str, WorkflowState]()
        self.known: Callable[[str], WorkflowState | None] = workflows.get
        """Return a workflow that runs or is idle, by its key; likewise."""
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._max_idle = max_idle
        self._outcomes: dict[str, int] = {}
        self.unidentified = 0
        """Calls made while graphs ran whose context was lost on the way."""

    def lost(self) -> None:
        """Count a call whose run is not known."""
        with self._lock:
            self.unidentified += 1

    def run_started(
        self, run: str, *, thread: str | None, tenant: str | None = None, parent: str | None = None
    ) -> RunState:
        """Open a run on its tenant's thread, or on a workflow of its own."""
        workflow = workflow_key(run if thread is None else thread, tenant)
        with self._lock:
            returned = workflow in self._idle
            state = self._runs[run] = RunState(run, workflow, parent, tenant=tenant, returned=returned)
            self._open(workflow, run, on_thread=thread is not None)
            return state

    def _open(self, workflow: str, run: str, *, on_thread: bool) -> None:
        known = self._workflows.setdefault(workflow, WorkflowState(workflow, on_thread))
        known.runs.add(run)
        self._idle.pop(workflow, None)

    def joined(self, run: RunState, workflow: str) -> list[CacheEvent]:
        """Note that a call of a run belongs to *workflow*, which is another one where it names another tenant.

        A run whose tenant shows with its first call only was taken for its name's tenantless workflow, and leaves
        that as it found it.
        """
        with self._lock:
            before, settled, run.settled = run.workflow, run.settled, True
            if before == workflow or run.id not in self._runs:
                return []
            run.workflow = workflow
            if workflow in run.others:
                run.others = tuple(before if each == workflow else each for each in run.others)
                return []
            back, returned = workflow in self._idle, run.returned
            self._open(workflow, run.id, on_thread=run.name != run.id)
            events = [CacheEvent(EventKind.RESUMED, workflow)] if back else []
            if settled:
                run.others = (*run.others, before)
                return events
            run.returned = back
            return [*self._left_as_found(before, run.id, returned=returned), *events]

    def _left_as_found(self, workflow: str, run: str, *, returned: bool) -> list[CacheEvent]:
        """Let a run not have been in a workflow: one that was idle before is so again, any other is not known."""
        known = self._workflows.get(workflow)
        if known is None:  # its thread was deleted meanwhile
            return []
        known.runs.discard(run)
        if known.runs:
            return []
        if returned:
            return self._rest(known, EventKind.IDLE)
        del self._workflows[workflow]
        return [CacheEvent(EventKind.OVER, workflow)]

    def runs(self) -> list[RunState]:
        """Return the open runs."""
        with self._lock:
            return list(self._runs.values())

    def open_on(self, name: str, tenant: str | None) -> list[RunState]:
        """Return the open run of that id, unless it is another tenant's, else those on that tenant's thread."""
        with self._lock:
            if (run := self._runs.get(name)) is not None:
                mine = tenant is None or any(tenant_of(workflow) == tenant for workflow in run.workflows)
                return [run] if mine else []
            key = workflow_key(name, tenant)
            return [run for run in self._runs.values() if key in run.workflows]

    def refresh(self, call: Call) -> bool:
        """Give *call* its run's priority of this moment; returns whether that changed it."""
        run = None if call.identity.run is None else self._runs.get(call.identity.run)
        if run is None or run.priority in (None, call.hints.priority) or call.said.priority is not None:
            return False
        call.hints = Hints(priority=run.priority).over(call.hints)
        return True

    def open_runs(self) -> int:
        """Return how many runs are open."""
        return len(self._runs)

    def run_ended(self, run: str, outcome: Outcome) -> list[CacheEvent]:
        """Close a run; its workflows become idle (a thread) or over. Idempotent."""
        with self._lock:
            state = self._runs.pop(run, None)
            if state is None:
                return []
            self._outcomes[outcome] = self._outcomes.get(outcome, 0) + 1
            events = self._leave(state.workflow, run, outcome)
            for workflow in state.others:
                events += self._leave(workflow, run, outcome)
            return events

    def _leave(self, workflow: str, run: str, outcome: Outcome) -> list[CacheEvent]:
        known = self._workflows.get(workflow)
        if known is None:  # its thread was deleted while it ran
            return []
        known.runs.discard(run)
        return [] if known.runs else self._run_dry(known, outcome)

    def _run_dry(self, workflow: WorkflowState, outcome: Outcome) -> list[CacheEvent]:
        if not workflow.thread:
            del self._workflows[workflow.id]
            return [CacheEvent(EventKind.OVER, workflow.id)]
        return self._rest(workflow, EventKind.INTERRUPTED if outcome is Outcome.INTERRUPTED else EventKind.IDLE)

    def _rest(self, workflow: WorkflowState, kind: EventKind) -> list[CacheEvent]:
        self._idle[workflow.id] = None
        events = [CacheEvent(kind, workflow.id)]
        while len(self._idle) > self._max_idle:
            oldest, _ = self._idle.popitem(last=False)
            del self._workflows[oldest]
            events.append(CacheEvent(EventKind.FORGOTTEN, oldest))
        return events

    def thread_deleted(self, thread: str, tenant: str | None = None) -> list[CacheEvent]:
        """Forget a tenant's thread; a run still open on it ends without a further event."""
        workflow = workflow_key(thread, tenant)
        with self._lock:
            self._idle.pop(workflow, None)
            self._workflows.pop(workflow, None)
            return [CacheEvent(EventKind.THREAD_DELETED, workflow)]

    def call_started(self, call: Call, backend: str) -> list[CacheEvent]:
        """Note that a call heads for *backend*; tells when its workflow thereby left another one."""
        with self._lock:
            known = self._workflows.get(call.identity.workflow)
            if known is None:
                return []
            known.backends.setdefault(backend, set()).add(call.id)
            if len(known.backends) == 1:
                return []
            left = [name for name, open_calls in known.backends.items() if name != backend and not open_calls]
            for name in left:  # once; what a policy keeps there stays kept
                del known.backends[name]
            return [CacheEvent(EventKind.SWITCHED, known.id, name, call.hints.cache) for name in left]

    def call_ended(
        self, call: Call, backend: str, usage: Usage | None = None,
        away: Callable[[str, str, str], Returns] | None = None,
    ) -> list[CacheEvent]:  # fmt: skip
        """Note that a call on *backend* ended, well or not; *usage* is what the engine counted.

        *away* notes that a workflow waits for what follows a stage of a graph, and returns what is known of that.
        """
        workflow, graph, stage = call.identity.workflow, call.standing.graph, call.identity.stage
        with self._lock:
            known = self._workflows.get(workflow)
            if known is not None and backend in known.backends:  # a deleted thread's call is not its successor's
                known.backends[backend].discard(call.id)
            waits = known is not None and bool(known.runs) and not any(known.backends.values())
        kind = EventKind.CALL_DONE if known is not None else EventKind.STRAY_DONE
        returns = away(workflow, graph, stage) if waits and away is not None else None
        prompt_tokens = 0 if usage is None else usage.prompt_tokens
        fresh_tokens = 0 if usage is None else prompt_tokens - (usage.cached_tokens or 0)
        hint = call.hints.cache
        return [CacheEvent(kind, workflow, backend, hint, graph, stage, waits, returns, prompt_tokens, fresh_tokens)]

    def is_running(self, workflow: str) -> bool:
        """Whether a run of *workflow* is open, so that more calls are to be expected."""
        known = self._workflows.get(workflow)
        return known is not None and bool(known.runs)

    def calls_open(self, workflow: str, backend: str) -> bool:
        """Whether a call of *workflow* waits or runs on *backend*."""
        known = self._workflows.get(workflow)
        return known is not None and bool(known.backends.get(backend))

    def statistics(self) -> WorkflowStatistics:
        """Return a snapshot."""
        with self._lock:
            running = sum(bool(w.runs) for w in self._workflows.values())
            return WorkflowStatistics(len(self._runs), running, len(self._idle), dict(self._outcomes))

    def check_integrity(self) -> None:
        """Assert the invariants."""
        with self._lock:
            for workflow in self._workflows.values():
                assert workflow.runs or workflow.id in self._idle, workflow
                assert workflow.thread or workflow.runs, workflow
                assert all(run in self._runs for run in workflow.runs), workflow
            assert all(idle in self._workflows for idle in self._idle)
