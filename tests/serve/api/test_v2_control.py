"""v2's control routes, field by field: backends, stages, mappings, settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from orla_lg.serve.store.store import MemoryStore
from tests.serve.in_thread import Running, server
from tests.serve.posted.test_applying import ran_on, ready, written
from tests.stub_engine import StubEngine


class Api:
    """A client of a running server."""

    def __init__(self, running: Running) -> None:
        self.running = ready(running)
        self._http = httpx.Client(base_url=running.url, timeout=10)

    def ask(self, method: str, path: str, body: Any = None, status: int = 200, **more: Any) -> Any:
        sent = {} if body is None else {"json": body}
        answer = self._http.request(method, path, **sent, **more)
        assert answer.status_code == status, (answer.status_code, answer.text)
        return answer.json() if answer.content else None

    def refused(self, method: str, path: str, body: Any, status: int, said: str = "") -> str:
        error = self.ask(method, path, body, status)["error"]
        assert set(error) == {"message", "type"} and said in error["message"], error
        return str(error["type"])


@pytest.fixture
def api() -> Iterator[Api]:
    with server() as running:
        yield Api(running)


def backend(engine: StubEngine | None = None, **more: Any) -> dict[str, Any]:
    endpoint = "http://127.0.0.1:9/v1" if engine is None else engine.url
    return {"name": "light", "endpoint": endpoint, "model_id": "openai:m", "max_concurrency": 2, **more}


FIELDS = {
    "name", "kind", "endpoint", "api_key_env_var", "max_concurrency", "quality", "rate_per_second", "model_id",
    "input_cost_per_mtoken", "output_cost_per_mtoken", "cache_read_cost_per_mtoken", "cost_source", "tool_kind",
    "rates", "circuit_breaker",
}  # fmt: skip


def test_a_backend_is_created_read_changed_and_removed(api: Api, engine: StubEngine) -> None:
    sent = backend(
        engine, quality=0.8, input_cost_per_mtoken=1, output_cost_per_mtoken=2.5, cache_read_cost_per_mtoken=0.1
    )
    made = api.ask("POST", "/api/v1/backends", sent, 201)
    assert made.items() >= sent.items() and set(made) >= FIELDS and made["success"] is True
    assert (made["kind"], made["circuit_breaker"]) == ("llm", "closed")
    read = api.ask("GET", "/api/v1/backends/light")
    assert read == {name: value for name, value in made.items() if name != "success"}
    changed = api.ask("PATCH", "/api/v1/backends/light", {"max_concurrency": 5, "output_cost_per_mtoken": 3})
    assert changed.items() >= {**sent, "max_concurrency": 5, "output_cost_per_mtoken": 3}.items()
    assert changed["created_at"] == made["created_at"] < changed["updated_at"]
    nested = api.ask("PATCH", "/api/v1/backends/light", {"cost_model": {"input_cost_per_mtoken": 7}, "quality": 0.5})
    assert (nested["input_cost_per_mtoken"], nested["output_cost_per_mtoken"], nested["quality"]) == (7, 3, 0.5)
    assert api.ask("PATCH", "/api/v1/backends/light", {"quality": None})["quality"] is None
    scheduler = api.running.orla.core.serving.schedulers["light"]
    assert (scheduler.backend.model, scheduler.queue.max_concurrency, scheduler.backend.cost.input_per_mtoken) == (
        "m", 5, 7,
    )  # fmt: skip
    assert ran_on(api.running, model="light") == "light"
    assert api.ask("DELETE", "/api/v1/backends/light", status=204) is None
    assert api.refused("GET", "/api/v1/backends/light", None, 404) == "not_found"
    assert api.refused("DELETE", "/api/v1/backends/light", None, 404) == "not_found"
    assert api.refused("PATCH", "/api/v1/backends/light", {"quality": 1}, 404) == "not_found"


def test_backends_are_listed_by_name(api: Api) -> None:
    assert api.ask("GET", "/api/v1/backends") == {"backends": []}
    for name in ("zeta", "alpha", "org/mu"):
        api.ask("POST", "/api/v1/backends", backend(name=name), 201)
    listed = api.ask("GET", "/api/v1/backends")["backends"]
    assert [each["name"] for each in listed] == ["alpha", "org/mu", "zeta"]
    assert all(set(each) >= FIELDS for each in listed)
    for path in ("org/mu", "org%2Fmu"):
        assert api.ask("GET", f"/api/v1/backends/{path}")["name"] == "org/mu"


def test_a_backend_again_is_a_conflict(api: Api) -> None:
    api.ask("POST", "/api/v1/backends", backend(), 201)
    assert api.refused("POST", "/api/v1/backends", backend(quality=1), 409, "already") == "api_error"
    assert api.ask("GET", "/api/v1/backends/light")["quality"] is None


BACKENDS_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"name": ""}, "name is required"),
    ({"endpoint": None}, "endpoint is required"),
    ({"model_id": ""}, "model_id is required for kind=llm"),
    ({"max_concurrency": 0}, "max_concurrency"),
    ({"max_concurrency": None}, "max_concurrency must be >= 1"),
    ({"surprise": 1}, "unknown field 'surprise'"),
    ({"rate_per_second": -1}, "rate_per_second"),
    ({"input_cost_per_mtoken": -0.1}, "input_cost_per_mtoken"),
    ({"rates": {"s": 1}}, "rates is only valid for kind=tool"),
    ({"kind": "other"}, "kind"),
    ({"kind": "tool", "model_id": None}, "tool_kind is required"),
    ({"endpoint": "localhost:1"}, "endpoint"),
    ({"endpoint": "http://169.254.169.254/v1"}, "credentials"),
    ({"api_key_env_var": "HOME"}, "must not be named"),
    ({"cost_source": "ftp://x"}, "cost_source"),
]


def test_a_backend_that_cannot_be_is_refused(api: Api) -> None:
    for change, said in BACKENDS_REFUSED:
        assert api.refused("POST", "/api/v1/backends", backend(**change), 400, said) == "invalid_request_error"
    assert api.ask("GET", "/api/v1/backends") == {"backends": []}


def test_a_change_of_a_backend_that_cannot_be_changes_nothing(api: Api) -> None:
    api.ask("POST", "/api/v1/backends", backend(), 201)
    before = api.ask("GET", "/api/v1/backends/light")
    for change in ({"max_concurrency": 0}, {"name": "other"}, {"kind": "tool"}, {"surprise": 1}, {"quality": 2}):
        api.refused("PATCH", "/api/v1/backends/light", change, 400)
    assert api.ask("GET", "/api/v1/backends/light") == before


def test_what_is_no_json_is_refused(api: Api) -> None:
    for content, kind, status in ((b"{}", "text/plain", 415), (b"{", "application/json", 400), (b"[]", "", 415)):
        answer = httpx.post(f"{api.running.url}/api/v1/backends", content=content, headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")


def test_a_stage_is_put_whole_and_patched(api: Api) -> None:
    sent = {"backend": "b", "reasoning_effort": "high", "prompt": "Be brief.", "labels": {"owner": "core"}}
    made = api.ask("PUT", "/api/v1/stages/plan", sent)
    assert made.items() >= {"id": "plan", "capture_io": False, **sent}.items()
    assert api.ask("GET", "/api/v1/stages/plan") == made
    patched = api.ask("PATCH", "/api/v1/stages/plan", {"backend": "c", "prompt": ""})
    assert patched.items() >= {**sent, "backend": "c", "prompt": ""}.items()
    reset = api.ask("PUT", "/api/v1/stages/plan", {"backend": "d"})
    assert (reset["backend"], reset["reasoning_effort"], reset["prompt"], reset["labels"]) == ("d", "", "", {})
    assert reset["created_at"] == made["created_at"]
    assert api.ask("PUT", "/api/v1/stages/other", {"labels": ["pii"]})["labels"] == ["pii"]
    for name in ("zeta", "alpha"):
        api.ask("PUT", f"/api/v1/stages/{name}", {})
    listed = [each["id"] for each in api.ask("GET", "/api/v1/stages")["stages"]]
    assert listed == ["alpha", "other", "plan", "zeta"]
    assert api.ask("DELETE", "/api/v1/stages/plan", status=204) is None
    for method, body in (("GET", None), ("PATCH", {}), ("DELETE", None)):
        assert api.refused(method, "/api/v1/stages/plan", body, 404) == "not_found"


def test_a_stage_that_cannot_be_is_refused(api: Api) -> None:
    for body in (
        {"surprise": 1}, {"backend": 3}, {"prompt": "x" * 200_001}, {"labels": 3}, {"capture_io": True},
        {"id": "other"}, {"reasoning_effort": ["high"]},
    ):  # fmt: skip
        assert api.refused("PUT", "/api/v1/stages/plan", body, 400) == "invalid_request_error"
    assert api.ask("GET", "/api/v1/stages") == {"stages": []}


def test_mappings_are_created_replaced_and_removed(api: Api) -> None:
    made = api.ask("POST", "/api/v1/mappings", {"name": "cheap", "overrides": {"plan": "b"}}, 201)
    assert (made["name"], made["overrides"]) == ("cheap", {"plan": "b"})
    api.ask("POST", "/api/v1/mappings", {"name": "cheap", "overrides": {"solve": "c"}}, 201)
    assert api.ask("GET", "/api/v1/mappings/cheap")["overrides"] == {"solve": "c"}
    assert [each["name"] for each in api.ask("GET", "/api/v1/mappings")["mappings"]] == ["cheap"]
    for body in (
        {"name": "x"}, {"name": "x", "overrides": {}}, {"overrides": {"a": "b"}},
        {"name": "x", "overrides": {"": "b"}}, {"name": "x", "overrides": {"a": ""}},
        {"name": "x", "overrides": {"a": "b"}, "surprise": 1},
    ):  # fmt: skip
        assert api.refused("POST", "/api/v1/mappings", body, 400) == "invalid_request_error"
    assert api.ask("DELETE", "/api/v1/mappings/cheap", status=204) is None
    assert api.refused("GET", "/api/v1/mappings/cheap", None, 404) == "not_found"
    assert api.refused("DELETE", "/api/v1/mappings/cheap", None, 404) == "not_found"


def test_an_outside_service_is_set_read_and_switched_off(api: Api) -> None:
    for path in ("/api/v1/scheduler/policy", "/api/v1/stage-mapper"):
        set_and_switched_off(api, path)


def set_and_switched_off(api: Api, path: str) -> None:
    off = {"url": "", "timeout_ms": 50, "enabled": False}
    assert api.ask("GET", path) == off
    on = api.ask("PUT", path, {"url": "http://127.0.0.1:9/next", "timeout_ms": 80})
    assert on == {"url": "http://127.0.0.1:9/next", "timeout_ms": 80, "enabled": True} == api.ask("GET", path)
    assert api.ask("PUT", path, {"url": "http://127.0.0.1:9/next"})["timeout_ms"] == 50
    for body in (
        {"url": "ftp://x"}, {"url": "no url"}, {"url": "http://169.254.169.254/"}, {"timeout_ms": -1},
        {"timeout_ms": 10_001}, {"surprise": 1},
    ):  # fmt: skip
        assert api.refused("PUT", path, body, 400) == "invalid_request_error"
    assert api.ask("GET", path)["enabled"]
    assert api.ask("PUT", path, {"url": ""}) == off == api.ask("GET", path)


def test_how_often_prices_are_read_again(api: Api) -> None:
    assert api.ask("GET", "/api/v1/costs/policy") == {"refresh_interval_ms": 60_000}
    assert api.ask("PUT", "/api/v1/costs/policy", {"refresh_interval_ms": 5000}) == {"refresh_interval_ms": 5000}
    assert api.ask("GET", "/api/v1/costs/policy") == {"refresh_interval_ms": 5000}
    for body in ({"refresh_interval_ms": -1}, {"refresh_interval_ms": 1}, {"surprise": 1}):
        assert api.refused("PUT", "/api/v1/costs/policy", body, 400) == "invalid_request_error"


def test_all_of_it_is_there_after_a_restart(engine: StubEngine) -> None:
    store = MemoryStore()
    sent = {
        "/api/v1/backends/light": ("POST", "/api/v1/backends", backend(engine, model_id="openai:stub-model")),
        "/api/v1/stages/plan": ("PUT", "/api/v1/stages/plan", {"backend": "light", "labels": ["pii"]}),
        "/api/v1/mappings/cheap": ("POST", "/api/v1/mappings", {"name": "cheap", "overrides": {"plan": "light"}}),
        "/api/v1/stage-mapper": ("PUT", "/api/v1/stage-mapper", {"url": "http://127.0.0.1:9/map"}),
        "/api/v1/costs/policy": ("PUT", "/api/v1/costs/policy", {"refresh_interval_ms": 5000}),
    }
    with server(store=store) as running:
        api = Api(running)
        for method, path, body in sent.values():
            api.ask(method, path, body, 201 if method == "POST" else 200)
        before = {path: api.ask("GET", path) for path in sent}
    with server(store=store) as running:
        api = Api(running)
        assert {path: api.ask("GET", path) for path in sent} == before
        assert ran_on(running, "plan") == "light"


def test_what_the_file_names_is_listed_and_read_only(tmp_path: Path, engine: StubEngine) -> None:
    more = 'max_concurrency = 3\n[backends.light.cost]\ninput_per_mtoken = 2\n[variants.cheap]\nplan = "light"'
    file = written(tmp_path / "orla.toml", engine, more, '"*" = "light"\nplan = ["light"]')
    with server(file) as running:
        api = Api(running)
        (one,) = api.ask("GET", "/api/v1/backends")["backends"]
        assert set(one) >= FIELDS and one == api.ask("GET", "/api/v1/backends/light")
        assert (one["name"], one["max_concurrency"], one["input_cost_per_mtoken"]) == ("light", 3, 2)
        assert [(each["id"], each["backend"]) for each in api.ask("GET", "/api/v1/stages")["stages"]] == [
            ("*", "light"), ("plan", "light"),
        ]  # fmt: skip
        assert api.ask("GET", "/api/v1/mappings/cheap")["overrides"] == {"plan": "light"}
        for method, path, body in (
            ("POST", "/api/v1/backends", backend(engine)),
            ("PATCH", "/api/v1/backends/light", {"max_concurrency": 9}),
            ("DELETE", "/api/v1/backends/light", None),
            ("PUT", "/api/v1/stages/plan", {"backend": "other"}),
            ("DELETE", "/api/v1/stages/plan", None),
            ("POST", "/api/v1/mappings", {"name": "cheap", "overrides": {"plan": "light"}}),
            ("DELETE", "/api/v1/mappings/cheap", None),
        ):
            assert api.refused(method, path, body, 409, str(file)) == "api_error"
