"""OrlaSaver beside the savers it wraps: the official suite, every method, and a real graph give the same.

PostgreSQL is real: ``ORLA_TEST_POSTGRES_URL`` names a server where databases may be created.
"""

from __future__ import annotations

import inspect
import operator
import os
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Annotated, Any, TypedDict

import psycopg
import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, empty_checkpoint
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.conformance.capabilities import DetectedCapabilities
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, interrupt

from orla_lg.graph.saver import OrlaSaver
from tests.test_saver import KINDS, NAMES

Saver = BaseCheckpointSaver[Any]
Opens = Callable[[], AbstractAsyncContextManager[Saver]]


class Told:
    """Notes every signal."""

    def __init__(self) -> None:
        self.deleted: list[str] = []
        self.next: list[tuple[str | None, str, list[str]]] = []

    def thread_deleted(self, thread_id: str) -> None:
        self.deleted.append(thread_id)

    def stages_next(self, thread_id: str | None, checkpoint_ns: str, stages: Sequence[str]) -> None:
        self.next.append((thread_id, checkpoint_ns, list(stages)))


@pytest.fixture
def told() -> Told:
    return Told()


# ── real savers, each on an empty store ──────────────────────────────────────────────────────────────


@contextmanager
def database() -> Iterator[str]:
    """Create a database for one saver and drop it afterwards; yields its URL."""
    server = os.environ.get("ORLA_TEST_POSTGRES_URL")
    if not server:
        pytest.skip(
            "needs PostgreSQL: set ORLA_TEST_POSTGRES_URL to postgresql://user@host:port/database "
            'of a user who may create databases, or run: eval "$(.ci/postgres.sh start)"'
        )
    name = f"orla_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        try:
            yield psycopg.conninfo.make_conninfo(server, dbname=name)
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@asynccontextmanager
async def memory() -> AsyncIterator[Saver]:
    yield InMemorySaver()


@asynccontextmanager
async def sqlite() -> AsyncIterator[Saver]:
    with SqliteSaver.from_conn_string(":memory:") as saver:
        yield saver


@asynccontextmanager
async def async_sqlite() -> AsyncIterator[Saver]:
    async with AsyncSqliteSaver.from_conn_string(":memory:") as saver:
        yield saver


@asynccontextmanager
async def postgres() -> AsyncIterator[Saver]:
    with database() as url, PostgresSaver.from_conn_string(url) as saver:
        saver.setup()
        yield saver


@asynccontextmanager
async def async_postgres() -> AsyncIterator[Saver]:
    with database() as url:
        async with AsyncPostgresSaver.from_conn_string(url) as saver:
            await saver.setup()
            yield saver


# ── the official suite ───────────────────────────────────────────────────────────────────────────────


async def scores(opens: Opens, wrap: Callable[[Saver], Saver]) -> dict[str, tuple[bool, int]]:
    """Run the suite and return, for each capability, whether it was detected and how many tests passed."""

    @checkpointer_test(name="saver")
    async def factory() -> AsyncIterator[Saver]:
        async with opens() as saver:
            yield wrap(saver)

    report = await validate(factory)
    assert report.passed_all() and report.passed_all_base(), report.to_dict()
    return {name: (result.detected, result.tests_passed) for name, result in report.results.items()}


@pytest.mark.parametrize("opens", [memory, async_sqlite, async_postgres])
async def test_the_suite_gives_full_marks_and_the_inner_savers_score(opens: Opens) -> None:
    wrapped = await scores(opens, lambda saver: OrlaSaver(Told(), inner=saver))
    assert wrapped == await scores(opens, lambda saver: saver)
    assert wrapped["put"][0] and wrapped["put"][1] > 0


# Not the mock: it takes calls of the optional methods too, which InMemorySaver then refuses.
@pytest.mark.parametrize("kind", KINDS[:-1], ids=NAMES[:-1])
async def test_the_suite_gives_full_marks_where_the_instance_answers(kind: Callable[[], Saver]) -> None:
    @asynccontextmanager
    async def opens() -> AsyncIterator[Saver]:
        yield kind()

    wrapped = await scores(opens, lambda saver: OrlaSaver(Told(), inner=saver))
    assert wrapped == await scores(memory, lambda saver: saver)


class Half(BaseCheckpointSaver[str]):
    """Overrides only some methods, some of them in one form."""

    def get_tuple(self, config: Any) -> None: ...

    async def aput_writes(self, *task_path_is_not_named: Any) -> None: ...

    async def aprune(self, thread_ids: Any, *, strategy: str = "keep_latest") -> None: ...

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None: ...


INNERS = [InMemorySaver, SqliteSaver, AsyncSqliteSaver, PostgresSaver, AsyncPostgresSaver, Half]


@pytest.mark.parametrize("inner_type", INNERS)
def test_the_class_overrides_what_the_inner_class_overrides(told: Told, inner_type: type[Saver]) -> None:
    saver = OrlaSaver(told, inner=(inner := object.__new__(inner_type)))
    assert DetectedCapabilities.from_instance(saver) == DetectedCapabilities.from_instance(inner)
    for name, base in inspect.getmembers(BaseCheckpointSaver, inspect.isfunction):
        if name.startswith("_") or name == "with_allowlist":
            continue
        ours, theirs = getattr(type(saver), name), getattr(inner_type, name)
        assert (ours is base) == (theirs is base), name
        assert inspect.signature(ours) == inspect.signature(theirs), name
    for name in ("__enter__", "__exit__", "__aenter__", "__aexit__"):
        assert hasattr(type(saver), name) == hasattr(inner_type, name)


# ── every method, one after the other ────────────────────────────────────────────────────────────────


def at(checkpoint_id: str | None = None, thread_id: str = "t") -> dict[str, Any]:
    keys = {"thread_id": thread_id, "checkpoint_ns": ""}
    return {"configurable": keys | ({"checkpoint_id": checkpoint_id} if checkpoint_id else {})}


def checkpoint(number: int) -> Any:
    known = {"id": f"0000000{number}", "ts": f"2026-01-0{number}", "channel_values": {"said": f"{number}"}}
    return empty_checkpoint() | known | {"channel_versions": {"said": f"{number}"}}


def metadata(step: int) -> Any:
    return {"source": "loop", "step": step, "run_id": f"run{step}"}


STEPS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("put", (at(), checkpoint(1), metadata(1), {"said": "1"}), {}),
    ("put_writes", (at("00000001"), [("said", "a"), ("branch:to:b", None)], "task2", "~b"), {}),
    ("put_writes", (at("00000001"), [("said", "b")], "task1"), {"task_path": "~a"}),
    ("put", (at("00000001"), checkpoint(2), metadata(2), {"said": "2"}), {}),
    ("put_writes", (at("00000002"), [("said", "c")], "task3"), {}),
    ("get", (at(),), {}),
    ("get_tuple", (at("00000001"),), {}),
    ("get_tuple", (at("nowhere"),), {}),
    ("list", (at(),), {}),
    ("list", (None,), {"filter": {"step": 2}, "before": at("00000003"), "limit": 1}),
    ("get_delta_channel_history", (), {"config": at(), "channels": ["said", "other"]}),
    ("copy_thread", ("t", "copy"), {}),
    ("delete_for_runs", (["run1"],), {}),
    ("prune", (["t"],), {"strategy": "keep_latest"}),
    ("list", (None,), {}),
    ("delete_thread", ("t",), {}),
    ("list", (None,), {}),
]


async def outcome(saver: Saver, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        result = getattr(saver, name)(*args, **kwargs)
        if inspect.isawaitable(result):
            return await result
        if hasattr(result, "__aiter__"):
            return [item async for item in result]
        return list(result) if hasattr(result, "__next__") else result
    except (NotImplementedError, ValueError) as refused:
        return type(refused)


async def transcript(saver: Saver, prefix: str) -> list[tuple[str, Any]]:
    return [(name, await outcome(saver, prefix + name, args, kwargs)) for name, args, kwargs in STEPS]


@pytest.mark.parametrize(
    ("opens", "prefix"),
    [(memory, ""), (memory, "a"), (sqlite, ""), (postgres, ""), (async_sqlite, "a"), (async_postgres, "a")],
)
async def test_every_method_answers_as_the_inner_one(told: Told, opens: Opens, prefix: str) -> None:
    async with opens() as inner:
        wrapped = await transcript(OrlaSaver(told, inner=inner), prefix)
    async with opens() as inner:
        assert wrapped == await transcript(inner, prefix)
    assert wrapped[5][1]["id"] == "00000002" and wrapped[-1][1] == []
    assert told.next == [("t", "", ["b"])] and told.deleted == ["t"]


def test_no_method_was_left_out() -> None:
    own_test = {"get_next_version", "with_allowlist"}
    called = {name for name, _, _ in STEPS}
    methods = [name for name, _ in inspect.getmembers(BaseCheckpointSaver, inspect.isfunction) if name[0] != "_"]
    assert called | {f"a{name}" for name in called} | own_test == set(methods)


# ── a real graph, side by side ───────────────────────────────────────────────────────────────────────


class State(TypedDict):
    said: Annotated[list[str], operator.add]


def build(saver: Saver) -> Any:
    """plan → (fast, asks) → work, which is a subgraph: parallel nodes, an interrupt, a namespace."""
    sub = StateGraph(State)
    sub.add_node("inner", lambda state: {"said": ["inner"]})
    sub.add_edge(START, "inner")
    graph = StateGraph(State)
    graph.add_node("plan", lambda state: {"said": ["plan"]})
    graph.add_node("fast", lambda state: {"said": ["fast"]})
    graph.add_node("asks", lambda state: {"said": [interrupt("sure?")]})
    graph.add_node("work", sub.compile())
    graph.add_edge(START, "plan")
    graph.add_conditional_edges("plan", lambda state: ["fast", "asks"], ["fast", "asks"])
    graph.add_edge("asks", "work")
    graph.add_edge("work", END)
    return graph.compile(checkpointer=saver)


def plain(values: dict[str, Any]) -> dict[str, Any]:
    # An interrupt's id is made of random ones: only its value can be compared.
    return values | {"__interrupt__": [i.value for i in values.get("__interrupt__", ())]}


def shown(snapshot: Any) -> Any:
    tasks = [(task.name, task.error, [i.value for i in task.interrupts]) for task in snapshot.tasks]
    seen = {key: snapshot.metadata.get(key) for key in ("source", "step")} if snapshot.metadata else None
    return snapshot.values, snapshot.next, tasks, seen, sorted(snapshot.config["configurable"])


def story(saver: Saver, thread_id: str = "t", **options: Any) -> list[Any]:
    graph = build(saver)
    config: RunnableConfig = {"configurable": {"thread_id": thread_id}}
    lines: list[Any] = []
    lines += [plain(v) for v in graph.stream({"said": ["go"]}, config, stream_mode="values", **options)]
    lines += [shown(graph.get_state(config)), graph.invoke(Command(resume="yes"), config, **options)]
    graph.update_state(config, {"said": ["edited"]}, as_node="asks")
    lines += [graph.invoke(None, config, **options), [shown(s) for s in graph.get_state_history(config)]]
    lines.append(len(list(saver.list(None, filter={"source": "update"}))))
    saver.delete_thread(thread_id)
    return [*lines, shown(graph.get_state(config)), list(saver.list(config))]


async def astory(saver: Saver, **options: Any) -> list[Any]:
    graph = build(saver)
    config: RunnableConfig = {"configurable": {"thread_id": "t"}}
    lines: list[Any] = [
        [plain(v) async for v in graph.astream({"said": ["go"]}, config, stream_mode="values", **options)],
        shown(await graph.aget_state(config)),
        await graph.ainvoke(Command(resume="yes"), config, **options),
    ]
    await graph.aupdate_state(config, {"said": ["edited"]}, as_node="asks")
    lines += [await graph.ainvoke(None, config, **options)]
    lines += [[shown(s) async for s in graph.aget_state_history(config)]]
    lines.append(len([found async for found in saver.alist(None, filter={"source": "update"})]))
    await saver.adelete_thread("t")
    return [*lines, shown(await graph.aget_state(config)), [found async for found in saver.alist(config)]]


DURABILITIES = pytest.mark.parametrize("durability", ["sync", "async", "exit"])


@DURABILITIES
def test_a_graph_tells_the_same_story(told: Told, durability: str) -> None:
    wrapped = story(OrlaSaver(told, inner=InMemorySaver()), durability=durability)
    assert wrapped == story(InMemorySaver(), durability=durability)
    assert told.deleted == ["t"]


@DURABILITIES
async def test_an_async_graph_tells_the_same_story(told: Told, durability: str) -> None:
    wrapped = await astory(OrlaSaver(told, inner=InMemorySaver()), durability=durability)
    assert wrapped == await astory(InMemorySaver(), durability=durability)
    async with AsyncSqliteSaver.from_conn_string(":memory:") as inner:
        assert wrapped == await astory(OrlaSaver(Told(), inner=inner), durability=durability)
    assert told.deleted == ["t"]


def test_a_graph_tells_its_stages_in_order(told: Told) -> None:
    story(OrlaSaver(told, inner=InMemorySaver()), durability="sync")
    stripped = [(thread_id, ns.split(":")[0], sorted(stages)) for thread_id, ns, stages in told.next]
    first_run = [("t", "", ["plan"]), ("t", "", ["asks", "fast"])]
    work = [("t", "", ["work"]), ("t", "work", ["inner"])]
    assert stripped == [*first_run, *work, *work]


def test_threads_share_a_saver(told: Told) -> None:
    saver, names = OrlaSaver(told, inner=InMemorySaver()), [f"t{n}" for n in range(8)]
    together = threading.Barrier(4)

    def run(name: str) -> Any:
        together.wait(timeout=60)
        return story(saver, name)[:6]

    with ThreadPoolExecutor(4) as pool:
        stories = list(pool.map(run, names))
    assert all(lines == stories[0] for lines in stories) and sorted(told.deleted) == names
    for name in names:
        stages = [stage for thread_id, _, stages in told.next if thread_id == name for stage in stages]
        assert sorted(stages) == ["asks", "fast", "inner", "inner", "plan", "work", "work"]
