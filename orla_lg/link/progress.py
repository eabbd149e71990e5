"""What graphs report of their progress, told to the core too, and kept while it lasts for the core after it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from orla_lg.core.background import is_collecting
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


@dataclass(eq=False, slots=True)
class OpenRun:
    """A run as the core was told of it."""

    began_s: float
    more: Flat
    nodes: Counter[tuple[str, str, int | None]] = field(default_factory=Counter)
    """Nodes under way: stage, namespace and step."""


class LinkedProgress(GraphProgress):
    """Where a replica hears of its graphs."""

    def joined(self, link: Link, requests: CoreRequests, prompts: KeptPrompts) -> LinkedProgress:
        """Tell a core by *link* of what happens; *prompts* go with the workflows that no run is open on any more."""
        self._link, self._requests, self._prompts = link, requests, prompts
        self._open: dict[str, OpenRun] = {}
        self._graphs: dict[str, Graph] = {}
        return self

    def forked(self) -> None:
        """Forget the parent's runs, in a child."""
        self._open.clear()

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
            if forecast is not None and forecast.graph not in self._graphs:
                self._keep(flat_graph(forecast.graph, forecast.structure, forecast.homes))
            self._open[run] = OpenRun(state.standing.arrived_s, more)
            self._report("run_started", run, {"age_s": 0.0, **more})
        return state

    def _keep(self, graph: Graph) -> None:
        while len(self._graphs) >= KEEP_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        self._graphs[graph.name] = graph
        with contextlib.suppress(LinkBroken):  # a graph too large to be told: its runs are learned from all the same
            self._link.send(graph)

    def run_ended(self, run: str, outcome: Outcome) -> None:  # noqa: D102
        state = self._book.run(run)
        super().run_ended(run, outcome)
        with self._link.lock:
            if self._open.pop(run, None) is not None:
                ended = outcome if state is None else state.ends(outcome)
                self._report("run_ended", run, {"outcome": str(ended)})
        if state is not None:
            self._prompts.over([key for key in state.workflows if not self._book.is_running(key)])

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

    def node_entered(self, run: RunState, stage: str, namespace: str = "", step: int | None = None) -> None:  # noqa: D102
        super().node_entered(run, stage, namespace, step)
        with self._link.lock:
            if (known := self._open.get(run.id)) is not None:
                known.nodes[stage, namespace, step] += 1
            self._report("node_entered", run.id, {"stage": stage, "namespace": namespace, "step": step})

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
        yield from self._graphs.values()
        for run, known in self._open.items():
            yield Signal("run_started", run, {"age_s": now - known.began_s, **known.more})
            for (stage, namespace, step), times in known.nodes.items():
                more = {"stage": stage, "namespace": namespace, "step": step}
                yield from [Signal("node_entered", run, more)] * times
