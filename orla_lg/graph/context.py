"""Step 1, identify: from what LangChain and LangGraph keep in their context to the call's identity.

No ids are sent. A call's origin is looked up where it can be known, surest first: the model run that our
own handler saw start, the config of the running chain (``var_child_runnable_config``), nothing. What code in
a node replaced in that config, the running node itself still knows (``running_node``).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, cast
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler, BaseCallbackManager
from langchain_core.runnables.config import var_child_runnable_config

from orla_lg.clients.fitting import Untranslated
from orla_lg.core.boundary.stage_keys import stage_key
from orla_lg.core.call import Hints
from orla_lg.core.identity import NAMESPACE_SEPARATOR, Identity, standalone, workflow_key
from orla_lg.core.limits.limits import LimitScope
from orla_lg.core.lookahead.forecast import Forecast
from orla_lg.core.mapping import Mapper
from orla_lg.core.serving import Serving
from orla_lg.core.workflow import RunState
from orla_lg.graph.running_node import RunningNode, current, namespace_in, node_around
from orla_lg.graph.stage_names import StageNames
from orla_lg.graph.tools.declared import SafeTools
from orla_lg.graph.tools.early.noted import note_in_vain
from orla_lg.graph.tools.early.starts import EarlyStarts
from orla_lg.graph.tools.split.next_prompt import NextPrompts
from orla_lg.openai_api.client import EngineClients

HintsFunction = Callable[[str, Any], Hints | Mapping[str, Any] | None]
"""``hints(stage, state)``: what to say of the calls of a node that starts with *state*, as ``Hints`` or a dict."""

CONFIG_KEY = "orla"
"""Hints lie under this key in ``configurable`` and in node metadata."""


LIMITS_KEY = "limits"
"""And in ``configurable``, beside the hints, the limits of one run."""


@dataclass(eq=False, slots=True)
class Lineage:
    """What the chains of one graph's execution have in common."""

    root: str
    """The run they belong to."""
    said: str | None
    """The thread in their metadata. It is inherited: a graph called inside a node with a thread of its own
    still carries the outer one there."""
    order: int = field(default_factory=itertools.count().__next__)
    """Of two lineages that a chain is in, the one begun later is the inner one."""
    graph: UUID | None = None
    """The chain of a graph inside another that starts namespaces of its own, and so may have its own thread."""


class RunIndex:
    """Which root run every running chain belongs to, by walking from parent to child as they start."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        lineages = self._lineages = dict[UUID | None, Lineage]()
        self.lineage: Callable[[UUID | None], Lineage | None] = lineages.get
        """Return the lineage of a chain."""
        self._members: dict[str, set[UUID]] = {}

    def root(self, run_id: UUID | None) -> str | None:
        """Return the root run of a chain."""
        lineage = self.lineage(run_id)
        return None if lineage is None else lineage.root

    def add(self, run_id: UUID, lineage: Lineage) -> None:
        """Note that a chain started."""
        with self._lock:
            self._lineages[run_id] = lineage
            if (members := self._members.get(lineage.root)) is None:
                self._members[lineage.root] = {run_id}
            else:
                members.add(run_id)

    def branch(self, graph: UUID) -> None:
        """Note that the nodes of *graph*, which runs inside another graph, have namespaces of their own."""
        with self._lock:
            outer = self._lineages.get(graph)
            if outer is not None and outer.graph != graph and outer.root != str(graph):
                self._lineages[graph] = Lineage(outer.root, outer.said, graph=graph)

    def part(self, lineage: Lineage, start: Callable[[str], object]) -> None:
        """Let the graph whose chains have *lineage* be a run of its own, if it can be; *start* opens it."""
        with self._lock:
            if lineage.graph is None or lineage.root == str(lineage.graph):
                return
            start(str(lineage.graph))
            lineage.root = str(lineage.graph)

    def discard(self, run_id: UUID) -> str | None:
        """Note that a chain ended; returns its root run if it was known.

        With a root go all its chains: one that was dropped without an end must not stay for ever.
        """
        with self._lock:
            lineage = self._lineages.pop(run_id, None)
            if lineage is None:
                return None
            if lineage.root == str(run_id):
                for member in self._members.pop(lineage.root, ()):
                    self._lineages.pop(member, None)
            elif members := self._members.get(lineage.root):
                members.discard(run_id)
            return lineage.root

    def __len__(self) -> int:
        return len(self._lineages)


class Once:
    """Something that is warned of once."""

    def __init__(self) -> None:
        self._count = itertools.count()

    def is_first(self) -> bool:
        """Whether this is the first time; one thread's, of several at once."""
        return next(self._count) == 0


@dataclass(frozen=True, eq=False)
class Core:
    """What the graph side holds of an ``Orla``."""

    serving: Serving
    clients: dict[str, EngineClients]
    disabled: bool = False
    """``ORLA_DISABLED=1``: everything steps aside."""
    runs: RunIndex = field(default_factory=RunIndex)
    stage_names: StageNames = field(default_factory=StageNames)
    lost: Once = field(default_factory=Once)
    """Calls without the context of their node."""
    unseen: set[str] = field(default_factory=set)
    """Classes of models of which no request was seen, as far as a warning said so."""
    served_kinds: set[str] = field(default_factory=set)
    """Classes of models of which a request was served."""
    untranslated: set[str] = field(default_factory=set)
    """Fields that kept requests from being translated, as far as a warning said so."""
    untranslatable: Untranslated = "external"
    """What becomes of a request that its backend's engine can be sent neither as it is nor translated."""
    early: EarlyStarts = field(default_factory=EarlyStarts)
    """Tools that run before their turn."""
    unwarmed: Once = field(default_factory=Once)
    """Split prompts where no backend is ever warmed."""
    next_prompts: NextPrompts = field(default_factory=NextPrompts)
    """Prompts of which the beginning is certain while tools run."""

    def __post_init__(self) -> None:
        self.early.hears = partial(note_in_vain, self.serving)


@dataclass(frozen=True, eq=False)
class Binding:
    """A graph wrapped by an ``Orla``, with what ``wrap`` narrowed for it."""

    core: Core
    mapper: Mapper | None = None
    hints: HintsFunction | None = None
    forecast: Forecast | None = None
    """What lies ahead in it, and what its runs usually take."""
    layer: LimitScope | None = None
    """Its limits."""
    tools: SafeTools | None = None
    """Its tools that may start early; ``None``: none was said to be safe, and no answer is watched."""


class ModelRun(NamedTuple):
    """One run of a LangChain model, as its callbacks name it."""

    id: UUID
    parent_id: UUID | None
    metadata: Mapping[str, Any]
    tracers: Sequence[BaseCallbackHandler] = ()
    """Handlers that may keep a trace of this run (LangSmith)."""
    node: RunningNode | None = None
    """The node it started in."""
    messages: Sequence[Any] | None = None
    """What it was asked, as far as that is needed to tell its request from another's."""

    def asks(self, body: Mapping[str, Any]) -> bool:
        """Whether the request with *body* can be this run's own: it may also pass the SDK by, and not be over."""
        named = self.metadata.get("ls_model_name")
        if named is not None and not str(self.metadata.get("ls_provider", "")).startswith("azure"):
            return bool(named == body.get("model"))
        sent = body.get("messages")
        if self.messages is None or not isinstance(sent, list) or len(sent) != len(self.messages):
            return self.messages is None
        return not sent or _text(sent[-1].get("content")) == _text(getattr(self.messages[-1], "content", None))


class Origin(NamedTuple):
    """Where a call comes from, as far as the context tells."""

    binding: Binding | None
    metadata: Mapping[str, Any]
    parent_id: UUID | None
    configurable: Mapping[str, Any]
    model_run: ModelRun | None
    node: RunningNode | None = None
    """The node it is made in."""


class GraphHandler(Protocol):
    """The handler of a wrapped graph, among others that LangChain hands around."""

    orla_binding: Binding
    awaited: Any
    """The model runs whose requests are still to be seen (``passing.AwaitedRequests``)."""

    def entered(self, chain: UUID | None) -> int:
        """Return when the wrapped graph around *chain* began (``Lineage.order``); -1 for none."""
        ...


MODEL_RUN: ContextVar[tuple[GraphHandler, ModelRun] | None] = ContextVar("orla_model_run", default=None)
"""Set when a model run starts inside a wrapped graph, taken by the request it makes."""


def followed(body: Mapping[str, Any]) -> None:
    """Note that a request is served, or recorded: it is that of the model run which started last in its context.

    LangChain starts a text model's async run in a task of its own, whose context the request does not have.
    """
    if (held := MODEL_RUN.get()) is not None:
        MODEL_RUN.set(None)
        held[0].awaited.seen(held[1].id)
    elif (node := current()) is not None and (handler := node.handler) is not None:
        handler.awaited.seen_in(node, body)


def origin(body: Mapping[str, Any] | None = None) -> Origin | None:
    """Return where the call being made comes from, *body* being its request; ``None`` outside any runnable."""
    started, config, here = MODEL_RUN.get(), var_child_runnable_config.get(), current()
    if config is None and here is None:
        return None if started is None else _in_a_bare_thread(*started, body)
    config = config or {}
    manager, metadata = config.get("callbacks"), config.get("metadata") or {}
    parent = manager.parent_run_id if isinstance(manager, BaseCallbackManager) else None
    handlers = _handlers(manager)
    if started is not None and _is_own(started[1], parent, here, body):
        handler, run = started
        run = ModelRun(run.id, run.parent_id, run.metadata, handlers, run.node, run.messages)
        return completed(handler.orla_binding, run.metadata, run.parent_id, config, run, run.node)
    return completed(binding_among(handlers, parent), metadata, parent, config, None, node_around(metadata))


def _is_own(run: ModelRun, parent: UUID | None, here: RunningNode | None, body: Mapping[str, Any] | None) -> bool:
    """Whether a request is that of the model run that started last in its context.

    A run that another chain started is over: its end takes nothing away (see ``GraphEvents.ignore_llm``).
    """
    is_here = parent in (None, run.parent_id) or (here is not None and run.node is here)
    return is_here and (body is None or run.asks(body))


def _in_a_bare_thread(handler: GraphHandler, run: ModelRun, body: Mapping[str, Any] | None) -> Origin | None:
    """Return the origin of a call in a thread without the context, by a model with the node's configuration.

    The thread may live on, so what started there counts only while its node runs.
    """
    node = node_around(run.metadata)
    if node is None or (body is not None and not run.asks(body)):
        return None
    return completed(handler.orla_binding, run.metadata, run.parent_id, {}, run, node)


def completed(
    binding: Binding | None, metadata: Mapping[str, Any], parent: UUID | None, config: Mapping[str, Any],
    run: ModelRun | None, node: RunningNode | None,
) -> Origin:  # fmt: skip
    """Return an origin, with what code in the node replaced in the configuration taken from the node itself."""
    configurable = config.get("configurable") or {}
    if node is not None:
        if binding is None and (handler := node.handler) is not None:
            binding = handler.orla_binding
        if not node.holds(metadata):
            metadata = {**metadata, **node.metadata}
        elif "langgraph_step" not in metadata:
            metadata = {**node.metadata, **metadata}
        if node.said:
            is_inside = node.holds(config.get("metadata") or {})
            configurable = {**node.said, **configurable} if is_inside else {**configurable, **node.said}
    return Origin(binding, metadata, parent, configurable, run, node)


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return str(content)


def _handlers(manager: Any) -> Sequence[BaseCallbackHandler]:
    if isinstance(manager, BaseCallbackManager):
        return manager.handlers
    return manager or ()


def binding_among(handlers: Sequence[BaseCallbackHandler], chain: UUID | None) -> Binding | None:
    """Return the binding of the innermost wrapped graph around *chain*.

    The order of handlers says nothing: LangChain merges those of a graph and of the graph around it as sets.
    """
    ours = [handler for handler in handlers if isinstance(getattr(handler, "orla_binding", None), Binding)]
    innermost = max(cast("list[GraphHandler]", ours), key=lambda handler: handler.entered(chain), default=None)
    return None if innermost is None else innermost.orla_binding


def identify(origin: Origin | None, core: Core, call_id: str) -> tuple[Identity, RunState | None]:
    """Return a call's identity, and its run if one of our wrapped graphs is running it.

    The workflow is that of the tenant that the run's configuration names; what the call itself names comes later
    (``lifecycle.arrive``).
    """
    if origin is None:
        return standalone(call_id, identified=core.serving.book.open_runs() == 0), None
    metadata, namespace = origin.metadata, namespace_in(origin.metadata)
    # The configuration is the running node's own; metadata may be inherited from a graph around it.
    thread = origin.configurable.get("thread_id") or metadata.get("thread_id")
    tenant = tenant_in(origin.configurable.get(CONFIG_KEY))
    run = _run_of(origin, core, None if thread is None else str(thread), tenant)
    if run is not None:
        run.tenant = tenant if run.tenant is None else run.tenant
        workflow = run.key(tenant)
    else:
        workflow = workflow_key(str(thread) if thread else _lone(namespace, call_id), tenant)
    if (node := origin.node) is not None and node.path is not node.namespace and namespace:
        namespace = node.path_of(namespace)
    identity = Identity(
        workflow=workflow,
        run=None if run is None else run.id,
        stage=stage_key(namespace),
        step=metadata.get("langgraph_step"),
        namespace=namespace,
        thread=thread is not None,
        identified=run is not None or bool(namespace or thread) or core.serving.book.open_runs() == 0,
    )
    return identity, run


def tenant_in(said: Any) -> str | None:
    """Return the tenant that hints name, as ``Hints`` or a mapping; what is wrong with them is an error elsewhere."""
    if said is None:
        return None
    tenant = said.get("tenant") if isinstance(said, Mapping) else getattr(said, "tenant", None)
    return tenant if isinstance(tenant, str) else None


def _run_of(origin: Origin, core: Core, thread: str | None, tenant: str | None) -> RunState | None:
    """Return the open run that a call belongs to, parting it from the outer one if it has its own thread."""
    lineage = lineage_around(core, origin.parent_id, origin.node)
    run = None if lineage is None else core.serving.book.run(lineage.root)
    if lineage is None or run is None or thread is None or thread == run.name:
        return run
    outer, owner = run.workflow, run.tenant if tenant is None else tenant
    core.runs.part(
        lineage,
        lambda inner: core.serving.progress.run_started(inner, thread=thread, tenant=owner, parent=outer),
    )
    return core.serving.book.run(lineage.root)


def lineage_around(core: Core, chain: UUID | None, node: RunningNode | None) -> Lineage | None:
    """Return the lineage of a chain; of the innermost node around it where callbacks were replaced on the way."""
    lineage = core.runs.lineage(chain)
    if lineage is None and node is not None:
        for around in node.outward():
            if (handler := around.handler) is not None and handler.orla_binding.core is core:
                return cast("Lineage", around.lineage)
    return lineage


def namespace_of(origin: Origin) -> str:
    """Return the checkpoint namespace of the node that calls; empty outside any graph, wrapped or not."""
    return namespace_in(origin.metadata)


def _lone(namespace: str, call_id: str) -> str:
    # A graph that is not wrapped, without a thread: the best name for what belongs together is the task.
    task = namespace.split(NAMESPACE_SEPARATOR, 1)[0]
    return task or f"call-{call_id}"
