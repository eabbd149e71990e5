"""Calls by OpenAI's Responses API in wrapped graphs: served by backends that speak it, and by those that do not."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import openai
import pytest
from langchain.agents import create_agent
from langchain.chat_models import init_chat_model
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import BaseModel
from starlette.responses import JSONResponse

from orla_lg import Backend, BudgetExceeded, Limit, Limits, MappingError, Orla
from tests.conftest import BACKEND_KEY, CALLER_KEY
from tests.test_interception import ainside, inside
from tests.wire.machine import Machine
from tests.wires.chatting_server import ChattingServer
from tests.wires.responses_server import MODEL, ResponsesServer, Turn, usual_turn


class City(BaseModel):
    """A city."""

    name: str
    people: int


@tool
def weather(city: str) -> str:
    """Return the weather."""
    return f"sunny in {city}"


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[ResponsesServer, ResponsesServer, ChattingServer]]:
    with (
        ResponsesServer(machine=Machine(token_s=0)) as theirs,
        ResponsesServer(machine=Machine(token_s=0)) as native,
        ChattingServer(machine=Machine(token_s=0)) as chatting,
    ):
        yield theirs, native, chatting


def fresh(server: Any) -> Any:
    """Return a server as it was at its start."""
    server.requests.clear()
    server.script = usual_turn
    server.machine.forget()
    return server


@pytest.fixture
def theirs(servers: Any) -> ResponsesServer:
    """The server that the application's code names."""
    server: ResponsesServer = fresh(servers[0])
    return server


@pytest.fixture
def native(servers: Any) -> ResponsesServer:
    """A backend's engine that speaks the Responses API."""
    server: ResponsesServer = fresh(servers[1])
    return server


@pytest.fixture
def chatting(servers: Any) -> ChattingServer:
    """A backend's engine that speaks chat completions only."""
    server: ChattingServer = fresh(servers[2])
    return server


MakeOrla = Callable[..., Orla]


def serving(make_orla: MakeOrla, *servers: Any, **settings: Any) -> Orla:
    """Return an Orla whose backends ``main``, ``other`` are those servers."""
    names = ("main", "other")[: len(servers)]
    backends = [
        Backend(name, server.url, model=MODEL, api_key=BACKEND_KEY)
        for name, server in zip(names, servers, strict=True)
    ]
    orla: Orla = make_orla(*backends, **{"mapper": {"*": "main"}, **settings})
    return orla


# What is the same, whoever answers

_NEW = re.compile(r"\b(resp|msg|rs|fc|call|lc_run-)_?-?[0-9a-f-]{20,}")


def alike(value: Any) -> Any:
    """Return a value without what is new in each answer: ids and times."""
    if isinstance(value, BaseModel | BaseMessage):
        return {"class": type(value).__name__, **alike(value.model_dump())}
    if isinstance(value, dict):
        return {key: alike(each) for key, each in value.items() if key not in ("created_at", "completed_at")}
    if isinstance(value, list | tuple):
        return [alike(each) for each in value]
    return _NEW.sub(r"\1", value) if isinstance(value, str) else value


# ── every form of a LangChain model ──────────────────────────────────────────────────────────────────

MODELS: dict[str, Callable[..., Any]] = {
    "use_responses_api": lambda **more: ChatOpenAI(use_responses_api=True, **more),
    "reasoning": lambda **more: ChatOpenAI(reasoning={"effort": "low", "summary": "auto"}, **more),
    "init_chat_model": lambda **more: init_chat_model(
        more.pop("model"), model_provider="openai", use_responses_api=True, store=False, **more
    ),
}


def a_model(name: str, url: str, **more: Any) -> Any:
    return MODELS[name](**{"model": MODEL, "base_url": url, "api_key": CALLER_KEY, "max_retries": 0, **more})


def streamed(chunks: list[Any]) -> list[Any]:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return [whole, chunks]


async def _astream(model: Any) -> list[Any]:
    return streamed([chunk async for chunk in model.astream("hello")])


HISTORY: list[BaseMessage] = [
    HumanMessage("weather?"),
    AIMessage("", tool_calls=[{"name": "weather", "args": {"city": "Oslo"}, "id": "call_1"}]),
    ToolMessage("sunny", tool_call_id="call_1"),
]

FORMS: dict[str, Callable[[Any], Any]] = {
    "invoke": lambda model: model.invoke("hello"),
    "stream": lambda model: streamed([*model.stream("hello")]),
    "bound": lambda model: model.invoke("hello", max_tokens=3),
    "history": lambda model: model.bind_tools([weather], tool_choice="none").invoke(HISTORY),
    "tools": lambda model: model.bind_tools([weather]).invoke("weather?"),
    "tools, streamed": lambda model: streamed([*model.bind_tools([weather]).stream("weather?")]),
    "tools, forced": lambda model: model.bind_tools([weather], tool_choice="weather").invoke("weather?"),
    "structured": lambda model: model.with_structured_output(City, include_raw=True).invoke("which?"),
    "structured by a function": lambda model: model.with_structured_output(City, method="function_calling").invoke(
        "which?"
    ),
    "batch": lambda model: model.batch(["hello"]),
}
AFORMS: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "ainvoke": lambda model: model.ainvoke("hello"),
    "astream": _astream,
    "abatch": lambda model: model.abatch(["hello"]),
    "atools": lambda model: model.bind_tools([weather]).ainvoke("weather?"),
    "astructured": lambda model: model.with_structured_output(City).ainvoke("which?"),
}


MATRIX = [("use_responses_api", form) for form in (*FORMS, *AFORMS)]
MATRIX += [
    (kind, form) for kind in ("reasoning", "init_chat_model") for form in ("invoke", "astream", "tools, streamed")
]


def said(form: str, model: Any, orla: Orla | None = None) -> Any:
    """Return what a form of a call gives, bare or in the node ``ask`` of a wrapped graph."""
    if form in FORMS:
        return inside(orla, lambda: FORMS[form](model)) if orla is not None else FORMS[form](model)
    return ainside(orla, lambda: AFORMS[form](model)) if orla is not None else asyncio.run(AFORMS[form](model))


def served_once(orla: Orla) -> Any:
    (record,) = orla.records()
    assert (record.stage, record.backend, record.external, record.error) == ("ask", "main", False, None)
    assert record.model == MODEL and record.attempts == 1
    return record


@pytest.mark.parametrize(("kind", "form"), MATRIX)
def test_natively_an_answer_is_the_same_field_by_field(
    native: ResponsesServer, theirs: ResponsesServer, make_orla: MakeOrla, kind: str, form: str
) -> None:
    orla = serving(make_orla, native)
    bare = said(form, a_model(kind, native.url))
    (expected,) = native.bodies()
    native.machine.forget()
    wrapped = said(form, a_model(kind, theirs.url), orla)
    assert alike(wrapped) == alike(bare)
    *_, seen = native.asked("/v1/responses")
    assert native.bodies() == [expected, expected] and seen.key == BACKEND_KEY
    assert not theirs.requests
    record = served_once(orla)
    assert record.prompt_tokens > 0 and record.completion_tokens > 0


def meaning(value: Any) -> Any:
    """Return what an answer means, whichever wire it came by."""
    if isinstance(value, AIMessage | AIMessageChunk):
        usage = value.usage_metadata or {}
        counted = {key: usage.get(key) for key in ("input_tokens", "output_tokens", "total_tokens")}
        calls = [(call["name"], call["args"]) for call in value.tool_calls]
        return {"text": value.text, "calls": calls, "model": value.response_metadata.get("model_name"), **counted}
    if isinstance(value, dict):
        return {key: meaning(each) for key, each in value.items()}
    return meaning(value[0]) if isinstance(value, list) else value


@pytest.mark.parametrize(("kind", "form"), MATRIX)
def test_translated_an_answer_means_the_same(
    chatting: ChattingServer, theirs: ResponsesServer, make_orla: MakeOrla, kind: str, form: str
) -> None:
    orla = serving(make_orla, chatting)
    effort = "low" if kind == "reasoning" else None
    by_chat = ChatOpenAI(
        model=MODEL, base_url=chatting.url, api_key="any", max_retries=0, stream_usage=True, reasoning_effort=effort
    )  # fmt: skip
    bare = said(form, by_chat)
    wrapped = said(form, a_model(kind, theirs.url), orla)
    assert meaning(wrapped) == meaning(bare)
    *_, seen = chatting.asked("/v1/chat/completions")
    assert seen.key == BACKEND_KEY and not theirs.requests
    assert served_once(orla).prompt_tokens > 0


def test_a_cut_off_answer_says_so_when_it_is_translated(chatting: ChattingServer, make_orla: MakeOrla) -> None:
    orla = serving(make_orla, chatting)
    message = inside(orla, lambda: a_model("use_responses_api", chatting.url).invoke("hello", max_tokens=3))
    assert message.response_metadata["status"] == "incomplete"
    assert message.response_metadata["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_translated_stream_is_counted_before_the_engine_is_known(
    chatting: ChattingServer, make_orla: MakeOrla, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unavailable(seen: Any) -> Any:
        return JSONResponse({"error": "later"}, 503)

    monkeypatch.setattr(chatting, "_models", unavailable)
    orla = serving(make_orla, chatting)
    model = a_model("use_responses_api", "http://127.0.0.1:9/v1")
    whole, _ = inside(orla, lambda: streamed([*model.stream("hello")]))
    assert whole.usage_metadata["output_tokens"] == 12 and served_once(orla).completion_tokens == 12
    assert orla.core.serving.schedulers["main"].health.probe is None


@pytest.mark.parametrize("engine", ["native", "chatting"])
def test_a_batch_is_as_many_calls(request: pytest.FixtureRequest, make_orla: MakeOrla, engine: str) -> None:
    orla = serving(make_orla, request.getfixturevalue(engine))
    model = a_model("use_responses_api", "http://127.0.0.1:9/v1")
    answers = inside(orla, lambda: model.batch(["one", "two", "three"]))
    assert len(answers) == 3 and all(answer.text for answer in answers)
    assert [record.stage for record in orla.records()] == ["ask"] * 3
    assert not any(record.external for record in orla.records())


@pytest.mark.parametrize("engine", ["native", "chatting"])
@pytest.mark.parametrize("streams", [False, True])
def test_an_agent_goes_round(request: pytest.FixtureRequest, make_orla: MakeOrla, engine: str, streams: bool) -> None:
    server = request.getfixturevalue(engine)
    orla = serving(make_orla, server)
    model = a_model("reasoning", "http://127.0.0.1:9/v1", streaming=streams)
    agent = orla.wrap(create_agent(model, [weather]))
    result = agent.invoke({"messages": [("user", "weather?")]})
    kinds = [message.type for message in result["messages"]]
    assert kinds == ["human", "ai", "tool", "ai"] and result["messages"][-1].text.startswith("once upon")
    assert [record.stage for record in orla.records()] == ["model"] * 2
    assert not any(record.external for record in orla.records())
    if engine == "native":
        items = [item.get("type") for item in native_items(server)]
        assert items == ["message", "reasoning", "function_call", "function_call_output"]
    else:
        user, turn, output = server.bodies()[-1]["messages"]
        assert (user["role"], turn["role"], output["role"]) == ("user", "assistant", "tool")
        assert turn["reasoning_content"] == "let me see" and turn["tool_calls"][0]["id"] == output["tool_call_id"]


def native_items(server: ResponsesServer) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = server.bodies()[-1]["input"]
    return items


# ── every form of the SDK ────────────────────────────────────────────────────────────────────────────

ASK: dict[str, Any] = {"model": MODEL, "input": "hello"}


def _helper(client: openai.OpenAI) -> Any:
    with client.responses.stream(**ASK, text_format=City) as stream:
        events = [event.to_dict(warnings=False) for event in stream]
        return [
            events,
            stream.get_final_response().to_dict(warnings=False),
            stream.get_final_response().output_parsed,
        ]


def _raw_stream(client: openai.OpenAI) -> Any:
    with client.responses.with_streaming_response.create(**ASK) as response:
        return response.parse().to_dict()


async def _ahelper(client: openai.AsyncOpenAI) -> Any:
    async with client.responses.stream(**ASK) as stream:
        return [
            [event.to_dict(warnings=False) async for event in stream],
            (await stream.get_final_response()).to_dict(warnings=False),
        ]


async def _acreate_stream(client: openai.AsyncOpenAI) -> Any:
    return [event.to_dict() async for event in await client.responses.create(**ASK, stream=True)]


async def _araw(client: openai.AsyncOpenAI) -> Any:
    return (await client.responses.with_raw_response.create(**ASK)).parse().to_dict()


SDK_FORMS: dict[str, Callable[[openai.OpenAI], Any]] = {
    "create": lambda client: client.responses.create(**ASK).to_dict(),
    "create, streamed": lambda client: [event.to_dict() for event in client.responses.create(**ASK, stream=True)],
    "parse": lambda client: client.responses.parse(**ASK, text_format=City).output_parsed,
    "stream": _helper,
    "raw": lambda client: client.responses.with_raw_response.create(**ASK).parse().to_dict(),
    "raw, streamed": _raw_stream,
}
ASDK_FORMS: dict[str, Callable[[openai.AsyncOpenAI], Awaitable[Any]]] = {
    "acreate, streamed": _acreate_stream,
    "astream": _ahelper,
    "araw": _araw,
}


def sdk_said(form: str, url: str, orla: Orla | None = None) -> Any:
    if form in SDK_FORMS:
        client = openai.OpenAI(base_url=url, api_key=CALLER_KEY, max_retries=0)
        with client:
            return inside(orla, lambda: SDK_FORMS[form](client)) if orla is not None else SDK_FORMS[form](client)

    async def body() -> Any:
        async with openai.AsyncOpenAI(base_url=url, api_key=CALLER_KEY, max_retries=0) as client:
            return await ASDK_FORMS[form](client)

    return ainside(orla, body) if orla is not None else asyncio.run(body())


@pytest.mark.parametrize("form", [*SDK_FORMS, *ASDK_FORMS])
def test_the_sdk_itself_natively(native: ResponsesServer, make_orla: MakeOrla, form: str) -> None:
    orla = serving(make_orla, native)
    bare = sdk_said(form, native.url)
    assert alike(sdk_said(form, "http://127.0.0.1:9/v1", orla)) == alike(bare)
    served_once(orla)


def texts(value: Any) -> list[str]:
    """Return the texts of whole answers in what a form gave."""
    if isinstance(value, dict) and value.get("object") == "response":
        return [part["text"] for item in value["output"] for part in item.get("content", ())]
    if isinstance(value, City):
        return [value.model_dump_json()]
    return (
        [text for each in (value.values() if isinstance(value, dict) else value) for text in texts(each)]
        if (isinstance(value, dict | list))
        else []
    )


@pytest.mark.parametrize("form", [*SDK_FORMS, *ASDK_FORMS])
def test_the_sdk_itself_translated(
    chatting: ChattingServer, native: ResponsesServer, make_orla: MakeOrla, form: str
) -> None:
    orla = serving(make_orla, chatting)
    expected = sdk_said(form, native.url)
    translated = sdk_said(form, "http://127.0.0.1:9/v1", orla)
    assert texts(translated) == texts(expected) and texts(expected)
    if isinstance(expected, list) and all("sequence_number" in event for event in expected):
        kinds = [[event["type"] for event in each] for each in (translated, expected)]
        assert kinds[0] == kinds[1]
    served_once(orla)


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────

STATUSES: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError, 401: openai.AuthenticationError, 403: openai.PermissionDeniedError,
    404: openai.NotFoundError, 422: openai.UnprocessableEntityError, 429: openai.RateLimitError,
    500: openai.InternalServerError,
}  # fmt: skip


def failing(status: int, **more: Any) -> Callable[[Any], Turn]:
    error = {"message": "it is wrong", "type": "invalid_request_error", "param": None, "code": "that"}
    return lambda body: Turn(status=status, error=error, **more)


@pytest.mark.parametrize(("status", "streams"), [*((status, False) for status in STATUSES), (400, True), (500, True)])
def test_errors_are_the_clients_own(
    native: ResponsesServer, theirs: ResponsesServer, make_orla: MakeOrla, status: int, streams: bool
) -> None:
    orla = serving(make_orla, native)
    native.script = theirs.script = failing(status)
    client = openai.OpenAI(base_url=theirs.url, api_key=CALLER_KEY, max_retries=0)
    with pytest.raises(STATUSES[status]) as bare:
        client.responses.create(**ASK, stream=streams)
    theirs.requests.clear()
    with pytest.raises(STATUSES[status]) as wrapped:
        inside(orla, lambda: client.responses.create(**ASK, stream=streams))
    assert (str(wrapped.value), wrapped.value.body, wrapped.value.code) == (
        str(bare.value), bare.value.body, bare.value.code,
    )  # fmt: skip
    (record,) = orla.records()
    assert record.error is not None and record.backend == "main" and not theirs.requests


@pytest.mark.parametrize(("status", "streams"), [(400, False), (429, False), (500, True)])
def test_errors_of_chat_completions_are_said_in_this_wire(
    chatting: ChattingServer, theirs: ResponsesServer, make_orla: MakeOrla, status: int, streams: bool
) -> None:
    orla = serving(make_orla, chatting)
    chatting.script = failing(status)
    model = a_model("use_responses_api", theirs.url, streaming=streams)
    with pytest.raises(STATUSES[status], match="it is wrong") as refused:
        inside(orla, lambda: model.invoke("hello"))
    assert refused.value.body == {
        "message": "it is wrong", "type": "invalid_request_error", "param": None, "code": "invalid_request_error",
    }  # fmt: skip
    assert not theirs.requests


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("engine", ["native", "chatting"])
def test_retries_are_ours_and_as_many_as_the_client_would_make(
    request: pytest.FixtureRequest, make_orla: MakeOrla, streams: bool, engine: str
) -> None:
    native = request.getfixturevalue(engine)
    orla = serving(make_orla, native)
    turns = iter([failing(500)({}), failing(429, headers={"retry-after": "0"})({}), Turn(text="at last")])
    native.script = lambda body: next(turns)
    model = a_model("use_responses_api", "http://127.0.0.1:9/v1", max_retries=2, streaming=streams)
    assert inside(orla, lambda: model.invoke("hello")).text == "at last"
    (record,) = orla.records()
    assert (record.attempts, record.error) == (3, None)


def test_a_stream_that_fails_before_its_first_token_is_tried_again(
    native: ResponsesServer, make_orla: MakeOrla
) -> None:
    orla = serving(make_orla, native)
    error = {"code": "server_error", "message": "boom"}
    turns = iter([Turn(error=error), Turn(text="at last")])
    native.script = lambda body: next(turns)
    model = a_model("use_responses_api", "http://127.0.0.1:9/v1", max_retries=1)
    assert inside(orla, lambda: streamed([*model.stream("hello")]))[0].text == "at last"
    assert [record.attempts for record in orla.records()] == [2]


@pytest.mark.parametrize("breaks", ["", "error"])
def test_an_answer_that_fails_half_way_is_the_callers(
    native: ResponsesServer, theirs: ResponsesServer, make_orla: MakeOrla, breaks: str
) -> None:
    orla = serving(make_orla, native)
    turn = Turn(text="half an answer", error={"code": "server_error", "message": "boom"}, breaks=breaks)
    native.script = theirs.script = lambda body: turn
    client = openai.OpenAI(base_url=theirs.url, api_key=CALLER_KEY, max_retries=0)

    def read() -> list[Any]:
        return [event.to_dict() for event in client.responses.create(**ASK, stream=True)]

    assert alike(inside(orla, read)) == alike(read())
    with pytest.raises(ValueError, match="boom"):
        inside(orla, lambda: [*a_model("use_responses_api", theirs.url).stream("hello")])


def test_an_engine_that_fails_half_way_fails_the_translated_answer(
    chatting: ChattingServer, make_orla: MakeOrla
) -> None:
    orla = serving(make_orla, chatting)
    chatting.script = lambda body: Turn(text="half an answer", error={"message": "boom", "code": 500})
    client = openai.OpenAI(base_url=chatting.url, api_key=CALLER_KEY, max_retries=0)
    events = inside(orla, lambda: [event.to_dict() for event in client.responses.create(**ASK, stream=True)])
    assert events[0]["type"] == "response.created" and events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "boom"}
    assert texts(events[-1]) == ["half an answer"]


@pytest.mark.parametrize("engine", ["native", "chatting"])
def test_a_connection_that_breaks_half_way_is_the_clients_error(
    request: pytest.FixtureRequest, make_orla: MakeOrla, engine: str
) -> None:
    native = request.getfixturevalue(engine)
    orla = serving(make_orla, native)
    native.script = lambda body: Turn(text="half an answer", breaks="connection")
    client = openai.OpenAI(base_url=native.url, api_key=CALLER_KEY, max_retries=0)
    with pytest.raises(openai.APIConnectionError):
        inside(orla, lambda: [*client.responses.create(**ASK, stream=True)])
    assert orla.records()[0].error is not None


@pytest.mark.parametrize("streams", [False, True])
def test_our_own_errors_come_out_raw(native: ResponsesServer, make_orla: MakeOrla, streams: bool) -> None:
    orla = serving(make_orla, native, limits=Limits(run=Limit(tokens=1)))
    model = a_model("use_responses_api", native.url, max_retries=2, streaming=streams)
    for ask in (lambda: model.invoke("hello"), lambda: model.with_structured_output(City).invoke("hello")):
        with pytest.raises(BudgetExceeded):
            inside(orla, ask)
    with pytest.raises(BudgetExceeded):
        ainside(orla, lambda: model.ainvoke("hello"))
    assert not native.bodies()


# ── what cannot be said in chat completions ──────────────────────────────────────────────────────────

UNSAID: dict[str, dict[str, Any]] = {
    "previous_response_id": {"previous_response_id": "resp_1"},
    "tools[0].type": {"tools": [{"type": "web_search"}]},
    "input[0].type": {"input": [{"type": "item_reference", "id": "msg_1"}]},
    "input[0].content[0].type": {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
    "conversation": {"conversation": "conv_1"},
    "background": {"background": True},
}


@pytest.mark.parametrize("field", UNSAID)
def test_what_cannot_be_translated_passes_and_is_warned_of_once(
    chatting: ChattingServer,
    theirs: ResponsesServer,
    make_orla: MakeOrla,
    caplog: pytest.LogCaptureFixture,
    field: str,
) -> None:
    orla = serving(make_orla, chatting)
    first = usual_turn({"input": "hello"})
    theirs.script = lambda body: first
    theirs.stored["resp_1"] = []
    client = openai.OpenAI(base_url=theirs.url, api_key=CALLER_KEY, max_retries=0)
    asked = {**ASK, **UNSAID[field]}
    for _ in range(2):
        try:
            bare: Any = client.responses.create(**asked).output_text
        except openai.APIStatusError as error:
            bare = str(error)
        with caplog.at_level(logging.WARNING, "orla_lg"):
            try:
                passed: Any = inside(orla, lambda: client.responses.create(**asked).output_text)
            except openai.APIStatusError as error:
                passed = str(error)
        assert passed == bare
    assert all(seen.key == CALLER_KEY for seen in theirs.requests)
    records = orla.records()
    assert [(record.external, record.stage) for record in records] == [(True, "ask")] * 2
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "orla_lg"]
    assert field in warning and not chatting.asked("/v1/chat/completions")


def test_what_cannot_be_translated_may_be_an_error(
    chatting: ChattingServer, native: ResponsesServer, make_orla: MakeOrla
) -> None:
    orla = serving(make_orla, chatting, native, untranslatable="error")
    model = a_model("use_responses_api", native.url).bind_tools([{"type": "web_search"}])
    native.requests.clear()
    for ask in (lambda: model.invoke("hello"), lambda: [*model.stream("hello")]):
        with pytest.raises(MappingError, match=r"tools\[0\].type: a web_search tool.*other"):
            inside(orla, ask)
    assert not chatting.asked("/v1/chat/completions") and not native.bodies()
    assert orla.statistics().external == 0


def test_a_backend_that_speaks_the_wire_takes_it_all(
    chatting: ChattingServer, native: ResponsesServer, make_orla: MakeOrla
) -> None:
    orla = serving(make_orla, chatting, native, mapper={"*": "other"}, untranslatable="error")
    native.script = lambda body: Turn(text="found")
    model = a_model("use_responses_api", "http://127.0.0.1:9/v1").bind_tools([{"type": "web_search"}])
    assert inside(orla, lambda: model.invoke("hello")).text == "found"
    assert native.bodies()[-1]["tools"] == [{"type": "web_search"}]


def test_stages_of_one_graph_on_two_wires(
    chatting: ChattingServer, native: ResponsesServer, make_orla: MakeOrla
) -> None:
    orla = serving(make_orla, chatting, native, mapper={"draft": "main", "review": "other"})
    model = a_model("use_responses_api", "http://127.0.0.1:9/v1")
    graph = StateGraph(MessagesState)
    for name in ("draft", "review"):
        graph.add_node(name, lambda state: {"messages": [model.invoke(state["messages"])]})
    built = graph.add_edge(START, "draft").add_edge("draft", "review").compile()
    result = orla.wrap(built).invoke({"messages": [("user", "hello")]})
    assert [(record.stage, record.backend) for record in orla.records()] == [("draft", "main"), ("review", "other")]
    assert len(result["messages"]) == 3
    roles = [item["role"] for item in native_items(native)]
    assert roles == ["user", "assistant"]
