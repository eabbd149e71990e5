"""Early starts in runs that end otherwise than they began, beside other runs, and where they are switched off."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.tools import StructuredTool, tool
from langgraph.config import get_stream_writer
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import RetryPolicy, Send

from orla_lg import CallEvent, Happening, Orla
from orla_lg.graph.tools.early import handover
from orla_lg.graph.tools.early.fitness import ARUN, RUN
from tests.conftest import at
from tests.stub_engine import StubEngine
from tests.tools.conftest import PATIENCE_S, Lab, shown
from tests.tools.planned_engine import MODEL, Answer, PlannedEngine

HELLO = {"messages": [HumanMessage("Hello")]}
TWICE = (("look", {"x": 1}), ("look", {"x": 2}))


def looking(lab: Lab, *, takes_s: float = 0.0) -> Any:
    @tool
    def look(x: int) -> str:
        """Look at x."""
        lab.ran("look")
        time.sleep(takes_s)
        return f"seen {x}"

    return look


def alooking(lab: Lab, ended: list[str]) -> Any:
    @tool
    async def look(x: int) -> str:
        """Look at x."""
        lab.ran("look")
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return f"seen {x}"

    return look


def until(met: Callable[[], bool], patience_s: float = PATIENCE_S) -> bool:
    until_s = time.monotonic() + patience_s
    while not met() and time.monotonic() < until_s:
        time.sleep(0.002)
    return met()


# Runs that end otherwise


async def test_a_run_that_is_cancelled_while_decoding_cancels_what_it_started(
    lab: Lab, served: Callable[..., Any]
) -> None:
    ended: list[str] = []
    stops = threading.Event()
    lab.plan = [Answer((("look", {"x": 1}),), after={0: lambda: stops.wait(PATIENCE_S)})]
    graph = served(create_agent(lab.model(), [alooking(lab, ended)]), tools_safe={"look"})
    running = asyncio.get_running_loop().create_task(graph.ainvoke(HELLO))
    while not lab.runs:
        await asyncio.sleep(0.002)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.sleep(0)
    stops.set()
    assert ended == ["cancelled"]
    assert (lab.early.waiting, lab.early.dropped) == (0, {"run_ended": 1})
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


async def test_a_caller_that_is_cancelled_at_the_tools_turn_takes_its_task_along(
    lab: Lab, served: Callable[..., Any]
) -> None:
    ended: list[str] = []
    lab.plan, lab.awaits = [Answer((("look", {"x": 1}),))], 1
    graph = served(create_agent(lab.model(), [alooking(lab, ended)]), tools_safe={"look"})
    heard: list[Happening] = []
    assert lab.orla is not None
    lab.orla.subscribe(lambda event: heard.append(event.kind))
    running = asyncio.get_running_loop().create_task(graph.ainvoke(HELLO))
    while Happening.TOOL_STARTED not in heard:
        await asyncio.sleep(0.002)
    await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (ended, lab.runs["look"], lab.early.waiting) == (["cancelled"], 1, 0)


@pytest.mark.parametrize("leaves", ["close", "drop"])
def test_a_reader_that_leaves_drops_what_was_started(lab: Lab, served: Callable[..., Any], leaves: str) -> None:
    lab.plan, lab.awaits = [Answer(TWICE)], 2
    graph = served(create_agent(lab.model(), [looking(lab)]), tools_safe={"look"})
    stream = graph.stream(HELLO, stream_mode="updates")
    assert "model" in next(stream)
    if leaves == "close":
        stream.close()
    del stream
    assert until(lambda: lab.early.waiting == 0)
    assert lab.early.started == 2


@pytest.mark.parametrize("is_async", [False, True])
def test_an_answer_that_breaks_off_and_is_sent_elsewhere_starts_nothing_twice(
    lab: Lab, make_orla: Callable[..., Orla], is_async: bool
) -> None:
    broken = [Answer(TWICE, breaks_after=0), Answer(TWICE)]
    lab.plan, lab.awaits = [], 1

    def plan(body: Any) -> Answer:
        if any(message.get("tool_calls") for message in body["messages"]):
            return Answer(text="done")
        answer = broken.pop(0)
        waits = {0: lambda: lab.wait_for_starts(1), 1: lambda: lab.wait_for_starts(2)}
        return Answer(answer.calls, after=waits, breaks_after=answer.breaks_after)

    with PlannedEngine(plan) as engine:
        lab.engine, before = engine, lab.engine
        lab.orla = make_orla(lab.backend(), mapper={"*": "main"})
        graph = lab.orla.wrap(create_agent(lab.model(max_retries=2), [looking(lab)]), tools_safe={"look"})
        state = asyncio.run(graph.ainvoke(HELLO)) if is_async else graph.invoke(HELLO)
        lab.engine = before
    assert [message.content for message in state["messages"]][-3:] == ["seen 1", "seen 2", "done"]
    assert (lab.runs["look"], lab.early.started, lab.early.used) == (2, 2, 2)
    assert broken == []


def test_a_node_that_is_retried_starts_nothing_twice(lab: Lab, served: Callable[..., Any]) -> None:
    look, tries = looking(lab), []
    lab.plan, lab.awaits = [Answer(TWICE)], 2
    model = lab.model().bind_tools([look])

    def think(state: MessagesState) -> dict[str, Any]:
        answer = model.invoke(state["messages"])
        tries.append(1)
        if len(tries) == 1:
            raise ConnectionError("once")
        return {"messages": [answer]}

    graph = StateGraph(MessagesState)
    retry = RetryPolicy(initial_interval=0.001, jitter=False, max_attempts=2)
    graph.add_node("think", think, retry_policy=retry)
    graph.add_node("tools", ToolNode([look]))
    graph.add_edge(START, "think")
    graph.add_edge("think", "tools")
    state = served(graph.compile(), tools_safe={"look"}).invoke(HELLO)
    assert [message.content for message in state["messages"][-2:]] == ["seen 1", "seen 2"]
    assert (lab.runs["look"], lab.early.started, lab.early.used) == (2, 2, 2)


def test_what_the_next_call_of_a_node_finds_of_the_last_one_is_dropped(lab: Lab, served: Callable[..., Any]) -> None:
    look = looking(lab)
    lab.plan, lab.awaits = [Answer(TWICE), Answer((("look", {"x": 3}),))], 2
    model = lab.model().bind_tools([look])

    def think(state: MessagesState) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"])]}

    def skip(state: MessagesState) -> dict[str, Any]:
        from langchain_core.messages import ToolMessage

        return {"messages": [ToolMessage("no", tool_call_id=call["id"]) for call in state["messages"][-1].tool_calls]}

    graph = StateGraph(MessagesState)
    graph.add_node("think", think)
    graph.add_node("skip", skip)
    graph.add_node("tools", ToolNode([look]))
    graph.add_edge(START, "think")
    graph.add_conditional_edges("think", lambda s: "skip" if s["messages"][-1].tool_calls else "__end__")
    graph.add_conditional_edges("skip", lambda s: "think", ["think", "tools"])
    served(graph.compile(), tools_safe={"look"}).invoke(HELLO)
    assert lab.early.dropped == {"next_call": 3}


# Side by side


def test_parallel_branches_with_equal_calls_run_each_call_once(lab: Lab, served: Callable[..., Any]) -> None:
    agent = create_agent(lab.model(), [looking(lab)])
    lab.plan, lab.awaits = [Answer(TWICE)], 8

    def branch(state: MessagesState) -> dict[str, Any]:
        return {"messages": agent.invoke({"messages": state["messages"]})["messages"][-1:]}

    graph = StateGraph(MessagesState)
    graph.add_node("branch", branch)
    graph.add_conditional_edges(START, lambda state: [Send("branch", state)] * 4, ["branch"])
    served(graph.compile(), tools_safe={"look"}).invoke(HELLO)
    assert (lab.runs["look"], lab.early.started, lab.early.used) == (8, 8, 8), lab.early


def test_graphs_orlas_and_runs_beside_each_other_do_not_take_from_one_another(
    lab: Lab, make_orla: Callable[..., Orla]
) -> None:
    look = looking(lab, takes_s=0.01)
    lab.plan = [Answer(TWICE)]
    one, two = (make_orla(lab.backend(), mapper={"*": "main"}) for _ in range(2))
    agent = create_agent(lab.model(), [look])
    graphs = [
        one.wrap(agent, tools_safe={"look"}), two.wrap(agent, tools_safe={"look"}), one.wrap(agent),
        one.wrap(create_agent(lab.model(), [look]), tools_safe={"look"}), agent,
    ]  # fmt: skip
    expected = shown(agent.invoke(HELLO))
    lab.runs.clear()
    states: list[Any] = []
    threads = [
        threading.Thread(target=lambda graph=graph: states.append(graph.invoke(HELLO))) for graph in graphs * 3
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [shown(state) for state in states] == [expected] * 15
    early = [each.statistics().early_tools for each in (one, two)]
    assert (early[0].used + sum(early[0].dropped.values()) + early[0].ran_twice) >= 0
    assert 30 <= lab.runs["look"] <= 30 + sum(each.started - each.used for each in early)
    assert [each.started for each in early] == [12, 6]


def test_a_graph_that_two_orlas_wrap_hands_over_once(lab: Lab, make_orla: Callable[..., Orla]) -> None:
    lab.plan, lab.awaits = [Answer(TWICE)], 2
    other, lab.orla = (make_orla(lab.backend(), mapper={"*": "main"}) for _ in range(2))
    agent = create_agent(lab.model(), [looking(lab)])
    graph = lab.orla.wrap(other.wrap(agent, tools_safe={"look"}), tools_safe={"look"})
    state = graph.invoke(HELLO)
    assert [message.content for message in state["messages"][-3:]] == ["seen 1", "seen 2", "done"]
    started = [each.statistics().early_tools.started for each in (other, lab.orla)]
    assert lab.runs["look"] == 2 and sum(started) == 2


def test_a_model_in_an_early_tool_has_the_stage_of_the_tools_node_and_belongs_to_the_run(
    lab: Lab, served: Callable[..., Any]
) -> None:
    @tool
    def look(x: int) -> str:
        """Look at x."""
        assert lab.orla is not None
        here = lab.orla.current()
        assert here is not None
        lab.hidden[here.stage] = here.run
        return str(lab.model().invoke("What?").content)

    lab.plan, lab.awaits = [Answer((("look", {"x": 1}),))], 1
    served(create_agent(lab.model(), [look]), tools_safe={"look"}).invoke(HELLO)
    assert lab.orla is not None
    records = lab.orla.records()
    assert sorted(record.stage for record in records) == ["model", "model", "tools"]
    assert len({record.run for record in records}) == 1
    assert lab.hidden == {"tools": records[0].run}
    assert lab.early.used == 1


@pytest.mark.parametrize("mode", ["messages", "custom", "updates", "values", "tasks"])
def test_what_a_run_streams_is_the_same(
    lab: Lab, served: Callable[..., Any], mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    @tool
    def look(x: int) -> str:
        """Look at x."""
        return str(lab.model().invoke(f"What is {x}?").content)

    def streamed(graph: Any) -> list[str]:
        seen = []
        for each in graph.stream(HELLO, stream_mode=mode):
            message = each[0] if mode == "messages" else None
            seen.append((message.content, each[1]["langgraph_node"]) if message is not None else type(each).__name__)
        return sorted(map(str, seen))

    lab.plan = [Answer((("look", {"x": 1}),))]
    agent = create_agent(lab.model(), [look])
    bare = streamed(agent)
    graph = served(agent, tools_safe={"look"})
    lab.awaits = 1
    assert streamed(graph) == bare
    assert lab.early.started == 1
    assert lab.early.used == (mode != "messages"), "what a model says inside a tool is streamed in its place"
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_what_a_runs_events_show_is_the_same(
    lab: Lab, served: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    @tool
    async def look(x: int) -> str:
        """Look at x."""
        return str((await lab.model().ainvoke(f"What is {x}?")).content)

    async def heard(graph: Any) -> list[str]:
        return [f"{each['event']} {each['name']}" async for each in graph.astream_events(HELLO, version="v2")]

    lab.plan = [Answer((("look", {"x": 1}),))]
    agent = create_agent(lab.model(), [look])
    bare = await heard(agent)
    graph = served(agent, tools_safe={"look"})
    lab.awaits = 1
    assert await heard(graph) == bare
    assert (lab.early.started, lab.early.used) == (1, 0)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_tool_that_needed_its_place_once_starts_early_no_more(lab: Lab, served: Callable[..., Any]) -> None:
    @tool
    def look(x: int) -> str:
        """Look at x."""
        lab.ran("look")
        get_stream_writer()(x)
        return f"seen {x}"

    lab.plan, lab.awaits = [Answer((("look", {"x": 1}),))], 1
    graph = served(create_agent(lab.model(), [look]), tools_safe={"look"})
    assert [list(graph.stream(HELLO, stream_mode="custom")) for _ in range(3)] == [[1]] * 3
    assert (lab.runs["look"], lab.early.started, lab.early.ran_twice) == (4, 1, 1)


# Switched off


def test_what_is_not_declared_never_starts_early_and_nothing_is_replaced(
    lab: Lab, served: Callable[..., Any]
) -> None:
    lab.plan = [Answer(TWICE)]
    served(create_agent(lab.model(), [looking(lab)])).invoke(HELLO)
    assert all(kind._run is original for kind, original in RUN.items())
    assert (lab.runs["look"], lab.early.started) == (2, 0)


def test_langchain_is_as_it_was_once_the_last_orla_is_closed(lab: Lab, make_orla: Callable[..., Orla]) -> None:
    orla = make_orla(lab.backend(), mapper={"*": "main"})
    orla.wrap(create_agent(lab.model(), [looking(lab)]), tools_safe={"look"})
    assert StructuredTool._run is handover._OURS[StructuredTool, "_run"][1]
    orla.close()
    assert all(kind._run is original for kind, original in RUN.items())
    assert all(kind._arun is original for kind, original in ARUN.items())


def test_a_backend_may_be_left_out(lab: Lab, served: Callable[..., Any]) -> None:
    lab.plan = [Answer(TWICE)]
    graph = served(create_agent(lab.model(), [looking(lab)]), tools_safe={"look"}, backend={"early_tools": False})
    graph.invoke(HELLO)
    assert (lab.runs["look"], lab.early.started) == (2, 0)


def test_disabled_means_nothing_starts_early(
    lab: Lab, served: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORLA_DISABLED", "1")
    lab.plan = [Answer(TWICE)]
    served(create_agent(lab.model(), [looking(lab)]), tools_safe={"look"}).invoke(HELLO)
    assert (lab.runs["look"], lab.early.started) == (2, 0)
    assert StructuredTool._run is RUN[StructuredTool]


def test_closing_while_a_start_runs_drops_it_and_its_thread_ends(lab: Lab, served: Callable[..., Any]) -> None:
    goes_on, began = threading.Event(), threading.Event()

    @tool
    def look(x: int) -> str:
        """Look at x."""
        began.set()
        goes_on.wait(PATIENCE_S)
        return f"seen {x}"

    def close() -> None:
        assert lab.orla is not None and began.wait(PATIENCE_S)
        lab.orla.close()

    lab.plan = [Answer((("look", {"x": 1}),), after={0: close})]
    graph = served(create_agent(lab.model(), [look]), tools_safe={"look"})
    threading.Timer(0.3, goes_on.set).start()
    graph.invoke(HELLO)  # what comes after the end goes where its code says
    assert (lab.early.waiting, lab.early.used, lab.early.dropped) == (0, 0, {"closed": 1})
    assert until(lambda: not [each for each in threading.enumerate() if each.name.startswith("orla-early")])


# Seen


def test_listeners_hear_when_a_tool_began_and_what_that_hid(lab: Lab, served: Callable[..., Any]) -> None:
    lab.plan = [Answer((("look", {"x": 1}),), after={0: lambda: (lab.wait_for_starts(1), time.sleep(0.05))})]
    graph = served(create_agent(lab.model(), [looking(lab, takes_s=0.03)]), tools_safe={"look"})
    heard: list[CallEvent] = []
    assert lab.orla is not None
    lab.orla.subscribe(heard.append)
    began_s = time.monotonic()
    graph.invoke(HELLO)
    took_s = time.monotonic() - began_s
    tools = [(event.kind, event.stage, event.detail) for event in heard if "tool" in event.kind]
    assert tools == [
        (Happening.TOOL_BEGAN_EARLY, "tools", "look"),
        (Happening.TOOL_STARTED, "tools", "look"),
        (Happening.TOOL_HANDED_OVER, "tools", "look"),
        (Happening.TOOL_ENDED, "tools", "look"),
    ]
    (hidden,) = [event.hidden_s for event in heard if event.kind is Happening.TOOL_HANDED_OVER]
    assert hidden is not None and 0.02 < hidden < took_s
    assert lab.early.hidden_s == pytest.approx(hidden)


def test_a_child_of_a_fork_starts_its_own(lab: Lab, served: Callable[..., Any]) -> None:
    lab.plan, lab.awaits = [Answer(TWICE)], 2
    graph = served(create_agent(lab.model(), [looking(lab)]), tools_safe={"look"})
    graph.invoke(HELLO)
    assert lab.orla is not None
    early = lab.orla.core.early
    pid = os.fork()
    if pid == 0:
        is_empty = early.is_idle and early.take("run", None, ((), {})) is None  # type: ignore[arg-type]
        os._exit(0 if is_empty else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_stub_that_calls_no_tool_is_served_as_ever(
    engine: StubEngine, make_orla: Callable[..., Orla], lab: Lab
) -> None:
    lab.orla = make_orla(at(engine), mapper={"*": "main"})
    from tests.conftest import chat

    graph = lab.orla.wrap(create_agent(chat(engine), [looking(lab)]), tools_safe={"look"})
    assert graph.invoke(HELLO)["messages"][-1].content
    assert MODEL
