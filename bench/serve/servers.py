"""The servers under test: each a process of its own on one core; the engine and its callers share the other one."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
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
VERSION = "1.108.7"
# An option first makes a variant uv's, which takes seconds; pip takes minutes.
LITELLM = Environment(
    f"litellm-{VERSION}",
    (InstallStep("LiteLLM's proxy", (("--quiet", f"litellm[proxy]=={VERSION}"), (f"litellm[proxy]=={VERSION}",))),),
    module="litellm", size_mb=600, advice="--no-litellm leaves its arm out",
)  # fmt: skip
KEY = "sk-bench-of-orla-lg"
CONFIGS = {
    "orla.toml": """
[backends.main]
url = "{engine}"
model = "{model}"
engine = "vllm"
max_concurrency = 2000
[mapping]
"*" = "main"
[serve]
store = "{folder}/state.db"
""",
    "litellm.yaml": """
model_list:
  - model_name: {model}
    litellm_params: {{model: openai/{model}, api_base: "{engine}", api_key: any}}
litellm_settings: {{telemetry: false}}
""",
}


@functools.cache
def cores() -> tuple[int, int]:
    """Return the core of the server under test, and that of all else."""
    if len(ours := sorted(os.sched_getaffinity(0))) < 2:
        raise SystemExit("two cores are needed: one for the server, one for all else")
    return ours[0], ours[1]


class Server(NamedTuple):
    """A server of OpenAI's API; the engine itself has no process to be looked at."""

    name: str
    url: str
    process: psutil.Process | None = None
    core: psutil.Process | None = None
    """That of its core, where that is another process."""

    def cpu_ms(self) -> float:
        """Return the CPU time it has had."""
        return sum(self.process.cpu_times()[:2]) * 1e3 if self.process else 0.0

    def core_cpu_ms(self) -> float:
        """Return the CPU time that its core has had."""
        return sum(self.core.cpu_times()[:2]) * 1e3 if self.core else 0.0

    def rss_mib(self) -> float:
        return self.process.memory_info().rss / 2**20 if self.process else 0.0


@contextlib.contextmanager
def served(name: str, words: Sequence[str], config: str, engine: str, health: str, **env: str) -> Iterator[Server]:
    """Run a server before an engine until it is healthy, and end it afterwards."""
    port = free_port()
    # Not through a proxy that the environment names: all is near.
    plain = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        path = Path(folder, config)
        path.write_text(CONFIGS[config].format(engine=engine, model=MODEL, folder=folder), encoding="utf-8")
        process = subprocess.Popen(
            [*words, "--config", str(path), "--port", str(port)], cwd=ROOT, env={**plain, **env}, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            os.sched_setaffinity(process.pid, {cores()[0]})
            until_s = time.monotonic() + READY_S
            while not _healthy(f"http://127.0.0.1:{port}{health}"):
                if process.poll() is not None or time.monotonic() > until_s:
                    log.seek(0)
                    raise SystemExit(f"{name} did not start: {log.read()[-2000:].decode(errors='replace')}")
                time.sleep(0.1)
            yield Server(name, f"http://127.0.0.1:{port}/v1", psutil.Process(process.pid))
        finally:
            process.kill()
            process.wait()


def _healthy(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, trust_env=False, timeout=2).is_success
    return False


def orla(engine: str) -> contextlib.AbstractContextManager[Server]:
    """Run ``orla-lg serve`` before an engine."""
    return served("orla-lg serve", [sys.executable, "-m", "orla_lg", "serve"], "orla.toml", engine, "/readyz")


@contextlib.contextmanager
def stateless(engine: str) -> Iterator[Server]:
    """Run a gateway without state before a core of its own; both have the one processor core."""
    with orla(engine) as core:
        words = [sys.executable, "-m", "orla_lg", "serve", "--gateway", "--core", core.url.removesuffix("/v1")]
        with served("orla-lg serve --gateway", words, "orla.toml", engine, "/readyz") as gateway:
            yield gateway._replace(core=core.process)


def plain(engine: str) -> contextlib.AbstractContextManager[Server]:
    """Run a proxy of the same libraries before an engine, with nothing of ours in it."""
    words = [sys.executable, "-m", "bench.serve.plain_proxy", engine]
    return served("plain proxy", words, "orla.toml", engine, "/readyz")


def litellm(engine: str) -> contextlib.AbstractContextManager[Server]:
    """Run LiteLLM's proxy before an engine; its environment is made first if it is not there."""
    words = [str(LITELLM.ensure(Progress(sys.stderr)).with_name("litellm")), "--num_workers", "1"]
    env = {"LITELLM_MASTER_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return served("LiteLLM", [*words, "--host", "127.0.0.1"], "litellm.yaml", engine, "/health/liveliness", **env)
