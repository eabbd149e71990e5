"""Data labels of workflows: which stages with labels one entered, and which of these labels its calls carry.

A call carries the labels of its stage, of every stage that its workflow entered from which its stage lies behind
(``flow``), and those that its caller claims. Runs of one thread are one workflow: its state goes from a run's end to
the next one's beginning, and after a run that did not come to its end, straight there.

Only stages with labels are remembered. What is forgotten for want of room is remembered by a hash of its workflow's
name: such a workflow carries ``ANY_LABEL`` from then on.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from orla_lg.core.boundary.bounded_dict import BoundedDict
from orla_lg.core.boundary.checked import texts
from orla_lg.core.guard.entered import (
    ANY,
    EVERYWHERE,
    ForgottenNames,
    Place,
    RunLabels,
    WorkflowLabels,
    close,
    joined,
)
from orla_lg.core.guard.flow import NO_LABELS, NONE, LabelledGraph, Moves, StageLabels
from orla_lg.core.guard.policies import ANY_LABEL
from orla_lg.core.lookahead.structure import END, NO_STRUCTURE, START, GraphStructure
from orla_lg.core.workflow import Outcome, RunState
from orla_lg.errors import ConfigError, shown

log = logging.getLogger("orla_lg")

KEEP_WORKFLOWS = 100_000
"""That entered stages with labels."""

DROP_AT_ONCE = 1024
"""One so-manieth of them goes when there is no more room."""

MOST_LABELS = 64
MOST_LABEL_CHARS = 100

KEEP_GRAPHS = 1000


def label_names(where: str, value: object) -> frozenset[str]:
    """Return labels as a set.

    Raises:
        ConfigError: It is no list of names.
    """
    names = texts(where, value)
    for name in names:
        if len(name) > MOST_LABEL_CHARS or name == ANY_LABEL or "/" in name or name != name.strip():
            raise ConfigError(
                f"{where}: a label is a name of at most {MOST_LABEL_CHARS} characters without '/' and blanks around "
                f"it, and not {ANY_LABEL!r}; got {shown(name)}"
            )
    if len(set(names)) > MOST_LABELS:
        raise ConfigError(f"{where}: at most {MOST_LABELS} labels, got {len(set(names))}")
    return frozenset(names)


def claimed_labels(where: str, value: object) -> frozenset[str]:
    """Return labels that a caller claims, ``ANY_LABEL`` perhaps among them.

    Raises:
        ConfigError: It is no list of names.
    """
    names = texts(where, value)
    plain = label_names(where, [name for name in names if name != ANY_LABEL])
    return plain | {ANY_LABEL} if ANY_LABEL in names else plain


def stage_labels(where: str, said: object) -> StageLabels:
    """Return what a table says of a stage's data, under ``labels`` and ``declassifies``; other keys are passed over.

    Raises:
        ConfigError: One of them is no list of names.
    """
    if not isinstance(said, Mapping):
        return NO_LABELS
    sets = (label_names(f"{where}: {key}", said[key]) if key in said else NONE for key in LABEL_KEYS)
    return StageLabels(*sets)


def labels_said(said: Mapping[str, Any]) -> frozenset[str]:
    """Return the labels that a running node's metadata says; what is wrong with them counts as any label."""
    try:
        return label_names("labels", said[LABELS])
    except ConfigError as error:
        log.warning("the labels of a node cannot be read, and it carries any: %s", error)
        return ANY


LABELS, DECLASSIFIES = LABEL_KEYS = ("labels", "declassifies")


class LabelStore(Protocol):
    """Keeps what workflows entered beyond this process."""

    def keep(self, workflow: str, value: bytes | None) -> None:
        """Keep a workflow's state in the place of what was kept; ``None``: it is over."""
        ...

    def keep_forgotten(self, value: bytes) -> None:
        """Keep which workflows are forgotten."""
        ...


class LabelFlow:
    """Follows the labels of all workflows of a core. Any thread may tell and ask."""

    def __init__(self) -> None:
        self.follows = False
        """Whether any label was ever declared or claimed; until then nothing is noted."""
        self.everywhere = NONE
        """What every call carries: any label, once something was forgotten and not of which workflow."""
        self.store: LabelStore | None = None
        self._lock = threading.Lock()
        self._table: dict[str, StageLabels] = {}
        self._graphs = BoundedDict[str, LabelledGraph](KEEP_GRAPHS)
        """By name, the newest of that name."""
        self._given = BoundedDict[str, tuple[str, GraphStructure]](KEEP_GRAPHS)
        """By workflow, the graph that it was said to be, where its runs have none."""
        self._workflows: OrderedDict[str, WorkflowLabels] = OrderedDict()
        self._runs: dict[str, RunLabels] = {}
        self._parents: dict[str, str] = {}
        """By workflow, the one whose node started it."""
        self._forgotten = ForgottenNames()

    # What is declared

    def heed(self, structure: GraphStructure) -> None:
        """Follow labels from now on if a graph declares some."""
        if structure.labels or structure.declassifies:
            self.follows = True

    def set_table(self, table: Mapping[str, StageLabels]) -> None:
        """Let this be what is said of stages beside their graphs, by name."""
        with self._lock:
            self._table = dict(table)
            for name, graph in self._graphs.items():
                self._graphs.replace(name, LabelledGraph(graph.structure, self._table))
        if any(said != NO_LABELS for said in table.values()):
            self.follows = True

    def set_graph(self, workflow: str, name: str, structure: GraphStructure) -> None:
        """Let a workflow whose runs tell of no graph have this one."""
        self.heed(structure)
        with self._lock:
            self._given.set(workflow, (name, structure))

    def said(self, structure: GraphStructure, stage: str) -> StageLabels:
        """Return what is said of a stage: the labels of those around it among them."""
        graph = LabelledGraph(structure, self._table)
        return StageLabels(graph.own(stage), graph.said(stage).declassifies)

    def _graph_of(self, run: RunState | None, workflow: str) -> tuple[str, LabelledGraph]:
        name, structure = ("", NO_STRUCTURE) if run is None else (run.trace.graph, run.trace.structure)
        if START not in structure.edges and (given := self._given.get(workflow)) is not None:
            name, structure = given
        known = self._graphs.get(name)
        if known is None or known.structure is not structure:
            if known is None or known.structure != structure:
                known = LabelledGraph(structure, self._table)
            self._graphs.set(name, known)
        return name, known

    # What happens

    def entered(self, run: RunState, stage: str, labels: frozenset[str] = NONE) -> None:
        """Note that a run entered a stage, whose own data has *labels* beside those that are declared of it."""
        with self._lock:
            name, graph = self._graph_of(run, run.workflow)
            labels |= graph.own(stage)
            takes_off = graph.said(stage).declassifies
            if labels or takes_off:
                known = self._runs.setdefault(run.id, RunLabels())
                for earlier, off in known.declassified.items() if labels else ():
                    known.declassified[earlier] = off - labels
                if takes_off:
                    known.declassified[stage] = takes_off
                self._add(run, (name, graph.place(stage)), labels)

    def _add(self, run: RunState, place: Place, labels: frozenset[str]) -> None:
        if not labels:
            return
        known = self._runs.setdefault(run.id, RunLabels())
        before = known.entered.get(place, NONE)
        if (after := joined(before, labels)) != before:
            known.entered[place] = after
            known.told.clear()
        self._share(run, known, run.workflows)

    def _share(self, run: RunState, known: RunLabels, workflows: Iterable[str]) -> None:
        """Let the workflows of a run know what it entered; and the one whose node it runs in, wherever in there."""
        if run.parent is not None and known.entered:
            brought = NONE.union(*known.entered.values())
            if self._state(run.parent).add(EVERYWHERE, brought):
                self._keep(run.parent)
        for workflow in workflows:
            if run.parent is not None:
                self._parents[workflow] = run.parent
            if workflow in known.told or not known.entered:
                continue
            known.told.add(workflow)
            known.workflows.add(workflow)
            state = self._state(workflow)
            new = [state.add(place, labels) for place, labels in known.entered.items()]
            brought = NONE.union(*known.entered.values())
            if any(new) or state.open.get(run.id) != brought:
                state.open[run.id] = brought
                self._keep(workflow)

    def run_ended(self, run: RunState, outcome: Outcome) -> None:
        """Note that a run ended."""
        with self._lock:
            known = self._runs.pop(run.id, None)
            for workflow in run.workflows:
                self._parents.pop(workflow, None)
            for workflow in {*run.workflows, *(() if known is None else known.workflows)}:
                if (state := self._workflows.get(workflow)) is None:
                    continue
                if run.name == run.id:  # no thread, so it will not come back
                    self._forget(workflow)
                    continue
                before = state.dumped()
                close(state, run, known or RunLabels(), outcome)
                if state.dumped() != before:
                    self._keep(workflow)

    def over(self, workflow: str) -> None:
        """Forget a workflow that will not come back."""
        with self._lock:
            self._given.pop(workflow)
            self._forget(workflow)

    def _forget(self, workflow: str) -> None:
        if self._workflows.pop(workflow, None) is not None and self.store is not None:
            self.store.keep(workflow, None)

    # What a call carries

    def carried(
        self, workflow: str, run: RunState | None, stage: str, claimed: frozenset[str] = NONE, *, lasts: bool = True
    ) -> frozenset[str]:
        """Return the labels of a call, and note those that it brings into its workflow.

        Args:
            workflow: The key of the call's workflow.
            run: Its run; ``None`` where that is not known.
            stage: Its stage.
            claimed: Labels that its caller claims.
            lasts: Further calls may belong to the workflow.
        """
        with self._lock:
            name, graph = self._graph_of(run, workflow)
            place, found = graph.place(stage), graph.own(stage) | claimed | self.everywhere
            workflows, wraps, moves = [workflow], lasts, NO_MOVES
            if run is not None:
                workflows, wraps = list(dict.fromkeys((workflow, *run.workflows))), run.name != run.id
                self._add(run, (name, place), found)
                if (known := self._runs.get(run.id)) is not None:
                    self._share(run, known, workflows)
                if any(each in self._workflows for each in workflows):
                    moves = graph.unwritten(run.trace.path().moves)
            elif lasts and found and self._state(workflow).add((name, place), found):
                self._keep(workflow)
            for each in workflows:
                if (state := self._known(each)) is not None:
                    found |= self._reaching(state, graph, (name, place), run, moves, wraps=wraps)
                found |= self._around(each, run)
            return found

    def brought_by(self, workflow: str, labels: frozenset[str]) -> list[str]:
        """Return the stages with which a workflow got any of these labels, in their order, as far as known."""
        with self._lock:
            state = self._workflows.get(workflow)
            entered = {} if state is None else state.entered
            return list(dict.fromkeys(stage for (_, stage), found in entered.items() if stage and found & labels))

    def _known(self, workflow: str) -> WorkflowLabels | None:
        state = self._workflows.get(workflow)
        if state is None:
            return _FORGOTTEN if workflow in self._forgotten else None
        self._workflows.move_to_end(workflow)
        return state

    def _reaching(
        self,
        state: WorkflowLabels,
        graph: LabelledGraph,
        at: Place,
        run: RunState | None,
        moves: Moves,
        *,
        wraps: bool,
    ) -> frozenset[str]:
        """Return those labels of a workflow that a stage lies behind."""
        name, place = at
        if not place:
            return state.all.union(*state.open.values())
        found, begins = set[str](), set(state.loose)
        for id, labels in state.open.items():
            if run is None or id != run.id:
                begins |= labels
        for (other, source), labels in state.entered.items():
            if not source or (other, source) == at:
                found |= labels
            elif other == name:
                found |= {
                    label for label in labels - found if graph.reaches(source, label, place, wraps=wraps, moves=moves)
                }
            else:  # another graph on the same thread: what leaves that one comes in at the beginning of this one
                elsewhere = self._graphs.get(other)
                begins |= {
                    label
                    for label in labels
                    if elsewhere is None
                    or not elsewhere.is_known
                    or elsewhere.reaches(source, label, END, wraps=False)
                }
        found |= {label for label in begins - found if graph.reaches(START, label, place, wraps=wraps, moves=moves)}
        return frozenset(found)

    def _around(self, workflow: str, run: RunState | None) -> frozenset[str]:
        """Return all labels of the workflows whose nodes started this one."""
        outer, found, seen = self._parents.get(workflow) or (None if run is None else run.parent), NONE, {workflow}
        while outer is not None and outer not in seen:
            seen.add(outer)
            if (state := self._known(outer)) is not None:
                found |= state.all.union(*state.open.values())
            outer = self._parents.get(outer)
        return found

    # What is kept

    def _state(self, workflow: str) -> WorkflowLabels:
        state = self._workflows.get(workflow)
        if state is None:
            if len(self._workflows) >= KEEP_WORKFLOWS:
                self._drop()
            state = self._workflows[workflow] = WorkflowLabels()
            if workflow in self._forgotten:
                state.add(EVERYWHERE, ANY)
        self._workflows.move_to_end(workflow)
        return state

    def _drop(self) -> None:
        """Forget the workflows that were not heard of for longest, but not that they are forgotten."""
        for _ in range(max(1, KEEP_WORKFLOWS // DROP_AT_ONCE)):
            workflow, _state = self._workflows.popitem(last=False)
            self._forgotten.add(workflow)
            if self.store is not None:
                self.store.keep(workflow, None)
        if self.store is not None:
            self.store.keep_forgotten(bytes(self._forgotten.bits))
        log.warning(
            "more than %d workflows have entered stages with labels; those of the oldest are forgotten, and if they "
            "call again, policies take their calls to carry any label", KEEP_WORKFLOWS,
        )  # fmt: skip

    def _keep(self, workflow: str) -> None:
        if self.store is not None and (state := self._workflows.get(workflow)) is not None:
            self.store.keep(workflow, state.dumped())

    def restore(self, kept: Mapping[str, bytes], forgotten: bytes | None = None) -> None:
        """Take over what a core before this one has kept; what cannot be read counts as forgotten."""
        with self._lock:
            if forgotten is not None:
                self._forgotten = ForgottenNames(forgotten)
            for workflow, value in kept.items():
                try:
                    self._workflows[workflow] = WorkflowLabels.read(value)
                except (ValueError, TypeError, KeyError) as error:
                    log.warning(
                        "the labels of workflow %s cannot be read (%s); it carries any", shown(workflow), error
                    )
                    self._forgotten.add(workflow)
            self.follows |= bool(kept) or self._forgotten.any

    def check_integrity(self) -> None:
        """Assert the invariants."""
        with self._lock:
            for workflow, state in self._workflows.items():
                for id, brought in state.open.items():
                    assert id in self._runs and workflow in self._runs[id].workflows, "labels of a run that ended"
                    assert brought <= state.all, "labels of a run that its workflow does not know"


NO_MOVES: Moves = frozenset()

_FORGOTTEN = WorkflowLabels({EVERYWHERE: ANY})
