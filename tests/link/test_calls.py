"""Wrapped graphs, unchanged, whose core is another process: what their calls say to it, and get."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableLambda
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import ChatOrla, Orla
from orla_lg.link.messages import End, Enter, FirstToken, Graph, Missed, Ready, Signal
from tests.conftest import chat
from tests.link.scripted import ScriptedCore
from tests.stub_engine import MODEL, Reply, StubEngine

Replica = Callable[..., Orla]


def graph(engine: StubEngine, **settings: Any) -> Any:
    llm = chat(engine, **settings)

    async def anode(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await llm.ainvoke(state["messages"])]}

    def node(state: MessagesState) -> dict[str, Any]:
        return {"messages": [llm.invoke(state["messages"])]}

    return StateGraph(MessagesState).add_node("a", RunnableLambda(node, anode)).add_edge(START, "a").compile()


def hi() -> dict[str, Any]:
    return {"messages": [HumanMessage("hello there")]}


def test_a_wrapped_graph_is_served_by_the_core(core: ScriptedCore, engine: StubEngine, replica: Replica) -> None:
    orla = replica()
    wrapped = orla.wrap(graph(engine))
    answer = wrapped.invoke(hi(), {"configurable": {"thread_id": "t1"}})
    assert answer["messages"][-1].content
    (record,) = orla.records()
    entered, ended = core.wait(Enter), core.wait(End)
    assert (entered.call, ended.call) == (record.id, record.id)
    assert (entered.stage, entered.workflow, entered.model, entered.thread) == ("a", "t1", MODEL, True)
    assert entered.prompt_chars == len("hello there") and len(entered.hashes) == 1
    assert "hello there" not in repr(core.heard), "prompts do not travel"
    assert (record.backend, record.mapper, record.reason) == ("main", "core", "scripted")
    assert (record.prompt_tokens, record.attempts, record.error) == (ended.prompt_tokens, 1, None)
    core.wait(Signal, 4)
    assert [each.what for each in core.all(Signal)] == ["run_started", "node_entered", "node_left", "run_ended"]
    assert core.all(Graph)[0].edges.keys() >= {"a"}
    assert core.all(Ready)


def test_async_streams_say_their_first_token(core: ScriptedCore, engine: StubEngine, replica: Replica) -> None:
    wrapped = replica().wrap(graph(engine))

    async def run() -> str:
        return "".join([str(message.content) async for message, _ in wrapped.astream(hi(), stream_mode="messages")])

    assert asyncio.run(run())
    assert core.wait(FirstToken).attempt == 1
    assert core.wait(End).prompt_tokens


def test_two_loops_and_threads_at_once(core: ScriptedCore, engine: StubEngine, replica: Replica) -> None:
    orla = replica()
    wrapped, answers = orla.wrap(graph(engine)), []

    async def many() -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(wrapped.ainvoke(hi())) for _ in range(5)]
        answers.extend(task.result() for task in tasks)

    threads = [threading.Thread(target=lambda: asyncio.run(many())) for _ in range(2)]
    threads += [threading.Thread(target=lambda: answers.append(wrapped.invoke(hi()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 13 == len({each.call for each in core.all(Enter)})


def test_chat_orla_has_its_record(core: ScriptedCore, replica: Replica) -> None:
    orla = replica()
    answer = ChatOrla(model="main", orla=orla).invoke("hi")
    assert answer.response_metadata["orla"]["backend"] == "main"
    assert core.wait(Enter).may_pass is False


def test_a_failed_attempt_is_the_cores_to_judge(core: ScriptedCore, engine: StubEngine, replica: Replica) -> None:
    replies = iter([Reply(status=500)])
    engine.rule = lambda seen: next(replies, None)
    orla = replica()
    wrapped = orla.wrap(graph(engine, max_retries=2))
    assert wrapped.invoke(hi())["messages"][-1].content
    missed = core.wait(Missed)
    assert (missed.attempt, missed.unreachable, missed.overloaded) == (1, False, False)
    assert orla.records()[0].attempts == 2


def test_refusals_are_the_callers_errors(core: ScriptedCore, engine: StubEngine, replica: Replica) -> None:
    from orla_lg import BudgetExceeded

    core.grants, orla = False, replica()
    wrapped = orla.wrap(graph(engine))

    def refuse(kind: str, text: str, **more: Any) -> Any:
        number = len(core.all(Enter)) + 1

        def soon() -> None:
            core.refuse(core.wait(Enter, number).call, kind, text, **more)

        thread = threading.Thread(target=soon)
        thread.start()
        return thread

    thread = refuse("BudgetExceeded", "spent", scope="run", figure="calls")
    with pytest.raises(BudgetExceeded, match="spent") as caught:
        wrapped.invoke(hi())
    assert (caught.value.scope, caught.value.figure) == ("run", "calls")
    thread.join()
    wrapped = orla.wrap(graph(engine, timeout=20.0))
    thread = refuse("timeout", "it waited for the queue")
    with pytest.raises(openai.APITimeoutError):
        wrapped.invoke(hi())
    thread.join()
