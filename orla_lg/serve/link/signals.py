"""What replicas say of their runs, nodes and tools, as the core's ``GraphProgress`` hears it.

A fixed table says which signal is which; a name that is not in it is a newer peer's, and passed over. A replica
speaks of its own runs only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from orla_lg.core.boundary.bounded_dict import BoundedDict
from orla_lg.core.guard.flow import NONE
from orla_lg.core.guard.labels import claimed_labels
from orla_lg.core.identity import workflow_key
from orla_lg.core.lookahead.forecast import Forecast
from orla_lg.core.lookahead.lookahead import KEEP_GRAPHS
from orla_lg.core.memory.events import SplitPrompt
from orla_lg.core.record import CallEvent, Happening
from orla_lg.core.serving import Serving
from orla_lg.core.workflow import Outcome, RunState
from orla_lg.errors import ConfigError, MappingError, shown
from orla_lg.link.framing import LinkBroken
from orla_lg.link.messages import Flat, FlatMessage, Graph, Signal
from orla_lg.link.views import read_graph
from orla_lg.serve.link.flat import (
    MOST_AGE_S,
    MOST_CHARS,
    MOST_ID_CHARS,
    bounded,
    named,
    numbers,
    tenant_within,
)
from orla_lg.serve.link.roster import Replica

log = logging.getLogger("orla_lg")

MOST_RUNS = 20_000
"""Of one replica, open at once."""

MOST_STAGES = 10_000
"""Of one graph."""

MOST_LISTED = 1_000
"""Messages that follow on a call, and tools that it asked for."""

MOST_TOOL_S = 30 * 86_400.0


class RunSignals:
    """Hears the signals of all replicas. Of the loop's thread.

    Args:
        serving: The core.
        resumed: Called with a run that a replica brought from a core before this one.
    """

    def __init__(self, serving: Serving, resumed: Callable[[RunState], None] = lambda run: None) -> None:
        self._serving = serving
        self._resumed = resumed
        self._graphs = BoundedDict[tuple[str | None, str], Forecast](KEEP_GRAPHS)
        """By key and name: graphs of another key's applications are others."""
        self._of_run: Mapping[str, Callable[[RunState, Flat], None]] = {
            "interrupted": self._interrupted,
            "node_entered": self._node_entered,
            "node_left": self._node_left,
            "stage_flushed": self._stage_flushed,
            "tool_started": self._tool_started,
            "tool_ended": self._tool_ended,
            "prompt_split": self._prompt_split,
        }

    def graph(self, replica: Replica, message: Graph) -> None:
        """Take in a graph's structure.

        Raises:
            LinkBroken: It is none, or too large.
        """
        named(message.name, "a graph's name")
        if len(message.edges) > MOST_STAGES:
            raise LinkBroken(f"a graph of {len(message.edges)} stages, at most {MOST_STAGES} are right")
        name, structure, homes = read_graph(message)
        self._serving.guard.heed(structure)
        if not all(isinstance(home, str) for home in homes.values()):
            raise LinkBroken(f"the homes of graph {shown(name)} are no names")
        self._graphs.set((replica.caller.key_id, name), self._serving.lookahead.forecast(name, structure, homes))

    def signal(self, replica: Replica, message: Signal) -> None:
        """Take in one signal.

        Raises:
            LinkBroken: What it says has the wrong shape.
        """
        if message.what == "run_started":
            self._run_started(replica, message.run, message.more)
        elif message.what == "run_ended":
            self._run_ended(replica, message.run, message.more)
        elif message.what == "entered":
            self._entered_before(replica, message.run, message.more)
        elif message.what == "thread_deleted":
            self._thread_deleted(replica, message.more)
        elif message.what == "unidentified":
            self._serving.book.lost()
        elif (handle := self._of_run.get(message.what)) is not None and message.run in replica.runs:
            run = self._serving.book.run(message.run)
            if run is not None:
                handle(run, message.more)

    def end_all(self, replica: Replica) -> None:
        """End the runs of a replica that will not end them."""
        for run in replica.runs:
            self._serving.progress.run_ended(run, Outcome.ABANDONED)
        replica.runs.clear()

    # Runs

    def _run_started(self, replica: Replica, run: str, more: Flat) -> None:
        serving = self._serving
        named(run, "a run's id", MOST_ID_CHARS)
        known = serving.book.run(run)
        if known is not None:
            if run in replica.runs:  # said again on another connection: so are the nodes that it is in
                known.now_in.clear()
                self._enter_again(known, more)
            return
        if len(replica.runs) >= MOST_RUNS:
            log.warning("replica %s has %d runs open, and no further ones are followed", replica.id, MOST_RUNS)
            return
        thread, parent, graph = _text(more, "thread"), _text(more, "parent"), _text(more, "graph") or ""
        try:
            tenant = tenant_within(replica.caller, _text(more, "tenant"))
        except MappingError:  # its calls name it, or are refused with what is wrong
            tenant = None
        forecast = self._graphs.get((replica.caller.key_id, graph)) if graph else None
        state = serving.progress.run_started(
            run, thread=thread, tenant=tenant, parent=parent, graph=graph, forecast=forecast
        )
        state.standing.arrived_s -= bounded(_number(more, "age_s"), MOST_AGE_S)
        replica.runs.add(run)
        self._enter_again(state, more)
        self._resumed(state)

    def _enter_again(self, run: RunState, more: Flat) -> None:
        """Note the labels of the stages that a run entered before, on another connection or at another core."""
        entered = more.get("entered") or {}
        if not isinstance(entered, dict) or len(entered) > MOST_STAGES:
            raise LinkBroken("the stages that a run entered are no table, or too many")
        guard = self._serving.guard
        for stage in entered:
            labels = _labels(entered, stage)
            guard.claims(labels)
            if guard.flow.follows:
                guard.flow.entered(run, stage, labels)

    def _entered_before(self, replica: Replica, run: str, more: Flat) -> None:
        """Note what a run entered that has ended, since it may have while its replica was not connected."""
        named(run, "a run's id", MOST_ID_CHARS)
        thread, graph = _text(more, "thread"), _text(more, "graph") or ""
        known = self._serving.book.run(run)
        if known is not None and run in replica.runs:  # its end was lost on the way
            self._enter_again(known, more)
            self._run_ended(replica, run, more)
        if thread is None or known is not None:
            return
        try:
            tenant = tenant_within(replica.caller, _text(more, "tenant"))
        except MappingError as error:
            log.warning("what thread %s entered is not noted: %s", shown(thread), error)
            return
        state = RunState(run, workflow_key(thread, tenant))
        state.trace.graph = graph
        if (forecast := self._graphs.get((replica.caller.key_id, graph))) is not None:
            state.trace.structure = forecast.structure
        self._enter_again(state, more)
        self._serving.guard.flow.run_ended(state, _outcome(more))

    def _run_ended(self, replica: Replica, run: str, more: Flat) -> None:
        if run not in replica.runs:
            return
        replica.runs.discard(run)
        if more.get("interrupted") is True and (state := self._serving.book.run(run)) is not None:
            state.interrupted = True
        self._serving.progress.run_ended(run, _outcome(more))

    def _thread_deleted(self, replica: Replica, more: Flat) -> None:
        thread = _text(more, "thread_id")
        if thread is None:
            raise LinkBroken("a deleted thread without its id")
        try:
            tenant = tenant_within(replica.caller, _text(more, "tenant"))
        except MappingError as error:
            log.warning("thread %s is not forgotten: %s", shown(thread), error)
            return
        self._serving.progress.thread_deleted(thread, tenant)

    # Inside a run

    def _interrupted(self, run: RunState, more: Flat) -> None:
        run.interrupted = True

    def _node_entered(self, run: RunState, stage_of: Flat) -> None:
        step = stage_of.get("step")
        self._serving.progress.node_entered(
            run, _stage(stage_of), _text(stage_of, "namespace") or "", step if isinstance(step, int) else None,
            _labels(stage_of, "labels"),
        )  # fmt: skip
        self._tell(Happening.NODE_ENTERED, run, _stage(stage_of))

    def _node_left(self, run: RunState, more: Flat) -> None:
        stage = _stage(more)
        if run.now_in[stage] > 0:
            self._serving.progress.node_left(run, stage, _text(more, "namespace") or "")
            self._tell(Happening.NODE_LEFT, run, stage)

    def _stage_flushed(self, run: RunState, more: Flat) -> None:
        backends = more.get("backends")
        if not isinstance(backends, list):
            raise LinkBroken(f"a signal's backends are no list but {type(backends).__name__}")
        known = [name for name in self._serving.schedulers if name in backends]
        self._serving.progress.stage_flushed(run.workflow, run.id, known)

    def _tool_started(self, run: RunState, more: Flat) -> None:
        stage, name = _stage(more), _text(more, "name") or ""
        self._serving.progress.tool_started(run, stage, name)
        self._tell(Happening.TOOL_STARTED, run, stage, name)

    def _tool_ended(self, run: RunState, more: Flat) -> None:
        seconds = bounded(_number(more, "seconds"), MOST_TOOL_S)
        stage, name = _stage(more), _text(more, "name") or ""
        self._serving.progress.tool_ended(run, stage, name, seconds)
        self._tell(Happening.TOOL_ENDED, run, stage, name)

    def _tell(self, kind: Happening, run: RunState, stage: str, detail: str = "") -> None:
        """Have listeners hear of a node or a tool, as they do of those in this process."""
        serving = self._serving
        if serving.records.heard:
            at_s = serving.clock()
            serving.records.tell(CallEvent(kind, at_s, run.name, run.id, stage, detail=detail, tenant=run.tenant))

    def _prompt_split(self, run: RunState, more: Flat) -> None:
        messages = [FlatMessage(*_pair(each, "message")) for each in _listed(more, "messages")]
        numbers([message.hashed for message in messages], "hashes", 2**64 - 1)
        numbers([message.chars for message in messages], "chars", MOST_CHARS)
        running = [_tool(*_pair(each, "tool")) for each in _listed(more, "running")]
        stage = _text(more, "graph") or "", _stage(more)
        results = int(bounded(_number(more, "results"), MOST_LISTED))
        at_once = int(bounded(_number(more, "at_once"), MOST_LISTED))
        for workflow in run.workflows:
            split = SplitPrompt(
                _text(more, "call") or "", workflow, _text(more, "backend") or "", stage, messages, results, running,
                more.get("partly") is True, at_once,
            )  # fmt: skip
            if self._serving.progress.prompt_split(run, split):
                return


def _outcome(more: Mapping[str, Any]) -> Outcome:
    said = _text(more, "outcome")
    return next((each for each in Outcome if each == said), Outcome.ABANDONED)


def _labels(more: Mapping[str, Any], name: str) -> frozenset[str]:
    if not (said := more.get(name)):
        return NONE
    try:
        return claimed_labels("a signal's labels", said)
    except ConfigError as error:
        raise LinkBroken(str(error)) from error


def _listed(more: Mapping[str, Any], name: str) -> list[Any]:
    listed = more.get(name)
    if not isinstance(listed, list | tuple) or len(listed) > MOST_LISTED:
        raise LinkBroken(f"a signal's {name} is no list of at most {MOST_LISTED}")
    return list(listed)


def _pair(value: Any, what: str) -> tuple[Any, Any]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise LinkBroken(f"a {what} of a split prompt is no pair")
    return value[0], value[1]


def _tool(name: Any, ran_s: Any) -> tuple[str, float]:
    tool = {"name": name, "seconds": ran_s}
    return _text(tool, "name") or "", bounded(_number(tool, "seconds"), MOST_TOOL_S)


def _text(more: Mapping[str, Any], name: str) -> str | None:
    value = more.get(name)
    if value is not None and not isinstance(value, str):
        raise LinkBroken(f"a signal's {name} is no text but {type(value).__name__}")
    named(value, f"a signal's {name}")
    return value


def _stage(more: Mapping[str, Any]) -> str:
    stage = _text(more, "stage")
    if stage is None:
        raise LinkBroken("a node's or tool's signal without a stage")
    return stage


def _number(more: Mapping[str, Any], name: str) -> float:
    value = more.get(name, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LinkBroken(f"a signal's {name} is no number but {type(value).__name__}")
    return float(value)
