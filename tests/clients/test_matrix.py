"""Each client of the table, in each form, on a backend that speaks its wire and on one that speaks chat completions.

Passed as it is, an answer is what the bare model gets of the same engine, field by field. Translated, it means what
``ChatOpenAI`` gets there. The stage is right, each request is served once, and nothing reaches the server that the
code names. Real packages, scripted engines.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import BaseModel, Field

from orla_lg import Backend, Orla
from orla_lg.clients.table import CLIENTS
from tests.conftest import BACKEND_KEY, CALLER_KEY, at
from tests.stub_engine import StubEngine
from tests.wire.machine import Machine
from tests.wire.ollama_server import OllamaServer
from tests.wire.served import WireServer
from tests.wire.vllm_server import VLLMServer
from tests.wires.messages_server import MessagesServer
from tests.wires.responses_server import ResponsesServer

in_one_loop = pytest.mark.asyncio(loop_scope="module")
"""Models keep their HTTP clients, which are a loop's own."""

MODEL = "stand-in"
ASKED = "please double 7"


def double(number: int) -> int:
    """Double a number."""
    return 2 * number


class Verdict(BaseModel):
    """What is thought of it."""

    number: int = Field(description="of points")
    why: str = Field(description="in a word")


# Forms: each is a coroutine over a model, which returns what the application sees


def joined(chunks: list[Any]) -> AIMessageChunk:
    message: AIMessageChunk = chunks[0]
    for chunk in chunks[1:]:
        message = message + chunk
    return message


async def invoke(model: Any) -> Any:
    return await asyncio.to_thread(model.invoke, ASKED)


async def ainvoke(model: Any) -> Any:
    return await model.ainvoke(ASKED)


async def stream(model: Any) -> Any:
    return joined(await asyncio.to_thread(lambda: list(model.stream(ASKED))))


async def astream(model: Any) -> Any:
    return joined([chunk async for chunk in model.astream(ASKED)])


async def tools(model: Any) -> Any:
    return await model.bind_tools([double]).ainvoke(ASKED)


async def streamed_tools(model: Any) -> Any:
    return joined([chunk async for chunk in model.bind_tools([double]).astream(ASKED)])


async def structured(model: Any) -> Any:
    takes_classes = type(model).__name__ != "ChatHuggingFace"
    return await model.with_structured_output(Verdict if takes_classes else Verdict.model_json_schema()).ainvoke(
        ASKED
    )


async def batch(model: Any) -> Any:
    return await asyncio.to_thread(model.batch, ["one", "two", "three"])


FORMS = {form.__name__: form for form in (invoke, ainvoke, stream, astream, tools, streamed_tools, structured, batch)}
CALLS = {"batch": 3}


# Models: how each is made for a server's root, and the wire it speaks


@dataclass(frozen=True)
class Row:
    client: str
    """In the table."""
    package: str
    kind: str
    make: Callable[[Any, str], Any]
    wire: str = "chat"
    marked: bool = False
    """Its SDK takes no answer without a ``system_fingerprint``."""


def at_openais_path(request: httpx.Request) -> None:
    """Send what Groq's client asks to where engines answer: its vendor's paths begin with ``/openai``."""
    request.url = request.url.copy_with(path=request.url.path.removeprefix("/openai"))


async def aat_openais_path(request: httpx.Request) -> None:
    at_openais_path(request)


def chat_groq(kind: Any, root: str) -> Any:
    return kind(
        model=MODEL, base_url=root, api_key=CALLER_KEY, max_retries=0,
        http_client=httpx.Client(event_hooks={"request": [at_openais_path]}),
        http_async_client=httpx.AsyncClient(event_hooks={"request": [aat_openais_path]}),
    )  # fmt: skip


def chat_hugging_face(kind: Any, root: str) -> Any:
    endpoint = importlib.import_module("langchain_huggingface").HuggingFaceEndpoint
    asked = endpoint(endpoint_url=f"{root}/v1/chat/completions", huggingfacehub_api_token=CALLER_KEY, model=None)
    return kind(llm=asked, model_id=MODEL)


def openai(kind: Any, root: str, **more: Any) -> Any:
    return kind(model=MODEL, base_url=f"{root}/v1", api_key=CALLER_KEY, max_retries=0, stream_usage=True, **more)


ROWS = {
    "ChatOpenAI": Row("openai", "langchain_openai", "ChatOpenAI", openai),
    "ChatOpenAI, Responses": Row(
        "openai", "langchain_openai", "ChatOpenAI",
        lambda kind, root: openai(kind, root, use_responses_api=True), "responses",
    ),
    "ChatAnthropic": Row(
        "anthropic", "langchain_anthropic", "ChatAnthropic",
        lambda kind, root: kind(model=MODEL, base_url=root, api_key=CALLER_KEY, max_retries=0, max_tokens=64),
        "messages",
    ),
    "ChatOllama": Row(
        "ollama", "langchain_ollama", "ChatOllama", lambda kind, root: kind(model=MODEL, base_url=root), "ollama-chat"
    ),
    "ChatGroq": Row("groq", "langchain_groq", "ChatGroq", chat_groq),
    "ChatFireworks": Row(
        "fireworks-ai", "langchain_fireworks", "ChatFireworks",
        lambda kind, root: kind(model=MODEL, base_url=root, api_key=CALLER_KEY, max_retries=0),
    ),
    "ChatMistralAI": Row(
        "langchain-mistralai", "langchain_mistralai", "ChatMistralAI",
        lambda kind, root: kind(model=MODEL, endpoint=f"{root}/v1", api_key=CALLER_KEY, max_retries=0),
    ),
    "ChatHuggingFace": Row("langchain-huggingface", "langchain_huggingface", "ChatHuggingFace", chat_hugging_face),
    "ChatOpenRouter": Row(
        "langchain-openrouter", "langchain_openrouter", "ChatOpenRouter",
        lambda kind, root: kind(model=MODEL, base_url=f"{root}/v1", api_key=CALLER_KEY, max_retries=0), marked=True,
    ),
}  # fmt: skip


def speaker(row: Row, wire: str) -> StubEngine | WireServer:
    """Return an engine that speaks *wire*."""
    machine = Machine(running=4, token_s=0.0)
    if row.marked:
        return VLLMServer(machine=machine)
    if wire == "messages":
        return MessagesServer(machine=machine, name="msg_1")
    if wire == "responses":
        return ResponsesServer(machine=machine)
    return OllamaServer(machine=machine) if wire == "ollama-chat" else StubEngine(models=(MODEL,))


class World:
    """One row's model, the engine it is mapped to, and the server that the code names."""

    def __init__(self, row: Row, native: bool, stack: ExitStack) -> None:
        self.row, self.native = row, native
        self.kind = getattr(pytest.importorskip(row.package), row.kind)
        self.engine = stack.enter_context(speaker(row, row.wire if native else "chat"))
        self.theirs = stack.enter_context(StubEngine())
        name = "ollama" if isinstance(self.engine, OllamaServer) else "openai"
        served = "stand-in:latest" if name == "ollama" else MODEL
        backend = Backend("main", self.engine.url, model=served, engine=name, api_key=BACKEND_KEY)
        self.orla = stack.enter_context(Orla([backend], mapper={"ask": "main"}))

    def model(self, url: str) -> Any:
        return self.row.make(self.kind, url.removesuffix("/v1"))

    def forget(self) -> None:
        """Let the engine find nothing cached."""
        (self.engine if isinstance(self.engine, StubEngine) else self.engine.machine).forget()

    async def served(self, form: Callable[[Any], Any]) -> Any:
        """Return what a node gets in a wrapped graph."""
        results: list[Any] = []

        async def ask(state: MessagesState) -> Any:
            results.append(await form(self.model(self.theirs.url)))

        graph = StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask").compile()
        await self.orla.wrap(graph).ainvoke({"messages": []})
        return results[0]


WORLDS = [(name, native) for name, row in ROWS.items() for native in (True, False) if native or row.wire != "chat"]


@pytest.fixture(
    scope="module", params=WORLDS, ids=[f"{name}-{'native' if native else 'translated'}" for name, native in WORLDS]
)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    name, native = request.param
    with ExitStack() as stack:
        yield World(ROWS[name], native, stack)


VOLATILE = {
    "id", "created", "created_at", "total_duration", "load_duration", "prompt_eval_duration", "eval_duration",
    "system_fingerprint", "token_usage", "completed_at", "queue_time", "call_id", "model", "model_name",
}  # fmt: skip
"""Fields that differ from one answer to the next of the same engine; the model's name is the backend's."""


def plain(value: Any) -> Any:
    """Return what an application sees, without what no two answers have in common."""
    if isinstance(value, BaseModel) and not isinstance(value, BaseMessage):
        return value.model_dump()
    if isinstance(value, BaseMessage):
        shown = value.model_dump(exclude={"id"})
        return plain({"type": type(value).__name__, **shown})
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items() if name not in VOLATILE}
    return [plain(each) for each in value] if isinstance(value, list) else value


def meant(value: Any) -> Any:
    """Return what an answer means, whatever the wire it came on."""
    if isinstance(value, list):
        return [meant(each) for each in value]
    if not isinstance(value, AIMessage):
        return plain(value)
    usage: Any = value.usage_metadata or {}
    return {
        "text": value.text,
        "tools": [(call["name"], call["args"]) for call in value.tool_calls],
        "tokens": [usage.get(name) for name in ("input_tokens", "output_tokens", "total_tokens")],
    }


@in_one_loop
@pytest.mark.parametrize("form", FORMS)
async def test_a_client_in_a_form(world: World, form: str) -> None:
    before = len(world.orla.records())
    world.forget()
    answer = await world.served(FORMS[form])
    records = world.orla.records()[before:]
    assert len(records) == CALLS.get(form, 1), "served once each"
    assert {(record.stage, record.backend, record.attempts) for record in records} == {("ask", "main", 1)}
    assert not any(record.external or record.error for record in records)
    assert all(record.prompt_tokens and record.completion_tokens for record in records)
    assert not world.theirs.requests, "nothing may reach the server that the code names"
    world.forget()
    if world.native:
        assert plain(answer) == plain(await FORMS[form](world.model(world.engine.url)))
    else:
        assert meant(answer) == meant(await FORMS[form](openai(ChatOpenAI, world.engine.url.removesuffix("/v1"))))


def test_the_matrix_has_each_client_of_the_table() -> None:
    assert {client.package for client in CLIENTS} == {row.client for row in ROWS.values()} | set(SDKS)


# SDKs that no LangChain model stands on


SDKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "together": ("together", "Together", {}),
    "cerebras-cloud-sdk": ("cerebras.cloud.sdk", "Cerebras", {"warm_tcp_connection": False}),
}
MESSAGES: Any = [{"role": "user", "content": ASKED}]


def said(message: Any) -> str:
    """Return the text of a message or of a delta; Cerebras's SDK leaves what it does not know whole as a dict."""
    return str((message.get("content") if isinstance(message, dict) else message.content) or "")


async def created(one: Any, other: Any) -> list[str]:
    """Ask in each form; returns the answers."""
    asked = {"model": MODEL, "messages": MESSAGES}
    raw = await asyncio.to_thread(lambda: one.with_raw_response.create(**asked))
    streamed = await asyncio.to_thread(lambda: list(one.create(**asked, stream=True)))
    astreamed = [chunk async for chunk in await other.create(**asked, stream=True)]
    whole = [await asyncio.to_thread(lambda: one.create(**asked)), await other.create(**asked), raw.parse()]
    joined = ["".join(said(chunk.choices[0].delta) for chunk in chunks) for chunks in (streamed, astreamed)]
    return [said(each.choices[0].message) for each in whole] + joined


@pytest.mark.parametrize("package", SDKS)
async def test_an_sdk_of_the_same_make(package: str, engine: StubEngine, other_engine: StubEngine) -> None:
    name, kind, more = SDKS[package]
    pytest.importorskip(name)
    answers: list[str] = []

    async def ask(state: MessagesState) -> Any:
        module = importlib.import_module(name)
        given = {"base_url": other_engine.url.removesuffix("/v1"), "api_key": CALLER_KEY, "max_retries": 0, **more}
        one, other = getattr(module, kind)(**given), getattr(module, f"Async{kind}")(**given)
        answers.extend(await created(one.chat.completions, other.chat.completions))

    graph = StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask").compile()
    with Orla([at(engine)], mapper={"*": "main"}) as orla:
        await orla.wrap(graph).ainvoke({"messages": []})
        records = orla.records()
    assert answers == [f"1 user said: {ASKED}"] * 5
    assert len(engine.chats) == 5 == len(records) and not other_engine.requests
    assert all(seen.body["model"] == "stub-model" and seen.key == BACKEND_KEY for seen in engine.chats)
    assert not any(record.external for record in records)
