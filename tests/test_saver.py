"""OrlaSaver is its inner saver, and tells what it hears."""

from __future__ import annotations

import copy
import gc
import inspect
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, TypedDict
from unittest.mock import AsyncMock, Mock

import pytest
import wrapt
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, empty_checkpoint
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import START, StateGraph
from langgraph.pregel._checkpoint import put_writes_accepts_task_path

from orla_lg.errors import ConfigError
from orla_lg.graph import saver as module
from orla_lg.graph.saver import OrlaSaver

Saver = BaseCheckpointSaver[Any]


class Told:
    """Notes every signal."""

    def __init__(self) -> None:
        self.deleted: list[str] = []
        self.next: list[tuple[str | None, str, list[str]]] = []

    def thread_deleted(self, thread_id: str) -> None:
        self.deleted.append(thread_id)

    def stages_next(self, thread_id: str | None, checkpoint_ns: str, stages: Sequence[str]) -> None:
        self.next.append((thread_id, checkpoint_ns, list(stages)))


class SyncOnly(BaseCheckpointSaver[str]):
    """Overrides some sync methods; its put_writes is from before task_path."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = InMemorySaver()

    def get_tuple(self, config: RunnableConfig) -> Any:
        return self.memory.get_tuple(config)

    def list(self, config: RunnableConfig | None, **keys: Any) -> Iterator[Any]:
        return self.memory.list(config, **keys)

    def put(self, *args: Any) -> RunnableConfig:
        return self.memory.put(*args)

    def put_writes(self, config: Any, writes: Any, task_id: str) -> None:  # type: ignore[override]
        self.memory.put_writes(config, writes, task_id)


class AsyncOnly(BaseCheckpointSaver[str]):
    """Overrides async methods only, and no deletion."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = InMemorySaver()

    async def aget_tuple(self, config: RunnableConfig) -> Any:
        return self.memory.get_tuple(config)

    async def alist(self, config: RunnableConfig | None, **keys: Any) -> AsyncIterator[Any]:
        for found in self.memory.list(config, **keys):
            yield found

    async def aput(self, *args: Any) -> RunnableConfig:
        return self.memory.put(*args)

    async def aput_writes(self, config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
        self.memory.put_writes(config, writes, task_id, task_path)


class Pruning(InMemorySaver):
    """Prunes, in both forms, and notes it."""

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        self.storage["pruned"] = {strategy: list(thread_ids)}  # type: ignore[dict-item]

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        self.prune(thread_ids, strategy=strategy)


class Opened(SyncOnly):
    """A context manager that yields another saver than itself, and swallows KeyError."""

    def __enter__(self) -> SyncOnly:
        return SyncOnly()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        return kind is KeyError

    async def __aenter__(self) -> str:
        return "no saver"

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> bool:
        return kind is KeyError


@pytest.fixture
def told() -> Told:
    return Told()


def where(ns: str = "") -> RunnableConfig:
    return {"configurable": {"thread_id": "t", "checkpoint_ns": ns, "checkpoint_id": "1"}}


# ── the same object, seen from outside ───────────────────────────────────────────────────────────────


def test_everything_else_reaches_the_inner_saver(told: Told) -> None:
    inner: Any = InMemorySaver()
    saver: Any = OrlaSaver(told, inner=inner)
    assert isinstance(saver, OrlaSaver) and isinstance(saver, BaseCheckpointSaver)
    assert saver.serde is inner.serde and saver.config_specs == inner.config_specs
    assert saver.storage is inner.storage
    saver.storage, saver.serde = "other storage", "other serde"
    assert vars(inner)["storage"] == "other storage" and vars(inner)["serde"] == "other serde"
    del saver.storage
    assert not hasattr(inner, "storage") and not hasattr(saver, "storage")
    assert not hasattr(object.__new__(type(saver)), "storage")  # a bare instance says so, and does not recurse
    assert repr(saver) == f"OrlaSaver(inner={inner!r})" and type(saver).__name__ == "OrlaSaver[InMemorySaver]"


def test_versions_are_the_inner_savers(told: Told) -> None:
    assert OrlaSaver(told, inner=SyncOnly()).get_next_version(3, None) == 4
    version = OrlaSaver(told, inner=InMemorySaver()).get_next_version("00000000000000000000000000000003.1", None)
    assert isinstance(version, str) and version.startswith("00000000000000000000000000000004.")


def test_one_orla_makes_one_layer_and_two_make_two(told: Told) -> None:
    class Orla:
        signals = told

    once = OrlaSaver(Orla(), inner=InMemorySaver())
    assert OrlaSaver(told, inner=once) is once
    twice = OrlaSaver(other := Told(), inner=once)
    assert twice.inner is once and OrlaSaver(told, inner=twice) is twice
    twice.delete_thread("t")
    assert told.deleted == other.deleted == ["t"]


def test_a_wrong_inner_or_orla_is_named(told: Told) -> None:
    with pytest.raises(ConfigError, match=r"inner is '_GeneratorContextManager'.*pass what it yields"):
        OrlaSaver(told, inner=SqliteSaver.from_conn_string(":memory:"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"orla is 'object'.*thread_deleted and stages_next"):
        OrlaSaver(object(), inner=InMemorySaver())


def test_task_path_is_offered_only_where_the_inner_saver_takes_it(told: Told) -> None:
    assert put_writes_accepts_task_path(OrlaSaver(told, inner=InMemorySaver()).put_writes)
    assert put_writes_accepts_task_path(OrlaSaver(told, inner=InMemorySaver()).aput_writes)
    assert put_writes_accepts_task_path(OrlaSaver(told, inner=AsyncOnly()).aput_writes)
    assert not put_writes_accepts_task_path(OrlaSaver(told, inner=SyncOnly()).put_writes)


# ── copies and context managers ──────────────────────────────────────────────────────────────────────


def test_a_copy_tells_the_same_orla_and_a_pickle_is_the_inner_saver(told: Told) -> None:
    saver: Any = OrlaSaver(told, inner=InMemorySaver())
    shallow, deep = copy.copy(saver), copy.deepcopy(saver)
    assert type(shallow) is type(deep) is type(saver) and shallow.inner is not saver.inner
    assert shallow.storage is saver.storage and deep.storage is not saver.storage
    shallow.delete_thread("a")
    deep.delete_thread("b")
    assert told.deleted == ["a", "b"]
    bare = object.__new__(AsyncOnly)
    bare.memory = "a saver that can be pickled"  # type: ignore[assignment]
    loaded = pickle.loads(pickle.dumps(OrlaSaver(told, inner=bare)))
    assert type(loaded) is AsyncOnly and loaded.memory == bare.memory


def test_with_allowlist_clones_the_inner_saver_and_tells_the_same_orla(told: Told) -> None:
    strict = JsonPlusSerializer(allowed_msgpack_modules=None)
    saver: Any = OrlaSaver(told, inner=InMemorySaver(serde=strict))
    clone = saver.with_allowlist({("orders", "Order")})
    assert isinstance(clone, OrlaSaver) and clone is not saver and saver.serde is strict is not clone.serde
    assert clone.storage is saver.storage
    clone.delete_thread("t")
    assert told.deleted == ["t"]
    permissive = OrlaSaver(told, inner=InMemorySaver())
    assert permissive.with_allowlist({("orders", "Order")}) is permissive  # as the inner one answers


STRICT = """
import dataclasses, operator
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import StateGraph
from langgraph._internal import _serde
from orla_lg.graph.saver import OrlaSaver

assert _serde.STRICT_MSGPACK_ENABLED

@dataclasses.dataclass
class Order: n: int
@dataclasses.dataclass
class State: order: Order

class Told:
    def thread_deleted(self, thread_id): print("deleted", thread_id)
    def stages_next(self, thread_id, ns, stages): print("next", thread_id, stages)

for wrap in (lambda saver: saver, lambda saver: OrlaSaver(Told(), inner=saver)):
    builder = StateGraph(State).add_node("one", lambda s: {"order": Order(s.order.n + 1)})
    graph = builder.add_edge("__start__", "one").compile(checkpointer=(saver := wrap(InMemorySaver())))
    config = {"configurable": {"thread_id": "t"}}
    print(graph.invoke({"order": Order(1)}, config, durability="sync"))
    print(graph.get_state(config).values, saver.get_tuple(config).checkpoint["channel_values"]["order"])
    graph.checkpointer.delete_thread("t")
"""


def test_strict_msgpack_gives_what_it_gives_without_us() -> None:
    # In a process of its own: LangGraph reads the variable once, when it is imported.
    environment = os.environ | {"LANGGRAPH_STRICT_MSGPACK": "true", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", STRICT], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    bare_result, bare_state, *signals = run.stdout.splitlines()
    assert signals == ["next t ['one']", bare_result, bare_state, "deleted t"]
    assert "Order(n=2)" in bare_state and "{'order'" in bare_state


async def test_context_managers_are_the_inner_savers(told: Told) -> None:
    memory: Any = OrlaSaver(told, inner=InMemorySaver())
    with memory as entered:
        assert entered is memory
    async with memory as entered:
        assert entered is memory
    opened: Any = OrlaSaver(told, inner=Opened())
    with opened as entered:
        assert type(entered.inner) is SyncOnly and OrlaSaver(told, inner=entered) is entered
        raise KeyError("swallowed, as the inner saver would")
    async with opened as entered:
        assert entered == "no saver"
        raise KeyError("swallowed too")
    with pytest.raises(ValueError, match="not swallowed"):
        with opened:
            raise ValueError("not swallowed")


# ── signals ──────────────────────────────────────────────────────────────────────────────────────────

WRITES = [("branch:to:b", None), ("messages", 1), ("branch:to:c", None), ("branch:to:b", None), ("join:b", 0)]


async def test_writes_tell_the_next_stages_once_sync_and_async(told: Told) -> None:
    saver = OrlaSaver(told, inner=InMemorySaver())  # its async methods call their sync twins
    saver.put_writes(where(), WRITES, "task", "path")
    await saver.aput_writes(config=where(ns="sub:1"), writes=WRITES, task_id="task")
    saver.put_writes(where(), [("messages", 1), ("__interrupt__", "?"), ("__no_writes__", None)], "task")
    with pytest.raises(KeyError):
        saver.put_writes({"configurable": {}}, WRITES, "task")
    assert told.next == [("t", "", ["b", "c"]), ("t", "sub:1", ["b", "c"]), (None, "", ["b", "c"])]


async def test_a_deleted_thread_is_told_once_and_only_if_it_was_deleted(told: Told) -> None:
    saver = OrlaSaver(told, inner=InMemorySaver())
    saver.delete_thread("a")
    await saver.adelete_thread(thread_id="b")
    refusing = OrlaSaver(told, inner=SyncOnly())
    with pytest.raises(NotImplementedError):
        refusing.delete_thread("c")
    failing: Any = OrlaSaver(told, inner=InMemorySaver())
    failing.storage = None
    with pytest.raises(TypeError):
        failing.delete_thread("d")
    with pytest.raises(TypeError):
        await failing.adelete_thread("e")
    assert told.deleted == ["a", "b"]


async def test_pruning_everything_deletes_threads(told: Told) -> None:
    saver = OrlaSaver(told, inner=Pruning())
    saver.prune(["a", "b"], strategy="delete")
    saver.prune(["c"])
    await saver.aprune(["d"], strategy="delete")
    await saver.aprune(["e"], strategy="keep_latest")
    assert told.deleted == ["a", "b", "d"]


async def test_sync_calls_of_an_async_saver_tell_once(told: Told) -> None:
    async with AsyncSqliteSaver.from_conn_string(":memory:") as inner:
        saver = OrlaSaver(told, inner=inner)
        config = await saver.aput(where(), empty_checkpoint(), {"step": 0}, {})
        loop = inner.loop
        await loop.run_in_executor(None, saver.put_writes, config, WRITES, "task")
        await loop.run_in_executor(None, saver.delete_thread, "t")
    assert told.next == [("t", "", ["b", "c"])] and told.deleted == ["t"]


async def test_a_failing_signal_is_logged_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        raised: BaseException = RuntimeError("a fault of ours")

        def thread_deleted(self, thread_id: str) -> None:
            raise self.raised

        stages_next = thread_deleted  # and this one does not even take its arguments

    saver: Any = OrlaSaver(broken := Broken(), inner=InMemorySaver())
    saver.put_writes(where(), WRITES, "task")
    await saver.aput_writes(where(), WRITES, "other task")
    assert len(saver.writes[("t", "", "1")]) == 2 * len(WRITES)
    saver.delete_thread("t")
    assert not saver.writes and [r.levelname for r in caplog.records] == ["WARNING"] * 3
    assert "a fault of ours" in caplog.text
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        saver.put_writes(where(), WRITES)  # a wrong call fails as it does without us
    broken.raised = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        saver.delete_thread("t")


# ── savers that are only half there ──────────────────────────────────────────────────────────────────


class State(TypedDict):
    n: int


def counting(saver: Saver) -> Any:
    graph = StateGraph(State).add_node("one", lambda state: {"n": state["n"] + 1})
    return graph.add_edge(START, "one").compile(checkpointer=saver)


@pytest.mark.parametrize("wrapped", [True, False])
async def test_a_saver_with_one_half_has_that_half(told: Told, wrapped: bool) -> None:
    config: RunnableConfig = {"configurable": {"thread_id": "t"}}
    halves: list[Saver] = [SyncOnly(), AsyncOnly()]
    only_sync, only_async = (counting(OrlaSaver(told, inner=half) if wrapped else half) for half in halves)
    assert only_sync.invoke({"n": 1}, config) == await only_async.ainvoke({"n": 1}, config) == {"n": 2}
    assert len(list(only_sync.get_state_history(config))) == 3
    assert len([state async for state in only_async.aget_state_history(config)]) == 3
    with pytest.raises(NotImplementedError):
        await only_sync.ainvoke({"n": 1}, config)
    with pytest.raises(NotImplementedError):
        only_async.invoke({"n": 1}, config)
    assert told.next == ([("t", "", ["one"])] * 2 if wrapped else [])


# ── savers whose instance answers, not their class ───────────────────────────────────────────────────


class Delegating(BaseCheckpointSaver[str]):
    """Overrides one method and hands everything else to another saver, as one of LangGraph's tests does."""

    def __init__(self) -> None:
        self.saver = InMemorySaver()

    def __getattribute__(self, name: str) -> Any:
        if name in ("saver", "__class__", "get_tuple"):
            return object.__getattribute__(self, name)
        return getattr(self.saver, name)

    def get_tuple(self, config: RunnableConfig) -> Any:
        found = self.saver.get_tuple(config)
        return found._replace(metadata={**found.metadata, "migrated": True}) if found else None


class Proxy:
    """Stands for a saver: isinstance believes it, its type knows nothing."""

    def __init__(self, saver: Saver) -> None:
        self._saver = saver

    @property
    def __class__(self) -> Any:
        return type(self._saver)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._saver, name)


def with_methods_of_its_own() -> Saver:
    """Return a saver of the base class, whose methods were all set on the instance."""
    saver: Any = BaseCheckpointSaver()
    memory = saver.memory = InMemorySaver()
    for name, method in inspect.getmembers(memory, inspect.ismethod):
        if not name.startswith("_") and method.__func__ is not getattr(BaseCheckpointSaver, name, None):
            setattr(saver, name, method)
    return saver  # type: ignore[no-any-return]


def decorated() -> Saver:
    """Return a saver with methods wrapped on the instance, as tracing libraries do."""
    saver: Any = InMemorySaver()
    for name in ("put", "aput", "put_writes", "aput_writes", "delete_thread", "adelete_thread"):
        setattr(
            saver,
            name,
            wrapt.decorator(lambda call, _instance, args, keys: call(*args, **keys))(getattr(saver, name)),
        )
    return saver  # type: ignore[no-any-return]


def has_signature(function: Any) -> bool:
    """Whether ``inspect`` can read one; Python 3.11.2 cannot of an ``AsyncMock``, so bare LangGraph fails there."""
    try:
        inspect.signature(function)
    except TypeError:
        return False
    return True


def mocked() -> Any:
    return Mock(spec=InMemorySaver, wraps=InMemorySaver())


KINDS: list[Any] = [
    Delegating,
    with_methods_of_its_own,
    decorated,
    lambda: wrapt.ObjectProxy(InMemorySaver()),
    lambda: wrapt.ObjectProxy(Delegating()),
    lambda: Proxy(InMemorySaver()),
    pytest.param(
        mocked,
        marks=pytest.mark.skipif(not has_signature(AsyncMock()), reason="this Python reads no AsyncMock's signature"),
    ),
]
NAMES = ["delegating", "methods set", "decorated", "wrapt", "wrapt of delegating", "proxy", "mock"]
of_each_kind = pytest.mark.parametrize("kind", KINDS, ids=NAMES)


def story(saver: Any) -> list[Any]:
    graph = counting(saver)
    config: RunnableConfig = {"configurable": {"thread_id": "t"}}
    lines = [graph.invoke({"n": 1}, config, durability="sync"), graph.update_state(config, {"n": 7}, as_node="one")]
    history = list(graph.get_state_history(config))
    lines = [lines[0], [(at.values, at.next, sorted(at.metadata)) for at in history]]
    lines += [sorted(graph.get_state(config).metadata or {})]
    graph.checkpointer.delete_thread("t")
    return [*lines, graph.get_state(config).values]


async def astory(saver: Any) -> list[Any]:
    graph = counting(saver)
    config: RunnableConfig = {"configurable": {"thread_id": "t"}}
    lines = [await graph.ainvoke({"n": 1}, config, durability="sync")]
    lines += [[(at.values, at.next, sorted(at.metadata)) async for at in graph.aget_state_history(config)]]
    await graph.checkpointer.adelete_thread("t")
    return [*lines, (await graph.aget_state(config)).values]


@of_each_kind
async def test_a_saver_whose_instance_answers_works_as_bare(told: Told, kind: Callable[[], Any]) -> None:
    bare, abare = story(kind()), await astory(kind())
    assert bare[0] == abare[0] == {"n": 2} and bare[-1] == abare[-1] == {}
    assert story(OrlaSaver(told, kind())) == bare
    assert await astory(OrlaSaver(told, kind())) == abare
    assert told.next == [("t", "", ["one"])] * 2 and told.deleted == ["t"] * 2


@of_each_kind
def test_its_class_shows_what_the_instance_answers(told: Told, kind: Callable[[], Any]) -> None:
    shown, memory = type(OrlaSaver(told, kind())), InMemorySaver()
    for name, base in inspect.getmembers(BaseCheckpointSaver, inspect.isfunction):
        if name.startswith("_") or name == "with_allowlist" or (kind is mocked and hasattr(Mock(), name)):
            continue  # a mock answers everything
        assert (getattr(shown, name) is base) == (getattr(type(memory), name) is base), name


@of_each_kind
def test_its_signatures_are_the_instances(told: Told, kind: Callable[[], Any]) -> None:
    inner = kind()
    saver = OrlaSaver(told, inner)
    for name in ("put", "put_writes", "aput_writes", "delete_thread", "get_next_version"):
        assert inspect.signature(getattr(saver, name)) == inspect.signature(getattr(inner, name)), name
        assert inspect.iscoroutinefunction(getattr(saver, name)) == inspect.iscoroutinefunction(getattr(inner, name))


def test_task_path_is_asked_of_the_instance(told: Told) -> None:
    saver: Any = InMemorySaver()
    put_writes, given = saver.put_writes, []

    def older(config: Any, writes: Any, task_id: str) -> None:
        given.append(task_id)
        put_writes(config, writes, task_id)

    saver.put_writes = older
    wrapped = OrlaSaver(told, saver)
    assert not put_writes_accepts_task_path(wrapped.put_writes)
    assert counting(wrapped).invoke({"n": 1}, {"configurable": {"thread_id": "t"}}) == {"n": 2} and given
    assert put_writes_accepts_task_path(OrlaSaver(told, InMemorySaver()).put_writes)  # of the same class


def test_a_method_set_after_wrapping_is_used(told: Told) -> None:
    inner: Any = SyncOnly()
    saver = OrlaSaver(told, inner)
    with pytest.raises(NotImplementedError):
        saver.delete_thread("a")
    inner.delete_thread = inner.memory.delete_thread
    saver.delete_thread("b")
    saver.put = Mock(return_value="set through the wrapper")  # type: ignore[method-assign]
    assert saver.put(where(), empty_checkpoint(), {}, {}) == inner.put() == "set through the wrapper"  # type: ignore[comparison-overlap]
    assert told.deleted == ["b"]


def test_a_method_called_on_the_class_is_the_instances(told: Told) -> None:
    saver = OrlaSaver(told, with_methods_of_its_own())
    config = type(saver).put(saver, where(), empty_checkpoint(), {}, {})
    assert type(saver).get_tuple(saver, config) and BaseCheckpointSaver.get(saver, config)
    type(saver).delete_thread(saver, "t")
    assert told.deleted == ["t"]


def test_a_delegate_that_is_not_there_yet_is_asked_when_it_is_used(told: Told) -> None:
    class Lazy(Proxy):
        def __getattr__(self, name: str) -> Any:
            if not connected:
                raise ConnectionError("not connected yet")
            return super().__getattr__(name)

    connected: list[bool] = []
    saver: Any = OrlaSaver(told, Lazy(InMemorySaver()))  # type: ignore[arg-type]
    with pytest.raises(ConnectionError, match="not connected yet"):
        saver.put_writes(where(), WRITES, "task")
    connected.append(True)
    assert story(saver)[0] == {"n": 2} and told.deleted == ["t"]


def test_the_classes_are_shared_and_hold_no_saver(told: Told) -> None:
    known = module._class_around.cache_info().currsize
    inners = [with_methods_of_its_own() for _ in range(50)]
    savers = [OrlaSaver(told, inner) for inner in inners]
    assert len({type(saver) for saver in savers}) == 1
    assert module._class_around.cache_info().currsize <= known + 1
    freed = [weakref.ref(inner) for inner in inners]
    del savers, inners
    gc.collect()
    assert not any(ref() for ref in freed)
