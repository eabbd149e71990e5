"""More workflows than slots on a real llama.cpp: who must leave is saved, and finds its cache again in any slot."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command, interrupt

from orla_lg import Backend, Orla, Record
from orla_lg.core.cache.slots.table import SlotTable
from orla_lg.core.cache.slots.worth import Prices
from orla_lg_llamacpp.embedded import free_port
from orla_lg_llamacpp.model import ensure_model
from tests.conftest import CALLER_KEY

pytestmark = [pytest.mark.engine, pytest.mark.timeout(280)]

SERVE = """
import sys
from pathlib import Path
from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings
port, slots, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
settings = EngineSettings(slots=slots, context_tokens=1024, threads=1, port=port, save_dir=folder)
with EmbeddedEngine(settings) as engine:
    print(engine.url, flush=True)
    sys.stdin.read()
"""
PATIENCE_S = 20.0


class Llama:
    """llama.cpp in a process of its own, whose files stay when it is started again on the same port."""

    def __init__(self, slots: int, folder: Path) -> None:
        ensure_model()
        self.slots, self.folder, self.port = slots, folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", SERVE, str(self.port), str(self.slots), str(self.folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline().startswith("http://"), "the engine did not start"

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def llama(slots: int, folder: Path) -> Iterator[Llama]:
    engine = Llama(slots, folder)
    try:
        yield engine
    finally:
        engine.stop()


@pytest.fixture
def two_slots(tmp_path: Path) -> Iterator[Llama]:
    with llama(2, tmp_path) as engine:
        yield engine


MakeOrla = Callable[..., Orla]


class Dear(Prices):
    """A prefill so slow that saving pays on any machine, however fast it is and whatever else it does."""

    def recompute_s(self, tokens: float) -> float:
        return tokens


def orla_at(engine: Llama, make_orla: MakeOrla) -> Orla:
    orla = make_orla(Backend("llama", engine.url, engine="llamacpp"), mapper={"*": "llama"})
    orla.core.serving.schedulers["llama"].caches.swaps.prices = Dear()
    return orla


def model(engine: Llama) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=engine.url, api_key=CALLER_KEY, model="smollm2", max_tokens=4, temperature=0, max_retries=0
    )


def chat_graph(engine: Llama) -> Any:
    llm = model(engine)

    def answer(state: MessagesState) -> Any:
        return {"messages": [llm.invoke(state["messages"])]}

    return StateGraph(MessagesState).add_node("answer", answer).add_edge(START, "answer").compile(InMemorySaver())


def rules_of(thread: int) -> str:
    return f"You keep the book of house {thread}. " + f"Room {thread} has a table, a lamp and {thread} chairs. " * 8


def say(graph: Any, thread: int, turn: int) -> str:
    """Take a turn on a thread, and return the answer."""
    system = [("system", rules_of(thread))] if turn == 0 else []
    asked = [*system, ("user", f"Say something of room {turn + 1}.")]
    state = graph.invoke({"messages": asked}, {"configurable": {"thread_id": f"t{thread}"}})
    return str(state["messages"][-1].content)


def records_of(orla: Orla, thread: int) -> list[Record]:
    return [record for record in orla.records() if record.workflow == f"t{thread}"]


def table_of(orla: Orla) -> SlotTable:
    table = orla.core.serving.schedulers["llama"].cache.table
    assert table is not None
    return table


def slot_of(orla: Orla, thread: int) -> int | None:
    return next((slot.index for slot in table_of(orla).slots if slot.owner == f"t{thread}"), None)


def effects(orla: Orla) -> dict[str, int]:
    return orla.statistics().backends["llama"].memory.effects


def until(met: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not met():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def covers_its_history(now: Record, before: Record) -> bool:
    """Whether a call found what its thread's call before left; the template's last tokens may differ."""
    assert before.prompt_tokens is not None
    return (now.cached_tokens or 0) >= before.prompt_tokens - 8


def test_six_threads_on_two_slots_find_their_caches_and_answer_as_on_six(
    two_slots: Llama, tmp_path: Path, make_orla: MakeOrla
) -> None:
    orla, order = orla_at(two_slots, make_orla), [0, 1, 2, 3, 4, 5, 3, 0, 5, 2, 4, 1, 1]
    turns = [(thread, order[:n].count(thread)) for n, thread in enumerate(order)]
    graph = orla.wrap(chat_graph(two_slots))
    places: dict[int, set[int | None]] = {thread: set() for thread in order}
    answers = []
    for thread, turn in turns:
        answers.append(say(graph, thread, turn))
        places[thread].add(slot_of(orla, thread))

    for thread in set(order):
        first, *later = records_of(orla, thread)
        assert (first.cached_tokens or 0) < 40, "its rules are its own"
        for before, now in zip([first, *later], later, strict=False):
            assert now.cache_action in ("restored", "reused"), now
            assert covers_its_history(now, before), now
    assert sum(record.cache_action == "restored" for record in orla.records()) >= 6
    assert any(len(slots) == 2 for slots in places.values()), "some came back to another slot"
    assert effects(orla)["restore:restored"] >= 6 and "save:failed" not in effects(orla)

    two_slots.stop()
    with llama(6, tmp_path) as six:
        bare = chat_graph(six)
        assert [say(bare, thread, turn) for thread, turn in turns] == answers


def test_flushing_one_workflow_leaves_the_files_and_slots_of_others(two_slots: Llama, make_orla: MakeOrla) -> None:
    orla = orla_at(two_slots, make_orla)
    graph = orla.wrap(chat_graph(two_slots))
    for thread in range(4):
        say(graph, thread, 0)
    until(lambda: not any(slot.moving for slot in table_of(orla).slots), "the engine is still told to save")
    sizes = [path.stat().st_size for path in two_slots.folder.iterdir()]
    assert len(sizes) >= 2 and min(sizes) > 100_000, "two threads at least had to leave"

    graph.checkpointer.delete_thread("t0")  # saved, in no slot
    graph.checkpointer.delete_thread("t3")  # in a slot
    until(lambda: min(path.stat().st_size for path in two_slots.folder.iterdir()) < 100, "its file was not emptied")
    until(lambda: not any(slot.moving for slot in table_of(orla).slots), "the engine is still told to empty")
    whole = [path for path in two_slots.folder.iterdir() if path.stat().st_size > 100_000]
    assert len(whole) == 2, "those of the two others, and no more"
    assert effects(orla)["flush:freed"] >= 2, "a slot and a file"
    for thread in (1, 2):
        say(graph, thread, 1)
        before, now = records_of(orla, thread)
        assert covers_its_history(now, before), "another workflow's flush reached it"
    say(graph, 0, 0)
    assert (records_of(orla, 0)[-1].cached_tokens or 0) < 40, "what was flushed was found again"


# The night --------------------------------------------------------------------------------------------------


def desk_graph(engine: Llama) -> Any:
    llm = model(engine)

    def draft(state: MessagesState) -> Any:
        return {"messages": [llm.invoke([("system", rules_of(0)), *state["messages"]])]}

    def approve(state: MessagesState) -> Any:
        return {"messages": [("user", interrupt("Is this right?"))]}

    def finish(state: MessagesState) -> Any:
        return {"messages": [llm.invoke([("system", rules_of(0)), *state["messages"]])]}

    graph = StateGraph(MessagesState).add_node("draft", draft).add_node("approve", approve).add_node("finish", finish)
    graph.add_edge(START, "draft").add_edge("draft", "approve").add_edge("approve", "finish")
    return graph.compile(InMemorySaver())


AT_NIGHT = {"configurable": {"thread_id": "t0"}}


def begin(graph: Any) -> None:
    state = graph.invoke({"messages": [("user", "Draft a line on room 1.")]}, AT_NIGHT)
    assert "__interrupt__" in state


def resume(graph: Any) -> str:
    return str(graph.invoke(Command(resume="Yes, and now say it again."), AT_NIGHT)["messages"][-1].content)


@pytest.fixture(scope="module")
def by_day(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the resumed run answers where no night came between."""
    with llama(2, tmp_path_factory.mktemp("day")) as engine:
        graph = desk_graph(engine)
        begin(graph)
        return resume(graph)


@pytest.mark.parametrize("files_stay", [True, False])
def test_interrupted_for_the_night(files_stay: bool, two_slots: Llama, make_orla: MakeOrla, by_day: str) -> None:
    orla = orla_at(two_slots, make_orla)
    graph, others = orla.wrap(desk_graph(two_slots)), orla.wrap(chat_graph(two_slots))
    begin(graph)
    with ThreadPoolExecutor(2) as pool:  # both at once, so that they need both slots
        list(pool.map(lambda thread: say(others, thread, 0), (1, 2)))
    assert slot_of(orla, 0) is None, "others took its slot"
    until(lambda: effects(orla).get("save:saved", 0) > 0, "it was not saved")
    two_slots.stop()
    if not files_stay:
        for path in two_slots.folder.iterdir():
            path.unlink()
    two_slots.start()

    assert resume(graph) == by_day
    before, now = records_of(orla, 0)
    if files_stay:
        assert now.cache_action == "restored" and covers_its_history(now, before)
        assert effects(orla)["restore:restored"] == 1
    else:
        assert now.cache_action == "recomputed" and now.cached_tokens == 0
        assert effects(orla)["restore:failed"] == 1


def test_a_night_in_its_own_slot_is_noticed(two_slots: Llama, make_orla: MakeOrla, by_day: str) -> None:
    """Nobody took its slot, but the engine was restarted while nobody called: what lay in the slot is gone."""
    orla = orla_at(two_slots, make_orla)
    graph = orla.wrap(desk_graph(two_slots))
    begin(graph)
    until(lambda: effects(orla).get("save:saved", 0) > 0, "who waits for a human is saved ahead")
    two_slots.stop()
    two_slots.start()
    orla.core.serving.schedulers["llama"].health._learned_s -= 8 * 3600.0
    orla.core.serving.schedulers["llama"].health._probed_s -= 8 * 3600.0

    assert resume(graph) == by_day
    before, now = records_of(orla, 0)
    assert now.cache_action == "restored" and covers_its_history(now, before)


# A restart that nobody noticed ------------------------------------------------------------------------------


def waiting_graph(engine: Llama, goes_on: threading.Event) -> Any:
    """Return a graph that calls, waits for *goes_on*, and calls again."""
    llm = model(engine)

    def ask(state: MessagesState) -> Any:
        return {"messages": [llm.invoke(state["messages"])]}

    def wait(state: MessagesState) -> Any:
        assert goes_on.wait(10 * PATIENCE_S)
        return {"messages": [("user", "And what else?")]}

    graph = StateGraph(MessagesState).add_node("ask", ask).add_node("wait", wait).add_node("again", ask)
    graph.add_edge(START, "ask").add_edge("ask", "wait").add_edge("wait", "again")
    return graph.compile()


def test_an_empty_slot_is_not_saved_as_if_it_were_full(two_slots: Llama, make_orla: MakeOrla) -> None:
    """The engine is started anew while two runs wait, and before anybody asks it; a third one then needs a slot."""
    orla, goes_on = orla_at(two_slots, make_orla), threading.Event()
    waiting, others = orla.wrap(waiting_graph(two_slots, goes_on)), orla.wrap(chat_graph(two_slots))
    asked = [[("system", rules_of(thread)), ("user", "Say something of it.")] for thread in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(waiting.invoke, {"messages": each}) for each in asked]
        try:
            until(lambda: len(orla.records()) == 2, "both wait for their second call")
            first = {record.workflow: record for record in orla.records()}
            two_slots.stop()
            two_slots.start()
            say(others, 2, 0)
            assert effects(orla).get("save:failed") == 1 and "save:saved" not in effects(orla), "it was kept"
            until(lambda: {slot.owner for slot in table_of(orla).slots if slot.tokens} <= {"t2"}, "the rest is gone")
        finally:
            goes_on.set()
        answers = [run.result(10 * PATIENCE_S)["messages"][-1].content for run in runs]
    again = [record for record in orla.records() if record.stage == "again"]
    assert {record.workflow for record in again} == set(first)
    assert max(record.cached_tokens or 0 for record in again) < 40, "their rules are their own"
    assert {record.expected_cached_tokens for record in again} == {0}, "nobody claimed that anything was there"
    assert "restore:restored" not in effects(orla)

    bare = waiting_graph(two_slots, goes_on)
    assert [bare.invoke({"messages": each})["messages"][-1].content for each in asked] == answers
