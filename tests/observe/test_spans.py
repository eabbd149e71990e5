"""A span for each call, as a child of what makes it and the parent of what its engine does."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from langchain_openai import OpenAIEmbeddings
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, StatusCode, TraceFlags, use_span
from opentelemetry.trace.span import TraceState

from orla_lg import BudgetExceeded, ChatOrla, ConfigError, Limit, Limits, Orla
from orla_lg.observe import traces
from orla_lg.observe.spans import AT_ONCE_S
from orla_lg.testing.faults import Fault
from tests.conftest import CALLER_KEY, at, chat
from tests.stub_engine import Reply, Seen, StubEngine
from tests.test_embeddings import vectors

MakeOrla = Callable[..., Orla]
SECRET = "the prompt is a secret"
HI: Any = {"messages": [("user", SECRET)]}
THREAD: Any = {"configurable": {"thread_id": "t7"}}


class Traced:
    """A provider whose spans are kept."""

    def __init__(self, **settings: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(**settings)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("application")

    def spans(self, name: str = "chat") -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name.startswith(name)]


@pytest.fixture
def traced() -> Traced:
    return Traced()


def header_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{span.context.trace_flags:02x}"


def seen(engine: StubEngine, path: str = "chat/completions") -> list[str | None]:
    return [each.headers.get("traceparent") for each in engine.requests if each.path.endswith(path)]


def graph_of(traced: Traced, body: Callable[[Any], Any]) -> Any:
    def node(state: MessagesState) -> Any:
        with traced.tracer.start_as_current_span("node"):
            return {"messages": [body(state["messages"])]}

    return StateGraph(MessagesState).add_node("draft", node).add_edge(START, "draft")


def streamed(model: Any) -> Callable[[Any], Any]:
    return lambda messages: "".join(str(chunk.content) for chunk in model.stream(messages))


WAYS: dict[str, Callable[[Any], Callable[[Any], Any]]] = {
    "invoke": lambda model: model.invoke,
    "stream": streamed,
    "ainvoke": lambda model: lambda messages: asyncio.run(model.ainvoke(messages)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["ChatOpenAI", "ChatOrla"])
def test_one_trace_from_the_node_to_the_engine(
    make_orla: MakeOrla, engine: StubEngine, traced: Traced, kind: str, way: str
) -> None:
    orla = make_orla(at(engine, "light"), mapper={"*": "light"})
    calls = traces(orla, traced.provider)
    theirs = {"traceparent": f"00-{1:032x}-{1:016x}-01", "tracestate": "theirs=1"}
    model: Any = ChatOrla(orla=orla) if kind == "ChatOrla" else chat(engine, default_headers=theirs)
    graph = orla.wrap(graph_of(traced, WAYS[way](model)).compile(checkpointer=InMemorySaver()))
    graph.invoke(HI, THREAD)
    (node,), (call,), (record,) = traced.spans("node"), traced.spans(), orla.records()
    assert node.context is not None and call.parent is not None
    assert call.parent.span_id == node.context.span_id and call.kind is SpanKind.CLIENT
    assert seen(engine) == [header_of(call)]
    assert [each.headers.get("tracestate") for each in engine.requests if "chat" in each.path] == [None]
    found = dict(call.attributes or {})
    expected = {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.request.model": "stub-model",
        "gen_ai.conversation.id": "t7", "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens, "server.address": "127.0.0.1",
        "orla.stage": "draft", "orla.backend": "light", "orla.run": record.run, "orla.call": record.id,
        "orla.queue_wait_s": record.queue_wait_s, "orla.cost_usd": record.cost_usd,
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    assert call.name == "chat stub-model" and call.status.status_code is StatusCode.UNSET
    events = [event.name for event in call.events]
    waited = record.queue_wait_s > AT_ONCE_S
    assert events == ["orla.sent"] * waited + ["orla.first_token"] * (record.ttft_s is not None)
    assert calls.open == 0 and node.start_time and call.start_time and node.start_time <= call.start_time
    assert SECRET not in call.to_json()


def test_names_are_those_of_the_conventions(make_orla: MakeOrla, engine: StubEngine, traced: Traced) -> None:
    orla = make_orla(at(engine, "light"))
    traces(orla, traced.provider)
    list(ChatOrla(orla=orla, model="light", max_tokens=5).stream("hello"))
    (call,) = traced.spans()
    known = {value for name, value in vars(gen_ai_attributes).items() if name.isupper() and isinstance(value, str)}
    mine = {name for name in call.attributes or {} if name.startswith("gen_ai.")}
    assert mine <= known and {"gen_ai.response.time_to_first_chunk", "gen_ai.request.max_tokens"} <= mine


def test_each_attempt_is_an_event(
    make_orla: MakeOrla, engine: StubEngine, other_engine: StubEngine, traced: Traced
) -> None:
    engine.script.extend([Reply(fault=Fault.DEAD_BEFORE_HEADERS)] * 3)
    orla = make_orla(at(engine, "light"), at(other_engine, "heavy"), mapper={"*": ["light", "heavy"]})
    traces(orla, traced.provider)
    graph = orla.wrap(graph_of(traced, chat(engine, max_retries=1).invoke).compile())
    graph.invoke(HI)
    (call,) = traced.spans()
    sent = [dict(event.attributes or {}) for event in call.events if event.name == "orla.sent"]
    attempts = orla.records()[-1].attempts
    assert [each["orla.attempt"] for each in sent] == list(range(1, attempts + 1)) and attempts > 1
    assert {header_of(call)} == {*seen(engine), *seen(other_engine)}


def test_a_wait_ends_with_an_event(make_orla: MakeOrla, engine: StubEngine, traced: Traced) -> None:
    orla = make_orla(at(engine, "light"))
    calls = traces(orla, traced.provider)
    orla.pause("light")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: list(ChatOrla(orla=orla, model="light").stream("hello")))
        until_s = time.monotonic() + 10.0
        while not orla.statistics().backends["light"].queue.waiting:
            assert time.monotonic() < until_s
            time.sleep(0.005)
        assert calls.open == 1
        time.sleep(10 * AT_ONCE_S)
        orla.resume("light")
        waiting.result()
    (call,) = traced.spans()
    sent, first = call.events
    assert (sent.name, first.name) == ("orla.sent", "orla.first_token") and call.start_time and call.end_time
    assert call.start_time < sent.timestamp < first.timestamp <= call.end_time
    waited_s, record = (sent.timestamp - call.start_time) / 1e9, orla.records()[-1]
    assert abs(waited_s - record.queue_wait_s) < 0.5


def test_an_attempt_that_is_sent_once_more_is_one(make_orla: MakeOrla, engine: StubEngine, traced: Traced) -> None:
    def rule(request: Seen) -> Reply | None:  # an engine that takes no stream_options
        refuses = "stream_options" in request.body
        return Reply(status=400, text="stream_options: extra inputs are not permitted") if refuses else None

    engine.rule = rule
    orla = make_orla(at(engine, "light"))
    traces(orla, traced.provider)
    ChatOrla(orla=orla, model="light").invoke("hello")
    (call,) = traced.spans()
    assert seen(engine) == [header_of(call)] * len(seen(engine)) and len(seen(engine)) > 1
    assert [event.name for event in call.events].count("orla.sent") <= 1


def test_a_refused_call_has_a_span_and_no_engine(make_orla: MakeOrla, engine: StubEngine, traced: Traced) -> None:
    orla = make_orla(at(engine, "light"), mapper={"*": "light"}, limits=Limits(run=Limit(calls=0)))
    calls = traces(orla, traced.provider)
    with pytest.raises(BudgetExceeded):
        orla.wrap(graph_of(traced, chat(engine).invoke).compile()).invoke(HI)
    (call,) = traced.spans()
    assert call.status.status_code is StatusCode.ERROR and not call.status.description
    assert (call.attributes or {})["error.type"] == "BudgetExceeded" and not call.events and calls.open == 0


def test_what_an_engine_says_of_a_prompt_is_not_in_a_span(
    make_orla: MakeOrla, engine: StubEngine, traced: Traced
) -> None:
    engine.rule = lambda request: Reply(status=400, text=SECRET)
    orla = make_orla(at(engine, "light"))
    traces(orla, traced.provider)
    with pytest.raises(openai.BadRequestError):
        ChatOrla(orla=orla, model="light").invoke(SECRET)
    (call,) = traced.spans()
    assert (call.attributes or {})["error.type"] == "BadRequestError" and SECRET not in call.to_json()


def test_a_stream_that_is_dropped_ends_its_span(make_orla: MakeOrla, engine: StubEngine, traced: Traced) -> None:
    orla = make_orla(at(engine, "light"))
    calls = traces(orla, traced.provider)
    stream = ChatOrla(orla=orla, model="light").stream("hello")
    next(stream)
    assert calls.open == 1
    stream.close()  # type: ignore[attr-defined]
    (call,) = traced.spans()
    assert calls.open == 0 and (call.attributes or {})["error.type"] in ("abandoned", "GeneratorExit")


def test_a_trace_that_is_not_sampled_goes_on_as_such(make_orla: MakeOrla, engine: StubEngine) -> None:
    traced = Traced(sampler=ALWAYS_OFF)
    orla = make_orla(at(engine, "light"))
    traces(orla, traced.provider)
    ChatOrla(orla=orla, model="light").invoke("hello")
    (header,) = seen(engine)
    assert header is not None and int(header[-2:], 16) & TraceFlags.SAMPLED == 0
    assert not traced.exporter.get_finished_spans()


def test_the_state_of_the_callers_trace_goes_along(make_orla: MakeOrla, engine: StubEngine, traced: Traced) -> None:
    orla = make_orla(at(engine, "light"))
    traces(orla, traced.provider)
    theirs = SpanContext(7, 8, is_remote=True, trace_flags=TraceFlags(1), trace_state=TraceState([("vendor", "x")]))
    with use_span(NonRecordingSpan(theirs)):
        ChatOrla(orla=orla, model="light").invoke("hello")
    (call,) = traced.spans()
    assert call.context is not None and call.context.trace_id == 7
    assert engine.requests[-1].headers["tracestate"] == "vendor=x"


def test_embeddings_are_their_own_operation(make_orla: MakeOrla, traced: Traced) -> None:
    with StubEngine(models=("e",), speaks={"/v1/embeddings": vectors}) as engine:
        orla = make_orla(at(engine, "light", model="e"), mapper={"draft:embeddings": "light"})
        traces(orla, traced.provider)
        embeddings = OpenAIEmbeddings(
            model="text-embedding-3-small", base_url=engine.url, api_key=CALLER_KEY, check_embedding_ctx_length=False
        )  # type: ignore[call-arg, arg-type]
        orla.wrap(graph_of(traced, lambda _: str(embeddings.embed_query(SECRET))).compile()).invoke(HI)
        (call,) = traced.spans("embeddings")
        assert call.name == "embeddings e" and seen(engine, "embeddings") == [header_of(call)]


def test_it_is_traced_once_and_no_more_after_the_end(make_orla: MakeOrla, engine: StubEngine, traced: Traced) -> None:
    orla = make_orla(at(engine, "light"))
    assert orla.core.serving.services.tracer is None
    calls = traces(orla, traced.provider)
    with pytest.raises(ConfigError, match="traced already"):
        traces(orla, traced.provider)
    calls.close()
    calls.close()
    ChatOrla(orla=orla, model="light").invoke("hello")
    assert seen(engine) == [None] and not traced.spans()
    traces(orla, traced.provider)
    ChatOrla(orla=orla, model="light").invoke("hello")
    assert len(traced.spans()) == 1


def test_without_the_package_it_says_what_to_install(
    make_orla: MakeOrla, engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    orla = make_orla(at(engine, "light"))
    monkeypatch.delitem(sys.modules, "orla_lg.observe.spans", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match="orla-lg\\[otel\\]"):
        traces(orla)
