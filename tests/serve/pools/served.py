"""Two pools on one store: ``fast`` with two backends, ``large`` with one, each with a server of its own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableLambda
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Orla
from orla_lg.serve.store.store import MemoryStore, Store
from tests.serve.in_thread import Running, server
from tests.stub_engine import StubEngine

CONFIG = """
[backends.small-a]
url = "{0}"
model = "stub-model"
max_concurrency = 2

[backends.small-b]
url = "{1}"
model = "stub-model"
max_concurrency = 2

[backends.big]
url = "{2}"
model = "stub-model"
max_concurrency = 2

[pools]
fast = ["small-a", "small-b"]
large = ["big"]

[serve]
replica_lease_s = 2.0
"""

TABLE = """
[mapping]
draft = "small-a"
check = "small-b"
think = "big"
"""

BY_LOAD = "load_aware = true"

FREE = """
[mapping]
draft = ["small-a", "big"]
think = ["big", "small-a"]
"""

HERE: Any = {"configurable": {"thread_id": "thread"}}


class Pools:
    """Servers of pools, which a test starts and ends."""

    def __init__(self, file: Path, engines: dict[str, StubEngine]) -> None:
        self.file, self.engines = file, engines
        self.store: Store = MemoryStore()
        self.running: dict[str, Running] = {}
        self._blocks: dict[str, contextlib.ExitStack] = {}

    def say(self, table: str = TABLE, top: str = "", config: str = CONFIG) -> None:
        urls = [self.engines[name].url for name in ("small-a", "small-b", "big")]
        self.file.write_text(top + config.format(*urls) + table)

    def start(self, *pools: str, address: str = "127.0.0.1:0") -> None:
        for pool in pools or ("fast", "large"):
            block = self._blocks[pool] = contextlib.ExitStack()
            self.running[pool] = block.enter_context(server(self.file, store=self.store, pool=pool, address=address))

    def end(self, *pools: str) -> None:
        for pool in pools or list(self._blocks):
            self._blocks.pop(pool).close()
            self.running.pop(pool)

    def orla(self, pool: str = "fast", **settings: Any) -> Orla:
        return Orla.remote(self.running[pool].url, **settings)

    def core(self, pool: str) -> Any:
        return self.running[pool].orla.core.serving

    def met(self, orla: Orla, *pools: str) -> None:
        """Wait until a replica is connected to the cores of pools."""
        cores: Any = orla.core.serving.cores  # type: ignore[attr-defined]
        until(
            lambda: all(pool in cores.by_pool and cores.by_pool[pool].link.up for pool in pools or ("fast", "large"))
        )

    def seen(self, *pools: str) -> None:
        """Wait until each core sees the others' backends."""
        for pool in pools or self.running:
            until(lambda pool=pool: all(not view.paused and view.probe for view in self.core(pool).views()))  # type: ignore[misc]

    def check(self) -> None:
        for running in self.running.values():
            running.call(running.orla.core.serving.check_integrity)


def until(holds: Callable[[], object], within_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.005)


def graph(*stages: str) -> Any:
    """Return a graph whose stages call one model each, one after the other; nothing answers where its code says."""
    llm = chat_nowhere()
    builder = StateGraph(MessagesState)
    before = START
    for stage in stages:

        async def anode(state: MessagesState) -> dict[str, Any]:
            return {"messages": [await llm.ainvoke(state["messages"])]}

        def node(state: MessagesState) -> dict[str, Any]:
            return {"messages": [llm.invoke(state["messages"])]}

        builder.add_node(stage, RunnableLambda(node, anode))
        builder.add_edge(before, stage)
        before = stage
    return builder.compile()


def chat_nowhere() -> Any:
    return ChatOpenAI(model="any", api_key="none", base_url="http://127.0.0.1:9/v1", max_retries=0)  # type: ignore[arg-type, call-arg]


def hi(text: str = "hello there") -> Any:
    return {"messages": [HumanMessage(text)]}


@contextlib.contextmanager
def replicas(pools: Pools, number: int = 1, pool: str = "fast", **settings: Any) -> Iterator[list[Orla]]:
    """Return replicas; when the block ends nothing of them may be left in any core."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(pools.orla(pool, **settings)) for _ in range(number)]
        for orla in made:
            pools.met(orla, *pools.running)
        yield made
        for orla in made:
            orla.core.serving.check_integrity()
            assert not orla.core.serving.progress._open  # type: ignore[attr-defined]


def records(pools: Pools, pool: str) -> list[Any]:
    found: list[Any] = pools.running[pool].orla.records()
    return found


__all__ = ["BY_LOAD", "CONFIG", "FREE", "HERE", "TABLE", "Pools", "graph", "hi", "records", "replicas", "until"]
