"""A graph of Ollama's models on a real llama.cpp, which does not speak Ollama's API: translated, on one cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import ollama
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_ollama import ChatOllama
from langgraph.graph import END, START, MessagesState, StateGraph

from orla_lg import Backend, Orla
from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings

RULES = SystemMessage("You answer in short sentences. " + "Each of them is about stones, rivers and rain. " * 8)
NOWHERE = "http://127.0.0.1:9"
"""Nothing listens there: what is served is not sent to where the code says."""


@pytest.fixture(scope="module")
def engine() -> Iterator[EmbeddedEngine]:
    with EmbeddedEngine(EngineSettings(slots=2, context_tokens=2048)) as running:
        yield running


def graph(**settings: Any) -> Any:
    """Two stages that go on with one conversation, the second streamed."""
    model = ChatOllama(model="llama3.2", base_url=NOWHERE, num_predict=12, temperature=0, seed=1, **settings)

    def draft(state: MessagesState) -> Any:
        return {"messages": [model.invoke([RULES, *state["messages"]])]}

    async def revise(state: MessagesState) -> Any:
        asked = [RULES, *state["messages"], HumanMessage("Say it again, shorter.")]
        chunks = [chunk async for chunk in model.astream(asked)]
        return {"messages": [asked[-1], AIMessage("".join(chunk.text for chunk in chunks))]}

    made = StateGraph(MessagesState).add_node("draft", draft).add_node("revise", revise)
    return made.add_edge(START, "draft").add_edge("draft", "revise").add_edge("revise", END).compile()


@pytest.mark.engine
async def test_the_cache_is_found_again_from_stage_to_stage(engine: EmbeddedEngine) -> None:
    backend = Backend("main", engine.url, engine="llamacpp", max_concurrency=2)
    with Orla([backend], mapper={"*": "main"}) as orla:
        said = await orla.wrap(graph()).ainvoke({"messages": [HumanMessage("What is a river?")]})
        draft, revise = orla.records()
    assert [len(message.text) > 5 for message in said["messages"]] == [True] * 4
    assert (draft.stage, revise.stage, draft.backend, revise.backend) == ("draft", "revise", "main", "main")
    assert draft.completion_tokens and draft.prompt_tokens and revise.cached_tokens
    assert revise.cached_tokens >= 0.95 * draft.prompt_tokens, "all of the first stage's prompt"
    (answer, again) = said["messages"][1], said["messages"][3]
    assert answer.usage_metadata["input_tokens"] == draft.prompt_tokens and again.text
    assert answer.response_metadata["done_reason"] in ("stop", "length")
    assert answer.response_metadata["eval_duration"] > 0, "llama.cpp says how long it took"


@pytest.mark.engine
def test_a_schema_and_a_bound_are_heeded(engine: EmbeddedEngine) -> None:
    schema = {"type": "object", "properties": {"stones": {"type": "integer"}}, "required": ["stones"]}
    said = []

    def node(state: MessagesState) -> None:
        client = ollama.Client(NOWHERE)
        said.append(client.chat("llama3.2", [{"role": "user", "content": "How many?"}], format=schema))
        said.append(client.generate("llama3.2", "Tell me a story.", options={"num_predict": 3, "num_ctx": 4096}))

    made = StateGraph(MessagesState).add_node("ask", node).add_edge(START, "ask").compile()
    with Orla([Backend("main", engine.url, engine="llamacpp")], mapper={"*": "main"}) as orla:
        orla.wrap(made).invoke({"messages": []})
    chat, story = said
    assert isinstance(json.loads(chat.message.content)["stones"], int)
    assert (story.done_reason, story.eval_count) == ("length", 3) and story.response
