"""Early starts where nodes are retried, time out or run side by side, and where answers break off."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import wrap_tool_call
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.errors import NodeTimeoutError
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import RetryPolicy, Send

from orla_lg import Backend
from tests.tools.conftest import PATIENCE_S, Lab, shown
from tests.tools.planned_engine import MODEL, Answer, PlannedEngine

HELLO: dict[str, Any] = {"messages": [HumanMessage("Hello")]}
AGAIN = RetryPolicy(initial_interval=0.0, jitter=False, max_attempts=3, retry_on=ValueError)
ONE, TWO = ("look", {"x": 1}), ("look", {"x": 2})


@pytest.fixture
def early(served: Callable[..., Any]) -> Callable[..., Any]:
    """Return what wraps a graph at an engine whose answers are known to be the same when they are streamed."""
    return functools.partial(served, backend={"assemble": True})


def looking(lab: Lab, name: str = "look") -> Any:
    @tool(name)
    def look(x: int) -> str:
        """Look at x."""
        lab.ran(name)
        return f"seen {x}"

    return look


def loop(lab: Lab, *tools: Any, model: dict[str, Any] | None = None, acting: dict[str, Any] | None = None,
         before: Callable[[], None] = lambda: None) -> Any:  # fmt: skip
    """Return a graph of a model's node and a tool node; *model* and *acting* are how the nodes are added."""
    bound = lab.model().bind_tools(list(tools))

    def think(state: MessagesState) -> Any:
        answer = bound.invoke(state["messages"])
        before()
        return {"messages": [answer]}

    graph = StateGraph(MessagesState).add_node("model", think, **(model or {}))
    graph.add_node("tools", ToolNode(list(tools), handle_tool_errors=False), **(acting or {}))
    graph.add_edge(START, "model").add_conditional_edges("model", tools_condition).add_edge("tools", "model")
    return graph.compile()


def settled(lab: Lab) -> None:
    """Assert that no start is left, and each was used or dropped."""
    assert lab.orla is not None
    lab.orla.core.early.check_integrity()
    until_s = time.monotonic() + PATIENCE_S
    while (now := lab.early).in_threads and time.monotonic() < until_s:
        time.sleep(0.002)
    assert (now.waiting, now.in_threads) == (0, 0)
    assert now.started == now.used + now.failed + sum(now.dropped.values())


# Nodes that are tried again


def test_a_model_node_that_fails_after_its_answer_is_tried_again(lab: Lab, early: Callable[..., Any]) -> None:
    failures = iter([True, True])

    def fail() -> None:
        if next(failures, False):
            raise ValueError("not yet")

    lab.plan, lab.awaits = [Answer((ONE, TWO))], 2
    graph = early(loop(lab, looking(lab), model={"retry_policy": AGAIN}, before=fail), tools_safe={"look"})
    state = graph.invoke(HELLO)
    assert [message.content for message in state["messages"][2:]] == ["seen 1", "seen 2", "done"]
    assert lab.early.used == 2 and lab.runs["look"] <= lab.early.started <= 6, "once for each answer's call at most"
    settled(lab)


def test_a_tool_that_fails_is_tried_again_in_its_place(lab: Lab, early: Callable[..., Any]) -> None:
    @tool
    def look(x: int) -> str:
        """Look at x."""
        lab.ran("look")
        if lab.runs["look"] < 3:
            raise ValueError("not yet")
        return f"seen {x}"

    lab.plan, lab.awaits = [Answer((ONE,))], 1
    graph = early(loop(lab, look, acting={"retry_policy": AGAIN}), tools_safe={"look"})
    assert graph.invoke(HELLO)["messages"][2].content == "seen 1"
    assert lab.runs["look"] == 3, "early, in its place, and in its node's second attempt"
    assert (lab.early.started, lab.early.used, lab.early.failed) == (1, 0, 1)
    settled(lab)


def test_a_result_is_handed_over_once_though_its_node_is_tried_again(lab: Lab, early: Callable[..., Any]) -> None:
    @tool
    def flaky(x: int) -> str:
        """Fail once."""
        lab.ran("flaky")
        if lab.runs["flaky"] < 2:
            raise ValueError("not yet")
        return f"got {x}"

    calls = (ONE, ("flaky", {"x": 2}))
    lab.plan, lab.awaits = [Answer(calls)], 1
    graph = early(loop(lab, looking(lab), flaky, acting={"retry_policy": AGAIN}), tools_safe={"look"})
    assert [message.content for message in graph.invoke(HELLO)["messages"][2:4]] == ["seen 1", "got 2"]
    assert (lab.early.started, lab.early.used) == (1, 1)
    assert lab.runs["look"] == 2, "as without: once for each attempt of its node"
    settled(lab)


# Time-outs of nodes


def test_a_tools_node_times_out_while_it_waits_for_an_early_start(lab: Lab, early: Callable[..., Any]) -> None:
    ended: list[str] = []

    @tool
    async def look(x: int) -> str:
        """Look for long."""
        lab.ran("look")
        try:
            await asyncio.sleep(30.0)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return "late"

    lab.plan, lab.awaits = [Answer((ONE,))], 1

    async def ask() -> None:
        bound = lab.model().bind_tools([look])

        async def think(state: MessagesState) -> Any:
            return {"messages": [await bound.ainvoke(state["messages"])]}

        graph = StateGraph(MessagesState).add_node("model", think)
        graph.add_node("tools", ToolNode([look]), timeout=0.2).add_edge(START, "model")
        graph.add_conditional_edges("model", tools_condition).add_edge("tools", "model")
        wrapped = early(graph.compile(), tools_safe={"look"})
        with pytest.raises(NodeTimeoutError):
            await wrapped.ainvoke(HELLO)
        until_s = time.monotonic() + PATIENCE_S
        while len(asyncio.all_tasks()) > 1 and time.monotonic() < until_s:
            await asyncio.sleep(0.002)
        assert len(asyncio.all_tasks()) == 1, "but this one"

    asyncio.run(ask())
    assert ended == ["cancelled"] * lab.runs["look"] and 1 <= lab.runs["look"] <= 2
    assert (lab.early.started, lab.early.used) == (1, 0)
    settled(lab)


def test_a_models_node_that_times_out_is_tried_again_and_its_tool_goes_on(
    lab: Lab, early: Callable[..., Any]
) -> None:
    stalls = threading.Event()
    first = iter([True])

    def wait() -> None:
        lab.wait_for_starts(1)
        if next(first, False):
            stalls.wait(PATIENCE_S)

    lab.plan = [Answer((ONE, TWO), after={0: wait})]

    async def ask() -> Any:
        look = looking(lab)
        bound = lab.model().bind_tools([look])

        async def think(state: MessagesState) -> Any:
            return {"messages": [await bound.ainvoke(state["messages"])]}

        again = RetryPolicy(initial_interval=0.0, jitter=False, max_attempts=20, retry_on=NodeTimeoutError)
        graph = StateGraph(MessagesState).add_node("model", think, timeout=1.0, retry_policy=again)
        graph.add_node("tools", ToolNode([look])).add_edge(START, "model")
        graph.add_conditional_edges("model", tools_condition).add_edge("tools", "model")
        return await early(graph.compile(), tools_safe={"look"}).ainvoke(HELLO)

    try:
        state = asyncio.run(ask())
    finally:
        stalls.set()
    assert [message.content for message in state["messages"][2:]] == ["seen 1", "seen 2", "done"]
    assert lab.runs["look"] <= 3 and lab.early.used >= 1
    settled(lab)


# Answers that break off


def at_two_engines(lab: Lab, make_orla: Callable[..., Any], broken: Answer) -> Any:
    """Return an engine whose first answer breaks off; an ``Orla`` goes from it to the lab's."""
    first = iter([broken])

    def answer(body: Any) -> Answer:
        return next(first, None) or lab._answer(body)

    other = PlannedEngine(answer)
    backends = Backend("other", other.url, model=MODEL, assemble=True), lab.backend(assemble=True)
    lab.orla = make_orla(*backends, mapper={"*": ["other", "main"]})
    return other


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("calls", "runs", "dropped"),
    [((ONE, TWO), 2, {}), ((TWO,), 2, {"changed": 1})],
    ids=["the same calls", "other calls"],
)
def test_an_answer_that_breaks_off_comes_from_elsewhere(
    lab: Lab, make_orla: Callable[..., Any], is_async: bool, calls: Any, runs: int, dropped: dict[str, int]
) -> None:
    """A plain ``invoke`` has seen nothing of the broken answer; what that started goes on for the one that counts."""
    lab.plan, lab.awaits = [Answer(calls)], 2
    broken = Answer((ONE, TWO), after={0: lambda: lab.wait_for_starts(1)}, breaks_after=0)
    with at_two_engines(lab, make_orla, broken):
        assert lab.orla is not None
        graph = lab.orla.wrap(create_agent(lab.model(), [looking(lab)]), tools_safe={"look"})
        state = asyncio.run(graph.ainvoke(HELLO)) if is_async else graph.invoke(HELLO)
        seen = [message.content for message in state["messages"][2:]]
        assert seen == [*(f"seen {arguments['x']}" for _, arguments in calls), "done"]
        record = lab.orla.records()[0]
        assert (record.backend, record.attempts) == ("main", 2)
        settled(lab)
        assert (lab.runs["look"], lab.early.used, dict(lab.early.dropped)) == (runs, len(calls), dropped)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_stream_that_breaks_off_is_its_readers_and_leaves_no_tool(
    lab: Lab, make_orla: Callable[..., Any], is_async: bool
) -> None:
    """A reader has seen the first token, so that nothing is tried again, here or elsewhere."""
    broken = Answer((ONE, TWO), text="I look", after={0: lambda: lab.wait_for_starts(1)}, breaks_after=0)
    with at_two_engines(lab, make_orla, broken):
        assert lab.orla is not None
        model = lab.model(streaming=True)
        graph = lab.orla.wrap(create_agent(model, [looking(lab)]), tools_safe={"look"})
        with pytest.raises(Exception, match=r"incomplete|closed|Connection|peer"):
            asyncio.run(graph.ainvoke(HELLO)) if is_async else graph.invoke(HELLO)
        assert len(lab.orla.records()) == 1 and lab.orla.records()[0].attempts == 1
        settled(lab)
        assert lab.runs["look"] == lab.early.started == 1 and dict(lab.early.dropped) == {"run_ended": 1}


# Side by side


def branches(lab: Lab, look: Any) -> Any:
    """Return two agents side by side, with one tool between them."""
    graph = StateGraph(MessagesState)
    for name in ("left", "right"):
        graph.add_node(name, create_agent(lab.model(), [look], name=name)).add_edge(START, name)
    return graph.compile()


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_branches_with_equal_calls_have_a_start_each(lab: Lab, early: Callable[..., Any], is_async: bool) -> None:
    lab.plan = [Answer((ONE, ONE))]
    look = looking(lab)

    def ask(graph: Any) -> Any:
        return asyncio.run(graph.ainvoke(HELLO)) if is_async else graph.invoke(HELLO)

    without = sorted(map(repr, shown(ask(branches(lab, look)))))
    assert lab.runs["look"] == 4
    lab.runs.clear()
    lab.awaits = 4
    assert sorted(map(repr, shown(ask(early(branches(lab, look), tools_safe={"look"}))))) == without
    assert (lab.runs["look"], lab.early.started, lab.early.used) == (4, 4, 4)
    settled(lab)


def test_branches_by_send_have_a_start_each(lab: Lab, early: Callable[..., Any]) -> None:
    lab.plan = [Answer((ONE,))]
    look = looking(lab)
    work = create_agent(lab.model(), [look], name="work")
    graph = StateGraph(MessagesState).add_node("work", work)
    graph.add_conditional_edges(START, lambda state: [Send("work", HELLO) for _ in range(3)], ["work"])
    lab.awaits = 3
    state = early(graph.compile(), tools_safe={"look"}).invoke(HELLO)
    assert sum(message.type == "tool" for message in state["messages"]) == 3
    assert (lab.runs["look"], lab.early.started, lab.early.used) == (3, 3, 3)
    settled(lab)


# Code of the user around a tool


@pytest.mark.parametrize("does", ["refuses", "changes"])
def test_what_wraps_a_tool_call_comes_too_late_and_is_obeyed(lab: Lab, early: Callable[..., Any], does: str) -> None:
    """The docs say so: the body has run for the call as the model wrote it, and that result is used nowhere."""

    @wrap_tool_call
    def guard(request: Any, handler: Any) -> Any:
        call = request.tool_call
        if does == "refuses":
            return ToolMessage("refused", tool_call_id=call["id"])
        return handler(request.override(tool_call={**call, "args": {"x": 2}}))

    lab.plan, lab.awaits = [Answer((ONE,))], 1
    agent = create_agent(lab.model(), [looking(lab)], middleware=[guard])
    state = early(agent, tools_safe={"look"}).invoke(HELLO)
    (result,) = [message for message in state["messages"] if message.type == "tool"]
    assert (result.content == "refused") is (does == "refuses")
    settled(lab)
    assert lab.runs["look"] == 1 + (does == "changes")
    assert (lab.early.started, lab.early.used, lab.early.ran_twice) == (1, 0, 0)
    assert lab.early.dropped == {"next_call": 1}
