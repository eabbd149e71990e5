"""Warm-ups on a real llama.cpp: who returns to an empty engine finds his history there, and never waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import httpx
import pytest
from langchain_core.messages import AnyMessage, HumanMessage, SystemMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Command, interrupt

from orla_lg import Backend, Orla, Record, WarmUp
from orla_lg.core.engine.health import RETURN_AGAIN_S
from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings
from tests.conftest import chat

RULES = " ".join(f"Rule {n}: answer question {n} with the word number {n}, and with nothing else." for n in range(12))
"""Some 300 tokens: the machine may be busy with other things."""

PATIENCE_S = 60.0

TINY: dict[str, Any] = {"slots": 2, "context_tokens": 1024, "threads": 1, "batch_tokens": 32, "name": "tiny"}


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


class Night:
    """A graph that is interrupted, an engine that is restarted meanwhile, and a return."""

    def __init__(self, engine: EmbeddedEngine, orla: Orla, before_call: Callable[[], None]) -> None:
        self.orla = orla
        model = chat(engine, max_tokens=4)  # type: ignore[arg-type]  # it has a url

        def ask(state: State) -> dict[str, Any]:
            return {"messages": [model.invoke(state["messages"])]}

        def human(state: State) -> dict[str, Any]:
            return {"messages": [HumanMessage(interrupt("and now?"))]}

        def answer(state: State) -> dict[str, Any]:
            before_call()
            return {"messages": [model.invoke(state["messages"])]}

        graph = StateGraph(State)
        graph.add_sequence([("ask", ask), ("human", human), ("answer", answer)])
        graph.add_edge(START, "ask")
        graph.add_edge("answer", END)
        self.graph = orla.wrap(graph.compile(checkpointer=InMemorySaver()))
        self.config: Any = {"configurable": {"thread_id": "t"}}

    def begin(self) -> None:
        self.graph.invoke({"messages": [SystemMessage(RULES), HumanMessage("Question 7?")]}, self.config)

    def resume(self) -> Record:
        self.graph.invoke(Command(resume="And question 8?"), self.config)
        return self.orla.records()[-1]


@pytest.fixture
def engine() -> Iterator[list[EmbeddedEngine]]:
    engines = [EmbeddedEngine(EngineSettings(**TINY))]
    try:
        yield engines
    finally:
        engines[-1].close()


def restart(engines: list[EmbeddedEngine]) -> None:
    settings = replace(engines[-1].settings, port=engines[-1].port)
    engines[-1].close()
    engines.append(EmbeddedEngine(settings))
    time.sleep(RETURN_AGAIN_S)  # a night is longer


def a_night(
    engines: list[EmbeddedEngine], make_orla: Callable[..., Orla], *, wait: bool, max_saved: int = 0
) -> tuple[Night, Record]:
    backend = Backend("main", engines[-1].url, model="tiny", engine="llamacpp", max_saved=max_saved)
    orla = make_orla(backend, mapper={"*": "main"}, warm_up=OVERNIGHT)

    def until_warm() -> None:
        wait_until(decided if wait else lambda: busy(engines[-1]))

    def decided() -> bool:
        said = warm_ups(orla)
        return bool(said.done or "there" in said.refused)

    night = Night(engines[-1], orla, until_warm)
    night.begin()
    wait_until(lambda: not max_saved or "save:saved" in orla.records()[0].cache_orders)
    restart(engines)
    return night, night.resume()


def wait_until(so: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not so() and time.monotonic() < deadline:
        time.sleep(0.01)


def warm_ups(orla: Orla) -> Any:
    return orla.statistics().backends["main"].warm_ups


def busy(engine: EmbeddedEngine) -> bool:
    slots = httpx.get(engine.url.removesuffix("/v1") + "/slots", timeout=PATIENCE_S, trust_env=False).json()
    return any(slot["is_processing"] for slot in slots)


OVERNIGHT = WarmUp(least_tokens=100)


@pytest.mark.engine
@pytest.mark.parametrize("max_saved", [0, 4], ids=["nothing saved", "saved in a folder that goes with the engine"])
def test_after_the_night_the_history_is_there_before_the_call(
    engine: list[EmbeddedEngine], make_orla: Callable[..., Orla], max_saved: int
) -> None:
    night, record = a_night(engine, make_orla, wait=True, max_saved=max_saved)
    said, (before, _) = warm_ups(night.orla), night.orla.records()
    history = before.prompt_tokens
    assert history is not None and history > 250 and record.cached_tokens is not None
    assert record.cached_tokens > 0.98 * history
    assert said.done == 1 and said.used_tokens > 0.98 * history and said.wasted_tokens < 16
    assert before.cache_orders[-1] == "warm:warmed" and before.cache_borne_out


@pytest.mark.engine
def test_what_was_saved_to_a_folder_that_stays_is_restored_instead(
    make_orla: Callable[..., Orla], tmp_path: Path
) -> None:
    engines = [EmbeddedEngine(EngineSettings(**TINY, save_dir=tmp_path))]
    try:
        night, record = a_night(engines, make_orla, wait=True, max_saved=4)
    finally:
        engines[-1].close()
    before = night.orla.records()[0]
    assert (warm_ups(night.orla).started, warm_ups(night.orla).refused) == (0, {"there": 1})
    assert record.cache_action == "restored"
    assert record.cached_tokens is not None and before.prompt_tokens is not None
    assert record.cached_tokens > 0.98 * before.prompt_tokens


@pytest.mark.engine
def test_without_warm_ups_it_is_computed_while_its_user_waits(
    engine: list[EmbeddedEngine], make_orla: Callable[..., Orla]
) -> None:
    backend = Backend("main", engine[-1].url, model="tiny", engine="llamacpp", max_saved=0)
    night = Night(engine[-1], make_orla(backend, mapper={"*": "main"}, warm_up=False), lambda: None)
    night.begin()
    restart(engine)
    assert night.resume().cached_tokens == 0
    assert warm_ups(night.orla).kept_prompts == 0


@pytest.mark.engine
def test_a_call_that_comes_too_soon_does_not_wait_for_it(
    engine: list[EmbeddedEngine], make_orla: Callable[..., Orla]
) -> None:
    night, record = a_night(engine, make_orla, wait=False)
    said = warm_ups(night.orla)
    assert (said.started, said.given_up, said.done) == (1, 1, 0)
    assert record.error is None and record.queue_wait_s < 1.0
    wait_until(lambda: not busy(engine[-1]))
    assert not busy(engine[-1]), "it ended on the engine too"
