"""The first way in: wrap a graph. The caller's object stays as it is; a copy gets our handler and saver."""

from __future__ import annotations

import difflib
import logging
from typing import Any

from langchain_core.callbacks import BaseCallbackManager
from langchain_core.runnables.config import merge_configs
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import StateGraph
from langgraph.pregel import Pregel

from orla_lg.core.call import Ask
from orla_lg.core.mapping import ExplicitMapper, StageMapper, find, unfit
from orla_lg.errors import MappingError, OrlaError
from orla_lg.graph.context import Binding, Core, HintsFunction
from orla_lg.graph.events import GraphEvents
from orla_lg.graph.interception import install
from orla_lg.graph.saver import OrlaSaver
from orla_lg.graph.structure import AnyPregel, stages_of, title

log = logging.getLogger("orla_lg")

_LOST_BY_COPY = ("_output_mapper", "_state_mapper", "_serde_allowlist")
"""Set after construction by LangGraph, so ``copy`` drops them."""


def wrap(core: Core, signals: Any, graph: Any, *, mapper: StageMapper | None, hints: HintsFunction | None) -> Any:
    """Return a compiled graph of the same type and behaviour whose model calls are served by *core*.

    Raises:
        MappingError: The mapping cannot work, as far as that shows now.
        OrlaError: *graph* is no LangGraph graph.
    """
    compiled = graph.compile() if isinstance(graph, StateGraph) else graph
    if not isinstance(compiled, Pregel):
        raise OrlaError(f"wrap() takes a StateGraph or a compiled LangGraph graph, got {type(graph).__name__}")
    if core.disabled:
        return compiled
    before = _binding_of(compiled, core)
    if before is not None:
        mapper, hints = mapper or before.mapper, hints or before.hints
    validate(core, compiled, mapper)
    install(core)
    return _copy(compiled, core, signals, GraphEvents(Binding(core, mapper, hints)))


def _binding_of(graph: AnyPregel, core: Core) -> Binding | None:
    callbacks = _callbacks(graph)
    for handler in callbacks.handlers if isinstance(callbacks, BaseCallbackManager) else callbacks:
        if isinstance(handler, GraphEvents) and handler.orla_binding.core is core:
            return handler.orla_binding
    return None


def _callbacks(graph: AnyPregel) -> list[Any] | BaseCallbackManager:
    return (graph.config or {}).get("callbacks") or []


def _with_handler(
    callbacks: list[Any] | BaseCallbackManager, handler: GraphEvents
) -> list[Any] | BaseCallbackManager:
    """Return the callbacks with *handler* last, and without the one it follows."""

    def followed(each: Any) -> bool:
        return isinstance(each, GraphEvents) and each.orla_binding.core is handler.orla_binding.core

    if not isinstance(callbacks, BaseCallbackManager):
        return [*(each for each in callbacks if not followed(each)), handler]
    manager = callbacks.copy()  # a manager knows more than its handlers: who inherits them, tags, the parent
    for each in [each for each in manager.handlers if followed(each)]:
        manager.remove_handler(each)
    manager.add_handler(handler, inherit=True)
    return manager


def _copy(graph: AnyPregel, core: Core, signals: Any, handler: GraphEvents) -> AnyPregel:
    config = {**merge_configs(graph.config), "callbacks": _with_handler(_callbacks(graph), handler)}
    update: dict[str, Any] = {"config": config}
    if isinstance(graph.checkpointer, BaseCheckpointSaver):
        update["checkpointer"] = OrlaSaver(signals, inner=graph.checkpointer)
    copied = graph.copy(update)
    for name in _LOST_BY_COPY:
        if hasattr(graph, name):
            setattr(copied, name, getattr(graph, name))
    return copied


def validate(core: Core, graph: AnyPregel, mapper: StageMapper | None) -> None:
    """Check a graph's mapping against its stages, the backends and what they serve; report all faults at once.

    Raises:
        MappingError: With one line for each fault.
    """
    views = core.serving.views()
    stages = stages_of(graph)
    faults: list[str] = []
    if isinstance(mapper, ExplicitMapper):
        faults += mapper.check_stages(stages)
        faults += mapper.check_backends(view.name for view in views)
    faults += _unserved(core, mapper)
    _warn_of_misspelt_stages(core, graph, stages)
    if faults:
        listed = "".join(f"\n  - {fault}" for fault in faults)
        raise MappingError(f"{title(graph)} cannot be served as mapped:{listed}")


def _warn_of_misspelt_stages(core: Core, graph: AnyPregel, stages: list[str]) -> None:
    """Warn of names in the shared mapping that this graph nearly has; they may be another graph's."""
    shared = core.serving.mapper
    for name in shared.table if isinstance(shared, ExplicitMapper) else ():
        if name not in stages and (near := difflib.get_close_matches(name, stages, n=1, cutoff=0.8)):
            log.warning("the shared mapping names stage %r; %s has %r: is it meant?", name, title(graph), near[0])


def _unserved(core: Core, mapper: StageMapper | None) -> list[str]:
    """Return a fault for each backend in use whose own model the engine does not serve."""
    tables = [each.table for each in (mapper, core.serving.mapper) if isinstance(each, ExplicitMapper)]
    used = {name for table in tables for to in table.values() for name in to}
    blank, faults = Ask(model="auto", messages=()), list[str]()
    for name in sorted(used):
        view, desk = find(core.serving.views(), name), core.serving.desks.get(name)
        if view is not None and desk is not None:
            faults += [f"backend {name!r}: {fault}" for fault in unfit(blank, view, desk.backend.model)]
    return faults
