"""What is refused before any route, as the clients of each API read errors."""

from __future__ import annotations

import json

import httpx
import pytest

from orla_lg.serve.access.access import Denied
from orla_lg.serve.api.denials import denial
from orla_lg.serve.store.store import MemoryStore
from tests.serve.fixtures import until
from tests.serve.in_thread import server


@pytest.mark.parametrize(
    "path", ["execute", "policies/p", "access/check", "skills", "workflow/complete", "workflows"]
)
def test_on_v1_s_paths_an_error_is_a_text(path: str) -> None:
    scope = {"path": f"/api/v1/{path}", "headers": [(b"x-request-id", b"r-1")]}
    headers, body = denial(scope, Denied(429, "not now", "busy", 2.0))
    assert json.loads(body) == {"success": False, "error": "not now", "request_id": "r-1"}
    assert (b"retry-after", b"2") in headers and (b"x-request-id", b"r-1") in headers


@pytest.mark.parametrize("path", ["/api/v1/stages", "/api/v1/workflows/w/completions", "/v1/chat/completions"])
def test_elsewhere_it_is_an_object(path: str) -> None:
    _, body = denial({"path": path, "headers": []}, Denied(401, "no key", "missing_api_key"))
    assert json.loads(body)["error"]["message"] == "no key"


def test_orla_s_clients_wait_for_a_standby() -> None:
    store = MemoryStore()
    with server(store=store) as first, server(store=store) as second:
        until(lambda: httpx.get(f"{first.url}/api/v1/health").is_success)
        assert httpx.get(f"{second.url}/healthz").is_success
        assert httpx.get(f"{second.url}/api/v1/health").status_code == 503
        refused = httpx.post(f"{second.url}/api/v1/execute", json={})
        assert refused.status_code == 503 and "standby" in refused.json()["error"]
