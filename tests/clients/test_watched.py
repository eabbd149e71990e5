"""What a watch hears of calls by other clients, on a backend that speaks their wire and on one that does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from orla_lg import Backend, Orla
from orla_lg.graph import interception
from orla_lg.wires.watching import Late
from tests.clients.nodes import ainside, inside
from tests.clients.ollama_graphs import THEIRS, backend, served
from tests.conftest import CALLER_KEY
from tests.wire.machine import Machine
from tests.wires.chatting_server import ChattingServer
from tests.wires.messages_server import BOTH, MODEL, MessagesServer
from tests.wires.responses_server import ResponsesServer
from tests.wires.test_watching import Watch

anthropic = pytest.importorskip("anthropic")
ollama = pytest.importorskip("ollama")

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "The weather.", "parameters": PARAMETERS}
USER: Any = [{"role": "user", "content": "hello"}]
Ask = Callable[[str, bool], list[Any]]
"""Asks a server at a root, streamed or not; returns the arguments of the calls that its client read."""


def by_messages(root: str, streams: bool) -> list[Any]:
    client = anthropic.Anthropic(base_url=root, api_key=CALLER_KEY, max_retries=0).messages
    tool = {"name": "weather", "description": "The weather.", "input_schema": PARAMETERS}
    asked = {"model": "claude", "max_tokens": 64, "messages": USER, "tools": [tool]}
    if not streams:
        return [block.input for block in client.create(**asked).content if block.type == "tool_use"]
    with client.stream(**asked) as stream:
        return [block.input for block in stream.get_final_message().content if block.type == "tool_use"]


def by_ollama(root: str, streams: bool) -> list[Any]:
    found = ollama.Client(root).chat(THEIRS, USER, tools=[{"type": "function", "function": FUNCTION}], stream=streams)
    parts = found if streams else [found]
    return [call.function.arguments for part in parts for call in part.message.tool_calls or ()]


def by_responses(root: str, streams: bool) -> list[Any]:
    client = openai.OpenAI(base_url=f"{root}/v1", api_key=CALLER_KEY, max_retries=0).responses
    asked: Any = {"model": "m", "input": "hello", "tools": [{"type": "function", **FUNCTION}]}
    if not streams:
        output = client.create(**asked).output
    else:
        output = [event.item for event in client.create(**asked, stream=True)
                  if event.type == "response.output_item.done"]  # fmt: skip
    return [json.loads(item.arguments) for item in output if item.type == "function_call"]


async def by_messages_in_a_task(root: str, streams: bool) -> list[Any]:
    client = anthropic.AsyncAnthropic(base_url=root, api_key=CALLER_KEY, max_retries=0).messages
    tool = {"name": "weather", "description": "The weather.", "input_schema": PARAMETERS}
    asked = {"model": "claude", "max_tokens": 64, "messages": USER, "tools": [tool]}
    if not streams:
        return [block.input for block in (await client.create(**asked)).content if block.type == "tool_use"]
    async with client.stream(**asked) as stream:
        return [block.input for block in (await stream.get_final_message()).content if block.type == "tool_use"]


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, tuple[str, Backend]]]:
    """By name, the root of a server and its backend."""
    with (
        MessagesServer() as messages, MessagesServer(speaks=BOTH - {"messages"}) as chat,
        ResponsesServer(machine=Machine(token_s=0)) as responses,
        ChattingServer(machine=Machine(token_s=0)) as chatting,
        served() as native, served(native=False) as translated,
    ):  # fmt: skip
        yield {
            "messages": (messages.root, Backend("main", messages.url, model=MODEL)),
            "chat for messages": (chat.root, Backend("main", chat.url, model=MODEL)),
            "responses": (responses.root, Backend("main", responses.url, model=MODEL)),
            "chat for responses": (chatting.root, Backend("main", chatting.url, model=MODEL)),
            "ollama": (native.root, backend(native, model=THEIRS)),
            "chat for ollama": (translated.root, backend(translated, model=THEIRS)),
        }


CLIENTS: dict[str, Ask] = {
    "messages": by_messages, "chat for messages": by_messages, "responses": by_responses,
    "chat for responses": by_responses, "ollama": by_ollama, "chat for ollama": by_ollama,
}  # fmt: skip


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> list[Watch]:
    """One for each call."""
    made: list[Watch] = []

    def watch_for(core: Any, come_from: Any, inflight: Any, body: Any) -> Watch:
        assert body["tools"]
        made.append(Watch())
        return made[-1]

    monkeypatch.setattr(interception, "watch_for", watch_for)
    return made


def assert_heard(watches: list[Watch], found: list[Any], *, streams: bool) -> None:
    (watch,) = watches
    (call,) = watch.end["tool_calls"]
    assert [json.loads(call["function"]["arguments"])] == found and call["function"]["name"] == "weather"
    assert [(each.name, json.loads(each.arguments)) for each in watch.calls] == [("weather", found[0])] * streams
    assert watch.late == ([] if streams else [Late.CLIENT])


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("engine", CLIENTS)
def test_a_watch_hears_the_call_that_the_client_reads(
    engine: str, streams: bool, engines: Any, watches: list[Watch], make_orla: Callable[..., Orla]
) -> None:
    root, at = engines[engine]
    orla = make_orla(at, mapper={"*": "main"})
    found = inside(orla, lambda: CLIENTS[engine](root, streams), tools_safe={"weather"})
    assert found
    assert_heard(watches, found, streams=streams)


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("engine", ["messages", "chat for messages"])
def test_so_it_does_in_a_task(
    engine: str, streams: bool, engines: Any, watches: list[Watch], make_orla: Callable[..., Orla]
) -> None:
    root, at = engines[engine]
    orla = make_orla(at, mapper={"*": "main"})
    found = ainside(orla, lambda: by_messages_in_a_task(root, streams), tools_safe={"weather"})
    assert_heard(watches, found, streams=streams)
