"""On real engines: whether an answer is the same in one piece and as a stream, and what a watch hears of it."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from orla_lg import Backend, Orla
from orla_lg.engines import OwnEngine
from orla_lg.graph import interception
from orla_lg.openai_api import pair_check
from orla_lg.openai_api.agreement import Agreement, differences
from orla_lg.wires.whole_calls import object_of
from tests.clients.nodes import inside
from tests.wires.test_watching import Watch

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

PATIENCE_S = 300.0


def asked(orla: Orla, engine: OwnEngine, **more: Any) -> Agreement:
    """Ask for the pair, and return what came of it."""
    orla.connect()
    clients, serving = orla.core.clients["main"], orla.core.serving
    probe = serving.schedulers["main"].health.probe
    pair = pair_check.begin(serving, clients, probe, {"model": engine.name, **more})
    assert pair is not None
    pair.result(PATIENCE_S)
    return clients.agreement


def two_calls(engine: OwnEngine, kind: str, monkeypatch: pytest.MonkeyPatch, **more: Any) -> tuple[Any, Any, Watch]:
    """Return what a node gets of a call in one piece and of the same streamed beneath, and what was heard of that."""
    watch = Watch()
    monkeypatch.setattr(interception, "watch_for", lambda *_: watch)
    asked: Any = {**pair_check.QUESTION, "model": "any", **more}
    found = []
    with openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="k", max_retries=0) as client:
        for assemble in (False, True):
            backend = Backend("main", engine.url, model=engine.name, engine=kind, assemble=assemble)
            with Orla([backend], mapper={"*": "main"}) as orla:
                wrap_with: dict[str, Any] = {"tools_safe": {"look_up_weather"}} if assemble else {}
                found.append(inside(orla, lambda: client.chat.completions.create(**asked), **wrap_with))
    return found[0], found[1], watch


def test_llamacpp_says_the_same_both_ways(real_llamacpp: OwnEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend("main", real_llamacpp.url, model=real_llamacpp.name, engine="llamacpp")
    with Orla([backend], mapper={"*": "main"}) as orla:
        assert asked(orla, real_llamacpp).found == ()
    plain, streamed, watch = two_calls(real_llamacpp, "llamacpp", monkeypatch)
    assert not list(differences(plain.to_dict(), streamed.to_dict()))
    assert watch.end["content"] == streamed.choices[0].message.content


def test_vllm_says_the_same_both_ways_and_its_calls_are_heard(
    real_vllm: OwnEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Orla([Backend("main", real_vllm.url, model=real_vllm.name, engine="vllm")], mapper={"*": "main"}) as orla:
        agreement = asked(orla, real_vllm, tool_choice="required")
        assert agreement.found == () and agreement.had_calls
    plain, streamed, watch = two_calls(real_vllm, "vllm", monkeypatch, tool_choice="required")
    assert not list(differences(plain.to_dict(), streamed.to_dict()))
    calls = streamed.choices[0].message.tool_calls
    assert calls and [call[1:] for call in watch.calls] == [
        (call.id, call.function.name, call.function.arguments)
        for call in calls
        if object_of(call.function.arguments)  # the model is small: it may be cut short, or say something else
    ]
