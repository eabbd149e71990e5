"""What all tests share: a stub engine, real engines, and Orlas that must leave nothing behind."""

from __future__ import annotations

import functools
import gc
import os
import signal
import ssl
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import httpx
import httpx2
import hypothesis
import openai
import pytest
from hypothesis.internal.conjecture import providers
from langchain_openai import ChatOpenAI
from langchain_openai.chat_models import _client_utils

from orla_lg import Backend, Orla
from orla_lg.engines import EngineOptions, OwnEngine, running_engine
from orla_lg_llamacpp import embedded
from tests.stub_engine import MODEL, StubEngine

BACKEND_KEY = "key-of-the-backend"
CALLER_KEY = "key-of-the-caller"

SDK_REQUEST = openai.OpenAI.request
SDK_AREQUEST = openai.AsyncOpenAI.request
HTTP_SENDS: dict[Any, Any] = {
    kind: kind.send for kind in (httpx.Client, httpx.AsyncClient, httpx2.Client, httpx2.AsyncClient)
}


# The same examples at every run, so that a change is judged by what it changes; make test-random draws others.
# How long an example takes judges nothing: another process may have the machine meanwhile.
UNTIMED: dict[str, Any] = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, **UNTIMED)
hypothesis.settings.register_profile("random", print_blob=True, **UNTIMED)
hypothesis.settings.load_profile(PROFILE := os.environ.get("ORLA_HYPOTHESIS", "repeatable"))
if PROFILE == "repeatable":  # Hypothesis also draws numbers that it finds in our sources: others after each change
    setattr(providers, "is_local_module_file", lambda path: False)  # noqa: B010 - no name that its types know

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Tests started in a script's background would pass it on, and what they start would not heed Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _certificates_are_read_once() -> Iterator[None]:
    """Each HTTP client reads the certificates of the machine, which takes 25 ms; tests make thousands, for HTTP."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ssl, "create_default_context", functools.cache(ssl.create_default_context))
        yield


@pytest.fixture(autouse=True, scope="session")
def _an_embedded_engine_takes_one_core() -> Iterator[None]:
    """Its threads spin where one of them waits for a core, and beside these tests others run."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(embedded, "usable_cores", lambda: [0])
        yield


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ORLA_CONFIG", "ORLA_URL", "ORLA_DISABLED", "ORLA_CONTROL", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.setenv(name, "false")


@pytest.fixture(autouse=True)
def _own_http_clients() -> Iterator[None]:
    """LangChain keeps HTTP clients by URL, beyond their loop; a later stub may get the same port."""
    yield
    _client_utils._cached_sync_httpx_client.cache_clear()
    _client_utils._cached_async_httpx_client.cache_clear()


@pytest.fixture
def engine() -> Iterator[StubEngine]:
    with StubEngine() as running:
        yield running


@pytest.fixture
def other_engine() -> Iterator[StubEngine]:
    with StubEngine() as running:
        yield running


def at(stub: StubEngine, name: str = "main", **settings: Any) -> Backend:
    """Return a backend at a stub."""
    return Backend(name, stub.url, **{"model": MODEL, "api_key": BACKEND_KEY, **settings})


def chat(engine: StubEngine, **settings: Any) -> ChatOpenAI:
    """Return a model as an application makes it, which knows nothing of orla_lg."""
    return ChatOpenAI(base_url=engine.url, **{"model": MODEL, "api_key": CALLER_KEY, "max_retries": 0, **settings})


@pytest.fixture
def make_orla() -> Iterator[Callable[..., Orla]]:
    """Return a maker of Orlas; at the end each must be empty, and the SDK as it was."""
    made: list[Orla] = []

    def make(*backends: Backend, **settings: Any) -> Orla:
        made.append(Orla(list(backends), **settings))
        return made[-1]

    yield make
    try:
        for orla in made:
            assert_nothing_left(orla)
    finally:
        for orla in made:
            orla.close()
    assert openai.OpenAI.request is SDK_REQUEST
    assert openai.AsyncOpenAI.request is SDK_AREQUEST
    assert all(kind.send is send for kind, send in HTTP_SENDS.items())


@pytest.fixture
def orla(engine: StubEngine, make_orla: Callable[..., Orla]) -> Orla:
    """An Orla with one backend, ``main``, that serves every stage at the stub."""
    return make_orla(at(engine), mapper={"*": "main"})


def assert_nothing_left(orla: Orla) -> None:
    """Assert that no call, grant, run or seat is left."""
    serving = orla.core.serving

    def in_flight() -> bool:
        return any(scheduler.queue.in_flight for scheduler in serving.schedulers.values())

    if in_flight():
        gc.collect()  # a dropped stream is known as dropped when it is collected, and ends soon after
    deadline = time.monotonic() + 30.0
    while in_flight() and time.monotonic() < deadline:
        time.sleep(0.002)
    now = orla.statistics()
    serving.check_integrity()
    for name, backend in now.backends.items():
        assert (backend.queue.in_flight, backend.queue.waiting) == (0, 0), name
        assert not serving.schedulers[name]._entered, name
    assert (now.workflows.runs, now.workflows.running) == (0, 0)
    assert len(orla.core.runs) == 0
    threads = set(serving.book._idle)
    for name, scheduler in serving.schedulers.items():
        if not scheduler.cache.slots:  # a slot remembers who sat there last
            assert set(scheduler.cache.workflows()) <= threads, f"{name} remembers what is neither idle nor running"


# The collector: what imports made stays, a million objects, and need not be looked through at each of its rounds

gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


# Real engines, kills of real processes and a Ray cluster, only when asked for: pytest -m engines, -m kills, -m ray

ASKED_FOR = ("engines", "kills", "ray", "agent_server")

KV_TOKENS = 16_384


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # make test: files that take long begin first, or one would be left at the end
        long = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("engine")}
        items.sort(key=lambda item: item.path not in long)
    unasked = [mark for mark in ASKED_FOR if mark not in config.option.markexpr]
    left = {item for item in items if any(item.get_closest_marker(mark) for mark in unasked)}
    config.hook.pytest_deselected(items=list(left))
    items[:] = [item for item in items if item not in left]


def lent(options: EngineOptions) -> Iterator[OwnEngine]:
    with running_engine(options) as engine:
        yield engine


@pytest.fixture(scope="session")
def _shared_vllm(request: pytest.FixtureRequest) -> Iterator[OwnEngine]:
    yield from lent(EngineOptions("vllm-cpu", kv_tokens=KV_TOKENS))


@pytest.fixture(scope="session")
def _shared_llamacpp() -> Iterator[OwnEngine]:
    yield from lent(EngineOptions("llamacpp", slots=2, kv_tokens=4096))


def running(engine: OwnEngine) -> OwnEngine:
    """Start the engine again if the last test ended it."""
    if engine.running is None:
        engine.restart()
    return engine


@pytest.fixture
def real_vllm(_shared_vllm: OwnEngine) -> OwnEngine:
    """vLLM with a KV cache of 16,384 tokens; a test may kill and restart it."""
    return running(_shared_vllm)


@pytest.fixture
def real_llamacpp(_shared_llamacpp: OwnEngine) -> OwnEngine:
    """llama.cpp with two slots of 2,048 tokens; a test may kill and restart it."""
    return running(_shared_llamacpp)


@pytest.fixture
def real_sglang() -> Backend:
    """An SGLang that somebody else started: ``ORLA_SGLANG_URL``, with ``ORLA_SGLANG_KEY`` and ``_ADMIN_KEY``."""
    url = os.environ.get("ORLA_SGLANG_URL")
    if not url:
        pytest.skip("ORLA_SGLANG_URL names no running engine")
    key, admin_key = os.environ.get("ORLA_SGLANG_KEY"), os.environ.get("ORLA_SGLANG_ADMIN_KEY")
    return Backend("real", url.rstrip("/"), engine="sglang", api_key=key, admin_key=admin_key)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Have a test fail that skips for want of a program, where all of them must be there (``ORLA_TEST_STRICT``)."""
    report = yield
    if report.skipped and os.environ.get("ORLA_TEST_STRICT") and "ORLA_TEST_" in str(report.longrepr):
        report.outcome = "failed"
    return report
