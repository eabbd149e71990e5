"""A real engine is killed in the middle of many runs and started again: every run ends, and the next ones work."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Backend, Happening, Orla, OrlaError
from orla_lg_llamacpp.embedded import free_port
from orla_lg_llamacpp.model import ensure_model
from tests.conftest import CALLER_KEY, assert_nothing_left

RUNS = 20
SERVE = """
import sys
from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings
with EmbeddedEngine(EngineSettings(slots=4, context_tokens=1024, threads=1, port=int(sys.argv[1]))) as engine:
    print(engine.url, flush=True)
    sys.stdin.read()
"""


class EngineProcess:
    """An engine in a process of its own, which can be killed and started again on the same port."""

    def __init__(self) -> None:
        ensure_model()
        self.port = free_port()
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        command = [sys.executable, "-c", SERVE, str(self.port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline().startswith("http://"), "the engine did not start"

    def kill(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait(20)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process = None


@pytest.fixture
def llama() -> Iterator[EngineProcess]:
    process = EngineProcess()
    process.start()
    yield process
    process.kill()


def two_stages(engine: EngineProcess) -> Any:
    llm = ChatOpenAI(base_url=engine.url, api_key=CALLER_KEY, model="smollm2", max_tokens=12, max_retries=2)

    def draft(state: MessagesState) -> Any:
        return {"messages": [llm.invoke(state["messages"])]}

    def review(state: MessagesState) -> Any:
        pieces = list(llm.stream(state["messages"]))
        return {"messages": [sum(pieces[1:], pieces[0])]}

    graph = StateGraph(MessagesState).add_node("draft", draft).add_node("review", review)
    return graph.add_edge(START, "draft").add_edge("draft", "review").compile()


def run(graph: Any, number: int, asynchronous: bool) -> Any:
    question = {"messages": [("user", f"Tell me about the number {number}.")]}
    try:
        return asyncio.run(graph.ainvoke(question)) if asynchronous else graph.invoke(question)
    except (OrlaError, openai.OpenAIError) as error:
        return error


@pytest.mark.engine
@pytest.mark.timeout(180)
def test_an_engine_killed_in_the_middle(llama: EngineProcess, make_orla: Any) -> None:
    orla: Orla = make_orla(Backend("llama", llama.url, engine="llamacpp"), mapper={"*": "llama"})
    finished, busy = threading.Semaphore(0), threading.Event()

    def listen(event: Any) -> None:
        if event.kind is Happening.FINISHED:
            finished.release()
        if event.kind is Happening.FIRST_TOKEN:
            busy.set()

    orla.subscribe(listen)
    graph = orla.wrap(two_stages(llama))
    with ThreadPoolExecutor(RUNS) as pool:
        runs = [pool.submit(run, graph, number, number % 2 == 0) for number in range(RUNS)]
        for _ in range(6):
            assert finished.acquire(timeout=60)
        assert busy.wait(60), "a stream is under way"
        in_flight = orla.statistics().backends["llama"].queue.in_flight
        llama.kill()
        llama.start()
        ends = [each.result(120) for each in runs]

    assert in_flight > 0, "the engine was killed at work"
    assert len(ends) == RUNS
    assert any(record.error is not None or record.attempts > 1 for record in orla.records()), "somebody noticed"
    assert_nothing_left(orla)
    deadline = time.monotonic() + 5
    while not orla.statistics().backends["llama"].reachable:  # the runs may have ended before anybody asked it again
        assert time.monotonic() < deadline, "nobody noticed that the engine is back"
        time.sleep(0.05)

    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda number: run(graph, number, False), range(4)))
    assert all(isinstance(each, dict) and each["messages"][-1].type == "ai" for each in again), again
    assert_nothing_left(orla)


@pytest.mark.engine
@pytest.mark.timeout(120)
def test_an_engine_that_stays_away(llama: EngineProcess, make_orla: Any) -> None:
    orla: Orla = make_orla(Backend("llama", llama.url, engine="llamacpp"), mapper={"*": "llama"})
    graph = orla.wrap(two_stages(llama))
    assert isinstance(run(graph, 1, False), dict)
    llama.kill()
    with ThreadPoolExecutor(6) as pool:
        ends = list(pool.map(lambda number: run(graph, number, number % 2 == 0), range(6)))
    assert {type(end).__name__ for end in ends} == {"BackendUnavailable"}
    assert_nothing_left(orla)
    llama.start()
    assert isinstance(run(graph, 1, False), dict)
