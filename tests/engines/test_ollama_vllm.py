"""A graph of Ollama's models on vLLM, translated to chat completions: the second stage finds the first's cache."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from langchain_ollama import ChatOllama
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Backend, Orla
from orla_lg.engines import OwnEngine
from orla_lg_sim.text import prose

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]


@pytest.mark.parametrize("streams", [False, True])
def test_a_stage_finds_what_the_one_before_it_left(
    real_vllm: OwnEngine, make_orla: Callable[..., Orla], streams: bool
) -> None:
    backend = Backend("vllm", real_vllm.url, model=real_vllm.name, engine="vllm")
    orla = make_orla(backend, mapper={"*": "vllm"})
    model = ChatOllama(model="llama3.2", base_url="http://127.0.0.1:9", num_predict=8, temperature=0)

    def ask(state: MessagesState) -> Any:
        if not streams:
            return {"messages": [model.invoke(state["messages"])]}
        return {"messages": [("assistant", "".join(chunk.text for chunk in model.stream(state["messages"])))]}

    graph = StateGraph(MessagesState).add_node("draft", ask).add_node("review", ask)
    built = graph.add_edge(START, "draft").add_edge("draft", "review").compile()
    result = orla.wrap(built).invoke({"messages": [("user", "".join(prose(Random(17 + streams), 400)))]})
    draft, review = orla.records()
    assert [(record.stage, record.external) for record in (draft, review)] == [("draft", False), ("review", False)]
    assert draft.cached_tokens == 0 and draft.prompt_tokens is not None and review.cached_tokens is not None
    assert review.cached_tokens >= 0.8 * draft.prompt_tokens
    assert len(result["messages"]) == 3 and review.completion_tokens == 8
