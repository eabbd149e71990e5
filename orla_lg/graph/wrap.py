"""The first way in: wrap a graph. The caller's object stays as it is; a copy gets our handler and saver."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

from langchain_core.runnables import RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase, RunnableEachBase
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import StateGraph
from langgraph.pregel import Pregel

from orla_lg.core.limits.limits import Limits, LimitScope, checked
from orla_lg.core.lookahead.forecast import Forecast
from orla_lg.core.mapping import Mapper
from orla_lg.errors import ConfigError, OrlaError
from orla_lg.graph.context import Binding, Core, HintsFunction
from orla_lg.graph.events import GraphEvents
from orla_lg.graph.execution import attach, handlers_of
from orla_lg.graph.interception import install
from orla_lg.graph.lookahead import look_ahead, name_of
from orla_lg.graph.plan import plan, tree, validate
from orla_lg.graph.saver import OrlaSaver
from orla_lg.graph.stage_tree import StageTree
from orla_lg.graph.structure import AnyPregel, stages_of, title
from orla_lg.graph.tools.declared import NOTHING_DECLARED, DeclaredTools, safe_tools
from orla_lg.graph.tools.early import handover
from orla_lg.mappers.stages import KnownStages, check_stages, doubted

log = logging.getLogger("orla_lg")

_MADE_BY_COPY = frozenset({"nodes", "trigger_to_nodes"})
"""What ``copy`` makes afresh. It drops all else that was set after construction, by LangGraph or by its user."""


def wrap(
    core: Core,
    signals: Any,
    graph: Any,
    *,
    mapper: Mapper | None,
    hints: HintsFunction | None,
    limits: Limits | None,
    tools: DeclaredTools = NOTHING_DECLARED,
) -> Any:
    """Return a compiled graph of the same type and behaviour whose model calls are served by *core*.

    Of a binding (``graph.with_retry()``) it returns the same binding, with the graph in it wrapped.

    Raises:
        MappingError: The mapping cannot work, as far as that shows now.
        ConfigError: The limits name a stage that the graph does not have, *hints* is no function, or what a node's
            metadata says of labels means nothing.
        OrlaError: *graph* is no LangGraph graph.
    """
    if hints is not None and not callable(hints):
        raise ConfigError(f"hints must be a function of (stage, state), got {type(hints).__name__}")
    if is_binding(graph):
        return _rebound(
            graph,
            lambda part: wrap(core, signals, part, mapper=mapper, hints=hints, limits=limits, tools=tools),
        )
    whole = compiled(graph)
    if core.disabled:
        return whole
    before = _binding_of(whole, core)
    if before is not None:
        mapper, hints = mapper or before.mapper, hints or before.hints
    stages = stages_of(whole)
    layer = before.layer if before is not None and limits is None else _layer(limits, whole, stages)
    validate(core, whole, mapper, stages)
    install(core)
    forecast = forecast_of(whole, core, mapper, stages)
    safe = safe_tools(whole, tools) or (None if before is None else before.tools)
    if safe is not None:
        handover.install()
        if safe.splits:
            _warn_if_unwarmed(core)
    return _copy(whole, core, signals, GraphEvents(Binding(core, mapper, hints, forecast, layer, safe)))


def _warn_if_unwarmed(core: Core) -> None:
    """Warn once where prompts are split and no backend is ever warmed."""
    why_never = core.serving.progress.why_never_warmed()
    if why_never and all(why_never.values()) and core.unwarmed.is_first():
        log.warning(
            "split_prompts=True prefills nothing, since no backend is ever warmed: %s",
            "; ".join(f"backend {name!r}: {why}" for name, why in why_never.items()),
        )


def _layer(limits: Limits | None, graph: AnyPregel, stages: KnownStages) -> LimitScope | None:
    """Return the limits of one graph, under accounts of their own."""
    if limits is None:
        return None
    limits = checked(limits)
    if faults := check_stages(limits.stages, stages, said_by="limits.stages"):
        raise ConfigError(f"{title(graph)} cannot be limited so: {'; '.join(faults)}")
    for note in doubted(limits.stages, stages, said_by="limits.stages"):
        log.warning("%s", note)
    return LimitScope(limits, object(), f" of {title(graph)}")


def compiled(graph: Any) -> AnyPregel:
    """Return *graph*, compiled if it was not.

    Raises:
        OrlaError: It is no LangGraph graph.
    """
    made = graph.compile() if isinstance(graph, StateGraph) else graph
    if not isinstance(made, Pregel):
        raise OrlaError(f"expected a StateGraph or a compiled LangGraph graph, got {type(graph).__name__}")
    return made


def is_binding(runnable: Any) -> bool:
    """Whether *runnable* hands its calls on to a compiled graph, at whatever depth."""
    inner = _inner(runnable)
    return inner is not None and (isinstance(inner, Pregel) or is_binding(inner))


def is_graph(thing: Any) -> bool:
    """Whether *thing* can be wrapped."""
    return isinstance(thing, Pregel | StateGraph) or is_binding(thing)


def graph_in(graph: Any) -> AnyPregel:
    """Return *graph*, compiled if it was not; of a binding, the graph in it.

    Raises:
        OrlaError: It is no LangGraph graph, and no binding of one.
    """
    return graph_in(_inner(graph)) if is_binding(graph) else compiled(graph)


def _inner(runnable: Any) -> Any:
    if isinstance(runnable, RunnableBindingBase | RunnableEachBase):
        return runnable.bound
    return runnable.runnable if isinstance(runnable, RunnableWithFallbacks) else None


def _rebound(binding: Any, wrapped: Callable[[Any], Any]) -> Any:
    """Return a copy of *binding* around *wrapped* of what it binds, and of those of its fallbacks that are graphs."""
    if not isinstance(binding, RunnableWithFallbacks):
        return binding.model_copy(update={"bound": wrapped(binding.bound)})
    fallbacks = [
        wrapped(each) if isinstance(each, Pregel) or is_binding(each) else each for each in binding.fallbacks
    ]
    return binding.model_copy(update={"runnable": wrapped(binding.runnable), "fallbacks": fallbacks})


def forecast_of(graph: AnyPregel, core: Core, mapper: Mapper | None, stages: KnownStages | None = None) -> Forecast:
    """Return what lies ahead in a graph that is mapped by *mapper*, or the shared one."""
    structure, known = look_ahead(graph), stages or stages_of(graph)
    core.serving.guard.heed(structure)
    homes = {planned.stage: planned.backends[0] for planned in plan(core, known, mapper) if planned.backends}
    return core.serving.lookahead.forecast(name_of(graph, structure), structure, homes)


def tree_of(graph: AnyPregel, core: Core | None, mapper: Mapper | None = None) -> StageTree:
    """Return the stages of *graph* as a tree, decided by *mapper*, else as it was wrapped by *core*."""
    binding = None if core is None else _binding_of(graph, core)
    if binding is None:
        return tree(core, graph, mapper, None)
    return tree(core, graph, mapper or binding.mapper, binding.layer, binding.tools)


def core_of(graph: AnyPregel) -> Core | None:
    """Return what serves a wrapped graph; ``None`` for one that is not wrapped."""
    return next(
        (each.orla_binding.core for each in reversed(handlers_of(graph)) if isinstance(each, GraphEvents)), None
    )


def mapper_of(graph: AnyPregel, core: Core) -> Mapper | None:
    """Return the mapper that *graph* was wrapped with; ``None`` if it has none of its own."""
    binding = _binding_of(graph, core)
    return None if binding is None else binding.mapper


def _binding_of(graph: AnyPregel, core: Core) -> Binding | None:
    own = (each for each in handlers_of(graph) if isinstance(each, GraphEvents) and each.orla_binding.core is core)
    return next((handler.orla_binding for handler in own), None)


def _copy(graph: AnyPregel, core: Core, signals: Any, handler: GraphEvents) -> AnyPregel:
    update: dict[str, Any] = {}
    if isinstance(graph.checkpointer, BaseCheckpointSaver):
        update["checkpointer"] = OrlaSaver(signals, inner=graph.checkpointer)
    copied = graph.copy(update)
    for name, value in vars(graph).items():
        if name not in update and name not in _MADE_BY_COPY:
            setattr(copied, name, _of_copy(value, graph, copied) if hasattr(type(graph), name) else value)
    others = (each for each in handlers_of(graph) if not _follows(handler, each))
    attach(copied, [*others, handler])
    return copied


def _of_copy(value: Any, graph: AnyPregel, copied: AnyPregel) -> Any:
    """Return what a user put in a method's place on *graph*, for its copy; a closure over *graph* stays as it is."""
    if isinstance(value, MethodType) and value.__self__ is graph:
        return MethodType(value.__func__, copied)
    if callable(value):
        log.warning(
            "%s has a method of its own, %s, which may still call the graph that is not wrapped; wrap first "
            "and replace its methods then", title(graph), getattr(value, "__qualname__", type(value).__name__),
        )  # fmt: skip
    return value


def _follows(handler: GraphEvents, other: object) -> bool:
    return isinstance(other, GraphEvents) and other.orla_binding.core is handler.orla_binding.core
