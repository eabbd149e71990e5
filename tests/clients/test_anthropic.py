"""ChatAnthropic and the Anthropic SDK in wrapped graphs: served in every form, natively and translated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import reduce
from typing import Any

import anthropic
import pytest
from langchain.agents import create_agent
from langchain_anthropic import ChatAnthropic, _client_utils
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import BaseModel

from orla_lg import Backend, MappingError, Orla, Record
from tests.conftest import BACKEND_KEY, CALLER_KEY
from tests.wires.messages_server import BOTH, MODEL, Answer, MessagesServer, text, thinking, tool_use

MakeOrla = Callable[..., Orla]
QUESTION: Any = [{"role": "user", "content": "What is new on the road beside the stone today?"}]
NATIVE, TRANSLATED = BOTH, frozenset({"chat"})


class City(BaseModel):
    """A city."""

    name: str
    people: int


@tool
def weather(city: str) -> str:
    """Return the weather."""
    return f"sunny in {city}"


@pytest.fixture(autouse=True)
def _own_http_clients() -> Iterator[None]:
    """LangChain keeps HTTP clients by URL, beyond their loop."""
    yield
    _client_utils._get_default_httpx_client.cache_clear()
    _client_utils._get_default_async_httpx_client.cache_clear()


@pytest.fixture
def theirs() -> Iterator[MessagesServer]:
    """The server that the application's code names."""
    with MessagesServer(name="msg_1", key=CALLER_KEY) as running:
        yield running


@pytest.fixture(params=[NATIVE, TRANSLATED], ids=["native", "translated"])
def ours(request: pytest.FixtureRequest) -> Iterator[MessagesServer]:
    """The engine behind the backend."""
    with MessagesServer(name="msg_1", speaks=request.param, key=BACKEND_KEY) as running:
        yield running


def native(server: MessagesServer) -> bool:
    return "messages" in server.speaks


@pytest.fixture
def orla(ours: MessagesServer, make_orla: MakeOrla) -> Orla:
    return served_by(ours, make_orla)


def served_by(server: MessagesServer, make_orla: MakeOrla, **settings: Any) -> Orla:
    backend = Backend("main", server.url, model=MODEL, api_key=BACKEND_KEY)
    return make_orla(backend, **{"mapper": {"*": "main"}, **settings})


def model_at(server: MessagesServer, **settings: Any) -> ChatAnthropic:
    """Return a model as an application makes it, which knows nothing of orla_lg."""
    said: dict[str, Any] = {"model": MODEL, "api_key": CALLER_KEY, "max_retries": 0, "max_tokens": 40, **settings}
    return ChatAnthropic(base_url=server.root, **said)


def inside(orla: Orla, body: Callable[[], Any]) -> Any:
    """Run *body* in the node ``ask`` of a wrapped graph and return its result."""
    results = []

    def ask(state: MessagesState) -> Any:
        results.append(body())

    graph = StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask").compile()
    orla.wrap(graph).invoke({"messages": []})
    return results[0]


def ainside(orla: Orla, body: Callable[[], Awaitable[Any]]) -> Any:
    results = []

    async def ask(state: MessagesState) -> Any:
        results.append(await body())

    graph = StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask").compile()
    asyncio.run(orla.wrap(graph).ainvoke({"messages": []}))
    return results[0]


def only(orla: Orla) -> Record:
    (record,) = orla.records()
    return record


# Every form


def merged(chunks: Any) -> Any:
    return reduce(lambda one, other: one + other, chunks)


async def amerged(chunks: AsyncIterator[Any]) -> Any:
    return merged([chunk async for chunk in chunks])


def stream_of(client: anthropic.Anthropic, **more: Any) -> Any:
    with client.messages.stream(model=MODEL, max_tokens=40, messages=QUESTION, **more) as stream:
        return stream.get_final_message()


async def astream_of(client: anthropic.AsyncAnthropic) -> Any:
    async with client.messages.stream(model=MODEL, max_tokens=40, messages=QUESTION) as stream:
        return await stream.get_final_message()


def raw(client: anthropic.Anthropic) -> Any:
    response = client.messages.with_raw_response.create(model=MODEL, max_tokens=40, messages=QUESTION)
    return response.parse()


def raw_stream(client: anthropic.Anthropic) -> Any:
    create = client.messages.with_streaming_response.create
    with create(model=MODEL, max_tokens=40, messages=QUESTION) as response:
        return response.parse()


SYNC: dict[str, Callable[[ChatAnthropic], Any]] = {
    "invoke": lambda model: model.invoke("hello"),
    "stream": lambda model: merged(model.stream("hello")),
    "batch": lambda model: model.batch(["hello", "hello"]),
    "tools": lambda model: model.bind_tools([weather], tool_choice="any").invoke("the weather in Ulm?"),
    "tools, streamed": lambda model: merged(model.bind_tools([weather]).stream("the weather in Ulm?")),
    "structured output": lambda model: model.with_structured_output(City).invoke("a city?"),
    "structured output by schema": lambda model: model.with_structured_output(City, method="json_schema").invoke("?"),
    "beta": lambda model: model.bind(betas=["x-2026-01-01"]).invoke("hello"),
    "SDK": lambda model: model._client.messages.create(model=MODEL, max_tokens=40, messages=QUESTION),
    "SDK, streamed": lambda model: stream_of(model._client),
    "SDK, raw": lambda model: raw(model._client),
    "SDK, raw, streamed": lambda model: raw_stream(model._client),
    "SDK, events": lambda model: [
        event.type
        for event in model._client.messages.create(model=MODEL, max_tokens=9, messages=QUESTION, stream=True)
    ][:2],
}
ASYNC: dict[str, Callable[[ChatAnthropic], Awaitable[Any]]] = {
    "ainvoke": lambda model: model.ainvoke("hello"),
    "astream": lambda model: amerged(model.astream("hello")),
    "abatch": lambda model: model.abatch(["hello", "hello"]),
    "tools": lambda model: model.bind_tools([weather], tool_choice="any").ainvoke("the weather in Ulm?"),
    "SDK": lambda model: model._async_client.messages.create(model=MODEL, max_tokens=40, messages=QUESTION),
    "SDK, streamed": lambda model: astream_of(model._async_client),
}


def shown(value: Any, *, whole: bool) -> Any:
    """Return what an answer says; with *whole* every field of it but the ids that a run or a call gets."""
    if isinstance(value, list):
        return [shown(each, whole=whole) for each in value]
    if isinstance(value, BaseMessage):
        calls = [(call["name"], call["args"]) for call in getattr(value, "tool_calls", [])]
        if not whole:
            return value.text, calls, value.response_metadata.get("stop_reason")
        counts = getattr(value, "usage_metadata", None)
        return value.text, calls, kinds(value.content), value.response_metadata, counts, value.additional_kwargs
    if isinstance(value, anthropic.BaseModel):
        dumped = value.model_dump()
        return dumped if whole else (kinds(dumped["content"]), dumped["stop_reason"])
    return value


def kinds(content: Any) -> Any:
    return [block["type"] for block in content] if isinstance(content, list) else content


@pytest.mark.parametrize("form", SYNC)
def test_every_form_is_served_once_and_answers_as_bare(
    form: str, orla: Orla, ours: MessagesServer, theirs: MessagesServer
) -> None:
    bare = SYNC[form](model_at(theirs))
    expected, theirs.requests = len(theirs.served), []
    served = inside(orla, lambda: SYNC[form](model_at(theirs)))
    judge(form, orla, ours, theirs, expected)
    assert shown(served, whole=native(ours)) == shown(bare, whole=native(ours))


@pytest.mark.parametrize("form", ASYNC)
def test_every_async_form_is_served_once_and_answers_as_bare(
    form: str, orla: Orla, ours: MessagesServer, theirs: MessagesServer
) -> None:
    async def run() -> Any:
        return await ASYNC[form](model_at(theirs))

    bare = asyncio.run(run())
    expected, theirs.requests = len(theirs.served), []
    served = ainside(orla, run)
    judge(form, orla, ours, theirs, expected)
    assert shown(served, whole=native(ours)) == shown(bare, whole=native(ours))


def judge(form: str, orla: Orla, ours: MessagesServer, theirs: MessagesServer, expected: int) -> None:
    """Assert that each call was served once, by the backend, under its stage."""
    assert theirs.requests == [], "nothing went where the code says"
    path = "/v1/messages" if native(ours) else "/v1/chat/completions"
    assert [seen.path for seen in ours.served] == [path] * expected
    assert all(CALLER_KEY not in f"{seen.headers}" for seen in ours.served)
    records = orla.records()
    assert [(each.stage, each.backend, each.external) for each in records] == [("ask", "main", False)] * expected
    assert [each.error for each in records] == [None] * expected
    assert all(record.prompt_tokens and record.completion_tokens for record in records), form


# What an answer can hold

MUCH = Answer(
    (
        thinking("Let me see."),
        text("I look."),
        tool_use("weather", "a", city="Köln"),
        tool_use("weather", "b", city="Ulm"),
    )
)


def once(body: dict[str, Any]) -> Answer | None:
    """Call a tool twice, then say what it brought."""
    said = str(body["messages"][-1])
    return Answer((text("Sunny in both."),)) if "sunny in Ulm" in said else MUCH


def agent(server: MessagesServer, **settings: Any) -> Any:
    return create_agent(model_at(server, **settings), [weather], system_prompt="You are brief. " * 20)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_agent_thinks_calls_and_answers(
    streamed: bool, ours: MessagesServer, theirs: MessagesServer, orla: Orla
) -> None:
    ours.script = theirs.script = once
    asked: Any = {"messages": [("user", "The weather in Köln and Ulm?")]}
    settings: dict[str, Any] = {"thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 4000}
    bare = agent(theirs, **settings)
    wrapped = orla.wrap(agent(theirs, **settings))
    expected, theirs.requests = bare.invoke(asked)["messages"], []
    if streamed:
        pieces = [piece for piece, _ in wrapped.stream(asked, stream_mode="messages")]
        assert "".join(piece.text for piece in pieces if piece.type == "AIMessageChunk") == "I look.Sunny in both."
    else:
        messages = wrapped.invoke(asked)["messages"]
        assert [each.content for each in messages] == [each.content for each in expected]
        assert [getattr(each, "tool_calls", None) for each in messages] == [
            getattr(each, "tool_calls", None) for each in expected
        ]
    assert theirs.requests == [] and len(ours.served) == 2
    first, second = orla.records()
    assert (first.stage, second.stage) == ("model", "model")
    assert not first.cached_tokens and second.cached_tokens, "the second call begins as the first one"


def test_two_stages_find_one_anothers_prefix(ours: MessagesServer, theirs: MessagesServer, orla: Orla) -> None:
    model, long = model_at(theirs), "The same report for everybody. " * 30

    def read(state: MessagesState) -> Any:
        return {"messages": [model.invoke([("system", long), ("user", "What does it say?")])]}

    def judge_it(state: MessagesState) -> Any:
        return {"messages": [model.invoke([("system", long), ("user", "Is it good?")])]}

    graph = StateGraph(MessagesState).add_node("read", read).add_node("judge", judge_it)
    orla.wrap(graph.add_edge(START, "read").add_edge("read", "judge").compile()).invoke({"messages": []})
    first, second = orla.records()
    assert (first.stage, second.stage) == ("read", "judge")
    assert second.cached_tokens is not None and second.cached_tokens > 100
    assert second.prompt_tokens is not None and second.prompt_tokens > second.cached_tokens


# Errors and retries

FAILURES = {
    400: ("invalid_request_error", anthropic.BadRequestError),
    403: ("permission_error", anthropic.PermissionDeniedError),
    404: ("not_found_error", anthropic.NotFoundError),
    429: ("rate_limit_error", anthropic.RateLimitError),
    500: ("api_error", anthropic.InternalServerError),
    529: ("overloaded_error", anthropic.OverloadedError),
}


@pytest.mark.parametrize("status", FAILURES)
def test_an_engines_error_is_the_clients_own(
    status: int, ours: MessagesServer, theirs: MessagesServer, orla: Orla
) -> None:
    kind, error = FAILURES[status]
    ours.script = lambda body: Answer(error=(status, kind, "so it is"))
    with pytest.raises(error, match="so it is") as raised:
        inside(orla, lambda: model_at(theirs)._client.messages.create(model=MODEL, max_tokens=9, messages=QUESTION))
    assert isinstance(raised.value, anthropic.APIStatusError)
    assert (raised.value.status_code, raised.value.type) == (status, kind)
    assert theirs.requests == [] and len(ours.served) == 1
    assert orla.records()[0].error is not None


def test_an_error_amid_a_stream_is_the_clients_own(ours: MessagesServer, theirs: MessagesServer, orla: Orla) -> None:
    broken = Answer((text("one two three four"),), error=(529, "overloaded_error", "Overloaded"), breaks_after=3)
    ours.script = lambda body: broken
    said: list[str] = []

    def ask() -> None:
        for chunk in model_at(theirs).stream("hello"):
            said.append(chunk.text)

    with pytest.raises(anthropic.APIStatusError, match="Overloaded"):
        inside(orla, ask)
    assert said and theirs.requests == []


def test_retries_are_attempts_of_one_call(ours: MessagesServer, theirs: MessagesServer, orla: Orla) -> None:
    failures = [Answer(error=(529, "overloaded_error", "Overloaded"))] * 2
    ours.script = lambda body: failures.pop() if failures else None
    answer = inside(orla, lambda: model_at(theirs, max_retries=2).invoke("hello"))
    assert answer.text.startswith("once upon a time") and len(ours.served) == 3
    assert only(orla).attempts == 3


def test_our_own_errors_come_out_as_they_are(
    ours: MessagesServer, theirs: MessagesServer, make_orla: MakeOrla
) -> None:
    class Nowhere:
        def map(self, call: Any, backends: Any) -> str:
            return "nowhere"

    orla = served_by(ours, make_orla, mapper=Nowhere())
    with pytest.raises(MappingError, match="nowhere"):
        inside(orla, lambda: model_at(theirs, max_retries=2).invoke("hello"))
    assert theirs.requests == [] and ours.served == []


# What cannot be translated

SEARCH = {"type": "web_search_20250305", "name": "web_search"}


def test_what_cannot_be_translated_passes_and_is_recorded(
    ours: MessagesServer, theirs: MessagesServer, orla: Orla, caplog: pytest.LogCaptureFixture
) -> None:
    theirs.script = ours.script = lambda body: Answer((text("found"),))
    for _ in range(2):
        assert inside(orla, lambda: model_at(theirs).bind_tools([SEARCH]).invoke("?")).text == "found"
    assert [each.external for each in orla.records()] == [not native(ours)] * 2
    assert len(theirs.served) == (0 if native(ours) else 2)
    warned = [line for line in caplog.messages if "tools[0].type" in line]
    assert len(warned) == (0 if native(ours) else 1)


def test_what_cannot_be_translated_is_an_error_where_that_is_wanted(
    ours: MessagesServer, theirs: MessagesServer, make_orla: MakeOrla
) -> None:
    ours.script = lambda body: Answer((text("found"),))
    orla = served_by(ours, make_orla, untranslatable="error")

    def ask() -> Any:
        return model_at(theirs).bind_tools([SEARCH]).invoke("?")

    if native(ours):
        assert inside(orla, ask).text == "found"
    else:
        with pytest.raises(MappingError, match=r"tools\[0\].type"):
            inside(orla, ask)
    assert theirs.requests == []


def test_counting_tokens_is_no_model_call(ours: MessagesServer, theirs: MessagesServer, orla: Orla) -> None:
    counted = inside(orla, lambda: model_at(theirs).get_num_tokens_from_messages([HumanMessage("one two")]))
    assert counted == 3 and orla.records() == [] and ours.served == []


def test_outside_a_wrapped_graph_nothing_changes(ours: MessagesServer, theirs: MessagesServer, orla: Orla) -> None:
    assert model_at(theirs).invoke("hello").text
    assert len(theirs.served) == 1 and ours.served == [] and orla.records() == []
