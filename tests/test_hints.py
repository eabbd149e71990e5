"""Hints on their way: whichever way one is given, it orders the calls that wait; some reach those already waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import CallEvent, ChatOrla, Happening, Hints, Orla
from tests.conftest import at, chat
from tests.stub_engine import Gate, Reply, StubEngine

PATIENCE_S = 60.0
BUSY = "busy"


@pytest.fixture
def narrow(engine: StubEngine, make_orla: Any) -> Orla:
    """An Orla that lets one call go at a time, the most urgent first."""
    backend = at(engine, max_concurrency=1)
    made: Orla = make_orla(backend, mapper={"*": "main"}, stage_policy="priority", request_policy="priority")
    return made


class BusyPlace:
    """The place is taken by a call that does not end; meanwhile others come and wait, one after the other."""

    def __init__(self, engine: StubEngine, orla: Orla, pool: ThreadPoolExecutor) -> None:
        self._orla, self._pool, self._gate = orla, pool, Gate()
        self._running: list[Future[Any]] = []
        engine.rule = lambda seen: Reply(gate=self._gate) if BUSY in seen.last else None
        self._start(orla.wrap(one_node(engine)), BUSY)
        engine.wait(lambda e: e.in_flight == 1)

    def comes(self, graph: Any, name: str, **config: Any) -> None:
        waiting = self.waiting
        self._start(graph, name, **config)
        wait_until(lambda: self.waiting == waiting + 1)

    def _start(self, graph: Any, name: str, **config: Any) -> None:
        self._running.append(self._pool.submit(graph.invoke, {"messages": [("user", name)]}, config))

    @property
    def waiting(self) -> int:
        return self._orla.statistics().backends["main"].queue.waiting

    def opens(self) -> None:
        self._gate.open()
        for each in self._running:
            each.result(PATIENCE_S)


@contextmanager
def busy(engine: StubEngine, orla: Orla) -> Iterator[BusyPlace]:
    with ThreadPoolExecutor(12) as pool:
        place = BusyPlace(engine, orla, pool)
        try:
            yield place
        finally:
            place._gate.open()


def one_node(engine: StubEngine, **settings: Any) -> Any:
    llm = chat(engine)

    def ask(state: MessagesState) -> Any:
        return {"messages": [llm.invoke(state["messages"])]}

    return StateGraph(MessagesState).add_node("ask", ask, **settings).add_edge(START, "ask").compile()


def with_its_own(orla: Orla) -> Any:
    llm = ChatOrla(orla=orla, model="main")

    def ask(state: MessagesState) -> Any:
        return {"messages": [llm.invoke(state["messages"], priority=8)]}

    return StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask").compile()


def wait_until(true: Any) -> None:
    tick = threading.Event()
    for _ in range(2000):
        if true():
            return
        tick.wait(0.01)
    raise AssertionError("it did not happen")


def asked(engine: StubEngine) -> list[str]:
    return [seen.last for seen in engine.chats if BUSY not in seen.last]


@pytest.mark.parametrize("way", ["metadata", "configurable", "configurable, made", "function", "call"])
def test_what_is_said_beforehand_orders_who_waits(engine: StubEngine, narrow: Orla, way: str) -> None:
    plain = narrow.wrap(one_node(engine))
    urgent, config = plain, {}
    if way == "metadata":
        urgent = narrow.wrap(one_node(engine, metadata={"orla": {"priority": 8}}))
    if way == "configurable":
        config = {"configurable": {"orla": {"priority": 8}}}
    if way == "configurable, made":
        config = {"configurable": {"orla": Hints(priority=8)}}
    if way == "function":
        urgent = narrow.wrap(one_node(engine), hints=lambda stage, state: Hints(priority=8))
    if way == "call":
        urgent = narrow.wrap(with_its_own(narrow))
    with busy(engine, narrow) as place:
        place.comes(plain, "first")
        place.comes(urgent, "second", **config)
        place.comes(plain, "third")
        place.opens()
    assert asked(engine) == ["second", "first", "third"]


@pytest.mark.parametrize("how", ["in code", "in orla.toml"])
def test_one_policy_orders_the_calls_of_one_stage_too(
    engine: StubEngine, make_orla: Any, tmp_path: Path, how: str
) -> None:
    """The README's hints: a call is urgent if its text says so, and all calls are of one stage."""
    if how == "in code":
        orla: Orla = make_orla(at(engine, max_concurrency=1), mapper={"*": "main"}, policy="priority")
    else:
        (tmp_path / "orla.toml").write_text(
            f'policy = "priority"\n[backends.main]\nurl = "{engine.url}"\nmax_concurrency = 1\n'
            '[mapping]\n"*" = "main"\n'
        )
        orla = Orla.from_config(tmp_path / "orla.toml")
    graph = orla.wrap(
        one_node(engine),
        hints=lambda stage, state: Hints(priority=8 if "refund" in state["messages"][0].content else 5),
    )
    with busy(engine, orla) as place:
        for nth in range(8):
            place.comes(graph, f"{'refund' if nth > 5 else 'router'} {nth}")
        place.opens()
    served = [record.priority for record in orla.records() if record.stage == "ask"][1:]
    assert served == [8, 8, 5, 5, 5, 5, 5, 5]
    orla.close()


def runs_by_question(orla: Orla) -> list[str]:
    """Return a list that fills with the runs whose call is queued, in order."""
    runs: list[str] = []

    def hear(event: CallEvent) -> None:
        if event.kind is Happening.QUEUED and event.run is not None:
            runs.append(event.run)

    orla.subscribe(hear)
    return runs


def test_from_outside_it_reaches_calls_that_wait(engine: StubEngine, narrow: Orla) -> None:
    runs, graph = runs_by_question(narrow), narrow.wrap(one_node(engine))
    with busy(engine, narrow) as place:
        for name in ("first", "second", "third", "fourth"):
            place.comes(graph, name)
        waiting = runs[-4:]
        assert narrow.prioritize(waiting[2], 8) and narrow.prioritize(waiting[0], -1)
        assert narrow.prioritize(waiting[2], 1) and narrow.prioritize(waiting[3], 5)
        place.opens()
    assert asked(engine) == ["fourth", "third", "second", "first"]
    assert not narrow.prioritize(waiting[0], 8), "its run is over"


def test_inside_a_node_it_reaches_the_runs_other_branch(engine: StubEngine, narrow: Orla) -> None:
    llm, decided = chat(engine), threading.Event()

    def ask(state: MessagesState) -> Any:
        return {"messages": [llm.invoke(state["messages"])]}

    def decide(state: MessagesState) -> Any:
        assert decided.wait(PATIENCE_S)
        assert narrow.prioritize(None, 8), "the running node's run"
        return {}

    two = StateGraph(MessagesState).add_node("ask", ask).add_node("decide", decide)
    branching = narrow.wrap(two.add_edge(START, "ask").add_edge(START, "decide").compile())
    with busy(engine, narrow) as place:
        place.comes(narrow.wrap(one_node(engine)), "first")
        place.comes(branching, "second")
        decided.set()
        book = narrow.core.serving.book
        wait_until(lambda: any(run.priority == 8 for run in list(book._runs.values())))
        place.opens()
    assert asked(engine) == ["second", "first"]


def test_what_the_call_says_stays_when_the_run_is_prioritized(engine: StubEngine, narrow: Orla) -> None:
    runs = runs_by_question(narrow)
    with busy(engine, narrow) as place:
        place.comes(narrow.wrap(with_its_own(narrow)), "first")
        place.comes(narrow.wrap(one_node(engine)), "second")
        assert narrow.prioritize(runs[-2], -5) and narrow.prioritize(runs[-1], 5)
        place.opens()
    assert asked(engine) == ["first", "second"]


def test_calls_to_come_have_it_too(engine: StubEngine, narrow: Orla) -> None:
    llm = chat(engine)

    def ask(state: MessagesState) -> Any:
        assert narrow.prioritize(None, 8)
        return {"messages": [llm.invoke(state["messages"])]}

    graph = StateGraph(MessagesState).add_node("a", ask).add_node("b", ask)
    narrow.wrap(graph.add_edge(START, "a").add_edge("a", "b").compile()).invoke({"messages": [("user", "hello")]})
    assert [record.priority for record in narrow.records()] == [8, 8]


# Caches


def two_nodes(llm: Any, *, metadata: dict[str, Any] | None = None, **said: Any) -> Any:
    """A run of two calls; what is said is said of the first, or with the second if *metadata* names it."""

    def first(state: MessagesState) -> Any:
        return {"messages": [llm.invoke(state["messages"], **said)]}

    def second(state: MessagesState) -> Any:
        return {"messages": [llm.invoke(state["messages"])]}

    known = metadata or {}
    graph = StateGraph(MessagesState).add_node("first", first, metadata=known.get("first"))
    graph.add_node("second", second, metadata=known.get("second"))
    return graph.add_edge(START, "first").add_edge("first", "second").compile(checkpointer=InMemorySaver())


def asked_after_each(orla: Orla, graph: Any, said: dict[str, Any] | None = None) -> dict[str, tuple[str, ...]]:
    config = {"configurable": {"thread_id": "t", **(said or {})}}
    graph.invoke({"messages": [("user", "a long story " * 100)]}, config)
    return {record.stage: record.cache_orders for record in orla.records()}


@pytest.mark.parametrize("way", ["metadata", "configurable", "function", "call"])
@pytest.mark.parametrize(
    ("cache", "asked"), [("flush", ("flush:unsupported",)), ("preserve", ("pin:unsupported",)), ("auto", ())]
)
def test_whichever_way_it_is_said_what_becomes_of_a_stages_cache(
    engine: StubEngine, make_orla: Any, way: str, cache: str, asked: tuple[str, ...]
) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"})
    llm, config, more, said = ChatOrla(orla=orla, model="main"), {}, {}, {}
    metadata = None
    if way == "metadata":
        metadata = {"first": {"orla": {"cache": cache}}}
    if way == "configurable":
        config = {"orla": {"cache": cache}}
    if way == "function":
        more = {"hints": lambda stage, state: Hints(cache=cache) if stage == "first" else None}  # type: ignore[arg-type]
    if way == "call":
        said = {"cache": cache}
    graph = orla.wrap(two_nodes(llm, metadata=metadata, **said), **more)
    assert asked_after_each(orla, graph, config)["first"] == asked


def test_what_is_said_with_the_call_wins(engine: StubEngine, make_orla: Any) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"})
    llm = ChatOrla(orla=orla, model="main")
    graph = orla.wrap(two_nodes(llm, metadata={"first": {"orla": {"cache": "flush"}}}, cache="auto"))
    assert asked_after_each(orla, graph)["first"] == ()


@pytest.mark.parametrize(
    ("memory", "cache", "asked"),
    [
        ("flush_at_boundary", "auto", ("flush:unsupported", "release:unsupported")),
        ("flush_at_boundary", "preserve", ("release:unsupported",)),
        ("default", "auto", ("release:unsupported",)),
    ],
)
def test_preserve_keeps_what_lies_on_the_backend_that_is_left(
    engine: StubEngine, make_orla: Any, memory: str, cache: str, asked: tuple[str, ...]
) -> None:
    mapper = {"first": "light", "second": "heavy"}
    orla = make_orla(at(engine, "light"), at(engine, "heavy"), mapper=mapper, memory=memory)
    graph = orla.wrap(two_nodes(chat(engine), metadata={"second": {"orla": {"cache": cache}}}))
    assert asked_after_each(orla, graph)["first"] == asked, "the thread is idle then, so it is released"


def test_a_flushed_stage_leaves_nothing_in_its_slot(engine: StubEngine, make_orla: Any) -> None:
    found = {}
    for cache in ("auto", "flush"):
        with StubEngine(slots=1) as seated:
            orla = make_orla(at(seated, engine="llamacpp"), mapper={"*": "main"})
            graph = orla.wrap(two_nodes(chat(seated), metadata={"first": {"orla": {"cache": cache}}}))
            orders = asked_after_each(orla, graph)
            found[cache] = orla.records()[1].cached_tokens
            assert any(order.startswith("flush:") for order in orders["first"]) == (cache == "flush")
    assert found["auto"] > 0 and found["flush"] == 0
