"""What happens in a graph, as its callbacks report: runs, nodes, tools, interrupts, and models that start.

One handler per wrapped graph. It observes and never changes anything: its methods are quick, run in the
caller's own thread (``run_inline``), and raise nothing. Nested wrapped graphs hand the same event to
several handlers of one ``Orla``; the first to see it books it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables.config import var_child_runnable_config
from langgraph.callbacks import GraphCallbackHandler, GraphInterruptEvent
from langgraph.errors import GraphBubbleUp

from orla_lg.core.boundary.stage_keys import stage_key
from orla_lg.core.boundary.stage_rules import whole_names
from orla_lg.core.call import Hints
from orla_lg.core.guard.flow import NONE
from orla_lg.core.guard.labels import LABELS, labels_said
from orla_lg.core.identity import NAMESPACE_SEPARATOR
from orla_lg.core.inflight import ABANDONED
from orla_lg.core.record import CallEvent, Happening
from orla_lg.core.workflow import Outcome
from orla_lg.errors import OrlaError
from orla_lg.graph.context import (
    CONFIG_KEY,
    MODEL_RUN,
    Binding,
    HintsFunction,
    Lineage,
    ModelRun,
    RunIndex,
    lineage_around,
    tenant_in,
)
from orla_lg.graph.passing import AwaitedRequests
from orla_lg.graph.running_node import RunningNode, current, enter, leave
from orla_lg.graph.running_tool import TOOL, RunningTool, begin, graph_name, running
from orla_lg.graph.threads import owners

log = logging.getLogger("orla_lg")

STEP_TAG = "graph:step"

MANY_FAULTS = 20
"""So many faults of one hints function are logged."""


class GraphEvents(GraphCallbackHandler):
    """Turns LangGraph's callbacks into runs, nodes and hints."""

    run_inline = True

    ignore_llm: bool = True
    """Receives no tokens and no ends: that would cost 30 µs for each token of a stream. No property: it is asked for
    each token."""

    def __init__(self, binding: Binding) -> None:
        self.orla_binding = binding
        self._core = binding.core
        self._nodes: dict[UUID, tuple[RunningNode, str, bool]] = {}
        """The node, its stage, and whether this handler is the one that reports it."""
        self._tools: dict[UUID, tuple[str, str, float]] = {}
        """Stage, name, and when it started."""
        self._in_context: dict[UUID, RunningTool] = {}
        """Tools that this handler was the first to hear of."""
        self.awaited = AwaitedRequests(self._core, self)
        self._logged: set[str] = set()
        """What the hints function did wrong, as far as that was logged."""
        self._heard = RunIndex()  # all cores know their chains; this is which of them this graph's handler heard of

    # An Orla belongs to its process: a copied configuration shares the handler, a pickled one has an inert one.

    def __copy__(self) -> GraphEvents:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphEvents:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return BaseCallbackHandler, ()

    def entered(self, chain: UUID | None) -> int:
        """Return when this handler's graph around *chain* began; -1 if it is not around it."""
        lineage = self._heard_around(chain)
        return -1 if lineage is None else lineage.order

    def _heard_around(self, chain: UUID | None) -> Lineage | None:
        lineage = self._heard.lineage(chain)
        if lineage is None and (node := current()) is not None:  # code in the node replaced the callbacks
            return next((known for each in node.outward() if (known := self._heard.lineage(each.chain))), None)
        return lineage

    def _hear(self, chain: UUID, parent: UUID | None) -> None:
        heard = self._heard
        heard.add(chain, heard.lineage(parent) or self._heard_around(parent) or Lineage(str(chain), None))

    # Runs and nodes

    def on_chain_start(
        self,
        serialized: dict[str, Any] | None,
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Open a run, or note that a chain inside one starts."""
        self._hear(run_id, parent_run_id)
        known, runs = metadata or {}, self._core.runs
        is_node = kwargs.get("name") == known.get("langgraph_node") and (_is_step(tags) or _is_task(known))
        if is_node and parent_run_id is not None and NAMESPACE_SEPARATOR not in _namespace(known):
            runs.branch(parent_run_id)
        lineage = runs.lineage(run_id)
        if first := lineage is None:
            lineage = self._lineage_of(run_id, parent_run_id, known)
            runs.add(run_id, lineage)
        if is_node:
            graph = "" if TOOL.get() is None else graph_name(parent_run_id)
            self._node_entered(enter(self, run_id, known, lineage, graph), lineage.root, inputs, reports=first)
        elif (node := current()) is not None:
            node.learn(var_child_runnable_config.get())
            if (tool := running()) is not None:
                tool.hear(run_id, str(kwargs.get("name") or ""), known, node)

    def _lineage_of(self, run_id: UUID, parent: UUID | None, metadata: Mapping[str, Any]) -> Lineage:
        """Return the lineage a new chain belongs to, opening a run for a root or for a thread of its own."""
        outer = lineage_around(self._core, parent, current())
        run = None if outer is None else self._core.serving.book.run(outer.root)
        thread = None if metadata.get("thread_id") is None else str(metadata["thread_id"])
        if outer is not None and (run is None or thread in (None, outer.said, run.name)):
            return outer
        root = str(run_id)
        binding, tenant = self.orla_binding, tenant_in(metadata.get(CONFIG_KEY))
        if tenant is None and run is not None:
            tenant = run.tenant
        started = self._core.serving.progress.run_started(
            root, thread=thread, tenant=tenant, parent=None if run is None else run.workflow,
            forecast=binding.forecast,
        )  # fmt: skip
        started.layer = binding.layer
        return Lineage(root, thread)

    def _node_entered(self, node: RunningNode, root: str, inputs: Any, *, reports: bool) -> None:
        namespace, stage, metadata = node.path, stage_key(node.path), node.metadata
        self._nodes[node.chain] = (node, stage, reports)
        run = self._core.serving.book.run(root)
        if run is not None and (hints := self._hints(stage, inputs)) is not None:
            node.told = hints
        if reports:
            if run is not None:
                step = None if _is_task(metadata) else metadata.get("langgraph_step")
                said = metadata.get(CONFIG_KEY)
                labels = labels_said(said) if isinstance(said, Mapping) and LABELS in said else NONE
                self._core.serving.progress.node_entered(run, stage, namespace, step, labels)
            if self._core.serving.records.heard:
                self._tell(Happening.NODE_ENTERED, root, stage)

    def _hints(self, stage: str, state: Any) -> Hints | None:
        """Return what the function says of a stage; for graphs in tools, with what it says of them all as weaker."""
        if self.orla_binding.hints is None:
            return None
        said = [told for key in whole_names(stage) if (told := self._told(self.orla_binding.hints, key, state))]
        return functools.reduce(Hints.over, said) if said else None

    def _told(self, function: HintsFunction, stage: str, state: Any) -> Hints | None:
        try:
            said = function(stage, state)
            return None if said is None else Hints.of(said)
        except OrlaError as error:  # raised here it would reach no caller: callbacks are not to fail
            self._log_wrong_hints(stage, str(error))
        except Exception:  # the user's function; without hints the call still goes through
            log.exception("the hints function failed for stage %r; the stage runs without its hints", stage)
        return None

    def _log_wrong_hints(self, stage: str, fault: str) -> None:
        """Warn of a fault in what the hints function says; once, as it may say the same at every node."""
        if fault not in self._logged and len(self._logged) < MANY_FAULTS:
            self._logged.add(fault)
            log.warning(
                "what the hints function returned for stage %r cannot be used, and it runs without: %s. This is said "
                "once", stage, fault,
            )  # fmt: skip

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Note that a chain ended."""
        self._ended(run_id, Outcome.DONE)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Note that a chain failed, was cancelled, interrupted or abandoned."""
        self._ended(run_id, _outcome(error))

    def _ended(self, run_id: UUID, outcome: Outcome) -> None:
        self._heard.discard(run_id)
        ended = self._nodes.pop(run_id, None)
        root = self._core.runs.discard(run_id)
        if ended is not None:
            leave(ended[0])
            self.awaited.left(ended[0])
        if ended is not None and root is not None:
            node, stage, reports = ended
            namespace = node.path
            run = self._core.serving.book.run(root)
            if run is not None:
                if run.unread and outcome is not Outcome.DONE:
                    run.failed(namespace, ABANDONED)
                if reports:
                    self._core.serving.progress.node_left(run, stage, namespace)
            if self._core.serving.records.heard:
                self._tell(Happening.NODE_LEFT, root, stage, detail=str(outcome))
        if root == str(run_id):
            run = self._core.serving.book.run(root)
            if run is not None and outcome is not Outcome.DONE:
                run.failed("", ABANDONED)
            is_done = outcome is Outcome.DONE and run is not None and not run.interrupted
            self._core.early.run_ended(root, is_done=is_done)
            self._core.next_prompts.run_ended(root)
            self._core.serving.progress.run_ended(root, outcome)
        if owners.UNFINISHED:
            owners.ended(str(run_id))

    def on_interrupt(self, event: GraphInterruptEvent) -> None:
        """Note that a run pauses for a human; its root then ends like any other."""
        root = self._core.runs.root(event.run_id)
        run = None if root is None else self._core.serving.book.run(root)
        if run is not None:
            run.interrupted = True

    # Tools and models

    def on_tool_start(
        self,
        serialized: dict[str, Any] | None,
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note that a tool starts, for listeners too."""
        self._hear(run_id, parent_run_id)
        if (tool := begin(run_id)) is not None:
            self._in_context[run_id] = tool
        lineage = lineage_around(self._core, parent_run_id, current())
        if lineage is None or self._core.runs.lineage(run_id) is not None:
            return
        self._core.runs.add(run_id, lineage)
        name = kwargs.get("name") or (serialized or {}).get("name") or "tool"
        node, namespace = current(), _namespace(metadata or {})
        stage = stage_key(namespace if node is None else node.path_of(namespace))
        self._tools[run_id] = (stage, str(name), self._core.serving.clock())
        self._tell(Happening.TOOL_STARTED, lineage.root, stage, detail=str(name))
        run = self._core.serving.book.run(lineage.root)
        if run is not None:
            self._core.serving.progress.tool_started(run, stage, str(name))
            if len(self._core.next_prompts):
                self._core.next_prompts.tool_started(
                    self._core.serving, lineage.root, run_id, str(name), kwargs.get("tool_call_id"),
                    kwargs.get("inputs"),
                )  # fmt: skip

    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Note that a tool ended, for listeners too."""
        self._tool_ended(run_id, "done", output, **kwargs)

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Note that a tool failed, for listeners too."""
        self._tool_ended(run_id, type(error).__name__, **kwargs)

    def _tool_ended(self, run_id: UUID, how: str, output: Any = None, **kwargs: Any) -> None:
        self._heard.discard(run_id)
        if (tool := self._in_context.pop(run_id, None)) is not None:
            tool.over = True
        root = self._core.runs.discard(run_id)
        stage, name, started_s = self._tools.pop(run_id, ("", "", 0.0))
        run = None if root is None or not stage else self._core.serving.book.run(root)
        if run is not None:
            self._core.serving.progress.tool_ended(run, stage, name, self._core.serving.clock() - started_s)
            if len(self._core.next_prompts):
                self._core.next_prompts.tool_ended(self._core.serving, run_id, output)
        if root is not None:
            self._tell(Happening.TOOL_ENDED, root, stage, detail=str(kwargs.get("name") or how))

    def on_chat_model_start(
        self,
        serialized: dict[str, Any] | None,
        messages: list[list[Any]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note that a chat model starts."""
        self.model_started(serialized, messages, run_id, parent_run_id, metadata, kwargs.get("batch_size", 1))

    def model_started(
        self, serialized: dict[str, Any] | None, messages: list[list[Any]] | None, run_id: UUID, parent: UUID | None,
        metadata: dict[str, Any] | None, one_of: int,
    ) -> None:  # fmt: skip
        """Leave the model run where the request it makes will find it; of several graphs the innermost does."""
        held, known = MODEL_RUN.get(), metadata or {}
        if held is None or held[1].id != run_id or held[0].entered(parent) < self.entered(parent):
            asked = messages[0] if messages and "ls_model_name" not in known else None
            run = ModelRun(run_id, parent, known, node=current(), messages=asked)
            self.awaited.begin(run, serialized, one_of=one_of, is_text=messages is None)
            MODEL_RUN.set((self, run))

    def _tell(self, kind: Happening, root: str, stage: str, *, detail: str = "") -> None:
        serving = self._core.serving
        run = serving.book.run(root)
        if run is not None and serving.records.heard:
            event = CallEvent(kind, serving.clock(), run.name, root, stage, detail=detail, tenant=run.tenant)
            serving.records.tell(event)


def _namespace(metadata: Mapping[str, Any]) -> str:
    return str(metadata.get("langgraph_checkpoint_ns") or "")


def _is_step(tags: list[str] | None) -> bool:
    for tag in tags or ():  # noqa: SIM110  # a generator costs as much as all that it looks at
        if tag.startswith(STEP_TAG):
            return True
    return False


def _is_task(metadata: Mapping[str, Any]) -> bool:
    """Whether a chain is a ``@task``: LangGraph runs it like a node, but marks it as called by one."""
    path: Sequence[Any] = metadata.get("langgraph_path") or ()
    return len(path) > 1 and path[0] == "__pregel_push" and path[-1] is True


def _outcome(error: BaseException) -> Outcome:
    if isinstance(error, GraphBubbleUp):
        return Outcome.INTERRUPTED
    if isinstance(error, asyncio.CancelledError | KeyboardInterrupt):
        return Outcome.CANCELLED
    if isinstance(error, GeneratorExit):
        return Outcome.ABANDONED
    return Outcome.FAILED
