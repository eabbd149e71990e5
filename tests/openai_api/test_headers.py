"""What a caller's SDK client says to the server in the code, and what of it a backend hears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest
from langchain_openai import ChatOpenAI

from orla_lg import Backend, ChatOrla, ConfigError, Orla
from orla_lg.openai_api.home import headers_of, query_of
from tests.openai_api.raw_engine import MODEL, RawEngine, whole
from tests.openai_api.test_redirects import run_in_graph

CARRIED = {
    "traceparent": "00-1", "tracestate": "a=1", "X-Request-Id": "r", "X-Session-ID": "s", "x-b3-traceid": "b",
    "X-Datadog-Trace-Id": "1", "User-Agent": "mine", "Accept-Language": "de",
}  # fmt: skip
SECRET = {
    "Authorization": "Bearer secret", "X-UsageAccount": "secret", "X-Team": "secret", "X-Custom": "secret",
    "Cookie": "secret", "X-Auth": "secret", "Signature": "secret", "X-Amz-Security-Token": "secret",
    "api-key": "secret", "Baggage": "secret", "Referer": "secret", "X-Forwarded-For": "secret",
}  # fmt: skip
HEADERS = {**CARRIED, **SECRET, "Accept-Encoding": "gzip"}


def sdk(**settings: Any) -> Callable[[], Any]:
    client = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="secret", **settings)
    return lambda: client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])


def per_call() -> Callable[[], Any]:
    client = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="secret")
    return lambda: client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "x"}], extra_headers=HEADERS, extra_query=QUERY
    )


def optioned() -> Callable[[], Any]:
    client = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="secret")
    more = client.with_options(default_headers=HEADERS, default_query=QUERY)
    return lambda: more.chat.completions.create(model="m", messages=[])


QUERY = {"api-version": "1", "key": "secret", "code": "secret"}
CLIENTS: dict[str, Callable[[], Callable[[], Any]]] = {
    "constructed": lambda: sdk(default_headers=HEADERS, default_query=QUERY),
    "langchain": lambda: lambda: ChatOpenAI(
        base_url="http://127.0.0.1:9/v1", api_key="secret", model="m", default_headers=HEADERS, default_query=QUERY  # type: ignore[arg-type]
    ).invoke("x"),
    "with_options": optioned,
    "per call": per_call,
}  # fmt: skip


def orla_at(engine: RawEngine, make_orla: Any, **settings: Any) -> Orla:
    orla: Orla = make_orla(Backend("main", engine.url, model=MODEL, api_key="own", **settings), mapper={"*": "main"})
    return orla


@pytest.mark.parametrize("way", CLIENTS)
def test_tracing_and_the_like_are_carried_and_nothing_else(way: str, make_orla: Any) -> None:
    with RawEngine(lambda asked: whole()) as engine:
        ask = CLIENTS[way]()
        run_in_graph(orla_at(engine, make_orla), lambda _: str(ask()))
        (asked,) = engine.asked
        assert {name: asked.headers.get(name.lower()) for name in CARRIED} == CARRIED
        assert "secret" not in repr(asked) and asked.headers["authorization"] == "Bearer own"
        assert asked.headers["accept-encoding"] == "identity" and asked.query == "api-version=1"


def test_a_drop_in_model_carries_them_too(make_orla: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with RawEngine(lambda asked: whole()) as engine:
        settings: dict[str, Any] = {"model": "main", "default_headers": HEADERS, "default_query": QUERY}
        ChatOrla(orla=orla_at(engine, make_orla), **settings).invoke("x")
        monkeypatch.setenv("ORLA_DISABLED", "1")
        ChatOrla(orla=orla_at(engine, make_orla), **settings).invoke("x")
        for asked in engine.asked:
            assert {name: asked.headers.get(name.lower()) for name in CARRIED} == CARRIED
            assert "secret" not in repr(asked) and asked.query == "api-version=1"


def test_a_backend_may_name_more(make_orla: Any) -> None:
    with RawEngine(lambda asked: whole()) as engine:
        orla = orla_at(engine, make_orla, forward_headers=["X-Team"], forward_query=["code"])
        run_in_graph(orla, lambda _: str(sdk(default_headers={**HEADERS, "X-TEAM": "blue"}, default_query=QUERY)()))
        (asked,) = engine.asked
        assert asked.headers["x-team"] == "blue" and asked.query == "api-version=1&code=secret"


def test_of_an_own_http_client_the_time_out_and_the_headers_count(make_orla: Any) -> None:
    http = httpx2.Client(
        headers={"traceparent": "t", "X-UsageAccount": "secret"}, timeout=7.5, cookies={"c": "secret"}
    )
    with http, RawEngine(lambda asked: whole()) as engine:
        orla = orla_at(engine, make_orla)
        run_in_graph(orla, lambda _: str(sdk(http_client=http)()))
        ChatOrla(orla=orla, model="main", http_client=http).invoke("x")
        for asked in engine.asked:
            assert asked.headers["traceparent"] == "t" and "secret" not in repr(asked)
            assert "httpx" not in asked.headers["user-agent"]
        assert engine.asked[0].headers["x-stainless-read-timeout"] == "7.5"


def test_raw_answers_still_pass(make_orla: Any) -> None:
    client = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="secret")
    with RawEngine(lambda asked: whole()) as engine:
        raw = client.chat.completions.with_raw_response
        run_in_graph(
            orla_at(engine, make_orla),
            lambda _: raw.create(model="m", messages=[]).parse().choices[0].message.content,
        )


@pytest.mark.parametrize("name", ["authorization", "Host", "Accept-Encoding"])
def test_what_a_backend_has_of_its_own_cannot_be_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"forward_headers must not name {name.lower()}"):
        Backend("main", "http://h/v1", forward_headers=[name])


@pytest.mark.parametrize("field", ["forward_headers", "forward_query"])
def test_names_are_a_list(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be a list"):
        Backend("main", "http://h/v1", **{field: "X-Team"})  # type: ignore[arg-type]


def test_nothing_given_is_nothing_carried() -> None:
    assert headers_of(None, openai.NotGiven(), ()) == {} == query_of(None, None, ())
