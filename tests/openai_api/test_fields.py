"""Servers that refuse a field that we add: it is found out once, and no call fails for it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable
from typing import Any

import openai
import pytest

from orla_lg import Backend, ChatOrla, Orla
from orla_lg.core.engine.backend import Directions
from orla_lg.openai_api.adapter import OpenAIAdapter
from orla_lg.openai_api.dialect import Dialect
from tests.openai_api.raw_engine import MODEL, USAGE, Answer, Asked, RawEngine, Rule, events, whole
from tests.test_failures import FORMS, WAYS, caller


def refusing(*fields: str, status: int = 400, words: str = "Unrecognized request argument supplied: {}") -> Rule:
    def rule(asked: Asked) -> Answer:
        if found := [name for name in fields if asked.body.get(name)]:
            return Answer(json.dumps({"error": {"message": words.format(", ".join(found))}}).encode(), status=status)
        if not asked.body.get("stream"):
            return whole()
        wanted = (asked.body.get("stream_options") or {}).get("include_usage")
        return events([{"role": "assistant", "content": "hi"}], usage=USAGE if wanted else None)

    return rule


def orla_at(engine: RawEngine, make_orla: Any, **settings: Any) -> Orla:
    orla: Orla = make_orla(Backend("main", engine.url, model=MODEL, **settings), mapper={"*": "main"})
    return orla


REFUSALS = [
    (400, "Unrecognized request argument supplied: {}"),
    (422, "[{{'type': 'extra_forbidden', 'loc': ['body', '{}']}}]"),
    (400, "Bad request"),
]


@pytest.mark.parametrize(("status", "words"), REFUSALS)
@pytest.mark.parametrize("form", ["invoke", "astream"])
@pytest.mark.parametrize("way", WAYS)
def test_stream_options_refused(
    way: str, form: str, status: int, words: str, make_orla: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with RawEngine(refusing("stream_options", status=status, words=words)) as engine:
        orla = orla_at(engine, make_orla)
        asks = [caller(orla, way, retries=0, stream_usage=False)(form) for _ in range(3)]
        assert asks == ["hi"] * 3
        assert [record.attempts for record in orla.records()] == [1, 1, 1]
        added = way == "drop-in" or form.endswith("stream")
        assert len(engine.asked) == (4 if added else 3), "refused once"
        assert sum("refuses" in record.message for record in caplog.records) == (1 if added else 0)
        if form.endswith("invoke"):
            assert orla.records()[-1].completion_tokens == 2, "not assembled without token counts"


def test_streaming_refused(make_orla: Any) -> None:
    with RawEngine(refusing("stream", words="streaming is off: stream must be false")) as engine:
        model = ChatOrla(orla=orla_at(engine, make_orla), model="main", max_retries=0)
        assert [model.invoke("x").content for _ in range(2)] == ["hi", "hi"] and len(engine.asked) == 3
        with pytest.raises(openai.BadRequestError, match="streaming is off"):
            list(model.stream("x"))


def test_what_the_caller_asked_for_is_not_taken_back(make_orla: Any) -> None:
    with RawEngine(refusing("stream_options")) as engine:
        orla = orla_at(engine, make_orla)
        with pytest.raises(openai.BadRequestError, match="stream_options"):
            list(ChatOrla(orla=orla, model="main", max_retries=0, stream_usage=True).stream("x"))
        assert orla.core.clients["main"].dialect.refused == frozenset() and len(engine.asked) == 1


@pytest.mark.parametrize("form", FORMS)
def test_the_callers_own_mistake_teaches_nothing(form: str, make_orla: Any) -> None:
    with RawEngine(lambda asked: Answer(b'{"error": {"message": "temperature: too hot"}}', status=400)) as engine:
        orla = orla_at(engine, make_orla)
        for _ in range(2):
            with pytest.raises(openai.BadRequestError, match="too hot"):
                caller(orla, "drop-in", retries=0, temperature=9)(form)
        assert orla.core.clients["main"].dialect.refused == frozenset()
        assert orla.records()[-1].attempts == 1


class Talkative(OpenAIAdapter):
    """Adds fields of every kind."""

    def request_fields(self, ask: Any, told: Directions) -> dict[str, Any]:
        return {"priority": 3, "session_id": "s", "vllm_xargs": {"a": 1}, "cache_prompt": False, "cache_salt": "t"}


def talkative(engine: RawEngine, make_orla: Any) -> Orla:
    orla = orla_at(engine, make_orla)
    scheduler = orla.core.serving.schedulers["main"]
    scheduler.adapter = Talkative(scheduler.backend)
    return orla


@pytest.mark.parametrize("field", ["priority", "session_id", "vllm_xargs"])
def test_a_field_of_an_adapter_refused(field: str, make_orla: Any) -> None:
    with RawEngine(refusing(field, status=422)) as engine:
        orla = talkative(engine, make_orla)
        ask = caller(orla, "wrapped", retries=0)
        assert [ask("invoke"), ask("invoke")] == ["hi", "hi"]
        last = engine.asked[-1].body
        others = {"priority", "session_id", "vllm_xargs"} - {field}
        assert len(engine.asked) == 3 and field not in last and others <= last.keys(), "the others are sent on"


def test_what_keeps_workflows_apart_is_never_left_out(make_orla: Any) -> None:
    with RawEngine(refusing("cache_salt")) as engine:
        orla = talkative(engine, make_orla)
        with pytest.raises(openai.BadRequestError, match="cache_salt"):
            caller(orla, "wrapped", retries=0)("invoke")
        assert all(asked.body["cache_salt"] == "t" and asked.body["cache_prompt"] is False for asked in engine.asked)


def test_streams_that_bring_no_counts_are_not_assembled_twice(make_orla: Any) -> None:
    def rule(asked: Asked) -> Answer:
        return events([{"content": "hi"}]) if asked.body.get("stream") else whole()

    with RawEngine(rule) as engine:
        orla = orla_at(engine, make_orla)
        answers = [ChatOrla(orla=orla, model="main").invoke("x") for _ in range(3)]
        assert [answer.usage_metadata is not None for answer in answers] == [False, True, True]


def test_an_engine_that_counts_nothing_is_assembled() -> None:
    dialect = Dialect(Backend("main", "http://h/v1"))
    said: Iterable[tuple[bool, bool]] = [(True, False), (False, False), (True, False)]
    assert [(dialect.answered(assembled=a, counted=c), dialect.assembles)[1] for a, c in said] == [False, True, True]


def test_fields_of_the_callers_that_are_not_known_are_not_assembled(make_orla: Any) -> None:
    with RawEngine(refusing()) as engine:
        orla = orla_at(engine, make_orla)
        ChatOrla(orla=orla, model="main", extra_body={"return_token_ids": True}).invoke("x")
        ChatOrla(orla=orla, model="main", extra_body={"min_p": 0.1}).invoke("x")
        assert [bool(asked.body.get("stream")) for asked in engine.asked] == [False, True]


@pytest.mark.parametrize("refused", [("stream_options",), ()])
def test_raw_streams_learn_it_too(refused: tuple[str, ...]) -> None:
    with RawEngine(refusing(*refused)) as engine:
        adapter = OpenAIAdapter(Backend("main", engine.url, model=MODEL))

        async def text() -> str:
            body = {"model": MODEL, "messages": []}
            return "".join([chunk.text async for chunk in adapter.generate(body)])

        assert [asyncio.run(text()), asyncio.run(text())] == ["hi", "hi"]
        assert len(engine.asked) == (3 if refused else 2)


def test_it_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    dialect = Dialect(Backend("main", "http://h/v1"))
    with caplog.at_level(logging.WARNING):
        dialect.learn(["stream_options", "stream"], "no stream_options here")
        dialect.learn(["stream_options"], "no stream_options here")
    assert dialect.refused == {"stream_options"} and len(caplog.records) == 1
    assert "streams bring no token counts" in caplog.text


@pytest.mark.parametrize("header", [{"x-should-retry": "true", "retry-after-ms": "5"}, {"x-should-retry": "false"}])
@pytest.mark.parametrize("status", [404, 498, 500])
def test_a_server_that_says_whether_to_retry_is_heeded(header: dict[str, str], status: int, make_orla: Any) -> None:
    def rule(asked: Asked) -> Answer:
        return Answer(b"{}", status=status, headers=header)

    with RawEngine(rule) as engine:
        orla = orla_at(engine, make_orla)
        with pytest.raises(openai.APIStatusError):
            caller(orla, "wrapped", retries=1)("invoke")
        assert len(engine.asked) == (2 if header["x-should-retry"] == "true" else 1)
