"""A wrapped graph behaves as the graph it was made from: the two run side by side and must say the same."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import operator
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypedDict, cast

import openai
import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForLLMRun,
    BaseCallbackHandler,
    CallbackManager,
    CallbackManagerForLLMRun,
)
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_store, get_stream_writer
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import create_react_agent
from langgraph.pregel import Pregel
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command, RetryPolicy, Send, interrupt
from pydantic import BaseModel

from orla_lg import BackendUnavailable, Orla, OrlaError
from orla_lg.graph.events import GraphEvents
from orla_lg.graph.execution import handlers_of
from tests.conftest import BACKEND_KEY, CALLER_KEY, at, chat
from tests.stub_engine import Reply, Seen, StubEngine

Graph = Any
Build = Callable[[StubEngine], Graph]
Scenario = Callable[[Graph], Any]

_VOLATILE = (
    (re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"), "<id>"),
    (re.compile(r"\b[0-9a-f]{32}\b(?:\.\d+)?|'\d{32}\.0?\.\d+'"), "<id>"),
    (re.compile(r"\b\d{32}\.\d[\d.e-]*"), "<version>"),
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:[+-]\d\d:\d\d)?"), "<time>"),
    (re.compile(r"0x[0-9a-f]+"), "<address>"),
    (re.compile(r"node_first_attempt_time=[\d.]+"), "<time>"),
)


def normal(value: Any) -> str:
    """Return *value* as text, without what differs from run to run."""
    text = repr(value)
    for pattern, placeholder in _VOLATILE:
        text = pattern.sub(placeholder, text)
    return text


def lines(values: Any) -> list[str]:
    return [normal(value) for value in values]


def on_thread(name: str = "1") -> Any:
    return {"configurable": {"thread_id": name}}


QUESTION = {"messages": [("user", "tell me something")]}


@pytest.fixture
def same(engine: StubEngine, orla: Orla) -> Callable[[Build, Scenario], Any]:
    """Run a scenario on a plain and on a wrapped graph, assert that they agree, and return the outcome."""

    def run(build: Build, scenario: Scenario, *, calls: bool = True) -> Any:
        plain = scenario(build(engine))
        asked_plainly = [seen.key for seen in engine.chats]
        assert set(asked_plainly) <= {CALLER_KEY}
        wrapped = scenario(orla.wrap(build(engine)))
        asked_by_us = [seen.key for seen in engine.chats[len(asked_plainly) :]]
        assert wrapped == plain
        assert len(asked_by_us) == len(asked_plainly) and set(asked_by_us) <= {BACKEND_KEY}
        assert bool(asked_by_us) is calls
        return wrapped

    return run


# ── the graphs ───────────────────────────────────────────────────────────────────────────────────────


def two_stages(engine: StubEngine, **compile_with: Any) -> Graph:
    """Two stages, the second of which also writes to the custom stream."""
    llm = chat(engine)

    def draft(state: MessagesState) -> Any:
        return {"messages": [llm.invoke(state["messages"])]}

    def review(state: MessagesState) -> Any:
        get_stream_writer()({"reviewing": len(state["messages"])})
        return {"messages": [llm.invoke(state["messages"])]}

    graph = StateGraph(MessagesState).add_node("draft", draft).add_node("review", review)
    graph.add_edge(START, "draft").add_edge("draft", "review").add_edge("review", END)
    return graph.compile(**{"checkpointer": InMemorySaver(), **compile_with})


def two_async_stages(engine: StubEngine, **compile_with: Any) -> Graph:
    llm = chat(engine)

    async def draft(state: MessagesState) -> Any:
        return {"messages": [await llm.ainvoke(state["messages"])]}

    async def review(state: MessagesState) -> Any:
        get_stream_writer()({"reviewing": len(state["messages"])})
        return {"messages": [await llm.ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState).add_node("draft", draft).add_node("review", review)
    graph.add_edge(START, "draft").add_edge("draft", "review").add_edge("review", END)
    return graph.compile(**{"checkpointer": InMemorySaver(), **compile_with})


def with_subgraph(engine: StubEngine) -> Graph:
    """A subgraph as a node, and another one called inside a node."""
    inner = two_stages(engine, checkpointer=None)

    def calling(state: MessagesState) -> Any:
        return {"messages": inner.invoke({"messages": state["messages"][-1:]})["messages"][-1:]}

    graph = StateGraph(MessagesState).add_node("inner", inner).add_node("calling", calling)
    graph.add_edge(START, "inner").add_edge("inner", "calling").add_edge("calling", END)
    return graph.compile(checkpointer=InMemorySaver())


class Fan(TypedDict):
    topics: list[str]
    answers: Annotated[list[str], operator.add]


def fan_out(engine: StubEngine) -> Graph:
    llm = chat(engine)

    def spread(state: Fan) -> list[Send]:
        return [Send("answer", {"topic": topic}) for topic in state["topics"]]

    def answer(state: Any) -> Any:
        return {"answers": [str(llm.invoke(state["topic"]).content)]}

    graph = StateGraph(Fan).add_node("answer", answer)
    graph.add_conditional_edges(START, spread, ["answer"]).add_edge("answer", END)
    return graph.compile(checkpointer=InMemorySaver())


def asking(engine: StubEngine) -> Graph:
    """A node that stops for a human between two calls."""
    llm = chat(engine)

    def ask(state: MessagesState) -> Any:
        said = llm.invoke(state["messages"])
        answer = interrupt({"question": said.content})
        return {"messages": [said, llm.invoke([HumanMessage(answer)])]}

    graph = StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask").add_edge("ask", END)
    return graph.compile(checkpointer=InMemorySaver())


@tool
def weather(city: str) -> str:
    """Return the weather."""
    return f"sunny in {city}"


def react_agent(engine: StubEngine) -> Graph:
    return create_react_agent(chat(engine), [weather], checkpointer=InMemorySaver())


def agent(engine: StubEngine) -> Graph:
    return create_agent(chat(engine), [weather], checkpointer=InMemorySaver())


def workflow(engine: StubEngine) -> Graph:
    llm = chat(engine)

    @task
    def say(topic: str) -> str:
        return str(llm.invoke(topic).content)

    @entrypoint(checkpointer=InMemorySaver())
    def both(topics: list[str]) -> list[str]:
        return [each.result() for each in [say(topic) for topic in topics]]

    return both


# ── outputs and streams ──────────────────────────────────────────────────────────────────────────────

pytestmark = pytest.mark.filterwarnings("ignore:create_react_agent has been moved")

MODES = ["values", "updates", "messages", "custom", "debug", "tasks", "checkpoints"]


def test_invoke(same: Any) -> None:
    outcome = same(two_stages, lambda graph: normal(graph.invoke(QUESTION, on_thread())))
    assert "2 assistant said: 1 user said: tell me something" in outcome


def test_ainvoke(same: Any) -> None:
    same(two_async_stages, lambda graph: normal(asyncio.run(graph.ainvoke(QUESTION, on_thread()))))


@pytest.mark.parametrize("mode", MODES)
def test_stream(same: Any, mode: str) -> None:
    events = same(two_stages, lambda graph: lines(graph.stream(QUESTION, on_thread(), stream_mode=mode)))
    assert len(events) >= (1 if mode == "custom" else 2)


@pytest.mark.parametrize("mode", MODES)
def test_astream(same: Any, mode: str) -> None:
    async def collect(graph: Graph) -> list[str]:
        return [normal(event) async for event in graph.astream(QUESTION, on_thread(), stream_mode=mode)]

    events = same(two_async_stages, lambda graph: asyncio.run(collect(graph)))
    assert len(events) >= (1 if mode == "custom" else 2)


def test_streamed_messages_are_tokens(same: Any) -> None:
    events = same(two_stages, lambda graph: lines(graph.stream(QUESTION, on_thread(), stream_mode="messages")))
    assert len(events) > 10, "one event a token, not one a message"


def test_all_modes_at_once_with_subgraphs(same: Any) -> None:
    def scenario(graph: Graph) -> list[str]:
        return lines(graph.stream(QUESTION, on_thread(), stream_mode=MODES, subgraphs=True))

    events = same(with_subgraph, scenario)
    assert any("('inner:<id>',)" in event for event in events)


def test_asynchronous_subgraphs(same: Any) -> None:
    async def collect(graph: Graph) -> list[str]:
        stream = graph.astream(QUESTION, on_thread(), stream_mode=["updates", "messages"], subgraphs=True)
        return [normal(event) async for event in stream]

    same(with_subgraph, lambda graph: asyncio.run(collect(graph)))


@pytest.mark.parametrize("build", [two_async_stages, with_subgraph, react_agent])
def test_astream_events(same: Any, build: Build) -> None:
    async def collect(graph: Graph) -> list[str]:
        return [normal(event) async for event in graph.astream_events(QUESTION, on_thread(), version="v2")]

    events = same(build, lambda graph: asyncio.run(collect(graph)))
    assert any("on_chat_model_stream" in event for event in events)


def test_fan_out(same: Any) -> None:
    topics = {"topics": ["one", "two", "three"], "answers": []}

    def scenario(graph: Graph) -> Any:
        streamed = sorted(lines(graph.stream(topics, on_thread("2"), stream_mode="updates")))
        return normal(graph.invoke(topics, on_thread())), streamed

    outcome, _ = same(fan_out, scenario)
    assert "1 user said: three" in outcome


def test_batch(same: Any) -> None:
    inputs = [{"messages": [("user", f"number {n}")]} for n in range(4)]
    configs = [on_thread(str(n)) for n in range(4)]
    same(two_stages, lambda graph: lines(graph.batch(inputs, configs)))


def test_abatch(same: Any) -> None:
    inputs = [{"messages": [("user", f"number {n}")]} for n in range(4)]
    configs = [on_thread(str(n)) for n in range(4)]
    same(two_async_stages, lambda graph: lines(asyncio.run(graph.abatch(inputs, configs))))


def test_threads(same: Any) -> None:
    def scenario(graph: Graph) -> list[str]:
        with ThreadPoolExecutor(6) as pool:
            return list(
                pool.map(
                    lambda n: normal(graph.invoke({"messages": [("user", f"number {n}")]}, on_thread(str(n)))),
                    range(12),
                )
            )

    same(two_stages, scenario)


def test_two_event_loops_at_once(engine: StubEngine, orla: Orla) -> None:
    def question(loop: int, number: int) -> Any:
        return {"messages": [("user", f"{loop} {number}")]}

    async def several(graph: Graph, loop: int) -> list[str]:
        async with asyncio.TaskGroup() as group:
            runs = [group.create_task(graph.ainvoke(question(loop, n), on_thread(f"{loop}-{n}"))) for n in range(5)]
        return [normal(run.result()) for run in runs]

    # The plain graph runs in one loop: a stock model's asynchronous client does not survive a second one.
    plain, wrapped = two_stages(engine), orla.wrap(two_async_stages(engine))
    expected = [
        [normal(plain.invoke(question(loop, n), on_thread(f"{loop}-{n}"))) for n in range(5)] for loop in (0, 1)
    ]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda loop: asyncio.run(several(wrapped, loop)), range(2))) == expected
    assert len(orla.records()) == 20


@pytest.mark.parametrize("build", [react_agent, agent])
def test_agents(same: Any, build: Build) -> None:
    def scenario(graph: Graph) -> Any:
        streamed = lines(graph.stream(QUESTION, on_thread("2"), stream_mode=["updates", "messages"]))
        return normal(graph.invoke(QUESTION, on_thread())), streamed

    outcome, _ = same(build, scenario)
    assert "sunny in tell me something" in outcome


def test_entrypoint_and_tasks(same: Any) -> None:
    def scenario(graph: Graph) -> Any:
        out = graph.invoke(["one", "two"], on_thread())
        return out, sorted(lines(graph.stream(["three"], on_thread(), stream_mode="updates")))

    outcome, _ = same(workflow, scenario)
    assert outcome == ["1 user said: one", "1 user said: two"]


class Form(BaseModel):
    """A state that is a pydantic model."""

    topic: str
    answer: str = ""


def pydantic_state(engine: StubEngine) -> Graph:
    llm = chat(engine)

    def answer(state: Form) -> Any:
        return {"answer": str(llm.invoke(state.topic).content)}

    return StateGraph(Form).add_node("answer", answer).add_edge(START, "answer").add_edge("answer", END).compile()


def test_pydantic_state_with_version_2(same: Any) -> None:
    def scenario(graph: Graph) -> Any:
        return normal(graph.invoke(Form(topic="x"), version="v2")), lines(
            graph.stream(Form(topic="x"), stream_mode="values", version="v2")
        )

    outcome, _ = same(pydantic_state, scenario)
    assert "Form(topic='x', answer='1 user said: x')" in outcome


def test_store(same: Any) -> None:
    def build(engine: StubEngine) -> Graph:
        llm = chat(engine)

        def remember(state: MessagesState) -> Any:
            said = llm.invoke(state["messages"])
            get_store().put(("notes",), "last", {"text": said.content})
            return {"messages": [said]}

        graph = StateGraph(MessagesState).add_node("remember", remember)
        return graph.add_edge(START, "remember").add_edge("remember", END).compile(store=InMemoryStore())

    def scenario(graph: Graph) -> Any:
        graph.invoke(QUESTION)
        return graph.store.get(("notes",), "last").value

    assert same(build, scenario) == {"text": "1 user said: tell me something"}


# ── state, interrupts, durability ────────────────────────────────────────────────────────────────────


def test_state_and_history(same: Any) -> None:
    def scenario(graph: Graph) -> Any:
        graph.invoke(QUESTION, on_thread())
        graph.update_state(on_thread(), {"messages": [("user", "and then")]}, as_node="draft")
        again = normal(graph.invoke(None, on_thread()))
        return again, normal(graph.get_state(on_thread())), lines(graph.get_state_history(on_thread()))

    _, _, history = same(two_stages, scenario)
    assert len(history) == 6


def test_going_back_in_time(same: Any) -> None:
    def scenario(graph: Graph) -> Any:
        graph.invoke(QUESTION, on_thread())
        before_review = next(s for s in graph.get_state_history(on_thread()) if s.next == ("review",))
        return normal(graph.invoke(None, before_review.config))

    same(two_stages, scenario)


def test_dynamic_interrupt_and_resume(same: Any) -> None:
    def scenario(graph: Graph) -> Any:
        stopped = lines(graph.stream(QUESTION, on_thread(), stream_mode=["values", "updates"]))
        waiting = normal(graph.get_state(on_thread()))
        resumed = normal(graph.invoke(Command(resume="go on"), on_thread()))
        return stopped, waiting, resumed

    stopped, _, resumed = same(asking, scenario)
    assert any("__interrupt__" in event for event in stopped)
    assert "1 user said: go on" in resumed


def test_asynchronous_interrupt_and_resume(same: Any) -> None:
    async def scenario(graph: Graph) -> Any:
        stopped = normal(await graph.ainvoke(QUESTION, on_thread()))
        return stopped, normal(await graph.ainvoke(Command(resume="go on"), on_thread()))

    same(asking, lambda graph: asyncio.run(scenario(graph)))


@pytest.mark.parametrize("where", [{"interrupt_before": ["review"]}, {"interrupt_after": ["draft"]}])
def test_static_interrupts(same: Any, where: dict[str, list[str]]) -> None:
    def scenario(graph: Graph) -> Any:
        stopped = normal(graph.invoke(QUESTION, on_thread(), **where))
        following = graph.get_state(on_thread()).next
        return stopped, following, normal(graph.invoke(None, on_thread()))

    _, following, _ = same(two_stages, scenario)
    assert following == ("review",)


def test_static_interrupt_given_to_compile(same: Any) -> None:
    def scenario(graph: Graph) -> Any:
        return normal(graph.invoke(QUESTION, on_thread())), normal(graph.invoke(None, on_thread()))

    same(lambda engine: two_stages(engine, interrupt_before=["review"]), scenario)


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_durability(same: Any, durability: Any) -> None:
    def scenario(graph: Graph) -> Any:
        out = normal(graph.invoke(QUESTION, on_thread(), durability=durability))
        return out, lines(graph.get_state_history(on_thread()))

    _, history = same(two_stages, scenario)
    assert len(history) == (1 if durability == "exit" else 4)


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────


def raised(run: Callable[[], Any]) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as caught:
        run()
    return type(caught.value), str(caught.value)


def test_a_nodes_own_exception(same: Any) -> None:
    def build(engine: StubEngine) -> Graph:
        def fail(state: MessagesState) -> Any:
            chat(engine).invoke("before the fall")
            raise LookupError("what is lost")

        return StateGraph(MessagesState).add_node("fail", fail).add_edge(START, "fail").compile()

    error, text = same(build, lambda graph: raised(lambda: graph.invoke(QUESTION)))
    assert (error, text) == (LookupError, "what is lost")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (404, openai.NotFoundError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_the_engine_answers_is_raised_as_it_was(
    same: Any, engine: StubEngine, status: int, kind: type[Exception], asynchronous: bool
) -> None:
    engine.rule = lambda seen: Reply(status=status)
    if asynchronous:
        error, text = same(two_async_stages, lambda g: raised(lambda: asyncio.run(g.ainvoke(QUESTION, on_thread()))))
    else:
        error, text = same(two_stages, lambda g: raised(lambda: g.invoke(QUESTION, on_thread())))
    assert issubclass(error, kind) and f"the stub answers {status}" in text


@pytest.mark.parametrize("status", [429, 500])
def test_the_models_retries_are_kept(same: Any, engine: StubEngine, status: int) -> None:
    answered = {"n": 0}

    def every_third(seen: Seen) -> Reply:
        answered["n"] += 1
        return Reply() if answered["n"] % 3 == 0 else Reply(status=status, headers=(("retry-after", "0.01"),))

    engine.rule = every_third

    def build(engine: StubEngine) -> Graph:
        llm = chat(engine, max_retries=2)
        graph = StateGraph(MessagesState).add_node("ask", lambda s: {"messages": [llm.invoke(s["messages"])]})
        return graph.add_edge(START, "ask").add_edge("ask", END).compile()

    assert "1 user said" in same(build, lambda graph: normal(graph.invoke(QUESTION)))
    assert answered["n"] == 6, "three requests each"


def test_garbage_and_broken_streams(same: Any, engine: StubEngine) -> None:
    engine.rule = lambda seen: Reply(fault="garbage")
    same(two_stages, lambda graph: raised(lambda: graph.invoke(QUESTION, on_thread())))
    engine.requests.clear()
    engine.rule = lambda seen: Reply(fault="cut")
    same(two_stages, lambda graph: raised(lambda: list(graph.stream(QUESTION, on_thread(), stream_mode="messages"))))


def test_a_retry_policy_of_the_graph(same: Any, engine: StubEngine) -> None:
    failed = {"n": 0}

    def every_second(seen: Seen) -> Reply:
        failed["n"] += 1
        return Reply(status=500) if failed["n"] % 2 else Reply()

    engine.rule = every_second

    def build(engine: StubEngine) -> Graph:
        llm = chat(engine)
        policy = RetryPolicy(initial_interval=0.01, jitter=False, retry_on=openai.InternalServerError)
        graph = StateGraph(MessagesState)
        graph.add_node("ask", lambda state: {"messages": [llm.invoke(state["messages"])]}, retry_policy=policy)
        return graph.add_edge(START, "ask").add_edge("ask", END).compile()

    assert "1 user said" in same(build, lambda graph: normal(graph.invoke(QUESTION)))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_only_an_engine_that_cannot_be_reached_is_our_error(
    engine: StubEngine, orla: Orla, asynchronous: bool
) -> None:
    plain = two_stages(engine)
    wrapped = orla.wrap(plain)
    engine.refuse()

    def run(graph: Graph) -> Any:
        if asynchronous:
            return asyncio.run(graph.ainvoke(QUESTION, on_thread()))
        return graph.invoke(QUESTION, on_thread())

    with pytest.raises(openai.APIConnectionError):
        run(plain)
    with pytest.raises(BackendUnavailable, match="'main'"):
        run(wrapped)


# ── the object itself ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("build", [two_stages, with_subgraph, react_agent, workflow])
def test_drawing_and_schemas(same: Any, build: Build) -> None:
    def scenario(graph: Graph) -> Any:
        drawn = graph.get_graph(xray=True).draw_mermaid()
        subgraphs = [name for name, _ in graph.get_subgraphs(recurse=True)]
        schemas = graph.get_input_jsonschema(), graph.get_output_jsonschema()
        return type(graph), graph.get_name(), drawn, subgraphs, schemas, [spec.id for spec in graph.config_specs]

    same(build, scenario, calls=False)


def test_with_config_on_either_side(engine: StubEngine, orla: Orla) -> None:
    plain = two_stages(engine).with_config(tags=["mine"], recursion_limit=7, metadata={"who": "me"})
    before, after = orla.wrap(plain), orla.wrap(two_stages(engine)).with_config(plain.config)
    assert before.config == after.config == plain.config
    for graph in (before, after):
        assert (graph.config["tags"], graph.config["recursion_limit"]) == (["mine"], 7)
        assert graph.config["metadata"]["who"] == "me"
        graph.invoke(QUESTION, on_thread())
    assert len(orla.records()) == 4


class Counting(BaseCallbackHandler):
    """Counts the chains that it hears of."""

    def __init__(self) -> None:
        self.chains = 0

    def on_chain_start(self, *args: Any, **kwargs: Any) -> None:
        self.chains += 1


def test_the_callers_callbacks_hear_what_they_heard(engine: StubEngine, orla: Orla) -> None:
    heard = {}
    for wrapped in (False, True):
        listed, inherited, local = Counting(), Counting(), Counting()
        manager = CallbackManager(handlers=[inherited, local], inheritable_handlers=[inherited])
        for config in ({"callbacks": [listed]}, {"callbacks": manager}):
            graph = two_stages(engine).with_config(config)
            (orla.wrap(graph) if wrapped else graph).invoke(QUESTION, on_thread())
        assert not any(isinstance(each, GraphEvents) for each in manager.handlers)
        heard[wrapped] = (listed.chains, inherited.chains, local.chains)
    assert heard[True] == heard[False]
    assert heard[True][1] > heard[True][2] == 1, "what was not inherited is not inherited now"


def test_the_callers_graph_is_untouched(engine: StubEngine, orla: Orla) -> None:
    mine = [Counting()]
    graph = two_stages(engine).with_config(callbacks=mine, tags=["t"])
    config, saver, nodes = graph.config, graph.checkpointer, graph.nodes
    kept = dict(config)
    wrapped = orla.wrap(graph)
    assert wrapped is not graph
    assert graph.config is config and config == kept
    assert graph.checkpointer is saver and type(saver) is InMemorySaver
    assert graph.nodes is nodes and len(mine) == 1
    graph.invoke(QUESTION, on_thread())
    assert not orla.records()
    assert {seen.key for seen in engine.chats} == {CALLER_KEY}


def test_a_state_graph_is_compiled(engine: StubEngine, orla: Orla) -> None:
    graph = StateGraph(MessagesState).add_node("ask", lambda s: {"messages": [chat(engine).invoke(s["messages"])]})
    graph.add_edge(START, "ask")
    assert "1 user said" in normal(orla.wrap(graph).invoke(QUESTION))


def test_what_is_no_graph_is_refused(orla: Orla) -> None:
    with pytest.raises(OrlaError, match="expected a StateGraph or a compiled LangGraph graph, got dict"):
        orla.wrap({})


def test_wrapping_twice_is_wrapping_once(engine: StubEngine, orla: Orla) -> None:
    once = orla.wrap(two_stages(engine))
    twice = orla.wrap(once)
    assert len(handlers_of(twice)) == 1
    assert isinstance(twice.checkpointer, BaseCheckpointSaver)
    assert type(twice.checkpointer.inner) is InMemorySaver
    twice.invoke(QUESTION, on_thread())
    assert len(orla.records()) == len(engine.chats) == 2


def test_wrapping_twice_keeps_what_the_first_narrowed(engine: StubEngine, make_orla: Any) -> None:
    orla = make_orla(at(engine), at(engine, "second"), mapper={"*": "main"})
    graph = orla.wrap(orla.wrap(two_stages(engine), mapper={"review": "second"}))
    graph.invoke(QUESTION, on_thread())
    assert [record.backend for record in orla.records()] == ["main", "second"]


def test_snapshots_carry_nothing_of_ours(engine: StubEngine, same: Any) -> None:
    """An application stores a snapshot's configuration, and replays with it."""

    def scenario(graph: Graph) -> Any:
        graph.invoke(QUESTION, on_thread())
        kept = json.dumps(graph.get_state(on_thread()).config)
        at_start = list(graph.get_state_history(on_thread()))[-2]
        again = graph.invoke(None, graph.get_state(at_start.config).config)
        updated = graph.update_state(on_thread(), {"messages": [("user", "and then")]}, as_node="draft")
        configs = [graph.get_state(on_thread()).config, at_start.config, at_start.parent_config, updated]
        nowhere = graph.get_state(on_thread("another")).config
        return normal([json.loads(kept), configs, nowhere, graph.config, again])

    same(two_stages, scenario)


def test_states_of_subgraphs_carry_nothing_of_ours(engine: StubEngine, same: Any) -> None:
    def scenario(graph: Graph) -> Any:
        graph.invoke(QUESTION, on_thread())
        inner = [state for state in graph.get_state_history(on_thread()) if state.next == ("inner",)]
        below = graph.get_state(inner[0].config, subgraphs=True)
        return normal([below, json.dumps(below.config), json.dumps(below.tasks[0].state.config)])

    same(with_subgraph, scenario)


def test_a_replay_hears_each_chain_once(engine: StubEngine, orla: Orla) -> None:
    graph = orla.wrap(two_stages(engine))
    graph.invoke(QUESTION, on_thread())
    seen: list[Any] = []
    orla.subscribe(lambda event: seen.append((event.kind, event.stage)))
    before_review = next(s for s in graph.get_state_history(on_thread()) if s.next == ("review",))
    graph.invoke(None, graph.get_state(before_review.config).config)
    assert seen.count(("node entered", "review")) + seen.count(("node_entered", "review")) == 1
    assert orla.statistics().workflows.outcomes == {"done": 2}
    assert len(orla.records()) == 3


@pytest.mark.parametrize("copied", [copy.copy, lambda graph: graph.copy(), lambda g: g.with_config()])
def test_a_copy_is_a_wrapped_graph_of_its_own(engine: StubEngine, orla: Orla, copied: Any) -> None:
    def build() -> Graph:
        graph = StateGraph(MessagesState).add_node(
            "ask", lambda s: {"messages": [chat(engine).invoke(s["messages"])]}
        )
        return graph.add_edge(START, "ask").compile(checkpointer=InMemorySaver())

    wrapped = orla.wrap(build())
    other = copied(wrapped)
    assert type(other) is type(wrapped)
    assert vars(other).keys() - vars(copied(build())).keys() == {"_orla_handlers"}
    other.name = "other"
    assert wrapped.name != "other"
    assert "1 user said" in normal(other.invoke(QUESTION, on_thread()))
    assert [record.stage for record in orla.records()] == ["ask"]
    assert {seen.key for seen in engine.chats} == {BACKEND_KEY}


def test_deep_copies(engine: StubEngine, orla: Orla) -> None:
    """LangGraph's copy does not run, wrapped or not: its sentinels are copied too. It can be made and read."""
    wrapped = orla.wrap(two_stages(engine).with_config(tags=["t"]))
    other = copy.deepcopy(wrapped)
    assert type(other) is type(wrapped) and other.config == wrapped.config == {"tags": ["t"], "configurable": {}}
    assert other.nodes.keys() == wrapped.nodes.keys() and other.checkpointer is not wrapped.checkpointer
    assert handlers_of(other) == handlers_of(wrapped)
    assert copy.deepcopy(wrapped.config) == wrapped.config


def test_what_is_pickled_holds_no_orla(engine: StubEngine, orla: Orla) -> None:
    """An Orla belongs to its process; LangGraph's own graphs are pickled by value where at all."""
    handlers = handlers_of(orla.wrap(two_stages(engine)))
    assert len(handlers) == 1 and pickle.loads(pickle.dumps(handlers)) == ()
    assert type(pickle.loads(pickle.dumps(handlers[0]))) is BaseCallbackHandler


def test_the_configuration_in_a_node_can_be_copied(engine: StubEngine, same: Any) -> None:
    """Its callbacks hold our handler, as they hold every tracer: a copy shares it."""

    def build(engine: StubEngine) -> Graph:
        llm = chat(engine)

        def ask(state: MessagesState, config: RunnableConfig) -> Any:
            mine = copy.deepcopy({key: config[key] for key in ("callbacks", "metadata")})
            pickle.dumps(mine["callbacks"].handlers)
            return {"messages": [llm.invoke(state["messages"], {**config, **mine})]}

        return StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask").compile()

    same(build, lambda graph: normal(graph.invoke(QUESTION)))


def test_what_its_user_set_on_a_graph_is_kept(engine: StubEngine, orla: Orla) -> None:
    graph = two_stages(engine)
    graph.owner = "me"
    wrapped = orla.wrap(orla.wrap(graph))
    assert wrapped.owner == "me" and not hasattr(two_stages(engine), "owner")
    assert wrapped.nodes is not graph.nodes


def test_langgraph_is_as_it_was_after_the_last_close(engine: StubEngine, make_orla: Any) -> None:
    kept = [vars(Pregel)[name] for name in ("stream", "astream", "copy")]
    first, second = make_orla(at(engine)), make_orla(at(engine))
    wrapped = [each.wrap(two_stages(engine)) for each in (first, second)]
    assert [vars(Pregel)[name] for name in ("stream", "astream", "copy")] != kept
    assert inspect.signature(Pregel.stream) == inspect.signature(kept[0])
    first.close()
    assert vars(Pregel)["stream"] is not kept[0]
    second.close()
    assert [vars(Pregel)[name] for name in ("stream", "astream", "copy")] == kept
    assert all("1 user said" in normal(graph.invoke(QUESTION, on_thread())) for graph in wrapped)


@pytest.mark.parametrize("build", [two_stages, two_async_stages])
def test_whatever_callbacks_an_invocation_has(engine: StubEngine, orla: Orla, build: Build) -> None:
    graph = orla.wrap(build(engine))
    mine = Counting()
    manager = (CallbackManager if build is two_stages else AsyncCallbackManager)([mine], inheritable_handlers=[mine])
    for number, callbacks in enumerate([None, [], [mine], manager]):
        config = {**on_thread(str(number)), "callbacks": callbacks}
        if build is two_stages:
            graph.invoke(QUESTION, config)
            list(graph.stream(QUESTION, on_thread(f"{number}s"), stream_mode="messages"))
        else:
            asyncio.run(graph.ainvoke(QUESTION, config))
    assert mine.chains and not any(isinstance(each, GraphEvents) for each in manager.handlers)
    assert {seen.key for seen in engine.chats} == {BACKEND_KEY}
    with pytest.raises(Exception, match=r"callbacks|iterable|attribute"):
        two_stages(engine).invoke(QUESTION, {**on_thread("x"), "callbacks": 5})
    with pytest.raises(Exception, match=r"callbacks|iterable|attribute"):
        orla.wrap(two_stages(engine)).invoke(QUESTION, {**on_thread("x"), "callbacks": 5})


# ── wrapped graphs inside others ─────────────────────────────────────────────────────────────────────


def nested(inner: Graph, *, as_node: bool) -> Graph:
    def calling(state: MessagesState) -> Any:
        return {"messages": inner.invoke({"messages": state["messages"]})["messages"][-1:]}

    graph = StateGraph(MessagesState).add_node("outer", inner if as_node else calling)
    return graph.add_edge(START, "outer").add_edge("outer", END).compile(checkpointer=InMemorySaver())


@pytest.mark.parametrize("as_node", [True, False])
def test_wrapped_inside_wrapped_of_the_same_orla(engine: StubEngine, orla: Orla, as_node: bool) -> None:
    def scenario(graph: Graph) -> list[str]:
        return lines(graph.stream(QUESTION, on_thread(), stream_mode=["updates", "messages"], subgraphs=True))

    plain = scenario(nested(two_stages(engine, checkpointer=None), as_node=as_node))
    wrapped = orla.wrap(nested(orla.wrap(two_stages(engine, checkpointer=None)), as_node=as_node))
    assert scenario(wrapped) == plain
    records = orla.records()
    assert [record.stage for record in records] == ["outer|draft", "outer|review"]
    assert {record.workflow for record in records} == {"1"} and len({record.run for record in records}) == 1
    assert orla.statistics().workflows.outcomes == {"done": 1}, "one run, seen by two handlers"


@pytest.mark.parametrize("as_node", [True, False])
def test_the_innermost_orla_serves_direct_calls(engine: StubEngine, make_orla: Any, as_node: bool) -> None:
    outer = make_orla(at(engine, "out", api_key="outer-key"), mapper={"*": "out"})
    inner = make_orla(at(engine, "in", api_key="inner-key"), mapper={"*": "in"})
    client = openai.OpenAI(base_url=engine.url, api_key=CALLER_KEY, max_retries=0)

    def ask(state: MessagesState) -> None:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])

    def around(state: MessagesState) -> None:
        ask(state)
        leaf.invoke(state)

    leaf = inner.wrap(StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask").compile())
    graph = StateGraph(MessagesState).add_node("around", leaf if as_node else around).add_edge(START, "around")
    outer.wrap(graph.compile()).invoke(QUESTION)
    assert [seen.key for seen in engine.chats] == (["inner-key"] if as_node else ["outer-key", "inner-key"])


@pytest.mark.parametrize("as_node", [True, False])
def test_the_innermost_orla_serves(engine: StubEngine, make_orla: Any, as_node: bool) -> None:
    outer = make_orla(at(engine, "out", api_key="outer-key"), mapper={"*": "out"})
    inner = make_orla(at(engine, "in", api_key="inner-key"), mapper={"*": "in"})
    graph = outer.wrap(nested(inner.wrap(two_stages(engine, checkpointer=None)), as_node=as_node))
    graph.invoke(QUESTION, on_thread())
    assert {seen.key for seen in engine.chats} == {"inner-key"}
    assert (len(inner.records()), len(outer.records())) == (2, 0)
    assert {(r.workflow, r.stage) for r in inner.records()} == {("1", "outer|draft"), ("1", "outer|review")}


def test_a_model_used_before_wrapping_is_intercepted_after(engine: StubEngine, orla: Orla) -> None:
    llm, client = chat(engine), openai.OpenAI(base_url=engine.url, api_key=CALLER_KEY, max_retries=0)
    raw = client.chat.completions.with_raw_response
    kept = client.chat.completions.create
    messages: Any = [{"role": "user", "content": "x"}]

    def ask(state: MessagesState) -> Any:
        said = raw.create(model="m", messages=messages).parse().choices[0].message.content
        kept(model="m", messages=messages)
        return {"messages": [llm.invoke(state["messages"]), ("ai", said)]}

    graph = StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask").compile()
    graph.invoke(QUESTION)
    assert {seen.key for seen in engine.chats} == {CALLER_KEY}
    engine.requests.clear()
    orla.wrap(graph).invoke(QUESTION)
    assert [seen.key for seen in engine.chats] == [BACKEND_KEY] * 3


# ── the run of a model ───────────────────────────────────────────────────────────────────────────────


class Heard(BaseCallbackHandler):
    """A handler of the user's, which hears the tokens of every model."""

    def __init__(self) -> None:
        self.tokens = 0

    def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        self.tokens += 1


@pytest.mark.parametrize("form", ["invoke", "ainvoke", "stream", "astream"])
async def test_the_run_of_a_model_carries_the_users_handlers_and_not_ours(
    form: str, engine: StubEngine, orla: Orla, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LangChain asks each of them at each token, and an async run yields to its loop for that."""
    model, carried = chat(engine), list[list[BaseCallbackHandler]]()
    for kind in (CallbackManagerForLLMRun, AsyncCallbackManagerForLLMRun):

        def ended(self: Any, *args: Any, _ended: Any = kind.on_llm_end, **kwargs: Any) -> Any:
            carried.append(self.handlers)
            return _ended(self, *args, **kwargs)

        monkeypatch.setattr(kind, "on_llm_end", ended)

    async def ask(state: MessagesState) -> Any:
        asked = state["messages"]
        match form:
            case "invoke":
                answers = [model.invoke(asked)]
            case "ainvoke":
                answers = [await model.ainvoke(asked)]
            case "stream":
                answers = list(model.stream(asked))
            case _:
                answers = [chunk async for chunk in model.astream(asked)]
        return {"messages": answers[-1:]}

    theirs = Heard()
    graph = orla.wrap(StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask").compile())
    await graph.ainvoke(cast("Any", QUESTION), {"callbacks": [theirs]})
    assert carried == [[theirs]]
    assert (theirs.tokens > 0) is ("stream" in form)
    assert [(record.stage, record.external) for record in orla.records()] == [("ask", False)]
