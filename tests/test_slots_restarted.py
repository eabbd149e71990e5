"""An engine started anew while nobody looked saves its empty slots without complaint: what it counts is heeded."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Orla
from orla_lg.testing.faults.engine import error_body
from orla_lg.testing.faults.exchange import Seen
from tests.conftest import at, chat
from tests.stub_engine import StubEngine
from tests.test_slots_swapped import Dear, until

SLOTS = 2
RULES = "You keep the books of this house. " * 80


class Saving(StubEngine):
    """Saves and restores slots as llama.cpp's server does, word for token, and draws a mark at each start."""

    def __init__(self) -> None:
        super().__init__(slots=SLOTS)
        self.files: dict[str, list[str]] = {}
        self.mark = secrets.token_hex(16)

    def forget(self) -> None:
        super().forget()
        self.mark = secrets.token_hex(16)

    def props(self) -> dict[str, Any] | None:
        return {**(super().props() or {}), "media_marker": f"<__media_{self.mark}__>", "model_path": "m.gguf"}

    def slot_action(self, seen: Seen) -> tuple[int, dict[str, Any]]:
        index, action = int(seen.path.rpartition("/")[2]), seen.query.get("action")
        name = seen.body.get("filename", "")
        if action == "save":
            words = self.files[name] = self._slots[index]
            return 200, {
                "id_slot": index, "filename": name, "n_saved": len(words), "n_written": 40 + 23_000 * len(words),
                "timings": {"save_ms": 1.0},
            }  # fmt: skip
        if action == "restore":
            if name not in self.files:
                return 400, error_body("Unable to restore slot, no available space or invalid slot save file", 400)
            words = self._slots[index] = self.files[name]
            return 200, {
                "id_slot": index, "filename": name, "n_restored": len(words), "n_read": 40 + 23_000 * len(words),
                "timings": {"restore_ms": 1.0},
            }  # fmt: skip
        return super().slot_action(seen)


@pytest.fixture
def saving() -> Iterator[Saving]:
    with Saving() as engine:
        yield engine


def a_chat(orla: Orla, engine: StubEngine) -> Callable[[str], str]:
    """Return what takes a turn on a thread and says what became of its slot."""
    llm = chat(engine)

    def answer(state: MessagesState) -> Any:
        return {"messages": [llm.invoke(state["messages"])]}

    graph = orla.wrap(
        StateGraph(MessagesState).add_node("answer", answer).add_edge(START, "answer").compile(InMemorySaver())
    )

    def turn(thread: str) -> str:
        said = [("system", f"{thread}: {RULES}"), ("user", f"What of {thread}?")]
        graph.invoke({"messages": said}, {"configurable": {"thread_id": thread}})
        return str(orla.records()[-1].cache_action)

    return turn


def test_an_empty_slot_is_not_taken_for_a_copy(saving: Saving, make_orla: Callable[..., Orla]) -> None:
    orla = make_orla(at(saving, engine="llamacpp"), mapper={"*": "main"})
    scheduler = orla.core.serving.schedulers["main"]
    scheduler.caches.swaps.prices = Dear()
    turn = a_chat(orla, saving)
    assert [turn(thread) for thread in ("ann", "bob", "cid")] == ["claimed", "claimed", "reclaimed"]
    assert turn("ann") == "restored"
    table = scheduler.cache.table
    assert table is not None and table.swaps.pool is not None
    until(lambda: not any(slot.moving for slot in table.slots), "who lies idle is saved ahead")
    assert "save:failed" not in effects(orla), "what a running engine saves is whole"

    for slot in table.slots:  # a turn more, and not saved yet
        slot.prefix = (*slot.prefix, 1)
    before = {slot.owner for slot in table.slots}
    saving.restart()  # and nobody called meanwhile
    assert turn("dan") == "reclaimed"
    (stays,) = {slot.owner for slot in table.slots} - {"dan"}
    (left,) = before - {stays}
    until(lambda: all(slot.owner == "dan" or not slot.tokens for slot in table.slots), "all of it is gone")
    assert effects(orla)["save:failed"] >= 1
    assert left is not None and table.swaps.pool.find(left, lambda entry: 1.0) is None, "an empty file was kept"


@pytest.mark.parametrize("asked_again", [True, False])
def test_who_returns_to_an_engine_started_anew_is_told_the_truth(
    saving: Saving, make_orla: Callable[..., Orla], asked_again: bool
) -> None:
    # Without warm-ups: once its restart is known, one may bring the prompt back before the call comes.
    orla = make_orla(at(saving, engine="llamacpp"), mapper={"*": "main"}, warm_up=False)
    health = orla.core.serving.schedulers["main"].health
    turn = a_chat(orla, saving)
    assert [turn("ann"), turn("ann")] == ["claimed", "reused"]
    until(lambda: not health.asking, "who returned had it asked")
    saving.restart()
    health._probed_s += -9.0 if asked_again else 9.0  # when it was last asked: long ago, or just now
    assert turn("ann") == "recomputed", "nothing was saved of it"
    record = orla.records()[-1]
    assert record.cached_tokens == 0 and (record.expected_cached_tokens == 0) == asked_again


def effects(orla: Orla) -> dict[str, int]:
    return orla.statistics().backends["main"].memory.effects
