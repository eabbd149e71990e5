"""Metrics of an ``Orla`` in a process of the application's."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from orla_lg import BudgetExceeded, ChatOrla, ConfigError, Limit, Limits, Orla
from orla_lg.mappers import ExplicitMapper, First, HttpMapper
from orla_lg.observe import metrics
from tests.conftest import at, chat
from tests.stub_engine import StubEngine

MakeOrla = Callable[..., Orla]
V2 = {
    "orla_requests_total", "orla_backend_latency_seconds_bucket", "orla_scheduler_queue_depth",
    "orla_scheduler_in_flight", "orla_scheduler_capacity", "orla_scheduler_dispatched_total",
    "orla_scheduler_rejections_total", "orla_circuit_breaker_state", "orla_stage_mapper_decisions_total",
    "orla_feedback_total", "orla_cost_usd_total",
}  # fmt: skip
"""Names that Orla's own daemon has, which dashboards of it read."""
HI: Any = {"messages": [("user", "the prompt is a secret")]}


def scraped(registry: CollectorRegistry) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return samples by name and labels, as Prometheus would read them."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return scraped(registry)[name, frozenset(labels.items())]


def wrapped(orla: Orla, engine: StubEngine) -> Any:
    model = chat(engine)
    node = lambda state: {"messages": [model.invoke(state["messages"])]}  # noqa: E731
    graph = StateGraph(MessagesState).add_node("draft", node).add_edge(START, "draft")
    return orla.wrap(graph.compile(checkpointer=InMemorySaver()))


def test_a_run_is_counted_and_nothing_says_whose_it_was(make_orla: MakeOrla, engine: StubEngine) -> None:
    orla, registry = make_orla(at(engine, "light", max_concurrency=3), mapper={"*": "light"}), CollectorRegistry()
    counted = metrics(orla, registry)
    graph = wrapped(orla, engine)
    for thread in ("thread-seven", "thread-eight"):
        config = {"configurable": {"thread_id": thread, "orla": {"tenant": "tenant-nine"}}}
        graph.invoke(HI, config)
    orla.feedback(orla.records()[-1].id, 1.0)
    assert {name for name, _ in scraped(registry)} >= V2
    both = {"stage": "draft", "backend": "light"}
    assert value(registry, "orla_requests_total", **both, status="ok") == 2
    records = orla.records()
    assert value(registry, "orla_prompt_tokens_total", **both) == sum(each.prompt_tokens or 0 for each in records)
    assert math.isclose(
        value(registry, "orla_call_duration_seconds_sum", **both), sum(each.duration_s for each in records)
    )
    assert value(registry, "orla_queue_wait_seconds_count", **both) == 2
    assert value(registry, "orla_scheduler_capacity", backend="light") == 3
    assert value(registry, "orla_scheduler_dispatched_total", backend="light") == 2
    assert value(registry, "orla_stage_mapper_decisions_total", outcome="mapped") == 2
    assert value(registry, "orla_runs_ended_total", outcome="done") == 2
    assert value(registry, "orla_threads_idle") == 2 and value(registry, "orla_feedback_total") == 1
    text = generate_latest(registry).decode()
    for secret in ("thread-", "tenant-", "secret", records[0].run or "", records[0].id):
        assert secret and secret not in text
    counted.close()
    graph.invoke(HI, {"configurable": {"thread_id": "another"}})
    assert scraped(registry) == {}
    assert dict(counted._sums.stages())["draft", "light"].statuses == {"ok": 2}


def test_waiting_calls_are_shown_by_stage(make_orla: MakeOrla, engine: StubEngine) -> None:
    orla, registry = make_orla(at(engine, "light")), CollectorRegistry()
    metrics(orla, registry)
    orla.pause("light")
    graph = wrapped(orla, engine)
    where = {"stage": "draft", "backend": "light"}
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(graph.invoke, HI, {"configurable": {"thread_id": str(n)}}) for n in range(2)]
        until_s = time.monotonic() + 10.0
        while orla.statistics().backends["light"].queue.waiting < 2:
            assert time.monotonic() < until_s
            time.sleep(0.005)
        assert value(registry, "orla_stage_queue_depth", **where) == 2
        assert value(registry, "orla_backend_paused", backend="light") == 1
        assert value(registry, "orla_runs_open") == 2
        orla.resume("light")
        for run in runs:
            run.result()
    assert value(registry, "orla_scheduler_queue_depth", backend="light") == 0


def test_errors_are_counted_by_kind(make_orla: MakeOrla, engine: StubEngine) -> None:
    orla = make_orla(at(engine, "light"), limits=Limits(stages={"*": Limit(calls=1, per_s=3600)}))
    registry = CollectorRegistry()
    metrics(orla, registry)
    graph = wrapped(orla, engine)
    graph.invoke(HI, {"configurable": {"thread_id": "1"}})
    with pytest.raises(BudgetExceeded):
        graph.invoke(HI, {"configurable": {"thread_id": "2"}})
    kinds = {dict(labels)["kind"] for name, labels in scraped(registry) if name == "orla_call_errors_total"}
    assert kinds == {"BudgetExceeded"}
    statuses = [dict(labels)["status"] for name, labels in scraped(registry) if name == "orla_requests_total"]
    assert sorted(statuses) == ["ok", "refused"]


def test_what_a_mapper_elsewhere_said_is_counted(make_orla: MakeOrla, engine: StubEngine) -> None:
    gone = HttpMapper("http://127.0.0.1:1/map", 5.0)
    orla, registry = (
        make_orla(at(engine, "light"), mapper=First(gone, ExplicitMapper({"*": "light"}))),
        CollectorRegistry(),
    )
    seen = metrics(orla, registry)
    seen.counts.hook("scheduler", "applied")
    wrapped(orla, engine).invoke(HI, {"configurable": {"thread_id": "1"}})
    assert value(registry, "orla_hooks_total", hook="mapper", outcome="asked") == 1
    assert value(registry, "orla_hooks_total", hook="mapper", outcome="error") == 1
    assert value(registry, "orla_hooks_total", hook="scheduler", outcome="applied") == 1


def test_a_registry_has_one_orla(make_orla: MakeOrla, engine: StubEngine) -> None:
    one, other = make_orla(at(engine, "light")), make_orla(at(engine, "light"))
    registry = CollectorRegistry(auto_describe=True)
    counted = metrics(one, registry)
    before = len(other.core.serving.records.followers)
    with pytest.raises(ConfigError, match="another Orla"):
        metrics(other, registry)
    assert len(other.core.serving.records.followers) == before
    counted.close()
    counted.close()
    metrics(other, registry).close()


def test_without_the_package_it_says_what_to_install(
    make_orla: MakeOrla, engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    orla = make_orla(at(engine, "light"))
    monkeypatch.delitem(sys.modules, "orla_lg.observe.prometheus", raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match="orla-lg\\[serve\\]"):
        metrics(orla)


def test_calls_outside_of_graphs_are_of_no_stage(make_orla: MakeOrla, engine: StubEngine) -> None:
    orla, registry = make_orla(at(engine, "light")), CollectorRegistry()
    metrics(orla, registry)
    ChatOrla(orla=orla, model="light").invoke("hello")
    assert value(registry, "orla_requests_total", stage="(none)", backend="light", status="ok") == 1
    assert value(registry, "orla_stage_mapper_decisions_total", outcome="code") == 1
