"""Whatever code in a node does to callbacks, configuration and context: the call is the node's, and is served.

One table of the ways in which LangChain's context can be replaced. Each runs in a bare and in a wrapped graph, with a
LangChain model and with the raw SDK inside: the wrapped one serves the call as its node's, answers the same, and the
caller's own handler hears the same.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import (
    AsyncCallbackManager,
    BaseCallbackHandler,
    CallbackManager,
    get_usage_metadata_callback,
)
from langchain_core.callbacks.manager import trace_as_chain_group
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import (
    Runnable,
    RunnableBranch,
    RunnableConfig,
    RunnableGenerator,
    RunnableLambda,
    RunnableParallel,
    RunnablePassthrough,
)
from langchain_core.runnables.config import ContextThreadPoolExecutor, run_in_executor, var_child_runnable_config
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.tools import tool
from langchain_core.tracers.context import collect_runs
from langgraph.config import get_config
from langgraph.func import entrypoint, task
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.runtime import get_runtime
from langgraph.types import Send
from pydantic import BaseModel

from orla_lg import ChatOrla, Hints, Limit, Limits, Orla
from orla_lg.errors import BudgetExceeded
from orla_lg.graph.execution import handlers_of
from tests.conftest import BACKEND_KEY, CALLER_KEY, at, chat
from tests.stub_engine import StubEngine

SAID = "1 user said: hello"
THREAD = {"configurable": {"thread_id": "t"}}


class Heard(BaseCallbackHandler):
    """A tracing handler, as applications hand one to a chain."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_chain_start(self, serialized: Any, inputs: Any, **kwargs: Any) -> None:
        self.events.append(f"chain {kwargs.get('name')}")

    def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        self.events.append("model")

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.events.append("answer")

    def on_chain_error(self, error: BaseException, **kwargs: Any) -> None:
        self.events.append(f"error {error!r}")


class City(BaseModel):
    """A city."""

    name: str
    people: int


@pytest.fixture
def theirs(other_engine: StubEngine) -> StubEngine:
    """The server that the application's code names."""
    return other_engine


# ── what is inside the chain ─────────────────────────────────────────────────────────────────────────


def _model(theirs: StubEngine) -> Runnable[Any, str]:
    return chat(theirs, model="gpt-x") | StrOutputParser()


def _sdk(theirs: StubEngine) -> Runnable[Any, str]:
    client = openai.OpenAI(base_url=theirs.url, api_key=CALLER_KEY, max_retries=0)
    aclient = openai.AsyncOpenAI(base_url=theirs.url, api_key=CALLER_KEY, max_retries=0)

    def ask(text: Any) -> str:
        messages: Any = [{"role": "user", "content": str(text)}]
        return str(client.chat.completions.create(model="gpt-x", messages=messages).choices[0].message.content)

    async def aask(text: Any) -> str:
        messages: Any = [{"role": "user", "content": str(text)}]
        answer = await aclient.chat.completions.create(model="gpt-x", messages=messages)
        return str(answer.choices[0].message.content)

    return RunnableLambda(ask, aask)


INSIDE: dict[str, Callable[[StubEngine], Runnable[Any, str]]] = {"model": _model, "SDK": _sdk}

# ── the configurations that code hands down ──────────────────────────────────────────────────────────

CONFIGS: dict[str, Callable[[Heard, RunnableConfig], Any]] = {
    "none": lambda h, c: None,
    "callbacks": lambda h, c: {"callbacks": [h]},
    "no callbacks": lambda h, c: {"callbacks": []},
    "a manager": lambda h, c: {"callbacks": CallbackManager([h], inheritable_handlers=[h])},
    "an asynchronous manager": lambda h, c: {"callbacks": AsyncCallbackManager([h], inheritable_handlers=[h])},
    "the node's": lambda h, c: c,
    "the node's with callbacks": lambda h, c: {**c, "callbacks": [h]},
    "the node's handlers in a list": lambda h, c: {"callbacks": [h, *getattr(c["callbacks"], "handlers", [])]},
    "metadata": lambda h, c: {"metadata": {"user": "u"}},
    "callbacks and metadata": lambda h, c: {"callbacks": [h], "metadata": {"user": "u"}},
    "callbacks and configurable": lambda h, c: {"callbacks": [h], "configurable": {"session_id": "s"}},
    "everything": lambda h, c: {
        "callbacks": [h], "metadata": {"user": "u"}, "configurable": {"session_id": "s"}, "tags": ["x"],
        "run_name": "mine", "recursion_limit": 3, "max_concurrency": 1,
    },
}  # fmt: skip


def _in_history(chain: Runnable[Any, str]) -> Runnable[Any, Any]:
    talk: Any = RunnableLambda(lambda messages: messages[-1].content) | chain | (lambda text: AIMessage(text))
    kept = InMemoryChatMessageHistory()
    configured = RunnableWithMessageHistory(talk, lambda session_id: kept).with_config(
        configurable={"session_id": "s"}
    )
    return RunnableLambda(lambda text: [HumanMessage(text)]) | configured | (lambda message: message.content)


def _in_a_graph(chain: Runnable[Any, str]) -> Runnable[Any, Any]:
    graph = StateGraph(MessagesState).add_node("leaf", RunnableLambda(lambda state: "hello") | chain | _as_messages)
    inner = graph.add_edge(START, "leaf").compile()
    return RunnableLambda(lambda text: {"messages": []}) | inner | (lambda state: state["messages"][-1].content)


def _as_messages(text: str) -> Any:
    return {"messages": [AIMessage(text)]}


def _in_a_tool(chain: Runnable[Any, str]) -> Runnable[Any, Any]:
    return RunnableLambda(lambda text: {"text": text}) | chain.as_tool(
        name="asking", description="Ask.", arg_types={"text": str}
    )


def _as_input(chain: Runnable[Any, str]) -> Runnable[Any, str]:
    return RunnableLambda(lambda given: given["text"]) | chain


def _called(chain: Runnable[Any, str]) -> Runnable[Any, Any]:
    async def acall(text: str) -> str:
        return str(await chain.ainvoke(text))

    return RunnableLambda(lambda text: chain.invoke(text), acall)


def _generated(chain: Runnable[Any, str]) -> Runnable[Any, Any]:
    def generate(texts: Iterator[Any]) -> Iterator[Any]:
        for text in texts:
            yield chain.invoke(text)

    async def agenerate(texts: Any) -> Any:
        async for text in texts:
            yield await chain.ainvoke(text)

    return RunnableGenerator(generate, agenerate)


SHAPES: dict[str, Callable[[Runnable[Any, str]], Runnable[Any, Any]]] = {
    "alone": lambda chain: chain,
    "sequence": lambda chain: RunnablePassthrough() | chain,
    "prompt": lambda chain: (
        ChatPromptTemplate.from_template("{text}").with_config(run_name="p")
        | (lambda p: p.messages[0].content)
        | chain
    ),
    "retry": lambda chain: chain.with_retry(stop_after_attempt=2),
    "fallbacks": lambda chain: RunnableLambda(_failing).with_fallbacks([chain]),
    "parallel": lambda chain: RunnableParallel(a=chain) | (lambda both: both["a"]),
    "assign": lambda chain: (
        RunnableParallel(x=RunnablePassthrough()).assign(a=RunnableLambda(lambda d: d["x"]) | chain)
        | (lambda both: both["a"])
    ),
    "branch": lambda chain: RunnableBranch((lambda text: True, chain), chain),
    "each": lambda chain: RunnableLambda(lambda text: [text]) | chain.map() | (lambda texts: texts[0]),
    "function": _called,
    "generator": _generated,
    "history": _in_history,
    "plain graph": _in_a_graph,
    "tool": lambda chain: _in_a_tool(_as_input(chain)),
    "listeners": lambda chain: chain.with_listeners(on_start=lambda run: None),
}


def _failing(text: str) -> str:
    raise ConnectionError(text)


FORMS: dict[str, Callable[[Runnable[Any, Any], Any], Any]] = {
    "invoke": lambda chain, config: chain.invoke("hello", config),
    "stream": lambda chain, config: "".join(chain.stream("hello", config)),
    "batch": lambda chain, config: chain.batch(["hello"], config)[0],
    "batch as completed": lambda chain, config: next(chain.batch_as_completed(["hello"], config))[1],
    "transform": lambda chain, config: "".join(chain.transform(iter(["hello"]), config)),
    "with_config": lambda chain, config: chain.with_config(config or {}).invoke("hello"),
    "bound twice": lambda chain, config: chain.with_config(config or {}).with_config(tags=["y"]).invoke("hello"),
}


async def _astream(chain: Runnable[Any, Any], config: Any) -> str:
    return "".join([part async for part in chain.astream("hello", config)])


async def _abatch(chain: Runnable[Any, Any], config: Any) -> Any:
    return (await chain.abatch(["hello"], config))[0]


async def _aevents(chain: Runnable[Any, Any], config: Any) -> Any:
    events = [event async for event in chain.astream_events("hello", config, version="v2")]
    return events[-1]["data"]["output"]


async def _awith_config(chain: Runnable[Any, Any], config: Any) -> Any:
    return await chain.with_config(config or {}).ainvoke("hello")


AFORMS: dict[str, Callable[[Runnable[Any, Any], Any], Awaitable[Any]]] = {
    "ainvoke": lambda chain, config: chain.ainvoke("hello", config),
    "astream": _astream,
    "abatch": _abatch,
    "astream_events": _aevents,
    "with_config, awaited": _awith_config,
}

WAYS = [
    *((config, "sequence", form) for config in CONFIGS for form in ("invoke", "ainvoke")),
    *(("callbacks", shape, form) for shape in SHAPES for form in ("invoke", "ainvoke") if shape != "sequence"),
    *(("everything", shape, "invoke") for shape in SHAPES if shape != "sequence"),
    *(("callbacks", "sequence", form) for form in [*FORMS, *AFORMS] if form not in ("invoke", "ainvoke")),
]


def _node(body: Callable[[RunnableConfig], Any]) -> Any:
    """Return a graph whose node ``ask`` runs *body*, and what that returned."""
    results: list[Any] = []

    def ask(state: MessagesState, config: RunnableConfig) -> None:
        results.append(body(config))

    async def aask(state: MessagesState, config: RunnableConfig) -> None:
        results.append(await body(config))

    node: Any = aask if asyncio.iscoroutinefunction(body) else ask
    return StateGraph(MessagesState).add_node("ask", node).add_edge(START, "ask").compile(), results


def served(orla: Orla, engine: StubEngine, theirs: StubEngine, stage: str = "ask") -> None:
    """Assert that one call was made, and served as that of the node."""
    assert not theirs.requests, "nothing may reach the server that the code names"
    assert [seen.key for seen in engine.chats] == [BACKEND_KEY]
    (record,) = orla.records()
    assert (record.workflow, record.stage, record.external) == ("t", stage, False)
    assert record.run is not None and record.step == 1
    assert orla.statistics().unidentified == 0
    assert orla.statistics().workflows.outcomes == {"done": 1}


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize(("handed", "shape", "form"), WAYS)
def test_a_chain_in_a_node(
    engine: StubEngine, theirs: StubEngine, orla: Orla, inside: str, handed: str, shape: str, form: str
) -> None:
    outcomes = {}
    for wrapped in (False, True):
        heard = Heard()
        chain = SHAPES[shape](INSIDE[inside](theirs))

        def ask(config: RunnableConfig, chain: Any = chain, heard: Heard = heard) -> Any:
            return FORMS[form](chain, CONFIGS[handed](heard, config))

        async def aask(config: RunnableConfig, chain: Any = chain, heard: Heard = heard) -> Any:
            return await AFORMS[form](chain, CONFIGS[handed](heard, config))

        graph, results = _node(ask if form in FORMS else aask)
        graph = orla.wrap(graph) if wrapped else graph
        if form in FORMS:
            graph.invoke({"messages": []}, THREAD)
        else:
            asyncio.run(graph.ainvoke({"messages": []}, THREAD))
        outcomes[wrapped] = results, heard.events
        if not wrapped:
            assert [seen.key for seen in theirs.chats] == [CALLER_KEY]
            theirs.requests.clear()
    assert outcomes[True] == outcomes[False]
    assert outcomes[True][0] == [SAID]
    # LangGraph begins namespaces anew where its configurable is replaced; the stage lies in the node all the same.
    served(orla, engine, theirs, "ask|leaf" if shape == "plain graph" else "ask")


# ── the contexts that code runs in ───────────────────────────────────────────────────────────────────

Call = Callable[[], Any]


def _in_a_pool(call: Call, config: RunnableConfig) -> Any:
    with ContextThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def _in_a_thread_handed_the_context(call: Call, config: RunnableConfig) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(contextvars.copy_context().run, call).result()


def _without_its_config(call: Call, config: RunnableConfig) -> Any:
    var_child_runnable_config.set(None)
    return call()


def _with_hooked_handlers(call: Call, config: RunnableConfig) -> Any:
    with get_usage_metadata_callback() as used, collect_runs():
        said = call()
    assert used is not None
    return said


CONTEXTS: dict[str, Callable[[Call, RunnableConfig], Any]] = {
    "a copied context": lambda call, config: contextvars.copy_context().run(call),
    "a pool with context": _in_a_pool,
    "a thread handed the context": _in_a_thread_handed_the_context,
    "without its config": _without_its_config,
    "handlers of hooks": _with_hooked_handlers,
}


async def _in_an_executor(call: Call, config: RunnableConfig) -> Any:
    return await run_in_executor(None, call)


async def _in_a_task(call: Call, config: RunnableConfig) -> Any:
    async def later() -> Any:
        await asyncio.sleep(0)
        return call()

    async with asyncio.TaskGroup() as group:
        return await group.create_task(later())


async def _in_another_thread(call: Call, config: RunnableConfig) -> Any:
    return await asyncio.to_thread(call)


ACONTEXTS: dict[str, Callable[[Call, RunnableConfig], Awaitable[Any]]] = {
    "an executor of LangChain": _in_an_executor,
    "a task": _in_a_task,
    "a thread, awaited": _in_another_thread,
}


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("context", [*CONTEXTS, *ACONTEXTS])
def test_a_chain_in_another_context(
    engine: StubEngine, theirs: StubEngine, orla: Orla, inside: str, context: str
) -> None:
    chain = RunnablePassthrough() | INSIDE[inside](theirs)

    def call() -> Any:
        return chain.invoke("hello", {"callbacks": [Heard()]})

    async def aask(config: RunnableConfig) -> Any:
        return await ACONTEXTS[context](call, config)

    graph, results = _node((lambda config: CONTEXTS[context](call, config)) if context in CONTEXTS else aask)
    asyncio.run(orla.wrap(graph).ainvoke({"messages": []}, THREAD))
    assert results == [SAID]
    served(orla, engine, theirs)


@pytest.mark.parametrize("inside", INSIDE)
def test_a_bare_thread_whose_chain_has_the_nodes_metadata(
    engine: StubEngine, theirs: StubEngine, orla: Orla, inside: str
) -> None:
    """The checkpoint namespace names one execution of one node, so nothing is guessed."""
    chain = RunnablePassthrough() | INSIDE[inside](theirs)

    def ask(config: RunnableConfig) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(chain.invoke, "hello", {**config, "callbacks": [Heard()]}).result()

    graph, results = _node(ask)
    orla.wrap(graph).invoke({"messages": []}, THREAD)
    assert results == [SAID]
    served(orla, engine, theirs)


def test_a_chain_group(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    chain = RunnablePassthrough() | _sdk(theirs)

    def ask(config: RunnableConfig) -> Any:
        with trace_as_chain_group("together") as manager:
            return chain.invoke("hello", {"callbacks": manager})

    graph, results = _node(ask)
    orla.wrap(graph).invoke({"messages": []}, THREAD)
    assert results == [SAID]
    served(orla, engine, theirs)


def test_a_task_that_goes_on_after_its_node(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    chain = RunnablePassthrough() | _sdk(theirs)
    tasks: list[asyncio.Task[Any]] = []
    over = asyncio.Event()

    async def later() -> Any:
        await over.wait()
        return await chain.ainvoke("hello", {"callbacks": [Heard()]})

    async def ask(state: MessagesState) -> None:
        tasks.append(asyncio.create_task(later()))  # noqa: TID251 — as applications do

    async def wait(state: MessagesState) -> None:
        over.set()
        await tasks[0]

    graph = StateGraph(MessagesState).add_node("ask", ask).add_node("wait", wait)
    graph.add_edge(START, "ask").add_edge("ask", "wait")
    asyncio.run(orla.wrap(graph).ainvoke({"messages": []}, THREAD))
    served(orla, engine, theirs)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_after_its_graph_a_context_is_as_before(
    engine: StubEngine, theirs: StubEngine, orla: Orla, asynchronous: bool
) -> None:
    """LangGraph runs a lone node in its caller's own context, and a passing model leaves its run unasked for."""
    passing = GenericFakeChatModel(messages=iter([AIMessage("x"), AIMessage("y")]))
    chain = RunnablePassthrough() | _sdk(theirs)
    heard = Heard()

    async def ask(state: MessagesState) -> None:
        await passing.ainvoke("hello")

    async def around() -> None:
        graph = orla.wrap(StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask"))
        if asynchronous:
            await graph.ainvoke({"messages": []}, THREAD)
        else:
            sync = StateGraph(MessagesState).add_node("ask", lambda state: passing.invoke("hello") and None)
            orla.wrap(sync.add_edge(START, "ask")).invoke({"messages": []}, THREAD)
        manager = CallbackManager.configure(inheritable_callbacks=[heard])
        assert manager.handlers == [heard]
        assert await chain.ainvoke("hello") == chain.invoke("hello") == SAID

    asyncio.run(around())
    assert [seen.key for seen in theirs.chats] == [CALLER_KEY] * 2
    assert not engine.chats and orla.statistics().unidentified == 0
    assert [(record.stage, record.model) for record in orla.records()] == [("ask", "GenericFakeChatModel")]


def test_a_pool_keeps_nothing_of_a_node_that_is_over(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    passing = GenericFakeChatModel(messages=iter([AIMessage("x")]))
    with ThreadPoolExecutor(1) as pool:
        graph, _ = _node(lambda config: pool.submit(passing.invoke, "hello", config).result())
        orla.wrap(graph).invoke({"messages": []}, THREAD)
        asked: Any = openai.OpenAI(base_url=theirs.url, api_key=CALLER_KEY, max_retries=0).chat.completions
        pool.submit(asked.create, model="gpt-x", messages=[{"role": "user", "content": "hello"}]).result()
    assert len(theirs.chats) == 1 and not engine.chats
    assert [(record.stage, record.model) for record in orla.records()] == [("ask", "GenericFakeChatModel")]


@pytest.mark.parametrize("executor", ["pool", "loop"])
def test_a_lost_context_is_warned_of_once_and_never_guessed(
    engine: StubEngine, theirs: StubEngine, orla: Orla, caplog: pytest.LogCaptureFixture, executor: str
) -> None:
    chain = RunnablePassthrough() | _sdk(theirs)

    async def ask(state: MessagesState) -> None:
        for _ in range(2):
            if executor == "pool":
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(chain.invoke, "hello").result()
            else:
                await asyncio.get_running_loop().run_in_executor(None, chain.invoke, "hello")

    graph = orla.wrap(StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask"))
    for _ in range(2):
        asyncio.run(graph.ainvoke({"messages": []}, THREAD))
    assert len(theirs.chats) == orla.statistics().unidentified == 4 and not orla.records()
    (warned,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert "no stage" in warned and "ContextThreadPoolExecutor" in warned and "copy_context().run" in warned


# ── the places of a graph ────────────────────────────────────────────────────────────────────────────


def _handed(chain: Runnable[Any, str]) -> Any:
    return chain.invoke("hello", {"callbacks": [Heard()]})


def _of_a_subgraph(chain: Runnable[Any, str]) -> Any:
    inner = StateGraph(MessagesState).add_node("leaf", lambda state: _as_messages(_handed(chain)))
    return StateGraph(MessagesState).add_node("ask", inner.add_edge(START, "leaf").compile()).add_edge(START, "ask")


def _of_a_graph_called_with_a_config(chain: Runnable[Any, str]) -> Any:
    inner = StateGraph(MessagesState).add_node("leaf", lambda state: _as_messages(_handed(chain)))
    compiled = inner.add_edge(START, "leaf").compile()
    call = RunnableLambda(lambda state: compiled.invoke(state, {"callbacks": []}))
    node: Any = lambda state: call.invoke(state, {"callbacks": []})  # noqa: E731
    return StateGraph(MessagesState).add_node("ask", node).add_edge(START, "ask")


def _of_a_sequence(chain: Runnable[Any, str]) -> Any:
    node = RunnableLambda(lambda state: "hello") | chain.with_config(callbacks=[Heard()]) | _as_messages
    return StateGraph(MessagesState).add_node("ask", node).add_edge(START, "ask")


def _of_a_nested_sequence(chain: Runnable[Any, str]) -> Any:
    node = RunnableLambda(lambda state: "hello") | chain | _as_messages
    inner = StateGraph(MessagesState).add_node("leaf", node).add_edge(START, "leaf").compile()
    return StateGraph(MessagesState).add_node("ask", lambda state: inner.invoke(state)).add_edge(START, "ask")


def _of_a_branch(chain: Runnable[Any, str]) -> Any:
    def choose(state: MessagesState) -> str:
        _handed(chain)
        return "end"

    graph = StateGraph(MessagesState).add_node("ask", lambda state: None).add_node("end", lambda state: None)
    return graph.add_edge(START, "ask").add_conditional_edges("ask", choose, ["end"])


def _of_a_send(chain: Runnable[Any, str]) -> Any:
    graph = StateGraph(MessagesState).add_node("ask", lambda state: _as_messages(_handed(chain)))
    return graph.add_conditional_edges(START, lambda state: [Send("ask", state)], ["ask"])


def _of_a_task(chain: Runnable[Any, str]) -> Any:
    @task
    def ask() -> Any:
        return _handed(chain)

    @entrypoint()
    def main(state: Any) -> Any:
        return ask().result()

    return main


def _of_the_runtime(chain: Runnable[Any, str]) -> Any:
    def ask(state: MessagesState) -> Any:
        assert get_runtime() is not None
        return _as_messages(chain.invoke("hello", {**get_config(), "callbacks": []}))

    return StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask")


PLACES: dict[str, tuple[Callable[[Runnable[Any, str]], Any], str]] = {
    "subgraph": (_of_a_subgraph, "ask|leaf"),
    "graph called with a config": (_of_a_graph_called_with_a_config, "ask|leaf"),
    "sequence": (_of_a_sequence, "ask"),
    "sequence in a graph called": (_of_a_nested_sequence, "ask|leaf"),
    "branch": (_of_a_branch, "ask"),
    "Send": (_of_a_send, "ask"),
    "task": (_of_a_task, "main|ask"),
    "runtime": (_of_the_runtime, "ask"),
}


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("place", PLACES)
def test_a_chain_in_a_place_of_a_graph(
    engine: StubEngine, theirs: StubEngine, orla: Orla, inside: str, place: str
) -> None:
    build, stage = PLACES[place]
    orla.wrap(build(RunnablePassthrough() | INSIDE[inside](theirs))).invoke({"messages": []}, THREAD)
    assert not theirs.requests
    (record,) = orla.records()
    assert (record.workflow, record.stage) == ("t", stage) and record.run is not None
    assert orla.statistics().workflows.outcomes == {"done": 1}


def test_a_tool_of_an_agent(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    chain = RunnablePassthrough() | _sdk(theirs)

    @tool
    def advisor(city: str) -> str:
        """Ask another model."""
        return str(_handed(chain))

    agent = create_agent(chat(theirs, model="gpt-x"), [advisor])
    orla.wrap(agent).invoke({"messages": [HumanMessage("go")]}, {**THREAD, "callbacks": []})
    assert [record.stage for record in orla.records()] == ["model", "tools", "model"]
    assert {record.workflow for record in orla.records()} == {"t"} and not theirs.requests


def test_structured_output(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    llm = chat(theirs, model="gpt-x").with_structured_output(City)
    graph, results = _node(lambda config: llm.invoke("hello", config={"callbacks": [Heard()]}))
    orla.wrap(graph).invoke({"messages": []}, THREAD)
    assert results == [City(name="hello", people=5)]
    served(orla, engine, theirs)


@pytest.mark.parametrize("replaced", [{"callbacks": []}, {"callbacks": [], "configurable": {"session_id": "s"}}])
def test_what_configurable_says_of_a_run_holds_for_such_chains(
    engine: StubEngine, theirs: StubEngine, orla: Orla, replaced: Any
) -> None:
    chain = RunnablePassthrough() | _sdk(theirs)
    graph, _ = _node(lambda config: [chain.invoke("hello", replaced), chain.invoke("again", replaced)])
    said = {"priority": 7, "limits": {"run": {"calls": 1}}}
    with pytest.raises(BudgetExceeded):
        orla.wrap(graph).invoke({"messages": []}, {"configurable": {"thread_id": "t", "orla": said}})
    assert [record.priority for record in orla.records() if record.error is None] == [7]


@pytest.mark.parametrize("replaced", CONFIGS)
def test_what_a_node_says_holds_for_such_chains(
    engine: StubEngine, theirs: StubEngine, orla: Orla, replaced: str
) -> None:
    chain = RunnablePassthrough() | _sdk(theirs)

    def ask(state: MessagesState, config: RunnableConfig) -> None:
        chain.invoke("hello", CONFIGS[replaced](Heard(), config))

    graph = StateGraph(MessagesState).add_node("ask", ask, metadata={"orla": {"tenant": "acme"}})
    orla.wrap(
        graph.add_edge(START, "ask").compile(),
        hints=lambda stage, state: Hints(priority=4),
        limits=Limits(stages={"ask": Limit(calls=1)}),
    ).invoke({"messages": []}, THREAD)
    (record,) = orla.records()
    assert (record.tenant, record.priority, record.stage) == ("acme", 4, "ask")


# ── several Orlas ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def orlas(engine: StubEngine, make_orla: Callable[..., Orla]) -> tuple[Orla, Orla]:
    made = [make_orla(at(engine, name, api_key=f"{name}-key"), mapper={"*": name}) for name in ("one", "two")]
    return made[0], made[1]


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("as_node", [True, False])
@pytest.mark.parametrize("replaced", ["none", "callbacks", "metadata", "the node's handlers in a list"])
def test_the_innermost_orla_serves(
    engine: StubEngine, theirs: StubEngine, orlas: tuple[Orla, Orla], inside: str, as_node: bool, replaced: str
) -> None:
    outer, inner = orlas
    chain = RunnablePassthrough() | INSIDE[inside](theirs)

    def leaf(state: MessagesState, config: RunnableConfig) -> None:
        chain.invoke("hello", CONFIGS[replaced](Heard(), config))

    wrapped = inner.wrap(StateGraph(MessagesState).add_node("leaf", leaf).add_edge(START, "leaf"))

    def ask(state: MessagesState, config: RunnableConfig) -> None:
        RunnableLambda(wrapped.invoke).invoke(state, CONFIGS[replaced](Heard(), config))

    graph = StateGraph(MessagesState).add_node("ask", wrapped if as_node else ask).add_edge(START, "ask")
    outer.wrap(graph).invoke({"messages": []}, THREAD)
    assert not outer.records()
    (record,) = inner.records()
    assert (record.workflow, record.stage) == ("t", "ask|leaf") and record.run is not None
    assert not theirs.requests


@pytest.mark.parametrize("replaced", ["none", "callbacks"])
def test_a_model_of_the_outer_orla_in_a_graph_of_the_inner_one(
    engine: StubEngine, theirs: StubEngine, orlas: tuple[Orla, Orla], replaced: str
) -> None:
    outer, inner = orlas
    chain = RunnablePassthrough() | ChatOrla(orla=outer, model="one")

    def leaf(state: MessagesState, config: RunnableConfig) -> None:
        chain.invoke("hello", CONFIGS[replaced](Heard(), config))

    wrapped = inner.wrap(StateGraph(MessagesState).add_node("leaf", leaf).add_edge(START, "leaf"))
    graph = StateGraph(MessagesState).add_node("ask", wrapped).add_edge(START, "ask")
    outer.wrap(graph).invoke({"messages": []}, THREAD)
    (record,) = outer.records()
    assert (record.workflow, record.stage) == ("t", "ask|leaf") and record.run is not None
    assert not inner.records()


@pytest.mark.parametrize("replaced", ["none", "callbacks"])
def test_a_graph_wrapped_by_two_is_served_by_the_later(
    engine: StubEngine, theirs: StubEngine, orlas: tuple[Orla, Orla], replaced: str
) -> None:
    chain = RunnablePassthrough() | _sdk(theirs)
    graph, _ = _node(lambda config: chain.invoke("hello", CONFIGS[replaced](Heard(), config)))
    orlas[1].wrap(orlas[0].wrap(graph)).invoke({"messages": []}, THREAD)
    assert [len(each.records()) for each in orlas] == [0, 1]
    assert orlas[1].records()[0].run is not None


def test_dropping_an_orla_is_not_prevented_by_a_context(engine: StubEngine, theirs: StubEngine) -> None:
    """A context that a node ran in may live long."""

    async def around() -> weakref.ref[Any]:
        orla = Orla([at(engine)], mapper={"*": "main"})

        async def ask(state: MessagesState) -> None:
            await (RunnablePassthrough() | _sdk(theirs)).ainvoke("hello", {"callbacks": []})

        graph = orla.wrap(StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask"))
        await graph.ainvoke({"messages": []}, THREAD)
        (handler,) = handlers_of(graph)
        orla.close()
        return weakref.ref(handler)

    async def then() -> None:
        dropped = await around()
        gc.collect()
        assert dropped() is None

    asyncio.run(then())
