"""Tools that start early in replicas of a server: the final state, what is left, and what the server decides."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage

from orla_lg import Backend, Orla
from orla_lg.core.prefetch.book import WarmUp
from tests.conftest import assert_nothing_left
from tests.link.conftest import links
from tests.link.real import RealCore
from tests.link.scripted import eventually
from tests.tools.conftest import Lab, shown
from tests.tools.planned_engine import Answer
from tests.tools.prefill_engine import PrefillEngine, once
from tests.tools.test_cases import CASES, ask
from tests.tools.test_hard_cases import HELLO, ONE, TWO, branches, looking, settled
from tests.tools.test_split_prompts import EAGER, QUESTION, Workbench, asked, is_beginning, until


@pytest.fixture
def cores(lab: Lab) -> Iterator[list[RealCore]]:
    made: list[RealCore] = []
    yield made
    try:
        if lab.orla is not None:
            assert_nothing_left(lab.orla)
            for core in made:
                eventually(lambda core=core: not core.serving.book.open_runs())
                core.serving.check_integrity()
    finally:
        if lab.orla is not None:
            lab.orla.close()
        for core in made:
            core.__exit__()
    eventually(lambda: not links())


@pytest.fixture
def served(lab: Lab, cores: list[RealCore]) -> Callable[..., Any]:
    """Return what wraps a graph by a replica of a real core at the lab's engine."""

    def wrap(graph: Any, *, backend: dict[str, Any] | None = None, **how: Any) -> Any:
        if lab.orla is None:
            cores.append(RealCore(lab.backend(**(backend or {}))))
            lab.orla = Orla.remote(cores[0].url)
        return lab.orla.wrap(graph, **how)

    return wrap


REMOTE = (
    "same arguments twice", "calls a model", "stream writer", "raises", "interrupts", "approved by a human",
    "subgraph", "functional", "coroutine and function",
)  # fmt: skip


@pytest.mark.parametrize("name", REMOTE)
def test_the_final_state_is_the_same(lab: Lab, served: Callable[..., Any], name: str) -> None:
    case = CASES[name]
    is_async = not case.sync or len(name) % 2 == 0  # half of them either way
    lab.plan = [Answer(case.calls)]
    graph, _ = case.build(lab)
    without = shown(ask(graph, case, is_async=is_async))
    lab.runs.clear()
    graph, names = case.build(lab)
    wrapped = served(graph, tools_safe=names)
    lab.awaits = case.started
    assert shown(ask(wrapped, case, is_async=is_async)) == without
    assert (lab.runs.total(), lab.early.started) == (case.runs[1], case.started)
    settled(lab)


def test_whether_an_answer_may_be_streamed_is_the_servers_to_say(lab: Lab, served: Callable[..., Any]) -> None:
    lab.plan = [Answer((ONE, TWO))]
    graph = served(create_agent(lab.model(), [looking(lab)]), backend={"early_tools": False}, tools_safe={"look"})
    assert graph.invoke(HELLO)["messages"][-1].content == "done"
    assert (lab.runs["look"], lab.early.started) == (2, 0)
    assert not any(body.get("stream") for body in lab.engine.bodies)


def test_branches_share_nothing_but_the_server(lab: Lab, served: Callable[..., Any]) -> None:
    lab.plan, lab.awaits = [Answer((ONE, ONE))], 4
    graph = served(branches(lab, looking(lab)), backend={"assemble": True}, tools_safe={"look"})
    state = asyncio.run(graph.ainvoke(HELLO))
    assert sum(message.content == "seen 1" for message in state["messages"]) == 4
    assert (lab.runs["look"], lab.early.started, lab.early.used) == (4, 4, 4)
    settled(lab)


def test_a_run_that_is_cancelled_leaves_no_tool_at_either_side(
    lab: Lab, served: Callable[..., Any], cores: list[RealCore]
) -> None:
    lab.plan = [Answer((ONE, TWO), after={0: lambda: lab.wait_for_starts(1), 1: lambda: lab.wait_for_starts(9)})]
    graph = served(create_agent(lab.model(), [looking(lab)]), backend={"assemble": True}, tools_safe={"look"})

    async def leave() -> None:
        run = asyncio.get_running_loop().create_task(graph.ainvoke({"messages": [HumanMessage("Hello")]}))
        while lab.orla is None or not lab.early.started:
            await asyncio.sleep(0.005)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

    asyncio.run(leave())
    eventually(lambda: not cores[0].serving.book.open_runs())
    settled(lab)
    assert lab.early.used == 0 and set(lab.early.dropped) == {"run_ended"}


# Split prompts


def test_a_prompt_is_split_in_a_replica_and_prefilled_when_the_server_says_so(
    lab: Lab, cores: list[RealCore]
) -> None:
    """The results never leave the replica: it knows the prompt, and the server the other calls at the engine."""
    with PrefillEngine(once(asked("first", "second", "third"))) as engine:
        backend = Backend("main", engine.url, model="planned", engine="vllm")
        cores.append(RealCore(backend, memory=EAGER, warm_up=WarmUp()))
        lab.orla = Orla.remote(cores[0].url)
        work = Workbench(engine, lab.orla)
        work.holds["third"] = lambda: until(lambda: cores[0].serving.statistics().backends["main"].warm_ups.done)
        final = work.agent().invoke(QUESTION)
        assert final["messages"][-1].content == "done"
        assert engine.prefetches, cores[0].serving.statistics().backends["main"].warm_ups
        prefetch, call = engine.prefetches[-1], engine.calls[-1]
        assert is_beginning(prefetch, call) and call.cached_tokens > 1000
        assert (work.predictions.predicted, work.predictions.held, work.predictions.stopped) == (1, 1, {})
        assert cores[0].serving.statistics().backends["main"].warm_ups.split_used_tokens > 1000
        assert len(lab.orla.core.next_prompts) == 0
        assert_nothing_left(lab.orla)
