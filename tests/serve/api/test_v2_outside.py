"""Outside services of v2: one that maps stages, one that orders queues, prices that change, tools behind HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from orla_lg.serve.posted.items import PostedPolicy, read_item
from tests.serve.fixtures import until
from tests.serve.in_thread import server
from tests.serve.outside import OutsideService
from tests.serve.posted.test_applying import backend as item
from tests.serve.posted.test_applying import chat, put, ran_on, written
from tests.stub_engine import Gate, Reply, StubEngine

from .test_v2_calls import completions
from .test_v2_control import Api


@pytest.fixture
def api() -> Iterator[Api]:
    with server() as running:
        yield Api(running)


# The outside mapper


def test_the_outside_mapper_chooses_and_whatever_fails_there_is_mapped_without_it(
    api: Api, engine: StubEngine, other_engine: StubEngine
) -> None:
    put(api.running, item("light", engine, input_cost_per_mtoken=1.5))
    put(api.running, item("heavy", other_engine))
    api.ask("PUT", "/api/v1/stages/a", {"backend": "light"})
    api.ask("POST", "/api/v1/mappings", {"name": "pinned", "overrides": {"a": "light"}}, 201)
    with OutsideService(lambda asked: {"backend": "heavy"}) as service:
        api.ask("PUT", "/api/v1/stage-mapper", {"url": service.url, "timeout_ms": 2000})
        assert ran_on(api.running, "a", **{"X-Orla-Tag-Team": "core"}) == "heavy"
        (asked,) = service.asked
        assert (asked["stage"], asked["tags"]) == ("a", {"team": "core"})
        assert {"current", "candidates"} <= asked.keys()
        light = next(each for each in asked["candidates"] if each["name"] == "light")
        assert light["input_cost_per_mtoken"] == 1.5
        assert {"quality", "queue_depth", "in_flight", "capacity", "circuit"} <= light.keys()
        assert ran_on(api.running, "a", **{"X-Orla-Mapping": "pinned"}) == "light" and len(service.asked) == 1
        for answer in ({"backend": ""}, {"backend": "unknown"}, {}, b"no json", 500):
            service.answer = lambda asked, answer=answer: answer  # type: ignore[misc]
            assert ran_on(api.running, "a") == "light"
        hook = api.running.server.reloader.hook
        assert hook is not None and hook.statistics()["asked"] == 6
        api.ask("PUT", "/api/v1/stage-mapper", {"url": ""})
        asked_before = len(service.asked)
        assert ran_on(api.running, "a") == "light" and len(service.asked) == asked_before


def test_a_stage_that_the_file_maps_by_name_goes_there_whatever_is_said_outside(
    tmp_path: Path, engine: StubEngine, other_engine: StubEngine
) -> None:
    file = written(tmp_path / "orla.toml", engine, mapping='"*" = "light"\nsolve = "light"')
    with server(file) as running, OutsideService(lambda asked: {"backend": "heavy"}) as service:
        api = Api(running)
        put(running, item("heavy", other_engine))
        api.ask("PUT", "/api/v1/stage-mapper", {"url": service.url, "timeout_ms": 2000})
        assert (ran_on(running, "solve"), ran_on(running, "other")) == ("light", "heavy")
        assert [each["stage"] for each in service.asked] == ["other"]


# The outside order


class Crowd:
    """Calls that wait behind one that the engine holds back."""

    def __init__(self, api: Api, engine: StubEngine) -> None:
        self.gate = Gate()
        self.order: list[str] = []

        def reply(seen: Any) -> Reply:
            self.order.append(seen.last)
            return Reply(gate=self.gate) if seen.last == "first" else Reply()

        engine.rule = reply
        put(api.running, item("light", engine, max_concurrency=1))
        self.api, self.threads = api, list[threading.Thread]()

    def come(self, *names: str) -> None:
        scheduler = self.api.running.orla.core.serving.schedulers["light"]
        for name in names:
            before = scheduler.queue.waiting + scheduler.queue.in_flight
            body = {"model": "light", "messages": [{"role": "user", "content": name}]}
            sent = {"json": body, "headers": {"X-Orla-Stage": f"stage-{name}"}, "timeout": 20}
            url = f"{self.api.running.url}/v1/chat/completions"
            thread = threading.Thread(target=httpx.post, args=(url,), kwargs=sent)
            thread.start()
            self.threads.append(thread)
            until(lambda b=before: scheduler.queue.waiting + scheduler.queue.in_flight == b + 1, 5)
        until(lambda: "first" in self.order, 5)

    def go(self) -> list[str]:
        self.gate.open()
        for thread in self.threads:
            thread.join(20)
        return self.order


def outcomes(api: Api) -> dict[str, int]:
    return api.running.server.order.statistics().get("light", {})


def backwards(asked: Any) -> Any:
    return {"next": asked["pending"][-1]["id"]}


def test_the_call_that_the_outside_service_names_goes_next(api: Api, engine: StubEngine) -> None:
    with OutsideService(backwards) as service:
        api.ask("PUT", "/api/v1/scheduler/policy", {"url": service.url, "timeout_ms": 2000})
        crowd = Crowd(api, engine)
        crowd.come("first", "b", "c", "d")
        until(lambda: bool(service.asked) and len(service.asked[-1]["pending"]) == 3, 5)
        until(lambda: outcomes(api).get("ok", 0) == len(service.asked), 5)
        asked = service.asked[-1]
        assert asked["backend"] == {"name": "light", "capacity": 1, "inflight": 1, "queue_depth": 3}
        assert [each["stage"] for each in asked["pending"]] == ["stage-b", "stage-c", "stage-d"]
        assert all(
            {"id", "stage", "model", "tags", "enqueued_at", "wait_ms"} == set(each) for each in asked["pending"]
        )
        assert crowd.go()[:2] == ["first", "d"]
        api.running.orla.core.serving.schedulers["light"].check_integrity()


def test_a_whole_ranking_orders_all_that_wait(api: Api, engine: StubEngine) -> None:
    with OutsideService(lambda asked: {"order": [each["id"] for each in asked["pending"]][::-1]}) as service:
        api.ask("PUT", "/api/v1/scheduler/policy", {"url": service.url, "timeout_ms": 2000})
        crowd = Crowd(api, engine)
        crowd.come("first", "b", "c", "d")
        until(lambda: bool(service.asked) and len(service.asked[-1]["pending"]) == 3, 5)
        until(lambda: outcomes(api).get("ok", 0) == len(service.asked), 5)
        assert crowd.go() == ["first", "d", "c", "b"]


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [({"next": "unheard-of"}, "fallback_invalid"), (b"no json", "fallback_error"), ("slow", "fallback_timeout")],
)
def test_whatever_fails_there_is_counted_and_the_order_is_as_without_it(
    api: Api, engine: StubEngine, answer: Any, outcome: str
) -> None:
    def reply(asked: Any) -> Any:
        if answer == "slow":
            time.sleep(0.3)
        return answer

    with OutsideService(reply) as service:
        api.ask("PUT", "/api/v1/scheduler/policy", {"url": service.url, "timeout_ms": 50})
        crowd = Crowd(api, engine)
        crowd.come("first", "b", "c", "d")
        until(lambda: outcomes(api).get(outcome, 0) > 0, 5)
        began_s = time.monotonic()
        assert crowd.go() == ["first", "b", "c", "d"]
        assert time.monotonic() - began_s < 3  # no grant waits for an answer
        assert not outcomes(api).get("ok")


def test_switched_off_the_queues_are_ordered_as_before(api: Api, engine: StubEngine) -> None:
    with OutsideService(backwards) as service:
        api.ask("PUT", "/api/v1/scheduler/policy", {"url": service.url, "timeout_ms": 2000})
        crowd = Crowd(api, engine)
        crowd.come("first", "b", "c", "d")
        until(lambda: bool(service.asked) and len(service.asked[-1]["pending"]) == 3, 5)
        until(lambda: outcomes(api).get("ok", 0) == len(service.asked), 5)
        api.ask("PUT", "/api/v1/scheduler/policy", {"url": ""})
        assert crowd.go() == ["first", "b", "c", "d"]
        assert not api.running.orla.core.serving.records.heard


# Prices


def test_a_price_is_read_from_its_source_and_the_posted_one_comes_back(api: Api, engine: StubEngine) -> None:
    with OutsideService(lambda asked: {"input_cost_per_mtoken": 9, "output_cost_per_mtoken": 8.5}) as service:
        put(api.running, item("light", engine, input_cost_per_mtoken=1.0, cost_source=service.url))
        scheduler = api.running.orla.core.serving.schedulers["light"]
        until(lambda: scheduler.backend.cost.input_per_mtoken == 9, 5)
        assert scheduler.backend.cost.output_per_mtoken == 8.5
        assert api.ask("GET", "/api/v1/backends/light")["input_cost_per_mtoken"] == 1.0
        api.ask("PATCH", "/api/v1/backends/light", {"quality": 0.5})
        assert (scheduler.backend.cost.input_per_mtoken, scheduler.backend.quality) == (9, 0.5)
        service.answer = lambda asked: {"input_cost_per_mtoken": -1, "output_cost_per_mtoken": 1}
        api.ask("PATCH", "/api/v1/backends/light", {"cost_source": service.url + "?again"})
        until(lambda: api.running.server.prices.failures["light"] == 1, 5)
        assert scheduler.backend.cost.input_per_mtoken == 9  # the last one that could be read
        api.ask("PATCH", "/api/v1/backends/light", {"cost_source": ""})
        until(lambda: scheduler.backend.cost.input_per_mtoken == 1.0, 5)
        assert chat(api.running, model="light").status_code == 200


# Tools


def tool(service: OutsideService, **more: Any) -> dict[str, Any]:
    return {
        "name": "boltz", "kind": "tool", "tool_kind": "fold", "endpoint": service.url, "max_concurrency": 1,
        "rates": {"gpu_seconds": 0.001}, **more,
    }  # fmt: skip


def call_tool(api: Api, body: Any, stage: str = "predict", kind: str = "fold", **headers: str) -> httpx.Response:
    said = {"X-Orla-Stage": stage, "X-Orla-Workflow-Run": "r", **headers}
    return httpx.post(f"{api.running.url}/v1/tools/{kind}", json=body, headers=said, timeout=10)


def test_a_tool_is_called_accounted_for_and_listed(api: Api) -> None:
    reply = {"payload": {"structure": "x"}, "usage": {"gpu_seconds": 2.5}, "more": 1}
    with OutsideService(lambda asked: reply) as service:
        made = api.ask("POST", "/api/v1/backends", tool(service), 201)
        assert (made["kind"], made["tool_kind"], made["rates"]) == ("tool", "fold", {"gpu_seconds": 0.001})
        api.ask("PUT", "/api/v1/stages/predict", {"backend": "boltz"})
        answer = call_tool(api, {"sequences": ["MKTV"]}, **{"X-Orla-Tag-Team": "core"})
        assert answer.status_code == 200 and answer.json() == {name: reply[name] for name in ("payload", "usage")}
        assert service.asked == [{"sequences": ["MKTV"]}] and "authorization" not in service.headers[0]
        (found,) = completions(api, "predict", 1)
        assert found["completion_id"] == answer.headers["x-orla-completion-id"]
        assert (found["backend"], found["tool_kind"], found["usage"]) == ("boltz", "fold", {"gpu_seconds": 2.5})
        assert found["cost_usd"] == pytest.approx(0.0025) and found["tags"] == {"team": "core"}
        assert (found["status"], found["workflow_run"], found["prompt_tokens"]) == ("success", "r", None)
        service.answer = lambda asked: {"payload": 1, "cost_usd": 4.0, "usage": {"gpu_seconds": 1}}
        call_tool(api, {})
        assert completions(api, "predict", 2)[0]["cost_usd"] == 4.0


def test_a_tool_that_cannot_be_called_is_an_error_of_v2(api: Api, engine: StubEngine) -> None:
    def refused(answer: httpx.Response) -> tuple[int, str]:
        return answer.status_code, answer.json()["error"]["type"]

    with OutsideService(lambda asked: 500) as service:
        assert refused(call_tool(api, {})) == (400, "invalid_request_error")  # no such stage
        put(api.running, item("light", engine))
        api.ask("POST", "/api/v1/backends", tool(service), 201)
        for to, status in (("light", 400), ("nothing", 502), ("boltz", 502)):
            api.ask("PUT", "/api/v1/stages/predict", {"backend": to})
            assert refused(call_tool(api, {}))[0] == status
        assert refused(call_tool(api, {}, kind="dock")) == (400, "invalid_request_error")
        assert completions(api, "predict", 1)[0]["status"] == "error"
        for answer in ([], {"no": "payload"}, b"no json"):
            service.answer = lambda asked, answer=answer: answer  # type: ignore[misc]
            assert refused(call_tool(api, {}))[0] == 502
        call_tool(api, {})
        left_alone = call_tool(api, {})
        assert refused(left_alone) == (503, "server_error") and 0 < int(left_alone.headers["retry-after"]) <= 5
        assert api.ask("GET", "/api/v1/backends/boltz")["circuit_breaker"] == "open"
        deny = {"name": "p", "subjects": ["team:core"], "resources": ["tool:fold"], "action": "deny"}
        put(api.running, read_item(PostedPolicy, deny))
        assert refused(call_tool(api, {}, **{"X-Orla-Tag-Team": "core"})) == (403, "permission_denied")
        assert chat(api.running, model="boltz").status_code == 404  # a tool is no model


def test_calls_of_a_tool_wait_for_one_another(api: Api) -> None:
    at_once, most, lock = [0], [0], threading.Lock()

    def reply(asked: Any) -> Any:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.02)
        with lock:
            at_once[0] -= 1
        return {"payload": asked}

    with OutsideService(reply) as service:
        api.ask("POST", "/api/v1/backends", tool(service, max_concurrency=2), 201)
        api.ask("PUT", "/api/v1/stages/predict", {"backend": "boltz"})
        threads = [threading.Thread(target=call_tool, args=(api, {"n": n})) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(service.asked) == 6 and most[0] <= 2


def test_a_key_goes_to_a_tool_only_from_a_variable_that_may_be_named(api: Api) -> None:
    with OutsideService(lambda asked: {"payload": 1}) as service:
        body = tool(service, api_key_env_var="HOME")
        assert api.refused("POST", "/api/v1/backends", body, 400, "must not be named") == "invalid_request_error"
        assert api.ask("GET", "/api/v1/backends") == {"backends": []}
