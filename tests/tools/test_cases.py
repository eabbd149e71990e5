"""Tools that start early change no final state, whatever the tools and the graph do; and how often tools run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, HumanInTheLoopMiddleware, ToolCallLimitMiddleware
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import InjectedToolCallId, StructuredTool, Tool, ToolException, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_store, get_stream_writer
from langgraph.func import entrypoint, task
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import InjectedState, ToolNode, ToolRuntime, tools_condition
from langgraph.runtime import get_runtime
from langgraph.types import Command, interrupt
from pydantic import BaseModel

from tests.tools.conftest import Lab, shown
from tests.tools.planned_engine import Answer

Built = tuple[Any, set[str]]
"""A graph, and the names of its safe tools."""

TWICE = (("look", {"x": 1}), ("look", {"x": 2}))


@dataclass(frozen=True)
class Case:
    """A graph and the calls of its model; how often tools run without and with early starts, and how many start."""

    build: Callable[[Lab], Built]
    runs: tuple[int, int]
    started: int
    calls: tuple[tuple[str, dict[str, Any]], ...] = TWICE
    sync: bool = True
    resume: Any = None


def _look(lab: Lab) -> Any:
    @tool
    def look(x: int) -> str:
        """Look at x."""
        lab.ran("look")
        return f"seen {x}"

    return look


def agent(lab: Lab, *tools: Any, **how: Any) -> Built:
    return create_agent(lab.model(), list(tools), **how), {each.name for each in tools}


def plain(lab: Lab) -> Built:
    return agent(lab, _look(lab))


def artifact(lab: Lab) -> Built:
    @tool(response_format="content_and_artifact")
    def look(x: int) -> tuple[str, dict[str, int]]:
        """Look at x."""
        lab.ran("look")
        return f"seen {x}", {"x": x}

    return agent(lab, look)


def calls_a_model(lab: Lab) -> Built:
    @tool
    def look(x: int) -> str:
        """Look at x."""
        lab.ran("look")
        return str(lab.model().invoke(f"What is {x}?").content)

    return agent(lab, look)


class Where(BaseModel):
    x: int
    deep: list[int] = [1]


def structured(lab: Lab) -> Built:
    def seen(where: Where, tags: list[str]) -> str:
        lab.ran("look")
        where.deep.append(2)  # what a body does to its arguments is not what its call is compared with
        tags.append("more")
        return f"seen {where.x} {where.deep} {tags}"

    return agent(lab, StructuredTool.from_function(seen, name="look", description="Look."))


def single_input(lab: Lab) -> Built:
    def seen(x: str) -> str:
        lab.ran("look")
        return f"seen {x}"

    return agent(lab, Tool("look", seen, "Look."))


def injected_state(lab: Lab) -> Built:
    @tool
    def look(x: int, state: Annotated[dict[str, Any], InjectedState]) -> str:
        """Look at x."""
        lab.ran("look")
        return f"seen {x} after {len(state['messages'])}"

    return agent(lab, look)


def runtime(lab: Lab) -> Built:
    @tool
    def look(x: int, runtime: ToolRuntime) -> str:
        """Look at x."""
        lab.ran("look")
        return f"seen {x} after {len(runtime.state['messages'])}"

    return agent(lab, look)


def command(lab: Lab) -> Built:
    @tool
    def look(x: int, tool_call_id: Annotated[str, InjectedToolCallId]) -> Command[Any]:
        """Look at x."""
        lab.ran("look")
        return Command(update={"messages": [ToolMessage(f"seen {x}", tool_call_id=tool_call_id)]})

    return agent(lab, look)


def configured(lab: Lab) -> Built:
    @tool
    def look(x: int, config: RunnableConfig) -> str:
        """Look at x."""
        lab.ran("look")
        return f"seen {x} in {config['metadata']['langgraph_node']}"

    return agent(lab, look)


def own_class(lab: Lab) -> Built:
    class Look(StructuredTool):
        def _run(self, *args: Any, **kwargs: Any) -> Any:
            lab.ran("look")
            return f"seen {kwargs['x']} in a way of its own"

    return agent(lab, Look.from_function(lambda x: x, name="look", description="Look.", infer_schema=True))


def writes(lab: Lab) -> Built:
    @tool
    def look(x: int) -> str:
        """Look at x."""
        lab.ran("look")
        get_stream_writer()(f"looking at {x}")
        return f"seen {x}"

    return agent(lab, look)


def writes_if_it_can(lab: Lab) -> Built:
    @tool
    def look(x: int) -> str:
        """Look at x."""
        lab.ran("look")
        try:
            get_stream_writer()(f"looking at {x}")
        except Exception:
            return "nothing to write to"
        return f"seen {x}"

    return agent(lab, look)


def asks_for_its_runtime(lab: Lab) -> Built:
    @tool
    def look(x: int) -> str:
        """Look at x."""
        lab.ran("look")
        here: Any = get_runtime()
        return f"seen {x}" if here is not None else "no runtime"

    return agent(lab, look)


def stores(lab: Lab) -> Built:
    @tool
    def look(x: int) -> str:
        """Look at x."""
        lab.ran("look")
        return f"seen {x}: {get_store()}"

    return agent(lab, look)


def runs_a_graph(lab: Lab) -> Built:
    inner = StateGraph(MessagesState)
    inner.add_node("say", lambda state: {"messages": [AIMessage("inner")]})
    inner.add_edge(START, "say")
    compiled = inner.compile()

    @tool
    def look(x: int) -> str:
        """Look at x."""
        lab.ran("look")
        return f"seen {x}: {compiled.invoke({'messages': []})['messages'][-1].content}"

    return agent(lab, look)


def raises(lab: Lab) -> Built:
    def look(x: int) -> str:
        lab.ran("look")
        raise ToolException(f"not {x}")

    return agent(lab, StructuredTool.from_function(look, description="Look.", handle_tool_error=True))


def interrupts(lab: Lab) -> Built:
    @tool
    def ask(x: int) -> str:
        """Ask for x."""
        lab.ran("ask")
        return f"told {interrupt('what?')}"

    return agent(lab, ask, _look(lab), checkpointer=InMemorySaver())


def approved(lab: Lab) -> Built:
    @tool
    def send(x: int) -> str:
        """Send x."""
        lab.ran("send")
        return f"sent {x}"

    human = HumanInTheLoopMiddleware(interrupt_on={"send": True})
    return agent(lab, send, _look(lab), middleware=[human], checkpointer=InMemorySaver())


EDITED = {"decisions": [{"type": "edit", "edited_action": {"name": "send", "args": {"x": 7}}}]}


def limited(lab: Lab) -> Built:
    return agent(lab, _look(lab), middleware=[ToolCallLimitMiddleware(run_limit=1, exit_behavior="continue")])


class Rewrites(AgentMiddleware):
    def wrap_tool_call(self, request: Any, handler: Any) -> Any:
        call = {**request.tool_call, "args": {"x": request.tool_call["args"]["x"] + 10}}
        return handler(request.override(tool_call=call))

    async def awrap_tool_call(self, request: Any, handler: Any) -> Any:
        call = {**request.tool_call, "args": {"x": request.tool_call["args"]["x"] + 10}}
        return await handler(request.override(tool_call=call))


class Repeats(AgentMiddleware):
    def wrap_tool_call(self, request: Any, handler: Any) -> Any:
        handler(request)
        return handler(request)

    async def awrap_tool_call(self, request: Any, handler: Any) -> Any:
        await handler(request)
        return await handler(request)


def rewritten(lab: Lab) -> Built:
    return agent(lab, _look(lab), middleware=[Rewrites()])


def repeated(lab: Lab) -> Built:
    return agent(lab, _look(lab), middleware=[Repeats()])


def state_graph(lab: Lab) -> Built:
    look = _look(lab)
    model = lab.model().bind_tools([look])

    def think(state: MessagesState) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("think", think)
    graph.add_node("tools", ToolNode([look]))
    graph.add_edge(START, "think")
    graph.add_conditional_edges("think", tools_condition)
    graph.add_edge("tools", "think")
    return graph.compile(), {"look"}


def subgraph(lab: Lab) -> Built:
    inner, names = agent(lab, _look(lab))
    graph = StateGraph(MessagesState)
    graph.add_node("inner", inner)
    graph.add_edge(START, "inner")
    return graph.compile(), names


def own_node(lab: Lab) -> Built:
    """A node that runs its tools one by one, and looks them up where nothing shows them before."""
    look = _look(lab)
    lab.hidden[look.name] = look
    model = lab.model().bind_tools([look])

    def think(state: MessagesState) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"])]}

    def act(state: MessagesState) -> dict[str, Any]:
        return {
            "messages": [vars(lab)["hidden"][call["name"]].invoke(call) for call in state["messages"][-1].tool_calls]
        }

    graph = StateGraph(MessagesState)
    graph.add_node("think", think)
    graph.add_node("act", act)
    graph.add_edge(START, "think")
    graph.add_conditional_edges("think", lambda s: "act" if s["messages"][-1].tool_calls else "__end__")
    graph.add_edge("act", "think")
    return graph.compile(), {"look"}


def functional(lab: Lab) -> Built:
    look = _look(lab)
    model = lab.model().bind_tools([look])

    @task
    def think(messages: list[Any]) -> Any:
        return model.invoke(messages)

    @task
    def act(call: Any) -> Any:
        return look.invoke(call)

    @entrypoint()
    def work(given: dict[str, Any]) -> dict[str, Any]:
        messages = list(given["messages"])
        while True:
            messages.append(think(messages).result())
            if not messages[-1].tool_calls:
                return {"messages": messages}
            messages += [each.result() for each in [act(call) for call in messages[-1].tool_calls]]

    return work, {"look"}


def coroutines(lab: Lab) -> Built:
    @tool
    async def alook(x: int) -> str:
        """Look at x."""
        lab.ran("alook")
        await asyncio.sleep(0)
        return f"seen {x}"

    return agent(lab, alook, _look(lab))


CASES = {
    "plain": Case(plain, (2, 2), 2),
    "same arguments twice": Case(plain, (2, 2), 2, (("look", {"x": 1}), ("look", {"x": 1}))),
    "content and artifact": Case(artifact, (2, 2), 2),
    "calls a model": Case(calls_a_model, (2, 2), 2),
    "structured arguments": Case(structured, (1, 1), 1, (("look", {"where": {"x": 1}, "tags": ["a"]}),)),
    "single input": Case(single_input, (1, 1), 1, (("look", {"__arg1": "a"}),)),
    "injected state": Case(injected_state, (2, 2), 0),
    "runtime": Case(runtime, (2, 2), 0),
    "command": Case(command, (2, 2), 0),
    "config": Case(configured, (2, 2), 0),
    "a class of its own": Case(own_class, (2, 2), 0),
    "stream writer": Case(writes, (1, 2), 1, (("look", {"x": 1}),)),
    "stream writer, or none": Case(writes_if_it_can, (1, 2), 1, (("look", {"x": 1}),)),
    "its runtime, or none": Case(asks_for_its_runtime, (1, 2), 1, (("look", {"x": 1}),)),
    "store": Case(stores, (1, 2), 1, (("look", {"x": 1}),)),
    "runs a graph": Case(runs_a_graph, (1, 2), 1, (("look", {"x": 1}),)),
    "raises": Case(raises, (2, 4), 2),
    "interrupts": Case(interrupts, (3, 4), 2, (("ask", {"x": 1}), ("look", {"x": 2})), resume="that"),
    "approved by a human": Case(approved, (2, 3), 1, (("send", {"x": 1}), ("look", {"x": 2})), resume=EDITED),
    "limited": Case(limited, (1, 2), 2),
    "rewritten": Case(rewritten, (1, 2), 1, (("look", {"x": 1}),)),
    "repeated": Case(repeated, (2, 2), 1, (("look", {"x": 1}),)),
    "state graph": Case(state_graph, (2, 2), 2),
    "subgraph": Case(subgraph, (2, 2), 2),
    "own node": Case(own_node, (2, 2), 2),
    "functional": Case(functional, (2, 2), 2),
    "coroutine and function": Case(coroutines, (2, 2), 2, (("alook", {"x": 1}), ("look", {"x": 2})), sync=False),
}


def ask(graph: Any, case: Case, *, is_async: bool) -> Any:
    config = {"configurable": {"thread_id": "t"}} if case.resume is not None else None
    given: list[Any] = [{"messages": [HumanMessage("Hello")]}]
    if case.resume is not None:
        given.append(Command(resume=case.resume))
    if not is_async:
        return [graph.invoke(each, config) for each in given][-1]

    async def all_of_it() -> Any:
        return [await graph.ainvoke(each, config) for each in given][-1]

    return asyncio.run(all_of_it())


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("name", CASES)
def test_the_final_state_is_the_same_and_runs_are_as_many_as_they_should(
    lab: Lab, served: Callable[..., Any], name: str, is_async: bool
) -> None:
    case = CASES[name]
    if not is_async and not case.sync:
        pytest.skip("a coroutine alone cannot run in a sync graph")
    lab.plan = [Answer(case.calls)]
    graph, _ = case.build(lab)
    without = shown(ask(graph, case, is_async=is_async))
    assert lab.runs.total() == case.runs[0]

    lab.runs.clear()
    graph, names = case.build(lab)
    wrapped = served(graph, tools_safe=names)
    learns = name == "own node"
    if learns:  # what no node shows is known after its first use
        ask(wrapped, case, is_async=is_async)
        lab.runs.clear()
        assert lab.early.started == 0
    lab.awaits = case.started
    assert shown(ask(wrapped, case, is_async=is_async)) == without
    assert (lab.runs.total(), lab.early.started) == (case.runs[1], case.started)
    assert max(lab.runs.values()) <= 2 * case.runs[0]
    assert lab.orla is not None
    lab.orla.core.early.check_integrity()
