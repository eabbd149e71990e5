"""Starting an engine: in this process until it ends, or in the background.

An engine in the background is this same program, started once more without a terminal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from orla_lg.engines.llamacpp import LlamaCpp
from orla_lg.engines.progress import Progress
from orla_lg.engines.recipe import EngineOptions, Place, Recipe
from orla_lg.engines.running import Claim, Running, claimed, find, log_of
from orla_lg.engines.vllm_cpu import VLLMCpu
from orla_lg.errors import EngineError
from orla_lg_llamacpp.embedded import free_port

__all__ = ["RECIPES", "prepare", "serve", "start", "told"]

POLL_S = 0.1
END_TIMEOUT_S = 30.0
ASK_TIMEOUT_S = 2.0
TOLD_LINES = 10
TOLD_REASONS = 5
_REASON = re.compile(r"\w(Error|Exception): |\berror: ")

RECIPES: dict[str, Recipe] = {"llamacpp": LlamaCpp(), "vllm-cpu": VLLMCpu()}


def prepare(options: EngineOptions, progress: Progress) -> EngineOptions:
    """Install and fetch what the engine needs; return the options with every choice made."""
    if options.engine not in RECIPES:
        raise EngineError(f"EngineOptions.engine is {options.engine!r}; it must be one of {', '.join(RECIPES)}")
    return RECIPES[options.engine].prepare(options, progress)


def serve(options: EngineOptions, ready: Callable[[Running], None]) -> None:
    """Run an engine until it is asked to end; *ready* is told once it answers.

    Args:
        options: As its recipe prepared them.
        ready: Called with the engine when it answers requests.

    Raises:
        EngineError: It did not start, or it ended by itself.
    """
    port = options.port or free_port()
    log = log_of(port)
    with claimed(port) as claim:
        if not _is_our_output(log):
            log.unlink(missing_ok=True)
        try:
            status = _serve(options, Place(port, log, claim.descriptor), claim, ready)
        except KeyboardInterrupt:
            log.unlink(missing_ok=True)
            raise
    if status not in (0, -signal.SIGTERM):
        raise EngineError(f"the engine ended by itself, with status {status}; {told(log)}")
    log.unlink(missing_ok=True)


def _serve(options: EngineOptions, place: Place, claim: Claim, ready: Callable[[Running], None]) -> int:
    recipe = RECIPES[options.engine]
    with recipe.serve(options, place) as served:
        url = f"http://127.0.0.1:{place.port}/v1"
        name = options.name or options.model
        claim.publish(
            Running(
                place.port, served.pid, url, name, options.engine, served.group, served.kv_events, served.kv_replay
            )
        )
        ready(_await_ready(place.port, lambda: served.poll() is None, recipe, place.log, Progress()))
        while (status := served.poll()) is None:
            time.sleep(POLL_S)
    return status


def start(options: EngineOptions, progress: Progress) -> Running:
    """Start an engine in the background; return when it answers.

    Args:
        options: As its recipe prepared them.
        progress: Told what it is doing until then.

    Raises:
        EngineError: It did not start; the message holds what it said.
    """
    recipe = RECIPES[options.engine]
    options = dataclasses.replace(options, port=options.port or free_port())
    log = log_of(options.port)
    if engine := find(options.port):
        raise EngineError(f"an engine already runs on port {options.port} (process {engine.pid}): {engine.url}")
    # -P: what lies in the current folder is not ours to import.
    words = [sys.executable, "-P", "-m", "orla_lg.engines.commands", "engine", "up", *options.words()]
    with log.open("w") as output:
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        return _await_ready(options.port, lambda: child.poll() is None, recipe, log, progress)
    except BaseException:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(END_TIMEOUT_S)
        child.kill()
        raise


def _await_ready(port: int, alive: Callable[[], bool], recipe: Recipe, log: Path, progress: Progress) -> Running:
    deadline = time.monotonic() + recipe.ready_timeout_s
    try:
        while alive():
            engine = find(port)
            if engine and _answers(engine):
                return engine
            if time.monotonic() > deadline:
                raise EngineError(f"the engine was not ready within {recipe.ready_timeout_s:g} s; {told(log)}")
            progress.phase(recipe.phase(log.read_text(errors="replace") if log.is_file() else ""))
            progress.detail("")
            time.sleep(POLL_S)
    finally:
        progress.end()
    raise EngineError(f"the engine did not start; {told(log)}")


def _answers(engine: Running) -> bool:
    try:
        return httpx.get(f"{engine.root}/health", timeout=ASK_TIMEOUT_S, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def told(log: Path) -> str:
    """Return the lines of an engine's log that say why it ended."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    # Where a child of the engine fails, the reason stands far above the end, once with a prefix and once without.
    reasons = {line.rpartition("] ")[2]: line for line in lines if _REASON.search(line) and "WARNING" not in line}
    last = [*list(reasons.values())[:TOLD_REASONS], *lines[-1:]] if reasons else lines[-TOLD_LINES:]
    return f"its last lines (all are in {log}):\n" + "\n".join(f"  {line}" for line in last)


def _is_our_output(log: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(1), log.stat())
    return False
