"""Whatever calls, tools and answers come: early starts change no result, and run a tool once more for a call at most.

The models are fakes whose answers the watch hears as an engine's (``Hearing``), so that calls may also be heard that
the answer then does not have, and answers may break off.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain.agents import create_agent
from langchain.agents.middleware import ToolRetryMiddleware
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import BaseTool, StructuredTool, ToolException
from langgraph._internal._runnable import RunnableCallable
from langgraph.func import entrypoint
from langgraph.graph import START, StateGraph
from langgraph.types import RetryPolicy

from orla_lg import Backend, Orla
from orla_lg.graph.tools.early.running import EARLY
from tests.langgraph_suite.orla_suite_early import Hearing
from tests.tools.planned_engine import MODEL, PlannedEngine

PATIENCE_S = 20.0

# What is drawn

Key = tuple[str, int]
"""A tool, and what it is called with."""


@dataclass(frozen=True)
class Kind:
    """How a tool is made and what it does."""

    is_declared: bool
    is_async: bool
    fails: frozenset[int]
    """The arguments it always raises at."""
    hard: bool
    """What it raises ends the run, and is no message for the model."""


@dataclass(frozen=True)
class Turn:
    """One answer of a model."""

    calls: Sequence[Key]
    heard: Sequence[Key]
    """What the engine says first; calls that differ are changed in the end, or gone."""
    breaks: Sequence[int]
    """Attempts that break off, each after so many calls."""
    raises: bool
    """The model's first request fails once its calls are heard, and its node is tried again."""
    waits: bool
    """The engine decodes on until all tools ended."""


NAMES = ("one", "two", "three")
KEYS = st.tuples(st.sampled_from(NAMES), st.integers(0, 1))
KINDS = st.builds(
    Kind,
    is_declared=st.booleans(),
    is_async=st.booleans(),
    fails=st.frozensets(st.integers(0, 1), max_size=1),
    hard=st.sampled_from([False] * 3 + [True]),
)


@st.composite
def turns(draw: Any) -> Turn:
    calls = draw(st.lists(KEYS, max_size=4))
    heard = list(calls)
    if draw(st.booleans()):  # some are changed, some are further ones
        heard = [draw(KEYS) if draw(st.booleans()) else each for each in heard] + draw(st.lists(KEYS, max_size=1))
    breaks = draw(st.lists(st.integers(0, len(heard)), max_size=1))
    return Turn(calls, heard, breaks, draw(st.integers(0, 3)) == 0, draw(st.booleans()))


@dataclass(frozen=True)
class Case:
    tools: dict[str, Kind]
    script: Sequence[Turn]
    graph: str
    is_async: bool
    retries: bool
    """A failing tool of an agent is tried again."""


CASES = st.builds(
    Case,
    st.fixed_dictionaries(dict.fromkeys(NAMES, KINDS)),
    st.lists(turns(), min_size=1, max_size=3),
    st.sampled_from(("agent", "serial", "branches", "functional")),
    st.booleans(),
    st.booleans(),
)


# What runs


@dataclass
class Runs:
    """Executions of tools' bodies, in their place and early."""

    in_place: Counter[Key] = field(default_factory=Counter)
    early: Counter[Key] = field(default_factory=Counter)
    heard: Counter[Key] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, key: Key) -> None:
        with self.lock:
            (self.in_place if EARLY.get() is None else self.early)[key] += 1


def tool_of(name: str, kind: Kind, runs: Runs) -> BaseTool:
    def work(at: int) -> str:
        """Work."""
        runs.add((name, at))
        if at in kind.fails:
            raise ValueError(f"{name} {at}") if kind.hard else ToolException(f"{name} cannot {at}")
        return f"{name} did {at}"

    async def awork(at: int) -> str:
        """Work."""
        await asyncio.sleep(0)
        return work(at)

    return StructuredTool.from_function(
        work, coroutine=awork if kind.is_async else None, name=name, handle_tool_error=True
    )


class BrokenOff(Exception):
    """A request that failed."""


class Scripted(BaseChatModel):
    """Answers by a script; where there is a *core*, its watch hears each answer."""

    script: Any
    runs: Any
    core: Any = None
    raised: Any
    """The turns whose first request failed."""
    beside: bool = False
    """Another branch has the same script."""
    asks_again: bool = False
    """A request that failed is made again at once; else the node begins again, with its first request."""

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self

    def _turn(self, messages: Sequence[Any]) -> tuple[int, Turn | None]:
        nth = sum(isinstance(message, AIMessage) for message in messages)
        return nth, self.script[nth] if nth < len(self.script) else None

    def _begin(self, nth: int, turn: Turn) -> Hearing | None:
        """Let the answer be heard as far as its last call, attempt after attempt."""
        if self.core is None:
            return None
        hearing = Hearing(self.core)
        # What broke off and is heard again, in the next attempt or when the node is tried again, is the same call.
        # A branch beside it may have taken the start for an equal call of its own meanwhile.
        if nth not in self.raised or (nth > 0 and not self.asks_again) or self.beside:
            self.runs.heard.update(turn.heard)
        for heard in (*(turn.heard[:calls] for calls in turn.breaks), turn.heard):
            hearing.calls([(name, {"at": at}) for name, at in heard])
            if heard is not turn.heard:
                hearing.breaks()
        return hearing

    def _end(self, nth: int, turn: Turn | None, hearing: Hearing | None) -> ChatResult:
        if turn is not None and turn.raises and nth not in self.raised:
            self.raised.add(nth)
            if hearing is not None:
                hearing.fails()
            raise BrokenOff
        calls = [
            {"name": name, "args": {"at": at}, "id": f"call-{nth}-{number}", "type": "tool_call"}
            for number, (name, at) in enumerate(() if turn is None else turn.calls)
        ]
        message = AIMessage(content=f"answer {nth}", tool_calls=calls)
        if hearing is not None:
            hearing.ends(message)
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _generate(self, messages: Any, *args: Any, **kwargs: Any) -> ChatResult:
        nth, turn = self._turn(messages)
        hearing = None if turn is None else self._begin(nth, turn)
        until_s = time.monotonic() + PATIENCE_S
        while hearing is not None and turn is not None and turn.waits and not hearing.is_idle:
            assert time.monotonic() < until_s
            time.sleep(0.0002)
        return self._end(nth, turn, hearing)

    async def _agenerate(self, messages: Any, *args: Any, **kwargs: Any) -> ChatResult:
        nth, turn = self._turn(messages)
        hearing = None if turn is None else self._begin(nth, turn)
        until_s = time.monotonic() + PATIENCE_S
        while hearing is not None and turn is not None and turn.waits and not hearing.is_idle:
            assert time.monotonic() < until_s
            await asyncio.sleep(0.0002)
        return self._end(nth, turn, hearing)


AGAIN = RetryPolicy(max_attempts=2, initial_interval=0.0, jitter=False, retry_on=BrokenOff)


class Asked(TypedDict, total=False):
    question: str
    left: list[Any]
    right: list[Any]


def loops(model: Any, tools: dict[str, BaseTool], rounds: int) -> tuple[Any, Any]:
    """Return a function, and one for a loop, that asks a model and runs its tools one by one, until it calls none."""

    def loop(question: Any) -> list[Any]:
        messages: list[Any] = [HumanMessage("go")]
        for _ in range(rounds + 1):
            messages.append(model.invoke(messages))
            messages += [tools[call["name"]].invoke(call) for call in messages[-1].tool_calls]
        return messages

    async def aloop(question: Any) -> list[Any]:
        messages: list[Any] = [HumanMessage("go")]
        for _ in range(rounds + 1):
            messages.append(await model.ainvoke(messages))
            messages += [await tools[call["name"]].ainvoke(call) for call in messages[-1].tool_calls]
        return messages

    return loop, aloop


def graph_of(case: Case, model: Callable[[], Scripted], tools: dict[str, BaseTool]) -> Any:
    if case.graph == "agent":
        retry = ToolRetryMiddleware(max_retries=1, initial_delay=0.0, jitter=False, on_failure="continue")
        return create_agent(
            _Again(inner=model()), list(tools.values()), middleware=[retry] if case.retries else []
        )  # fmt: skip
    loop, aloop = loops(model(), tools, len(case.script))
    if case.graph == "functional":
        if case.is_async:

            @entrypoint()
            async def aworkflow(question: Any) -> Any:
                return {"left": await aloop(question)}

            return aworkflow

        @entrypoint()
        def workflow(question: Any) -> Any:
            return {"left": loop(question)}

        return workflow
    builder = StateGraph(Asked)
    for side in ("left", "right") if case.graph == "branches" else ("left",):
        loop, aloop = loops(model(), tools, len(case.script))
        node = RunnableCallable(_under(side, loop), _aunder(side, aloop))
        builder.add_node(side, node, retry_policy=AGAIN).add_edge(START, side)
    return builder.compile()


def _under(side: str, loop: Any) -> Any:
    return lambda state: {side: loop(state)}


def _aunder(side: str, aloop: Any) -> Any:
    async def run(state: Any) -> Any:
        return {side: await aloop(state)}

    return run


class _Again(BaseChatModel):
    """Asks once more where the inner model breaks off, as an SDK does."""

    inner: Any

    @property
    def _llm_type(self) -> str:
        return "again"

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self

    def _generate(self, messages: Any, *args: Any, **kwargs: Any) -> ChatResult:
        try:
            return self.inner._generate(messages)  # type: ignore[no-any-return]
        except BrokenOff:
            return self.inner._generate(messages)  # type: ignore[no-any-return]

    async def _agenerate(self, messages: Any, *args: Any, **kwargs: Any) -> ChatResult:
        try:
            return await self.inner._agenerate(messages)  # type: ignore[no-any-return]
        except BrokenOff:
            return await self.inner._agenerate(messages)  # type: ignore[no-any-return]


def outcome(case: Case, orla: Orla | None) -> tuple[Any, Runs]:
    """Run a case, wrapped or bare; returns how it ended, and what ran."""
    runs = Runs()
    tools = {name: tool_of(name, kind, runs) for name, kind in case.tools.items()}

    def model() -> Scripted:
        made = Scripted(script=case.script, runs=runs, raised=set())
        made.core, made.asks_again = None if orla is None else orla.core, case.graph == "agent"
        made.beside = case.graph == "branches"
        return made

    graph = graph_of(case, model, tools)
    if orla is not None:
        safe = [name for name, kind in case.tools.items() if kind.is_declared]
        graph = orla.wrap(graph, tools_safe=safe, split_prompts=True)
    question = {"messages": [("user", "go")]} if case.graph == "agent" else {"question": "go"}
    try:
        state = asyncio.run(graph.ainvoke(question)) if case.is_async else graph.invoke(question)
    except (ValueError, BrokenOff) as error:
        return (type(error).__name__, str(error)), runs
    return {name: list(map(_shown, told)) for name, told in state.items() if isinstance(told, list)}, runs


def _shown(message: Any) -> tuple[Any, ...]:
    return message.type, message.content, getattr(message, "tool_call_id", None), getattr(message, "status", None)


@pytest.fixture(scope="module")
def orla() -> Iterator[Orla]:
    with PlannedEngine([]) as engine, Orla([Backend("main", engine.url, model=MODEL)], {"*": "main"}) as made:
        yield made


@settings(max_examples=50, deadline=None)
@given(case=CASES)
def test_results_are_equal_and_no_tool_runs_more_than_once_more_for_a_call(orla: Orla, case: Case) -> None:
    before = orla.statistics().early_tools
    bare, bare_runs = outcome(case, None)
    wrapped, runs = outcome(case, orla)
    now = orla.statistics().early_tools

    assert wrapped == bare
    declared = {name for name, kind in case.tools.items() if kind.is_declared}
    ends_well = isinstance(bare, dict)
    used, fails = now.used - before.used, {(name, at) for name, kind in case.tools.items() for at in kind.fails}
    for key in bare_runs.in_place.keys() | runs.in_place.keys() | runs.early.keys():
        assert runs.early[key] <= (runs.heard[key] if key[0] in declared else 0)
        if ends_well:  # else it is chance how far parallel tools came
            assert runs.in_place[key] <= bare_runs.in_place[key]
            must = key[0] not in declared or key in fails  # what raised runs again in its place
            assert not must or runs.in_place[key] == bare_runs.in_place[key]
    assert not bare_runs.early
    assert used <= sum(runs.early[key] for key in runs.early if key not in fails), "each result is used once at most"
    if ends_well:  # each call got its result once: from its early start, or in its place
        assert used + runs.in_place.total() == bare_runs.in_place.total()
    assert now.waiting == 0
    orla.core.early.check_integrity()


def test_tools_were_handed_over(orla: Orla) -> None:
    """The property above is no empty one."""
    told = orla.statistics().early_tools
    assert told.used and told.failed and told.dropped["changed"]
