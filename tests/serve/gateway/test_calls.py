"""Real clients through the gateway: each API, whole and streamed, native and translated."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from orla_lg import Backend, ExplicitMapper, Orla
from tests.conftest import BACKEND_KEY, CALLER_KEY, at
from tests.serve.gateway.served import GatewayServer
from tests.stub_engine import MODEL, Reply, StubEngine
from tests.wire.machine import Machine
from tests.wires.messages_server import MessagesServer
from tests.wires.responses_server import ResponsesServer

anthropic = pytest.importorskip("anthropic")

HELLO: Any = [{"role": "user", "content": "hello"}]
SAID = "1 user said: hello"
STORY = "once upon a time a stone lay beside the road and waited"


def claude(gateway: GatewayServer) -> Any:
    return anthropic.Anthropic(base_url=gateway.url, api_key=CALLER_KEY, max_retries=0)


def test_a_chat_completion(client: openai.OpenAI, gateway: GatewayServer, engine: StubEngine) -> None:
    raw = client.chat.completions.with_raw_response.create(model="main", messages=HELLO)
    answer = raw.parse()
    assert answer.choices[0].message.content == SAID and answer.usage is not None
    assert raw.headers["x-orla-backend"] == "main" and float(raw.headers["x-orla-queue-wait-ms"]) >= 0
    (record,) = gateway.ended()
    assert (record.backend, record.error, record.prompt_tokens) == ("main", None, answer.usage.prompt_tokens)
    assert raw.headers["x-request-id"] == raw.headers["x-orla-call-id"] == record.id
    (seen,) = engine.chats
    assert seen.key == BACKEND_KEY and CALLER_KEY not in str(seen.headers) and seen.body["model"] == MODEL


def test_a_stream(client: openai.OpenAI, gateway: GatewayServer) -> None:
    chunks = list(client.chat.completions.create(model="auto", messages=HELLO, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAID
    assert all(chunk.choices for chunk in chunks), "counts that the caller did not ask for"
    (record,) = gateway.ended()
    assert record.error is None and record.completion_tokens and record.ttft_s is not None


def test_async_clients_all_at_once(gateway: GatewayServer, engine: StubEngine) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key=CALLER_KEY, max_retries=0) as client:

            async def one(number: int) -> str:
                messages: Any = [{"role": "user", "content": f"number {number}"}]
                if number % 2:
                    whole = await client.chat.completions.create(model="main", messages=messages)
                    return whole.choices[0].message.content or ""
                pieces = await client.chat.completions.create(model="main", messages=messages, stream=True)
                return "".join([piece.choices[0].delta.content or "" async for piece in pieces])

            async with asyncio.TaskGroup() as tasks:
                asking = [tasks.create_task(one(number)) for number in range(20)]
            return [each.result() for each in asking]

    assert asyncio.run(ask()) == [f"1 user said: number {number}" for number in range(20)]
    assert len(gateway.ended(20)) == 20 and engine.in_flight == 0


def test_completions(client: openai.OpenAI, gateway: GatewayServer, engine: StubEngine) -> None:
    answer = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": MODEL,
              "choices": [{"index": 0, "text": " world", "finish_reason": "stop", "logprobs": None}],
              "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}  # fmt: skip
    engine.speaks["/v1/completions"] = lambda body: answer
    assert client.completions.create(model="main", prompt="hello").choices[0].text == " world"
    (record,) = gateway.ended()
    assert (record.prompt_tokens, record.completion_tokens) == (1, 1)


def test_embeddings_go_where_the_model_says(
    client: openai.OpenAI, gateway: GatewayServer, engine: StubEngine
) -> None:
    vector = {"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}
    usage = {"prompt_tokens": 2, "total_tokens": 2}
    engine.speaks["/v1/embeddings"] = lambda body: {
        "object": "list", "data": [vector], "model": body["model"], "usage": usage,
    }  # fmt: skip
    answer = client.embeddings.create(model="main", input=["a b"], encoding_format="float")
    assert answer.data[0].embedding == [0.5, 0.25]
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="nowhere", input=["a b"], encoding_format="float")
    first, _ = gateway.ended(2)
    assert (first.backend, first.model, first.prompt_tokens) == ("main", MODEL, 2)


def test_responses_translated(client: openai.OpenAI, gateway: GatewayServer, engine: StubEngine) -> None:
    assert client.responses.create(model="main", input="hello", store=False).output_text == SAID
    with client.responses.stream(model="main", input="hello", store=False) as events:
        assert events.get_final_response().output_text == SAID
    assert len(engine.chats) == 2 and [record.error for record in gateway.ended(2)] == [None, None]


@pytest.fixture
def anthropics(make_orla: Callable[..., Orla]) -> Iterator[GatewayServer]:
    """A gateway over an engine that speaks Messages."""
    with MessagesServer(key=BACKEND_KEY, machine=Machine(running=4, token_s=0.0)) as server:
        orla = make_orla(Backend("main", server.url, model="stand-in", api_key=BACKEND_KEY))
        with GatewayServer(orla) as served:
            yield served


@pytest.mark.parametrize("fixture", ["gateway", "anthropics"])
def test_messages(request: pytest.FixtureRequest, fixture: str) -> None:
    gateway: GatewayServer = request.getfixturevalue(fixture)
    said = SAID if fixture == "gateway" else STORY
    with claude(gateway) as client:
        whole = client.messages.create(model="main", max_tokens=64, messages=HELLO)
        assert whole.content[0].text.startswith(said)
        with client.messages.stream(model="main", max_tokens=64, messages=HELLO) as stream:
            assert "".join(stream.text_stream).startswith(said)
    records = gateway.ended(2)
    assert all(record.error is None and record.prompt_tokens and record.completion_tokens for record in records)


def test_responses_native(make_orla: Callable[..., Orla]) -> None:
    with ResponsesServer(key=BACKEND_KEY, machine=Machine(running=4, token_s=0.0)) as server:
        orla = make_orla(Backend("main", server.url, model="stand-in", api_key=BACKEND_KEY))
        with (
            GatewayServer(orla) as gateway,
            openai.OpenAI(base_url=gateway.url + "/v1", api_key=CALLER_KEY, max_retries=0) as client,
        ):
            assert client.responses.create(model="main", input="hello").output_text.startswith(STORY)
            with client.responses.stream(model="main", input="hello") as stream:
                final = [event for event in stream if event.type == "response.completed"]
            assert final[0].response.output_text.startswith(STORY)
            assert all(record.error is None for record in gateway.ended(2))
            assert all(seen.key == BACKEND_KEY for seen in server.asked("/v1/responses") if seen.body)


def test_unknown_fields_query_strings_and_beta_headers_pass(gateway: GatewayServer, engine: StubEngine) -> None:
    headers = {"authorization": f"Bearer {CALLER_KEY}", "anthropic-version": "2023-06-01", "anthropic-beta": "a,b,c"}
    body = {
        "model": "main", "max_tokens": 9, "messages": HELLO, "system": [{"type": "text", "text": "be kind"}],
        "thinking": {"type": "adaptive"}, "context_management": {"edits": []}, "output_config": {"effort": "high"},
        "made_up": {"by": "a test"},
    }  # fmt: skip
    answer = httpx.post(f"{gateway.url}/v1/messages?beta=true&what=ever", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    chatted = httpx.post(
        f"{gateway.url}/v1/chat/completions?api-version=1", json={"model": "main", "messages": HELLO, "odd": [1, {}]},
        headers=headers,
    )  # fmt: skip
    assert chatted.status_code == 200 and engine.chats[-1].body["odd"] == [1, {}]


def test_a_callers_request_id_is_kept_if_it_is_one(gateway: GatewayServer) -> None:
    def ask(said: str) -> str:
        body = {"model": "main", "messages": HELLO}
        answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, headers={"x-request-id": said})
        return answer.headers["x-request-id"]

    assert ask("req_1:a/b") == "req_1:a/b"
    assert ask("x" * 500) in {record.id for record in gateway.ended(2)}


def test_no_key_of_either_side_comes_back(gateway: GatewayServer) -> None:
    answer = httpx.post(
        f"{gateway.url}/v1/chat/completions", json={"model": "main", "messages": HELLO},
        headers={"authorization": f"Bearer {CALLER_KEY}"},
    )  # fmt: skip
    said = json.dumps(dict(answer.headers)) + answer.text
    assert BACKEND_KEY not in said and CALLER_KEY not in said
    assert all(CALLER_KEY not in repr(record) for record in gateway.ended())


def test_useful_headers_of_an_engine_come_back_and_others_do_not(engine: StubEngine, gateway: GatewayServer) -> None:
    sent = (("openai-processing-ms", "7"), ("x-ratelimit-remaining", "3"), ("set-cookie", "a=b"), ("x-secret", "s"))
    engine.rule = lambda seen: Reply(headers=sent)
    answer = httpx.post(f"{gateway.url}/v1/chat/completions", json={"model": "main", "messages": HELLO})
    assert answer.headers["openai-processing-ms"] == "7" and answer.headers["x-ratelimit-remaining"] == "3"
    assert "set-cookie" not in answer.headers and "x-secret" not in answer.headers


def test_two_backends_and_the_call_goes_where_the_mapping_says(
    engine: StubEngine, other_engine: StubEngine, make_orla: Callable[..., Orla]
) -> None:
    orla = make_orla(at(engine), at(other_engine, "strong"), mapper={"plan": "strong", "*": "main"})
    with GatewayServer(orla) as gateway:
        for stage in ("plan", "other"):
            httpx.post(
                f"{gateway.url}/v1/chat/completions", json={"model": "gpt-x", "messages": HELLO},
                headers={"x-orla-stage": stage},
            ).raise_for_status()  # fmt: skip
        assert [(record.stage, record.backend) for record in gateway.ended(2)] == [
            ("plan", "strong"), ("other", "main"),
        ]  # fmt: skip


def test_a_call_of_no_stage_goes_where_its_model_says_else_where_any_stage_does(
    engine: StubEngine, other_engine: StubEngine, make_orla: Callable[..., Orla]
) -> None:
    orla = make_orla(at(engine), at(other_engine, "strong"), mapper={"plan": "main", "*": "strong"})
    orla.core.serving.variant("cheap", ExplicitMapper({"*": "main"}))
    orla.connect()
    with GatewayServer(orla) as gateway:
        for model, headers in (("gpt-x", {}), ("main", {}), ("gpt-x", {"x-orla-mapping": "cheap"})):
            httpx.post(
                f"{gateway.url}/v1/chat/completions", json={"model": model, "messages": HELLO}, headers=headers
            ).raise_for_status()
        assert [record.backend for record in gateway.ended(3)] == ["strong", "main", "main"]


@pytest.mark.parametrize(
    ("mapper", "status"),
    [({"*": "main"}, 404), ({"*:embeddings": "main"}, 200), ({"retrieve:embeddings": "main"}, 404)],
)
def test_embeddings_of_no_stage_go_by_the_entry_for_embeddings_of_any(
    engine: StubEngine, make_orla: Callable[..., Orla], mapper: dict[str, str], status: int
) -> None:
    engine.speaks["/v1/embeddings"] = lambda body: {"object": "list", "data": [], "model": body["model"]}
    orla = make_orla(at(engine), mapper=mapper)
    orla.connect()
    with GatewayServer(orla) as gateway:
        answer = httpx.post(f"{gateway.url}/v1/embeddings", json={"model": "nowhere", "input": "a"})
    assert answer.status_code == status
