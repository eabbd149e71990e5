"""Replicas of a real core, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Send, interrupt

from orla_lg import (
    BackendUnavailable,
    BudgetExceeded,
    ConfigError,
    Hints,
    Limit,
    Limits,
    MappingError,
    Orla,
    OrlaSaver,
    RecordUnknown,
    Stage,
    Workflow,
)  # fmt: skip
from orla_lg.core.identity import workflow_key
from orla_lg.core.memory.events import CacheAction, CacheEvent
from orla_lg.workflow.stage import CacheHint
from tests.conftest import BACKEND_KEY, at, chat
from tests.link.conftest import ENGINE_KEY, links
from tests.link.real import RealCore
from tests.link.scripted import eventually
from tests.link.test_calls import graph, hi
from tests.link.test_reconnect import Run, held
from tests.stub_engine import Reply, StubEngine

Made = Callable[..., tuple[RealCore, Orla]]


@pytest.fixture
def made(engine: StubEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    """Return a maker of a core and a replica of it."""
    monkeypatch.setenv(ENGINE_KEY, BACKEND_KEY)
    cores: list[RealCore] = []
    orlas: list[Orla] = []

    def make(*, remote: dict[str, Any] | None = None, backend: dict[str, Any] | None = None, **core: Any) -> Any:
        backends = core.pop("backends", None) or [at(engine, **(backend or {}))]
        envs = {each.name: ENGINE_KEY for each in backends}
        cores.append(RealCore(*backends, key_envs=envs, **core))
        orlas.append(Orla.remote(cores[-1].url, **(remote or {})))
        return cores[-1], orlas[-1]

    yield make
    try:
        for core in (each for each in cores if not each.killed):
            for scheduler in core.serving.schedulers.values():
                eventually(lambda scheduler=scheduler: not scheduler.queue.in_flight and not scheduler.queue.waiting)
            eventually(lambda core=core: not core.serving.book.open_runs())
            core.serving.check_integrity()
    finally:
        for orla in orlas:
            orla.close()
        for core in cores:
            core.__exit__()
    eventually(lambda: not links())


def test_a_graph_and_its_record_on_both_sides(made: Made, engine: StubEngine) -> None:
    core, orla = made()
    wrapped = orla.wrap(graph(engine))
    assert wrapped.invoke(hi())["messages"][-1].content
    (mine,) = orla.records()
    eventually(lambda: core.serving.records.total)
    (theirs,) = core.serving.records.records()
    assert theirs.id == mine.id
    for name in ("workflow", "run", "stage", "backend", "model", "mapper", "prompt_tokens", "completion_tokens",
                 "attempts", "error", "cache_action"):  # fmt: skip
        assert getattr(mine, name) == getattr(theirs, name), name
    assert orla.statistics().calls == 1
    assert orla.statistics().backends["main"].queue.granted == 1


def test_streams_hold_their_place_until_they_end(made: Made, engine: StubEngine) -> None:
    core, orla = made(backend={"max_concurrency": 1})
    wrapped = orla.wrap(graph(engine))
    engine.rule = lambda seen: Reply(text="one two three", token_s=0.02)

    async def run() -> list[str]:
        async def one() -> str:
            return "".join([str(m.content) async for m, _ in wrapped.astream(hi(), stream_mode="messages")])

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one()) for _ in range(4)]
        return [task.result() for task in tasks]

    assert asyncio.run(run()) == ["one two three"] * 4
    assert engine.peak == 1
    assert core.serving.schedulers["main"].queue.statistics().granted == 4


def test_tools_interrupts_fan_outs_and_savers(made: Made, engine: StubEngine) -> None:
    from langgraph.graph import END, START, MessagesState, StateGraph

    core, orla = made()
    llm = chat(engine)

    def plan(state: MessagesState) -> dict[str, Any]:
        return {"messages": [llm.invoke(state["messages"])]}

    def ask(state: MessagesState) -> dict[str, Any]:
        interrupt("go on?")
        return {}

    def work(state: MessagesState) -> dict[str, Any]:
        return {"messages": [llm.invoke(state["messages"])]}

    built = StateGraph(MessagesState).add_node("plan", plan).add_node("ask", ask).add_node("work", work)
    built.add_edge(START, "plan").add_edge("plan", "ask").add_edge("work", END)
    built.add_conditional_edges("ask", lambda state: [Send("work", state) for _ in range(5)])
    saver = OrlaSaver(orla, inner=InMemorySaver())
    wrapped = orla.wrap(built.compile(checkpointer=saver))
    config = {"configurable": {"thread_id": "t"}}
    wrapped.invoke(hi(), config)
    eventually(lambda: core.serving.book.statistics().outcomes.get("interrupted") == 1)
    from langgraph.types import Command

    wrapped.invoke(Command(resume="yes"), config)
    eventually(lambda: core.serving.records.total == 6)
    assert {record.stage for record in orla.records()} == {"plan", "work"}
    saver.delete_thread("t")
    eventually(lambda: not core.serving.book.statistics().idle)


def test_an_agent_with_a_tool(made: Made, engine: StubEngine) -> None:
    core, orla = made()

    @tool
    def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    orla.wrap(create_agent(chat(engine), [add])).invoke(hi())
    eventually(lambda: core.serving.records.total == len(orla.records()) > 0)


def test_the_mapping_of_a_graph_is_asked_here(made: Made, engine: StubEngine, other_engine: StubEngine) -> None:
    backends = [at(engine), at(other_engine, "other")]
    _, orla = made(backends=backends)
    seen: list[Any] = []

    class Own:
        def map(self, call: Any, backends: Any) -> Any:
            from orla_lg import Assignment

            seen.append([(each.name, each.resident_tokens, each.probe is not None) for each in backends])
            return Assignment("other", reason="own")

    wrapped = orla.wrap(graph(engine), mapper=Own())
    wrapped.invoke(hi())
    (record,) = orla.records()
    assert (record.backend, record.reason) == ("other", "own")
    assert [name for name, _, _ in seen[0]] == ["main", "other"]
    with pytest.raises(MappingError, match="nowhere"):
        orla.wrap(graph(engine), mapper={"*": "nowhere"})


def test_limits_of_a_graph_hold_at_the_core(made: Made, engine: StubEngine) -> None:
    core, orla = made()
    wrapped = orla.wrap(graph(engine), limits=Limits(stages={"a": Limit(calls=2)}))
    wrapped.invoke(hi())
    wrapped.invoke(hi())
    with pytest.raises(BudgetExceeded, match="graph"):
        wrapped.invoke(hi())
    other = Orla.remote(core.url)
    try:
        with pytest.raises(BudgetExceeded):
            other.wrap(graph(engine), limits=Limits(stages={"a": Limit(calls=2)})).invoke(hi())
    finally:
        other.close()
    with pytest.raises(BudgetExceeded):
        orla.wrap(graph(engine)).invoke(hi(), {"configurable": {"orla": {"limits": {"run": {"calls": 0}}}}})


def test_what_is_for_all_is_changed_at_the_core(made: Made, engine: StubEngine) -> None:
    core, orla = made()
    orla.limits = Limits(run=Limit(calls=7))
    assert core.serving.limits.shared.run == Limit(calls=7) and orla.limits.run == Limit(calls=7)
    orla.limits = Limits()
    orla.set_limit("main", max_concurrency=3)
    assert core.serving.schedulers["main"].queue.max_concurrency == 3
    orla.set_policy(policy="priority")
    with pytest.raises(ConfigError, match=r"unknown backend 'maim'.*did you mean"):
        orla.pause("maim")
    with pytest.raises(ConfigError, match="is an object"):
        from orla_lg.core.policies import Fcfs

        orla.set_policy(request_policy=Fcfs())
    with pytest.raises(ConfigError, match="configuration of `orla-lg serve`"):
        orla.variant("b", {"*": "main"})
    with pytest.raises(RecordUnknown):
        orla.feedback("nothing", 0.5)
    assert orla.drain("main", 0.5)
    run = Run(orla.wrap(graph(engine)))
    eventually(lambda: core.serving.schedulers["main"].queue.waiting)
    orla.resume("main")
    assert run.result()
    orla.feedback(orla.records()[-1].id, 1.0)
    assert asyncio.run(orla.adrain("main", 0.5))
    orla.resume("main")


def test_a_run_is_prioritized_and_looked_ahead(made: Made, engine: StubEngine) -> None:
    core, orla = made()
    wrapped = orla.wrap(graph(engine))
    with held(engine) as gate:
        run = Run(wrapped, {"configurable": {"thread_id": "t"}})
        eventually(lambda: engine.chats)
        assert orla.prioritize("t", 5.0)
        (state,) = core.serving.book.runs()
        assert state.priority == 5.0
        ahead = orla.ahead(state.id)
        assert ahead is not None
        assert orla.ahead("nothing") is None
        gate.open()
        run.result()
    assert not orla.prioritize("t", 5.0)


def test_a_cancelled_call_leaves_the_queue(made: Made, engine: StubEngine) -> None:
    core, orla = made(backend={"max_concurrency": 1})
    wrapped = orla.wrap(graph(engine))

    async def run() -> None:
        with held(engine) as gate:
            first = asyncio.ensure_future(wrapped.ainvoke(hi()))  # noqa: TID251 - cancelled below
            while not engine.chats:
                await asyncio.sleep(0.005)
            second = asyncio.ensure_future(wrapped.ainvoke(hi()))  # noqa: TID251
            queue = core.serving.schedulers["main"].queue
            while not queue.waiting:
                await asyncio.sleep(0.005)
            second.cancel()
            while queue.waiting:
                await asyncio.sleep(0.005)
            gate.open()
            await first

    asyncio.run(run())


def test_a_deadline_is_the_cores(made: Made, engine: StubEngine) -> None:
    from orla_lg import DeadlineExceeded

    _, orla = made(backend={"max_concurrency": 1})
    wrapped = orla.wrap(graph(engine))
    with held(engine) as gate:
        run = Run(wrapped)
        eventually(lambda: engine.chats)
        with pytest.raises(DeadlineExceeded, match="1 call in the queue there"):
            wrapped.invoke(hi(), {"configurable": {"orla": Hints(deadline_s=1.0)}})
        gate.open()
        run.result()


def test_the_next_core_adopts_and_goes_on(made: Made, engine: StubEngine) -> None:
    core, orla = made(backend={"max_concurrency": 1}, lease_s=1.5)
    wrapped = orla.wrap(graph(engine))
    with held(engine) as gate:
        at_engine, waiting = Run(wrapped), None
        eventually(lambda: engine.chats)
        waiting = Run(wrapped)
        eventually(lambda: core.serving.schedulers["main"].queue.waiting)
        core.kill()
        core.serving.close()
        with RealCore(*[s.backend for s in core.serving.schedulers.values()], store=core.store, port=core.port,
                      key_envs={"main": ENGINE_KEY}) as following:  # fmt: skip
            queue = following.serving.schedulers["main"].queue
            eventually(lambda: (queue.in_flight, queue.waiting) == (1, 1))
            gate.open()
            assert at_engine.result() and waiting.result()
            assert engine.peak == 1 and len(engine.chats) == 2
            eventually(lambda: following.serving.records.total == 2)
            eventually(lambda: not queue.in_flight)
            orla.close()


def test_no_engine_answers(made: Made, engine: StubEngine) -> None:
    _, orla = made()
    wrapped = orla.wrap(graph(engine))
    engine.refuse()
    with pytest.raises(BackendUnavailable, match=r"no engine answered at backend 'main'"):
        wrapped.invoke(hi())


class Heard:
    """A memory policy that remembers what it was asked about."""

    def __init__(self) -> None:
        self.events: list[CacheEvent] = []

    def decide(self, event: CacheEvent) -> Sequence[CacheAction]:
        self.events.append(event)
        return ()


def test_a_stage_that_flushes_says_so_to_the_core_when_it_is_done(made: Made) -> None:
    heard = Heard()
    core, orla = made(memory=heard)

    def run(cache: CacheHint) -> list[tuple[str, str | None]]:
        heard.events.clear()
        stage = Stage("only", "main", prompt=lambda upstream, given: "hello", cache=cache, hints=Hints(tenant="acme"))
        Workflow(orla).add_stage(stage).execute(None)
        eventually(lambda: not core.serving.book.open_runs())
        return [(event.workflow, event.backend) for event in heard.events if event.hint == "flush"]

    assert not run("auto")
    assert run("flush") == [(workflow_key(orla.records()[-1].workflow, "acme"), "main")]
