"""The running node, held in the context it runs in: what identity hangs on.

Code in a node may hand any callbacks, metadata and configurable of its own to a chain; LangChain then replaces the
node's. What it cannot replace is a context variable: the node sets it when it starts, and every chain, task, thread
and subgraph that copies the context carries it. Two further ways lead back to the node. LangChain's
``register_configure_hook`` adds the handler of the running node wherever callbacks are configured: what starts
inside such a chain is still heard. And a chain in a thread without the context that was handed the node's metadata
names the node by its checkpoint namespace, which holds task ids and so is its alone.

A tool that runs is held in the same way (``running_tool``), so that a graph inside one is known by its name.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.tracers.context import register_configure_hook

from orla_lg.core.boundary.stage_keys import GRAPH_ID
from orla_lg.core.call import NO_HINTS, Hints
from orla_lg.core.identity import ID_SEPARATOR, NAMESPACE_SEPARATOR

SAID = ("orla", "thread_id")
"""Of a node's ``configurable``, what is kept for chains that replace it."""


class NodeHandler(Protocol):
    """The handler of a wrapped graph, as far as its running nodes need it."""

    def entered(self, chain: UUID | None) -> int:
        """Return when the wrapped graph around *chain* began; -1 for none."""
        ...


@dataclass(eq=False, slots=True)
class RunningNode:
    """One execution of a node, as one handler hears of it. It is inert once over, wherever its context lingers."""

    chain: UUID
    namespace: str
    metadata: Mapping[str, Any]
    lineage: Any
    """The lineage of its chain, in the core of its handler; ``None`` where that is not certain."""
    handler_ref: weakref.ref[Any]
    """Weak: a context may outlive the graph, and must not keep its ``Orla``."""
    outer: RunningNode | None
    """The node around it, or another handler's view of the same node."""
    said: Mapping[str, Any] = field(default_factory=dict)
    """What its own ``configurable`` says that calls need: known as soon as a chain starts inside it."""
    over: bool = False
    path: str = ""
    """Its namespace, with the nodes around it on whatever thread, and the names of graphs in tools."""
    told: Hints = NO_HINTS
    """What the ``hints`` function of its handler's graph says of it."""
    gathered: tuple[weakref.ref[Any], Hints, Hints] | None = None
    """What the function says of it, and what else is said of it and around it, once a core asked (``hints``)."""

    def learn(self, config: Mapping[str, Any] | None) -> None:
        """Take in the configuration that a chain inside it starts from: the node's own, before the chain's is set."""
        if not self.said and config is not None and (found := config.get("configurable")):
            self.said = {key: found[key] for key in SAID if key in found}

    def holds(self, metadata: Mapping[str, Any]) -> bool:
        """Whether *metadata* is of a chain in this node, rather than of one around it, or of none."""
        namespace = namespace_in(metadata)
        return namespace == self.namespace or namespace.startswith(self.namespace + NAMESPACE_SEPARATOR)

    def path_of(self, namespace: str) -> str:
        """Return the path of a chain in it or right around it, whose namespace is *namespace*."""
        if namespace.startswith(self.namespace):
            return self.path + namespace[len(self.namespace) :]
        return self.path if self.namespace.startswith(namespace) else namespace

    @property
    def handler(self) -> Any:
        """The handler, while its graph exists."""
        return self.handler_ref()

    def outward(self) -> Iterator[RunningNode]:
        """Yield the node and what is around it, innermost first."""
        node: RunningNode | None = self
        while node is not None:
            yield node
            node = node.outer


_NODE: ContextVar[RunningNode | None] = ContextVar("orla_running_node", default=None)

_lock = threading.Lock()
_running: dict[str, list[RunningNode]] = {}
"""Nodes that run, by checkpoint namespace; several where two handlers hear, or one checkpoint is replayed twice."""


def enter(
    handler: NodeHandler, chain: UUID, metadata: Mapping[str, Any], lineage: Any, graph: str = ""
) -> RunningNode:
    """Note in this context that a node starts; *graph* is the name of its graph, if that runs inside a tool."""
    namespace = namespace_in(metadata)
    node = RunningNode(chain, namespace, metadata, lineage, weakref.ref(handler), current(), path=namespace)
    around = node.outer
    if around is not None and namespace and around.namespace:
        if around.chain == chain:
            node.path = around.path
        elif graph or around.path != around.namespace or not _within(namespace, around.namespace):
            inside = namespace[len(around.namespace) :] if _within(namespace, around.namespace) else namespace
            named = f"{graph}{ID_SEPARATOR}{GRAPH_ID}" if graph else ""
            parts = (around.path, named, inside.removeprefix(NAMESPACE_SEPARATOR))
            node.path = NAMESPACE_SEPARATOR.join(part for part in parts if part)
    if around is not None and around.chain == chain and _order(around, chain) > handler.entered(chain):
        node.outer, around.outer = around.outer, node  # the other handler's graph is the inner one
    else:
        _NODE.set(node)
    with _lock:
        _running.setdefault(node.namespace, []).append(node)
    return node


def hold(node: RunningNode) -> None:
    """Let *node* be the running one in this context."""
    _NODE.set(node)


def leave(node: RunningNode) -> None:
    """Note that a node ended. Its context may not be the one at hand, so the node itself says that it is over."""
    node.over = True
    with _lock:
        here = _running.get(node.namespace, [])
        if node in here:
            here.remove(node)
        if not here:
            _running.pop(node.namespace, None)


def current() -> RunningNode | None:
    """Return the innermost running node of this context."""
    node = _NODE.get()
    while node is not None and node.over:
        node = node.outer
    return node


def node_around(metadata: Mapping[str, Any]) -> RunningNode | None:
    """Return the node that a call is made in, whose chain has *metadata*.

    A configuration passed by hand that names another node than the context's is explicit. A task that goes on after
    its node has the node in its context, and still names it.
    """
    node, namespace = current(), namespace_in(metadata)
    if not namespace or (node is not None and _are_nested(namespace, node.namespace)):
        return node
    latest = _NODE.get()
    if node is None and latest is not None and _within(namespace, latest.namespace):
        return latest
    return _at(namespace) or node


def _at(namespace: str) -> RunningNode | None:
    """Return the running node of a namespace, or the nearest around it."""
    while namespace:
        if nodes := list(_running.get(namespace, ())):
            inner = max(nodes, key=lambda node: _order(node, node.chain))
            if any(node.chain != inner.chain for node in nodes):  # a checkpoint is replayed twice at once
                return replace(inner, lineage=None)
            return inner
        namespace = namespace.rpartition(NAMESPACE_SEPARATOR)[0]
    return None


def _within(namespace: str, outer: str) -> bool:
    return namespace == outer or namespace.startswith(outer + NAMESPACE_SEPARATOR)


def _are_nested(namespace: str, other: str) -> bool:
    # LangGraph runs the later steps of a node's sequence with the configuration around it: a shorter namespace.
    return _within(namespace, other) or _within(other, namespace)


def _order(node: RunningNode, chain: UUID) -> int:
    handler: NodeHandler | None = node.handler
    return -1 if handler is None else handler.entered(chain)


def namespace_in(metadata: Mapping[str, Any]) -> str:
    """Return the checkpoint namespace that *metadata* names; empty outside any graph."""
    return str(metadata.get("langgraph_checkpoint_ns") or metadata.get("checkpoint_ns") or "")


class _HandlerOfTheNode:
    """What LangChain asks for a handler when it configures callbacks: a context variable that knows of ends.

    A real variable would still hold the handler in a context that an inlined node leaves behind.
    """

    def get(self) -> BaseCallbackHandler | None:
        node = _NODE.get()
        while node is not None and node.over:
            node = node.outer
        return None if node is None else node.handler_ref()


register_configure_hook(cast("ContextVar[Any]", _HandlerOfTheNode()), inheritable=True)
