"""Anthropic's and Ollama's clients, on a backend that speaks their wire and on one that does not."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from orla_lg import Backend, Orla
from orla_lg.testing.faults import Fault
from tests.clients.nodes import ainside, inside
from tests.conftest import BACKEND_KEY, CALLER_KEY, at
from tests.stub_engine import Reply, StubEngine
from tests.wire.machine import Machine
from tests.wire.ollama_server import OllamaServer
from tests.wires.messages_server import Answer, MessagesServer, text

anthropic = pytest.importorskip("anthropic")
ollama = pytest.importorskip("ollama")
ChatAnthropic = pytest.importorskip("langchain_anthropic").ChatAnthropic
ChatOllama = pytest.importorskip("langchain_ollama").ChatOllama

MESSAGES: Any = [{"role": "user", "content": "hello"}]
STUB_SAID = "1 user said: hello"
STORY = "once upon a time a stone lay beside the road and waited"


@pytest.fixture
def theirs(other_engine: StubEngine) -> StubEngine:
    """The server that the application's code names."""
    return other_engine


def root(theirs: StubEngine) -> str:
    return theirs.url.removesuffix("/v1")


Made = Callable[[str], Any]
"""Asks in a node; the argument is the server's root that the code names."""


def _anthropic(url: str, **more: Any) -> Any:
    return anthropic.Anthropic(base_url=url, api_key=CALLER_KEY, **{"max_retries": 0, **more}).messages


def _chat_anthropic(url: str) -> Any:
    return ChatAnthropic(model="claude", base_url=url, api_key=CALLER_KEY, max_retries=0, max_tokens=64)


def _helper(url: str) -> str:
    with _anthropic(url).stream(model="claude", max_tokens=64, messages=MESSAGES) as stream:
        return "".join(stream.text_stream)


def _anthropic_create(url: str, **more: Any) -> Any:
    return _anthropic(url).create(model="claude", max_tokens=64, messages=MESSAGES, **more)


ANTHROPIC: dict[str, Made] = {
    "create": lambda url: _anthropic_create(url).content[0].text,
    "stream": lambda url: "".join(
        event.delta.text for event in _anthropic_create(url, stream=True) if event.type == "content_block_delta"
    ),
    "helper": _helper,
    "raw": lambda url: (
        _anthropic(url)
        .with_raw_response.create(model="claude", max_tokens=64, messages=MESSAGES)
        .parse()
        .content[0]
        .text
    ),
    "invoke": lambda url: _chat_anthropic(url).invoke("hello").text,
    "streamed": lambda url: "".join(chunk.text for chunk in _chat_anthropic(url).stream("hello")),
}


async def _aanthropic(url: str) -> str:
    client = anthropic.AsyncAnthropic(base_url=url, api_key=CALLER_KEY, max_retries=0).messages
    async with client.stream(model="claude", max_tokens=64, messages=MESSAGES) as stream:
        pieces = [piece async for piece in stream.text_stream]
    return "".join(pieces)


async def _achat_anthropic(url: str) -> str:
    return str((await _chat_anthropic(url).ainvoke("hello")).text)


AANTHROPIC: dict[str, Callable[[str], Awaitable[Any]]] = {"helper": _aanthropic, "invoke": _achat_anthropic}


def _ollama_chat(url: str, **more: Any) -> Any:
    return ollama.Client(url, headers={"authorization": f"Bearer {CALLER_KEY}"}).chat("llama", MESSAGES, **more)


def _chat_ollama(url: str) -> Any:
    return ChatOllama(model="llama", base_url=url)


OLLAMA: dict[str, Made] = {
    "chat": lambda url: _ollama_chat(url).message.content,
    "stream": lambda url: "".join(part.message.content for part in _ollama_chat(url, stream=True)),
    "generate": lambda url: ollama.Client(url).generate("llama", "hello").response,
    "invoke": lambda url: _chat_ollama(url).invoke("hello").content,
    "streamed": lambda url: "".join(chunk.content for chunk in _chat_ollama(url).stream("hello")),
}


async def _aollama(url: str) -> str:
    parts = await ollama.AsyncClient(url).chat("llama", MESSAGES, stream=True)
    return "".join([part.message.content async for part in parts])


async def _aollama_whole(url: str) -> str:
    return str((await ollama.AsyncClient(url).chat("llama", MESSAGES)).message.content)


async def _achat_ollama(url: str) -> str:
    return "".join([chunk.content async for chunk in _chat_ollama(url).astream("hello")])


AOLLAMA: dict[str, Callable[[str], Awaitable[Any]]] = {
    "stream": _aollama,
    "chat": _aollama_whole,
    "streamed": _achat_ollama,
}

ALL = {f"anthropic {form}": ask for form, ask in ANTHROPIC.items()} | {
    f"ollama {form}": ask for form, ask in OLLAMA.items()
}
AALL = {f"anthropic {form}": ask for form, ask in AANTHROPIC.items()} | {
    f"ollama {form}": ask for form, ask in AOLLAMA.items()
}


def assert_recorded(orla: Orla) -> None:
    (record,) = orla.records()
    assert (record.stage, record.backend, record.attempts, record.error) == ("ask", "main", 1, None)
    assert record.prompt_tokens and record.completion_tokens and not record.external
    assert orla.statistics().unidentified == 0


@pytest.mark.parametrize("form", ALL)
def test_translated_where_the_engine_does_not_speak_the_wire(
    engine: StubEngine, theirs: StubEngine, orla: Orla, form: str
) -> None:
    assert inside(orla, lambda: ALL[form](root(theirs))) == STUB_SAID
    (seen,) = engine.chats
    assert (seen.key, seen.body["model"]) == (BACKEND_KEY, "stub-model")
    assert CALLER_KEY not in str(seen.headers) and not theirs.requests
    assert_recorded(orla)


@pytest.mark.parametrize("form", AALL)
def test_translated_async(engine: StubEngine, theirs: StubEngine, orla: Orla, form: str) -> None:
    assert ainside(orla, lambda: AALL[form](root(theirs))) == STUB_SAID
    assert len(engine.chats) == 1 and not theirs.requests
    assert_recorded(orla)


@pytest.fixture
def speaking(request: pytest.FixtureRequest) -> Iterator[MessagesServer | OllamaServer]:
    """A stand-in that speaks the wire of the test's client."""
    is_anthropic = request.node.callspec.params["form"].startswith("anthropic")
    machine = Machine(running=4, token_s=0.0)
    stand_in: MessagesServer | OllamaServer = (
        MessagesServer(key=BACKEND_KEY, machine=machine) if is_anthropic else OllamaServer(machine=machine)
    )
    with stand_in as running:
        yield running


def native(speaking: MessagesServer | OllamaServer, make_orla: Callable[..., Orla]) -> Orla:
    kind = "openai" if isinstance(speaking, MessagesServer) else "ollama"
    model = "stand-in" if kind == "openai" else "stand-in:latest"
    backend = Backend("main", speaking.url, model=model, engine=kind, api_key=BACKEND_KEY)
    return make_orla(backend, mapper={"*": "main"})


def calls(speaking: MessagesServer | OllamaServer) -> list[Any]:
    paths = ("/v1/messages", "/api/chat", "/api/generate", "/v1/chat/completions")
    return [seen for seen in speaking.requests if seen.path in paths and seen.method == "POST" and seen.body]


@pytest.mark.parametrize("form", ALL)
def test_passed_as_it_is_where_the_engine_speaks_the_wire(
    speaking: MessagesServer | OllamaServer, theirs: StubEngine, make_orla: Any, form: str
) -> None:
    orla = native(speaking, make_orla)
    assert inside(orla, lambda: ALL[form](root(theirs))).startswith(STORY)
    (seen,) = calls(speaking)
    wanted = "/v1/messages" if "anthropic" in form else "/api/generate" if "generate" in form else "/api/chat"
    assert seen.path == wanted and seen.body["model"].startswith("stand-in")
    assert CALLER_KEY not in str(seen.headers) and not theirs.requests
    if "anthropic" in form:
        assert seen.headers["x-api-key"] == BACKEND_KEY and seen.headers["anthropic-version"]
    assert_recorded(orla)


@pytest.mark.parametrize("form", AALL)
def test_passed_async(speaking: MessagesServer | OllamaServer, theirs: StubEngine, make_orla: Any, form: str) -> None:
    orla = native(speaking, make_orla)
    assert ainside(orla, lambda: AALL[form](root(theirs))).startswith(STORY)
    assert len(calls(speaking)) == 1 and not theirs.requests
    assert_recorded(orla)


# ── errors, each in its client's own form ────────────────────────────────────────────────────────────


def test_an_engines_refusal_is_the_clients_own_error(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    engine.rule = lambda seen: Reply(status=400)
    with pytest.raises(anthropic.BadRequestError) as caught:
        inside(orla, lambda: ANTHROPIC["create"](root(theirs)))
    assert caught.value.body["type"] == "error"
    with pytest.raises(ollama.ResponseError) as refused:
        inside(orla, lambda: OLLAMA["chat"](root(theirs)))
    assert refused.value.status_code == 400
    with pytest.raises(ollama.ResponseError):
        inside(orla, lambda: OLLAMA["stream"](root(theirs)))


def test_an_error_in_a_stream_is_the_wires_event(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    engine.script.extend([Fault.ERROR_EVENT] * 2)
    with pytest.raises(anthropic.APIStatusError):
        inside(orla, lambda: ANTHROPIC["stream"](root(theirs)))
    with pytest.raises(ollama.ResponseError):
        inside(orla, lambda: OLLAMA["stream"](root(theirs)))
    assert all(record.error for record in orla.records())


def test_an_error_in_a_native_stream_passes(theirs: StubEngine, make_orla: Any) -> None:
    failing = Answer((text("once upon a time"),), error=(529, "overloaded_error", "Overloaded"), breaks_after=3)
    with MessagesServer(lambda body: failing, key=BACKEND_KEY) as speaking:
        orla = native(speaking, make_orla)
        with pytest.raises(anthropic.APIStatusError):
            inside(orla, lambda: ANTHROPIC["stream"](root(theirs)))
        assert orla.records()[-1].error


@pytest.mark.parametrize("form", ["anthropic stream", "ollama stream"])
def test_a_translated_stream_that_is_dropped_gives_its_grant_back(
    engine: StubEngine, theirs: StubEngine, orla: Orla, form: str
) -> None:
    def body() -> None:
        url = root(theirs)
        stream = iter(_anthropic_create(url, stream=True) if "anthropic" in form else _ollama_chat(url, stream=True))
        next(stream)
        assert orla.statistics().backends["main"].queue.in_flight == 1

    inside(orla, body)
    gc.collect()


def test_an_anthropic_call_that_passes_keeps_its_sdks_retries(
    engine: StubEngine, theirs: StubEngine, make_orla: Any
) -> None:
    orla = make_orla(at(engine), mapper={"other": "main"})
    theirs.every_path = True
    theirs.script.extend([Reply(status=500, headers=(("retry-after-ms", "1"),)), Reply(status=400)])

    def ask() -> Any:
        said = iter(MESSAGES)  # to be read once
        return _anthropic(root(theirs), max_retries=2).create(model="claude", max_tokens=64, messages=said)

    with pytest.raises(anthropic.BadRequestError):
        inside(orla, ask)
    assert [seen.body["messages"] for seen in theirs.requests] == [MESSAGES] * 2
    (record,) = orla.records()
    assert record.external and "BadRequestError" in str(record.error)
