"""ChatAnthropic's graphs on vLLM, which speaks Messages: the cache is found again from stage to stage."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from langchain_anthropic import ChatAnthropic
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Backend, Orla
from orla_lg.engines import OwnEngine
from orla_lg.wires import reading
from orla_lg.wires.messages import MESSAGES

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

LONG = "You are the editor of a small paper, and you know the whole report by heart. " * 12
NOWHERE = "http://127.0.0.1:9"


def two_stages(model: ChatAnthropic, start: str, *, streamed: bool) -> Any:
    """Return a graph whose two stages begin with the same prompt."""

    def stage(question: str) -> Any:
        def node(state: MessagesState) -> Any:
            asked = [("system", start + LONG), ("user", question)]
            said = "".join(chunk.text for chunk in model.stream(asked)) if streamed else model.invoke(asked).text
            return {"messages": [("assistant", said)]}

        return node

    graph = StateGraph(MessagesState)
    graph.add_node("write", stage("What is it about?")).add_node("check", stage("Is it right?"))
    return graph.add_edge(START, "write").add_edge("write", "check").compile()


def test_two_stages_find_the_cache_again_and_the_bytes_are_watched(real_vllm: OwnEngine) -> None:
    model = ChatAnthropic(model="any", base_url=NOWHERE, api_key="k", max_tokens=4, max_retries=0)
    with Orla([Backend("main", real_vllm.url, model=real_vllm.name, engine="vllm")], mapper={"*": "main"}) as orla:
        for number, streamed in enumerate([False, True]):
            orla.wrap(two_stages(model, f"{number} ", streamed=streamed)).invoke({"messages": []})
        records, probe = orla.records(), orla.core.serving.schedulers["main"].health.probe
    assert probe is not None and "messages" in probe.wires
    for first, second in (records[:2], records[2:]):
        assert [(each.stage, each.error) for each in (first, second)] == [("write", None), ("check", None)]
        assert first.completion_tokens and second.prompt_tokens and second.prompt_tokens > 150
        assert not first.cached_tokens and second.cached_tokens and second.cached_tokens > 150

    asked: Any = {"model": real_vllm.name, "max_tokens": 4, "messages": [{"role": "user", "content": LONG}]}
    with anthropic.Anthropic(base_url=real_vllm.url.removesuffix("/v1"), api_key="k", max_retries=0) as client:
        whole = client.messages.with_raw_response.create(**asked)
        counts, seen = MESSAGES.usage_in(whole.http_response.content), whole.parse().usage
        assert counts is not None and counts.completion_tokens == seen.output_tokens
        with client.messages.with_streaming_response.create(**asked, stream=True) as response:
            data = b"".join(response.iter_bytes())
    first_event = reading.EventSplitter().feed(data)[0]
    assert MESSAGES.brings(first_event) and MESSAGES.ends_well(data[-4096:]) and MESSAGES.is_over(data)
    streamed_counts = MESSAGES.usage_in(first_event + data[-2000:])
    assert streamed_counts is not None and streamed_counts.cached_tokens
    assert streamed_counts.prompt_tokens == counts.prompt_tokens
