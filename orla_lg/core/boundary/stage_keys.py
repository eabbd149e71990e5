"""The keys of stages: nodes' names from the outermost inwards, and names of graphs that run inside tools.

What a node asks of embedding models is a stage beside its own, ``retrieve:embeddings``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from orla_lg.core.identity import ANY_STAGE, ID_SEPARATOR, NAMESPACE_SEPARATOR

GRAPH_ID = "@"
"""In a namespace, the id of a part that names a graph which runs inside a tool; LangGraph's own parts have others."""


EMBEDDINGS = ":embeddings"
"""Behind a node's key, this is the stage of its embeddings."""


class StageKey(str):
    """The key of a stage in a graph that runs inside a tool: some of its parts name graphs, not nodes.

    It is a text like any other where it is shown (``tools|researcher|model``); tables by stage find it without these
    names too (``tools|model``).
    """

    __slots__ = ("graphs",)

    graphs: tuple[int, ...]
    """Which of its parts name graphs, counted from 0, in order."""

    def __new__(cls, key: str, graphs: tuple[int, ...]) -> StageKey:
        """Return the key *key* whose parts *graphs* name graphs."""
        made = super().__new__(cls, key)
        made.graphs = graphs
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.graphs


def key_of(parts: list[str], graphs: tuple[int, ...] = ()) -> str:
    """Return the key made of *parts*, of which those numbered in *graphs* name graphs in tools."""
    key = NAMESPACE_SEPARATOR.join(parts)
    return StageKey(key, graphs) if graphs else key


def inner_key(around: str, name: str, *, is_graph: bool = False) -> str:
    """Return the key of what is called *name* inside the place *around*: a node, or a graph in a tool."""
    parts = [*around.split(NAMESPACE_SEPARATOR), name] if around else [name]
    return key_of(parts, (*graphs_in(around), len(parts) - 1) if is_graph else graphs_in(around))


def graphs_in(key: str) -> tuple[int, ...]:
    """Return which parts of a stage's key name graphs in tools, counted from 0."""
    return key.graphs if type(key) is StageKey else ()


def plain_key(key: str) -> str:
    """Return a stage's key without the names of graphs in tools: what all such graphs of a node have in common."""
    graphs = graphs_in(key)
    if not graphs:
        return key
    return NAMESPACE_SEPARATOR.join(part for n, part in enumerate(key.split(NAMESPACE_SEPARATOR)) if n not in graphs)


def parted(key: str) -> tuple[str, str]:
    """Return the key of the node that a stage's key, or a name of it, is of, and what stands behind that."""
    node = key.partition(ID_SEPARATOR)[0]
    return with_part(node, "", graphs_in(key)), key[len(node) :]


def with_part(node: str, part: str, graphs: tuple[int, ...] | None = None) -> str:
    """Return the key of what a node asks of other models than chat models."""
    graphs = graphs_in(node) if graphs is None else graphs
    return StageKey(node + part, graphs) if graphs else node + part


def graph_part(name: str) -> str:
    """Return the name of a graph in a tool as a part of a key: without what has a meaning there."""
    part = name.replace(NAMESPACE_SEPARATOR, "_").replace(ID_SEPARATOR, "_").strip()
    return f"_{part}" if part.isdigit() or part == ANY_STAGE else part


@lru_cache(maxsize=1024)
def stage_key(checkpoint_namespace: str) -> str:
    """Return a checkpoint namespace without what differs from run to run.

    Task ids go (``sub:1f…|node:2a…`` → ``sub|node``), and so do the counters that LangGraph puts between
    a node and a graph called more than once inside it (``node|1|agent`` → ``node|agent``).
    """
    parts, graphs = list[str](), tuple[int, ...]()
    for part in checkpoint_namespace.split(NAMESPACE_SEPARATOR):
        name, _, task = part.partition(ID_SEPARATOR)
        if name and not name.isdigit():
            if task == GRAPH_ID:
                graphs = (*graphs, len(parts))
            parts.append(name)
    return key_of(parts, graphs)
