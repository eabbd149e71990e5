"""What the HTTP client's ``send`` takes for a model's request, and what it leaves alone."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from typing import Any

import httpx
import httpx2
import openai
import pytest
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult

from orla_lg import MappingError, Orla
from orla_lg.clients import http, way_in
from orla_lg.clients.sending import SENDING, Sending, announced
from tests.clients.nodes import ainside, inside
from tests.conftest import BACKEND_KEY, CALLER_KEY, HTTP_SENDS, at
from tests.stub_engine import Reply, StubEngine

BODY: dict[str, Any] = {"model": "gpt-x", "messages": [{"role": "user", "content": "hello"}]}
SAID = "1 user said: hello"


@pytest.fixture
def theirs(other_engine: StubEngine) -> StubEngine:
    """The server that the application's code names."""
    return other_engine


class Plain(BaseChatModel):
    """A chat model that sends by httpx, as some integrations do, and is in no table."""

    url: str
    library: Any = httpx
    tries: int = 1

    @property
    def _llm_type(self) -> str:
        return "plain"

    def _get_ls_params(self, *args: Any, **kwargs: Any) -> Any:
        return {"ls_model_name": BODY["model"], "ls_provider": "plain"}

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        for _ in range(self.tries):
            answer = self.library.post(f"{self.url}/chat/completions", json=BODY, headers=KEY)
            if answer.is_success:
                break
        answer.raise_for_status()
        said = answer.json()["choices"][0]["message"]["content"]
        return ChatResult(generations=[ChatGeneration(message=AIMessage(said))])


KEY = {"Authorization": f"Bearer {CALLER_KEY}"}


@pytest.mark.parametrize("library", [httpx, httpx2])
def test_a_model_that_sends_by_itself_is_served(
    engine: StubEngine, theirs: StubEngine, orla: Orla, library: Any
) -> None:
    assert inside(orla, lambda: Plain(url=theirs.url, library=library).invoke("hello").content) == SAID
    (seen,) = engine.chats
    (record,) = orla.records()
    assert seen.key == BACKEND_KEY and (record.stage, record.external) == ("ask", False) and not theirs.requests


def test_its_own_retries_are_served_too(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    engine.script.append(Reply(status=500))
    assert inside(orla, lambda: Plain(url=theirs.url, tries=2).invoke("hello").content) == SAID
    assert [bool(record.error) for record in orla.records()] == [True, False] and not theirs.requests


def test_what_follows_a_model_in_its_node_is_not_its_own(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    def body() -> int:
        Plain(url=theirs.url).invoke("hello")
        return httpx.post(f"{theirs.url}/chat/completions", json=BODY).status_code

    assert inside(orla, body) == 200
    assert (len(engine.chats), len(theirs.chats), len(orla.records())) == (1, 1, 1)


@pytest.mark.parametrize("body", [b"[1]", b"3", b"null"])
def test_a_body_that_is_no_object_passes(theirs: StubEngine, orla: Orla, body: bytes) -> None:
    def send() -> int:
        with announced(Sending()):
            return httpx.post(f"{theirs.url}/embeddings", content=body).status_code

    assert inside(orla, send) == 404 and not orla.records()


def test_a_body_that_is_still_to_come_passes(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    def send() -> str:
        data = json.dumps(BODY).encode()
        headers = {"content-length": str(len(data))}
        with announced(Sending()):
            answer = httpx.post(f"{theirs.url}/chat/completions", content=iter([data]), headers=headers)
            return str(answer.json()["choices"][0]["message"]["content"])

    assert inside(orla, send) == SAID
    assert not engine.chats and not orla.records()


def test_what_is_sent_while_a_call_is_served_is_not_the_models(
    engine: StubEngine, theirs: StubEngine, make_orla: Any
) -> None:
    class Asks:
        def map(self, call: Any, backends: Any) -> None:
            assert SENDING.get() is None
            httpx.post(f"{theirs.url}/chat/completions", json=BODY)

    orla = make_orla(at(engine, aliases=("gpt-x",)), mapper=Asks())
    assert inside(orla, lambda: Plain(url=theirs.url).invoke("hello").content) == SAID
    assert (len(engine.chats), len(theirs.chats), len(orla.records())) == (1, 1, 1)


def test_the_libraries_are_restored(engine: StubEngine) -> None:
    first, second = Orla([at(engine)]), Orla([at(engine)])
    inside(first, lambda: None)
    inside(second, lambda: None)
    first.close()
    assert all(kind.send is not send for kind, send in HTTP_SENDS.items())
    second.close()
    assert all(kind.send is send for kind, send in HTTP_SENDS.items())
    assert way_in.way_in.site({}) is None


def test_a_wrapper_that_came_later_stays(engine: StubEngine, theirs: StubEngine) -> None:
    orla = Orla([at(engine)], {"*": "main"})
    inside(orla, lambda: None)
    ours = httpx.Client.send
    calls = []

    def theirs_too(self: Any, request: Any, **how: Any) -> Any:
        calls.append(request)
        return ours(self, request, **how)

    httpx.Client.send = theirs_too  # type: ignore[method-assign]
    try:
        orla.close()
        assert httpx.Client.send is theirs_too
        assert httpx.post(f"{theirs.url}/chat/completions", json=BODY).is_success
        again = Orla([at(engine)], {"*": "main"})
        assert inside(again, lambda: Plain(url=theirs.url).invoke("hello").content) == SAID
        assert len(again.records()) == 1
        again.close()
    finally:
        httpx.Client.send = ours  # type: ignore[method-assign]
        http.uninstall()
    assert len(calls) == 2 and httpx.Client.send is HTTP_SENDS[httpx.Client]


def test_a_bare_thread_is_counted_as_lost(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    def body() -> None:
        def send() -> None:
            with announced(Sending()):
                httpx.post(f"{theirs.url}/chat/completions", json=BODY)

        thread = threading.Thread(target=send)
        thread.start()
        thread.join()

    inside(orla, body)
    assert orla.statistics().unidentified == 1 and len(theirs.chats) == 1


# ── other wires ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def sdk(theirs: StubEngine) -> openai.OpenAI:
    return openai.OpenAI(base_url=theirs.url, api_key=CALLER_KEY, max_retries=0)


RESPONSES: dict[str, Callable[[openai.OpenAI], str]] = {
    "create": lambda sdk: sdk.responses.create(model="gpt-x", input="hello").output_text,
    "stream": lambda sdk: "".join(
        event.delta
        for event in sdk.responses.create(model="gpt-x", input="hello", stream=True)
        if event.type == "response.output_text.delta"
    ),
}


@pytest.mark.parametrize("form", RESPONSES)
def test_a_request_of_another_wire_is_translated(
    engine: StubEngine, theirs: StubEngine, orla: Orla, sdk: openai.OpenAI, form: str
) -> None:
    assert inside(orla, lambda: RESPONSES[form](sdk)) == SAID
    (seen,) = engine.chats
    (record,) = orla.records()
    assert (seen.key, record.stage, record.backend, record.error) == (BACKEND_KEY, "ask", "main", None)
    assert record.prompt_tokens and record.completion_tokens and not theirs.requests


def test_an_error_comes_back_in_the_callers_form(engine: StubEngine, orla: Orla, sdk: openai.OpenAI) -> None:
    engine.rule = lambda seen: Reply(status=400)
    with pytest.raises(openai.BadRequestError) as caught:
        inside(orla, lambda: RESPONSES["create"](sdk))
    assert caught.value.body is not None and "message" in caught.value.body  # type: ignore[operator]


RESPONSE: dict[str, Any] = {
    "id": "resp_2", "object": "response", "created_at": 0, "status": "completed", "model": "m",
    "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
    "output": [
        {
            "type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": "a response", "annotations": []}],
        }
    ],
    "usage": {
        "input_tokens": 3, "output_tokens": 2, "total_tokens": 5, "input_tokens_details": {"cached_tokens": 1},
        "output_tokens_details": {"reasoning_tokens": 0},
    },
}  # fmt: skip

UNSAYABLE: dict[str, Any] = {"model": "gpt-x", "input": "hello", "previous_response_id": "resp_1"}


def test_what_cannot_be_translated_passes_and_is_warned_of_once(
    engine: StubEngine, theirs: StubEngine, orla: Orla, sdk: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "orla_lg"):
        for _ in range(2):
            assert inside(orla, lambda: sdk.responses.create(**UNSAYABLE).output_text) == "a response"
    assert [record.external for record in orla.records()] == [True, True] and not engine.chats
    assert [seen.key for seen in theirs.requests] == [CALLER_KEY] * 2
    (warned,) = [each.getMessage() for each in caplog.records if "previous_response_id" in each.getMessage()]
    assert "'ask'" in warned and "Responses" in warned


def test_or_fails_before_it_is_queued(engine: StubEngine, theirs: StubEngine, make_orla: Any) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"}, untranslatable="error")
    sdk = openai.OpenAI(base_url=theirs.url, api_key=CALLER_KEY)
    with pytest.raises(MappingError, match=r"previous_response_id.*Responses API: none"):
        inside(orla, lambda: sdk.responses.create(**UNSAYABLE))
    assert not theirs.requests and not engine.chats and orla.statistics().backends["main"].queue.granted == 0


def test_a_backend_that_speaks_the_wire_takes_what_others_cannot(
    engine: StubEngine, theirs: StubEngine, make_orla: Any, sdk: openai.OpenAI
) -> None:
    with StubEngine(speaks={"/v1/responses": lambda body: RESPONSE}) as speaking:
        orla = make_orla(at(engine), at(speaking, "speaking"), mapper={"*": ["main", "speaking"]})
        assert inside(orla, lambda: sdk.responses.create(**UNSAYABLE).output_text) == "a response"
        (seen,) = [seen for seen in speaking.requests if seen.body.get("input")]
        assert (seen.key, seen.body) == (BACKEND_KEY, {**UNSAYABLE, "model": "stub-model"})
    (record,) = orla.records()
    assert (record.backend, record.external, record.cached_tokens) == ("speaking", False, 1)


def test_embeddings_are_recorded_beside_their_stage(
    engine: StubEngine, theirs: StubEngine, orla: Orla, sdk: openai.OpenAI
) -> None:
    with pytest.raises(openai.NotFoundError):
        inside(orla, lambda: sdk.embeddings.create(model="e", input="hello"))
    (record,) = orla.records()
    assert (record.stage, record.external, record.model) == ("ask:embeddings", True, "e")


def test_an_async_request_of_another_wire(engine: StubEngine, theirs: StubEngine, orla: Orla) -> None:
    async def body() -> str:
        sdk = openai.AsyncOpenAI(base_url=theirs.url, api_key=CALLER_KEY, max_retries=0)
        whole = (await sdk.responses.create(model="gpt-x", input="hello")).output_text
        events = await sdk.responses.create(model="gpt-x", input="hello", stream=True)
        pieces = [event.delta async for event in events if event.type == "response.output_text.delta"]
        return f"{whole}|{''.join(pieces)}"

    assert ainside(orla, body) == f"{SAID}|{SAID}"
    assert len(engine.chats) == 2 and not theirs.requests
