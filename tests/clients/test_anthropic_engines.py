"""ChatAnthropic's graphs on llama.cpp: its cache is found again from stage to stage, and its bytes are understood."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from langchain_anthropic import ChatAnthropic, _client_utils
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Backend, Orla
from orla_lg.wires import reading
from orla_lg.wires.messages import MESSAGES
from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings

LONG = "You are the editor of a small paper, and you know the whole report by heart. " * 4
ASK: Any = {"max_tokens": 3, "messages": [{"role": "user", "content": LONG}]}
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def engine() -> Iterator[EmbeddedEngine]:
    with EmbeddedEngine(EngineSettings(slots=2, context_tokens=4096, name="tiny")) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _own_http_clients() -> Iterator[None]:
    """LangChain keeps HTTP clients by URL, beyond their loop."""
    yield
    _client_utils._get_default_httpx_client.cache_clear()
    _client_utils._get_default_async_httpx_client.cache_clear()


def two_stages(model: ChatAnthropic, *, streamed: bool) -> Any:
    """Return a graph whose two stages begin with the same prompt."""

    def stage(question: str) -> Any:
        def node(state: MessagesState) -> Any:
            asked = [("system", LONG), ("user", question)]
            if streamed:
                chunks = list(model.stream(asked))
                assert sum(len(chunk.usage_metadata or ()) > 0 for chunk in chunks) >= 1
                return {"messages": [("assistant", "".join(chunk.text for chunk in chunks))]}
            return {"messages": [model.invoke(asked)]}

        return node

    graph = StateGraph(MessagesState)
    graph.add_node("write", stage("What is it about?")).add_node("check", stage("Is it right?"))
    return graph.add_edge(START, "write").add_edge("write", "check").compile()


@pytest.mark.engine
@pytest.mark.parametrize(("kind", "streamed"), [("llamacpp", False), ("openai", True)])
def test_two_stages_find_the_cache_again_on_llamacpp(engine: EmbeddedEngine, kind: str, streamed: bool) -> None:
    # It may try again: a kept connection that the engine closes just then, on a busy machine, is none of this test's.
    model = ChatAnthropic(model="any", base_url=NOWHERE, api_key="k", max_tokens=3, max_retries=2)
    backend = Backend("main", engine.url, model="tiny", engine=kind, max_concurrency=2)
    with Orla([backend], mapper={"*": "main"}) as orla:
        orla.wrap(two_stages(model, streamed=streamed)).invoke({"messages": []})
        first, second = orla.records()
        probe = orla.core.serving.schedulers["main"].health.probe
    assert probe is not None and "messages" in probe.wires
    assert bool(probe.slots) == (kind == "llamacpp"), "a slot is said in chat completions alone"
    assert [(each.stage, each.error) for each in (first, second)] == [("write", None), ("check", None)]
    assert second.prompt_tokens is not None and second.prompt_tokens > 50
    assert second.cached_tokens is not None and second.cached_tokens > 50
    assert first.completion_tokens and second.completion_tokens


@pytest.mark.engine
def test_the_bytes_of_llamacpp_are_watched(engine: EmbeddedEngine) -> None:
    root = engine.url.removesuffix("/v1")
    with anthropic.Anthropic(base_url=root, api_key="k", max_retries=0) as client:
        whole = client.messages.with_raw_response.create(model="tiny", **ASK)
        message, counts = whole.parse(), MESSAGES.usage_in(whole.http_response.content)
        assert counts is not None and counts.prompt_tokens > 50
        assert counts.completion_tokens == message.usage.output_tokens
        with client.messages.with_streaming_response.create(model="tiny", stream=True, **ASK) as response:
            data = b"".join(response.iter_bytes())
    first = reading.EventSplitter().feed(data)[0]
    assert MESSAGES.brings(first) and MESSAGES.ends_well(data[-4096:]) and MESSAGES.is_over(data)
    streamed = MESSAGES.usage_in(first + data[-2000:])
    assert streamed is not None and streamed.cached_tokens
    assert (streamed.prompt_tokens, streamed.completion_tokens) == (counts.prompt_tokens, counts.completion_tokens)
