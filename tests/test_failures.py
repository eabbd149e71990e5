"""Engines that fail in every way we know, before all forms of a call: what is tried again, and what callers get."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import RetryPolicy as NodeRetries

from orla_lg import Backend, BackendUnavailable, ChatOrla, Orla, OrlaClosed
from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.engine.retry import RetryPolicy
from orla_lg.testing.faults import MODEL, Fault, FaultEngine, Reply
from tests.conftest import CALLER_KEY
from tests.timed import within

BEFORE = [
    Fault.DEAD_BEFORE_HEADERS, Fault.RESET, Fault.DEAD_IN_PREFILL, Fault.RESTART, Fault.GARBAGE, Fault.HTML_PAGE,
    Fault.BINARY, Fault.TRUNCATED_JSON, Fault.BUSY, Fault.BUSY_UNTIL, Fault.OVERLOADED, Fault.BROKEN,
]  # fmt: skip
"""Met before the first token: another attempt is made."""
AFTER = [Fault.DEAD_MID_STREAM, Fault.NO_DONE, Fault.ERROR_EVENT, Fault.TRUNCATED_JSON]
"""Met after it: the caller gets the error."""
LIES = [Fault.NO_USAGE, Fault.CACHED_ABOVE_PROMPT, Fault.NEGATIVE_TOKENS, Fault.WRONG_TYPE]
FORMS = ["invoke", "stream", "ainvoke", "astream"]
WAYS = ["wrapped", "drop-in"]


def say(llm: Any, form: str) -> str:
    async def aform() -> str:
        if form == "ainvoke":
            return str((await llm.ainvoke("hello")).content)
        return "".join([str(piece.content) async for piece in llm.astream("hello")])

    if form == "invoke":
        return str(llm.invoke("hello").content)
    if form == "stream":
        return "".join(str(piece.content) for piece in llm.stream("hello"))
    return asyncio.run(aform())


def caller(orla: Orla, way: str, *, retries: int = 2, **more: Any) -> Callable[[str], str]:
    """Return a function that makes one call in a form, in a node of a wrapped graph or by a drop-in model."""
    if way == "drop-in":
        model = ChatOrla(orla=orla, model="main", max_retries=retries, **more)
        return lambda form: say(model, form)
    plain = ChatOpenAI(base_url="http://127.0.0.1:9/v1", api_key=CALLER_KEY, model=MODEL, max_retries=retries, **more)

    def ask(form: str) -> str:
        def node(state: MessagesState) -> Any:
            return {"messages": [("ai", say(plain, form))]}

        graph = orla.wrap(StateGraph(MessagesState).add_node("node", node).add_edge(START, "node").compile())
        return str(graph.invoke({"messages": [("user", "hello")]})["messages"][-1].content)

    return ask


@pytest.fixture
def hasty(make_orla: Any) -> Callable[..., Orla]:
    """Return a maker of Orlas whose pauses are short."""

    def make(*engines: FaultEngine, **settings: Any) -> Orla:
        backends = [Backend(name, each.url, model=MODEL) for name, each in zip(("main", "other"), engines)]  # noqa: B905
        orla: Orla = make_orla(*backends, **{"mapper": {"*": "main"}, **settings})
        orla.core.serving.services.retries = RetryPolicy(base_s=0.01)
        return orla

    return make


EARLY = [
    (fault, form) for fault in BEFORE for form in FORMS if (fault, form[-6:]) != (Fault.TRUNCATED_JSON, "stream")
]
"""A stream's event is cut after the first token."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("fault", "form"), EARLY)
def test_what_fails_before_the_first_token_is_tried_again(fault: Fault, way: str, form: str, hasty: Any) -> None:
    with FaultEngine(retry_after_s=0.05) as engine:
        orla = hasty(engine)
        orla.connect()
        healthy = caller(orla, way)(form)
        engine.script.extend([fault])
        assert caller(orla, way)(form) == healthy
        assert orla.records()[-1].attempts == 2 and orla.records()[-1].error is None


@pytest.mark.parametrize(("fault", "form"), [*EARLY, *((Fault.MODEL_GONE, form) for form in FORMS)])
def test_an_alternative_takes_it_at_once(fault: Fault, form: str, hasty: Any) -> None:
    with FaultEngine(otherwise=Reply(text="main")) as engine, FaultEngine(otherwise=Reply(text="other")) as other:
        orla = hasty(engine, other, mapper={"*": ["main", "other"]})
        orla.connect()

        def took_s() -> float:
            engine.script.clear()
            engine.script.extend([fault] * 9)
            started = time.monotonic()
            assert caller(orla, "wrapped", retries=0)(form) == "other"
            assert orla.records()[-1].backend == "other"
            return time.monotonic() - started

        within(1.0, took_s)


@pytest.mark.parametrize("form", ["stream", "astream"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", AFTER)
def test_what_fails_after_the_first_token_is_the_callers(fault: Fault, way: str, form: str, hasty: Any) -> None:
    with FaultEngine(script=[fault]) as engine:
        orla = hasty(engine)
        # An event that is no JSON is the SDK's to judge: it says so as it does without us.
        with pytest.raises(json.JSONDecodeError if fault is Fault.TRUNCATED_JSON else openai.OpenAIError):
            caller(orla, way)(form)
        (record,) = orla.records()
        assert record.attempts == 1 and record.error is not None and record.ttft_s is not None
        assert sum(seen.path.endswith("chat/completions") for seen in engine.requests) == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fault", LIES)
def test_counts_that_cannot_be_are_not_believed(fault: Fault, form: str, hasty: Any) -> None:
    with FaultEngine(script=[fault]) as engine:
        orla = hasty(engine)
        assert caller(orla, "drop-in")(form)
        (record,) = orla.records()
        assert record.error is None
        assert record.cached_tokens is None or 0 <= record.cached_tokens <= record.prompt_tokens
        assert (record.prompt_tokens or 0) >= 0 and (record.completion_tokens or 0) >= 0
        assert orla.statistics().backends["main"].memory.tokens >= 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_an_engine_that_hangs_is_given_up_after_the_callers_timeout(way: str, form: str, hasty: Any) -> None:
    with FaultEngine(script=[Fault.HANG]) as engine:
        orla = hasty(engine)
        assert caller(orla, way, timeout=0.4)(form) and orla.records()[-1].attempts in (2, 3)


@pytest.mark.parametrize("form", FORMS)
def test_garbage_to_the_end_is_named(form: str, hasty: Any) -> None:
    with FaultEngine(otherwise=Reply(fault=Fault.HTML_PAGE)) as engine:
        with pytest.raises(openai.APIError, match=r"expected server-sent events, got b'<!?[dh]"):
            caller(hasty(engine), "drop-in")(form)


@pytest.mark.parametrize("status", [501, 505])
@pytest.mark.parametrize("form", ["invoke", "astream"])
@pytest.mark.parametrize("way", WAYS)
def test_what_an_engine_will_never_do_opens_no_circuit(way: str, form: str, status: int, hasty: Any) -> None:
    """It is tried as often as without us: an engine that thinks better of it is not given up."""
    with FaultEngine(script=[Reply(status=status), Reply(), *[Reply(status=status)] * 6]) as engine:
        orla = hasty(engine)
        assert caller(orla, way, retries=1)(form) and orla.records()[-1].attempts == 2
        for _ in range(3):
            with pytest.raises(openai.InternalServerError) as caught:
                caller(orla, way, retries=1)(form)
            assert caught.value.status_code == status and orla.records()[-1].attempts == 2
        assert orla.statistics().backends["main"].circuit is Circuit.CLOSED
        assert caller(orla, way)(form), "others are served"


def test_an_alternative_may_do_what_an_engine_never_will(hasty: Any) -> None:
    with FaultEngine(otherwise=Reply(status=501)) as engine, FaultEngine(otherwise=Reply(text="other")) as other:
        orla = hasty(engine, other, mapper={"*": ["main", "other"]})
        assert caller(orla, "wrapped", retries=0)("invoke") == "other"


@pytest.mark.parametrize("way", WAYS)
def test_five_failures_open_the_circuit_and_one_call_tries_it_later(way: str, hasty: Any) -> None:
    with FaultEngine(script=[Fault.BROKEN] * 6) as engine:
        orla = hasty(engine)
        for _ in range(2):
            with pytest.raises((openai.APIError, BackendUnavailable)):
                caller(orla, way)("invoke")
        backend = orla.statistics().backends["main"]
        assert (backend.circuit, backend.trips, backend.reachable) == (Circuit.OPEN, 1, True)
        sent = len(engine.requests)
        with pytest.raises(BackendUnavailable, match=r"circuit of backend 'main' is open .* 5 failures in a row"):
            caller(orla, way, retries=0)("invoke")
        assert len([seen for seen in engine.requests[sent:] if seen.method == "POST"]) == 0, "nothing was sent"
        engine.script.clear()
        deadline = time.monotonic() + 30
        while orla.statistics().backends["main"].circuit is not Circuit.HALF_OPEN:
            assert time.monotonic() < deadline
        assert caller(orla, way)("stream")
        assert orla.statistics().backends["main"].circuit is Circuit.CLOSED


def test_idle_connections_are_let_go_before_the_engine_closes_them(hasty: Any) -> None:
    uvicorn_keeps_s = 5.0
    with FaultEngine() as engine:
        orla = hasty(engine)
        caller(orla, "drop-in")("invoke")
        (clients,) = orla.core.clients.values()
        pool = clients.sync()._client._transport._pool
        assert pool._keepalive_expiry < uvicorn_keeps_s


def test_an_engine_that_returns_is_noticed_without_a_call(hasty: Any) -> None:
    with FaultEngine() as engine:
        orla = hasty(engine)
        caller(orla, "drop-in")("invoke")
        port = engine.port
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="is it running"):
            caller(orla, "drop-in")("invoke")
    assert orla.statistics().backends["main"].circuit is not Circuit.CLOSED
    with FaultEngine(port=port):
        deadline = time.monotonic() + 30.0
        while orla.statistics().backends["main"].circuit is not Circuit.CLOSED:
            assert time.monotonic() < deadline, "it returned"
        assert caller(orla, "drop-in")("invoke")


def test_a_model_that_vanishes_is_told_and_its_backend_asked_anew(
    hasty: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultEngine() as engine:
        orla = hasty(engine)
        ask = caller(orla, "drop-in")
        ask("invoke")
        engine.models = ("another-model",)
        with pytest.raises(openai.NotFoundError):
            ask("invoke")
        assert f"it served {MODEL}" in caplog.text and orla.records()[-1].attempts == 1
        deadline = time.monotonic() + 30
        while "another-model" not in orla.core.serving.views()[0].models:
            assert time.monotonic() < deadline


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["invoke", "astream"])
@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.BUSY_UNTIL])
def test_an_engine_that_asks_for_a_day_is_given_up_at_once(fault: Fault, form: str, way: str, hasty: Any) -> None:
    with FaultEngine(script=[fault] * 9, retry_after_s=100_000) as engine:
        orla, started = hasty(engine), time.monotonic()
        with pytest.raises(openai.APIStatusError):
            caller(orla, way)(form)
        assert time.monotonic() - started < 5.0 and orla.records()[-1].attempts == 1


@pytest.mark.parametrize("form", ["invoke", "ainvoke"])
def test_closing_ends_the_pause_that_an_engine_asked_for(form: str, hasty: Any) -> None:
    with FaultEngine(script=[Fault.BUSY] * 9, retry_after_s=60) as engine:
        orla, started = hasty(engine), time.monotonic()
        closing = threading.Thread(target=lambda: (pausing(orla), orla.close()))
        closing.start()
        with pytest.raises(OrlaClosed):
            caller(orla, "drop-in")(form)
        closing.join()
        assert time.monotonic() - started < 10.0


def pausing(orla: Orla) -> None:
    """Wait until a call pauses before another attempt."""
    while not orla.core.serving.services.pauses._turns:
        time.sleep(0.002)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["invoke", "ainvoke"])
def test_the_callers_timeout_ends_the_wait_in_a_queue(form: str, way: str, hasty: Any) -> None:
    with FaultEngine() as engine:
        orla, started = hasty(engine), time.monotonic()
        orla.pause("main")
        with pytest.raises(openai.APITimeoutError) as raised:
            caller(orla, way, retries=1, timeout=0.1)(form)
        assert 0.2 <= time.monotonic() - started < 30.0, "as long as two attempts would take"
        causes = [raised.value, raised.value.__cause__]
        assert any("for backend 'main', which is paused" in str(getattr(each, "__notes__", "")) for each in causes)
        assert not engine.chats


@pytest.fixture
def uncollected() -> Any:
    """Keep the collector from ending what an exception holds in a cycle."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("when", ["the node again", "the next run"])
@pytest.mark.parametrize("form", ["stream", "astream"])
def test_a_stream_that_an_exception_holds_is_waited_for_by_nobody(
    form: str, when: str, make_orla: Any, uncollected: None
) -> None:
    attempts: list[int] = []

    def fail(stream: Any) -> None:
        error = RuntimeError("no")
        error.stream = stream  # type: ignore[attr-defined]
        raise error

    def node(state: MessagesState) -> Any:
        attempts.append(1)
        stream = llm.stream("x")
        next(stream)
        if len(attempts) == 1:
            fail(stream)
        return {"messages": list(stream)[:1]}

    async def anode(state: MessagesState) -> Any:
        attempts.append(1)
        stream = llm.astream("x")
        await anext(stream)
        if len(attempts) == 1:
            fail(stream)
        return {"messages": [piece async for piece in stream][:1]}

    with FaultEngine() as engine:
        llm = ChatOpenAI(base_url="http://127.0.0.1:9/v1", api_key=CALLER_KEY, model=MODEL)
        orla = make_orla(Backend("main", engine.url, model=MODEL, max_concurrency=1), mapper={"*": "main"})
        retries = (
            NodeRetries(max_attempts=2, initial_interval=0.01, retry_on=RuntimeError)
            if when == "the node again"
            else None
        )
        built = StateGraph(MessagesState).add_node("node", node if form == "stream" else anode, retry_policy=retries)
        graph = orla.wrap(built.add_edge(START, "node").compile())

        def run() -> Any:
            if form == "stream":
                return graph.invoke({"messages": []})
            return asyncio.run(asyncio.wait_for(graph.ainvoke({"messages": []}), 10))

        if when == "the next run":
            with pytest.raises(RuntimeError, match="no"):
                run()
        assert run()["messages"] and len(attempts) == 2
        assert [record.error for record in orla.records()] == ["abandoned", None]
