"""Sessions: when their runs begin and end, and how many there may be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from orla_lg import Orla
from orla_lg.serve.gateway.settings import GatewaySettings
from tests.conftest import at
from tests.serve.gateway.served import GatewayServer
from tests.stub_engine import Gate, Reply, StubEngine

HELLO: Any = [{"role": "user", "content": "hello"}]
PATIENCE_S = 60.0


def ask(gateway: GatewayServer, path: str = "/v1/chat/completions", **headers: str) -> None:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = {"model": "main", "messages": HELLO}
    httpx.post(gateway.url + path, json=body, headers=named, timeout=60.0).raise_for_status()


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def test_calls_of_a_session_are_one_workflow_and_one_run(gateway: GatewayServer) -> None:
    for _ in range(3):
        ask(gateway, x_session_id="s-1", x_orla_stage="plan")
    ask(gateway, "/w/s-1/s/act/v1/chat/completions")
    records = gateway.ended(4)
    assert {record.workflow for record in records} == {"s-1"} and len({record.run for record in records}) == 1
    assert [record.stage for record in records] == ["plan", "plan", "plan", "act"]
    workflows = gateway.orla.statistics().workflows
    assert (workflows.runs, workflows.running) == (1, 1)


def test_a_call_that_says_nothing_is_a_workflow_of_its_own(gateway: GatewayServer) -> None:
    ask(gateway)
    ask(gateway)
    one, other = gateway.ended(2)
    assert one.workflow != other.workflow and one.run is None
    assert gateway.orla.statistics().workflows.runs == 0


def test_a_session_without_calls_is_idle_and_comes_back(engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    with GatewayServer(make_orla(at(engine)), settings=GatewaySettings(session_idle_s=0.1)) as gateway:
        ask(gateway, x_session_id="s-1")
        until(lambda: gateway.orla.statistics().workflows.idle == 1)
        assert gateway.orla.statistics().workflows.outcomes == {"done": 1} and len(gateway.gateway.sessions) == 0
        ask(gateway, x_session_id="s-1")
        workflows = gateway.orla.statistics().workflows
        assert (workflows.running, workflows.idle) == (1, 0)
        first, second = gateway.ended(2)
        assert first.workflow == second.workflow and first.run != second.run


def test_a_session_with_a_call_under_way_is_not_idle(engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    gate = Gate()
    engine.rule = lambda seen: Reply(gate=gate)
    with GatewayServer(make_orla(at(engine)), settings=GatewaySettings(session_idle_s=0.06)) as gateway:
        asking = threading.Thread(target=lambda: ask(gateway, x_session_id="s-1"))
        asking.start()
        engine.wait(lambda engine: engine.in_flight == 1)
        time.sleep(0.25)
        assert gateway.orla.statistics().workflows.running == 1
        gate.open()
        asking.join(PATIENCE_S)
        until(lambda: gateway.orla.statistics().workflows.idle == 1)


def test_a_session_that_is_said_to_be_over_is(gateway: GatewayServer) -> None:
    ask(gateway, x_dynamo_session_id="d-1")
    assert gateway.orla.statistics().workflows.running == 1
    ask(gateway, x_dynamo_session_id="d-1", x_dynamo_session_final="true")
    until(lambda: gateway.orla.statistics().workflows.runs == 0)
    assert gateway.orla.statistics().workflows.idle == 0


def test_sessions_are_bounded(engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    with GatewayServer(make_orla(at(engine)), settings=GatewaySettings(max_sessions=2)) as gateway:
        for number in range(5):
            ask(gateway, x_session_id=f"s-{number}")
        workflows = gateway.orla.statistics().workflows
        assert (workflows.running, workflows.idle) == (2, 3)


def test_where_all_sessions_are_busy_a_further_one_is_served_without_a_run(
    engine: StubEngine, make_orla: Callable[..., Orla]
) -> None:
    gate = Gate()
    engine.rule = lambda seen: Reply(gate=gate) if seen.headers.get("x-session-id") == "s-0" else None
    with GatewayServer(make_orla(at(engine)), settings=GatewaySettings(max_sessions=1)) as gateway:
        asking = threading.Thread(target=lambda: ask(gateway, x_session_id="s-0"))
        asking.start()
        engine.wait(lambda engine: engine.in_flight == 1)
        ask(gateway, x_session_id="s-1")
        (record,) = gateway.ended()
        assert (record.workflow, record.run) == ("s-1", None)
        gate.open()
        asking.join(PATIENCE_S)


def test_a_refused_call_leaves_no_session_busy(gateway: GatewayServer) -> None:
    body = {"model": "main", "messages": HELLO}
    for headers in ({"x-orla-mapping": "nowhere"}, {"x-orla-priority": "x"}):
        httpx.post(gateway.url + "/v1/chat/completions", json=body, headers={"x-session-id": "s-1", **headers})
    book = gateway.gateway.sessions
    assert all(not session.calls for session in book._open.values())


@pytest.mark.parametrize("tenants", [("red",), ("red", "blue")])
def test_the_tenant_is_the_keys_and_may_be_narrowed_only(
    engine: StubEngine, make_orla: Callable[..., Orla], tenants: tuple[str, ...]
) -> None:
    with GatewayServer(make_orla(at(engine)), tenants=tenants) as gateway:
        ask(gateway, x_session_id="s-1", x_api_key=gateway.key, x_orla_tenant=tenants[0])
        ask(gateway, x_session_id="s-1", x_api_key=gateway.key, x_orla_tenant=tenants[-1])
        body = {"model": "main", "messages": HELLO}
        other = httpx.post(
            gateway.url + "/v1/chat/completions",
            json=body,
            headers={"x-orla-tenant": "green", "x-api-key": gateway.key},
        )
        assert other.status_code == 403 and "green" in other.text
        assert [record.tenant for record in gateway.ended(2)] == ["red", tenants[-1]]
        assert len({record.run for record in gateway.records()}) == len(tenants)


def test_what_a_key_may_use(engine: StubEngine, other_engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    orla = make_orla(at(engine), at(other_engine, "dear"), mapper={"plan": ["dear", "main"], "big": "dear"})

    def status(stage: str, model: str = "main") -> int:
        return httpx.post(
            gateway.url + "/v1/chat/completions", json={"model": model, "messages": HELLO},
            headers={"x-orla-stage": stage, "x-api-key": gateway.key},
        ).status_code  # fmt: skip

    with GatewayServer(orla, backends=("main",), stages=("plan", "big", "act")) as gateway:
        assert [status("plan"), status("act"), status("big"), status("act", "dear"), status("other")] == [
            200, 200, 403, 403, 403,
        ]  # fmt: skip
        assert len(engine.chats) == 2 and not other_engine.chats
        models = [
            each["id"]
            for each in httpx.get(gateway.url + "/v1/models", headers={"x-api-key": gateway.key}).json()["data"]
        ]
        assert "main" in models and "dear" not in models
