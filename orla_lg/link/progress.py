"""What graphs report of their progress, told to the cores too, and kept while it lasts for the cores after them.

A run is told of to each core whose pool it uses: to the only one when it starts, and with pools when its first call
enters there, with its age and what it is in. Where labels are followed or policies hold, each core is told of each
run: a later call of the thread may enter anywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from orla_lg.core.background import is_collecting
from orla_lg.core.boundary.bounded_dict import BoundedDict
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
from orla_lg.link.reports import CoreReports, EndedRun, OpenRun
from orla_lg.link.requests import CoreRequests
from orla_lg.link.views import flat_graph

KEEP_GRAPHS = 1000

KEEP_USED = 10_000
"""Of so many workflows it is known which pools their last runs used."""


class ToldCore(Protocol):
    """What progress needs of one core (``side.CoreSide``)."""

    link: Link
    reports: CoreReports
    requests: CoreRequests
    prompts: KeptPrompts


class ToldCores(Protocol):
    """Those that may be told of a run (``cores.Cores``)."""

    @property
    def several(self) -> bool:
        """Whether there are pools."""
        ...

    @property
    def by_pool(self) -> Mapping[str, ToldCore]:
        """All of them."""
        ...

    @property
    def home(self) -> ToldCore:
        """The first that was met."""
        ...

    def all(self) -> Sequence[ToldCore]:
        """Return all of them."""
        ...

    def of(self, backend: str) -> ToldCore:
        """Return the one that decides about a backend."""
        ...


class LinkedProgress(GraphProgress):
    """Where a replica hears of its graphs."""

    def joined(self, cores: ToldCores) -> LinkedProgress:
        """Tell cores of what happens; what they keep of prompts goes with workflows that no run is open on."""
        self._cores, self._home = cores, cores.home.link
        self._open: dict[str, OpenRun] = {}
        self._graphs: dict[str, tuple[Forecast, Graph]] = {}
        self._used = BoundedDict[str, Sequence[CoreReports]](KEEP_USED)
        return self

    def forked(self) -> None:
        """Forget the parent's runs, in a child."""
        self._open.clear()
        for core in self._cores.all():
            core.reports.forget()

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
        written = None if forecast is None else self._written(forecast)
        with self._home.lock:
            known = self._open[run] = OpenRun(run, state.standing.arrived_s, more, graph=written)
            told = self._told_first(state) if self._cores.several else (self._cores.home.reports,)
            for reports in told:
                if written is not None and reports.graphs.get(written.name) is not written:
                    self._tell_graph(reports, written)
                known.cores.append(reports)
            self._report("run_started", run, {"age_s": 0.0, **more})
        return state

    def _told_first(self, run: RunState) -> Sequence[CoreReports]:
        """Return the cores of pools that are told of a run before its first call."""
        if self.guard.elsewhere or self.guard.flow.follows:
            return [core.reports for core in self._cores.all()]
        return self._used.get(run.workflow) or ()

    def joins(self, run: str | None, core: ToldCore) -> None:
        """Tell a core of a run that comes to its pool, from where it is; under the links' lock."""
        known = None if run is None else self._open.get(run)
        if known is None or core.reports in known.cores:
            return
        if known.graph is not None:
            self._tell_graph(core.reports, known.graph)
        known.cores.append(core.reports)
        for signal in known.signals(self._clock()):
            with contextlib.suppress(LinkBroken):
                core.link.send(signal)

    def _written(self, forecast: Forecast) -> Graph:
        """Return a graph as cores are told of it, made once; another one of its name may have been since."""
        known = self._graphs.get(forecast.graph)
        if known is not None and known[0] is forecast:
            return known[1]
        graph = flat_graph(forecast.graph, forecast.structure, forecast.homes)
        if known is not None and known[1] == graph:
            graph = known[1]
        elif known is None:
            while len(self._graphs) >= KEEP_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
        self._graphs[forecast.graph] = forecast, graph
        return graph

    def _tell_graph(self, reports: CoreReports, graph: Graph) -> None:
        if reports.graphs.get(graph.name) != graph:
            while len(reports.graphs) >= KEEP_GRAPHS:
                del reports.graphs[next(iter(reports.graphs))]
            with contextlib.suppress(LinkBroken):  # too large to be told: its runs are learned from all the same
                reports.link.send(graph)
        reports.graphs[graph.name] = graph

    def run_ended(self, run: str, outcome: Outcome) -> None:  # noqa: D102
        state = self._book.run(run)
        super().run_ended(run, outcome)
        with self._home.lock:
            if (known := self._open.get(run)) is not None:
                ended = outcome if state is None else state.ends(outcome)
                self._report("run_ended", run, {"outcome": str(ended)})
                del self._open[run]
                if state is not None and (self.guard.elsewhere or any(known.entered.values())):
                    self._remember(state, known, ended)
                if state is not None and self._cores.several:
                    self._used.set(state.workflow, tuple(known.cores))
        if state is not None:
            over = [key for key in state.workflows if not self._book.is_running(key)]
            for core in self._cores.by_pool.values():
                core.prompts.over(over)

    def _remember(self, run: RunState, known: OpenRun, outcome: Outcome) -> None:
        """Keep what a run on a thread entered, until the cores have surely heard of it."""
        if run.name == run.id:
            return
        more = {"thread": run.name, "graph": run.trace.graph, "entered": known.entered, "outcome": str(outcome)}
        signals = [Signal("entered", run.id, {**more, "tenant": tenant_of(each) or None}) for each in run.workflows]
        ended = EndedRun(self._clock(), known.graph, signals)
        for reports in known.cores:
            if not reports.remember(ended):
                self.guard.flow.everywhere = frozenset({ANY_LABEL})

    def ahead(self, run: str) -> Ahead | None:  # noqa: D102
        known = self._open.get(run)
        told = [core for core in self._cores.all() if known is not None and core.reports in known.cores]
        for core in told[::-1] or [self._cores.home]:  # the pool that it came to last knows most of where it is
            try:
                said = core.requests.ask("ahead", {"run": run})
            except BackendUnavailable:
                continue
            return None if said is None else Ahead(said["stages"], said["backends"], said["remaining_s"])
        return super().ahead(run)  # what was learned here has to do

    def thread_deleted(self, thread_id: str, tenant: str | None = None) -> None:  # noqa: D102
        super().thread_deleted(thread_id, tenant)
        for core in self._cores.all():
            with contextlib.suppress(LinkBroken):
                core.link.send(Signal("thread_deleted", "", {"thread_id": thread_id, "tenant": tenant}))

    # Nodes and tools

    def node_entered(  # noqa: D102
        self, run: RunState, stage: str, namespace: str = "", step: int | None = None,
        labels: frozenset[str] = NONE,
    ) -> None:  # fmt: skip
        super().node_entered(run, stage, namespace, step, labels)
        more: Flat = {"stage": stage, "namespace": namespace, "step": step}
        if self.guard.flow.follows and (own := labels | self.guard.flow.said(run.trace.structure, stage).labels):
            more["labels"] = sorted(own)
        with self._home.lock:
            if (known := self._open.get(run.id)) is not None:
                known.nodes[stage, namespace, step] += 1
                known.entered[stage] = more.get("labels") or known.entered.get(stage, [])
            self._report("node_entered", run.id, more)

    def node_left(self, run: RunState, stage: str, namespace: str = "") -> None:  # noqa: D102
        super().node_left(run, stage, namespace)
        with self._home.lock:
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
        core = self._cores.of(split.backend)
        kept = core.prompts.extend(split)
        if kept is None:
            return False
        graph, stage = split.stage
        more = {
            "call": split.call, "backend": split.backend, "graph": graph, "stage": stage,
            "messages": [list(message) for message in kept], "results": split.results,
            "running": [list(tool) for tool in split.running], "partly": split.partly, "at_once": split.at_once,
        }  # fmt: skip
        with contextlib.suppress(LinkBroken):
            core.link.send(Signal("prompt_split", run.id, more))
        return True

    def why_never_warmed(self) -> Mapping[str, str | None]:  # noqa: D102
        why_not = "the core that serves it prefills nothing there"
        return {
            name: None if self._cores.of(name).prompts.keeps(name) else why_not for name in super().why_never_warmed()
        }

    # Telling

    def _report(self, what: str, run: str, more: Mapping[str, Any]) -> None:
        """Tell the cores of a run, of the pools that it uses, what happened in it."""
        known = self._open.get(run)
        if known is not None:
            signal = Signal(what, run, dict(more))
            for reports in known.cores:
                with contextlib.suppress(LinkBroken):  # a name that cannot be said: the graph must run all the same
                    reports.link.send(signal)

    def again(self, reports: CoreReports, now: float) -> Iterator[Message]:
        """Yield all that one core must know of the runs that are open; under the link's lock."""
        assert not is_collecting()
        return reports.again(list(self._open.values()), now)
