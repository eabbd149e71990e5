"""The stand-ins of vLLM and SGLang against real ones, field by field.

vLLM is started for it; an SGLang may be named (``tests.conftest.real_sglang``), with priority, session radix cache,
cache report and a tool parser.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import pytest

from orla_lg import Backend
from orla_lg.engines import OwnEngine
from orla_lg.openai_api.adapter import OpenAIAdapter
from orla_lg_sglang import SGLangAdapter
from orla_lg_vllm import VLLMAdapter
from tests.wire.asking import body, events, post, shape
from tests.wire.served import WireServer
from tests.wire.sglang_server import SGLangServer
from tests.wire.vllm_server import VLLMFlags, VLLMServer

pytestmark = pytest.mark.engines

BOTH: dict[str, dict[str, Any]] = {
    "whole": {},
    "stream": {"stream": True},
    "stream with usage": {"stream": True, "stream_options": {"include_usage": True}},
    "no tokens": {"max_tokens": 0},
    "half a priority": {"priority": 1.5},
    "a priority too high": {"priority": 2**64},
    "messages that are none": {"messages": "none"},
    "another model": {"model": "another"},
    "too long": {"messages": [{"role": "user", "content": "word " * 9000}]},
}
VLLM = BOTH | {"named": {"request_id": "mine", "priority": -3}}
SGLANG = BOTH | {"named": {"rid": "mine", "priority": 3, "session_id": "w"}, "no messages": {"messages": []}}


@pytest.fixture
def vllm(real_vllm: OwnEngine) -> VLLMAdapter:
    return VLLMAdapter(Backend("real", real_vllm.url))


@pytest.fixture
def sglang(real_sglang: Backend) -> SGLangAdapter:
    return SGLangAdapter(real_sglang)


async def compare(theirs: OpenAIAdapter, ours: WireServer, request: dict[str, Any]) -> tuple[Any, Any]:
    """Send a request to both and return what each said; status, type and shape are the same."""
    answers = []
    for url, key in ((theirs.backend.url, theirs.backend.api_key), (ours.url, None)):
        served = (await OpenAIAdapter(Backend("any", url, api_key=key)).probe()).models[0]
        answers.append(await post(f"{url}/chat/completions", body("Say hi", served) | request, key))
    other, mine = answers
    assert mine.status_code == other.status_code
    assert mine.headers["content-type"] == other.headers["content-type"]
    if request.get("stream"):
        assert shapes(mine.text) == shapes(other.text)
        assert mine.text.endswith("data: [DONE]\n\n") and other.text.endswith("data: [DONE]\n\n")
        return None, None
    assert shape(mine.json()) == shape(other.json())
    return other.json(), mine.json()


def shapes(text: str) -> list[Any]:
    """Return the shapes of a stream's first event, one in its middle and its last two."""
    first, middle, *_, before, last = events(text)
    return [shape(each) for each in (first, middle, before, last)]


@pytest.mark.parametrize("twin", VLLM)
async def test_the_stand_in_answers_as_vllm(twin: str, vllm: VLLMAdapter) -> None:
    with VLLMServer(VLLMFlags(device="cpu")) as server:
        theirs, ours = await compare(vllm, server, VLLM[twin])
    if theirs is not None and "error" in theirs:
        assert [ours["error"][key] for key in ("type", "param")] == [
            theirs["error"][key] for key in ("type", "param")
        ]


async def test_the_stand_in_is_probed_as_vllm(vllm: VLLMAdapter) -> None:
    theirs = await vllm.probe()
    with VLLMServer(VLLMFlags(device="cpu")) as server:
        ours = await VLLMAdapter(Backend("main", server.url)).probe()
    assert ours.capabilities == theirs.capabilities and ours.advice == theirs.advice
    assert theirs.kv_tokens and theirs.context_tokens and theirs.incarnation and theirs.version
    assert None not in astuple(await vllm.stats())


@pytest.mark.parametrize("twin", SGLANG)
async def test_the_stand_in_answers_as_sglang(twin: str, sglang: SGLangAdapter) -> None:
    with SGLangServer() as server:
        theirs, ours = await compare(sglang, server, SGLANG[twin])
    assert theirs is None or ours.get("type") == theirs.get("type")


async def test_the_stand_in_is_probed_as_sglang(sglang: SGLangAdapter) -> None:
    theirs = await sglang.probe()
    with SGLangServer() as server:
        ours = await SGLangAdapter(Backend("main", server.url)).probe()
    assert ours.capabilities == theirs.capabilities and ours.advice == theirs.advice
    assert theirs.kv_tokens and theirs.context_tokens and theirs.incarnation and theirs.version
