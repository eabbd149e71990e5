"""One request on its way to a backend: where it may go, in which wire, and what comes back."""

from __future__ import annotations

import gzip
import json
import types
from typing import Any

import httpx
import pytest

from orla_lg import Backend, BackendUnavailable
from orla_lg.clients.question import Question
from orla_lg.clients.sender import url_of
from orla_lg.clients.sending import Sending, announced
from orla_lg.core.inflight import InFlightCall
from orla_lg.wires.chat import CHAT
from orla_lg.wires.completions import COMPLETIONS
from orla_lg.wires.embeddings import EMBEDDINGS
from orla_lg.wires.messages import MESSAGES
from orla_lg.wires.ollama import OLLAMA_CHAT, OLLAMA_EMBED
from orla_lg.wires.registry import WIRES, wire_at
from orla_lg.wires.wire import Wire
from tests.clients.nodes import inside
from tests.conftest import BACKEND_KEY, CALLER_KEY
from tests.openai_api.raw_engine import EVENTS, MODEL, Answer, RawEngine, stream_of, whole
from tests.wires.messages_server import Answer as Said
from tests.wires.messages_server import MessagesServer, text

groq = pytest.importorskip("groq")
anthropic = pytest.importorskip("anthropic")
ollama = pytest.importorskip("ollama")

MESSAGES_OF: Any = [{"role": "user", "content": "hello"}]


def ask(**more: Any) -> Any:
    client = groq.Groq(base_url="http://127.0.0.1:9", api_key=CALLER_KEY, max_retries=0)
    return client.chat.completions.create(model="gpt-x", messages=MESSAGES_OF, **more)


def served(make_orla: Any, url: str, body: Any, **settings: Any) -> Any:
    orla = make_orla(Backend("main", url, model=MODEL, api_key=BACKEND_KEY, **settings), mapper={"*": "main"})
    return inside(orla, body)


@pytest.mark.parametrize(
    ("path", "wire"),
    [
        ("/v1/chat/completions", CHAT),
        ("/openai/v1/chat/completions/", CHAT),
        ("/completions", COMPLETIONS),
        ("/v1/messages?beta=true", MESSAGES),
        ("/v1/messages/count_tokens", None),
        ("/api/chat", OLLAMA_CHAT),
        ("/chat", None),
        ("/", None),
        ("", None),
    ],
)
def test_a_path_says_whose_request_it_is(path: str, wire: Wire | None) -> None:
    assert wire_at(path) is wire


def test_each_wire_knows_its_own_path() -> None:
    assert all(wire_at(f"/{wire.path}") is wire for wire in WIRES)
    assert len({wire.name for wire in WIRES}) == len(WIRES)


@pytest.mark.parametrize(
    ("base", "wire", "url"),
    [
        ("http://e/v1", CHAT, "http://e/v1/chat/completions"),
        ("http://e/api/v4/", CHAT, "http://e/api/v4/chat/completions"),
        ("http://e/v1", MESSAGES, "http://e/v1/messages"),
        ("http://e/v1/", OLLAMA_CHAT, "http://e/api/chat"),
        ("http://e/under/v1", OLLAMA_CHAT, "http://e/under/api/chat"),
    ],
)
def test_where_a_backend_serves_a_wire(base: str, wire: Wire, url: str) -> None:
    assert str(url_of(base, wire)) == url


@pytest.mark.parametrize(
    ("wire", "speaks", "slots", "isolates", "asked_in"),
    [
        (CHAT, {"messages"}, 2, True, CHAT),
        (COMPLETIONS, set(), 2, True, COMPLETIONS),
        (COMPLETIONS, {"chat"}, None, False, CHAT),
        (MESSAGES, {"chat", "messages"}, None, False, MESSAGES),
        (MESSAGES, {"chat"}, None, False, CHAT),
        (MESSAGES, {"chat", "messages"}, 2, False, CHAT),
        (MESSAGES, {"chat", "messages"}, None, True, CHAT),
        (OLLAMA_EMBED, {"chat", "ollama-embed"}, 2, True, OLLAMA_EMBED),
        (OLLAMA_EMBED, {"chat"}, None, False, EMBEDDINGS),
    ],
)
def test_the_wire_in_which_a_backend_is_asked(
    wire: Wire, speaks: set[str], slots: int | None, isolates: bool, asked_in: Wire
) -> None:
    probe = types.SimpleNamespace(wires=frozenset(speaks), slots=slots)
    scheduler: Any = types.SimpleNamespace(
        health=types.SimpleNamespace(probe=probe), isolation=types.SimpleNamespace(on=isolates)
    )
    assert Question(wire, {}).wire_for(scheduler) is asked_in


def test_a_redirect_elsewhere_is_not_followed(make_orla: Any) -> None:
    with RawEngine(lambda asked: whole()) as other, RawEngine(lambda asked: whole()) as engine:
        url = f"{other.url}/chat/completions"
        engine.rule = lambda asked: Answer(b"", status=307, headers={"location": url})
        with pytest.raises(BackendUnavailable, match="redirects to"):
            served(make_orla, engine.url, ask)
        assert not other.asked


def test_a_redirect_at_home_is_followed_with_key_and_body(make_orla: Any) -> None:
    with RawEngine(lambda asked: whole()) as engine:
        moved = Answer(b"", status=307, headers={"location": "/v2/chat/completions"})
        engine.rule = lambda asked: whole() if asked.path.startswith("/v2") else moved
        assert served(make_orla, engine.url, ask).choices[0].message.content == "hi"
        assert [asked.headers["authorization"] for asked in engine.asked] == [f"Bearer {BACKEND_KEY}"] * 2
        assert engine.asked[0].body == engine.asked[1].body


def test_what_an_engine_packed_unasked_is_unpacked(make_orla: Any) -> None:
    def packed(answer: Answer) -> Answer:
        headers = {"content-encoding": "gzip"}
        return Answer(gzip.compress(answer.body), answer.kind, answer.status, headers)

    refusal = Answer(b'{"error": {"message": "too long", "type": "t"}}', status=400)
    with RawEngine(lambda asked: packed(whole())) as engine:
        assert served(make_orla, engine.url, ask).choices[0].message.content == "hi"
        engine.rule = lambda asked: packed(refusal)
        with pytest.raises(groq.BadRequestError, match="too long"):
            served(make_orla, engine.url, ask)


@pytest.mark.parametrize("kind", ["text/html", EVENTS])
@pytest.mark.parametrize("streamed", [False, True])
def test_garbage_fails_as_a_broken_connection_does(make_orla: Any, kind: str, streamed: bool) -> None:
    with (
        RawEngine(lambda asked: Answer(b"<html>no engine</html>", kind)) as engine,
        pytest.raises(groq.APIConnectionError),
    ):
        served(make_orla, engine.url, lambda: list(ask(stream=True)) if streamed else ask())


def test_half_a_character_is_sent_as_it_was_escaped(make_orla: Any) -> None:
    with RawEngine(lambda asked: whole()) as engine:
        client = groq.Groq(base_url="http://127.0.0.1:9", api_key=CALLER_KEY, max_retries=0)
        raw = b'{"model": "m", "messages": [{"role": "user", "content": "\\ud83d"}]}'

        def body() -> int:
            with announced(Sending("test")):
                return client._client.send(
                    httpx.Request("POST", "http://127.0.0.1:9/chat/completions", content=raw)
                ).status_code

        assert served(make_orla, engine.url, body) == 200
        assert engine.asked[0].body["messages"][0]["content"] == "\ud83d"


def test_the_first_event_of_a_long_stream_is_kept_for_its_counts(make_orla: Any) -> None:
    """Messages count the prompt in their first event; long before the end it is no more among the last bytes."""
    story = "word " * 2000

    def body() -> int:
        client = anthropic.Anthropic(base_url="http://127.0.0.1:9", api_key=CALLER_KEY, max_retries=0)
        events = client.messages.create(model="c", max_tokens=10_000, messages=MESSAGES_OF, stream=True)
        return sum(len(event.delta.text) for event in events if event.type == "content_block_delta")

    with MessagesServer(lambda asked: Said((text(story),))) as engine:
        orla = make_orla(Backend("main", engine.url, model="stand-in", api_key=BACKEND_KEY), mapper={"*": "main"})
        assert inside(orla, body) >= len(story) - 1
    (record,) = orla.records()
    assert (record.prompt_tokens, record.error) == (2, None) and (record.completion_tokens or 0) > 1000


def test_a_chunk_that_is_garbage_is_an_error_event_of_the_callers_wire(make_orla: Any) -> None:
    delta = {"id": "x", "choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}]}
    answer = stream_of([delta, b"{", delta])

    def body() -> list[str]:
        return [
            part.message.content for part in ollama.Client("http://127.0.0.1:9").chat("l", MESSAGES_OF, stream=True)
        ]

    with RawEngine(lambda asked: answer) as engine:
        orla = make_orla(Backend("main", engine.url, model=MODEL, api_key=BACKEND_KEY), mapper={"*": "main"})
        with pytest.raises(ollama.ResponseError, match="JSON"):
            inside(orla, body)
        assert orla.records()[-1].error


def test_a_prompt_is_noted_as_a_chat_whatever_its_wire(make_orla: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the call that follows can be warmed."""

    def body() -> None:
        client = anthropic.Anthropic(base_url="http://127.0.0.1:9", api_key=CALLER_KEY, max_retries=0)
        client.messages.create(model="c", max_tokens=5, system="short", messages=MESSAGES_OF)

    with MessagesServer() as engine:
        backend = Backend("main", engine.url, model="stand-in", api_key=BACKEND_KEY)
        orla = make_orla(backend, mapper={"*": "main"})
        noted: list[Any] = []
        monkeypatch.setattr(InFlightCall, "sends", lambda self, said: noted.append(said))
        inside(orla, body)
    (said,) = noted
    assert json.loads(json.dumps(said["messages"]))[0] == {"role": "system", "content": "short"}
    assert said["model"] == "stand-in"
