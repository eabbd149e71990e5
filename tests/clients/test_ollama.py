"""Graphs whose models are Ollama's: served in every form, by an Ollama and by what speaks chat completions alone."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import functools
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import ollama
import pytest
from langchain.agents import create_agent
from langchain.chat_models import init_chat_model
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM
from langgraph.graph import END, START, StateGraph
from pydantic import BaseModel
from typing_extensions import TypedDict

from orla_lg import BackendUnavailable, BudgetExceeded, Limit, Limits, MappingError, Orla
from tests.clients.nodes import ainside, inside
from tests.clients.ollama_graphs import OURS, THEIRS, backend, plain, served
from tests.wire.ollama_server import OllamaServer

MESSAGES: list[dict[str, Any]] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(60)).decode()


class City(BaseModel):
    """A city."""

    name: str
    people: int


@tool
def weather(city: str) -> str:
    """Return the weather."""
    return f"sunny in {city}"


@tool
def people(city: str, year: int) -> int:
    """Count them."""
    return year


PLAIN_HTTP: Any = {"verify": False}
"""No certificates are read, which takes longer than a call."""


def chat(host: str, **more: Any) -> ChatOllama:
    return ChatOllama(model=THEIRS, base_url=host, client_kwargs=PLAIN_HTTP, **more)


def llm(host: str) -> OllamaLLM:
    return OllamaLLM(model=THEIRS, base_url=host, client_kwargs=PLAIN_HTTP)


def client(host: str) -> ollama.Client:
    return ollama.Client(host, **PLAIN_HTTP)


def aclient(host: str) -> ollama.AsyncClient:
    return ollama.AsyncClient(host, **PLAIN_HTTP)


def by_name(host: str) -> Any:
    return init_chat_model(f"ollama:{THEIRS}", base_url=host, client_kwargs=PLAIN_HTTP)


def picture() -> list[HumanMessage]:
    part = {"type": "image_url", "image_url": f"data:image/png;base64,{PNG}"}
    return [HumanMessage([{"type": "text", "text": "what is it?"}, part])]


def _sum(chunks: list[Any]) -> Any:
    return functools.reduce(lambda one, other: one + other, chunks)


async def _listed(stream: AsyncIterator[Any]) -> list[Any]:
    return [each async for each in stream]


def _loop(host: str) -> Any:
    """A model's calls of tools, their answers, and what it makes of them."""
    able = chat(host).bind_tools([weather, people])
    first: AIMessage = able.invoke("how is it?")
    assert [call["name"] for call in first.tool_calls] == ["weather", "people"]
    answers = [ToolMessage(f"sunny, {call['name']}", tool_call_id=call["id"]) for call in first.tool_calls]
    last = able.invoke([HumanMessage("how is it?"), first, *answers])
    return [[(call["name"], call["args"]) for call in first.tool_calls], last]


SYNC: dict[str, Callable[[str], Any]] = {
    "invoke": lambda host: chat(host, num_predict=50, temperature=0, keep_alive="5m").invoke("hello"),
    "stream": lambda host: _sum(list(chat(host).stream("hello"))),
    "batch": lambda host: chat(host).batch(["hello", "hi"]),
    "init_chat_model": lambda host: by_name(host).invoke("hello"),
    "init_chat_model stream": lambda host: _sum(list(by_name(host).stream("hello"))),
    "tools": _loop,
    "tools streamed": lambda host: [
        (call["name"], call["args"])
        for call in _sum(list(chat(host).bind_tools([weather]).stream("how?"))).tool_calls
    ],
    "schema": lambda host: chat(host).with_structured_output(City).invoke("a city"),
    "schema by a tool": lambda host: chat(host).with_structured_output(City, method="function_calling").invoke("a"),
    "json": lambda host: chat(host, format="json").invoke("a score"),
    "json mode": lambda host: chat(host).with_structured_output(None, method="json_mode").invoke("a score"),
    "thinking": lambda host: chat(host, reasoning=True).invoke("hello"),
    "thinking streamed": lambda host: _sum(list(chat(host, reasoning="high").stream("hello"))),
    "no thinking": lambda host: chat(host, reasoning=False).invoke("hello"),
    "image": lambda host: chat(host).invoke(picture()),
    "client chat": lambda host: client(host).chat(THEIRS, MESSAGES),
    "client chat streamed": lambda host: list(client(host).chat(THEIRS, MESSAGES, stream=True)),
    "client tools": lambda host: client(host).chat(THEIRS, MESSAGES, tools=[weather.func]),  # type: ignore[attr-defined]
    "client schema": lambda host: client(host).chat(THEIRS, MESSAGES, format=City.model_json_schema()),
    "client thinking": lambda host: list(client(host).chat(THEIRS, MESSAGES, think="low", stream=True)),
    "client bound": lambda host: client(host).chat(THEIRS, MESSAGES, options={"num_predict": 2}),
    "client generate": lambda host: client(host).generate(THEIRS, "hello", system="be brief"),
    "client generate streamed": lambda host: list(client(host).generate(THEIRS, "hello", stream=True)),
    "llm": lambda host: llm(host).invoke("hello"),
    "llm stream": lambda host: list(llm(host).stream("hello")),
    "llm batch": lambda host: llm(host).batch(["hello", "hi"]),
}
ASYNC: dict[str, Callable[[str], Any]] = {
    "ainvoke": lambda host: chat(host).ainvoke("hello"),
    "abatch": lambda host: chat(host).abatch(["hello", "hi"]),
    "atools": lambda host: (
        chat(host).bind_tools([weather]).ainvoke([HumanMessage("x"), AIMessage("y"), HumanMessage("z")])
    ),
    "aschema": lambda host: chat(host).with_structured_output(City).ainvoke("a city"),
    "athinking": lambda host: chat(host, reasoning=True).ainvoke("hello"),
    "client achat": lambda host: aclient(host).chat(THEIRS, MESSAGES),
    "client agenerate": lambda host: aclient(host).generate(THEIRS, "hello"),
    "llm ainvoke": lambda host: llm(host).ainvoke("hello"),
    "llm abatch": lambda host: llm(host).abatch(["hello", "hi"]),
    "init_chat_model ainvoke": lambda host: by_name(host).ainvoke("hello"),
}


async def _astream(host: str) -> Any:
    return _sum(await _listed(chat(host).astream("hello")))


async def _achat_streamed(host: str) -> Any:
    return await _listed(await aclient(host).chat(THEIRS, MESSAGES, stream=True))


async def _agenerate_streamed(host: str) -> Any:
    return await _listed(await aclient(host).generate(THEIRS, "hello", stream=True))


async def _allm_stream(host: str) -> Any:
    return await _listed(llm(host).astream("hello"))


ASYNC |= {
    "astream": _astream,
    "client achat streamed": _achat_streamed,
    "client agenerate streamed": _agenerate_streamed,
    "llm astream": _allm_stream,
}
TWICE = {"batch", "abatch", "llm batch", "llm abatch", "tools"}
"""Forms that make two calls."""


@pytest.fixture(scope="module")
def theirs() -> Iterator[OllamaServer]:
    """The server that the code names."""
    with served() as server:
        yield server


@pytest.fixture(scope="module")
def native() -> Iterator[OllamaServer]:
    with served(OURS) as server:
        yield server


@pytest.fixture(scope="module")
def chat_only() -> Iterator[OllamaServer]:
    with served(OURS, native=False) as server:
        yield server


@pytest.fixture(autouse=True)
def _nothing_asked(request: pytest.FixtureRequest) -> None:
    for name in ("theirs", "native", "chat_only"):
        if name in request.fixturenames:
            server: OllamaServer = request.getfixturevalue(name)
            server.requests.clear()
            server.machine.forget()
            server.api.fails_after = None


def asked(server: OllamaServer) -> list[str]:
    """Return the paths of the model calls that a server got."""
    models = [seen for seen in server.requests if seen.method == "POST" and seen.body and seen.path != "/api/show"]
    return [seen.path for seen in models]


def run(orla: Orla, form: str, host: str) -> Any:
    if form in SYNC:
        return inside(orla, lambda: SYNC[form](host))
    return ainside(orla, lambda: ASYNC[form](host))


def bare(form: str, host: str) -> Any:
    return SYNC[form](host) if form in SYNC else asyncio.run(_awaited(form, host))


async def _awaited(form: str, host: str) -> Any:
    return await ASYNC[form](host)


def assert_served(orla: Orla, form: str, theirs: OllamaServer) -> None:
    assert not asked(theirs)
    records = orla.records()
    assert len(records) == (2 if form in TWICE else 1)
    for record in records:
        assert (record.stage, record.backend, record.model, record.external) == ("ask", "main", OURS, False)
        assert record.error is None
        assert record.prompt_tokens and record.completion_tokens and record.cached_tokens is not None


@pytest.mark.parametrize("form", [*SYNC, *ASYNC])
def test_natively_it_is_as_bare(form: str, theirs: OllamaServer, native: OllamaServer, make_orla: Any) -> None:
    expected = plain(bare(form, theirs.root))
    paths = asked(theirs)
    theirs.requests.clear()
    orla = make_orla(backend(native), mapper={"*": "main"})
    assert plain(run(orla, form, theirs.root)) == expected
    assert asked(native) == paths and paths[0].startswith("/api/")
    assert_served(orla, form, theirs)


def meaning(said: Any) -> Any:
    """Return what an answer says, without how it was cut and what it says of the engine."""
    if isinstance(said, list) and said and isinstance(said[0], dict) and "done" in said[0]:
        whole = {k: v for k, v in said[-1].items() if v is not None and k != "context"}
        for part in ("response", "thinking"):
            whole[part] = "".join(each.get(part) or "" for each in said)
        messages = [each.get("message") or {} for each in said]
        texts = {part: "".join(each.get(part) or "" for each in messages) for part in ("content", "thinking")}
        return {
            **whole,
            "message": texts | {"calls": [each.get("tool_calls") for each in messages if each.get("tool_calls")]},
        }
    if isinstance(said, list) and all(isinstance(each, str) for each in said):
        return "".join(said)
    if isinstance(said, list):
        return [meaning(each) for each in said]
    if isinstance(said, dict):
        return {key: meaning(value) for key, value in said.items() if value is not None and key != "context"}
    return said


@pytest.mark.parametrize("form", [*SYNC, *ASYNC])
def test_translated_it_means_the_same(
    form: str, theirs: OllamaServer, chat_only: OllamaServer, make_orla: Any
) -> None:
    expected = meaning(plain(bare(form, theirs.root)))
    theirs.requests.clear()
    orla = make_orla(backend(chat_only), mapper={"*": "main"})
    assert meaning(plain(run(orla, form, theirs.root))) == expected
    assert set(asked(chat_only)) == {"/v1/chat/completions"}
    assert_served(orla, form, theirs)


# Whole graphs


class Research(TypedDict):
    topic: str
    query: str
    summary: str
    loops: int


def researcher(host: str) -> Any:
    """A local research agent: a query, then search, summary and reflection four times, then its report."""
    as_json, as_text = chat(host, format="json", temperature=0), chat(host, temperature=0)

    def generate_query(state: Research) -> Any:
        return {"query": json.loads(as_json.invoke(f"a query about {state['topic']}").content)["query"], "loops": 0}

    def web_research(state: Research) -> Any:
        return {"loops": state["loops"] + 1}

    def summarize_sources(state: Research) -> Any:
        return {"summary": as_text.invoke([("system", "sum up"), ("human", state["query"])]).content}

    def reflect_on_summary(state: Research) -> Any:
        return {"query": json.loads(as_json.invoke(f"what is missing of {state['summary']}").content)["query"]}

    def finalize_summary(state: Research) -> Any:
        return {"summary": as_text.invoke(f"write {state['summary']}").content}

    def route_research(state: Research) -> str:
        return "web_research" if state["loops"] < 4 else "finalize_summary"

    graph = StateGraph(Research)
    for node in (generate_query, web_research, summarize_sources, reflect_on_summary, finalize_summary):
        graph.add_node(node)
    graph.add_edge(START, "generate_query").add_edge("generate_query", "web_research")
    graph.add_edge("web_research", "summarize_sources").add_edge("summarize_sources", "reflect_on_summary")
    graph.add_conditional_edges("reflect_on_summary", route_research, ["web_research", "finalize_summary"])
    return graph.add_edge("finalize_summary", END).compile()


@pytest.mark.parametrize("speaks", ["native", "chat_only"])
def test_each_call_of_a_local_research_agent_is_served(
    speaks: str, theirs: OllamaServer, native: OllamaServer, chat_only: OllamaServer, make_orla: Any
) -> None:
    ours = {"native": native, "chat_only": chat_only}[speaks]
    expected = researcher(theirs.root).invoke({"topic": "stones"})
    theirs.requests.clear()
    orla = make_orla(backend(ours), backend(ours, "light"), mapper={"*": "main", "reflect_on_summary": "light"})
    assert orla.wrap(researcher(theirs.root)).invoke({"topic": "stones"}) == expected
    rounds = ["summarize_sources", "reflect_on_summary"] * 4
    assert [record.stage for record in orla.records()] == ["generate_query", *rounds, "finalize_summary"]
    assert not any(record.external or record.error for record in orla.records())
    assert [record.backend for record in orla.records()] == ["main", *["main", "light"] * 4, "main"]
    assert len(asked(ours)) == 10 and not asked(theirs)


@pytest.mark.parametrize("speaks", ["native", "chat_only"])
def test_an_agent_with_tools(
    speaks: str, theirs: OllamaServer, native: OllamaServer, chat_only: OllamaServer, make_orla: Any
) -> None:
    """The model's second request is the first and more on both wires, so its cache is found again."""
    ours = {"native": native, "chat_only": chat_only}[speaks]
    agent = create_agent(chat(theirs.root), [weather, people])
    expected = [message.content for message in agent.invoke({"messages": [("user", "how is it?")]})["messages"]]
    theirs.requests.clear()
    orla = make_orla(backend(ours), mapper={"*": "main"})
    wrapped = orla.wrap(create_agent(chat(theirs.root), [weather, people]))
    assert [
        message.content for message in wrapped.invoke({"messages": [("user", "how is it?")]})["messages"]
    ] == expected
    first, second = orla.records()
    assert (first.stage, second.stage, len(asked(ours)), asked(theirs)) == ("model", "model", 2, [])
    assert first.prompt_tokens and second.cached_tokens == first.prompt_tokens


# Errors


def answer(host: str, *, how: str) -> Any:
    if how == "chat":
        return client(host).chat(THEIRS, MESSAGES)
    if how == "streamed":
        return list(client(host).chat(THEIRS, MESSAGES, stream=True))
    return chat(host).invoke("hello")


@pytest.mark.parametrize("how", ["chat", "streamed", "model"])
@pytest.mark.parametrize("is_native", [True, False])
def test_an_engines_error_is_ollamas(how: str, is_native: bool, theirs: OllamaServer, make_orla: Any) -> None:
    def node() -> Any:
        with pytest.raises(ollama.ResponseError) as raised:
            answer(theirs.root, how=how)
        return raised.value

    with served(OURS, native=is_native) as ours:
        orla = make_orla(backend(ours), mapper={"*": "main"})
        orla.connect()
        ours.flags = dataclasses.replace(ours.flags, names=("other:7b",))
        error = inside(orla, node)
    assert (error.status_code, error.error) == (404, f"model '{OURS}' not found")
    assert len(asked(ours)) == 1 and not asked(theirs)
    (record,) = orla.records()
    assert record.error is not None and not record.external


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("how", ["streamed", "model"])
def test_a_model_that_fails_amid_its_answer(
    how: str, after: int, theirs: OllamaServer, native: OllamaServer, make_orla: Any
) -> None:
    native.api.fails_after = after
    orla = make_orla(backend(native), mapper={"*": "main"})

    def node() -> Any:
        with pytest.raises(ollama.ResponseError, match="an error was encountered"):
            answer(theirs.root, how=how)
        return True

    assert inside(orla, node)
    assert all(record.error is not None for record in orla.records()) and not asked(theirs)


@pytest.mark.parametrize("how", ["chat", "streamed", "model"])
def test_errors_of_ours_come_as_they_are(
    how: str, theirs: OllamaServer, native: OllamaServer, make_orla: Any
) -> None:
    """Ollama's client makes a ``ConnectionError`` that speaks of its download of what it does not know."""
    with served(OURS) as gone:
        unreachable = make_orla(backend(gone), mapper={"*": "main"})
        unreachable.connect()
    with pytest.raises(BackendUnavailable, match="no engine answered"):
        inside(unreachable, lambda: answer(theirs.root, how=how))
    orla = make_orla(backend(native), mapper={"*": "main"}, limits=Limits(stages={"ask": Limit(calls=1)}))
    with pytest.raises(BudgetExceeded):
        inside(orla, lambda: [answer(theirs.root, how=how) for _ in range(2)])
    with pytest.raises(MappingError, match="variant 'v' does not exist"):
        inside(orla, lambda: answer(theirs.root, how=how), {"configurable": {"orla": {"variant": "v"}}})
    assert not asked(theirs) and len(asked(native)) == 1


def test_what_cannot_be_translated_passes_or_fails(
    theirs: OllamaServer, chat_only: OllamaServer, native: OllamaServer, make_orla: Any, caplog: Any
) -> None:
    def node() -> Any:
        return client(theirs.root).generate(THEIRS, "hello", raw=True).response

    expected = node()
    theirs.requests.clear()
    orla = make_orla(backend(chat_only), mapper={"*": "main"})
    assert inside(orla, node) == expected
    (record,) = orla.records()
    assert record.external and asked(theirs) == ["/api/generate"] and not asked(chat_only)
    assert "raw" in caplog.text
    theirs.requests.clear()
    strict = make_orla(backend(chat_only), backend(native, "other"), mapper={"*": "main"}, untranslatable="error")
    with pytest.raises(MappingError, match=r"raw: .* other"):
        inside(strict, node)
    assert not asked(theirs) and not asked(chat_only)
    orla = make_orla(backend(native), mapper={"*": "main"})
    assert inside(orla, node) == expected
    assert asked(native) == ["/api/generate"] and not asked(theirs)


def test_what_is_no_model_call_passes(theirs: OllamaServer, native: OllamaServer, make_orla: Any) -> None:
    orla = make_orla(backend(native), mapper={"*": "main"})
    native.requests.clear()

    def node() -> Any:
        model = chat(theirs.root, validate_model_on_init=True)
        shown = client(theirs.root).show(THEIRS)
        client(theirs.root).generate(THEIRS, keep_alive=0)
        client(theirs.root).chat(THEIRS, keep_alive="5m")
        return model.invoke("hello").content, shown.capabilities

    content, capabilities = inside(orla, node)
    assert content == "1 user said: hello" and "thinking" in capabilities
    assert [seen.path for seen in theirs.requests] == ["/api/tags", "/api/show", "/api/generate", "/api/chat"]
    assert len(orla.records()) == 1 and asked(native) == ["/api/chat"]


def test_embeddings_are_recorded(theirs: OllamaServer, native: OllamaServer, make_orla: Any) -> None:
    def node() -> Any:
        return OllamaEmbeddings(model=THEIRS, base_url=theirs.root, client_kwargs=PLAIN_HTTP).embed_documents(
            ["a b", "c"]
        )

    expected = node()
    theirs.requests.clear()
    orla = make_orla(backend(native), mapper={"*": "main"})
    assert inside(orla, node) == expected
    (record,) = orla.records()
    assert (record.stage, record.external, asked(theirs)) == ("ask:embeddings", True, ["/api/embed"])


@pytest.mark.parametrize("speaks", ["native", "chat_only"])
@pytest.mark.parametrize("how", ["embed", "embeddings"])
def test_embeddings_are_served_where_a_mapping_names_them(
    speaks: str,
    how: str,
    theirs: OllamaServer,
    native: OllamaServer,
    chat_only: OllamaServer,
    make_orla: Any,
) -> None:
    ours = {"native": native, "chat_only": chat_only}[speaks]

    def node() -> Any:
        if how == "embeddings":
            return [client(theirs.root).embeddings(THEIRS, "a b c").embedding]
        return OllamaEmbeddings(model=THEIRS, base_url=theirs.root, client_kwargs=PLAIN_HTTP).embed_documents(
            ["a b", "c"]
        )

    expected = node()
    theirs.requests.clear()
    orla = make_orla(backend(ours), mapper={"ask:embeddings": "main"})
    vectors = inside(orla, node)
    assert [[each / math.hypot(*vector) for each in vector] for vector in vectors] == [
        pytest.approx([each / math.hypot(*vector) for each in vector]) for vector in expected
    ]
    assert asked(ours) == ["/v1/embeddings" if speaks == "chat_only" else f"/api/{how}"] and not asked(theirs)
    (record,) = orla.records()
    assert (record.stage, record.backend, record.external, record.error) == ("ask:embeddings", "main", False, None)
    assert how == "embeddings" or record.prompt_tokens == 3
