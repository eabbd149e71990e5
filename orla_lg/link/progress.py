"""What graphs report of their progress, told to the core too, and kept while it lasts for the core after it."""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from orla_lg.core.background import is_collecting
from orla_lg.core.guard.flow import NONE
from orla_lg.core.guard.policies import ANY_LABEL
from orla_lg.core.identity import tenant_of
from orla_lg.core.lookahead.forecast import Ahead, Forecast
from orla_lg.core.memory.events import SplitPrompt
from orla_lg.core.memory.progress import GraphProgress
from orla_lg.core.workflow import Outcome, RunState
from orla_lg.errors import BackendUnavailable
from orla_lg.link.connection import Link
from orla_lg.link.framing import LinkBroken
from orla_lg.link.messages import Flat, Graph, Message, Signal
from orla_lg.link.prompts import KeptPrompts
from orla_lg.link.requests import CoreRequests
from orla_lg.link.views import flat_graph

NO_MORE: Flat = {}
KEEP_GRAPHS = 1000

TOLD_S = 30.0
"""What was sent so long ago on a connection that stands has come."""

KEEP_ENDED = 10_000
"""Runs that entered stages with labels, and ended while there was no core."""


@dataclass(eq=False, slots=True)
class OpenRun:
    """A run as the core was told of it."""

    began_s: float
    more: Flat
    nodes: Counter[tuple[str, str, int | None]] = field(default_factory=Counter)
    """Nodes under way: stage, namespace and step."""
    entered: dict[str, list[str]] = field(default_factory=dict)
    """Stages that it entered so far, with the labels of their data as far as they are known here."""
    graph: Graph | None = None


class EndedRun(NamedTuple):
    """A run that ended lately: the core may not have heard what it entered."""

    ended_s: float
    graph: Graph | None
    signals: Sequence[Signal]


class LinkedProgress(GraphProgress):
    """Where a replica hears of its graphs."""

    def joined(self, link: Link, requests: CoreRequests, prompts: KeptPrompts) -> LinkedProgress:
        """Tell a core by *link* of what happens; *prompts* go with the workflows that no run is open on any more."""
        self._link, self._requests, self._prompts = link, requests, prompts
        self._open: dict[str, OpenRun] = {}
        self._graphs: dict[str, tuple[Forecast, Graph]] = {}
        self._ended: deque[EndedRun] = deque()
        return self

    def forked(self) -> None:
        """Forget the parent's runs, in a child."""
        self._open.clear()
        self._ended.clear()

    # Runs

    def run_started(  # noqa: D102
        self,
        run: str,
        *,
        thread: str | None,
        tenant: str | None = None,
        parent: str | None = None,
        graph: str = "",
        forecast: Forecast | None = None,
    ) -> RunState:
        state = super().run_started(run, thread=thread, tenant=tenant, parent=parent, graph=graph, forecast=forecast)
        more = {"thread": thread, "tenant": tenant, "parent": parent, "graph": state.trace.graph}
        with self._link.lock:
            written = None if forecast is None else self._told(forecast)
            self._open[run] = OpenRun(state.standing.arrived_s, more, graph=written)
            self._report("run_started", run, {"age_s": 0.0, **more})
        return state

    def _told(self, forecast: Forecast) -> Graph:
        """Return a run's graph, once the core was told of it; another one of its name may have been since."""
        known = self._graphs.get(forecast.graph)
        if known is not None and known[0] is forecast:
            return known[1]
        graph = flat_graph(forecast.graph, forecast.structure, forecast.homes)
        if known is None or known[1] != graph:
            while len(self._graphs) >= KEEP_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            with contextlib.suppress(LinkBroken):  # too large to be told: its runs are learned from all the same
                self._link.send(graph)
        self._graphs[forecast.graph] = forecast, graph
        return graph

    def run_ended(self, run: str, outcome: Outcome) -> None:  # noqa: D102
        state = self._book.run(run)
        super().run_ended(run, outcome)
        with self._link.lock:
            if (known := self._open.pop(run, None)) is not None:
                ended = outcome if state is None else state.ends(outcome)
                self._report("run_ended", run, {"outcome": str(ended)})
                if state is not None and (self.guard.elsewhere or any(known.entered.values())):
                    self._remember(state, known, ended)
        if state is not None:
            self._prompts.over([key for key in state.workflows if not self._book.is_running(key)])

    def _remember(self, run: RunState, known: OpenRun, outcome: Outcome) -> None:
        """Keep what a run on a thread entered, until the core has surely heard of it."""
        if run.name == run.id:
            return
        now, ended = self._clock(), self._ended
        while ended and self._link.up and ended[0].ended_s < now - TOLD_S:
            ended.popleft()
        if len(ended) >= KEEP_ENDED:
            ended.popleft()
            self.guard.flow.everywhere = frozenset({ANY_LABEL})
        more = {"thread": run.name, "graph": run.trace.graph, "entered": known.entered, "outcome": str(outcome)}
        signals = [Signal("entered", run.id, {**more, "tenant": tenant_of(each) or None}) for each in run.workflows]
        ended.append(EndedRun(now, known.graph, signals))

    def ahead(self, run: str) -> Ahead | None:  # noqa: D102
        try:
            told = self._requests.ask("ahead", {"run": run})
        except BackendUnavailable:  # what was learned here has to do
            return super().ahead(run)
        return None if told is None else Ahead(told["stages"], told["backends"], told["remaining_s"])

    def thread_deleted(self, thread_id: str, tenant: str | None = None) -> None:  # noqa: D102
        super().thread_deleted(thread_id, tenant)
        self._report("thread_deleted", "", {"thread_id": thread_id, "tenant": tenant})

    # Nodes and tools

    def node_entered(  # noqa: D102
        self, run: RunState, stage: str, namespace: str = "", step: int | None = None,
        labels: frozenset[str] = NONE,
    ) -> None:  # fmt: skip
        super().node_entered(run, stage, namespace, step, labels)
        more: Flat = {"stage": stage, "namespace": namespace, "step": step}
        if self.guard.flow.follows and (own := labels | self.guard.flow.said(run.trace.structure, stage).labels):
            more["labels"] = sorted(own)
        with self._link.lock:
            if (known := self._open.get(run.id)) is not None:
                known.nodes[stage, namespace, step] += 1
                known.entered[stage] = more.get("labels") or known.entered.get(stage, [])
            self._report("node_entered", run.id, more)

    def node_left(self, run: RunState, stage: str, namespace: str = "") -> None:  # noqa: D102
        super().node_left(run, stage, namespace)
        with self._link.lock:
            if (known := self._open.get(run.id)) is not None:
                for node in [node for node in known.nodes if node[:2] == (stage, namespace)][:1]:
                    known.nodes[node] -= 1
                    if not known.nodes[node]:
                        del known.nodes[node]
            self._report("node_left", run.id, {"stage": stage, "namespace": namespace})

    def stage_flushed(self, workflow: str, run: str | None, backends: Iterable[str]) -> None:  # noqa: D102
        names = list(backends)
        super().stage_flushed(workflow, run, names)
        if run is not None:
            self._report("stage_flushed", run, {"backends": names})

    def tool_started(self, run: RunState, stage: str, name: str) -> None:  # noqa: D102
        super().tool_started(run, stage, name)
        self._report("tool_started", run.id, {"stage": stage, "name": name})

    def tool_ended(self, run: RunState, stage: str, name: str, seconds: float) -> None:  # noqa: D102
        super().tool_ended(run, stage, name, seconds)
        self._report("tool_ended", run.id, {"stage": stage, "name": name, "seconds": seconds})

    def prompt_split(self, run: RunState, split: SplitPrompt) -> bool:  # noqa: D102
        kept = self._prompts.extend(split)
        if kept is None:
            return False
        graph, stage = split.stage
        more = {
            "call": split.call, "backend": split.backend, "graph": graph, "stage": stage,
            "messages": [list(message) for message in kept], "results": split.results,
            "running": [list(tool) for tool in split.running], "partly": split.partly, "at_once": split.at_once,
        }  # fmt: skip
        self._report("prompt_split", run.id, more)
        return True

    def why_never_warmed(self) -> Mapping[str, str | None]:  # noqa: D102
        why_not = "the core that serves it prefills nothing there"
        return {name: None if self._prompts.keeps(name) else why_not for name in super().why_never_warmed()}

    # Telling

    def _report(self, what: str, run: str, more: Mapping[str, Any]) -> None:
        with contextlib.suppress(LinkBroken):  # a name that cannot be said: the graph must run all the same
            self._link.send(Signal(what, run, dict(more)))

    def again(self, now: float) -> Iterator[Message]:
        """Yield all that a core must know of the runs that are open; under the link's lock."""
        assert not is_collecting()
        latest = {name: graph for name, (_, graph) in self._graphs.items()}
        yield from latest.values()
        for ended in self._ended:
            yield from self._graph_again(ended.graph, latest)
            yield from ended.signals
        for run, known in self._open.items():
            yield from self._graph_again(known.graph, latest)
            yield Signal("run_started", run, {"age_s": now - known.began_s, "entered": known.entered, **known.more})
            for (stage, namespace, step), times in known.nodes.items():
                more = {"stage": stage, "namespace": namespace, "step": step}
                yield from [Signal("node_entered", run, more)] * times
        self._graphs = {name: known for name, known in self._graphs.items() if known[1] == latest[name]}

    def _graph_again(self, graph: Graph | None, latest: dict[str, Graph]) -> Iterator[Message]:
        """Yield the graph of a run where another one of its name was told since."""
        if graph is not None and latest.get(graph.name) != graph:
            latest[graph.name] = graph
            yield graph
