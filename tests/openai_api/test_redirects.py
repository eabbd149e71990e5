"""Redirects: followed as the SDK follows them, and never to another server with the key or the prompt."""

from __future__ import annotations

import ssl
from typing import Any

import httpx2
import openai
import pytest

from orla_lg import Backend, BackendUnavailable, Orla
from orla_lg.openai_api.home import Home, Upgrade
from orla_lg.testing.faults import MODEL, FaultEngine, Reply, Seen
from tests.conftest import BACKEND_KEY
from tests.test_failures import FORMS, WAYS, caller

PROMPT = "hello"


def redirect(status: int, location: str) -> Reply:
    return Reply(status=status, headers=(("location", location),))


def behind(status: int, location: str = "/v1/chat/completions?again=1") -> Any:
    def rule(seen: Seen) -> Reply | None:
        return None if seen.query else redirect(status, location)

    return rule


def at(engine: FaultEngine) -> Backend:
    return Backend("main", engine.url, model=MODEL, api_key=BACKEND_KEY)


@pytest.mark.parametrize(
    ("status", "way", "form"), [(308, "wrapped", "invoke"), *((307, way, form) for way in WAYS for form in FORMS)]
)
def test_a_redirect_is_followed_with_prompt_and_key(status: int, way: str, form: str, make_orla: Any) -> None:
    with FaultEngine(rule=behind(status)) as engine:
        orla = make_orla(at(engine), mapper={"*": "main"})
        assert caller(orla, way)(form).endswith("user said: hello")
        first, second = engine.chats
        assert second.body == first.body and second.key == BACKEND_KEY and second.query
        assert orla.records()[-1].attempts == 1 and orla.records()[-1].completion_tokens


@pytest.mark.parametrize("status", [301, 302, 303])
def test_a_redirect_that_makes_a_get_is_answered_as_the_sdk_answers_it(status: int, make_orla: Any) -> None:
    with FaultEngine(rule=behind(status, "/v1/models")) as engine:
        orla = make_orla(at(engine), mapper={"*": "main"})
        bare = openai.OpenAI(base_url=engine.url, api_key="k", max_retries=0)
        asked = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}]}
        alone = bare.chat.completions.create(**asked)  # type: ignore[call-overload]
        got: list[Any] = []

        def ask(_: str) -> str:
            got.append(bare.chat.completions.create(**asked))  # type: ignore[call-overload]
            return ""

        run_in_graph(orla, ask)
        assert got == [alone] and got[0].choices is None and got[0].object == "list"


def run_in_graph(orla: Orla, ask: Any) -> None:
    from langgraph.graph import START, MessagesState, StateGraph

    def node(state: MessagesState) -> Any:
        return {"messages": [("ai", ask("x"))]}

    orla.wrap(StateGraph(MessagesState).add_node("n", node).add_edge(START, "n").compile()).invoke({"messages": []})


@pytest.mark.parametrize("form", ["invoke", "astream"])
@pytest.mark.parametrize("way", WAYS)
def test_another_server_gets_neither_key_nor_prompt(way: str, form: str, make_orla: Any) -> None:
    with FaultEngine() as other, FaultEngine() as engine:
        engine.rule = behind(307, f"{other.url}/chat/completions?secret=s")
        orla = make_orla(at(engine), mapper={"*": "main"})
        with pytest.raises(
            BackendUnavailable, match=rf"'main' at .* redirects to http://127.0.0.1:{other.port}:"
        ) as told:
            caller(orla, way)(form)
        assert other.requests == [] and len(engine.chats) == 1
        assert (
            BACKEND_KEY not in str(told.value) and PROMPT not in str(told.value) and "secret" not in str(told.value)
        )


def test_an_alternative_takes_what_is_redirected_away(make_orla: Any) -> None:
    with FaultEngine() as other, FaultEngine() as engine:
        engine.rule = behind(308, f"{other.url}/chat/completions")
        orla = make_orla(at(engine), Backend("other", other.url, model=MODEL), mapper={"*": ["main", "other"]})
        assert caller(orla, "wrapped")("invoke")
        assert orla.records()[-1].backend == "other" and other.chats[0].key == "none"


def test_a_circle_ends(make_orla: Any) -> None:
    with FaultEngine(otherwise=redirect(307, "/v1/chat/completions")) as engine:
        orla = make_orla(at(engine), mapper={"*": "main"})
        with pytest.raises(BackendUnavailable, match="no engine answered"):
            caller(orla, "drop-in", retries=0)("invoke")


def test_probes_are_redirected_too(make_orla: Any) -> None:
    def rule(seen: Seen) -> Reply | None:
        return redirect(307, seen.path.replace("/old", "")) if seen.path.startswith("/old") else None

    with FaultEngine(rule=rule, every_path=True) as engine, FaultEngine() as other:
        moved = engine.url.replace("/v1", "/old/v1")
        orla = make_orla(Backend("main", moved, model=MODEL), mapper={"*": "main"})
        assert orla.connect()["main"] is None
        assert orla.core.serving.schedulers["main"].health.probe.models == (MODEL,)
        engine.rule = lambda seen: redirect(302, f"{other.url}/models")
        elsewhere = make_orla(Backend("away", moved, model=MODEL, api_key=BACKEND_KEY))
        assert f"redirects to http://127.0.0.1:{other.port}" in str(elsewhere.connect()["away"])
        assert other.requests == []


@pytest.mark.parametrize(
    ("url", "target", "verdict"),
    [
        ("http://h/v1", "http://h:80/x", None),
        ("http://H/v1", "http://h/x", None),
        ("https://h/v1", "https://h:443/x", None),
        ("http://h/v1", "https://h/x", Upgrade),
        ("http://h:8000/v1", "https://h:8443/x", Upgrade),
        ("https://h/v1", "http://h/x", BackendUnavailable),
        ("http://h/v1", "http://h:81/x", BackendUnavailable),
        ("http://h/v1", "http://g/x", BackendUnavailable),
        ("http://h/v1", "https://h.evil.example/x", BackendUnavailable),
        ("http://h/v1", "http://h@evil.example/x", BackendUnavailable),
        ("http://h/v1", "ftp://h/x", BackendUnavailable),
    ],
)
def test_where_a_request_may_go(url: str, target: str, verdict: type[Exception] | None) -> None:
    home = Home(Backend("main", url))
    if verdict is None:
        home.heed(httpx2.URL(target))
        return
    with pytest.raises(verdict):
        home.heed(httpx2.URL(target))
    if verdict is Upgrade:
        home.heed(httpx2.URL(target))
        assert home.verified


@pytest.mark.parametrize("form", ["invoke", "ainvoke"])
def test_certificates_are_verified_where_a_backend_moves_to_tls(form: str, make_orla: Any) -> None:
    with FaultEngine() as gone:
        closed = gone.port
    with FaultEngine(rule=behind(307, f"https://127.0.0.1:{closed}/v1/chat/completions")) as engine:
        orla = make_orla(at(engine), mapper={"*": "main"})
        with pytest.raises(BackendUnavailable, match="no engine answered"):
            caller(orla, "drop-in", retries=0)(form)
        assert orla.core.clients["main"]._http_settings()["verify"].verify_mode == ssl.CERT_REQUIRED
