"""The routes as the engine's server has them, over engine processes that are stand-ins; and who may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

import orla_lg_vllm
from orla_lg_vllm.routes import OrlaRoutes, merged, read_order
from tests.vllm_plugin.pool import FakeEngine

FOLDER = Path(orla_lg_vllm.__file__).parent
INSIDE = {
    "bands",
    "claims",
    "holding",
    "keeper",
    "ledger",
    "routes",
    "scheduler",
    "segments",
    "suspension",
    "versions",
}
"""What runs inside the engine."""


class Client:
    """vLLM's client, as far as the routes use it: the engine processes behind the server."""

    def __init__(self, *engines: FakeEngine, error: Exception | None = None) -> None:
        self.engine_core, self._engines, self._error = self, engines, error

    async def call_utility_all_async(self, method: str, *order: Any) -> list[Mapping[str, Any]]:
        assert method == "orla_kv"
        if self._error is not None:
            raise self._error
        return [engine.order(*order) for engine in self._engines]


async def post(client: Client, verb: str, **said: Any) -> httpx.Response:
    app, routes = Starlette(), OrlaRoutes()
    routes.attach_router(app)
    await routes.init_state(client, app.state, SimpleNamespace())  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as http:
        return await http.post(f"/v1/orla/kv/{verb}", **said)


async def test_an_order_says_what_it_did() -> None:
    engine = FakeEngine()
    engine.ask("w", "abcd")
    answer = await post(Client(engine), "pin", json={"workflow": "w", "ttl_s": 30})
    assert answer.status_code == 200
    assert (answer.json()["effect"], answer.json()["pinned_blocks"]) == ("pinned", 4)
    answer = await post(Client(engine), "flush", json={"workflow": "w"})
    assert (answer.json()["effect"], answer.json()["freed_blocks"]) == ("freed", 4)
    assert engine.cached("abcd") == 0


async def test_orders_go_to_every_engine_process_and_counts_add_up() -> None:
    one, two = FakeEngine(), FakeEngine()
    one.ask("w", "abcd")
    answer = await post(Client(one, two), "pin", json={"workflow": "w"})
    assert (answer.json()["effect"], answer.json()["pinned_blocks"]) == ("pinned", 4)
    two.ask("w", "abc")
    told = (await post(Client(one, two), "stat")).json()
    assert (told["blocks"], told["block_tokens"], told["bands"]["history"]) == (64, 16, 3)
    assert (await post(Client(one, two), "flush", json={"workflow": "w"})).json()["freed_blocks"] == 7


def test_of_several_effects_the_one_that_matters_is_told() -> None:
    assert merged([{"effect": "freed", "blocks": 1}, {"effect": "deferred", "blocks": 2}])["effect"] == "deferred"
    assert merged([{"effect": "failed"}, {"effect": "pinned"}])["effect"] == "pinned"


async def test_without_our_scheduler_the_answer_says_how_to_start_the_engine() -> None:
    missing = Exception("Call to orla_kv method failed: 'EngineCoreProc' object has no attribute 'orla_kv'")
    answer = await post(Client(error=missing), "stat")
    assert answer.status_code == 501 and answer.json()["effect"] == "unsupported"
    assert "--scheduler-cls orla_lg_vllm.scheduler.OrlaAsyncScheduler" in answer.json()["reason"]


@pytest.mark.parametrize(
    ("verb", "body", "right"),
    [
        ("pin", b"{", "no JSON"),
        ("pin", b"[]", 'such as {"workflow": "w1"}, got list'),
        ("pin", b"{}", 'needs "workflow"'),
        ("stat", b'{"workflow": ""}', 'needs "workflow"'),
        ("flush", b'{"workflow": 3}', "got 3"),
        ("flush", b'{"workflow": "w", "ttl_s": 3}', "flush knows the fields workflow; got ttl_s"),
        ("pin", b'{"workflow": "w", "ttl_s": true}', "seconds above 0, got True"),
        ("pin", b'{"workflow": "w", "ttl_s": NaN}', "seconds above 0"),
    ],
)
async def test_a_bad_order_is_refused_with_what_would_be_right(verb: str, body: bytes, right: str) -> None:
    answer = await post(Client(FakeEngine()), verb, content=body)
    assert answer.status_code == 400 and right in answer.json()["reason"]


def test_a_pin_without_a_time_holds_until_it_is_released() -> None:
    assert read_order("pin", b'{"workflow": "w"}') == ("w", None)
    assert read_order("stat", b"") == ("", None)


# Who may import what --------------------------------------------------------------------------------------


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("name", sorted(INSIDE))
def test_what_runs_inside_the_engine_needs_nothing_that_is_not_there(name: str) -> None:
    for module in imported(FOLDER / f"{name}.py"):
        top, _, rest = module.partition(".")
        if top == "orla_lg_vllm":
            assert rest in INSIDE, f"{name} imports {module}"
        else:
            web = ("starlette",) if name == "routes" else ()
            engine = ("vllm",) if name in ("scheduler", "versions") else ()
            assert top in (*sys.stdlib_module_names, *engine, *web), f"{name} imports {module}"


def test_the_package_costs_nothing_to_import() -> None:
    costly = ("httpx", "orla_lg", "langchain_core", "vllm", "starlette")
    loaded = f"print(sorted(name for name in sys.modules if name.split('.')[0] in {costly}))"
    script = f"import sys, orla_lg_vllm, orla_lg_vllm.keeper, orla_lg_vllm.segments; {loaded}"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
