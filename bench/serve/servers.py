"""The servers under test: each a process of its own on one core; the engine and who calls share the other one."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil

from bench.lib.command import ROOT
from orla_lg.engines.environment import Environment, InstallStep
from orla_lg.engines.progress import Progress
from orla_lg_llamacpp.embedded import free_port
from tests.scripted_engine import MODEL

READY_S = 60.0
LITELLM_VERSION = "1.108.7"
LITELLM = Environment(
    f"litellm-{LITELLM_VERSION}", (InstallStep("LiteLLM's proxy", ((f"litellm[proxy]=={LITELLM_VERSION}",),)),),
    module="litellm", size_mb=600, advice="--no-litellm leaves its arm out",
)  # fmt: skip
LITELLM_KEY = "sk-bench-of-orla-lg"
LITELLM_CONFIG = f"""
model_list:
  - model_name: {MODEL}
    litellm_params: {{model: openai/{MODEL}, api_base: URL, api_key: any}}
litellm_settings: {{telemetry: false}}
"""
ORLA_CONFIG = f"""
[backends.main]
url = "URL"
model = "{MODEL}"
engine = "openai"
max_concurrency = 2000
[mapping]
"*" = "main"
[serve]
store = "STORE"
"""


@functools.cache
def cores() -> tuple[int, int]:
    """Return the core of the server under test, and that of all else."""
    ours = sorted(os.sched_getaffinity(0))
    if len(ours) < 2:
        raise SystemExit("two cores are needed: one for the server, one for all else")
    return ours[0], ours[1]


class Server(NamedTuple):
    """A server of OpenAI's API."""

    name: str
    url: str
    key: str
    process: psutil.Process | None
    """``None``: the engine itself."""

    def cpu_s(self) -> float:
        """Return the CPU time it has had."""
        return sum(self.process.cpu_times()[:2]) if self.process else 0.0

    def rss_mib(self) -> float:
        """Return the memory that it holds."""
        return self.process.memory_info().rss / 2**20 if self.process else 0.0


@contextlib.contextmanager
def served(name: str, words: Sequence[str], port: int, health: str, key: str = "", **env: str) -> Iterator[Server]:
    """Run a server until it is healthy, and end it afterwards."""
    url = f"http://127.0.0.1:{port}"
    # Not through a proxy that the environment names: all is near.
    plain = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, cwd=ROOT, env={**plain, **env}, stdout=log, stderr=subprocess.STDOUT)
        try:
            os.sched_setaffinity(process.pid, {cores()[0]})
            until_s = time.monotonic() + READY_S
            while not _healthy(url + health):
                if process.poll() is not None or time.monotonic() > until_s:
                    log.seek(0)
                    raise SystemExit(f"{name} did not start: {log.read()[-2000:].decode(errors='replace')}")
                time.sleep(0.1)
            yield Server(name, f"{url}/v1", key, psutil.Process(process.pid))
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _healthy(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, trust_env=False, timeout=2).is_success
    return False


def _written(text: str, name: str, values: Mapping[str, str], folder: Path) -> str:
    for word, value in values.items():
        text = text.replace(word, value)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


@contextlib.contextmanager
def orla(engine: str) -> Iterator[Server]:
    """Run ``orla-lg serve`` before an engine."""
    with tempfile.TemporaryDirectory() as made:
        folder, port = Path(made), free_port()
        config = _written(ORLA_CONFIG, "orla.toml", {"URL": engine, "STORE": str(folder / "state.db")}, folder)
        words = [sys.executable, "-m", "orla_lg", "serve", "--config", config, "--port", str(port)]
        with served("orla-lg serve", words, port, "/healthz") as server:
            yield server


@contextlib.contextmanager
def litellm(engine: str) -> Iterator[Server]:
    """Run LiteLLM's proxy before an engine; its environment is made first if it is not there."""
    python = LITELLM.ensure(Progress(sys.stderr))
    with tempfile.TemporaryDirectory() as made:
        port, config = free_port(), _written(LITELLM_CONFIG, "litellm.yaml", {"URL": engine}, Path(made))
        words = [str(python.with_name("litellm")), "--config", config, "--port", str(port), "--num_workers", "1"]
        key = {"LITELLM_MASTER_KEY": LITELLM_KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        with served("LiteLLM", words, port, "/health/liveliness", LITELLM_KEY, **key) as server:
            yield server
