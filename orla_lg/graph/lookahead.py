"""The graph ahead: what LangGraph's own structure says of what may follow what, in the core's terms.

Read once, when a graph is wrapped. What cannot be seen is left open: a branch without declared targets may lead
anywhere, and a graph that is only called inside a node's function shows at run time. Experience fills in both
(``core.forecast``), so an unknown graph works, with wider guesses.
"""

from __future__ import annotations

import logging
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from langgraph.graph import StateGraph
from langgraph.pregel import Pregel
from langgraph.pregel._write import ChannelWrite, ChannelWriteEntry

from orla_lg.core.guard.flow import NO_LABELS, StageLabels
from orla_lg.core.guard.labels import stage_labels
from orla_lg.core.identity import NAMESPACE_SEPARATOR
from orla_lg.core.lookahead.structure import END, START, Edge, GraphStructure
from orla_lg.graph.context import CONFIG_KEY
from orla_lg.graph.structure import UNNAMED, AnyPregel, stages_of, title

log = logging.getLogger("orla_lg")


def look_ahead(graph: AnyPregel) -> GraphStructure:
    """Return what is written of a graph and the graphs inside it; little if it cannot be read, never an error."""
    edges: dict[str, Edge] = {}
    joins: dict[str, frozenset[str]] = {}
    said = labels_in(graph)
    labels = {stage: each.labels for stage, each in said.items() if each.labels}
    declassifies = {stage: each.declassifies for stage, each in said.items() if each.declassifies}
    try:
        _read(graph, "", edges, joins)
    except Exception:  # LangGraph's inside, which may change: a graph must run even if we cannot read it
        log.exception("the structure of %s cannot be read; what follows what is learned from its runs", title(graph))
        return GraphStructure({stage: Edge() for stage in stages_of(graph)}, {}, labels, declassifies)
    return GraphStructure(edges, joins, labels, declassifies)


def labels_in(graph: AnyPregel, prefix: str = "") -> dict[str, StageLabels]:
    """Return what the metadata of a graph's nodes says of their data, by stage; of nodes that say something.

    Raises:
        ConfigError: A node's labels are no list of names.
    """
    found: dict[str, StageLabels] = {}
    for name, node in graph.nodes.items():
        stage = prefix + name
        metadata: Mapping[str, Any] = getattr(node, "metadata", None) or {}
        said = stage_labels(f"stage {stage!r}: metadata['orla']", metadata.get(CONFIG_KEY))
        if said != NO_LABELS:
            found[stage] = said
        for inner in getattr(node, "subgraphs", None) or ():
            if isinstance(inner, Pregel):
                found |= labels_in(inner, f"{stage}{NAMESPACE_SEPARATOR}")
    return found


def name_of(graph: AnyPregel, structure: GraphStructure) -> str:
    """Return the name under which is learned what a graph's runs usually take.

    Graphs without a name are distinguished by their structure, so that they do not learn from each other.
    """
    name = graph.get_name()
    if name != UNNAMED:
        return name
    written = [(stage, sorted(edge.always), sorted(edge.perhaps)) for stage, edge in sorted(structure.edges.items())]
    return f"{name}#{zlib.crc32(repr(written).encode()):08x}"


@dataclass
class _Links:
    """Where the nodes of one graph lead, while it is read."""

    always: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    perhaps: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    open: set[str] = field(default_factory=set)
    joins: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


def _read(graph: AnyPregel, prefix: str, edges: dict[str, Edge], joins: dict[str, frozenset[str]]) -> None:
    nodes = [name for name in graph.nodes if name != START]
    builder = getattr(graph, "builder", None)
    links = _of_builder(builder) if isinstance(builder, StateGraph) else _of_channels(graph)
    known = {*nodes, END}

    def keys(names: Iterable[str]) -> frozenset[str]:
        return frozenset(prefix + name for name in names if name in known)

    for name in (START, *nodes):
        is_open = name in links.open
        perhaps = known if is_open else links.perhaps.get(name, ())
        edges.setdefault(prefix + name, Edge(keys(links.always.get(name, ())), keys(perhaps), is_open))
        if sources := links.joins.get(name):
            joins[prefix + name] = keys(sources)
        if name != START:
            for inner in graph.nodes[name].subgraphs:
                if isinstance(inner, Pregel):
                    _read(inner, f"{prefix}{name}{NAMESPACE_SEPARATOR}", edges, joins)


def _of_builder(builder: StateGraph[Any, Any, Any, Any]) -> _Links:
    links = _Links()
    for source, target in builder.edges:
        links.always[source].add(target)
    for sources, target in builder.waiting_edges:
        links.joins[target].update(sources)
        for source in sources:
            links.always[source].add(target)
    for source, branches in builder.branches.items():
        for branch in branches.values():
            _add_choice(links, source, None if branch.ends is None else branch.ends.values())
    for name, node in builder.nodes.items():
        if node.ends:  # declared for a ``Command``: a tuple of names, or a mapping from names to labels
            _add_choice(links, name, node.ends)
    return links


def _add_choice(links: _Links, source: str, ends: Collection[str] | None) -> None:
    if ends is None:
        links.open.add(source)
    else:
        links.perhaps[source].update(ends)


def _of_channels(graph: AnyPregel) -> _Links:
    """Read a graph without a builder (``@entrypoint``, ``Pregel``): a node leads where its channels are read."""
    links = _Links()
    readers: Mapping[str, Collection[str]] = graph.trigger_to_nodes
    inputs = [graph.input_channels] if isinstance(graph.input_channels, str) else graph.input_channels
    for channel in inputs:
        links.always[START].update(readers.get(channel, ()))
    for name, node in graph.nodes.items():
        written = {target for channel in _written(node.writers) for target in readers.get(channel, ())}
        links.perhaps[name].update(written | {END} if written else ())
    return links


def _written(writers: Iterable[Any]) -> set[str]:
    entries = (entry for writer in writers if isinstance(writer, ChannelWrite) for entry in writer.writes)
    return {entry.channel for entry in entries if isinstance(entry, ChannelWriteEntry)}
