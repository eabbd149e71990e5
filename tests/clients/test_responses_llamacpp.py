"""A graph of two stages on the Responses API and a real llama.cpp: the second finds the first one's prompt cached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Backend, Orla
from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings

SYSTEM = "You are a careful editor of short notes on stones. " * 4


@pytest.fixture(scope="module")
def engine() -> Iterator[EmbeddedEngine]:
    with EmbeddedEngine(EngineSettings(slots=2, context_tokens=2048)) as engine:
        yield engine


@pytest.mark.engine
@pytest.mark.parametrize("streams", [False, True])
def test_a_stage_finds_what_the_one_before_it_left(
    engine: EmbeddedEngine, make_orla: Callable[..., Orla], streams: bool
) -> None:
    orla = make_orla(Backend("llama", engine.url, engine="llamacpp"), mapper={"*": "llama"})
    model = ChatOpenAI(
        model="gpt-x", base_url="http://127.0.0.1:9/v1", api_key="any", use_responses_api=True, max_tokens=4,
        temperature=0, streaming=streams, max_retries=0,
    )  # fmt: skip

    def ask(state: MessagesState) -> Any:
        return {"messages": [model.invoke([("system", SYSTEM), *state["messages"]])]}

    graph = StateGraph(MessagesState).add_node("draft", ask).add_node("review", ask)
    built = graph.add_edge(START, "draft").add_edge("draft", "review").compile()
    text = f"Describe granite, for the {'second' if streams else 'first'} time."
    result = orla.wrap(built).invoke({"messages": [("user", text)]})
    draft, review = orla.records()
    assert [(record.stage, record.backend, record.external) for record in (draft, review)] == [
        ("draft", "llama", False), ("review", "llama", False),
    ]  # fmt: skip
    assert review.cached_tokens is not None and draft.prompt_tokens is not None
    assert review.cached_tokens >= draft.prompt_tokens - 8  # what differs is the end of the template
    usage = result["messages"][-1].usage_metadata
    assert usage["input_token_details"]["cache_read"] == review.cached_tokens
    assert result["messages"][-1].response_metadata["status"] == "incomplete"
