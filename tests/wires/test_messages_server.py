"""The stand-in for a server of Anthropic's Messages, as the real client sees it."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

from orla_lg.core.call import Usage
from orla_lg.wires import reading
from orla_lg.wires.messages import MESSAGES
from tests.wires.messages_server import MODEL, Answer, MessagesServer, text, thinking, tool_use


def client_of(server: MessagesServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.root, api_key="k", max_retries=0)


ASK: dict[str, Any] = {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "hello " * 40}]}
ADD = {"name": "add", "input_schema": {"type": "object", "properties": {"x": {"type": "integer"}}}}


def test_the_stand_in_answers_as_the_real_client_expects() -> None:
    many = Answer((thinking("let me see"), text("I add."), tool_use("add", "a", x=1), tool_use("add", "b", x=2)))
    with MessagesServer(lambda body: many) as server, client_of(server) as client:
        whole = client.messages.create(**ASK, tools=[ADD])
        with client.messages.stream(**ASK, tools=[ADD]) as stream:
            assembled = stream.get_final_message()
        assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
        put_together = [block.model_dump(exclude={"parsed_output"}) for block in assembled.content]
        assert put_together == [block.model_dump() for block in whole.content]
        assert assembled.stop_reason == whole.stop_reason == "tool_use"
        assert whole.usage.cache_read_input_tokens == 0 and (assembled.usage.cache_read_input_tokens or 0) > 0
        assert whole.usage.input_tokens == assembled.usage.input_tokens + (
            assembled.usage.cache_read_input_tokens or 0
        )
        counted = client.messages.count_tokens(model=MODEL, messages=ASK["messages"], tools=[ADD])
        assert counted.input_tokens == whole.usage.input_tokens
        raw = client.messages.with_raw_response.create(**ASK)
        assert raw.headers["request-id"] and raw.parse().content == whole.content


def test_the_stand_in_refuses_as_the_api_does() -> None:
    failing = Answer((text("one two three"),), error=(529, "overloaded_error", "Overloaded"), breaks_after=3)
    with MessagesServer(key="k") as server, client_of(server) as client:
        assert client.messages.create(**ASK).stop_reason == "end_turn"
        assert client.messages.create(**{**ASK, "max_tokens": 2}).stop_reason == "max_tokens"
        with pytest.raises(anthropic.NotFoundError, match="model: other"):
            client.messages.create(**{**ASK, "model": "other"})
        with pytest.raises(anthropic.BadRequestError, match="tool_result"):
            called = {"role": "assistant", "content": [tool_use("add", "a", x=1)]}
            client.messages.create(
                **{**ASK, "messages": [*ASK["messages"], called, {"role": "user", "content": "?"}]}
            )
        with pytest.raises(anthropic.AuthenticationError):
            client.with_options(api_key="other").messages.create(**ASK)
        server.script = lambda body: failing
        with pytest.raises(anthropic.APIStatusError) as broke, client.messages.stream(**ASK) as stream:
            stream.get_final_message()
        assert broke.value.type == "overloaded_error"
        with pytest.raises(anthropic.OverloadedError):
            client.messages.create(**ASK)


def test_the_bytes_of_the_stand_in_are_watched() -> None:
    with MessagesServer() as server, client_of(server) as client:
        with client.messages.with_streaming_response.create(**ASK, stream=True) as response:
            data = b"".join(response.iter_bytes())
        events = reading.EventSplitter().feed(data)
        assert [MESSAGES.brings(event) for event in events[:3]] == [True, True, False]
        assert MESSAGES.ends_well(data) and not MESSAGES.ends_well(data[: len(data) // 2])
        whole = client.messages.with_raw_response.create(**ASK)
        counts = MESSAGES.usage_in(whole.http_response.content)
        assert counts is not None and counts.cached_tokens and counts.prompt_tokens > counts.cached_tokens
        assert MESSAGES.usage_in(events[0] + data[-300:]) == Usage(counts.prompt_tokens, 0, counts.completion_tokens)
