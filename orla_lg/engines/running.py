"""Who runs: one file for each engine in the cache folder, locked for as long as the engine lives.

Whoever can take the lock on ``run/engine-PORT.json`` knows that the engine is gone, whatever process bears
its number now. An engine with a process of its own inherits the lock, so that it is found, and can be ended,
even if whoever started it was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from orla_lg.errors import EngineError
from orla_lg_llamacpp.model import cache_folder, try_lock

__all__ = [
    "Claim",
    "Running",
    "all_running",
    "claimed",
    "find",
    "kill",
    "kill_group",
    "log_of",
    "members",
    "remove_logs",
    "sockets_of",
    "stop",
]

STOP_TIMEOUT_S = 20.0
KILL_TIMEOUT_S = 10.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Running:
    """A running engine, as its file tells it."""

    port: int
    pid: int
    url: str
    name: str
    engine: str
    """Its kind."""
    group: int = 0
    """The process group of it and all that it started; 0 if it has none of its own."""
    kv_events: str = ""
    """Where it publishes its cache events, for ``Backend.kv_events``; empty if it does not."""
    kv_replay: str = ""
    """Where it repeats them, for ``Backend.kv_replay``."""

    @property
    def root(self) -> str:
        """The URL above the OpenAI API's."""
        return self.url.removesuffix("/v1")


def run_folder() -> Path:
    """Return the folder of the engines' files, made if need be."""
    folder = cache_folder() / "run"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise EngineError(
            f"the list of running engines cannot be kept in {folder}: {exc.strerror}; "
            "set ORLA_CACHE_DIR to a folder that can be written"
        ) from exc
    return folder


def _file_of(port: int) -> Path:
    return run_folder() / f"engine-{port}.json"


def log_of(port: int) -> Path:
    """Return the file for what the engine on *port* says."""
    return run_folder() / f"engine-{port}.log"


def sockets_of(port: int) -> tuple[Path, Path]:
    """Return the sockets on which the engine on *port* publishes its cache events, and repeats them."""
    return run_folder() / f"engine-{port}.events", run_folder() / f"engine-{port}.replay"


def remove_logs() -> None:
    """Remove the logs of engines that are gone."""
    for log in run_folder().glob("engine-*.log"):
        if not log.with_suffix(".json").exists() and not log.with_suffix(".starting").exists():
            log.unlink(missing_ok=True)


# One engine at a time on a port ----------------------------------------------------------------------------


class Claim:
    """A port that is ours to serve on; ``publish()`` makes it known to the other commands."""

    def __init__(self, port: int, file: IO[str]) -> None:
        self._path = _file_of(port)
        self._file = file
        self.descriptor = file.fileno()

    def publish(self, running: Running) -> None:
        """Let the engine's file appear, whole and locked, under its name."""
        self._file.truncate(0)
        json.dump(asdict(running), self._file)
        self._file.flush()
        if sys.platform == "win32":
            self._file.close()  # an open file cannot be renamed there
        self._path.with_suffix(".starting").replace(self._path)


@contextlib.contextmanager
def claimed(port: int) -> Iterator[Claim]:
    """Hold *port*'s lock.

    Raises:
        EngineError: An engine runs there already, or is being started.
    """
    starting = _file_of(port).with_suffix(".starting")
    with starting.open("a") as file:
        if not try_lock(file):
            raise EngineError(f"another engine is being started on port {port}")
        try:
            if engine := find(port):
                raise EngineError(f"an engine already runs on port {port} (process {engine.pid}): {engine.url}")
        except EngineError:
            starting.unlink(missing_ok=True)
            raise
        try:
            yield Claim(port, file)
        finally:
            starting.unlink(missing_ok=True)
            _file_of(port).unlink(missing_ok=True)


def find(port: int) -> Running | None:
    """Return the engine on *port*; if it is gone, remove its file and what it may have left running."""
    path = _file_of(port)
    try:
        with path.open("r+") as file:
            engine = Running(**json.load(file))
            if not _is_stale(file, port):
                return engine
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as exc:
        raise EngineError(f"{path} is not an engine's file: {exc}; remove it") from exc
    # The kernel gives a group's number to no other process while one of the group lives; so a group without
    # the process that it is named after is still the engine's.
    left = members(engine.group)
    if engine.group not in left:
        kill_group(engine.group)
    path.unlink(missing_ok=True)
    return None


def _is_stale(file: IO[str], port: int) -> bool:
    if sys.platform == "win32":
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) != 0
    return try_lock(file)


def all_running() -> list[Running]:
    """Return every engine that runs, by port."""
    ports = (path.stem.removeprefix("engine-") for path in run_folder().glob("engine-*.json"))
    found = (find(port) for port in sorted(int(port) for port in ports if port.isdecimal()))
    return [engine for engine in found if engine]


# Ending ---------------------------------------------------------------------------------------------------


def members(group: int) -> list[int]:
    """Return the processes of *group* that run, without those that ended and only wait to be collected."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat") if group else ():
        with contextlib.suppress(OSError):  # it ended between listing and looking
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(int(path.parent.name))
    return found


def kill_group(group: int) -> None:
    """Kill what is left of *group* and see it gone.

    Raises:
        EngineError: Something of it is still there after ten seconds.
    """
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while left := members(group):
        if time.monotonic() > deadline:
            raise EngineError(f"processes {left} of the engine still run {KILL_TIMEOUT_S:g} s after SIGKILL")
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)


def stop(engine: Running, patience_s: float = STOP_TIMEOUT_S) -> None:
    """End *engine* and all that it started: asked first, killed when *patience_s* is over."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(engine.pid, signal.SIGTERM)
    if not _gone_within(engine, patience_s):
        kill(engine)
    kill_group(engine.group)


def kill(engine: Running) -> None:
    """Kill *engine* without asking, as a crash would, and see it gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(engine.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    kill_group(engine.group)
    if not _gone_within(engine, KILL_TIMEOUT_S):
        raise EngineError(f"process {engine.pid} ({engine.url}) still runs {KILL_TIMEOUT_S:g} s after SIGKILL")


def _gone_within(engine: Running, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while find(engine.port) == engine:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
