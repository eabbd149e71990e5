"""Traces of a server's calls: switched on by OpenTelemetry's own variables, joined by a request's ``traceparent``."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from orla_lg.orla import Orla
from orla_lg.serve.http.health import Receive, Scope, Send

log = logging.getLogger("orla_lg")

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
EXPORTER, DISABLED = "OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED"
DEFAULT_ENDPOINT = "http://localhost:4318"
"""Of OpenTelemetry's."""

INSTALL = "pip install 'orla-lg[serve,otel]'"
SERVICE = "orla-lg"
CLOSE_PATIENCE_S = 2.0

_TRACE = (b"traceparent", b"tracestate")


def endpoint() -> str | None:
    """Return where the environment says that traces go; ``None``: nowhere."""
    exporter = os.environ.get(EXPORTER, "")
    if os.environ.get(DISABLED, "").lower() == "true" or exporter == "none":
        return None
    of_traces, of_all = map(os.environ.get, ENDPOINTS)
    if of_traces:
        return of_traces
    if not of_all and exporter != "otlp":
        return None
    return f"{(of_all or DEFAULT_ENDPOINT).removesuffix('/')}/v1/traces"


def destination() -> str | None:
    """Return where traces are sent, without a password or a query; ``None``: nowhere, or a package is missing."""
    url = endpoint()
    if url is None or _missing() is not None:
        return None
    scheme, colon, rest = url.partition("?")[0].rpartition("://")
    return scheme + colon + rest.rpartition("@")[2]


class SpanSending(NamedTuple):
    """What makes spans and sends them."""

    provider: Any
    """Of OpenTelemetry's SDK."""
    give_up: Callable[[], None]
    """Ends what is being sent."""


class CallTraces:
    """The spans of a server's calls, and what sends them; without any it does nothing.

    Args:
        orla: The core.
        sending: ``None``: there are no traces.
    """

    def __init__(self, orla: Orla, sending: SpanSending | None = None) -> None:
        self._sending = sending
        self._spans: Any = None
        if sending is not None:
            from orla_lg.observe import traces

            self._spans = traces(orla, sending.provider)

    @classmethod
    def opened(cls, orla: Orla) -> CallTraces:
        """Return the traces that the environment asks for, as far as what they need is installed."""
        return cls(orla, None if (url := endpoint()) is None else _sending(url))

    def around(self, app: Any) -> Any:
        """Return an application that answers each request in its sender's trace."""
        return app if self._sending is None else JoinedTrace(app)

    def close(self) -> None:
        """Send what is left, for a bounded time. Idempotent."""
        sending, self._sending = self._sending, None
        if sending is None:
            return
        self._spans.close()
        sends = threading.Thread(target=sending.provider.shutdown, name="orla-traces", daemon=True)
        sends.start()
        sends.join(CLOSE_PATIENCE_S)
        if sends.is_alive():  # its own time-outs are longer, and count for each try
            sending.give_up()


def _missing() -> str | None:
    """Return which module that sends traces is not installed; ``None``: all are."""
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace.export  # noqa: F401
    except ModuleNotFoundError as error:
        return error.name
    return None


def _sending(url: str) -> SpanSending | None:
    if (missing := _missing()) is not None:
        log.warning("no traces are sent, although the environment says where to: %s is missing; %s, or %s=none",
                    missing, INSTALL, EXPORTER)  # fmt: skip
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = os.environ.get("OTEL_SERVICE_NAME") or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create({} if named else {SERVICE_NAME: SERVICE})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(url)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return SpanSending(provider, exporter.shutdown)


class JoinedTrace:
    """Answers each request in the trace that its headers name.

    Args:
        app: Answers.
    """

    def __init__(self, app: Any) -> None:
        from opentelemetry import context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._app = app
        self._context, self._propagator = context, TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        carried = {
            name.decode(): value.decode("latin-1") for name, value in scope.get("headers", ()) if name in _TRACE
        }
        if not carried:
            await self._app(scope, receive, send)
            return
        token = self._context.attach(self._propagator.extract(carried))
        try:
            await self._app(scope, receive, send)
        finally:
            self._context.detach(token)
