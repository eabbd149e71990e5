"""Two processes' savers on one set of threads, in one process: each with leases, connections and runs of its own."""

from __future__ import annotations

import contextlib
import operator
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph

from orla_lg.graph.saver import OrlaSaver
from tests.test_saver_conformance import database

Saver = BaseCheckpointSaver[Any]
Makes = Callable[..., OrlaSaver]

AT: Any = {"configurable": {"thread_id": "t"}}

HAS_POSTGRES = pytest.mark.skipif(
    not os.environ.get("ORLA_TEST_POSTGRES_URL"),
    reason='needs PostgreSQL: set ORLA_TEST_POSTGRES_URL, or run: eval "$(.ci/postgres.sh start)"',
)


class Told:
    """Takes signals, as an ``Orla`` does."""

    def thread_deleted(self, thread_id: str) -> None: ...

    def stages_next(self, thread_id: str | None, checkpoint_ns: str, stages: Sequence[str]) -> None: ...


class State(TypedDict):
    said: Annotated[list[str], operator.add]


def build(saver: Saver | None, work: Any, **more: Any) -> Any:
    """Return a graph of one node, which is *work*."""
    graph = StateGraph(State)
    graph.add_node("work", work)
    graph.add_edge(START, "work")
    graph.add_edge("work", END)
    return graph.compile(checkpointer=saver, **more)


def leased(saver: Saver, **terms: Any) -> OrlaSaver:
    return OrlaSaver(Told(), inner=saver, **{"thread_lease_s": 30, **terms})


@contextmanager
def two(kind: str, folder: Path) -> Iterator[Makes]:
    """Give what makes a process's saver, each on a connection of its own to the same threads."""
    memory = InMemorySaver()
    with ExitStack() as stack:
        url = stack.enter_context(database()) if kind == "postgres" else ""

        def make(**terms: Any) -> OrlaSaver:
            if kind == "sqlite":
                file = sqlite3.connect(folder / "threads.db", check_same_thread=False)
                return leased(SqliteSaver(stack.enter_context(contextlib.closing(file))), **terms)
            if kind == "postgres":
                saver = stack.enter_context(PostgresSaver.from_conn_string(url))
                saver.setup()
                return leased(saver, **terms)
            return leased(memory, store=folder / "state" / "leases.db", **terms)

        yield make


@asynccontextmanager
async def atwo(kind: str, folder: Path) -> AsyncIterator[Callable[..., Any]]:
    """As ``two``, for a loop."""
    memory = InMemorySaver()
    async with AsyncExitStack() as stack:
        url = stack.enter_context(database()) if kind == "postgres" else ""

        async def make(**terms: Any) -> OrlaSaver:
            if kind == "sqlite":
                opened = AsyncSqliteSaver.from_conn_string(str(folder / "threads.db"))
                return leased(await stack.enter_async_context(opened), **terms)
            if kind == "postgres":
                saver = await stack.enter_async_context(AsyncPostgresSaver.from_conn_string(url))
                await saver.setup()
                return leased(saver, **terms)
            return leased(memory, store=folder / "state" / "leases.db", **terms)

        yield make


KINDS = ["sqlite", "store", pytest.param("postgres", marks=HAS_POSTGRES)]
