"""A server as it is seen from outside: its metrics, and the traces that its calls are parts of."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from orla_lg import ChatOrla, Orla
from orla_lg.core.engine.given import NoBackends
from orla_lg.observe import metrics, traces
from orla_lg.serve.access.keys import KeyScope
from orla_lg.serve.announcement import announcement
from orla_lg.serve.http import traces as server_traces
from orla_lg.serve.http.health import CoreState
from orla_lg.serve.parts import ServerParts
from orla_lg.serve.settings import settings
from orla_lg.serve.store.store import MemoryStore
from tests.observe.test_metrics import scraped
from tests.observe.test_spans import Traced, header_of, seen
from tests.serve.in_thread import Running, server
from tests.serve.test_server import CALL, file, key, until
from tests.stub_engine import StubEngine

__all__ = ["file"]

PARENT = f"00-{0xABC:032x}-{0xDEF:016x}-01"


def samples(url: str, **headers: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = httpx.get(f"{url}/metrics", headers=headers)
    assert answer.is_success, answer.text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(url: str, name: str, **labels: str) -> float:
    return samples(url)[name, frozenset(labels.items())]


def ready(running: Running) -> None:
    until(lambda: running.server.state is CoreState.READY)


def call(running: Running, **headers: str) -> httpx.Response:
    return httpx.post(f"{running.url}/v1/chat/completions", json=CALL, headers=headers)


def test_its_metrics_need_a_key_that_may_look(file: Path) -> None:
    store = MemoryStore()
    use, view = key(store, KeyScope.USE), key(store, KeyScope.VIEW)
    with server(file, store=store) as running:
        ready(running)
        for headers, status in (({}, 401), ({"authorization": f"Bearer {use}"}, 403)):
            assert httpx.get(f"{running.url}/metrics", headers=headers).status_code == status
        assert samples(running.url, authorization=f"Bearer {view}")["orla_server_ready", frozenset()] == 1


def test_calls_of_gateway_and_links_are_counted_once(file: Path) -> None:
    with server(file) as running:
        ready(running)
        assert call(running, **{"x-orla-stage": "summarize"}).is_success
        with Orla.remote(running.url) as orla:
            from prometheus_client import CollectorRegistry

            registry = CollectorRegistry()
            metrics(orla, registry)
            ChatOrla(orla=orla, model="light").invoke("hello")
            assert value(running.url, "orla_links", state="connected") == 1
            own = scraped(registry)
            mine = {"stage": "(none)", "backend": "light", "status": "ok"}
            assert own["orla_requests_total", frozenset(mine.items())] == 1
            assert not any(name.startswith("orla_scheduler") for name, _ in own), "the server's are not its own"
        until(lambda: value(running.url, "orla_requests_total", **mine) == 1)
        found = value(running.url, "orla_requests_total", stage="summarize", backend="light", status="ok")
        assert found == 1 and value(running.url, "orla_scheduler_dispatched_total", backend="light") == 2
        assert value(running.url, "orla_server_requests_under_way") == 1, "the scrape itself"
        assert "process_cpu_seconds_total" in {name for name, _ in samples(running.url)}


def test_changes_are_counted_by_what_came_of_them(file: Path) -> None:
    with server(file) as running:
        ready(running)
        http = httpx.Client(base_url=running.url)
        http.post("/v1/orla/control", json={"do": "resume", "backend": "light"})
        http.post("/v1/orla/control", json={"do": "resume", "backend": "haevy"})
        http.post("/v1/orla/reload", json={"dry_run": True})
        http.post("/api/v1/nothing-like-it/x", json={})
        http.get("/v1/orla/state")
        http.post("/v1/chat/completions", json=CALL)
        counted = {
            tuple(sorted(dict(labels).items())): count
            for (name, labels), count in samples(running.url).items()
            if name == "orla_control_plane_mutations_total"
        }
    changes = {("control", "ok"): 1, ("control", "refused"): 1, ("reload", "ok"): 1, ("other", "refused"): 1}
    assert counted == {
        (("method", "POST"), ("outcome", outcome), ("resource", resource)): count
        for (resource, outcome), count in changes.items()
    }


def test_a_standby_is_seen_as_one(file: Path) -> None:
    store = MemoryStore()
    with server(file, store=store) as running:
        ready(running)
        with server(file, store=store) as standby:
            assert httpx.get(f"{standby.url}/readyz").status_code == 503
            assert value(standby.url, "orla_server_ready") == 0 and value(running.url, "orla_server_ready") == 1


def test_openmetrics_is_spoken_where_it_is_asked_for(file: Path) -> None:
    with server(file) as running:
        ready(running)
        answer = httpx.get(
            f"{running.url}/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"}
        )
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        assert answer.text.endswith("# EOF\n")
        assert httpx.get(f"{running.url}/metrics").headers["content-type"].startswith("text/plain")


# Traces


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Traced:
    """The server's provider, whose spans stay here."""
    found = Traced()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    sending = server_traces.SpanSending(found.provider, found.exporter.shutdown)
    monkeypatch.setattr(server_traces, "_sending", lambda _url: sending)
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_at_the_gateway_is_a_part_of_its_clients_trace(
    file: Path, engine: StubEngine, traced: Traced, stream: bool
) -> None:
    with server(file) as running:
        ready(running)
        url = f"{running.url}/v1/chat/completions"
        headers = {"traceparent": PARENT, "tracestate": "vendor=x", "x-orla-workflow-run": "thread-1"}
        assert httpx.post(url, json={**CALL, "stream": stream}, headers=headers).is_success
        assert httpx.post(url, json=CALL).is_success, "and one that has none begins its own"
        until(lambda: len(traced.spans()) == 2)
    first, second = traced.spans()
    assert first.parent is not None and (first.parent.trace_id, first.parent.span_id) == (0xABC, 0xDEF)
    assert second.parent is None and seen(engine) == [header_of(first), header_of(second)]
    requests = [each for each in engine.requests if each.path.endswith("completions")]
    assert [each.headers.get("tracestate") for each in requests] == ["vendor=x", None]
    assert (first.attributes or {})["gen_ai.conversation.id"] == "thread-1"


def test_off_a_clients_trace_goes_to_the_engine_as_it_came(file: Path, engine: StubEngine) -> None:
    with server(file) as running:
        ready(running)
        assert running.orla.core.serving.services.tracer is None
        assert call(running, traceparent=PARENT, tracestate="vendor=x").is_success
    assert seen(engine) == [PARENT] and engine.requests[-1].headers["tracestate"] == "vendor=x"


def test_a_linked_calls_span_is_made_where_it_is_made(file: Path, engine: StubEngine, traced: Traced) -> None:
    mine = Traced()
    with server(file) as running:
        ready(running)
        with Orla.remote(running.url) as orla:
            calls = traces(orla, mine.provider)
            with mine.tracer.start_as_current_span("node") as node:
                ChatOrla(orla=orla, model="light").invoke("hello")
            assert calls.open == 0
        tracer: Any = running.orla.core.serving.services.tracer
        assert tracer.open == 0
    (made,) = mine.spans()
    assert made.parent is not None and made.parent.span_id == node.get_span_context().span_id
    assert seen(engine) == [header_of(made)] and not traced.spans(), "the server makes none of it"


class Collector:
    """Takes traces by OTLP over HTTP, and keeps their spans."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                for each in ExportTraceServiceRequest.FromString(body).resource_spans:
                    found = {attribute.key: attribute.value.string_value for attribute in each.resource.attributes}
                    collector.resources.append(found)
                    collector.spans += [span for scope in each.scope_spans for span in scope.spans]
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


def test_spans_go_to_a_collector_as_the_environment_says(
    file: Path, engine: StubEngine, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    with server(file) as running:
        ready(running)
        assert call(running, traceparent=PARENT).is_success
    (span,) = collector.spans  # what was left was sent at the end
    assert span.trace_id.hex() == f"{0xABC:032x}" and span.name == "chat stub-model"
    assert seen(engine) == [f"00-{0xABC:032x}-{span.span_id.hex()}-01"]
    assert collector.resources[0]["service.name"] == "orla-lg"


@pytest.mark.parametrize(
    ("said", "endpoint"),
    [
        ({}, None), ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x/"}, "http://x/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x/y", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://z"}, "http://x/y"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "http://localhost:4318/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}, None),
    ],
)  # fmt: skip
def test_where_traces_go(said: dict[str, str], endpoint: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*server_traces.ENDPOINTS, server_traces.EXPORTER, server_traces.DISABLED):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert server_traces.endpoint() == server_traces.destination() == endpoint


@pytest.mark.parametrize("is_demo", [True, False])
def test_a_server_says_where_traces_go_and_no_password(is_demo: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    none: Any = None

    def said() -> list[str]:
        with Orla(NoBackends.YET) as orla:
            parts = ServerParts(none, none, orla, {}, keys=0, posted=0)
            return list(announcement(settings(None, reads_file=False), parts, "http://x", is_demo=is_demo))

    assert not any("traces" in line for line in said())
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://me:secret@127.0.0.1:4318/v1/traces?token=secret")
    assert "traces: to http://127.0.0.1:4318/v1/traces" in said() and "secret" not in "".join(said())
    monkeypatch.setattr(server_traces, "_missing", lambda: "opentelemetry")
    assert not any("traces" in line for line in said())


def test_a_collector_that_is_gone_keeps_no_server_from_its_end(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_traces, "CLOSE_PATIENCE_S", 0.3)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with server(file) as running:
        ready(running)
        assert call(running).is_success
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 2.0
