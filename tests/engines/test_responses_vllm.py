"""A graph of two stages on the Responses API and a real vLLM, which speaks it: the second stage finds the first's."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Backend, Orla
from orla_lg.engines import OwnEngine
from orla_lg_sim.text import prose

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

NOWHERE = {"base_url": "http://127.0.0.1:9/v1", "api_key": "any", "max_retries": 0}


def an_orla(make_orla: Callable[..., Orla], engine: OwnEngine) -> Orla:
    return make_orla(Backend("vllm", engine.url, model=engine.name, engine="vllm"), mapper={"*": "vllm"})


@pytest.mark.parametrize("streams", [False, True])
def test_a_stage_finds_what_the_one_before_it_left(
    real_vllm: OwnEngine, make_orla: Callable[..., Orla], streams: bool
) -> None:
    orla = an_orla(make_orla, real_vllm)
    model = ChatOpenAI(
        model="gpt-x", use_responses_api=True, max_tokens=8, temperature=0, streaming=streams, **NOWHERE
    )  # type: ignore[call-arg, arg-type]

    def ask(state: MessagesState) -> Any:
        return {"messages": [model.invoke(state["messages"])]}

    graph = StateGraph(MessagesState).add_node("draft", ask).add_node("review", ask)
    built = graph.add_edge(START, "draft").add_edge("draft", "review").compile()
    result = orla.wrap(built).invoke({"messages": [("user", "".join(prose(Random(7 + streams), 400)))]})
    draft, review = orla.records()
    assert [(record.stage, record.external) for record in (draft, review)] == [("draft", False), ("review", False)]
    assert "responses" in orla.core.serving.schedulers["vllm"].health.probe.wires  # type: ignore[union-attr]
    assert draft.cached_tokens == 0 and draft.prompt_tokens is not None and review.cached_tokens is not None
    assert review.cached_tokens >= 0.8 * draft.prompt_tokens
    assert result["messages"][-1].usage_metadata["input_token_details"]["cache_read"] == review.cached_tokens


def test_the_sdks_stream(real_vllm: OwnEngine, make_orla: Callable[..., Orla]) -> None:
    orla = an_orla(make_orla, real_vllm)
    client = openai.OpenAI(**NOWHERE)  # type: ignore[arg-type]

    def ask(state: MessagesState) -> Any:
        with client.responses.stream(model="gpt-x", input="Say hello.", max_output_tokens=8, temperature=0) as stream:
            kinds = [event.type for event in stream]
        assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")

    graph = StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask").compile()
    orla.wrap(graph).invoke({"messages": []})
    (record,) = orla.records()
    assert (record.error, record.external, record.completion_tokens) == (None, False, 8)
