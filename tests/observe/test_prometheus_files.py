"""The files in examples/prometheus: what they name is there, and a real Prometheus reads a server by them."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from orla_lg import Orla
from orla_lg.core.engine.given import NoBackends
from orla_lg.observe import metrics
from orla_lg.serve.access.keys import KeyScope
from orla_lg.serve.http.health import CoreState
from orla_lg.serve.http.metrics import ServerMetrics
from orla_lg.serve.store.lease import CoreLease
from orla_lg.serve.store.store import MemoryStore
from tests.serve.in_thread import server
from tests.serve.test_server import CALL, file, key, until

__all__ = ["file"]

FILES = Path(__file__).parents[2] / "examples" / "prometheus"
RULES, SCRAPES, DASHBOARD = FILES / "orla-rules.yml", FILES / "prometheus.yml", FILES / "orla-dashboard.json"
PAGE = FILES.parents[1] / "docs" / "metrics.md"
PATIENCE_S = 20.0
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}


def exposed() -> set[str]:
    """Return the names of all series that a server may have."""

    class Server:
        def __init__(self, orla: Orla) -> None:
            self.orla, self.state, self.under_way = orla, CoreState.READY, 0
            self.lease = CoreLease(MemoryStore())
            self.host: Any = type("Host", (), {"replicas": {}})()

    with Orla(NoBackends.YET) as orla:
        made = ServerMetrics(Server(orla))
        found = {f"{family.name}{end}" for family in made.registry.collect() for end in SUFFIXES.get(family.type, ())}
        made.close()
    return found


def expressions() -> Iterator[str]:
    """Yield the queries of the dashboard, as Grafana sends them, and those of the page."""
    board = json.loads(DASHBOARD.read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            query = target["expr"]
            for name, value in (("$backend", ".*"), ("$stage", ".*"), ("$__rate_interval", "1m")):
                query = query.replace(name, value)
            yield query
    (asked,) = re.findall(r"```promql\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    yield from (re.sub(r"^#.*\n", "", query, flags=re.M) for query in asked.split("\n\n"))


def test_what_the_files_name_is_exposed() -> None:
    names = set(re.findall(r"\borla_[a-z_]+", RULES.read_text() + DASHBOARD.read_text())) - {"orla_lg"}
    assert len(names) > 25 and names - exposed() == set()
    board = json.loads(DASHBOARD.read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_page_names_what_is_exposed_and_nothing_else() -> None:
    rows = set(re.findall(r"^\| `(orla_\w+)` \|", PAGE.read_text(encoding="utf-8"), re.M))
    assert rows == {re.sub(r"_(bucket|sum|count)$", "", name) for name in exposed() if name.startswith("orla_")}


def test_names_follow_the_customs() -> None:
    with Orla(NoBackends.YET) as orla:
        registry = CollectorRegistry()
        metrics(orla, registry)
        for family in registry.collect():
            assert family.name.startswith("orla_") and family.documentation.endswith(".")
            assert not family.name.endswith(("_ms", "_total", "_count"))
            if family.type == "histogram":
                assert family.name.endswith("_seconds")


# With a real one


def program(variable: str) -> str:
    if not (found := os.environ.get(variable)):
        pytest.skip(f'{variable} names no program: eval "$(.ci/prometheus.sh start)" finds or installs one')
    return found


def test_promtool_takes_the_files() -> None:
    tool = program("ORLA_TEST_PROMTOOL")
    for words in (("check", "rules", str(RULES)), ("check", "config", str(SCRAPES))):
        subprocess.run([tool, *words], check=True, capture_output=True, timeout=PATIENCE_S)


class Prometheus:
    """One that runs in a folder, with the files of the example; ends with its ``with`` block."""

    def __init__(self, binary: str, folder: Path, target: str, secret: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port: int = free.getsockname()[1]
        shutil.copy(RULES, folder)
        (folder / "orla.key").write_text(secret)
        scrapes = SCRAPES.read_text().replace("127.0.0.1:8081", target).replace("15s", "200ms")
        scrapes = scrapes.replace(
            "    # authorization:\n    #   credentials_file:", "    authorization:\n      credentials_file:"
        )
        (folder / "prometheus.yml").write_text(scrapes)
        self._command = [
            binary, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self._port}", "--log.level=error",
        ]  # fmt: skip
        self._log = folder / "log"

    def __enter__(self) -> Prometheus:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_S)

    def ask(self, path: str, **parameters: str) -> Any:
        try:
            answer = httpx.get(f"http://127.0.0.1:{self._port}/api/v1/{path}", params=parameters)
        except httpx.TransportError:
            assert self._process.poll() is None, self._log.read_text()
            return None
        return answer.json()["data"] if answer.is_success else None

    def query(self, expression: str) -> list[Any] | None:
        found = self.ask("query", query=expression)
        return None if found is None else list(found["result"])


def test_a_real_prometheus_scrapes_a_server(file: Path, tmp_path: Path) -> None:
    binary, tool = program("ORLA_TEST_PROMETHEUS"), program("ORLA_TEST_PROMTOOL")
    store = MemoryStore()
    view, use = key(store, KeyScope.VIEW), key(store, KeyScope.USE)
    with server(file, store=store) as running:
        until(lambda: running.server.state is CoreState.READY)
        headers = {"authorization": f"Bearer {use}", "x-orla-stage": "summarize"}
        assert httpx.post(f"{running.url}/v1/chat/completions", json=CALL, headers=headers).is_success
        text = httpx.get(f"{running.url}/metrics", headers={"authorization": f"Bearer {view}"}).content
        lint = subprocess.run([tool, "check", "metrics"], input=text, capture_output=True, timeout=PATIENCE_S)
        assert lint.returncode == 0, lint.stdout + lint.stderr
        with Prometheus(binary, tmp_path, running.url.removeprefix("http://"), view) as prometheus:
            until_s = time.monotonic() + PATIENCE_S
            counted = None
            while not counted:
                assert time.monotonic() < until_s, prometheus.ask("targets")
                time.sleep(0.1)
                counted = prometheus.query('orla_requests_total{status="ok"}')
            ((labels, (_, value)),) = [(each["metric"], each["value"]) for each in counted]
            assert (labels["stage"], labels["backend"], value) == ("summarize", "light", "1")
            broken = [each for each in expressions() if prometheus.query(each) is None]
            assert not broken
            health = {""}
            while health != {"ok"}:
                assert time.monotonic() < until_s, health
                time.sleep(0.1)
                groups = (prometheus.ask("rules") or {}).get("groups", [])
                health = {rule["health"] for group in groups for rule in group["rules"]}
            assert prometheus.query("max(orla_server_ready)") and not prometheus.query("absent(orla_server_ready)")
