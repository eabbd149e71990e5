"""Cores to be measured: each with an engine of its own, all on one CPU of the machine."""

from __future__ import annotations

import contextlib
import os
import signal
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
from bench.lib.engines import started
from bench.serve.servers import cores
from orla_lg_llamacpp.embedded import free_port
from tests.scripted_engine import MODEL

READY_S, ENDS_S = 60.0, 20.0
CONFIG = """
[backends.{name}]
url = "{engine}"
model = "{model}"
engine = "openai"
max_concurrency = {bound}
[mapping]
"*" = "{name}"
[serve]
store = "{store}"
{more}
"""


class Core(NamedTuple):
    """One core, and the engine behind it."""

    url: str
    engine: str
    process: subprocess.Popen[bytes]

    def cpu_s(self) -> float:
        """Return the CPU time that it has had."""
        user_s, system_s = psutil.Process(self.process.pid).cpu_times()[:2]
        return float(user_s + system_s)


@contextlib.contextmanager
def core(engine: str, *, words: Sequence[str] = ("orla_lg",), name: str = "main", store: str = "", more: str = "",
         bound: int = 2_000) -> Iterator[Core]:  # fmt: skip
    """Run ``orla-lg serve`` before an engine until it is ready, and end it in good order."""
    port = free_port()
    plain = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        path = Path(folder, "orla.toml")
        store = store or f"{folder}/state.db"
        path.write_text(CONFIG.format(name=name, engine=engine, model=MODEL, store=store, more=more, bound=bound))
        process = subprocess.Popen(
            [sys.executable, "-m", *words, "serve", "--config", str(path), "--port", str(port)], cwd=ROOT,
            env=plain, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            os.sched_setaffinity(process.pid, {cores()[0]})
            until_s = time.monotonic() + READY_S
            while not _is_ready(f"http://127.0.0.1:{port}/readyz"):
                if process.poll() is not None or time.monotonic() > until_s:
                    log.seek(0)
                    raise SystemExit(f"a core did not start: {log.read()[-2000:].decode(errors='replace')}")
                time.sleep(0.1)
            yield Core(f"http://127.0.0.1:{port}", engine, process)
            process.send_signal(signal.SIGTERM)
            process.wait(ENDS_S)
        finally:
            process.kill()
            process.wait()


def _is_ready(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, trust_env=False, timeout=2).is_success
    return False


@contextlib.contextmanager
def site(many: int, before_s: float, *, pooled: bool) -> Iterator[list[Core]]:
    """Run so many cores, each before an engine of its own; *pooled*: pools on one store, which know each other."""
    with contextlib.ExitStack() as stack:
        store = f"{stack.enter_context(tempfile.TemporaryDirectory())}/state.db" if pooled else ""
        made = []
        for number in range(many):
            engine = stack.enter_context(started("tests.scripted_engine", "--before-s", str(before_s)))
            more = f'pool = "p{number}"' if pooled else ""
            name = f"main{number}" if pooled else "main"
            made.append(stack.enter_context(core(engine, name=name, store=store, more=more)))
        yield made
