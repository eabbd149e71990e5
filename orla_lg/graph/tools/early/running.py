"""What a tool runs in that starts before its turn: a copied context, as its own node's would be, without a runtime.

LangGraph's runtime (the writer of streams, the store, ``interrupt``, the state of the node) belongs to the node in
its place; what asks for it away from there is refused, and so is a graph, and what the run's own stream would show.
The start fails then, and the tool runs again in its place, where all that is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NoReturn
from uuid import uuid4

from langchain_core.callbacks import BaseCallbackHandler, BaseCallbackManager
from langchain_core.runnables.config import RunnableConfig, var_child_runnable_config
from langgraph.callbacks import GraphCallbackHandler

from orla_lg.clients.sending import SENDING
from orla_lg.core.identity import ID_SEPARATOR, NAMESPACE_SEPARATOR
from orla_lg.core.inflight import HOLDINGS
from orla_lg.graph.context import MODEL_RUN
from orla_lg.graph.running_node import RunningNode, current, hold
from orla_lg.graph.running_tool import TOOL, RunningTool, running
from orla_lg.graph.tools.declared import ToolPlace
from orla_lg.graph.tools.early.starts import EarlyStart
from orla_lg.wires.tap import TAP

RUNTIME_KEYS = "__pregel_"
"""How the keys begin under which LangGraph hands its runtime on in ``configurable``."""

_STREAMING = ("langgraph.pregel.", "langchain_core.tracers.event_stream", "langchain_core.tracers.log_stream")
"""Modules of handlers that write what they hear into the stream that a run's caller reads."""

EARLY: ContextVar[EarlyStart | None] = ContextVar("orla_early_start", default=None)
"""The early start whose body runs in this context."""


class NeedsItsPlace(KeyError):
    """A tool that runs before its turn asked for what is there in its place only."""

    def __str__(self) -> str:
        return f"a tool that runs before its turn has no {self.args[0]}; it runs again in its place"


def refuse(what: str) -> None:
    """Refuse *what* in the context of an early body; elsewhere nothing happens.

    Raises:
        NeedsItsPlace: It is asked for by an early body.
    """
    if (start := EARLY.get()) is not None:
        start.needs_its_place = True  # what the body returns if it goes on without is not handed over
        raise NeedsItsPlace(what)


class _WithoutRuntime(dict[str, Any]):
    """A ``configurable`` without LangGraph's runtime; what asks for a key of it is refused, and gets no default."""

    def __missing__(self, key: str) -> NoReturn:
        _refuse_runtime(key)
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        _refuse_runtime(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        _refuse_runtime(key)
        return super().get(key, default)

    def copy(self) -> _WithoutRuntime:
        return _WithoutRuntime(self)


def _refuse_runtime(key: object) -> None:
    if isinstance(key, str) and key.startswith(RUNTIME_KEYS):
        refuse(key)


class _ShownInItsPlace(BaseCallbackManager):
    """Stands for callbacks that write into the run's stream: what a tool starts inside is shown in its place only.

    LangChain copies the callbacks of a configuration before it starts anything with them.
    """

    def copy(self) -> NoReturn:
        """Refuse that something starts."""
        refuse("stream that shows what happens inside it")
        raise NeedsItsPlace("context: it was lost on the way")


def enter(start: EarlyStart, place: ToolPlace, namespace: str) -> RunnableConfig:
    """Make the context at hand, a copy of the model call's, that of the body of *start*; returns its configuration.

    Args:
        start: What runs.
        place: The tool's node.
        namespace: The checkpoint namespace that an execution of that node could have.
    """
    EARLY.set(start)
    MODEL_RUN.set(None)
    SENDING.set(None)
    TAP.set(None)
    HOLDINGS.set(())
    own: dict[str, Any] = {
        "langgraph_node": place.node,
        "langgraph_checkpoint_ns": namespace,
        "checkpoint_ns": namespace,
    }
    if start.asking.step is not None:
        own["langgraph_step"] = start.asking.step + 1
    config: RunnableConfig = dict(var_child_runnable_config.get() or {})  # type: ignore[assignment]
    config["metadata"] = {**(config.get("metadata") or {}), **own}
    config["configurable"] = _WithoutRuntime(
        {key: value for key, value in (config.get("configurable") or {}).items() if not key.startswith(RUNTIME_KEYS)}
    )
    config["callbacks"] = _callbacks(config.get("callbacks"), own)
    var_child_runnable_config.set(config)
    if (here := current()) is not None:
        node = _node_beside(here, own, namespace)
        hold(node)
        start.node = node
        TOOL.set(RunningTool(uuid4(), node, running()))
    return config


def _node_beside(here: RunningNode, own: Mapping[str, Any], namespace: str) -> RunningNode:
    """Return what stands for the tool's node, seen from the model's node *here*."""
    node = RunningNode(
        here.chain, namespace, {**here.metadata, **own}, here.lineage, here.handler_ref, here.outer, here.said,
        path=namespace,
    )  # fmt: skip
    if here.path != here.namespace:  # with nodes around it on another thread, or with names of graphs in tools
        parts = (here.path.rpartition(NAMESPACE_SEPARATOR)[0], namespace.rpartition(NAMESPACE_SEPARATOR)[2])
        node.path = NAMESPACE_SEPARATOR.join(part for part in parts if part)
    return node


def namespace_of(place: ToolPlace, asking: str) -> str:
    """Return a namespace that an execution of a tool's node could have, seen from a model call's namespace."""
    around = asking.split(NAMESPACE_SEPARATOR)[:-1]
    depth = place.within.count(NAMESPACE_SEPARATOR) + 1 if place.within else 0
    if depth > len(around):
        around = asking.split(NAMESPACE_SEPARATOR)
    return NAMESPACE_SEPARATOR.join((*around[:depth], f"{place.node}{ID_SEPARATOR}{uuid4()}"))


def _callbacks(given: Any, own: Mapping[str, Any]) -> Any:
    """Return the callbacks of a body: the graph's, except where they write into its stream."""
    handlers = given.handlers if isinstance(given, BaseCallbackManager) else given or []
    if any(map(_streams, handlers)):
        return _ShownInItsPlace([each for each in handlers if not _streams(each)])
    if isinstance(given, BaseCallbackManager):
        given = given.copy()
        given.add_metadata(dict(own), inherit=True)
    return given


def _streams(handler: BaseCallbackHandler) -> bool:
    return type(handler).__module__.startswith(_STREAMING) and not isinstance(handler, GraphCallbackHandler)
