"""Models whose requests are not seen: their calls in a wrapped graph are recorded, their class is warned of once."""

from __future__ import annotations

import asyncio
import json
import logging
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.callbacks.manager import AsyncCallbackManager, CallbackManager
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import BaseChatModel, FakeListChatModel
from langchain_core.language_models.llms import LLM
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_openai import OpenAI
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Orla, Record
from orla_lg.graph.passing import AwaitedRequests
from tests.conftest import at, chat
from tests.stub_engine import StubEngine

HI: Any = {"messages": [("user", "hi")]}
Use = Callable[[Any], Any]


def ask(url: str, text: str) -> Any:
    """Ask an engine without any client."""
    body = {"model": "own", "messages": [{"role": "user", "content": text}]}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request) as answered:
        return json.load(answered)


class Posts(BaseChatModel):
    """A chat model that sends its requests by itself."""

    url: str

    @property
    def _llm_type(self) -> str:
        return "posts"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        answered = ask(self.url, str(messages[-1].text))
        counted = answered["usage"]
        message = AIMessage(
            answered["choices"][0]["message"]["content"],
            usage_metadata={
                "input_tokens": counted["prompt_tokens"],
                "output_tokens": counted["completion_tokens"],
                "total_tokens": counted["prompt_tokens"] + counted["completion_tokens"],
            },
        )
        return ChatResult(generations=[ChatGeneration(message=message)])


class Streams(Posts):
    def _stream(self, messages: Any, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        said = ask(self.url, str(messages[-1].text))["choices"][0]["message"]["content"]
        for word in said.split():
            yield ChatGenerationChunk(message=AIMessageChunk(f"{word} "))


class Routes(Posts):
    """A chat model that has another one answer."""

    inner: Any

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self.inner.invoke(messages))])


class Writes(LLM):
    """A text model that sends its requests by itself."""

    url: str

    @property
    def _llm_type(self) -> str:
        return "writes"

    def _call(self, prompt: str, *args: Any, **kwargs: Any) -> str:
        return str(ask(self.url, prompt)["choices"][0]["message"]["content"])


def node(use: Use, llm: Any) -> Any:
    def run(state: MessagesState) -> Any:
        use(llm)
        return {}

    return StateGraph(MessagesState).add_node("ask", run).add_edge(START, "ask").compile()


def passed(orla: Orla) -> list[Record]:
    return [record for record in orla.records() if record.external]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    told = [record for record in caplog.records if record.name == "orla_lg" and record.levelno >= logging.WARNING]
    return [record.getMessage() for record in told]


USES: dict[str, Use] = {
    "invoke": lambda llm: llm.invoke("hi"),
    "ainvoke": lambda llm: asyncio.run(llm.ainvoke("hi")),
    "stream": lambda llm: list(llm.stream("hi")),
    "batch": lambda llm: llm.batch(["hi"]),
    "abatch": lambda llm: asyncio.run(llm.abatch(["hi"])),
    "in a chain": lambda llm: (llm | str).invoke("hi"),
    "with callbacks of its own": lambda llm: llm.invoke("hi", {"callbacks": [BaseCallbackHandler()]}),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", [Posts, Streams, Writes])
def test_a_model_that_sends_by_itself_is_recorded(
    engine: StubEngine, orla: Orla, caplog: pytest.LogCaptureFixture, kind: Any, use: str
) -> None:
    graph = orla.wrap(node(USES[use], kind(url=engine.url)))
    graph.invoke(HI)
    graph.invoke(HI)
    assert len(engine.chats) == 2
    one, other = orla.records()
    assert (one.external, one.stage, one.backend, one.mapper, one.error) == (True, "ask", None, None, None)
    assert (
        one.model == kind.__name__
        and one.reason == f"no request of tests.test_passing_models.{kind.__name__} is seen"
    )
    assert one.run and one.run != other.run and one.duration_s > 0
    if use == "invoke" and kind is Posts:
        assert one.prompt_tokens and one.completion_tokens
    (told,) = warnings(caplog)
    assert "stage 'ask'" in told and f".{kind.__name__}," in told and "orla-lg clients" in told and "ChatOrla" in told
    assert orla.statistics().external == 2


def test_calls_side_by_side_are_each_recorded(engine: StubEngine, orla: Orla) -> None:
    async def together(llm: Any) -> None:
        async with asyncio.TaskGroup() as group:
            for n in range(4):
                group.create_task(llm.ainvoke(f"hi {n}"))

    llm = Posts(url=engine.url)
    orla.wrap(node(lambda llm: asyncio.run(together(llm)), llm)).invoke(HI)
    orla.wrap(node(lambda llm: llm.batch([f"hi {n}" for n in range(4)]), llm)).invoke(HI)
    assert len(passed(orla)) == 8 == len(engine.chats)


def test_several_prompts_of_one_call(engine: StubEngine, orla: Orla) -> None:
    prompts: Any = [[HumanMessage("a")], [HumanMessage("b")]]
    orla.wrap(node(lambda llm: llm.generate(prompts), Posts(url=engine.url))).invoke(HI)
    assert [record.external for record in orla.records()] == [True, True]
    orla.wrap(node(lambda llm: llm.generate(prompts), chat(engine))).invoke(HI)
    orla.wrap(node(lambda llm: asyncio.run(llm.agenerate(prompts)), chat(engine))).invoke(HI)
    assert [record.external for record in orla.records()[2:]] == [False] * 4


def test_served_calls_are_recorded_once_and_not_heard(
    engine: StubEngine, orla: Orla, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    for name in ("_has_token", "_has_end", "_has_error"):
        monkeypatch.setattr(AwaitedRequests, name, lambda self, *args, name=name: heard.append(name))
    for use in ("invoke", "ainvoke", "stream", "batch"):
        orla.wrap(node(USES[use], chat(engine, streaming=True))).invoke(HI)
    assert [record.external for record in orla.records()] == [False] * 4
    assert not heard


def test_a_model_that_asks_another_one(engine: StubEngine, orla: Orla, caplog: pytest.LogCaptureFixture) -> None:
    orla.wrap(node(USES["invoke"], Routes(url="", inner=chat(engine)))).invoke(HI)
    assert [record.external for record in orla.records()] == [False], "what it asks is served"
    assert not warnings(caplog)
    orla.wrap(node(USES["invoke"], Routes(url="", inner=Posts(url=engine.url)))).invoke(HI)
    assert [record.model for record in passed(orla)] == ["Posts"]


def test_fallbacks(engine: StubEngine, orla: Orla, caplog: pytest.LogCaptureFixture) -> None:
    dead = Posts(url="http://127.0.0.1:1")
    orla.wrap(node(USES["invoke"], dead.with_fallbacks([chat(engine)]))).invoke(HI)
    failed, served = orla.records()
    assert failed.external and failed.error is not None and failed.error.startswith("URLError")
    assert not served.external and not warnings(caplog), (
        "a model that only failed may be one that is not meant to work"
    )
    orla.wrap(node(USES["stream"], chat(engine).with_fallbacks([dead]))).invoke(HI)
    assert len(orla.records()) == 3


def test_a_stream_that_is_not_read_to_its_end(engine: StubEngine, orla: Orla) -> None:
    held: list[Any] = []

    def begun(llm: Any) -> None:
        held.append(llm.stream("hi"))
        next(held[-1])

    def closed(llm: Any) -> None:
        begun(llm)
        held[-1].close()

    llm = Streams(url=engine.url)
    orla.wrap(node(closed, llm)).invoke(HI)
    orla.wrap(node(begun, llm)).invoke(HI)
    assert [str(record.error).partition(":")[0] for record in passed(orla)] == ["GeneratorExit", "abandoned"]
    held[-1].close()
    assert len(passed(orla)) == 2
    orla.wrap(node(USES["invoke"], chat(engine))).invoke(HI)
    assert len(orla.records()) == 3


def test_a_fake_model_is_recorded_and_not_warned_of(orla: Orla, caplog: pytest.LogCaptureFixture) -> None:
    orla.wrap(node(USES["invoke"], FakeListChatModel(responses=["hello"]))).invoke(HI)
    (record,) = orla.records()
    assert record.external and record.model == "FakeListChatModel" and not warnings(caplog)


@pytest.fixture
def cache() -> Iterator[None]:
    set_llm_cache(InMemoryCache())
    yield
    set_llm_cache(None)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("kind", [Posts, Writes, None])
def test_what_langchain_has_cached_is_no_call(
    engine: StubEngine, orla: Orla, caplog: pytest.LogCaptureFixture, kind: Any
) -> None:
    llm = chat(engine) if kind is None else kind(url=engine.url)
    graph = orla.wrap(node(USES["invoke"], llm))
    graph.invoke(HI)
    caplog.clear()
    graph.invoke(HI)
    orla.wrap(node(USES["ainvoke"], llm)).invoke(HI)
    assert len(engine.chats) == 1 == len(orla.records()) and not warnings(caplog)


def test_graphs_in_graphs_record_a_call_once(engine: StubEngine, orla: Orla, make_orla: Callable[..., Orla]) -> None:
    inner = orla.wrap(node(USES["invoke"], Posts(url=engine.url)))
    outer = StateGraph(MessagesState).add_node("sub", inner).add_edge(START, "sub")
    orla.wrap(outer).invoke(HI)
    assert [record.stage for record in orla.records()] == ["sub|ask"]
    other = make_orla(at(engine))
    other.wrap(StateGraph(MessagesState).add_node("sub", inner).add_edge(START, "sub")).invoke(HI)
    assert [record.stage for record in orla.records()] == ["sub|ask"] * 2 and not other.records()


def test_outside_wrapped_graphs_nothing_is_recorded(
    engine: StubEngine, orla: Orla, caplog: pytest.LogCaptureFixture
) -> None:
    orla.wrap(node(USES["invoke"], chat(engine)))
    node(USES["invoke"], Posts(url=engine.url)).invoke(HI)
    Posts(url=engine.url).invoke("hi")
    Writes(url=engine.url).invoke("hi")
    assert not orla.records() and not warnings(caplog)


def test_wrong_hints_do_not_lose_the_record(engine: StubEngine, orla: Orla) -> None:
    graph = orla.wrap(node(USES["invoke"], Posts(url=engine.url)))
    graph.invoke(HI, {"configurable": {"orla": {"variant": "none of that name"}}})
    assert [record.stage for record in passed(orla)] == ["ask"]


def test_a_wrapped_sdk_is_restored(make_orla: Callable[..., Orla], engine: StubEngine) -> None:
    before = CallbackManager.on_llm_start, AsyncCallbackManager.on_llm_start
    orla = make_orla(at(engine))
    orla.wrap(node(USES["invoke"], chat(engine)))
    assert CallbackManager.on_llm_start is not before[0] and AsyncCallbackManager.on_llm_start is not before[1]
    orla.close()
    assert (CallbackManager.on_llm_start, AsyncCallbackManager.on_llm_start) == before


COMPLETION = {
    "id": "c", "object": "text_completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "text": "said", "finish_reason": "stop", "logprobs": None}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
}  # fmt: skip


@pytest.mark.parametrize("use", ["invoke", "ainvoke", "batch"])
def test_a_text_model_whose_client_is_known_is_recorded_once(make_orla: Callable[..., Orla], use: str) -> None:
    with StubEngine(speaks={"/v1/completions": lambda body: COMPLETION}) as engine:
        orla = make_orla(at(engine), mapper={"*": "main"})
        llm = OpenAI(model="gpt-x", base_url="http://127.0.0.1:1/v1", api_key="any", max_retries=0)  # type: ignore[call-arg,arg-type]
        orla.wrap(node(USES[use], llm)).invoke(HI)
        (record,) = orla.records()
        assert (record.external, record.stage, record.backend) == (False, "ask", "main")


@pytest.mark.parametrize("is_known", [True, False])
async def test_a_call_that_is_cancelled_before_its_request(
    engine: StubEngine, orla: Orla, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    """Of a model that is served otherwise nothing went past; of another one that is not known."""
    begun = asyncio.Event()

    async def never(*_: Any, **__: Any) -> Any:
        begun.set()
        await asyncio.sleep(3600)

    async def asks(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await llm.ainvoke(state["messages"])]}

    llm = chat(engine)
    wrapped = orla.wrap(StateGraph(MessagesState).add_node("asks", asks).add_edge(START, "asks").compile())
    if is_known:
        await wrapped.ainvoke(HI)
    monkeypatch.setattr(type(llm), "_agenerate", never)
    running = asyncio.ensure_future(wrapped.ainvoke(HI))  # noqa: TID251
    await begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [record.external for record in orla.records()] == ([False] if is_known else [True])
