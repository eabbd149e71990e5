"""A span for each call, by OpenTelemetry's conventions for generative AI, in the trace of what makes the call.

A span begins where the call arrives, in its caller's context, and ends with the call's record. What happened between
is known from that record and from the moments at which attempts were sent. No prompt and no answer is in it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, TracerProvider
from opentelemetry.util.types import AttributeValue

from orla_lg import __version__
from orla_lg.core.boundary.plain import shown
from orla_lg.core.call import Call
from orla_lg.core.record import Record
from orla_lg.core.serving import Serving
from orla_lg.errors import ConfigError
from orla_lg.observe.sums import kind_of

SCOPE = "orla_lg"
SENT, FIRST_TOKEN = "orla.sent", "orla.first_token"
"""Events: an attempt goes to its engine, and the first token comes."""

OPERATION, MODEL = "gen_ai.operation.name", "gen_ai.request.model"

AT_ONCE_S = 1e-3
"""A shorter wait is no event: each takes the call some microseconds."""

MOST_CHARS = 200
"""Of a name that others gave."""

Attributes = dict[str, AttributeValue]


class _Sent(NamedTuple):
    at_ns: int
    """Since the epoch."""
    attempt: int
    backend: str


@dataclass(eq=False, slots=True)
class _CallSpan:
    span: Span
    call: Call
    operation: str
    model: str
    sent: list[_Sent] = field(default_factory=list)


class CallSpans:
    """The spans of one core's calls (``core.accounting.tracing.CallTracer``).

    Args:
        serving: The core, or a replica's side of one.
        provider: ``None``: the global one.

    Raises:
        ConfigError: Its calls are traced already.
    """

    def __init__(self, serving: Serving, provider: TracerProvider | None = None) -> None:
        if serving.services.tracer is not None:
            raise ConfigError("this Orla's calls are traced already; close() of the first traces(...) ends that")
        self._serving = serving
        self._tracer: Tracer = trace.get_tracer(SCOPE, __version__, provider)
        self._open: dict[str, _CallSpan] = {}
        serving.services.tracer = self
        serving.records.followers.append(self._ended)

    @property
    def open(self) -> int:
        """How many spans have begun and not ended."""
        return len(self._open)

    def close(self) -> None:
        """Begin no more spans; those that are open end with their calls. Idempotent."""
        if self._serving.services.tracer is self:
            self._serving.services.tracer = None

    # What calls tell of themselves (``CallTracer``)

    def arrived(self, call: Call) -> None:
        """Begin a call's span, in its caller's context; what samples spans sees its operation, model and stage."""
        if call.id in self._open:
            return
        who, operation = call.identity, "embeddings" if call.ask.embeds else "chat"
        model = _name(call.ask.model)
        begun: Attributes = {OPERATION: operation, MODEL: model}
        if who.stage:
            begun["orla.stage"] = _name(who.stage)
        span = self._tracer.start_span(f"{operation} {model}", kind=SpanKind.CLIENT, attributes=begun)
        self._open[call.id] = _CallSpan(span, call, operation, model)

    def sending(self, call: Call, backend: str | None, attempt: int) -> Mapping[str, str]:
        """Note when an attempt is sent; returns its ``traceparent``, so that the engine's span is a child of this.

        An attempt is sent once more without what we added, where its engine refused that; the first time counts.
        """
        opened = self._open.get(call.id)
        if opened is None:
            return {}
        if not opened.sent or opened.sent[-1].attempt != attempt:
            opened.sent.append(_Sent(time.time_ns(), attempt, backend or ""))
        return headers_of(opened.span)

    def _ended(self, record: Record) -> None:
        opened = self._open.pop(record.id, None)
        if opened is None:
            return
        span = opened.span
        if span.is_recording():
            said = self._said_of(opened, record)
            if (model := said.get(MODEL)) is not None:
                span.update_name(f"{opened.operation} {model}")
            _add_events(opened, record)
            span.set_attributes(said)
            if record.error is not None:
                span.set_status(Status(StatusCode.ERROR))
        span.end()

    def _said_of(self, opened: _CallSpan, record: Record) -> Attributes:
        """Return what a record says, without what it does not know."""
        call = opened.call
        said: Attributes = {"orla.call": record.id, "orla.queue_wait_s": record.queue_wait_s}
        if call.identity.thread:
            said["gen_ai.conversation.id"] = _name(record.workflow)
        if (scheduler := self._serving.schedulers.get(record.backend or "")) is not None:
            said |= _where(scheduler.backend.url, scheduler.backend.engine)
        if record.model is not None and (model := _name(record.model)) != opened.model:
            said[MODEL] = model
        if call.ask.stream:
            said["gen_ai.request.stream"] = True
        if record.attempts > 1:
            said["orla.attempts"] = record.attempts
        if record.cache_action != "engine":  # which it manages by itself
            said["orla.cache.action"] = record.cache_action
        if record.priority:
            said["orla.priority"] = record.priority
        if record.external:
            said["orla.external"] = True
        if record.error is not None:
            said["error.type"] = kind_of(record.error)
        for name, value in (
            ("gen_ai.request.max_tokens", call.ask.max_tokens),
            ("gen_ai.usage.input_tokens", record.prompt_tokens),
            ("gen_ai.usage.output_tokens", record.completion_tokens),
            ("gen_ai.usage.cache_read.input_tokens", record.cached_tokens),
            ("gen_ai.response.time_to_first_chunk", record.ttft_s),
            ("orla.run", record.run and _name(record.run)),
            ("orla.tenant", record.tenant and _name(record.tenant)),
            ("orla.backend", record.backend),
            ("orla.mapper", record.mapper),
            ("orla.variant", record.variant),
            ("orla.cache.expected_tokens", record.expected_cached_tokens),
            ("orla.cost_usd", record.cost_usd),
        ):
            if value is not None:
                said[name] = value
        return said


def _add_events(opened: _CallSpan, record: Record) -> None:
    """Add when each attempt was sent, unless the only one was at once, and when its first token came."""
    sent = opened.sent
    if len(sent) > 1 or record.queue_wait_s > AT_ONCE_S:
        for each in sent:
            opened.span.add_event(SENT, {"orla.attempt": each.attempt, "orla.backend": each.backend}, each.at_ns)
    if sent and record.ttft_s is not None:
        opened.span.add_event(FIRST_TOKEN, timestamp=sent[-1].at_ns + int(record.ttft_s * 1e9))


@lru_cache(maxsize=1024)
def _name(name: str) -> str:
    """Return a name that others gave as any exporter takes it."""
    return shown(name, MOST_CHARS)


@lru_cache(maxsize=1024)
def _where(url: str, engine: str) -> Mapping[str, AttributeValue]:
    """Return which kind of engine answers, and where."""
    found: Attributes = {"gen_ai.provider.name": engine}
    parts = urlsplit(url)
    if parts.hostname:
        found["server.address"] = parts.hostname
        found["server.port"] = parts.port or (443 if parts.scheme == "https" else 80)
    return found


def headers_of(span: Span) -> Mapping[str, str]:
    """Return a span as W3C's headers: what gets them goes on with its trace."""
    context = span.get_span_context()
    if not context.is_valid:
        return {}
    traced = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    state = context.trace_state
    return {"traceparent": traced, "tracestate": state.to_header()} if state else {"traceparent": traced}
