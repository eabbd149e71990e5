"""Split prompts: what is certain of the next prompt is prefilled while a slower tool still runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import BaseTool, tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command

from orla_lg import Backend, Cost, Orla
from orla_lg.core.memory.policies import Joined, PreserveIncrements, ReleaseAtSwitch, WarmSplit
from tests.conftest import chat
from tests.tools.prefill_engine import DONE, MODEL, PrefillEngine, Request, calls, in_turn, once

PATIENCE_S = 30.0
LONG = "The quick brown fox jumps over the lazy dog. " * 100
"""1,100 tokens; prefilled at 1,000 a second, as is assumed of an engine whose pace is not known."""

EAGER = Joined(ReleaseAtSwitch(), PreserveIncrements(), WarmSplit(gather_s=0.0, unknown_s=0.01))
"""Waits for nothing: these tools were never seen before, and each is held until it has shown what is to be seen."""

Make = Callable[..., Orla]


def until(so: Callable[[], Any], patience_s: float = PATIENCE_S) -> bool:
    ends_s = time.monotonic() + patience_s
    while not so() and time.monotonic() < ends_s:
        time.sleep(0.002)
    return bool(so())


class Workbench:
    """An engine, tools by name that each may be held, and an agent that uses them."""

    def __init__(self, engine: PrefillEngine, orla: Orla) -> None:
        self.engine, self.orla = engine, orla
        self.holds: dict[str, Callable[[], Any]] = {}
        self.outputs: dict[str, Any] = {}
        self.tools = [self._tool(name) for name in ("first", "second", "third")]

    def _tool(self, name: str) -> BaseTool:
        def run(query: str) -> Any:
            self.holds.get(name, bool)()
            output = self.outputs.get(name, f"{name} of {query}: {LONG}")
            if isinstance(output, Exception):
                raise output
            return output

        run.__name__, run.__doc__ = name, f"Look up {name}."
        return tool(run)

    def model(self, **settings: Any) -> Any:
        return chat(self.engine, model=MODEL, **settings)  # type: ignore[arg-type]  # it has a url

    def agent(self, *, wrapped: bool = True, model: Mapping[str, Any] | None = None, **settings: Any) -> Any:
        agent = create_agent(self.model(**(model or {})), self.tools, **settings)
        return self.orla.wrap(agent, split_prompts=True) if wrapped else agent

    @property
    def said(self) -> Any:
        return self.orla.statistics().backends["main"].warm_ups

    @property
    def predictions(self) -> Any:
        return self.orla.statistics().split_prompts

    def first_prefetch(self) -> None:
        assert until(lambda: self.engine.prefetches), "nothing was prefilled"

    def prefilled(self, times: int = 1) -> None:
        assert until(lambda: self.said.done >= times), self.said


def asked(*names: str) -> dict[str, Any]:
    return calls(*((name, {"query": "foxes"}) for name in names))


@pytest.fixture
def bench(make_orla: Make) -> Iterator[Callable[..., Workbench]]:
    entered: list[PrefillEngine] = []

    def make(answer: Any = None, *, memory: Any = EAGER, **settings: Any) -> Workbench:
        plan = answer if callable(answer) else once(answer or asked("first", "second", "third"))
        engine = PrefillEngine(plan, **settings)
        entered.append(engine.__enter__())
        backend = Backend("main", engine.url, model=MODEL, engine="vllm")
        return Workbench(engine, make_orla(backend, mapper={"*": "main"}, memory=memory))

    yield make
    for engine in entered:
        engine.__exit__()


QUESTION = {"messages": [HumanMessage("Tell me of foxes.")]}


def is_beginning(prefetch: Request, call: Request) -> bool:
    return call.messages[: len(prefetch.messages)] == prefetch.messages


def test_results_that_are_there_are_prefilled_while_a_slower_tool_runs(bench: Callable[..., Workbench]) -> None:
    work = bench()
    work.holds["third"] = work.prefilled
    final = work.agent().invoke(QUESTION)
    assert final["messages"][-1].content == "done"
    prefetch, call = work.engine.prefetches[-1], work.engine.calls[-1]
    assert [each["role"] for each in prefetch.messages] == ["user", "assistant", "tool", "tool"][
        : len(prefetch.messages)
    ]
    assert is_beginning(prefetch, call)
    assert prefetch.body["tools"] == call.body["tools"]
    assert call.cached_tokens > 1000
    assert (work.predictions.predicted, work.predictions.held, work.predictions.stopped) == (1, 1, {})
    said = work.said
    assert said.split_started >= 1 and said.split_used_tokens > 0.9 * said.split_warmed_tokens > 0
    assert len(work.orla.core.next_prompts) == 0


def test_what_it_keeps_is_hashed_as_the_real_prompt_is(bench: Callable[..., Workbench]) -> None:
    """The cache's model and the account of what was used go by hashes: a prefetch's are those of its call."""
    work = bench()
    prefixes: list[tuple[int, ...]] = []

    def look() -> None:
        work.prefilled()
        book = work.orla.core.serving.schedulers["main"].prefetcher.prompts

        def split() -> list[tuple[int, ...]]:
            return [prompt.ask.prefix for prompt in book.last.newest() if prompt.base is not None]

        assert until(lambda: [len(prefix) for prefix in split()] == [4])
        prefixes.extend(split())

    work.holds["third"] = look
    work.agent().invoke(QUESTION)
    (prefix,) = prefixes
    assert len(prefix) == 4
    assert work.said.split_used_tokens > 0, "its call was known by them"


def test_a_slow_first_tool_blocks_those_after_it(bench: Callable[..., Workbench]) -> None:
    work = bench()
    ended: list[str] = []
    work.holds["second"] = lambda: ended.append("second")
    work.holds["third"] = lambda: ended.append("third")
    work.holds["first"] = lambda: (until(lambda: len(ended) == 2), time.sleep(0.1))
    work.agent().invoke(QUESTION)
    assert len(ended) == 2 and not work.engine.prefetches
    assert (work.predictions.predicted, work.predictions.held) == (1, 1), "and yet it was as predicted"


def test_results_stand_in_the_order_of_the_calls(bench: Callable[..., Workbench]) -> None:
    work = bench()
    ended = threading.Event()
    work.holds["second"] = ended.set
    work.holds["first"] = ended.wait
    work.holds["third"] = work.prefilled
    work.agent().invoke(QUESTION)
    prefetch, call = work.engine.prefetches[-1], work.engine.calls[-1]
    assert is_beginning(prefetch, call)
    assert [each["tool_call_id"] for each in prefetch.messages[2:]] == ["call-0", "call-1"]


def test_tools_that_end_together_send_nothing(bench: Callable[..., Workbench]) -> None:
    """With the default policy, at the first run of all (nothing is known of them), and at the next."""
    work = bench(in_turn(*[asked("first", "second", "third")] * 2), memory="default")
    together = threading.Barrier(3)
    work.holds.update(dict.fromkeys(("first", "second", "third"), lambda: (together.wait(5.0), time.sleep(0.05))))
    work.agent().invoke(QUESTION)
    assert len(work.engine.calls) == 3 and not work.engine.prefetches
    assert work.predictions.held == 2


@pytest.mark.parametrize(("usual_s", "refused"), [(8.0, None), (0.2, "short_wait")])
def test_the_usual_time_of_a_slow_tool_decides(
    bench: Callable[..., Workbench], usual_s: float, refused: str | None
) -> None:
    work = bench(asked("first", "third"), memory="default")
    for _ in range(4):
        work.orla.core.serving.memory.returns.used("another", "third", usual_s)
    work.holds["third"] = work.prefilled if refused is None else lambda: until(lambda: work.said.refused)
    work.agent().invoke(QUESTION)
    assert work.said.refused.get("short_wait") == (None if refused is None else 1)
    assert bool(work.engine.prefetches) == (refused is None)


@pytest.mark.parametrize("form", ["stream", "async"])
def test_streamed_and_async_runs_too(bench: Callable[..., Workbench], form: str) -> None:
    import asyncio

    work = bench()
    work.holds["third"] = work.prefilled
    if form == "stream":
        agent = work.agent(model={"streaming": True, "stream_usage": True})
        assert list(agent.stream(QUESTION, stream_mode="values"))
    else:
        asyncio.run(work.agent().ainvoke(QUESTION))
    assert is_beginning(work.engine.prefetches[-1], work.engine.calls[-1])
    assert (work.predictions.predicted, work.predictions.held) == (1, 1)


def test_the_real_call_gives_a_prefetch_up(bench: Callable[..., Workbench]) -> None:
    work = bench()
    work.engine.prefetches_go_on.clear()
    work.holds["third"] = work.first_prefetch  # and ends at once
    work.agent().invoke(QUESTION)
    assert work.said.given_up == 1 and work.said.done == 0
    assert work.orla.records()[-1].queue_wait_s < 1.0
    assert not work.orla.core.serving.schedulers["main"].prefetcher.prompts.split


# What cannot be predicted


class Trims(AgentMiddleware[Any, Any, Any]):
    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        kept = request.messages[-3:] if len(request.messages) > 3 else request.messages
        return handler(request.override(messages=kept))


class Shortens(AgentMiddleware[Any, Any, Any]):
    def wrap_tool_call(self, request: Any, handler: Any) -> Any:
        message = handler(request)
        return ToolMessage(message.content[:50], tool_call_id=message.tool_call_id)


class Annotates(AgentMiddleware[Any, Any, Any]):
    def after_model(self, state: Any, runtime: Any) -> Any:
        last = state["messages"][-1]
        return {"messages": [last.model_copy(update={"content": "(thinking)"})]} if last.tool_calls else None


@pytest.mark.parametrize(
    ("middleware", "why"),
    [(Trims(), "do not begin"), (Annotates(), "answer"), (Shortens(), "result")],
    ids=["trims", "annotates", "shortens"],
)
def test_a_stage_that_differs_stops(bench: Callable[..., Workbench], middleware: Any, why: str) -> None:
    rounds = 5
    work = bench(in_turn(*[asked("first", "third")] * rounds))
    work.holds["third"] = lambda: time.sleep(0.06)
    agent = work.agent(middleware=[middleware])
    agent.invoke(QUESTION)
    (reason,) = work.predictions.stopped.values()
    assert why in reason
    assert work.predictions.predicted == 1 and work.predictions.held == 0, "it stopped at the first"
    before = len(work.engine.prefetches)
    agent.invoke(QUESTION)
    assert len(work.engine.prefetches) == before <= 2


def test_a_named_agent_is_learned(bench: Callable[..., Workbench]) -> None:
    work = bench(in_turn(*[asked("first", "third")] * 3))
    book, names = work.orla.core.serving.schedulers["main"].prefetcher.prompts, []

    def answers() -> list[Any]:
        kept = [each.body["messages"][-2:] for each in book.last.newest() if each.base is not None]
        return [answer for answer, last in kept if (answer["role"], last["role"]) == ("assistant", "tool")]

    def look() -> None:
        assert until(answers), "the first result is not there"
        names.extend(answer.get("name") for answer in answers())

    work.holds["third"] = look
    work.agent(name="fox").invoke(QUESTION)
    assert (work.predictions.predicted, work.predictions.held, work.predictions.stopped) == (3, 2, {})
    assert names == [None, "fox", "fox"]


@pytest.mark.parametrize(
    "output",
    [
        "text",
        ["a", "b"],
        [{"type": "text", "text": LONG}],
        {"a": ["ü", 1]},
        7,
        None,
        Command(update={}),
        ValueError("no"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_outputs_of_all_kinds_are_as_predicted_or_not_predicted(bench: Callable[..., Workbench], output: Any) -> None:
    work = bench(asked("first", "third"))
    if isinstance(output, Command):
        output = Command(update={"messages": [ToolMessage("by command", tool_call_id="call-0")]})
    work.outputs["first"] = output
    agent = work.agent()
    if isinstance(output, Exception):
        with pytest.raises(ValueError, match="no"):
            agent.invoke(QUESTION)
    else:
        agent.invoke(QUESTION)
    assert work.predictions.stopped == {}
    assert len(work.orla.core.next_prompts) == 0


def test_a_node_of_ones_own_that_calls_its_tools_one_by_one(bench: Callable[..., Workbench]) -> None:
    work = bench()
    tools = {each.name: each for each in work.tools}
    work.holds["third"] = work.prefilled
    llm = work.model().bind_tools(work.tools)

    def ask(state: MessagesState) -> dict[str, Any]:
        return {"messages": [llm.invoke(state["messages"])]}

    def act(state: MessagesState) -> dict[str, Any]:
        asked_for = state["messages"][-1].tool_calls  # type: ignore[union-attr]
        results = [(call, tools[call["name"]].invoke(call["args"])) for call in asked_for]
        return {"messages": [ToolMessage(result, tool_call_id=call["id"]) for call, result in results]}

    graph = StateGraph(MessagesState).add_node("ask", ask).add_node("act", act).add_edge(START, "ask")
    graph.add_conditional_edges("ask", lambda state: "act" if state["messages"][-1].tool_calls else END, ["act", END])
    work.orla.wrap(graph.add_edge("act", "ask").compile(), split_prompts=True).invoke(QUESTION)
    assert is_beginning(work.engine.prefetches[-1], work.engine.calls[-1])
    assert (work.predictions.predicted, work.predictions.held) == (1, 1)


# Costs, bounds, ends


def test_without_split_prompts_nothing_is_awaited_and_no_event_signalled(
    bench: Callable[..., Workbench], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = bench(asked("first", "third"))
    signalled: list[Any] = []
    memory = work.orla.core.serving.memory
    signal = memory.signal
    monkeypatch.setattr(memory, "signal", lambda events: (signalled.extend(events := list(events)), signal(events)))
    monkeypatch.setattr(work.orla.core.next_prompts, "answered", pytest.fail)
    monkeypatch.setattr(work.orla.core.next_prompts, "tool_started", pytest.fail)
    work.holds["third"] = lambda: time.sleep(0.05)
    work.orla.wrap(work.agent(wrapped=False)).invoke(QUESTION)
    assert signalled and not [event for event in signalled if event.kind == "tool_ended"]
    assert not work.engine.prefetches


def test_an_engine_that_refuses_such_a_prompt_is_left_alone(bench: Callable[..., Workbench]) -> None:
    work = bench(
        in_turn(*[asked("first", "third")] * 4), refuses=lambda body: body.get("max_tokens") == 1 and "tools" in body
    )
    work.holds["third"] = lambda: (until(lambda: work.said.failed), time.sleep(0.05))
    work.agent().invoke(QUESTION)
    assert len(work.engine.calls) == 5
    assert len(work.engine.prefetches) == 2, "once, and once without the fields that may be what it refuses"
    assert (work.said.started, work.said.failed) == (1, 1)


def test_a_run_that_ends_between_leaves_nothing(bench: Callable[..., Workbench]) -> None:
    work = bench()

    def stop() -> None:
        work.first_prefetch()
        raise KeyboardInterrupt

    work.holds["third"] = stop
    with pytest.raises(KeyboardInterrupt):
        work.agent().invoke(QUESTION)
    assert len(work.orla.core.next_prompts) == 0
    work.orla.core.next_prompts.check_integrity()
    book = work.orla.core.serving.schedulers["main"].prefetcher.prompts
    assert not book.split and len(book.last) == 0
    assert until(lambda: work.orla.core.serving.schedulers["main"].prefetcher.running is None)


def test_parallel_branches_that_call_tools_are_told_apart(bench: Callable[..., Workbench]) -> None:
    """Two agents as nodes beside each other, in one run, with the same stage names inside."""
    names = iter(range(100))
    lock = threading.Lock()

    def plan(body: Mapping[str, Any]) -> Mapping[str, Any]:
        if any(each["role"] == "tool" for each in body["messages"]):
            return DONE
        with lock:
            return calls(("first", {"query": "a"}), ("third", {"query": "b"}), name=str(next(names)))

    work = bench(plan)
    work.holds["third"] = lambda: time.sleep(0.2)
    agents = [create_agent(work.model(), work.tools) for _ in "ab"]
    graph = StateGraph(MessagesState).add_node("left", agents[0]).add_node("right", agents[1])
    graph.add_edge(START, "left").add_edge(START, "right")
    work.orla.wrap(graph.compile(), split_prompts=True).invoke(QUESTION)
    assert work.predictions.stopped == {}
    assert (work.predictions.predicted, work.predictions.held) == (2, 2)
    assert all(any(is_beginning(each, call) for call in work.engine.calls) for each in work.engine.prefetches)
    assert len(work.orla.core.next_prompts) == 0


# Where no backend is ever warmed


@pytest.mark.parametrize(
    ("backend", "settings", "why", "refused"),
    [
        ({}, {}, 'engine="openai"', "engine"),
        ({"engine": "vllm", "cost": Cost(input_per_mtoken=1.0)}, {}, "WarmUp(priced=True)", "priced"),
        ({"engine": "vllm"}, {"warm_up": False}, "warm_up=False", "engine"),
    ],
)
def test_split_prompts_that_nothing_can_prefill_are_warned_of_once_and_counted(
    backend: dict[str, Any], settings: Any, why: str, refused: str, make_orla: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with PrefillEngine(once(asked("first", "second"))) as engine:
        orla = make_orla(Backend("main", engine.url, model=MODEL, **backend), mapper={"*": "main"}, **settings)
        work = Workbench(engine, orla)
        for _ in range(2):
            work.agent().invoke(QUESTION)
        (said,) = [record.message for record in caplog.records if "split_prompts=True" in record.message]
        assert "'main'" in said and why in said
        assert set(work.said.refused) == {refused} and work.said.refused[refused] >= 2 and not engine.prefetches
        assert work.predictions.predicted == work.predictions.held == 2


def test_split_prompts_that_one_backend_can_prefill_are_not_warned_of(
    make_orla: Make, caplog: pytest.LogCaptureFixture
) -> None:
    plain, warm = Backend("plain", "http://127.0.0.1:9/v1"), Backend("warm", "http://127.0.0.1:9/v1", engine="vllm")
    with Orla([plain, warm], mapper={"*": "plain"}) as orla:
        graph = StateGraph(MessagesState).add_node("ask", lambda _: {}).add_edge(START, "ask")
        orla.wrap(graph, split_prompts=True)
    assert not [record for record in caplog.records if "split_prompts" in record.message]
