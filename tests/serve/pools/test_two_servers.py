"""Two servers of two pools on one store: what a key may use holds for both together."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import httpx
import pytest
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from pydantic import SecretStr

from orla_lg import BudgetExceeded, Limit, Limits, Orla, QueueFull
from orla_lg.serve.access.keys import KeyScope
from orla_lg.serve.store.store import MemoryStore
from orla_lg.testing.faults import FaultEngine, Reply
from tests.serve.fixtures import make
from tests.serve.in_thread import Running, server
from tests.stub_engine import MODEL, StubEngine


def toml(folder: Path, pool: str, engine: FaultEngine, more: str = "") -> Path:
    file = folder / f"{pool}.toml"
    file.write_text(
        f'[backends.{pool}]\nurl = "{engine.url}"\nmodel = "{MODEL}"\nmax_concurrency = 50\n'
        f'[mapping]\n"*" = "{pool}"\n[serve]\npool = "{pool}"\n{more}'
    )
    return file


@contextlib.contextmanager
def two(tmp_path: Path, engine: FaultEngine, store: MemoryStore, more: str = "") -> Iterator[list[Running]]:
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(server(toml(tmp_path, pool, engine, more), store=store)) for pool in ("a", "b")
        ]
        for each in running:
            wait_ready(each)
        yield running


def wait_ready(running: Running) -> None:
    until_s = time.monotonic() + 20.0
    while httpx.get(f"{running.url}/readyz", trust_env=False).status_code != 200:
        assert time.monotonic() < until_s
        time.sleep(0.01)


def chat(running: Running, pool: str, key: str, **body: Any) -> httpx.Response:
    said = {"model": pool, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, **body}
    return httpx.post(
        f"{running.url}/v1/chat/completions", json=said, headers={"authorization": f"Bearer {key}"}, timeout=30.0,
        trust_env=False,
    )  # fmt: skip


def test_the_calls_of_a_key_are_counted_over_both(tmp_path: Path, engine: StubEngine) -> None:
    store = MemoryStore()
    _, key = make(store, limits=(Limit(calls=30),))
    with two(tmp_path, engine, store) as (a, b), ThreadPoolExecutor(6) as many:
        found = list(many.map(lambda n: chat((a, b)[n % 2], "ab"[n % 2], key).status_code, range(24)))
        assert Counter(found) == {200: 24}
        # One asks for all that is left, and has it; then it is spent for both.
        found = [chat(a, "a", key).status_code for _ in range(8)]
        assert Counter(found) == {200: 6, 429: 2}
        refused = chat(b, "b", key)
        assert refused.status_code == 429 and "may use 30 calls" in refused.text
        assert len(engine.chats) == 30


def test_tokens_of_a_key_over_both_and_over_a_restart_of_one(tmp_path: Path, engine: StubEngine) -> None:
    store = MemoryStore()
    _, key = make(store, limits=(Limit(tokens=400),))
    with two(tmp_path, engine, store) as (a, b):
        one = chat(a, "a", key).json()["usage"]["total_tokens"]
        for number in range(6):
            assert chat((a, b)[number % 2], "ab"[number % 2], key).status_code == 200
    with two(tmp_path, engine, store) as (a, b):
        used, refused = 7 * one, 0
        for number in range(200):
            if refused >= 4:
                break
            answer = chat((a, b)[number % 2], "ab"[number % 2], key)
            used += answer.json()["usage"]["total_tokens"] if answer.status_code == 200 else 0
            refused = refused + 1 if answer.status_code == 429 else 0
        assert refused >= 4 and 400 - 4 * one <= used <= 400


def test_calls_at_once_of_a_key_over_both(tmp_path: Path) -> None:
    store = MemoryStore()
    with StubEngine(rule=lambda seen: Reply(before_s=0.03)) as engine:
        _, key = make(store, concurrency=3)
        with two(tmp_path, engine, store) as (a, b), ThreadPoolExecutor(8) as many:
            found = Counter(many.map(lambda n: chat((a, b)[n % 2], "ab"[n % 2], key).status_code, range(60)))
    assert engine.peak <= 3, "more at once than the key may have"
    assert found[200] >= 15 and set(found) <= {200, 429}


def test_one_call_at_once_goes_from_one_pool_to_the_other(tmp_path: Path, engine: StubEngine) -> None:
    store = MemoryStore()
    _, key = make(store, concurrency=1)
    with two(tmp_path, engine, store) as (a, b):
        for _ in range(2):
            assert in_the_end(a, "a", key)
            assert in_the_end(b, "b", key)


def in_the_end(running: Running, pool: str, key: str) -> bool:
    """Whether a call is served, tried again as often as its refusal says on a machine that is busy."""
    return any(chat(running, pool, key).status_code == 200 for _ in range(5))


class State(TypedDict):
    n: NotRequired[int]


def test_a_link_waits_for_its_slice_too(tmp_path: Path, engine: StubEngine) -> None:
    store = MemoryStore()
    _, key = make(store, scopes=(KeyScope.LINK, KeyScope.USE), limits=(Limit(calls=6),), concurrency=1)

    def node(state: State) -> State:
        ChatOpenAI(model=MODEL, base_url=engine.url, api_key=SecretStr("any"), max_retries=0).invoke("Hello")
        return {"n": 1}

    with two(tmp_path, engine, store) as (a, b), Orla.remote(a.url, key=key) as linked:
        graph = linked.wrap(StateGraph(State).add_node("node", node).add_edge(START, "node"))
        for _ in range(3):
            assert in_the_end(b, "b", key)
            graph.invoke(cast("Any", {}))
        with pytest.raises((BudgetExceeded, QueueFull)):
            graph.invoke(cast("Any", {}))


def test_without_a_pool_nothing_is_shared_out(tmp_path: Path, engine: StubEngine) -> None:
    store = MemoryStore()
    _, key = make(store, limits=(Limit(calls=3),), concurrency=2)
    file = toml(tmp_path, "a", engine)
    file.write_text(file.read_text().replace('pool = "a"', ""))
    with server(file, store=store) as running:
        wait_ready(running)
        assert [chat(running, "a", key).status_code for _ in range(4)] == [200, 200, 200, 429]
        assert running.server.host.slices is None
    assert not store.scan("slices/")


def test_a_limit_of_each_run_ends_with_it(tmp_path: Path, engine: StubEngine) -> None:
    store = MemoryStore()

    def node(state: State) -> State:
        for _ in range(2):
            ChatOpenAI(model=MODEL, base_url=engine.url, api_key=SecretStr("any"), max_retries=0).invoke("Hello")
        return {"n": 1}

    with two(tmp_path, engine, store) as (a, _), Orla.remote(a.url) as linked:
        graph = linked.wrap(
            StateGraph(State).add_node("node", node).add_edge(START, "node"), limits=Limits(run=Limit(calls=3))
        )
        for _ in range(3):
            graph.invoke(cast("Any", {}))
        until_s = time.monotonic() + 10.0
        while store.scan("slices/") and time.monotonic() < until_s:
            time.sleep(0.05)
        assert not store.scan("slices/"), "the entries of runs that are over stay"
