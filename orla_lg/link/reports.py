"""What one core was told of the runs of a replica, kept while it lasts for the core after it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from orla_lg.link.connection import Link
from orla_lg.link.messages import Flat, Graph, Message, Signal

TOLD_S = 30.0
"""What was sent so long ago on a connection that stands has come."""

KEEP_ENDED = 10_000
"""Runs that entered stages with labels, and ended while there was no core."""


@dataclass(eq=False, slots=True)
class OpenRun:
    """A run as cores were told of it."""

    id: str
    began_s: float
    more: Flat
    nodes: Counter[tuple[str, str, int | None]] = field(default_factory=Counter)
    """Nodes under way: stage, namespace and step."""
    entered: dict[str, list[str]] = field(default_factory=dict)
    """Stages that it entered so far, with the labels of their data as far as they are known here."""
    graph: Graph | None = None
    cores: list[CoreReports] = field(default_factory=list)
    """Of the cores that were told of it, in that order: those of the pools that it used."""

    def signals(self, now: float) -> Iterator[Signal]:
        """Yield what tells a core of the run from where it is."""
        yield Signal("run_started", self.id, {"age_s": now - self.began_s, "entered": self.entered, **self.more})
        for (stage, namespace, step), times in self.nodes.items():
            node = {"stage": stage, "namespace": namespace, "step": step}
            yield from [Signal("node_entered", self.id, node)] * times


class EndedRun(NamedTuple):
    """A run that ended lately: the core may not have heard what it entered."""

    ended_s: float
    graph: Graph | None
    signals: Sequence[Signal]


class CoreReports:
    """What one core was told. All of it under the link's lock.

    Args:
        link: To the core.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self.graphs: dict[str, Graph] = {}
        """By name, as it was told last."""
        self._ended: deque[EndedRun] = deque()

    def forget(self) -> None:
        """Forget the parent's runs, in a forked child."""
        self._ended.clear()

    def remember(self, ended: EndedRun) -> bool:
        """Keep what a run entered until the core has surely heard of it; returns whether all of that is kept."""
        kept = self._ended
        while kept and self.link.up and kept[0].ended_s < ended.ended_s - TOLD_S:
            kept.popleft()
        is_full = len(kept) >= KEEP_ENDED
        if is_full:
            kept.popleft()
        kept.append(ended)
        return not is_full

    def again(self, runs: Sequence[OpenRun], now: float) -> Iterator[Message]:
        """Yield all that a core must know of the runs that are open and that it is told of."""
        latest = dict(self.graphs)
        yield from latest.values()
        for ended in self._ended:
            yield from _graph_again(ended.graph, latest)
            yield from ended.signals
        for run in runs:
            if self in run.cores:
                yield from _graph_again(run.graph, latest)
                yield from run.signals(now)
        self.graphs = latest


def _graph_again(graph: Graph | None, latest: dict[str, Graph]) -> Iterator[Message]:
    """Yield the graph of a run where another one of its name was told since."""
    if graph is not None and latest.get(graph.name) != graph:
        latest[graph.name] = graph
        yield graph
