from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Cost, Orla
from orla_lg.core.accounting import costs
from orla_lg.core.accounting.costs import CostBook, Spent
from orla_lg.core.call import Considered, Usage
from orla_lg.core.engine.backend import price
from tests.conftest import at, chat
from tests.mappers.test_cost_quality import record
from tests.stub_engine import StubEngine

COST = Cost(input_per_mtoken=2.0, output_per_mtoken=10.0, cached_input_per_mtoken=0.5)


def test_cached_tokens_are_paid_once_and_at_their_own_price() -> None:
    assert price(Usage(100, 40, 10), COST) == pytest.approx((60 * 2.0 + 40 * 0.5 + 10 * 10.0) / 1e6)
    assert price(Usage(100, 40, 10), Cost(2.0, 10.0)) == pytest.approx(300e-6), "no price of their own: as input"
    assert price(Usage(100, 40, 10), Cost(2.0, 10.0, 0.0)) == pytest.approx(220e-6), "free is a price"
    assert price(Usage(100, None, 0), COST) == pytest.approx(200e-6)
    assert price(Usage(100, 900, 0), COST) == pytest.approx(50e-6), "an engine that counts wrong pays nobody back"


def test_what_is_summed_up_is_what_the_records_say() -> None:
    book = CostBook()
    rows = [
        record(
            "a", "light", run="1", tenant="x", cost_usd=0.5, prompt_tokens=10, cached_tokens=4, completion_tokens=2
        ),
        record("a", "heavy", run="2", tenant=None, cost_usd=None, prompt_tokens=None),
        record("b", "light", run="2", tenant="y", cost_usd=0.25, prompt_tokens=5, completion_tokens=1),
        record("b", "light", run="2", external=True, cost_usd=9.0),
        record("b", None, run="2", cost_usd=9.0),
    ]
    for row in rows:
        book.add(row)
    spent = book.statistics()
    assert spent.total == Spent(0.75, 3, 15, 4, 3)
    assert {name: each.usd for name, each in spent.stages.items()} == {"a": 0.5, "b": 0.25}
    assert {name: each.calls for name, each in spent.runs.items()} == {"1": 1, "2": 2}
    assert {name: each.usd for name, each in spent.tenants.items()} == {"x": 0.5, "y": 0.25}
    assert {name: each.calls for name, each in spent.backends.items()} == {"light": 2, "heavy": 1}


def test_only_the_newest_runs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "KEEP_RUNS", 3)
    book = CostBook()
    for n in range(10):
        book.add(record("a", run=f"r{n}", cost_usd=1.0))
    assert list(book.statistics().runs) == ["r7", "r8", "r9"] and book.statistics().total.usd == 10.0


def test_a_record_is_a_plain_dict_whatever_a_mapper_said() -> None:
    told = (Considered("b", {"expected_s": math.inf, "waiting": 3}, "no"),)
    plain = record(considered=told).asdict()
    assert plain["considered"] == [{"backend": "b", "numbers": {"expected_s": None, "waiting": 3}, "verdict": "no"}]


def test_a_graphs_costs_by_stage_run_tenant_and_backend(engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    orla = make_orla(at(engine, "main", cost=COST), mapper={"*": "main"})
    llm = chat(engine)

    def node(state: MessagesState) -> dict[str, Any]:
        return {"messages": [llm.invoke(state["messages"])]}

    graph = orla.wrap(StateGraph(MessagesState).add_node("ask", node).add_edge(START, "ask"))
    for tenant in ("acme", "acme", "other"):
        graph.invoke({"messages": [("user", "hi")]}, {"configurable": {"orla": {"tenant": tenant}}})
    spent, rows = orla.statistics().costs, orla.records()
    assert spent.total.usd == pytest.approx(sum(row.cost_usd or 0 for row in rows)) and spent.total.usd > 0
    assert spent.tenants["acme"].calls == 2 and len(spent.runs) == 3 and set(spent.stages) == {"ask"}
    assert spent.backends["main"] == spent.total
