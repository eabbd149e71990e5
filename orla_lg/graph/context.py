"""Step 1, identify: from what LangChain and LangGraph keep in their context to who calls.

Nobody sends ids. A call's origin is looked up where it can be known, surest first: the model run that our
own handler saw start, the config of the running node (``var_child_runnable_config``), nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler, BaseCallbackManager
from langchain_core.runnables.config import var_child_runnable_config

from orla_lg.core.call import NO_HINTS, Hints
from orla_lg.core.identity import NAMESPACE_SEPARATOR, Identity, stage_key, standalone
from orla_lg.core.mapping import StageMapper
from orla_lg.core.serving import Serving
from orla_lg.core.workflow import RunState
from orla_lg.openai_api.client import EngineClients

HintsFunction = Callable[[str, Any], Hints | None]
"""``hints(stage, state)``: what to say of the calls of a node that starts with *state*."""

CONFIG_KEY = "orla"
"""Hints lie under this key in ``configurable`` and in node metadata."""


class RunIndex:
    """Which root run every running chain belongs to, by walking from parent to child as they start."""

    def __init__(self) -> None:
        self._roots: dict[UUID, str] = {}
        self._members: dict[str, set[UUID]] = {}

    def root(self, run_id: UUID | None) -> str | None:
        """Return the root run of a chain."""
        return None if run_id is None else self._roots.get(run_id)

    def add(self, run_id: UUID, root: str) -> None:
        """Note that a chain started."""
        self._roots[run_id] = root
        self._members.setdefault(root, set()).add(run_id)

    def discard(self, run_id: UUID) -> str | None:
        """Note that a chain ended; returns its root run if it was known.

        With a root go all its chains: one that was dropped without an end must not stay for ever.
        """
        root = self._roots.pop(run_id, None)
        if root == str(run_id):
            for member in self._members.pop(root, ()):
                self._roots.pop(member, None)
        elif root is not None and root in self._members:
            self._members[root].discard(run_id)
        return root

    def __len__(self) -> int:
        return len(self._roots)


@dataclass(frozen=True, eq=False)
class Core:
    """What the graph side holds of an ``Orla``."""

    serving: Serving
    clients: Mapping[str, EngineClients]
    disabled: bool = False
    """``ORLA_DISABLED=1``: everything steps aside."""
    runs: RunIndex = field(default_factory=RunIndex)


@dataclass(frozen=True, eq=False)
class Binding:
    """A graph wrapped by an ``Orla``, with what ``wrap`` narrowed for it."""

    core: Core
    mapper: StageMapper | None = None
    hints: HintsFunction | None = None


@dataclass(frozen=True)
class ModelRun:
    """One run of a LangChain model, as its callbacks name it."""

    id: UUID
    parent_id: UUID | None
    metadata: Mapping[str, Any]
    tracers: Sequence[BaseCallbackHandler] = ()
    """Handlers that may keep a trace of this run (LangSmith)."""


@dataclass(frozen=True)
class Origin:
    """Where a call comes from, as far as the context tells."""

    binding: Binding | None
    metadata: Mapping[str, Any]
    parent_id: UUID | None
    configurable: Mapping[str, Any]
    model_run: ModelRun | None


MODEL_RUN: ContextVar[tuple[Binding, ModelRun] | None] = ContextVar("orla_model_run", default=None)
"""Set when a model run starts inside a wrapped graph, taken by the request it makes."""


def origin() -> Origin | None:
    """Return where the call being made comes from; ``None`` outside any runnable."""
    started, config = MODEL_RUN.get(), var_child_runnable_config.get()
    if started is None and config is None:
        return None
    config = config or {}
    manager = config.get("callbacks")
    configurable = config.get("configurable") or {}
    if started is not None:
        binding, run = started
        run = ModelRun(run.id, run.parent_id, run.metadata, _handlers(manager))
        return Origin(binding, run.metadata, run.parent_id, configurable, run)
    parent = manager.parent_run_id if isinstance(manager, BaseCallbackManager) else None
    return Origin(binding_among(_handlers(manager)), config.get("metadata") or {}, parent, configurable, None)


def _handlers(manager: Any) -> Sequence[BaseCallbackHandler]:
    if isinstance(manager, BaseCallbackManager):
        return manager.handlers
    return manager or ()


def binding_among(handlers: Sequence[BaseCallbackHandler]) -> Binding | None:
    """Return the binding of the innermost wrapped graph: its handler joined the inherited ones last."""
    for handler in reversed(handlers):
        binding = getattr(handler, "orla_binding", None)
        if isinstance(binding, Binding):
            return binding
    return None


def identify(origin: Origin | None, core: Core, call_id: str) -> tuple[Identity, RunState | None]:
    """Return who calls, and its run if one of our wrapped graphs is running it."""
    if origin is None:
        return standalone(call_id, identified=core.serving.book.open_runs() == 0), None
    metadata = origin.metadata
    namespace = str(metadata.get("langgraph_checkpoint_ns") or metadata.get("checkpoint_ns") or "")
    root = core.runs.root(origin.parent_id)
    run = None if root is None else core.serving.book.run(root)
    thread = metadata.get("thread_id") or origin.configurable.get("thread_id")
    workflow = run.workflow if run is not None else str(thread) if thread else _lone(namespace, call_id)
    identity = Identity(
        workflow=workflow,
        run=None if run is None else run.id,
        stage=stage_key(namespace),
        step=metadata.get("langgraph_step"),
        namespace=namespace,
        thread=thread is not None,
    )
    return identity, run


def _lone(namespace: str, call_id: str) -> str:
    # A graph that nobody wrapped, without a thread: the best name for what belongs together is the task.
    task = namespace.split(NAMESPACE_SEPARATOR, 1)[0]
    return task or f"call-{call_id}"


def hints_for(origin: Origin | None, identity: Identity, run: RunState | None) -> Hints:
    """Return the hints around a call, strongest first: prioritize, configurable, function, node metadata."""
    hints = NO_HINTS
    if run is not None and run.priority is not None:
        hints = Hints(priority=run.priority)
    if origin is None:
        return hints
    if said := origin.configurable.get(CONFIG_KEY):
        hints = hints.over(Hints.of(said))
    if run is not None and (computed := run.node_hints.get(identity.namespace)):
        hints = hints.over(computed)
    if said := origin.metadata.get(CONFIG_KEY):
        hints = hints.over(Hints.of(said))
    return hints
