"""Tenants: a thread's id is its tenant's, and, where that is asked for, so is what it left in a cache."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import httpx
import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph

from orla_lg import Backend, ChatOrla, Limit, Limits, Orla, OrlaSaver
from orla_lg.core.record import CallEvent, Happening
from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings

from .conftest import at, chat
from .stub_engine import StubEngine

SECRET = "The recipe of tenant acme has pepper, salt and a good deal of garlic in it. " * 4


class State(TypedDict, total=False):
    said: str


def a_graph(node: Callable[..., Any], *more: Callable[..., Any], metadata: Any = None, saver: Any = None) -> Any:
    graph = StateGraph(State)
    for at_, each in enumerate((node, *more)):
        graph.add_node(f"n{at_}", each, metadata=metadata if at_ == 0 else None)
        graph.add_edge(START if at_ == 0 else f"n{at_ - 1}", f"n{at_}")
    graph.add_edge(f"n{len(more)}", END)
    return graph.compile(checkpointer=saver)


def asking(model: Any, text: str = "hello", **more: Any) -> Callable[[State], State]:
    def node(state: State) -> State:
        return {"said": str(model.invoke(state.get("said") or text, **more).content)}

    return node


def run_of(thread: str | None, tenant: str | None = None) -> Any:
    configurable: dict[str, Any] = {} if thread is None else {"thread_id": thread}
    if tenant is not None:
        configurable["orla"] = {"tenant": tenant}
    return {"configurable": configurable}


def keys(orla: Orla) -> set[str]:
    """Return the keys of the workflows that are known to hold something, or lie idle."""
    book = orla.core.serving.book
    return {
        *book._idle,
        *(key for scheduler in orla.core.serving.schedulers.values() for key in scheduler.cache.workflows()),
    }


# Whose workflow a call belongs to


@pytest.mark.parametrize("way", ["configurable", "metadata", "call", "hints", "node"])
def test_two_tenants_threads_of_one_id_are_two_workflows(orla: Orla, engine: StubEngine, way: str) -> None:
    model = chat(engine) if way != "call" else ChatOrla(orla=orla, model="main")

    def run(tenant: str) -> None:
        said: dict[str, Any] = {"tenant": tenant} if way == "call" else {}
        metadata = {"orla": {"tenant": tenant}} if way == "node" else None
        hints = (lambda stage, state: {"tenant": tenant}) if way == "hints" else None
        graph = orla.wrap(a_graph(asking(model, **said), metadata=metadata, saver=InMemorySaver()), hints=hints)
        config = run_of("1", tenant if way == "configurable" else None)
        if way == "metadata":
            config["metadata"] = {"orla": {"tenant": tenant}}
        graph.invoke({}, config)

    run("acme")
    run("zenith")
    assert [(each.workflow, each.tenant) for each in orla.records()] == [("1", "acme"), ("1", "zenith")]
    assert set(orla.core.serving.book._idle) == {"tenant=4:acme1", "tenant=6:zenith1"}
    assert orla.statistics().workflows.idle == 2


def test_without_tenants_nothing_is_changed(orla: Orla, engine: StubEngine) -> None:
    orla.wrap(a_graph(asking(chat(engine)))).invoke({}, run_of("1"))
    assert set(orla.core.serving.book._idle) == {"1"}
    assert [(each.workflow, each.tenant) for each in orla.records()] == [("1", None)]


def test_a_tenants_thread_is_one_workflow_across_graphs(orla: Orla, engine: StubEngine) -> None:
    for _ in range(2):
        orla.wrap(a_graph(asking(chat(engine)))).invoke({}, run_of("1", "acme"))
    assert set(orla.core.serving.book._idle) == {"tenant=4:acme1"}


def test_a_thread_named_like_anothers_key_meets_nobody(orla: Orla, engine: StubEngine) -> None:
    graph = orla.wrap(a_graph(asking(chat(engine))))
    graph.invoke({}, run_of("1", "acme"))
    for hostile in ("tenant=4:acme1", "acme1"):
        graph.invoke({}, run_of(hostile))
    assert [each.workflow for each in orla.records()] == ["1", "tenant=4:acme1", "acme1"]
    assert len(orla.core.serving.book._idle) == 3


def test_a_call_of_another_tenant_than_its_runs_is_that_tenants(orla: Orla) -> None:
    model = ChatOrla(orla=orla, model="main")
    graph = orla.wrap(a_graph(asking(model), asking(model, tenant="zenith"), asking(model, tenant=""), asking(model)))
    graph.invoke({}, run_of("1", "acme"))
    assert [each.tenant for each in orla.records()] == ["acme", "zenith", None, "acme"]
    assert set(orla.core.serving.book._idle) == {"tenant=4:acme1", "tenant=6:zenith1", "1"}
    orla.core.serving.check_integrity()


@pytest.mark.parametrize("inner", [None, "inner"])
def test_a_graph_inside_is_of_the_outer_ones_tenant(orla: Orla, engine: StubEngine, inner: str | None) -> None:
    nested = orla.wrap(a_graph(asking(chat(engine)), saver=InMemorySaver() if inner else None))

    def node(state: State) -> State:
        return dict(nested.invoke(state, run_of(inner) if inner else None))  # type: ignore[return-value]

    orla.wrap(a_graph(asking(chat(engine)), node)).invoke({}, run_of("1", "acme"))
    assert [(each.workflow, each.tenant) for each in orla.records()] == [("1", "acme"), (inner or "1", "acme")]


def test_a_run_that_turns_out_to_be_a_tenants_leaves_the_tenantless_thread_alone(
    orla: Orla, engine: StubEngine
) -> None:
    graph = orla.wrap(a_graph(asking(chat(engine))))
    graph.invoke({}, run_of("1"))
    graph.invoke({}, run_of("1", "acme"))
    assert orla.statistics().workflows.idle == 2
    orla.core.serving.progress.thread_deleted("1")
    assert set(orla.core.serving.book._idle) == {"tenant=4:acme1"}


async def test_tenants_side_by_side_on_one_id(orla: Orla, engine: StubEngine) -> None:
    model = chat(engine)

    async def node(state: State) -> State:
        return {"said": str((await model.ainvoke("hello")).content)}

    graph = orla.wrap(a_graph(node, node))
    async with asyncio.TaskGroup() as together:
        for number in range(12):
            together.create_task(graph.ainvoke({}, run_of("1", f"t{number % 4}")))
    assert {(each.workflow, each.tenant) for each in orla.records()} == {("1", f"t{number}") for number in range(4)}
    assert orla.statistics().workflows.idle == 4
    orla.core.serving.check_integrity()


# What users see


def test_users_see_the_bare_id_with_the_tenant_beside_it(orla: Orla, engine: StubEngine) -> None:
    heard: list[CallEvent] = []
    seen: list[Any] = []
    orla.subscribe(heard.append)

    def node(state: State) -> State:
        seen.append(orla.current())
        seen.append(orla.statistics().backends["main"].admission.workflows)  # type: ignore[union-attr]
        return asking(chat(engine))(state)

    orla.wrap(a_graph(asking(chat(engine)), node)).invoke({}, run_of("1", "acme"))
    assert (seen[0].workflow, seen[0].tenant) == ("1", "acme")
    assert [(each.workflow, each.tenant) for each in seen[1]] == [("1", "acme")]
    assert {each.workflow for each in heard} == {"1"}
    calls = [each for each in heard if each.call is not None]
    assert calls and {each.tenant for each in calls} == {"acme"}
    assert [each.tenant for each in heard if each.kind is Happening.RUN_ENDED] == ["acme"]


def test_a_thread_is_prioritized_for_its_tenant_only(orla: Orla, engine: StubEngine) -> None:
    did: list[bool] = []

    def node(state: State) -> State:
        run = orla.current().run  # type: ignore[union-attr]
        did.extend(
            [
                orla.prioritize("1", 9.0), orla.prioritize("1", 9.0, tenant="zenith"),
                orla.prioritize(run, 9.0, tenant="zenith"), orla.prioritize("1", 5.0, tenant="acme"),
            ]
        )  # fmt: skip
        return asking(chat(engine))(state)

    orla.wrap(a_graph(asking(chat(engine)), node)).invoke({}, run_of("1", "acme"))
    assert did == [False, False, False, True]
    assert [each.priority for each in orla.records()] == [0.0, 5.0]


def test_limits_are_those_of_the_runs_tenant(engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"}, limits=Limits(tenants={"*": Limit(calls=2)}))
    nested = orla.wrap(a_graph(asking(chat(engine)), saver=InMemorySaver()))

    def node(state: State) -> State:  # its own thread, so that nothing of the outer configuration is inherited
        return dict(nested.invoke({}, run_of("inner")))  # type: ignore[return-value]

    orla.wrap(a_graph(asking(chat(engine)), node)).invoke({}, run_of("1", "acme"))
    (spent,) = orla.statistics().limits
    assert (spent.name, spent.spent.calls) == ("acme", 2)


# Deleting a thread


@pytest.fixture
def slotted() -> Iterator[StubEngine]:
    with StubEngine(slots=2) as running:
        yield running


def fill(orla: Orla, engine: StubEngine, tenant: str | None, *, text: str = SECRET) -> int:
    """Run once on thread 1, and return how many tokens were found in the cache."""
    orla.wrap(a_graph(asking(chat(engine), text))).invoke({}, run_of("1", tenant))
    return orla.records()[-1].cached_tokens or 0


@pytest.mark.parametrize("by", ["saver", "context"])
def test_deleting_one_tenants_thread_leaves_the_others_alone(
    slotted: StubEngine, make_orla: Callable[..., Orla], by: str
) -> None:
    orla = make_orla(at(slotted, engine="llamacpp"), mapper={"*": "main"})
    fill(orla, slotted, "acme")
    fill(orla, slotted, "zenith", text="Something else is asked by zenith. " * 9)
    saver = OrlaSaver(orla, inner=InMemorySaver(), tenant="zenith" if by == "saver" else None)
    if by == "saver":
        saver.delete_thread("1")
    else:

        def node(state: State) -> State:
            saver.delete_thread("1")
            return state

        orla.wrap(a_graph(asking(chat(slotted)), node)).invoke({}, run_of("2", "zenith"))
    assert "tenant=4:acme1" in keys(orla) and "tenant=6:zenith1" not in keys(orla)
    assert fill(orla, slotted, "acme") > 40, "its slot was flushed with the other one's thread"


def test_deleting_a_thread_of_no_tenant_ends_that_one_only(engine: StubEngine, orla: Orla) -> None:
    graph = orla.wrap(a_graph(asking(chat(engine))))
    graph.invoke({}, run_of("1"))
    graph.invoke({}, run_of("1", "acme"))
    OrlaSaver(orla, inner=InMemorySaver()).delete_thread("1")
    assert set(orla.core.serving.book._idle) == {"tenant=4:acme1"}


def test_a_savers_tenant_holds_when_a_graph_is_wrapped_and_can_be_another(orla: Orla) -> None:
    inner = InMemorySaver()
    saver = OrlaSaver(orla, inner=inner, tenant="acme")
    assert OrlaSaver(orla, inner=saver) is saver is OrlaSaver(orla, inner=saver, tenant="acme")
    other = OrlaSaver(orla, inner=saver, tenant="zenith")
    assert other.inner is inner and other._tenant == "zenith"


# Isolation, where it is asked for


@pytest.mark.parametrize("isolate", [False, True])
def test_no_tenant_finds_anothers_prompt_in_a_slot(make_orla: Callable[..., Orla], isolate: bool) -> None:
    with StubEngine(slots=1) as engine:
        orla = make_orla(at(engine, engine="llamacpp", isolate_tenants=isolate), mapper={"*": "main"})
        fill(orla, engine, "acme")
        found = fill(orla, engine, "zenith")
        assert (found == 0) is isolate
        assert fill(orla, engine, "zenith") > 40, "its own it does find"
        expected = [each.expected_cached_tokens for each in orla.records()]
        assert expected[1] == 0
        assert "flush:deferred" not in orla.statistics().backends["main"].memory.effects


@pytest.mark.parametrize("isolate", [False, True])
def test_no_tenant_finds_anothers_prompt_in_a_shared_cache(make_orla: Callable[..., Orla], isolate: bool) -> None:
    with _Shared() as engine:
        orla = make_orla(at(engine, engine="vllm", isolate_tenants=isolate), mapper={"*": "main"})
        fill(orla, engine, "acme")
        assert (fill(orla, engine, "zenith") == 0) is isolate
        assert fill(orla, engine, "acme") > 40
        none = fill(orla, engine, None)
        assert (none < 5) is isolate, "calls of no tenant find what was asked without one"
        salts = [seen.body.get("cache_salt") for seen in engine.chats if SECRET in str(seen.body)]
        if isolate:
            acme, zenith, again, last = salts
            assert acme == again != zenith and last is None
            assert "acme" not in acme and len(acme) == 43
        else:
            assert salts == [None] * 4
        expected = [each.expected_cached_tokens or 0 for each in orla.records()]
        assert (expected[1] == 0) is isolate, "what is believed follows"
        assert expected[2] > 40


class _Shared(StubEngine):
    """One cache for all, found by salt, as vLLM's."""

    def __init__(self) -> None:
        super().__init__()
        self._prompts = deque(maxlen=64)


def test_a_stages_beginning_is_warmed_for_the_tenant_it_was_learned_from(make_orla: Callable[..., Orla]) -> None:
    with _Shared() as engine:
        orla = make_orla(at(engine, engine="vllm", isolate_tenants=True), mapper={"*": "main"})
        book = orla.core.serving.schedulers["main"].prefetcher.prompts
        for thread in "abcd":
            model = chat(engine)
            graph = orla.wrap(
                a_graph(
                    lambda state, model=model, thread=thread: {
                        "said": model.invoke([("system", SECRET), ("human", thread)]).content
                    }
                )
            )
            graph.invoke({}, run_of(thread, "acme"))
        ((name, stage, scope),) = book._beginnings._prompts
        assert scope == "acme"
        assert book.beginning(name, stage, "acme") is not None
        assert book.beginning(name, stage, "zenith") is book.beginning(name, stage) is None


def test_it_is_said_where_isolation_is_not_to_be_had(
    engine: StubEngine, make_orla: Callable[..., Orla], caplog: pytest.LogCaptureFixture
) -> None:
    orla = make_orla(at(engine, isolate_tenants=True), mapper={"*": "main"})
    fill(orla, engine, "acme")
    assert "is to isolate tenants, which its engine cannot" in caplog.text
    assert caplog.text.count("is to isolate tenants") == 1


@pytest.mark.engine
@pytest.mark.parametrize("cache_ram_mib", [0, 256])
def test_a_real_engine_does_not_confirm_a_guess(cache_ram_mib: int, make_orla: Callable[..., Orla]) -> None:
    settings = EngineSettings(slots=2, context_tokens=1024, name="tiny", cache_ram_mib=cache_ram_mib)
    with EmbeddedEngine(settings) as engine:
        backend = Backend("main", engine.url, model="tiny", engine="llamacpp", isolate_tenants=True)
        orla = make_orla(backend, mapper={"*": "main"}, warm_up=False)
        model = ChatOrla(orla=orla, model="main", max_tokens=2)

        def ask(text: str, tenant: str) -> int:
            orla.wrap(a_graph(asking(model, text))).invoke({}, run_of("1", tenant))
            return orla.records()[-1].cached_tokens or 0

        ask(SECRET, "acme")
        ask("Quite another question, of no interest to anybody, about the weather. " * 4, "acme")
        assert ask(SECRET, "zenith") == 0
        assert ask("Whatever else zenith may ask. " * 8, "zenith") <= 40
        assert ask(SECRET, "third") <= 40, "a copy that left its slot was found"
        props = httpx.get(f"{engine.url.removesuffix('/v1')}/props", trust_env=False).json()
        assert props["total_slots"] == 2
