"""Which wires an engine speaks: what the answers to empty requests say, and how often it is asked."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

import pytest

from orla_lg.core.engine.backend import Backend, Probe
from orla_lg.errors import BackendUnavailable, EngineRefused
from orla_lg.openai_api import wire_trial
from orla_lg.openai_api.adapter import PLAIN_WIRES, OpenAIAdapter
from orla_lg.openai_api.wire_trial import ASKED, NO_WIRE, WireTrial
from orla_lg_llamacpp import LlamaCppAdapter
from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings
from orla_lg_ollama import OllamaAdapter
from orla_lg_sglang import SGLangAdapter
from orla_lg_vllm import VLLMAdapter
from tests.stub_engine import Fault, Seen, StubEngine
from tests.wire.ollama_server import OllamaFlags, OllamaServer
from tests.wire.sglang_server import SGLangFlags, SGLangServer
from tests.wire.vllm_server import VLLMFlags, VLLMServer

MESSAGES, RESPONSES = ASKED["messages"], ASKED["responses"]


class Told:
    """An adapter whose engine answers each path with a status; ``None`` does not answer."""

    root = "http://engine/"

    def __init__(self, **statuses: int | None) -> None:
        self.statuses: dict[str, int | None] = {ASKED.get(wire, NO_WIRE): status for wire, status in statuses.items()}
        self.asked: list[str] = []
        self.at_once = self.most_at_once = 0

    async def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float) -> object:
        assert (method, body, timeout_s) == ("POST", {}, wire_trial.TIMEOUT_S)
        self.asked.append(path.removeprefix(self.root))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        status = self.statuses.get(path.removeprefix(self.root), 404)
        if status is None:
            raise BackendUnavailable("gone")
        if status >= 400:
            raise EngineRefused("no", status=status)
        return object()


@pytest.mark.parametrize("status", [400, 422])
async def test_what_is_refused_as_malformed_is_there(status: int) -> None:
    engine = Told(messages=status, responses=404)
    assert await WireTrial(engine).spoken() == {"messages"}
    assert engine.most_at_once == 2, "both are asked at once"


@pytest.mark.parametrize("status", [200, 204, 301, 401, 403, 404, 405, 410, 415, 501])
async def test_anything_else_that_speaks_of_the_path_says_that_it_is_not_there(status: int) -> None:
    engine = Told(messages=status, responses=status)
    trial = WireTrial(engine)
    assert not await trial.spoken("one") and not await trial.spoken("one")
    assert sorted(engine.asked) == [MESSAGES, RESPONSES], "and it is not asked again"


async def test_a_path_whose_handler_fails_is_there() -> None:
    """As llama.cpp's for Messages, where a path that is not there is not found."""
    engine = Told(messages=500, responses=400)
    assert await WireTrial(engine).spoken() == {"messages", "responses"}


@pytest.mark.parametrize("elsewhere", [None, 500, 503])
async def test_a_server_that_fails_everywhere_is_asked_again(elsewhere: int | None) -> None:
    engine = Told(messages=500, responses=404, none=elsewhere)
    trial = WireTrial(engine)
    assert not await trial.spoken("one")
    engine.statuses |= {MESSAGES: 422, NO_WIRE: 404}
    assert await trial.spoken("one") == {"messages"}


@pytest.mark.parametrize("status", [None, 408, 429, 502, 503, 529])
async def test_what_says_nothing_of_the_path_is_asked_again(status: int | None) -> None:
    engine = Told(messages=status, responses=400)
    trial = WireTrial(engine)
    assert await trial.spoken("one") == {"responses"}
    engine.statuses[MESSAGES] = 400
    assert await trial.spoken("one") == {"messages", "responses"}
    assert engine.asked.count(RESPONSES) == 1, "what is known is not"


async def test_an_engine_that_refuses_every_path_alike_speaks_none() -> None:
    engine = Told(messages=400, responses=400, none=400)
    trial = WireTrial(engine)
    assert not await trial.spoken("one") and not await trial.spoken("one")
    assert engine.asked.count(NO_WIRE) == 1


async def test_it_is_asked_once_for_each_start() -> None:
    engine = Told(messages=400, responses=404)
    trial = WireTrial(engine)
    for _ in range(3):  # as an adapter does: first without the incarnation, then with it
        await trial.spoken()
        assert await trial.spoken("one") == {"messages"}
    assert engine.asked.count(MESSAGES) == 1
    engine.statuses |= {MESSAGES: 404, RESPONSES: 422}
    await trial.spoken()
    assert await trial.spoken("two") == {"responses"}, "another start, another answer"


async def test_where_no_start_shows_an_answer_holds_for_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, now = Told(messages=400), [1000.0]
    monkeypatch.setattr(wire_trial.time, "monotonic", lambda: now[0])
    trial = WireTrial(engine)
    assert await trial.spoken("") == {"messages"} == await trial.spoken("")
    asked = len(engine.asked)
    now[0] += wire_trial.AGAIN_S + 1
    engine.statuses[MESSAGES] = 404
    assert not await trial.spoken("") and len(engine.asked) > asked


async def test_a_wires_key_is_sent_as_it_wants_it() -> None:
    with StubEngine(speaks={"/v1/messages": message}) as engine:
        await OpenAIAdapter(Backend("main", engine.url, api_key="key")).probe()
        (seen,) = [seen for seen in engine.requests if seen.path == "/v1/messages"]
        assert (seen.headers["x-api-key"], seen.key) == ("key", "key") and seen.headers["anthropic-version"]
        assert not any("x-api-key" in seen.headers for seen in engine.requests if seen.path != "/v1/messages")


# In a probe


def message(body: dict[str, Any]) -> dict[str, Any]:
    content = [{"type": "text", "text": "hi"}]
    return {"type": "message", "role": "assistant", "content": content, "model": body["model"]}


async def test_a_stub_speaks_what_it_is_made_to_speak() -> None:
    with StubEngine() as plain, StubEngine(speaks={"/v1/messages": message}) as speaking:
        assert (await OpenAIAdapter(Backend("plain", plain.url)).probe()).wires == PLAIN_WIRES
        adapter = OpenAIAdapter(Backend("speaking", speaking.url))
        assert (await adapter.probe()).wires == PLAIN_WIRES | {"messages"}
        asked = len(speaking.requests)
        assert (await adapter.probe()).wires == PLAIN_WIRES | {"messages"}
        assert len(speaking.requests) == asked + 1, "only the models again"
        answered = await adapter.post(speaking.url.removesuffix("v1") + "v1/messages", {"model": "m", "messages": []})
        assert answered["content"][0]["text"] == "hi"


async def test_an_engine_that_was_gone_is_asked_again() -> None:
    with StubEngine(speaks={"/v1/messages": message}) as engine:
        adapter = OpenAIAdapter(Backend("main", engine.url))
        await adapter.probe()
        engine.refuse()
        with pytest.raises(BackendUnavailable):
            await adapter.probe()
        engine.speaks = {}
        engine.listen()
        assert (await adapter.probe()).wires == PLAIN_WIRES


async def test_a_wire_that_hangs_delays_the_probe_by_its_time_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_trial, "TIMEOUT_S", 0.1)

    def hang(seen: Seen) -> Any:
        return None

    with StubEngine(rule=hang) as engine:
        real = engine.reply_to
        monkeypatch.setattr(
            engine, "reply_to",
            lambda seen: engine._reply(Fault.HANG) if seen.path in ("/v1/messages", "/v1/responses") else real(seen),
        )  # fmt: skip
        began = time.monotonic()
        assert (await OpenAIAdapter(Backend("main", engine.url)).probe()).wires == PLAIN_WIRES
        assert time.monotonic() - began < 1.0


@pytest.mark.parametrize(
    ("server", "kind", "own"),
    [
        (lambda wires: VLLMServer(VLLMFlags(wires=wires)), VLLMAdapter, set()),
        (lambda wires: SGLangServer(SGLangFlags(wires=wires)), SGLangAdapter, set()),
        (
            lambda wires: OllamaServer(OllamaFlags(wires=wires)),
            OllamaAdapter,
            {"ollama-chat", "ollama-generate", "ollama-embed", "ollama-embeddings"},
        ),
    ],
    ids=["vllm", "sglang", "ollama"],
)
@pytest.mark.parametrize("wires", [(), ("messages",), ("messages", "responses")], ids=len)
async def test_engines_differ_by_version(server: Any, kind: type[OpenAIAdapter], own: set[str], wires: Any) -> None:
    with server(wires) as running:
        adapter = kind(Backend("main", running.url, model="stand-in"))
        first, second = await adapter.probe(), await adapter.probe()
        left = {"responses"} if kind is LlamaCppAdapter else set()
        assert first.wires == second.wires == PLAIN_WIRES | own | (set(wires) - left)
        assert len(running.asked("/v1/messages")) == 1, "asked once"
        assert all(json.loads(seen.raw) == {} for seen in running.asked("/v1/messages"))


@pytest.mark.engine
async def test_of_what_a_real_llamacpp_speaks_the_half_spoken_is_left() -> None:
    with EmbeddedEngine(EngineSettings(slots=1)) as engine:
        adapter = LlamaCppAdapter(Backend("main", engine.url))
        assert (await adapter.probe()).wires == PLAIN_WIRES | {"messages"}
        assert await adapter.wires.spoken() == {"messages", "responses"}


async def test_a_server_that_answers_at_ollamas_paths_is_not_taken_for_it() -> None:
    with StubEngine(slots=1, speaks={"/api/chat": message}) as engine:
        probe = await LlamaCppAdapter(Backend("main", engine.url)).probe()
        assert not any(wire.startswith("ollama") for wire in probe.wires)


def test_a_probe_keeps_what_can_be_names_of_wires() -> None:
    odd: Any = frozenset({"messages", "", 7, "x" * 2000})
    assert Probe(wires=odd).wires == {"messages"}
    assert len(Probe(wires=frozenset(f"w{n}" for n in range(500))).wires) == 64
