"""On real engines: whether an answer is the same in one piece and as a stream, and what a watch hears of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Backend, Orla
from orla_lg.engines import OwnEngine
from orla_lg.graph import interception
from orla_lg.openai_api import pair_check
from orla_lg.openai_api.agreement import Agreement
from tests.wires.test_watching import Watch

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

PATIENCE_S = 300.0
WEATHER = dict(pair_check.QUESTION["tools"][0]["function"])


def asked(orla: Orla, engine: OwnEngine, **more: Any) -> Agreement:
    """Ask for the pair, and return what came of it."""
    orla.connect()
    clients, serving = orla.core.clients["main"], orla.core.serving
    probe = serving.schedulers["main"].health.probe
    pair = pair_check.begin(serving, clients, probe, {"model": engine.name, **more})
    assert pair is not None
    pair.result(PATIENCE_S)
    return clients.agreement


def two_calls(engine: OwnEngine, kind: str, monkeypatch: pytest.MonkeyPatch, **bound: Any) -> tuple[Any, Any, Watch]:
    """Return what a node gets of a call in one piece and of the same streamed beneath, and what was heard of that."""
    watch = Watch()
    monkeypatch.setattr(interception, "watch_for", lambda *_: watch)
    tool = {"type": "function", "function": WEATHER}
    model = ChatOpenAI(base_url="http://127.0.0.1:9/v1", model="any", api_key="k", temperature=0, max_tokens=64)

    def ask(state: MessagesState) -> Any:
        answer = model.bind_tools([tool], **bound).invoke("Look up the weather in Oslo, in Celsius.")
        return {"messages": [answer]}

    graph = StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask").compile()
    found = []
    for assemble in (False, True):
        backend = Backend("main", engine.url, model=engine.name, engine=kind, assemble=assemble)
        with Orla([backend], mapper={"*": "main"}) as orla:
            wrapped = orla.wrap(graph, **({"tools_safe": {WEATHER["name"]}} if assemble else {}))
            found.append(wrapped.invoke({"messages": []})["messages"][-1])
    return found[0], found[1], watch


def seen(message: Any) -> Mapping[str, Any]:
    """Return what a node sees of an answer, without what differs from call to call."""
    calls = [{**call, "id": ""} for call in message.tool_calls]
    usage = {key: value for key, value in (message.usage_metadata or {}).items() if not key.endswith("_details")}
    return {
        "content": message.content, "calls": calls, "usage": usage,
        "finish": message.response_metadata["finish_reason"], "invalid": len(message.invalid_tool_calls),
    }  # fmt: skip


def test_llamacpp_says_the_same_both_ways(real_llamacpp: OwnEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend("main", real_llamacpp.url, model=real_llamacpp.name, engine="llamacpp")
    with Orla([backend], mapper={"*": "main"}) as orla:
        assert asked(orla, real_llamacpp).found == ()
    plain, streamed, watch = two_calls(real_llamacpp, "llamacpp", monkeypatch)
    assert seen(plain) == seen(streamed)
    assert watch.end["content"] == streamed.content


def test_vllm_says_the_same_both_ways_and_its_calls_are_heard(
    real_vllm: OwnEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Orla([Backend("main", real_vllm.url, model=real_vllm.name, engine="vllm")], mapper={"*": "main"}) as orla:
        agreement = asked(orla, real_vllm, tool_choice="required")
        assert agreement.found == () and agreement.had_calls
    plain, streamed, watch = two_calls(real_vllm, "vllm", monkeypatch, tool_choice="required", strict=True)
    assert seen(plain) == seen(streamed) and plain.tool_calls
    assert [call.name for call in watch.calls] == [call["name"] for call in streamed.tool_calls]
