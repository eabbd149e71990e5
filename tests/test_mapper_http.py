"""The external mapper, against a real HTTP server that answers, errs and hangs."""

from __future__ import annotations

import asyncio
import gzip
import json
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Orla
from orla_lg.core.engine.backend import Probe
from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.mapping import Mapper
from orla_lg.errors import ConfigError
from orla_lg.mappers import ExplicitMapper, First, HttpMapper
from tests.conftest import at, chat
from tests.core.fakes import HandClock, a_call, a_view
from tests.stub_engine import StubEngine

SECRET = "a-key-that-nobody-may-see"


class Service:
    """Answers every question with *answer*: a status and a body, or what a function of the question returns."""

    def __init__(self) -> None:
        self.answer: Any = {"backend": "light"}
        self.status = 200
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.packing: str | None = None
        """The content encoding that it gives, whatever was asked for."""
        self.drip_s = 0.0
        """Seconds before each byte of an answer."""
        self.hangs = threading.Event()
        self.hangs.set()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                service.asked.append(asked)
                service.headers.append({name.lower(): value for name, value in self.headers.items()})
                service.hangs.wait(20)
                answer = service.answer(asked) if callable(service.answer) else service.answer
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(service.status)
                self.send_header("content-length", "0" if service.status == 204 else str(len(data)))
                if service.packing is not None:
                    self.send_header("content-encoding", service.packing)
                self.end_headers()
                if service.status != 204:
                    step = 1 if service.drip_s else 1 << 16
                    for at in range(0, len(data), step):
                        time.sleep(service.drip_s)
                        self.wfile.write(data[at : at + step])

            def log_message(self, *said: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *about: Any) -> None: ...  # a client that hung up

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/map"


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.hangs.set()
    made.server.shutdown()
    made.server.server_close()
    thread.join()


VIEWS = [
    a_view("light", waiting=2, in_flight=4, max_concurrency=4, quality=0.6),
    a_view("heavy", probe=Probe(context_tokens=4096), resident_tokens=300, circuit=Circuit.HALF_OPEN),
]


def ask(mapper: HttpMapper, **call: Any) -> Any:
    return asyncio.run(mapper.amap(a_call(**call), VIEWS))


def test_it_is_told_what_it_needs_and_nothing_that_anybody_wrote(service: Service) -> None:
    service.answer = {"backend": "light", "reason": "small talk", "alternatives": ["heavy", "light", "gone", 3]}
    chosen = ask(HttpMapper(service.url, 5), stage="sub|node", chars=777, tenant="acme", priority=3)
    assert (chosen.backend, chosen.mapper, chosen.reason) == ("light", "http", "small talk")
    assert chosen.alternatives == ("heavy",), "names that no backend has are left out"
    (asked,) = service.asked
    assert asked["stage"] == "sub|node" and asked["tags"] == {"tenant": "acme", "priority": 3}
    assert asked["current"] == "heavy" and asked["request"]["prompt_chars"] == 777
    light, heavy = asked["candidates"]
    assert (light["queue_depth"], light["in_flight"], light["capacity"], light["quality"]) == (2, 4, 4, 0.6)
    assert (heavy["circuit"], heavy["resident_tokens"], heavy["context_tokens"]) == ("half_open", 300, 4096)
    assert light["input_per_mtoken"] == 0.0 and "xxx" not in json.dumps(asked)


@pytest.mark.parametrize(("status", "answer"), [(204, b""), (200, {"backend": None})])
def test_it_may_decline(service: Service, status: int, answer: Any) -> None:
    service.status, service.answer = status, answer
    mapper = HttpMapper(service.url, 5)
    assert ask(mapper) is None and mapper.statistics() == {"asked": 1, "declined": 1}


@pytest.mark.parametrize(
    ("status", "answer", "kind"),
    [
        (500, {"backend": "light"}, "error"),
        (302, {"backend": "light"}, "error"),
        (200, b"not json", "error"),
        (200, b"\xff\xfe{", "error"),
        (200, [1], "error"),
        (200, {"to": "light"}, "error"),
        (200, {"backend": "lihgt"}, "unknown"),
        (200, {"backend": 3}, "unknown"),
        (200, {"backend": "heavy"}, "unfit"),
    ],
)
def test_every_other_answer_is_counted_logged_once_and_falls_back(
    service: Service, caplog: pytest.LogCaptureFixture, status: int, answer: Any, kind: str
) -> None:
    service.status, service.answer = status, answer
    mapper = HttpMapper(service.url, 5, {"Authorization": SECRET})
    assert [ask(mapper, chars=100_000) for _ in range(2)] == [None, None]
    assert mapper.statistics() == {"asked": 2, kind: 2}
    assert len([r for r in caplog.records if "calls are mapped without it" in r.message]) == 1
    assert SECRET not in caplog.text and SECRET not in repr(mapper)
    assert service.headers[0]["authorization"] == SECRET


def test_a_time_out_falls_back_in_time(service: Service) -> None:
    service.hangs.clear()
    mapper = HttpMapper(service.url, timeout_s=0.05)
    assert ask(mapper) is None and mapper.statistics() == {"asked": 1, "timeout": 1}


def test_an_answer_that_drips_is_no_answer_in_time(service: Service) -> None:
    service.drip_s = 0.05
    mapper = HttpMapper(service.url, timeout_s=0.2)
    assert ask(mapper) is None and mapper.statistics() == {"asked": 1, "timeout": 1}


HOSTILE = {
    "a long number": b'{"backend": "light", "n": ' + b"9" * 60_000 + b"}",
    "deep lists": b"[" * 60_000,
    "deep objects": b'{"backend":' * 5_000,
    "lists that a parser still reads": b'{"backend": "light", "n": ' + b"[" * 500 + b"]" * 500 + b"}",
    "a name that is nested": b'{"backend": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a long answer": b'{"backend": "light", "reason": "' + b"x" * 50_000_000 + b'"}',
    "a number beyond all": b'{"backend": 1e999999}',
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("digits", [None, 0], ids=["", "no limit of Python's own"])
def test_whatever_is_answered_the_call_goes_on_in_time(
    service: Service, caplog: pytest.LogCaptureFixture, answer: bytes, digits: int | None
) -> None:
    service.answer = answer
    mapper = HttpMapper(service.url, 60)
    before, started = sys.get_int_max_str_digits(), time.perf_counter()
    try:
        sys.set_int_max_str_digits(before if digits is None else digits)
        assert [ask(mapper), ask(mapper)] == [None, None]
    finally:
        sys.set_int_max_str_digits(before)
    assert time.perf_counter() - started < 30
    counted = mapper.statistics()
    assert counted.get("error", 0) + counted.get("unknown", 0) == 2 and caplog.text.count("mapped without it") == 1


@pytest.mark.parametrize("packing", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "nonsense"])
def test_a_bomb_is_neither_unpacked_nor_waited_for(service: Service, packing: str) -> None:
    whole = zlib.compressobj(9, zlib.DEFLATED, 31 if packing != "deflate" else 15)
    million = b"x" * 1_000_000
    bomb = b"".join(
        [whole.compress(b'{"backend": "light", "reason": "'), *(whole.compress(million) for _ in range(200))]
    )
    service.answer, service.packing = bomb + whole.flush(), packing
    mapper = HttpMapper(service.url, 5)
    tracemalloc.start()
    try:
        assert ask(mapper) is None and mapper.statistics() == {"asked": 1, "error": 1}
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("packing", ["gzip", "deflate", "identity"])
def test_an_answer_that_a_proxy_packed_is_read_all_the_same(service: Service, packing: str) -> None:
    plain = json.dumps({"backend": "light", "reason": "small " * 100}).encode()
    packed = {"gzip": gzip.compress(plain), "deflate": zlib.compress(plain), "identity": plain}
    service.answer, service.packing = packed[packing], packing
    assert ask(HttpMapper(service.url, 5)).backend == "light"
    assert service.headers[0]["accept-encoding"] == "identity"
    service.answer = packed[packing][:-9]
    assert ask(HttpMapper(service.url, 5)) is None


def test_what_a_user_named_does_not_fail_the_question(service: Service) -> None:
    service.answer = {"backend": "light", "reason": "\ud800"}
    chosen = ask(HttpMapper(service.url, 5), workflow="\ud800\0", tenant="\ud800")
    assert chosen.backend == "light" and chosen.reason == "?"
    assert service.asked[0]["workflow"] == "\ud800\0"


def test_a_dead_service_costs_nobody_its_time_out(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    clock = HandClock()
    mapper = HttpMapper(service.url, timeout_s=0.05, clock=clock)
    service.hangs.clear()
    for _ in range(10):
        assert ask(mapper) is None
    assert mapper.statistics() == {"asked": 3, "timeout": 3, "skipped": 7}
    clock.now += 1.0
    assert ask(mapper) is None and ask(mapper) is None, "one tries it again"
    assert mapper.statistics()["timeout"] == 4
    service.hangs.set()
    clock.now += 2.0
    mapper.timeout_s = 5.0
    assert ask(mapper).backend == "light" and ask(mapper).backend == "light"
    assert "answers again" in caplog.text and caplog.text.count("left alone") == 1


def test_nobody_there(service: Service) -> None:
    mapper = HttpMapper("http://127.0.0.1:1/map", 5)
    assert ask(mapper) is None and mapper.statistics() == {"asked": 1, "error": 1}


def test_a_wrong_name_does_not_open_the_circuit(service: Service) -> None:
    service.answer = {"backend": "gone"}
    mapper = HttpMapper(service.url, 5)
    for _ in range(10):
        ask(mapper)
    assert mapper.statistics() == {"asked": 10, "unknown": 10}


@pytest.mark.parametrize(("url", "timeout_s"), [("map", 1), ("ftp://host/x", 1), ("http://host", 0)])
def test_settings_are_checked(url: str, timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="HttpMapper: "):
        HttpMapper(url, timeout_s)


def test_a_key_in_the_url_is_not_shown() -> None:
    assert (
        repr(HttpMapper(f"https://me:{SECRET}@host/map?k={SECRET}"))
        == "HttpMapper('https://host/map', timeout_s=0.25)"
    )


def run(orla: Orla, mapper: Mapper, engine: StubEngine, form: str) -> None:
    llm = chat(engine)

    def node(state: MessagesState) -> dict[str, Any]:
        return {"messages": [llm.invoke(state["messages"])]}

    async def anode(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await llm.ainvoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("ask", anode if form == "async" else node)
    builder.add_edge(START, "ask")
    graph = orla.wrap(builder, mapper=mapper)
    if form == "async":
        asyncio.run(graph.ainvoke({"messages": [("user", "hi")]}))
    else:
        graph.invoke({"messages": [("user", "hi")]})


@pytest.mark.parametrize("form", ["sync", "async"])
def test_in_a_graph_with_a_table_behind_it(
    service: Service, engine: StubEngine, make_orla: Callable[..., Orla], form: str
) -> None:
    orla = make_orla(at(engine, "main"), at(engine, "light"))
    external = HttpMapper(service.url, 5)
    run(orla, First(external, ExplicitMapper({"*": "main"})), engine, form)
    service.status = 500
    run(orla, First(external, ExplicitMapper({"*": "main"})), engine, form)
    assert [(record.backend, record.mapper) for record in orla.records()] == [("light", "http"), ("main", "explicit")]
