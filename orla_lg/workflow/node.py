"""How a stage runs: one node of the graph, whose life is a generator as a call's is (``core.steps``).

An agent loop stays inside its node. Its calls then have the stage's own name in mappings and records, and its turns
need not wait for those of a branch beside it, as separate LangGraph steps would.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from operator import or_
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, convert_to_messages
from langchain_core.runnables import Runnable, RunnableConfig
from langgraph.prebuilt import ToolNode

from orla_lg.core.identity import workflow_key
from orla_lg.core.steps import Steps, adrive, drive
from orla_lg.errors import StageError
from orla_lg.graph.chat_model import ChatOrla
from orla_lg.orla import Orla
from orla_lg.workflow.response import ResponseFormat
from orla_lg.workflow.stage import Stage, StageResult, Upstream

Talks = dict[str, list[BaseMessage] | None]
"""By stage, the talk that it left, or ``None`` if it was skipped. Results are read out of these, so that state holds
nothing but messages, which every checkpointer's serializer knows."""


class Start(TypedDict):
    """What a run of the graph starts with."""

    input: Any
    """Handed to all builders; with a checkpointer, something that its serializer knows."""


class State(Start):
    """The graph's state."""

    results: Annotated[Talks, or_]


@dataclass(frozen=True, slots=True)
class _Build:
    """Call a builder, which may be a coroutine function."""

    what: str
    build: Callable[[Upstream, Any], Any]
    upstream: Upstream
    given: Any

    def run(self) -> Any:
        made = self.build(self.upstream, self.given)
        if inspect.isawaitable(made):
            if inspect.iscoroutine(made):
                made.close()
            raise StageError(f"{self.what} is asynchronous; start the workflow by aexecute or ainvoke")
        return made

    async def arun(self) -> Any:
        made = self.build(self.upstream, self.given)
        return await made if inspect.isawaitable(made) else made


@dataclass(frozen=True, slots=True)
class _Ask:
    """Ask the model, or have tools run."""

    runnable: Runnable[Any, Any]
    question: Any
    config: RunnableConfig

    def run(self) -> Any:
        return self.runnable.invoke(self.question, self.config)

    async def arun(self) -> Any:
        return await self.runnable.ainvoke(self.question, self.config)


class StageNode:
    """A stage as a node: what ``Workflow.compile`` puts into the graph."""

    def __init__(
        self,
        stage: Stage,
        orla: Orla,
        model: ChatOrla,
        *,
        before: Sequence[str],
        formats: Mapping[str, ResponseFormat],
    ) -> None:
        self.stage = stage
        self._orla = orla
        self._before = before
        self._formats = formats
        asked = model.model_copy(update={"temperature": stage.temperature, "max_tokens": stage.max_tokens})
        tools = list(stage.tools)
        self._tools = ToolNode(tools, name=f"{stage.name} tools") if tools else None
        self._free: Runnable[Any, Any] = asked.bind_tools(tools) if tools else asked
        self._formed: Runnable[Any, Any] | None = None
        """Answers in the format. With tools it only speaks once they are done, because most engines that must
        follow a schema call none; the tools stay in the request, so that the prompt begins as it did."""
        if (form := formats.get(stage.name)) is not None:
            # strict: the SDK parses no answer beside tools that are not.
            still = asked.bind_tools(tools, tool_choice="none", strict=True) if tools else asked
            self._formed = still.bind(response_format=form.field())

    def run(self, state: State, config: RunnableConfig) -> dict[str, Talks]:
        """Run the stage in this thread."""
        return {"results": {self.stage.name: drive(self._steps(state, config))}}

    async def arun(self, state: State, config: RunnableConfig) -> dict[str, Talks]:
        """Run the stage in this task."""
        return {"results": {self.stage.name: await adrive(self._steps(state, config))}}

    def upstream(self, state: State) -> Upstream:
        """Return the results that this stage may read, in an order that is the same in every run."""
        return Upstream(self.stage.name, results_of(state["results"], self._formats, self._before), self._before)

    def _steps(self, state: State, config: RunnableConfig) -> Steps:
        stage, upstream = self.stage, self.upstream(state)

        def build(name: str, function: Callable[[Upstream, Any], Any]) -> Steps:
            what = f"the {name} function of stage {stage.name!r}"
            try:
                return (yield _Build(what, function, upstream, state["input"]))
            except Exception as error:  # the user's function: named, and passed on
                error.add_note(f"in {what}")
                raise

        if stage.when is not None and not (yield from build("when", stage.when)):
            return None
        if stage.messages is not None:
            talk = convert_to_messages((yield from build("messages", stage.messages)))
        else:
            assert stage.prompt is not None, "compile() has checked it"
            talk = [HumanMessage(self._text((yield from build("prompt", stage.prompt))))]
        begin = len(talk)
        yield from self._turns(talk, config)
        if (form := self._formats.get(stage.name)) is not None:
            form.read(talk[-1].text)  # fail here, where the stage is named, not in a later one that reads it
        self._flush(talk[begin:])
        return talk

    def _text(self, made: object) -> str:
        if not isinstance(made, str):
            raise StageError(
                f"stage {self.stage.name!r}: its prompt function returned {type(made).__name__}, expected str; "
                f"a list of messages comes from messages="
            )
        return made

    def _turns(self, talk: list[BaseMessage], config: RunnableConfig) -> Generator[_Ask, Any, None]:
        """Lead the talk to its final answer."""
        if self._tools is None:
            talk.append((yield _Ask(self._formed or self._free, list(talk), config)))
            return
        for _ in range(self.stage.max_turns):
            answer: AIMessage = yield _Ask(self._free, list(talk), config)
            if not answer.tool_calls:
                if self._formed is not None:
                    answer = yield _Ask(self._formed, list(talk), config)
                talk.append(answer)
                return
            talk.append(answer)
            talk += self._told((yield _Ask(self._tools, {"messages": list(talk)}, config)))
        raise StageError(
            f"stage {self.stage.name!r} still asks for tools after {self.stage.max_turns} turns; "
            f"raise max_turns, or tell the model when to stop"
        )

    def _told(self, outcome: Any) -> list[BaseMessage]:
        """Return the tools' messages."""
        if not isinstance(outcome, Mapping):
            raise StageError(
                f"stage {self.stage.name!r}: a tool returned a Command; a stage's tools answer its model and cannot "
                f"change the graph's state"
            )
        return list(outcome["messages"])

    def _flush(self, answers: Sequence[BaseMessage]) -> None:
        """Free what the workflow cached where this stage ran, if the stage says so."""
        if self.stage.cache != "flush":
            return
        ran_on = {answer.response_metadata["orla"]["backend"] for answer in answers if _recorded(answer)}
        here = self._orla.current()
        if here is not None:
            workflow = workflow_key(here.workflow, here.tenant)
            self._orla.core.serving.progress.stage_flushed(workflow, here.run, sorted(ran_on))


def _recorded(message: BaseMessage) -> bool:
    return "orla" in message.response_metadata


def results_of(talks: Talks, formats: Mapping[str, ResponseFormat], stages: Sequence[str]) -> dict[str, StageResult]:
    """Read results out of a graph's state; a stage that was skipped has none."""
    results = {}
    for name in stages:
        if talk := talks.get(name):
            form = formats.get(name)
            parsed = None if form is None else form.read(talk[-1].text)
            results[name] = StageResult(name, tuple(talk), parsed)
    return results
