"""Models that know nothing of us: redirected inside a wrapped graph, in every form, and nowhere else."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import create_react_agent
from langgraph.types import Send
from pydantic import BaseModel

from orla_lg import ChatOrla, ConfigError, Hints, Limit, Limits, Orla, OrlaClosed, Record
from tests.conftest import BACKEND_KEY, CALLER_KEY, SDK_AREQUEST, SDK_REQUEST, at, chat
from tests.stub_engine import Gate, Reply, StubEngine

MESSAGES: Any = [{"role": "user", "content": "hello"}]


class City(BaseModel):
    """A city."""

    name: str
    people: int


@tool
def weather(city: str) -> str:
    """Return the weather."""
    return f"sunny in {city}"


@pytest.fixture
def theirs(other_engine: StubEngine) -> StubEngine:
    """The server that the application's code names."""
    return other_engine


@pytest.fixture
def sdk(theirs: StubEngine) -> openai.OpenAI:
    return openai.OpenAI(base_url=theirs.url, api_key=CALLER_KEY, max_retries=0)


@pytest.fixture
def asdk(theirs: StubEngine) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=theirs.url, api_key=CALLER_KEY, max_retries=0)


def inside(orla: Orla, body: Callable[[], Any], config: Any = None, **wrap_with: Any) -> Any:
    """Run *body* in the node ``ask`` of a wrapped graph and return its result."""
    results = []

    def ask(state: MessagesState) -> Any:
        results.append(body())

    graph = StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask").compile()
    orla.wrap(graph, **wrap_with).invoke({"messages": []}, config)
    return results[0]


def ainside(orla: Orla, body: Callable[[], Awaitable[Any]]) -> Any:
    results = []

    async def ask(state: MessagesState) -> Any:
        results.append(await body())

    graph = StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask").compile()
    asyncio.run(orla.wrap(graph).ainvoke({"messages": []}))
    return results[0]


# ── every form ───────────────────────────────────────────────────────────────────────────────────────


def _raw_stream(client: openai.OpenAI) -> str:
    create = client.chat.completions.with_streaming_response.create
    with create(model="gpt-x", messages=MESSAGES) as response:
        return str(response.parse().choices[0].message.content)


async def _araw_stream(client: openai.AsyncOpenAI) -> str:
    create = client.chat.completions.with_streaming_response.create
    async with create(model="gpt-x", messages=MESSAGES) as response:
        return str((await response.parse()).choices[0].message.content)


def _joined(stream: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


async def _ajoined(stream: Any) -> str:
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


def _helper(client: openai.OpenAI) -> str:
    with client.chat.completions.stream(model="gpt-x", messages=MESSAGES) as stream:
        return str(stream.get_final_completion().choices[0].message.content)


async def _ahelper(client: openai.AsyncOpenAI) -> str:
    async with client.chat.completions.stream(model="gpt-x", messages=MESSAGES) as stream:
        return str((await stream.get_final_completion()).choices[0].message.content)


PLAIN = "1 user said: hello"

SDK_FORMS: dict[str, tuple[Callable[[openai.OpenAI], Any], Any]] = {
    "create": (
        lambda c: c.chat.completions.create(model="gpt-x", messages=MESSAGES).choices[0].message.content,
        PLAIN,
    ),
    "stream": (
        lambda c: _joined(c.chat.completions.create(model="gpt-x", messages=MESSAGES, stream=True)),
        PLAIN,
    ),
    "stream helper": (_helper, PLAIN),
    "parse": (
        lambda c: (
            c.chat.completions.parse(model="gpt-x", messages=MESSAGES, response_format=City).choices[0].message.parsed
        ),
        City(name="hello", people=5),
    ),
    "raw": (
        lambda c: (
            c.chat.completions.with_raw_response.create(model="gpt-x", messages=MESSAGES)
            .parse()
            .choices[0]
            .message.content
        ),
        PLAIN,
    ),
    "raw stream": (
        lambda c: _joined(
            c.chat.completions.with_raw_response.create(model="gpt-x", messages=MESSAGES, stream=True).parse()
        ),
        PLAIN,
    ),
    "streaming response": (_raw_stream, PLAIN),
}


async def _acreate(c: openai.AsyncOpenAI) -> Any:
    return (await c.chat.completions.create(model="gpt-x", messages=MESSAGES)).choices[0].message.content


async def _astream(c: openai.AsyncOpenAI) -> Any:
    return await _ajoined(await c.chat.completions.create(model="gpt-x", messages=MESSAGES, stream=True))


async def _aparse(c: openai.AsyncOpenAI) -> Any:
    parsed = await c.chat.completions.parse(model="gpt-x", messages=MESSAGES, response_format=City)
    return parsed.choices[0].message.parsed


async def _araw(c: openai.AsyncOpenAI) -> Any:
    raw = await c.chat.completions.with_raw_response.create(model="gpt-x", messages=MESSAGES)
    return raw.parse().choices[0].message.content


SDK_ASYNC_FORMS: dict[str, tuple[Callable[[openai.AsyncOpenAI], Awaitable[Any]], Any]] = {
    "create": (_acreate, PLAIN),
    "stream": (_astream, PLAIN),
    "stream helper": (_ahelper, PLAIN),
    "parse": (_aparse, City(name="hello", people=5)),
    "raw": (_araw, PLAIN),
    "streaming response": (_araw_stream, PLAIN),
}


def _by_function(llm: Any) -> Any:
    return llm.with_structured_output(City, method="function_calling").invoke("hello")


MODEL_FORMS: dict[str, tuple[dict[str, Any], Callable[[Any], Any], Any]] = {
    "invoke": ({}, lambda m: m.invoke("hello").content, PLAIN),
    "stream": ({}, lambda m: "".join(chunk.content for chunk in m.stream("hello")), PLAIN),
    "streaming=True": ({"streaming": True}, lambda m: m.invoke("hello").content, PLAIN),
    "batch": ({}, lambda m: [each.content for each in m.batch(["hello"])], [PLAIN]),
    "json_schema": ({}, lambda m: m.with_structured_output(City).invoke("hello"), City(name="hello", people=5)),
    "function_calling": ({}, _by_function, City(name="hello", people=5)),
    "bind_tools": ({}, lambda m: m.bind_tools([weather]).invoke("hello").tool_calls[0]["args"], {"city": "hello"}),
    "headers": (
        {"include_response_headers": True},
        lambda m: m.invoke("hello").response_metadata["headers"]["content-type"],
        "application/json",
    ),
    "headers of a stream": (
        {"include_response_headers": True, "streaming": True},
        lambda m: m.invoke("hello").response_metadata["headers"]["content-type"],
        "text/event-stream",
    ),
}


async def _ajoined_model(model: Any) -> str:
    return "".join([chunk.content async for chunk in model.astream("hello")])


async def _aheaders(model: Any) -> str:
    return str((await model.ainvoke("hello")).response_metadata["headers"]["content-type"])


async def _acontent(model: Any) -> str:
    return str((await model.ainvoke("hello")).content)


MODEL_ASYNC_FORMS: dict[str, tuple[dict[str, Any], Callable[[Any], Awaitable[Any]], Any]] = {
    "ainvoke": ({}, _acontent, PLAIN),
    "astream": ({}, _ajoined_model, PLAIN),
    "streaming=True": ({"streaming": True}, _acontent, PLAIN),
    "json_schema": ({}, lambda m: m.with_structured_output(City).ainvoke("hello"), City(name="hello", people=5)),
    "headers": ({"include_response_headers": True}, _aheaders, "application/json"),
}


def assert_redirected(engine: StubEngine, theirs: StubEngine, orla: Orla) -> Record:
    (seen,) = engine.chats
    assert not theirs.requests, "nothing may reach the server that the code names"
    assert seen.body["model"] == "stub-model"
    assert seen.key == BACKEND_KEY
    assert CALLER_KEY not in repr(seen.headers) + seen.raw.decode()
    (record,) = orla.records()
    assert (record.stage, record.backend, record.model) == ("ask", "main", "stub-model")
    assert record.error is None and not record.external
    assert record.prompt_tokens and record.completion_tokens, "usage is known, asked for or not"
    return record


@pytest.mark.parametrize("form", SDK_FORMS)
def test_sdk(engine: StubEngine, theirs: StubEngine, orla: Orla, sdk: openai.OpenAI, form: str) -> None:
    call, expected = SDK_FORMS[form]
    assert inside(orla, lambda: call(sdk)) == expected
    record = assert_redirected(engine, theirs, orla)
    assert (record.ttft_s is not None) is ("stream" in form and form != "streaming response")


@pytest.mark.parametrize("form", SDK_ASYNC_FORMS)
def test_asynchronous_sdk(
    engine: StubEngine, theirs: StubEngine, orla: Orla, asdk: openai.AsyncOpenAI, form: str
) -> None:
    call, expected = SDK_ASYNC_FORMS[form]
    assert ainside(orla, lambda: call(asdk)) == expected
    assert_redirected(engine, theirs, orla)


@pytest.mark.parametrize("form", MODEL_FORMS)
def test_model(engine: StubEngine, theirs: StubEngine, orla: Orla, form: str) -> None:
    settings, call, expected = MODEL_FORMS[form]
    model = chat(theirs, model="gpt-x", **settings)
    assert inside(orla, lambda: call(model)) == expected
    assert_redirected(engine, theirs, orla)


@pytest.mark.parametrize("form", MODEL_ASYNC_FORMS)
def test_asynchronous_model(engine: StubEngine, theirs: StubEngine, orla: Orla, form: str) -> None:
    settings, call, expected = MODEL_ASYNC_FORMS[form]
    model = chat(theirs, model="gpt-x", **settings)
    assert ainside(orla, lambda: call(model)) == expected
    assert_redirected(engine, theirs, orla)


def test_keys_in_headers_stay_with_their_host(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    secret = {"Authorization": "Bearer secret", "api-key": "secret", "X-Api-Key": "secret", "Cookie": "a=secret"}
    secret |= {"Proxy-Authorization": "secret", "OpenAI-Organization": "secret", "OpenAI-Project": "secret"}
    secret |= {"X-UsageAccount": "secret", "X-Goog-User-Project": "secret", "Referer": "secret"}
    client = openai.OpenAI(
        base_url=theirs.url, api_key="secret", organization="secret", project="secret", default_headers=secret
    )
    inside(
        orla,
        lambda: client.chat.completions.create(
            model="gpt-x", messages=MESSAGES, extra_headers={**secret, "X-Request-Id": "kept"}
        ),
    )
    (seen,) = engine.chats
    assert "secret" not in repr(seen.headers)
    assert (seen.headers["x-request-id"], seen.key) == ("kept", BACKEND_KEY)


def test_a_backend_without_key_gets_none(engine: StubEngine, make_orla: Any, sdk: openai.OpenAI) -> None:
    orla = make_orla(at(engine, api_key=None), mapper={"*": "main"})
    inside(orla, lambda: SDK_FORMS["create"][0](sdk))
    assert [seen.key for seen in engine.chats] == ["none"]


def test_what_else_the_caller_says_is_sent(engine: StubEngine, orla: Orla, sdk: openai.OpenAI) -> None:
    inside(
        orla,
        lambda: sdk.chat.completions.create(
            model="gpt-x", messages=MESSAGES, temperature=0.5, seed=3, extra_body={"min_p": 0.1}
        ),
    )
    (seen,) = engine.chats
    body = {**seen.body}
    assert (body.pop("model"), body.pop("messages")) == ("stub-model", MESSAGES)
    assert body == {"temperature": 0.5, "seed": 3, "min_p": 0.1}, "and nothing is added"


# ── usage ────────────────────────────────────────────────────────────────────────────────────────────


def test_usage_that_was_not_asked_for_is_not_delivered(engine: StubEngine, orla: Orla, sdk: openai.OpenAI) -> None:
    chunks = inside(orla, lambda: list(sdk.chat.completions.create(model="gpt-x", messages=MESSAGES, stream=True)))
    assert engine.chats[0].body["stream_options"] == {"include_usage": True}
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    (record,) = orla.records()
    assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (2, 4, 0)


def test_usage_that_was_asked_for_is_delivered(orla: Orla, sdk: openai.OpenAI) -> None:
    chunks = inside(
        orla,
        lambda: list(
            sdk.chat.completions.create(
                model="gpt-x", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
            )
        ),
    )
    assert chunks[-1].choices == [] and chunks[-1].usage.prompt_tokens == 2


# ── who is not redirected ────────────────────────────────────────────────────────────────────────────


def test_outside_a_wrapped_graph_nothing_changes(
    engine: StubEngine, theirs: StubEngine, orla: Orla, sdk: openai.OpenAI
) -> None:
    inside(orla, lambda: None)  # interception is installed
    graph = StateGraph(MessagesState).add_node("ask", lambda state: {"messages": [chat(theirs).invoke("hello")]})
    graph.add_edge(START, "ask").compile().invoke({"messages": []})
    assert SDK_FORMS["create"][0](sdk) == PLAIN
    assert [seen.key for seen in theirs.chats] == [CALLER_KEY] * 2
    assert not engine.chats and not orla.records()
    assert (orla.statistics().external, orla.statistics().unidentified) == (0, 0)


def test_a_plain_graph_beside_a_wrapped_one_is_not_lost(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    """Its context is there and says that the call is none of ours."""
    plain = StateGraph(MessagesState).add_node("ask", lambda state: {"messages": [chat(theirs).invoke("hello")]})
    compiled = plain.add_edge(START, "ask").compile()

    def beside() -> None:
        thread = threading.Thread(target=lambda: compiled.invoke({"messages": []}))
        thread.start()
        thread.join()

    inside(orla, beside)
    assert len(theirs.chats) == 1
    assert orla.statistics().unidentified == 0


@pytest.mark.parametrize("stream", [False, True])
def test_neither_mapped_nor_served_passes_untouched(
    engine: StubEngine, theirs: StubEngine, make_orla: Any, sdk: openai.OpenAI, stream: bool
) -> None:
    orla = make_orla(at(engine), mapper={"other": "main"})
    said = inside(orla, lambda: SDK_FORMS["stream" if stream else "create"][0](sdk))
    assert said == PLAIN
    (seen,) = theirs.chats
    assert (seen.key, seen.body["model"], "stream_options" in seen.body) == (CALLER_KEY, "gpt-x", False)
    (record,) = orla.records()
    assert (record.external, record.backend, record.stage, record.model) == (True, None, "ask", "gpt-x")
    assert orla.statistics().external == 1 and not engine.chats


def test_an_error_of_a_passing_call_is_recorded(theirs: StubEngine, engine: StubEngine, make_orla: Any) -> None:
    orla = make_orla(at(engine))
    theirs.rule = lambda seen: Reply(status=400)
    with pytest.raises(openai.BadRequestError):
        inside(orla, lambda: chat(theirs, model="gpt-x").invoke("hello"))
    (record,) = orla.records()
    assert record.external and record.error is not None and "BadRequestError" in record.error


def test_the_model_in_the_code_decides_where_no_mapping_does(
    engine: StubEngine, theirs: StubEngine, make_orla: Any
) -> None:
    orla = make_orla(at(engine, aliases=("gpt-x",)))
    for name in ("main", "stub-model", "gpt-x", "auto"):
        inside(orla, lambda name=name: chat(theirs, model=name).invoke("hello"))
    assert not theirs.chats
    assert {seen.body["model"] for seen in engine.chats} == {"stub-model"}
    assert [record.mapper for record in orla.records()] == ["code"] * 4


def test_the_responses_api_is_served_too(
    engine: StubEngine, theirs: StubEngine, orla: Orla, sdk: openai.OpenAI
) -> None:
    said = inside(orla, lambda: sdk.responses.create(model="gpt-x", input="hello").output_text)
    assert said == PLAIN and not theirs.requests
    (seen,) = engine.chats
    assert (seen.key, seen.body["messages"]) == (BACKEND_KEY, [{"content": "hello", "role": "user"}])
    (record,) = orla.records()
    assert (record.external, record.backend, record.model) == (False, "main", "stub-model")


@pytest.mark.parametrize("body", [[1], "text", None])
def test_a_body_that_is_no_object_is_the_engines_to_judge(
    theirs: StubEngine, orla: Orla, sdk: openai.OpenAI, body: Any
) -> None:
    def post() -> Any:
        return sdk.post("/chat/completions", body=body, cast_to=object, options={"max_retries": 0})

    with pytest.raises(openai.APIError) as wrapped:
        inside(orla, post)
    with pytest.raises(openai.APIError) as bare:
        post()
    assert type(wrapped.value) is type(bare.value) and orla.records()[-1].external


def test_other_endpoints_are_none_of_our_business(theirs: StubEngine, orla: Orla, sdk: openai.OpenAI) -> None:
    assert inside(orla, lambda: sdk.models.list().data[0].id) == "stub-model"
    assert theirs.requests[0].key == CALLER_KEY and not orla.records()


# ── ChatOrla ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
def test_chat_orla_inside_passes_the_core_once(engine: StubEngine, orla: Orla, stream: bool) -> None:
    llm = ChatOrla(orla=orla, model="main")

    def ask() -> Any:
        return "".join(chunk.content for chunk in llm.stream("hello")) if stream else llm.invoke("hello").content

    assert inside(orla, ask) == PLAIN
    (record,) = orla.records()
    assert len(engine.chats) == 1
    assert (record.stage, record.attempts, record.external) == ("ask", 1, False)
    assert record.ttft_s is not None, "it streams from the engine even for invoke"
    assert orla.statistics().backends["main"].queue.granted == 1


def test_asynchronous_chat_orla_inside(engine: StubEngine, orla: Orla) -> None:
    llm = ChatOrla(orla=orla, model="main")
    assert ainside(orla, lambda: _acontent(llm)) == PLAIN
    assert ainside(orla, lambda: _ajoined_model(llm)) == PLAIN
    assert [record.stage for record in orla.records()] == ["ask", "ask"]


def test_chat_orlas_own_orla_wins(engine: StubEngine, make_orla: Any) -> None:
    graphs = make_orla(at(engine, "a", api_key="a-key"), mapper={"*": "a"})
    models = make_orla(at(engine, "b", api_key="b-key"))
    llm = ChatOrla(orla=models, model="b")
    message = inside(graphs, lambda: llm.invoke("hello"), {"configurable": {"thread_id": "t"}})
    assert [seen.key for seen in engine.chats] == ["b-key"]
    (record,) = models.records()
    assert (record.workflow, record.stage) == ("t", "ask")
    assert message.response_metadata["orla"]["id"] == record.id and not graphs.records()


@pytest.mark.parametrize("form", ["invoke", "stream", "ainvoke", "astream"])
@pytest.mark.parametrize("reply", [Reply(fault="garbage"), Reply(status=400), Reply(status=500), Reply(status=429)])
def test_chat_orla_raises_what_chat_openai_raises(engine: StubEngine, orla: Orla, reply: Reply, form: str) -> None:
    engine.rule = lambda seen: reply

    def ask(llm: Any) -> Any:
        if form in ("invoke", "stream"):
            return list(llm.stream("hello")) if form == "stream" else llm.invoke("hello")
        return asyncio.run(_ajoined_model(llm) if form == "astream" else _acontent(llm))

    with pytest.raises(Exception) as theirs:
        ask(chat(engine))
    with pytest.raises(Exception) as ours:
        ask(ChatOrla(orla=orla, model="main", max_retries=0))
    if reply.fault == "garbage":  # seen before the SDK sees it, and said more clearly
        assert type(ours.value) is openai.APIError and "is no JSON" in str(ours.value)
        return
    assert (type(ours.value), str(ours.value)) == (type(theirs.value), str(theirs.value))


def test_an_engine_that_does_not_stream_when_asked_to_is_understood(
    theirs: StubEngine, engine: StubEngine, orla: Orla
) -> None:
    """``ChatOrla`` streams from the engine for ``invoke``; what comes whole is taken whole."""
    engine.rule = lambda seen: Reply(ignore_stream=True)
    assert ChatOrla(orla=orla, model="main").invoke("hello").content == PLAIN
    assert orla.records()[0].completion_tokens == 4


# ── identity ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_lost_context_goes_through_and_is_counted(
    engine: StubEngine, theirs: StubEngine, orla: Orla, sdk: openai.OpenAI
) -> None:
    def in_a_raw_thread() -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(SDK_FORMS["create"][0], sdk).result()

    assert inside(orla, in_a_raw_thread) == PLAIN
    assert len(theirs.chats) == 1
    assert orla.statistics().unidentified == 1


def test_chat_orla_with_a_lost_context_is_served_and_counted(engine: StubEngine, orla: Orla) -> None:
    llm = ChatOrla(orla=orla, model="main")

    def in_a_raw_thread() -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(llm.invoke, "hello").result().content

    assert inside(orla, in_a_raw_thread) == PLAIN
    (record,) = orla.records()
    assert (record.stage, record.run) == ("", None)
    assert orla.statistics().unidentified == 1


def test_a_raw_thread_that_gets_the_config_is_identified(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    llm = chat(theirs, model="gpt-x")

    def ask(state: MessagesState, config: RunnableConfig) -> Any:
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(llm.invoke, "hello", config) for _ in range(2)]
            return {"messages": [future.result() for future in futures]}

    graph = StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask").compile()
    orla.wrap(graph).invoke({"messages": []}, {"configurable": {"thread_id": "t"}})
    assert not theirs.chats
    records = orla.records()
    assert {(r.workflow, r.stage, r.step) for r in records} == {("t", "ask", 1)}
    assert len({r.run for r in records}) == 1 and records[0].run is not None
    assert orla.statistics().unidentified == 0


def test_stage_keys(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    llm = chat(theirs, model="gpt-x")

    def ask(state: Any) -> Any:
        return {"messages": [llm.invoke("hello")]}

    inner = StateGraph(MessagesState).add_node("leaf", ask).add_edge(START, "leaf").compile()

    def calls_twice(state: MessagesState) -> Any:
        inner.invoke({"messages": []})
        return {"messages": inner.invoke({"messages": []})["messages"]}

    graph = StateGraph(MessagesState).add_node("as_node", inner).add_node("calls", calls_twice).add_node("sent", ask)
    graph.add_edge(START, "as_node").add_edge("as_node", "calls")
    graph.add_conditional_edges("calls", lambda state: [Send("sent", {}), Send("sent", {})], ["sent"])
    orla.wrap(graph.compile()).invoke({"messages": []})
    stages = [record.stage for record in orla.records()]
    assert stages == ["as_node|leaf", "calls|leaf", "calls|leaf", "sent", "sent"]
    assert [record.step for record in orla.records()][-1] == 3


@pytest.mark.filterwarnings("ignore:create_react_agent has been moved")
def test_the_stages_of_an_agent(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    llm = chat(theirs, model="gpt-x")

    @tool
    def advisor(city: str) -> str:
        """Ask another model."""
        return str(llm.invoke(city).content)

    agent = create_react_agent(llm, [advisor])
    orla.wrap(agent).invoke({"messages": [HumanMessage("go")]})
    assert [record.stage for record in orla.records()] == ["agent", "tools", "agent"]
    assert not theirs.chats


def test_current_inside_and_outside(orla: Orla) -> None:
    current = inside(orla, orla.current, {"configurable": {"thread_id": "t"}})
    assert (current.workflow, current.stage) == ("t", "ask") and current.run is not None
    assert orla.current() is None


# ── hints ────────────────────────────────────────────────────────────────────────────────────────────

LADDER = ["metadata", "function", "configurable", "prioritize", "call"]


@pytest.mark.parametrize("strongest", range(len(LADDER)))
def test_which_hint_wins(engine: StubEngine, orla: Orla, strongest: int) -> None:
    said = LADDER[: strongest + 1]
    llm = ChatOrla(orla=orla, model="main")

    def ask(state: MessagesState) -> Any:
        if "prioritize" in said:
            assert orla.prioritize(None, 4)
        return {"messages": [llm.invoke("hello", **({"priority": 5} if "call" in said else {}))]}

    graph = StateGraph(MessagesState)
    graph.add_node("ask", ask, metadata={"orla": {"priority": 1, "tenant": "from metadata"}})
    wrapped = orla.wrap(
        graph.add_edge(START, "ask").compile(),
        hints=(lambda stage, state: Hints(priority=2)) if "function" in said else None,
    )
    wrapped.invoke({"messages": []}, {"configurable": {"orla": {"priority": 3}} if "configurable" in said else {}})
    (record,) = orla.records()
    assert record.priority == strongest + 1
    assert record.tenant == "from metadata", "what only the weakest says still counts"


def test_hints_from_the_state(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    heard = []

    def hints(stage: str, state: Any) -> Hints | None:
        heard.append((stage, len(state["messages"])))
        return Hints(priority=len(state["messages"])) if stage == "ask" else None

    inside(orla, lambda: chat(theirs).invoke("hello"), hints=hints)
    assert heard == [("ask", 0)]


def test_a_failing_hints_function_costs_the_hints_only(
    engine: StubEngine, theirs: StubEngine, orla: Orla, caplog: pytest.LogCaptureFixture
) -> None:
    def hints(stage: str, state: Any) -> Hints:
        raise ZeroDivisionError

    assert inside(orla, lambda: chat(theirs).invoke("hello").content, hints=hints) == PLAIN
    assert "the hints function failed for stage 'ask'" in caplog.text


def test_hints_do_not_reach_the_engine(engine: StubEngine, orla: Orla) -> None:
    llm = ChatOrla(orla=orla, model="main").bind(priority=2, tenant="acme", cache="flush", deadline_s=30)
    inside(orla, lambda: llm.invoke("hello"))
    (seen,) = engine.chats
    assert not {"priority", "tenant", "cache", "deadline_s", "orla"} & seen.body.keys()
    assert (orla.records()[0].priority, orla.records()[0].tenant) == (2, "acme")


# ── several Orlas, the end, and stepping aside ───────────────────────────────────────────────────────


def test_several_orlas_know_nothing_of_each_other(engine: StubEngine, make_orla: Any, sdk: openai.OpenAI) -> None:
    first = make_orla(at(engine, "a", api_key="a-key"), mapper={"*": "a"})
    second = make_orla(at(engine, "b", api_key="b-key"), mapper={"*": "b"})
    inside(first, lambda: SDK_FORMS["create"][0](sdk))
    inside(second, lambda: SDK_FORMS["create"][0](sdk))
    assert [seen.key for seen in engine.chats] == ["a-key", "b-key"]
    first.close()
    inside(second, lambda: SDK_FORMS["create"][0](sdk))
    assert [record.backend for record in second.records()] == ["b", "b"]
    assert [record.backend for record in first.records()] == ["a"]


def test_after_close(engine: StubEngine, theirs: StubEngine, make_orla: Any, sdk: openai.OpenAI) -> None:
    orla, other = make_orla(at(engine), mapper={"*": "main"}), make_orla(at(engine))
    llm = chat(theirs)
    graph = StateGraph(MessagesState).add_node("ask", lambda state: {"messages": [llm.invoke("hello")]})
    wrapped = orla.wrap(graph.add_edge(START, "ask").compile())
    other.wrap(wrapped)
    orla.close()
    orla.close()
    with pytest.raises(OrlaClosed):
        wrapped.invoke({"messages": []})
    with pytest.raises(OrlaClosed):
        ChatOrla(orla=orla, model="main").invoke("hello")
    with pytest.raises(OrlaClosed):
        orla.wrap(graph.compile())
    assert openai.OpenAI.request is not SDK_REQUEST, "the other one still needs it"
    other.close()
    assert openai.OpenAI.request is SDK_REQUEST and openai.AsyncOpenAI.request is SDK_AREQUEST
    assert not engine.chats


def test_close_ends_waiting_calls(engine: StubEngine, theirs: StubEngine, make_orla: Any) -> None:
    orla, gate = make_orla(at(engine, max_concurrency=1), mapper={"*": "main"}), Gate()
    engine.rule = lambda seen: Reply(gate=gate)
    llm, waiting = ChatOrla(orla=orla, model="main"), threading.Event()
    orla.subscribe(lambda event: waiting.set() if event.kind == "queued" else None)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(llm.invoke, "first")
        engine.wait(lambda e: e.in_flight == 1)
        second = pool.submit(llm.invoke, "second")
        assert waiting.wait(10)
        threading.Timer(0.0, orla.close).start()
        with pytest.raises(OrlaClosed):
            second.result(10)
        gate.open()
        first.exception(10)
    gc.collect()


def test_disabled(
    engine: StubEngine, theirs: StubEngine, make_orla: Any, sdk: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORLA_DISABLED", "1")
    orla = make_orla(at(engine), mapper={"*": "main"})
    graph = StateGraph(MessagesState).add_node("ask", lambda state: {"messages": [chat(theirs).invoke("hello")]})
    compiled = graph.add_edge(START, "ask").compile()
    assert orla.wrap(compiled) is compiled
    compiled.invoke({"messages": []})
    assert [seen.key for seen in theirs.chats] == [CALLER_KEY]
    llm = ChatOrla(orla=orla, model="main")
    assert llm.invoke("hello", priority=3).content == PLAIN
    assert "".join(chunk.content for chunk in llm.stream("hello", tenant="acme")) == PLAIN
    assert [(seen.key, seen.body["model"]) for seen in engine.chats] == [(BACKEND_KEY, "stub-model")] * 2
    assert not {"priority", "tenant"} & (engine.chats[0].body.keys() | engine.chats[1].body.keys())
    assert openai.OpenAI.request is SDK_REQUEST and not orla.records()


def test_an_engines_error_is_not_its_own_cause(engine: StubEngine, orla: Orla) -> None:
    engine.rule = lambda seen: Reply(status=500)
    with pytest.raises(openai.InternalServerError) as caught:
        ChatOrla(orla=orla, model="main", max_retries=0).invoke("x")
    cause = caught.value.__cause__
    assert cause is None or cause.__cause__ is not cause


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (8, "expected Hints, or a dict of them, got int"),
        ({"prority": 8}, "unknown hint 'prority'; did you mean 'priority'?"),
        ({"cache": "flsh"}, "'flsh' is not one of"),
    ],
)
def test_wrong_hints_are_told_once_and_the_stage_runs(
    engine: StubEngine, orla: Orla, caplog: pytest.LogCaptureFixture, said: Any, fault: str
) -> None:
    graph = orla.wrap(speaking(engine), hints=lambda stage, state: said)
    for _ in range(2):
        graph.invoke({"messages": ["Hello"]})
    assert [record.priority for record in orla.records()] == [0, 0]
    (warned,) = [record for record in caplog.records if "hints" in record.getMessage()]
    assert fault in warned.getMessage() and "stage 'speak'" in warned.getMessage() and warned.exc_info is None


def test_hints_may_be_a_dict(engine: StubEngine, orla: Orla, caplog: pytest.LogCaptureFixture) -> None:
    orla.set_policy(policy="priority")
    graph = orla.wrap(speaking(engine), hints=lambda stage, state: {"priority": 8, "tenant": "acme"})
    graph.invoke({"messages": ["Hello"]})
    (record,) = orla.records()
    assert (record.priority, record.tenant, caplog.text) == (8, "acme", "")


def test_what_is_no_hints_function_is_refused_when_the_graph_is_wrapped(engine: StubEngine, orla: Orla) -> None:
    with pytest.raises(ConfigError, match=r"hints must be a function of \(stage, state\), got dict"):
        orla.wrap(speaking(engine), hints={"speak": {"priority": 8}})  # type: ignore[arg-type]


def test_a_misspelt_hint_in_configurable_is_told_with_all_that_may_stand_there(
    engine: StubEngine, orla: Orla
) -> None:
    graph = orla.wrap(speaking(engine))
    with pytest.raises(ConfigError, match=r"unknown hint 'limit'; did you mean 'limits'.* known: .*limits, priority"):
        graph.invoke({"messages": ["Hello"]}, {"configurable": {"orla": {"limit": {"run": {"calls": 1}}}}})


def speaking(engine: StubEngine) -> Any:
    llm = chat(engine)

    def speak(state: MessagesState) -> dict[str, Any]:
        return {"messages": [llm.invoke(state["messages"])]}

    return StateGraph(MessagesState).add_node("speak", speak).add_edge(START, "speak")


NAMED_FOR_ALL: dict[str, dict[str, Any]] = {
    "the shared mapping": {"mapper": {"spaek": "main", "another_graphs": "main"}},
    "request_policy": {"request_policy": {"spaek": "sjf", "another_graphs": "sjf", "*": "fcfs"}},
    "limits.stages": {"limits": Limits(stages={"spaek": Limit(calls=9), "another_graphs": Limit(calls=9)})},
}


@pytest.mark.parametrize("where", NAMED_FOR_ALL)
def test_a_misspelt_stage_in_what_all_graphs_share_is_warned_of_once(
    engine: StubEngine, make_orla: Callable[..., Orla], caplog: pytest.LogCaptureFixture, where: str
) -> None:
    orla = make_orla(at(engine), at(engine, "other"), **NAMED_FOR_ALL[where])
    for _ in range(2):
        orla.wrap(speaking(engine))
    (warned,) = warnings(caplog)
    assert warned.startswith(
        f"{where} names stage 'spaek', which no graph wrapped so far has; 'speak' is the nearest"
    )


def test_what_is_named_anew_is_held_against_the_graphs_there_are(
    engine: StubEngine, orla: Orla, caplog: pytest.LogCaptureFixture
) -> None:
    orla.wrap(speaking(engine))
    orla.set_policy(request_policy={"speek": "sjf"})
    orla.limits = Limits(stages={"speack": Limit(calls=9)})
    orla.variant("b", {"spek": "main"})
    assert [line.split(" names stage ")[0] for line in warnings(caplog)] == [
        "request_policy", "limits.stages", "variant 'b' of the mapping"
    ]  # fmt: skip


def test_a_node_of_a_subgraph_may_be_named_without_its_graph(
    engine: StubEngine, make_orla: Callable[..., Orla], caplog: pytest.LogCaptureFixture
) -> None:
    outer = StateGraph(MessagesState).add_node("in", speaking(engine).compile()).add_edge(START, "in")
    make_orla(at(engine), request_policy={"speak": "sjf", "in|speak": "sjf"}).wrap(outer)
    assert warnings(caplog) == []


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
