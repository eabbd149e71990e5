"""Clients that know nothing of orla_lg, each with a loop of tools, at the gateway by its URL alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import openai
import pytest
from langchain.agents import create_agent
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from tests.serve.running_gateway import Gateway, running_gateway
from tests.wire.machine import Machine
from tests.wires.chatting_server import ChattingServer
from tests.wires.messages_server import MODEL, MessagesServer
from tests.wires.responses_server import ResponsesServer

anthropic = pytest.importorskip("anthropic")
agents = pytest.importorskip("agents")

KEY = "key-of-the-caller"
RUN, STAGE = "desk-7", "triage"
HEADERS = {"X-Orla-Workflow-Run": RUN, "X-Orla-Stage": STAGE}
QUESTION = "how is the weather in Oslo? " * 20
SUNNY = "sunny in word"
"""What the tool says to the engine's call of it."""

STORY = "once upon a time a stone lay beside the road and waited"

ENGINES: dict[str, Callable[[], Any]] = {
    "chat": lambda: ChattingServer(machine=Machine(token_s=0)),
    "responses": lambda: ResponsesServer(machine=Machine(token_s=0)),
    "messages": lambda: MessagesServer(speaks=frozenset({"messages"}), machine=Machine(token_s=0)),
}
"""By the one wire that each speaks."""

RESPONSES_ARMS = pytest.mark.parametrize("spoken", ["chat", "responses"])
MESSAGES_ARMS = pytest.mark.parametrize("spoken", ["chat", "messages"])


@pytest.fixture(scope="module")
def gateways() -> Iterator[dict[str, Gateway]]:
    """A gateway before each kind of engine."""
    with ExitStack() as stack:
        engines = {name: stack.enter_context(make()) for name, make in ENGINES.items()}
        yield {name: stack.enter_context(running_gateway(engine)) for name, engine in engines.items()}


@pytest.fixture
def gateway(gateways: dict[str, Gateway], spoken: str) -> Gateway:
    chosen = gateways[spoken]
    chosen.engine.requests.clear()
    chosen.engine.machine.forget()
    chosen.forget()
    return chosen


def check_two_calls(gateway: Gateway, stage: str = STAGE, run: str = RUN) -> None:
    """Both calls of the loop are of one workflow, and the second found the first one's prompt."""
    first, second = gateway.records(2)
    assert [(each.workflow, each.stage, each.error) for each in (first, second)] == [(run, stage, None)] * 2
    assert second.prompt_tokens and first.prompt_tokens
    assert second.cached_tokens and second.cached_tokens >= first.prompt_tokens // 2
    assert not first.external and not second.external


# OpenAI's SDK, by Responses


def weather_of_responses(call: Any) -> dict[str, Any]:
    assert call.name == "weather"
    return {"type": "function_call_output", "call_id": call.call_id, "output": SUNNY}


FUNCTION: Any = {
    "type": "function", "name": "weather", "description": "Return the weather.", "strict": False,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}  # fmt: skip


def openai_client(gateway: Gateway, **more: Any) -> openai.OpenAI:
    settings = {"max_retries": 0, "default_headers": HEADERS, **more}
    return openai.OpenAI(base_url=gateway.url, api_key=KEY, **settings)


@RESPONSES_ARMS
def test_the_openai_sdk_by_responses(gateway: Gateway) -> None:
    client, asked = openai_client(gateway).responses, [{"role": "user", "content": QUESTION}]
    first: Any = client.create(model=MODEL, input=asked, tools=[FUNCTION], store=False)
    (call,) = [item for item in first.output if item.type == "function_call"]
    asked += [item.model_dump(exclude_none=True) for item in first.output] + [weather_of_responses(call)]
    raw = client.with_raw_response.create(model=MODEL, input=asked, tools=[FUNCTION], store=False)
    second = raw.parse()
    assert second.output_text.startswith(STORY)
    assert second.status == "completed"
    assert second.usage is not None and second.usage.input_tokens_details.cached_tokens > 0
    assert raw.headers["x-request-id"]
    check_two_calls(gateway)


@RESPONSES_ARMS
def test_the_openai_sdk_by_responses_streamed(gateway: Gateway) -> None:
    client, asked = openai_client(gateway).responses, [{"role": "user", "content": QUESTION}]
    with client.stream(model=MODEL, input=asked, tools=[FUNCTION], store=False) as stream:
        kinds = [event.type for event in stream]
        first = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert "response.function_call_arguments.delta" in kinds
    (call,) = [item for item in first.output if item.type == "function_call"]
    asked += [item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in first.output]
    asked += [weather_of_responses(call)]
    with client.stream(model=MODEL, input=asked, tools=[FUNCTION], store=False) as stream:
        said = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        second = stream.get_final_response()
    assert said == second.output_text and said.startswith(STORY)
    assert second.usage is not None and second.usage.input_tokens_details.cached_tokens > 0
    check_two_calls(gateway)


# Anthropic's SDK

TOOL: Any = {
    "name": "weather",
    "description": "Return the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def anthropic_client(gateway: Gateway, **more: Any) -> Any:
    settings = {"max_retries": 0, "default_headers": HEADERS, **more}
    return anthropic.Anthropic(base_url=gateway.root, api_key=KEY, **settings)


def with_result(asked: list[Any], answer: Any) -> list[Any]:
    """Return the conversation after the tool ran."""
    (call,) = [block for block in answer.content if block.type == "tool_use"]
    assert (answer.stop_reason, call.name) == ("tool_use", "weather")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": SUNNY}
    said = [block.model_dump(exclude_none=True) for block in answer.content]
    return [*asked, {"role": "assistant", "content": said}, {"role": "user", "content": [result]}]


@MESSAGES_ARMS
def test_the_anthropic_sdk(gateway: Gateway) -> None:
    client, asked = anthropic_client(gateway).messages, [{"role": "user", "content": QUESTION}]
    first = client.create(model=MODEL, max_tokens=64, messages=asked, tools=[TOOL])
    raw = client.with_raw_response.create(
        model=MODEL, max_tokens=64, messages=with_result(asked, first), tools=[TOOL]
    )
    second = raw.parse()
    assert second.content[0].text.startswith(STORY)
    assert second.stop_reason == "end_turn"
    assert second.usage.cache_read_input_tokens > 0
    assert raw.headers["x-request-id"]
    check_two_calls(gateway)


@MESSAGES_ARMS
def test_the_anthropic_sdk_streamed(gateway: Gateway) -> None:
    client, asked = anthropic_client(gateway).messages, [{"role": "user", "content": QUESTION}]
    with client.stream(model=MODEL, max_tokens=64, messages=asked, tools=[TOOL]) as stream:
        first = stream.get_final_message()
    with client.stream(model=MODEL, max_tokens=64, messages=with_result(asked, first), tools=[TOOL]) as stream:
        said = "".join(stream.text_stream)
        second = stream.get_final_message()
    assert said == second.content[0].text and said.startswith(STORY)
    assert (second.stop_reason, second.usage.output_tokens > 0) == ("end_turn", True)
    assert second.usage.cache_read_input_tokens > 0
    check_two_calls(gateway)


@MESSAGES_ARMS
def test_the_anthropic_sdk_by_its_beta_path(gateway: Gateway) -> None:
    """Its requests end in ``?beta=true``, name betas in a header, and ask for what no engine of one's own knows."""
    client = anthropic_client(gateway).beta.messages
    answer = client.create(
        model=MODEL, max_tokens=64, messages=[{"role": "user", "content": QUESTION}],
        betas=["context-management-2025-06-27", "interleaved-thinking-2025-05-14"],
        thinking={"type": "adaptive"}, metadata={"user_id": "a-user"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    )  # fmt: skip
    assert answer.content[-1].text.startswith(STORY)


@MESSAGES_ARMS
def test_tokens_are_counted_before_a_call(gateway: Gateway) -> None:
    counting = anthropic_client(gateway).messages.count_tokens
    few = counting(model=MODEL, messages=[{"role": "user", "content": "hello"}])
    many = counting(model=MODEL, messages=[{"role": "user", "content": QUESTION}], tools=[TOOL])
    assert 0 < few.input_tokens < many.input_tokens
    assert gateway.records() == []


# The OpenAI Agents SDK

agents.set_tracing_disabled(True)


@agents.function_tool(name_override="weather")
def weather_tool(city: str) -> str:
    """Return the weather."""
    return f"sunny in {city}"


def agents_model(gateway: Gateway, mode: str) -> Any:
    client = openai.AsyncOpenAI(base_url=gateway.url, api_key=KEY, max_retries=0, default_headers=HEADERS)
    kinds = {"responses": agents.OpenAIResponsesModel, "chat": agents.OpenAIChatCompletionsModel}
    return kinds[mode](MODEL, client)


AGENTS_ARMS = pytest.mark.parametrize(
    ("spoken", "mode"), [("chat", "responses"), ("responses", "responses"), ("chat", "chat")]
)


@AGENTS_ARMS
async def test_the_agents_sdk(gateway: Gateway, mode: str) -> None:
    desk = agents.Agent(
        "desk", instructions="You answer questions.", tools=[weather_tool], model=agents_model(gateway, mode)
    )
    result = await agents.Runner.run(desk, QUESTION)
    assert result.final_output.startswith(STORY)
    outputs = [item.output for item in result.new_items if item.type == "tool_call_output_item"]
    assert outputs == [SUNNY]
    check_two_calls(gateway)


@AGENTS_ARMS
async def test_the_agents_sdk_streamed(gateway: Gateway, mode: str) -> None:
    desk = agents.Agent(
        "desk", instructions="You answer questions.", tools=[weather_tool], model=agents_model(gateway, mode),
        model_settings=agents.ModelSettings(include_usage=True),
    )  # fmt: skip
    result = agents.Runner.run_streamed(desk, QUESTION)
    async for _ in result.stream_events():
        pass
    assert result.final_output.startswith(STORY)
    usage = result.context_wrapper.usage
    assert usage.requests == 2 and usage.input_tokens_details.cached_tokens > 0
    check_two_calls(gateway)


# LangChain


@tool
def weather(city: str) -> str:
    """Return the weather."""
    return f"sunny in {city}"


def by_chat(gateway: Gateway, **more: Any) -> ChatOpenAI:
    settings = {"model": MODEL, "max_retries": 0, "default_headers": HEADERS, **more}
    return ChatOpenAI(base_url=gateway.url, api_key=KEY, **settings)


def by_responses(gateway: Gateway) -> ChatOpenAI:
    return by_chat(gateway, use_responses_api=True, output_version="responses/v1")


def by_messages(gateway: Gateway) -> ChatAnthropic:
    settings: Any = {"model": MODEL, "max_retries": 0, "max_tokens": 64, "default_headers": HEADERS}
    return ChatAnthropic(base_url=gateway.root, api_key=KEY, **settings)


LANGCHAIN_ARMS = pytest.mark.parametrize(
    ("spoken", "make"),
    [
        ("chat", by_chat),
        ("chat", by_responses),
        ("responses", by_responses),
        ("chat", by_messages),
        ("messages", by_messages),
    ],
)


@LANGCHAIN_ARMS
@pytest.mark.parametrize("streamed", [False, True])
def test_langchain(gateway: Gateway, make: Callable[[Gateway], Any], streamed: bool) -> None:
    agent = create_agent(make(gateway), [weather])
    asked: Any = {"messages": [("user", QUESTION)]}
    if streamed:
        said = [*agent.stream(asked, stream_mode="values")][-1]["messages"]
    else:
        said = agent.invoke(asked)["messages"]
    assert [message.type for message in said] == ["human", "ai", "tool", "ai"]
    assert said[2].content == SUNNY
    last = said[-1]
    assert isinstance(last, AIMessage) and last.text.startswith(STORY)
    assert last.usage_metadata is not None
    assert last.usage_metadata["input_token_details"]["cache_read"] > 0
    check_two_calls(gateway)
