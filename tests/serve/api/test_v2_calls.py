"""v2's data plane and what is asked of past calls: headers, prompts, completions, feedback, kept requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from orla_lg.serve.store.store import MemoryStore
from tests.serve.fixtures import make, until
from tests.serve.in_thread import server
from tests.serve.posted.test_applying import written
from tests.stub_engine import Reply, StubEngine

from .test_v2_control import Api


@pytest.fixture
def api(tmp_path: Path, engine: StubEngine) -> Iterator[Api]:
    more = "[backends.light.cost]\ninput_per_mtoken = 1000\noutput_per_mtoken = 1000\n[serve]\nkeep_prompts = true"
    with server(written(tmp_path / "orla.toml", engine, more)) as running:
        yield Api(running)


def said(text: str = "hi", role: str = "user") -> dict[str, str]:
    return {"role": role, "content": text}


def chat(api: Api, *messages: dict[str, str], **more: Any) -> httpx.Response:
    headers = more.pop("headers", {})
    body = {"model": "auto", "messages": list(messages) or [said()], **more}
    answer = httpx.post(f"{api.running.url}/v1/chat/completions", json=body, headers=headers, timeout=10)
    assert answer.status_code == 200, answer.text
    return answer


def completions(api: Api, stage: str, count: int, query: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def there() -> bool:
        found[:] = api.ask("GET", f"/api/v1/stages/{stage}/completions{query}")["completions"]
        return len(found) >= count

    until(there)
    assert len(found) == count
    return found


def test_where_a_call_is_from_comes_by_headers_or_either_form_of_metadata(api: Api) -> None:
    chat(api, headers={"X-Orla-Stage": "a", "X-Orla-Workflow-Run": "run-1", "X-Orla-Tag-Team": "core"})
    chat(api, metadata={"orla.stage": "a", "orla.workflow_run": "run-2"})
    chat(api, metadata={"orla": {"stage": "a", "workflow_run": "run-3"}})
    chat(api, metadata={"orla.stage": "other"}, headers={"X-Orla-Stage": "a", "X-Orla-Workflow-Run": "run-4"})
    found = completions(api, "a", 4)
    assert [each["workflow_run"] for each in found] == ["run-4", "run-3", "run-2", "run-1"]
    assert [each["tags"] for each in found] == [{}, {}, {}, {"team": "core"}]


def test_a_call_without_a_stage_is_of_stage_default(api: Api, other_engine: StubEngine) -> None:
    answer = chat(api)
    assert answer.headers["x-orla-backend"] == "light"  # no 400, and no other way than before
    assert completions(api, "default", 1)[0]["stage_id"] == "default"
    heavy = {"name": "heavy", "endpoint": other_engine.url, "model_id": "openai:stub-model", "max_concurrency": 1}
    api.ask("POST", "/api/v1/backends", heavy, 201)
    api.ask("PUT", "/api/v1/stages/default", {"backend": "heavy"})
    assert chat(api).headers["x-orla-backend"] == "heavy"
    assert chat(api, headers={"X-Orla-Stage": "other"}).headers["x-orla-backend"] == "light"


def test_the_stages_of_calls_are_there_without_being_posted(api: Api) -> None:
    chat(api, headers={"X-Orla-Stage": "seen"})
    completions(api, "seen", 1)
    found = api.ask("GET", "/api/v1/stages")["stages"]
    assert [(each["id"], each["backend"], each["source"]) for each in found] == [
        ("*", "light", "file"), ("seen", "", "call"),
    ]  # fmt: skip
    assert api.ask("GET", "/api/v1/stages/seen")["prompt"] == ""
    assert api.ask("PATCH", "/api/v1/stages/seen", {"prompt": "Be brief."})["source"] == "api"
    assert api.refused("PATCH", "/api/v1/stages/unseen", {"prompt": "x"}, 404) == "not_found"


def test_the_answer_s_model_is_the_engine_s_and_the_backend_stands_in_a_header(api: Api) -> None:
    answer = chat(api, headers={"X-Orla-Stage": "a"})
    assert answer.json()["model"] != "light" and answer.headers["x-orla-backend"] == "light"
    assert answer.headers["x-request-id"]


def sent_to(engine: StubEngine) -> list[dict[str, str]]:
    found: list[dict[str, str]] = engine.requests[-1].body["messages"]
    return found


def test_a_stage_s_prompt_takes_the_place_of_leading_instructions(api: Api, engine: StubEngine) -> None:
    api.ask("PUT", "/api/v1/stages/a", {"prompt": "Be brief.", "reasoning_effort": "low"})
    at = {"X-Orla-Stage": "a"}
    for role in ("system", "developer"):
        chat(api, said("You are long-winded.", role), said(), headers=at)
        assert sent_to(engine) == [said("Be brief.", role), said()]
    chat(api, said(), said("yes", "assistant"), said("go on"), headers=at, reasoning_effort="high")
    assert sent_to(engine)[0] == said("Be brief.", "system") and len(sent_to(engine)) == 4
    assert engine.requests[-1].body["reasoning_effort"] == "low"
    chat(api, said("mine", "system"), said(), headers={"X-Orla-Stage": "b"})
    assert sent_to(engine)[0] == said("mine", "system")
    api.ask("PATCH", "/api/v1/stages/a", {"prompt": ""})
    chat(api, said("mine", "system"), said(), headers=at)
    assert sent_to(engine)[0] == said("mine", "system")


def test_completions_have_v2_s_fields_and_follow_since_and_limit(api: Api) -> None:
    for number in range(3):
        chat(api, headers={"X-Orla-Stage": "a", "X-Orla-Workflow-Run": f"r{number}"})
    newest, middle, _ = found = completions(api, "a", 3)
    assert set(newest) >= {
        "completion_id", "stage_id", "workflow_run", "backend", "status", "prompt_tokens", "completion_tokens",
        "usage", "tool_kind", "latency_ms", "cost_usd", "tags", "mapping", "created_at",
    }  # fmt: skip
    assert (newest["stage_id"], newest["backend"], newest["status"], newest["mapping"]) == (
        "a",
        "light",
        "success",
        "",
    )
    assert newest["cost_usd"] == (newest["prompt_tokens"] + newest["completion_tokens"]) / 1000
    assert datetime.fromisoformat(newest["created_at"]).tzinfo is not None
    assert completions(api, "a", 2, "?limit=2") == found[:2]
    assert completions(api, "a", 1, f"?since={middle['created_at']}") == [newest]
    assert completions(api, "a", 3, "?limit=5000&since=2020-01-01T00:00:00%2B02:00") == found
    for query in ("since=yesterday", "since=2026-01-02", "limit=0", "limit=x", "limit=-1", "limit=1.5"):
        path = f"/api/v1/stages/a/completions?{query}"
        assert api.refused("GET", path, None, 400) == "invalid_request_error"
    assert api.ask("GET", "/api/v1/stages/none/completions") == {"completions": []}


def test_metrics_and_costs_are_summed_by_backend_and_by_mapping(api: Api, engine: StubEngine) -> None:
    api.ask("POST", "/api/v1/mappings", {"name": "cheap", "overrides": {"a": "light"}}, 201)
    for headers in ({}, {}, {"X-Orla-Mapping": "cheap"}):
        chat(api, headers={"X-Orla-Stage": "a", **headers})
    engine.rule = lambda seen: Reply(status=400, text="no")
    httpx.post(
        f"{api.running.url}/v1/chat/completions", json={"model": "auto", "messages": [said()]},
        headers={"X-Orla-Stage": "a"},
    )  # fmt: skip
    found = completions(api, "a", 4)
    assert [each["status"] for each in found] == ["error", "success", "success", "success"]
    (row,) = api.ask("GET", "/api/v1/stages/a/metrics")["metrics"]
    assert set(row) == {
        "backend", "count", "avg_latency_ms", "p50_latency_ms", "p95_latency_ms", "total_cost_usd", "error_count",
    }  # fmt: skip
    assert (row["backend"], row["count"], row["error_count"]) == ("light", 4, 1)
    assert 0 < row["p50_latency_ms"] <= row["p95_latency_ms"]
    assert row["total_cost_usd"] == pytest.approx(sum(each["cost_usd"] or 0 for each in found))
    costs = api.ask("GET", "/api/v1/costs")["costs"]
    assert [(each["mapping"], each["count"]) for each in costs] == [("", 3), ("cheap", 1)]
    now = datetime.now(UTC).isoformat().replace("+", "%2B")
    assert api.ask("GET", f"/api/v1/costs?since={now}") == {"costs": []}


def test_feedback_is_taken_listed_and_learned(api: Api) -> None:
    scores: list[tuple[str, float]] = []
    api.running.orla.core.serving.feedback = lambda name, score: scores.append((name, score))  # type: ignore[method-assign]
    known = chat(api, headers={"X-Orla-Stage": "a"}).headers["x-orla-call-id"]
    completions(api, "a", 1)
    sent = {
        "completion_id": known,
        "stage_id": "a",
        "workflow_run": "r",
        "rating": 0.8,
        "labels": ["ok"],
        "notes": "n",
    }
    api.ask("POST", "/v1/feedback", sent, 202)
    api.ask("POST", "/v1/feedback", {"completion_id": "chatcmpl-unknown", "stage_id": "a"}, 202)
    other, first = api.ask("GET", "/api/v1/stages/a/feedback")["feedback"]
    assert first.items() >= sent.items() and first["created_at"] and other["rating"] is None
    assert scores == [(known, 0.8)]
    assert len(api.ask("GET", "/api/v1/stages/a/feedback?limit=1")["feedback"]) == 1
    assert api.ask("GET", "/api/v1/stages/b/feedback") == {"feedback": []}
    for body in (
        {"stage_id": "a"}, {"completion_id": "x"}, {"completion_id": "x", "stage_id": "a", "rating": 1.1},
        {"completion_id": "x", "stage_id": "a", "rating": -0.1}, {"completion_id": "x", "stage_id": "a", "more": 1},
    ):  # fmt: skip
        assert api.refused("POST", "/v1/feedback", body, 400) == "invalid_request_error"


def test_requests_and_answers_are_kept_of_stages_that_ask_for_it(api: Api) -> None:
    api.ask("PUT", "/api/v1/stages/a", {"capture_io": True})
    at = {"X-Orla-Stage": "a", "X-Orla-Workflow-Run": "run-1"}
    whole = chat(api, said("first"), headers=at)
    stream = chat(api, said("second"), headers=at, stream=True)
    chat(api, said("not kept"), headers={**at, "X-Orla-Stage": "b"})
    found: list[dict[str, Any]] = []

    def there() -> bool:
        found[:] = api.ask("GET", "/api/v1/workflows/run-1/completions")["completions"]
        return len(found) >= 2

    until(there)
    first, second = found
    assert first["request"]["messages"] == [said("first")] and first["response"] == whole.json()
    assert (first["stage_id"], first["workflow_run"], first["backend"]) == ("a", "run-1", "light")
    assert first["completion_id"] == whole.headers["x-orla-call-id"]
    text = "".join(
        json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
        for line in stream.text.splitlines()
        if line.startswith("data: {") and json.loads(line[6:])["choices"]
    )
    assert text and second["response"] == text
    assert api.ask("GET", "/api/v1/workflows/run-2/completions") == {"completions": []}


def test_nothing_is_kept_unless_the_server_was_allowed_to() -> None:
    with server() as running:
        api = Api(running)
        assert api.refused("PUT", "/api/v1/stages/a", {"capture_io": True}, 400, "keep_prompts")
        assert api.refused("GET", "/api/v1/workflows/r/completions", None, 400, "keep_prompts")


def test_keys_are_needed_with_their_scopes() -> None:
    store = MemoryStore()
    _, use = make(store, "app")
    _, view = make(store, "looks", scopes=("view",))
    _, control = make(store, "ops", scopes=("view", "control"))
    with server(store=store) as running:
        until(lambda: httpx.get(f"{running.url}/readyz").status_code == 200)

        def status(method: str, path: str, key: str | None, body: Any = None) -> int:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            return httpx.request(method, f"{running.url}{path}", json=body, headers=headers).status_code

        for method, path, body, least in (
            ("GET", "/api/v1/stages", None, view),
            ("GET", "/api/v1/costs", None, view),
            ("PUT", "/api/v1/stages/a", {}, control),
            ("DELETE", "/api/v1/stages/a", None, control),
        ):
            assert status(method, path, None, body) == 401
            assert status(method, path, use, body) == 403
            assert (status(method, path, view, body) < 400) == (least is view)
            assert status(method, path, control, body) < 400
        assert status("POST", "/v1/feedback", use, {"completion_id": "x", "stage_id": "a"}) == 202
        assert status("POST", "/v1/feedback", view, {"completion_id": "x", "stage_id": "a"}) == 403
        assert status("GET", "/api/v1/health", None) == 200 == status("GET", "/readyz", None)
