"""``Workflow``: stages and what each needs, as a LangGraph graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from langchain_core.runnables import RunnableConfig, RunnableLambda
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.store.base import BaseStore
from langgraph.types import All, Checkpointer

from orla_lg.arguments import answer_wrong_arguments
from orla_lg.core.call import Hints
from orla_lg.core.engine.backend import Backend
from orla_lg.core.identity import ANY_STAGE, NAMESPACE_SEPARATOR
from orla_lg.core.mapping import AUTO
from orla_lg.errors import WorkflowError
from orla_lg.graph.chat_model import ChatOrla
from orla_lg.orla import Orla
from orla_lg.workflow.node import StageNode, Start, State, results_of
from orla_lg.workflow.order import before, faults_of
from orla_lg.workflow.response import ResponseFormat
from orla_lg.workflow.stage import Stage, StageResult

WorkflowGraph = CompiledStateGraph[State, None, Start, State]


class Workflow:
    """Stages and their dependencies, served by an ``Orla`` and executed by LangGraph (Orla, appendix A).

    Args:
        orla: Serves the model calls.
        name: The graph's name: in traces, and for what is learned of its stages.
    """

    def __init__(self, orla: Orla, name: str = "workflow") -> None:
        if not isinstance(orla, Orla):
            raise WorkflowError(f"Workflow({orla!r}, …): the first argument is the Orla that serves it")
        self.name = name
        self._orla = orla
        self._stages: list[Stage] = []
        self._needs: dict[str, list[str]] = {}
        self._graph: WorkflowGraph | None = None

    def add_stage(self, *stages: Stage) -> Self:
        """Add stages."""
        self._stages += stages
        self._graph = None
        return self

    def add_dependency(self, stage: Stage | str, *needs: Stage | str) -> Self:
        """Let *stage* start when all of *needs* are done; a stage without needs starts at once."""
        needed = self._needs.setdefault(_name(stage), [])
        needed += [name for need in needs if (name := _name(need)) not in needed]
        self._graph = None
        return self

    def compile(
        self,
        *,
        checkpointer: Checkpointer = None,
        store: BaseStore | None = None,
        interrupt_before: All | list[str] | None = None,
        interrupt_after: All | list[str] | None = None,
    ) -> WorkflowGraph:
        """Return the workflow as a LangGraph graph, wrapped by the ``Orla``.

        It takes ``{"input": …}``; ``results`` reads what it returns. The arguments are those of
        ``StateGraph.compile``. What is added to the workflow later does not change the graph.

        Raises:
            WorkflowError: The workflow cannot run; all faults that show now, at once.
            MappingError: A stage's backend does not exist, or cannot serve it.
            OrlaClosed: The ``Orla`` is closed.
        """
        self._check()
        nodes = self._nodes()
        graph = self._builder(nodes).compile(
            name=self.name,
            checkpointer=checkpointer,
            store=store,
            interrupt_before=interrupt_before,
            interrupt_after=interrupt_after,
        )

        def hints(stage: str, state: Any) -> Hints | None:
            node = nodes.get(stage.rpartition(NAMESPACE_SEPARATOR)[2])
            return None if node is None else node.stage.hints_for(node.upstream(state), state["input"])

        return self._orla.wrap(graph, mapper=self._mapping() or None, hints=hints)

    def execute(self, given: Any, config: RunnableConfig | None = None) -> dict[str, StageResult]:
        """Run all stages and return their results by name; a stage that was skipped has none.

        Args:
            given: Handed to all builders.
            config: As for any graph; a ``thread_id`` keeps the KV cache from run to run.

        Raises:
            WorkflowError, MappingError: As ``compile``.
            StageError: A stage's builder or answer is not what it should be.
        """
        return self.results(self._compiled().invoke({"input": given}, config))

    async def aexecute(self, given: Any, config: RunnableConfig | None = None) -> dict[str, StageResult]:
        """``execute`` for a running loop."""
        return self.results(await self._compiled().ainvoke({"input": given}, config))

    def results(self, state: Mapping[str, Any]) -> dict[str, StageResult]:
        """Read the results out of a state of the compiled graph: what it returned, or ``get_state(…).values``."""
        names = [stage.name for stage in self._stages]
        return results_of(state.get("results") or {}, self._formats(), names)

    def _compiled(self) -> WorkflowGraph:
        if self._graph is None:
            self._graph = self.compile()
        return self._graph

    def _nodes(self) -> dict[str, StageNode]:
        formats, nodes = self._formats(), dict[str, StageNode]()
        named = {_name(stage.backend or AUTO) for stage in self._stages}
        models = {name: ChatOrla(orla=self._orla, model=name) for name in named}  # costly: each has SDK clients
        for stage in self._stages:
            behind = before(stage.name, self._needs)
            in_order = [each.name for each in self._stages if each.name in behind]
            try:
                nodes[stage.name] = StageNode(
                    stage, self._orla, models[_name(stage.backend or AUTO)], before=in_order, formats=formats
                )
            except Exception as error:  # LangChain's, of a tool or a schema
                error.add_note(f"in stage {stage.name!r} of workflow {self.name!r}")
                raise
        return nodes

    def _formats(self) -> dict[str, ResponseFormat]:
        forms = {stage.name: stage.response_format for stage in self._stages}
        return {name: ResponseFormat(name, form) for name, form in forms.items() if form is not None}

    def _mapping(self) -> dict[str, str]:
        """Return where stages say that they run; the others are the shared mapping's."""
        return {s.name: _name(s.backend) for s in self._stages if s.backend is not None}

    def _builder(self, nodes: Mapping[str, StageNode]) -> StateGraph[State, None, Start, State]:
        builder = StateGraph(State, input_schema=Start)
        for name, node in nodes.items():
            builder.add_node(name, RunnableLambda(node.run, node.arun, name=name))
        for name in nodes:
            needed = self._needs.get(name)
            # An edge from a list waits for all of it, so that a join starts once.
            builder.add_edge(needed if needed and len(needed) > 1 else needed[0] if needed else START, name)
        last = set(nodes) - {name for needed in self._needs.values() for name in needed}
        for name in sorted(last):
            builder.add_edge(name, END)
        return builder

    def _check(self) -> None:
        names = [stage.name for stage in self._stages]
        faults = faults_of(names, self._needs)
        known = {
            scheduler.backend.name: scheduler.backend for scheduler in self._orla.core.serving.schedulers.values()
        }
        for stage in self._stages:
            found = [*stage.faults(), *_name_faults(stage.name)]
            if (form := self._formats().get(stage.name)) is not None and (fault := form.fault()):
                found.append(fault)
            if isinstance(stage.backend, Backend) and known.get(stage.backend.name, stage.backend) != stage.backend:
                found.append(f"backend {stage.backend.name!r} at {stage.backend.url} is not the Orla's of that name")
            faults += [f"stage {stage.name!r}: {fault}" for fault in found]
        if faults:
            listed = "".join(f"\n  - {fault}" for fault in faults)
            raise WorkflowError(f"workflow {self.name!r} cannot run:{listed}")


def _name(named: Stage | Backend | str) -> str:
    return named if isinstance(named, str) else named.name


def _name_faults(name: str) -> list[str]:
    """Return why a name cannot be a stage's; what LangGraph keeps for itself it says itself."""
    if not isinstance(name, str) or not name:
        return ["a stage's name must be text that is not empty"]
    if name == ANY_STAGE:
        return [f"{ANY_STAGE!r} means any stage in mappings"]
    try:
        StateGraph(State).add_node(name, lambda state: state)
    except ValueError as error:
        return [str(error)]
    return []


answer_wrong_arguments(Workflow, methods=True)
