"""What a watch hears of a call that is tried several times, that is streamed by its node, and that is cancelled."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI

from orla_lg import Backend, Orla
from orla_lg.core.engine.retry import RetryPolicy
from orla_lg.graph import interception
from orla_lg.wires.watching import HeardToolCall
from tests.clients.nodes import ainside, inside
from tests.conftest import at
from tests.openai_api.raw_engine import EVENTS, MODEL, USAGE, Answer, Asked, RawEngine, events
from tests.openai_api.test_pair_check import CALLS, PLAIN, SAME, TOOL
from tests.stub_engine import Reply, StubEngine
from tests.wires.test_watching import A, Watch

BUSY = Answer(b'{"error": {"message": "busy"}}', status=503)
CUT = Answer(SAME.body[: SAME.body.index(b"Par") + 40], EVENTS)
"""Breaks off within the first call."""
FAILED = Answer(b'data: {"error": {"message": "out of memory", "code": 500}}\n\n', EVENTS)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Over each call, one after the other."""
    made = Watch()
    monkeypatch.setattr(interception, "watch_for", lambda *_: made)
    return made


def model(url: str, retries: int = 0) -> Any:
    return ChatOpenAI(base_url=url, model=MODEL, api_key="k", max_retries=retries).bind_tools([TOOL])


def orla_at(make_orla: Callable[..., Orla], url: str, **more: Any) -> Orla:
    orla = make_orla(Backend("main", url, model=MODEL, **more), mapper={"*": "main"})
    orla.core.serving.services.retries = RetryPolicy(base_s=0.001)
    return orla


def streamed(model: Any) -> list[Any]:
    return [call["args"] for call in sum_of(list(model.stream("hello"))).tool_calls]


def sum_of(pieces: Sequence[Any]) -> Any:
    total = pieces[0]
    for each in pieces[1:]:
        total += each
    return total


ASK: dict[str, Callable[[Any], Any]] = {
    "streamed": streamed,
    "assembled": lambda model: [call["args"] for call in model.invoke("hello").tool_calls],
}


async def astreamed(model: Any) -> Any:
    return [call["args"] for call in sum_of([each async for each in model.astream("hello")]).tool_calls]


async def ainvoked(model: Any) -> Any:
    return [call["args"] for call in (await model.ainvoke("hello")).tool_calls]


AASK: dict[str, Callable[[Any], Any]] = {"streamed": astreamed, "assembled": ainvoked}


def in_turn(*answers: Answer) -> Callable[[Asked], Answer]:
    left = list(answers)
    return lambda asked: left.pop(0) if len(left) > 1 else left[0]


def attempts(watch: Watch) -> list[tuple[int, bool]]:
    """Return of each attempt how many calls were heard, and whether it ended with a message."""
    found: list[tuple[int, bool]] = []
    calls = 0
    for each in watch.heard:
        if each == "begins":
            calls = 0
        elif isinstance(each, HeardToolCall):
            calls += 1
        else:
            found.append((calls, each[1] is not None))
    assert watch.heard.count("begins") == len(found)
    return found


@pytest.mark.parametrize("way", ASK)
@pytest.mark.parametrize("in_a_task", [False, True])
@pytest.mark.parametrize("first", [(BUSY,), (FAILED,), (BUSY, FAILED)], ids=["refused", "failed at once", "both"])
def test_attempts_without_an_answer_are_not_heard(
    way: str, in_a_task: bool, first: Sequence[Answer], watch: Watch, make_orla: Any
) -> None:
    with RawEngine(in_turn(*first, SAME)) as engine:
        orla, asking = orla_at(make_orla, engine.url, assemble=True), model(engine.url, len(first))
        if in_a_task:
            found = ainside(orla, lambda: AASK[way](asking), tools_safe={"f"})
        else:
            found = inside(orla, lambda: ASK[way](asking), tools_safe={"f"})
    assert [each["city"] for each in found] == ["Paris", "Oslo"]
    assert attempts(watch) == [(2, True)]


def test_an_attempt_that_breaks_while_it_is_put_together_is_made_elsewhere(watch: Watch, make_orla: Any) -> None:
    with RawEngine(in_turn(CUT, SAME)) as engine:
        orla = orla_at(make_orla, engine.url, assemble=True)
        found = inside(orla, lambda: ASK["assembled"](model(engine.url, 1)), tools_safe={"f"})
    assert [each["city"] for each in found] == ["Paris", "Oslo"]
    assert [done for _, done in attempts(watch)] == [False, True]


def test_a_stream_that_breaks_off_before_its_caller_ends_without_a_message(watch: Watch, make_orla: Any) -> None:
    with RawEngine(in_turn(CUT)) as engine:
        orla = orla_at(make_orla, engine.url)
        with pytest.raises(Exception):  # noqa: B017 - whatever bare says of it
            inside(orla, lambda: streamed(model(engine.url)), tools_safe={"f"})
    assert [done for _, done in attempts(watch)] == [False]


def test_an_engine_that_answers_in_one_piece_though_asked_to_stream(watch: Watch, make_orla: Any) -> None:
    with RawEngine(in_turn(PLAIN)) as engine:
        orla = orla_at(make_orla, engine.url, assemble=True)
        found = inside(orla, lambda: ASK["assembled"](model(engine.url)), tools_safe={"f"})
        assert engine.asked[0].body["stream"] is True
    assert [each["city"] for each in found] == ["Paris", "Oslo"]
    assert attempts(watch) == [(0, True)] and watch.end["tool_calls"] == CALLS


def test_what_assembly_is_barred_from_is_heard_at_its_end(watch: Watch, make_orla: Any) -> None:
    with RawEngine(in_turn(PLAIN)) as engine:
        orla = orla_at(make_orla, engine.url, assemble=True)
        inside(orla, lambda: model(engine.url).invoke("hello", logprobs=True), tools_safe={"f"})
        assert "stream" not in engine.asked[0].body or not engine.asked[0].body["stream"]
    assert attempts(watch) == [(0, True)]


def test_a_raw_response_of_a_watched_call_is_as_before_but_for_what_is_documented(
    watch: Watch, make_orla: Any
) -> None:
    def rule(asked: Asked) -> Answer:
        return SAME if asked.body.get("stream") else PLAIN

    with RawEngine(rule) as engine, openai.OpenAI(base_url=engine.url, api_key="k", max_retries=0) as client:

        def ask() -> Any:
            asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "tools": [TOOL]}
            return client.chat.completions.with_raw_response.create(**asked)

        plain = inside(orla_at(make_orla, engine.url, assemble=False), ask, tools_safe={"f"})
        assembled = inside(orla_at(make_orla, engine.url, assemble=True), ask, tools_safe={"f"})
        assert [asked.body.get("stream", False) for asked in engine.asked] == [False, True]
    one, other = (json.loads(each.content) for each in (plain, assembled))
    assert one["choices"][0] | {"finish_reason": ""} == other["choices"][0] | {"finish_reason": ""}
    assert one["usage"] == other["usage"] == USAGE
    assert assembled.headers["content-type"] == "application/json"
    assert plain.parse().choices[0].message == assembled.parse().choices[0].message


def test_a_cancelled_call_ends_without_a_message(watch: Watch, make_orla: Any) -> None:
    reply = Reply(text="a b c d e f", token_s=0.05)
    with StubEngine(rule=lambda seen: reply) as engine:
        orla = make_orla(at(engine, assemble=True), mapper={"*": "main"})
        asking = ChatOpenAI(base_url=engine.url, model=MODEL, api_key="k", max_retries=0)

        async def ask() -> None:
            task = asyncio.ensure_future(asking.ainvoke("hello"))  # noqa: TID251 - to be cancelled
            async with asyncio.timeout(10):
                while not watch.heard:
                    await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        ainside(orla, ask, tools_safe={"f"})
    assert attempts(watch) == [(0, False)]


def test_a_stream_that_is_left_ends_without_a_message(watch: Watch, make_orla: Any) -> None:
    with StubEngine(rule=lambda seen: Reply(text="a b c d e f", token_s=0.02)) as engine:
        orla = make_orla(at(engine), mapper={"*": "main"})
        asking = ChatOpenAI(base_url=engine.url, model=MODEL, api_key="k", max_retries=0)

        def ask() -> None:
            stream = asking.stream("hello")
            next(stream)
            stream.close()

        inside(orla, ask, tools_safe={"f"})
    assert attempts(watch) == [(0, False)]


def test_equal_calls_in_the_text_are_no_calls(watch: Watch, make_orla: Any) -> None:
    text = events([{"role": "assistant"}, {"content": '{"tool_calls": ['}, {"content": A}], usage=USAGE)
    with RawEngine(in_turn(text)) as engine:
        orla = orla_at(make_orla, engine.url, assemble=True)
        said = inside(orla, lambda: model(engine.url).invoke("hello").content, tools_safe={"f"})
    assert said == '{"tool_calls": [' + A and attempts(watch) == [(0, True)]
    assert watch.end == {"role": "assistant", "content": said}
