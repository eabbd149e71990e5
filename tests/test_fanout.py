"""Send branches with a prefix in common, through LangGraph and on the wire: where they go, what is prefilled."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.graph import START, StateGraph
from langgraph.types import Send

from orla_lg import Orla
from orla_lg.mappers import ExplicitMapper, LoadAware
from tests.conftest import at, chat
from tests.stub_engine import Reply, StubEngine

MakeOrla = Callable[..., Orla]
PREFIX = "word " * 3000
BRANCHES = 8


class State(TypedDict):
    said: Annotated[list[str], operator.add]


def fan_out(llm: Any, prefix: str = PREFIX) -> Any:
    def send(state: State) -> list[Send]:
        return [Send("ask", {"question": f"question {number}"}) for number in range(BRANCHES)]

    async def ask(branch: dict[str, str]) -> dict[str, list[str]]:
        answer = await llm.ainvoke([("system", prefix), ("user", branch["question"])])
        return {"said": [answer.content]}

    return StateGraph(State).add_node("ask", ask).add_conditional_edges(START, send, ["ask"])


def run(graph: Any) -> None:
    assert len(asyncio.run(graph.ainvoke({"said": []}))["said"]) == BRANCHES


def prefilled(orla: Orla) -> float:
    """What was prefilled, over one branch's prompt."""
    records = orla.records()
    return sum(r.prompt_tokens - r.cached_tokens for r in records) / records[0].prompt_tokens


@pytest.fixture
def llamas() -> Iterator[list[StubEngine]]:
    """Two engines with eight slots each; a first token takes a moment."""
    with ExitStack() as stack:
        made = [stack.enter_context(StubEngine(slots=BRANCHES)) for _ in range(2)]
        for engine in made:
            engine.rule = lambda seen: Reply(text="yes", before_s=0.02)
        yield made


def test_branches_prefill_what_they_share_once(llamas: list[StubEngine], make_orla: MakeOrla) -> None:
    parts = list[float]()
    while not parts or parts[-1] >= 1.1:
        assert len(parts) < 4, f"a line that a busy machine makes slow is left, but not each time: {parts}"
        orla = make_orla(at(llamas[0], engine="llamacpp"), mapper={"*": "main"})
        run(orla.wrap(fan_out(chat(llamas[0], max_tokens=4), f"{len(parts)} {PREFIX}")))
        parts.append(prefilled(orla))
    assert len({seen.body["id_slot"] for seen in llamas[0].chats[-BRANCHES:]}) == 1 and llamas[0].collisions == 0


def test_branches_stay_on_the_backend_that_has_their_prefix(llamas: list[StubEngine], make_orla: MakeOrla) -> None:
    one, other = (at(engine, name, engine="llamacpp") for engine, name in zip(llamas, ("one", "other"), strict=True))
    orla = make_orla(one, other, mapper=LoadAware(ExplicitMapper({"*": ["one", "other"]})))
    run(orla.wrap(fan_out(chat(llamas[1], max_tokens=4))))
    assert {record.backend for record in orla.records()} == {"one"}
    assert prefilled(orla) < 1.1


def test_another_runs_prefix_draws_a_call_to_where_it_is(make_orla: MakeOrla) -> None:
    with StubEngine() as engine:
        engine.rule = lambda seen: Reply(text="yes")
        orla = make_orla(at(engine, "one"), at(engine, "other"),
                         mapper=LoadAware(ExplicitMapper({"*": ["one", "other"]})))  # fmt: skip
        orla.variant("there", {"*": "other"})
        graph = orla.wrap(fan_out(chat(engine, max_tokens=4)))
        asyncio.run(graph.ainvoke({"said": []}, {"configurable": {"orla": {"variant": "there"}}}))
        run(graph)
        assert {record.backend for record in orla.records()} == {"other"}
        run(orla.wrap(fan_out(chat(engine, max_tokens=4), "another " * 3000)))
        assert {record.backend for record in orla.records()[2 * BRANCHES :]} == {"one"}
