"""Limits in wrapped graphs: who is stopped, when, and that nothing stays set aside."""

from __future__ import annotations

import asyncio
import gc
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, TypedDict

import openai
import pytest
from langchain_core.runnables import RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command, RetryPolicy, Send, interrupt

from orla_lg import BudgetExceeded, ChatOrla, ConfigError, Cost, Happening, Limit, Limits, Orla, config
from orla_lg.core.limits.limits import NO_LIMITS
from orla_lg.core.limits.usage import NOTHING
from orla_lg.mappers import OneBitStageMapper
from tests.conftest import CALLER_KEY, at, chat
from tests.stub_engine import Gate, Reply, StubEngine
from tests.test_lifecycle import PATIENCE_S, Watch

HI: Any = {"messages": [("user", "hi")]}
MESSAGES: Any = [{"role": "user", "content": "hi"}]
MakeOrla = Callable[..., Orla]
Runner = Callable[..., Any]
BOTH = pytest.mark.parametrize(
    "invoke", [lambda graph, *rest: graph.invoke(*rest), lambda graph, *rest: asyncio.run(graph.ainvoke(*rest))],
    ids=["sync", "async"],
)  # fmt: skip


def chain(llm: Any, *stages: str, retry: RetryPolicy | None = None) -> Any:
    builder = StateGraph(MessagesState)
    for before, name in zip((START, *stages), stages, strict=False):

        def node(state: MessagesState) -> Any:
            return {"messages": [llm.invoke(state["messages"][:1])]}

        builder.add_node(name, node, retry_policy=retry)
        builder.add_edge(before, name)
    return builder


class Fan(TypedDict):
    answers: Annotated[list[str], operator.add]


def fan(llm: Any, width: int, caught: list[BudgetExceeded]) -> Any:
    """A graph whose branches call side by side, and go without an answer where they may not."""

    def spread(state: Fan) -> list[Send]:
        return [Send("branch", {"answers": []}) for _ in range(width)]

    def branch(state: Fan) -> Any:
        try:
            return {"answers": [llm.invoke("hi", max_tokens=5).content]}
        except BudgetExceeded as error:
            caught.append(error)
            return {"answers": []}

    async def abranch(state: Fan) -> Any:
        try:
            return {"answers": [(await llm.ainvoke("hi", max_tokens=5)).content]}
        except BudgetExceeded as error:
            caught.append(error)
            return {"answers": []}

    builder = StateGraph(Fan).add_node("branch", RunnableLambda(branch, afunc=abranch))
    return builder.add_conditional_edges(START, spread, ["branch"])


def said(**limits: Any) -> Any:
    return {"configurable": {"orla": {"limits": limits}}}


def promised(orla: Orla) -> list[Any]:
    return [each for each in orla.statistics().limits if each.promised != NOTHING]


# Runs


@BOTH
def test_each_run_has_its_calls(engine: StubEngine, make_orla: MakeOrla, invoke: Runner) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"}, limits=Limits(run=Limit(calls=2)))
    short, long = orla.wrap(chain(chat(engine), "a", "b")), orla.wrap(chain(chat(engine), "a", "b", "c"))
    invoke(short, HI)
    with pytest.raises(BudgetExceeded, match=r"run '.*' may use 2 calls \(limits.run.calls\): 2 calls spent"):
        invoke(long, HI)
    invoke(short, HI)
    assert len(engine.chats) == 6
    refused = [record for record in orla.records() if record.error]
    assert [(record.stage, (record.error or "").split(":")[0]) for record in refused] == [("c", "BudgetExceeded")]
    assert orla.statistics().limits == [], "a run's sums go with it"


@BOTH
def test_branches_side_by_side_cannot_all_slip_through(
    engine: StubEngine, make_orla: MakeOrla, invoke: Runner
) -> None:
    orla = make_orla(at(engine, max_concurrency=2), mapper={"*": "main"}, limits=Limits(run=Limit(tokens=20)))
    engine.rule = lambda seen: Reply(before_s=0.02)
    caught: list[BudgetExceeded] = []
    answers = invoke(orla.wrap(fan(chat(engine), 8, caught)), {"answers": []})["answers"]
    assert len(engine.chats) == len(answers) <= 3, "a call is expected to take 6 tokens"
    assert len(caught) == 8 - len(answers) and {error.figure for error in caught} == {"tokens"}


def test_a_node_that_may_not_call_is_not_tried_again(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"}, limits=Limits(run=Limit(calls=0)))
    with pytest.raises(BudgetExceeded):
        orla.wrap(chain(chat(engine), "a", retry=RetryPolicy(max_attempts=3, initial_interval=0.01))).invoke(HI)
    assert len(orla.records()) == 1


@BOTH
def test_a_run_brings_limits_of_its_own(engine: StubEngine, make_orla: MakeOrla, invoke: Runner) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"})
    graph = orla.wrap(chain(chat(engine), "a", "b"))
    with pytest.raises(BudgetExceeded, match=r"limits\.run\.calls in the run's configurable"):
        invoke(graph, HI, said(run={"calls": 1}))
    with pytest.raises(BudgetExceeded, match=r"stage 'b' may use 0 calls"):
        invoke(graph, HI, said(stages={"b": Limit(calls=0)}))
    invoke(graph, HI, {"configurable": {"orla": {"limits": Limits(Limit(calls=2)), "priority": 3}}})
    assert orla.records()[-1].priority == 3
    with pytest.raises(ConfigError, match=r"limits\.run\.cals: unknown key; did you mean 'calls'"):
        invoke(graph, HI, said(run={"cals": 1}))
    invoke(graph, HI)


def test_a_runs_limits_without_a_run_are_told(engine: StubEngine, orla: Orla) -> None:
    with pytest.raises(ConfigError, match="hold for one run of a wrapped graph; this call is in none"):
        chain(ChatOrla(orla=orla, model="main"), "a").compile().invoke(HI, said(run={"calls": 1}))


def test_time_ends_the_wait_in_the_queue(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = make_orla(at(engine, max_concurrency=1), mapper={"*": "main"})
    graph, gate = orla.wrap(chain(chat(engine), "a")), Gate()
    engine.script.append(Reply(gate=gate))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(graph.invoke, HI)
        engine.wait(lambda e: e.in_flight == 1)
        for invoke in (graph.invoke, lambda *rest: asyncio.run(graph.ainvoke(*rest))):
            with pytest.raises(BudgetExceeded, match=r"may use 0\.1 s .* and this call waited 0\.\d+ s for 'main'"):
                invoke(HI, said(run={"wall_s": 0.1}))
        gate.open()
        first.result(PATIENCE_S)
    assert len(engine.chats) == 1


def test_who_is_resumed_begins_anew(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla, llm = make_orla(at(engine), mapper={"*": "main"}, limits=Limits(Limit(calls=1))), chat(engine)

    def before(state: MessagesState) -> Any:
        return {"messages": [llm.invoke("hi")]}

    def after(state: MessagesState) -> Any:
        interrupt("go on?")
        return {"messages": [llm.invoke("hi")]}

    builder = StateGraph(MessagesState).add_node("before", before).add_node("after", after)
    graph = orla.wrap(builder.add_edge(START, "before").add_edge("before", "after").compile(InMemorySaver()))
    thread: Any = {"configurable": {"thread_id": "t"}}
    graph.invoke(HI, thread)
    graph.invoke(Command(resume="yes"), thread)
    assert len(engine.chats) == 2


# Graphs, stages, tenants


def test_a_graphs_limits_are_its_own_and_hold_for_the_graphs_inside(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"}, limits=Limits(Limit(calls=5)))
    inner = orla.wrap(chain(chat(engine), "a", "b"))

    def outer(state: MessagesState) -> Any:
        return {"messages": inner.invoke(HI)["messages"][-1:]}

    builder = StateGraph(MessagesState).add_node("outer", outer).add_edge(START, "outer")
    builder.add_node("again", outer).add_edge("outer", "again")
    around = orla.wrap(builder.compile(name="around"), limits=Limits(Limit(calls=3)))
    with pytest.raises(BudgetExceeded, match=r"may use 3 calls \(limits\.run\.calls of graph 'around'\)"):
        around.invoke(HI)
    inner.invoke(HI)
    with pytest.raises(BudgetExceeded):
        orla.wrap(around, mapper={"*": "main"}).invoke(HI)
    once = orla.wrap(inner, limits=Limits(stages={"b": Limit(calls=1)}))
    once.invoke(HI)
    with pytest.raises(BudgetExceeded, match=r"limits\.stages\.b\.calls of graph"):
        once.invoke(HI)
    inner.invoke(HI)


def test_a_stage_that_the_graph_does_not_have(engine: StubEngine, orla: Orla) -> None:
    with pytest.raises(ConfigError, match=r"limits\.stages names stage 'clasify'.*did you mean 'classify'"):
        orla.wrap(chain(chat(engine), "classify"), limits=Limits(stages={"clasify": Limit(calls=1)}))
    with pytest.raises(ConfigError, match=r"limits: expected Limits, got \{'run'"):
        orla.wrap(chain(chat(engine), "classify"), limits={"run": {"calls": 1}})


@BOTH
def test_tenants_pay_for_themselves(engine: StubEngine, make_orla: MakeOrla, invoke: Runner) -> None:
    limits = Limits(tenants={"*": Limit(cost_usd=30.0, per_s=3600)})
    orla = make_orla(at(engine, cost=Cost(1e6, 1e6)), mapper={"*": "main"}, limits=limits)
    graph = orla.wrap(chain(chat(engine, max_tokens=10), "a"))

    def of(tenant: str) -> Any:
        return {"configurable": {"orla": {"tenant": tenant}}}

    calls = 0
    with pytest.raises(BudgetExceeded, match=r"tenant 'acme' may use \$30 in any 3600 s .*there is room in 36") as no:
        while calls < 20:
            invoke(graph, HI, of("acme"))
            calls += 1
    assert no.value.retry_after_s is not None and 3600 < no.value.retry_after_s <= 3660
    invoke(graph, HI, of("other"))
    spent = {each.name: each.spent for each in orla.statistics().limits}
    sums = orla.statistics().costs.tenants
    assert spent["acme"].cost_usd == pytest.approx(sums["acme"].usd) and spent["acme"].calls == calls > 1
    assert spent["acme"].cost_usd <= 30.0
    orla.limits = Limits(tenants={"*": Limit(cost_usd=60.0, per_s=3600)})
    invoke(graph, HI, of("acme"))
    orla.limits = NO_LIMITS
    for _ in range(9):
        invoke(graph, HI, of("acme"))


def test_a_call_that_asks_a_model_on_its_way_pays_for_that_too(engine: StubEngine, make_orla: MakeOrla) -> None:
    mapper = OneBitStageMapper("main", "main")
    orla = make_orla(at(engine), mapper=mapper, limits=Limits(Limit(calls=2)))
    graph = orla.wrap(chain(chat(engine), "a", "b"))
    with pytest.raises(BudgetExceeded):
        graph.invoke(HI)
    assert len(engine.chats) == 2, "a judgement, and one answer"


# Every way out gives back what was set aside


@pytest.mark.parametrize("way", ["closed", "dropped", "read", "broken"])
def test_a_stream_settles_however_it_ends(engine: StubEngine, make_orla: MakeOrla, way: str) -> None:
    orla = make_orla(at(engine, max_concurrency=1), limits=Limits(tenants={"t": Limit(tokens=1000)}))
    engine.script.append(Reply(fault="cut") if way == "broken" else Reply(text="one two three four"))
    stream = ChatOrla(orla=orla, model="main", max_tokens=100).stream("hi", tenant="t")
    next(stream)
    (state,) = promised(orla)
    assert (state.promised.calls, state.promised.tokens) == (1, 101)
    if way == "closed":
        stream.close()
    elif way == "dropped":
        del stream
        gc.collect()
    else:
        try:
            list(stream)
        except openai.APIConnectionError:
            assert way == "broken"
    (state,) = orla.statistics().limits
    (record,) = orla.records()
    assert state.promised == NOTHING
    counted = record.prompt_tokens is not None
    assert counted is (way == "read")
    whole = (record.prompt_tokens or 0) + (record.completion_tokens or 0)
    assert state.spent.tokens == (whole if counted else 101), "what was not counted stays as promised"


async def test_who_is_cancelled_gives_back_what_was_promised(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = make_orla(at(engine, max_concurrency=1), limits=Limits(tenants={"t": Limit(calls=2)}))
    watch, llm = Watch(orla), ChatOrla(orla=orla, model="main")
    engine.script.append(Reply(gate=Gate()))
    loop = asyncio.get_running_loop()
    sent = loop.create_task(llm.ainvoke("first", tenant="t"))
    await engine.await_(lambda e: e.in_flight == 1)
    queued = loop.create_task(llm.ainvoke("second", tenant="t"))
    await watch.await_(Happening.QUEUED)
    with pytest.raises(BudgetExceeded, match="2 calls promised to 2 calls under way"):
        await llm.ainvoke("third", tenant="t")
    for task in (queued, sent):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    (state,) = orla.statistics().limits
    assert (state.spent, state.promised, state.refused) == (NOTHING, NOTHING, 1)
    await llm.ainvoke("again", tenant="t")


def test_what_the_engine_refuses_costs_nothing(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"}, limits=Limits(stages={"a": Limit(calls=1)}))
    graph = orla.wrap(chain(chat(engine), "a"))
    engine.script.extend([Reply(status=400), Reply(status=400)])
    for _ in range(2):
        with pytest.raises(openai.BadRequestError):
            graph.invoke(HI)
    graph.invoke(HI)
    with pytest.raises(BudgetExceeded):
        graph.invoke(HI)


def test_an_sdk_client_in_a_node_is_limited_too(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"}, limits=Limits(Limit(calls=1)))
    client = openai.OpenAI(base_url=engine.url, api_key=CALLER_KEY)

    def node(state: MessagesState) -> Any:
        for _ in range(2):
            client.chat.completions.create(model="m", messages=MESSAGES)

    with pytest.raises(BudgetExceeded):
        orla.wrap(StateGraph(MessagesState).add_node("a", node).add_edge(START, "a")).invoke(HI)
    assert len(engine.chats) == 1


# From a file

FILE = """
[backends.main]
url = "http://127.0.0.1:1/v1"
[limits.run]
calls = 50
wall_s = 120
[limits.stages.classify]
tokens = 100000
per_s = 60
[limits.tenants."*"]
cost_usd = 0.5
per_s = 3600.0
"""


def test_limits_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "orla.toml"
    file.write_text(FILE)
    expected = Limits(
        Limit(calls=50, wall_s=120),
        {"classify": Limit(tokens=100_000, per_s=60)},
        {"*": Limit(cost_usd=0.5, per_s=3600.0)},
    )
    assert config.load(file).limits == expected
    with Orla.from_config(file) as orla:
        assert orla.limits == expected
    file.write_text(FILE.replace("tokens =", "tokns ="))
    with pytest.raises(ConfigError, match=r"orla\.toml: limits\.stages\.classify\.tokns: unknown key; did you mean"):
        config.load(file)
    file.write_text(FILE.replace("calls = 50", "calls = -1"))
    with pytest.raises(ConfigError, match=r"orla\.toml: limits\.run\.calls must be a whole number.*got -1"):
        config.load(file)
