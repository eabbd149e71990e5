"""``langgraph dev`` as a process of its own: loopback alone, without a browser, and without a word to elsewhere."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.serve.processes import environment

PATIENCE_S = 90.0
NOWHERE = "http://127.0.0.1:9"


def quiet(folder: Path, **env: str) -> dict[str, str]:
    """Return an environment in which nothing is sent elsewhere; what tries meets a port that refuses."""
    kept = {name: value for name, value in environment(folder).items() if not name.startswith(("LANG", "LC_"))}
    return {
        **kept, "LANGSMITH_TRACING": "false", "LANGCHAIN_TRACING_V2": "false", "LANGGRAPH_CLI_NO_ANALYTICS": "1",
        "LANGGRAPH_NO_VERSION_CHECK": "true", "HTTP_PROXY": NOWHERE, "HTTPS_PROXY": NOWHERE,
        "NO_PROXY": "127.0.0.1,localhost", "BROWSER": "/bin/false", **env,
    }  # fmt: skip


class AgentServer:
    """A running ``langgraph dev``."""

    def __init__(self, folder: Path, number: int, server: str, jobs: int) -> None:
        self.folder = folder / f"agents-{number}"
        self.folder.mkdir()
        shutil.copy(Path(__file__).parent / "app.py", self.folder / "agents_app.py")
        graphs = {name: f"./agents_app.py:{name}" for name in ("asks", "asks_sync")}
        (self.folder / "langgraph.json").write_text(json.dumps({"dependencies": ["."], "graphs": graphs}))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.records_file = f"http://127.0.0.1:{port}", self.folder / "records.jsonl"
        self._log = (self.folder / "log").open("w")
        words = ["dev", "--host", "127.0.0.1", "--port", str(port), "--no-browser", "--no-reload"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "langgraph_cli", *words, "--n-jobs-per-worker", str(jobs)], cwd=self.folder,
            env=quiet(
                self.folder, ORLA_SERVER=server, RECORDS=str(self.records_file),
                BG_JOB_ISOLATED_LOOPS=str(number % 2 == 1).lower(),
            ),
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
        )  # fmt: skip
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE_S, trust_env=False)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.records_file.read_text().splitlines() if line.startswith("{")]

    def until_ready(self) -> None:
        until_s = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/ok").is_success:
                    return
            assert self.process.poll() is None and time.monotonic() < until_s, self.log
            time.sleep(0.05)

    def thread(self) -> str:
        return str(self.client.post("/threads", json={}).raise_for_status().json()["thread_id"])

    def run(self, thread: str, say: str, way: str = "runs/wait", graph: str = "asks", **more: Any) -> httpx.Response:
        body = {"assistant_id": graph, "input": {"messages": [{"role": "user", "content": say}]}, **more}
        return self.client.post(f"/threads/{thread}/{way}", json=body).raise_for_status()

    def end(self) -> None:
        self.client.close()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(5.0)
        self._log.close()


@contextlib.contextmanager
def agent_servers(folder: Path, server: str, jobs: int, number: int = 2) -> Iterator[list[AgentServer]]:
    """Run so many of them, each a replica of *server*."""
    with contextlib.ExitStack() as stack:
        made = []
        for each in range(number):
            made.append(AgentServer(folder, each, server, jobs))
            stack.callback(made[-1].end)
        for one in made:
            one.until_ready()
        yield made
        for one in made:
            one.process.send_signal(signal.SIGINT)
