"""The processes of a pool: cores, replicas and an engine; each can be killed or frozen."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

PATIENCE_S = 60.0
ROOT = Path(__file__).resolve().parents[2]


def until(what: Callable[[], Any], why: str, patience_s: float = PATIENCE_S) -> Any:
    """Wait until *what* returns something true, and return that."""
    end_s = time.monotonic() + patience_s
    while not (found := what()):
        assert time.monotonic() < end_s, f"not within {patience_s:.0f} s: {why}"
        time.sleep(0.01)
    return found


def asked(url: str) -> Any:
    """Return what a URL answers; ``None`` where nothing answers."""
    with contextlib.suppress(OSError, urllib.error.URLError, ValueError):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=5) as answer:
            return answer.read()
    return None


class Process:
    """A process that this test started; ended by its own id."""

    def __init__(self, words: Sequence[str], log: Path, **env: str) -> None:
        self.log = log
        with log.open("ab") as told:
            self.process = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, env={**os.environ, **env}, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=told, text=True, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    @property
    def lives(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def said(self) -> str:
        """Return the end of what it wrote on standard error."""
        return self.log.read_text(errors="replace")[-3000:]


class Engine(Process):
    """The scripted engine."""

    def __init__(self, folder: Path) -> None:
        super().__init__(["-m", "tests.scripted_engine"], folder / "engine.log")
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url, self.said()

    def account(self, query: str = "") -> dict[str, Any]:
        told: dict[str, Any] = json.loads(asked(self.url.removesuffix("/v1") + f"/account{query}"))
        return told


class Core(Process):
    """``orla-lg serve``."""

    def __init__(self, config: Path, port: int, module: str = "orla_lg") -> None:
        words = ["-m", module, "serve", "--config", str(config), "--port", str(port)]
        super().__init__(words, config.with_name(f"core-{port}.log"))
        self.port = port
        threading.Thread(target=self._drop_output, daemon=True).start()

    def _drop_output(self) -> None:
        with contextlib.suppress(ValueError):  # closed meanwhile
            for _ in self.process.stdout or ():
                pass

    def await_ready(self) -> Self:
        """Wait until it decides: it answers, and has the lease."""

        def ready() -> bool:
            assert self.lives, self.said()
            return asked(f"http://127.0.0.1:{self.port}/readyz") is not None

        until(ready, "the core is ready")
        return self


class Replica(Process):
    """``tests.serve_kills.replica``, and what it tells of its calls."""

    def __init__(self, name: str, port: int, engine: str, folder: Path, *options: str, seed: int) -> None:
        words = ["-m", "tests.serve_kills.replica", f"http://127.0.0.1:{port}", engine, "--name", name, *options]
        super().__init__(words, folder / f"replica-{name}.log", PYTHONHASHSEED=str(seed))
        self.name = name
        self.ready = self.killed = False
        self.begun: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        """By call, when."""
        self.errors: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):
            for line in self.process.stdout:
                if not line.endswith("\n"):
                    return  # cut off by its death
                said = json.loads(line)
                if "begun" in said:
                    self.begun[said["begun"]] = said["s"]
                elif "ended" in said:
                    self.ended[said["ended"]] = said["s"]
                    if said.get("error"):
                        self.errors.append((said["s"], said["error"]))
                self.ready = self.ready or "ready" in said

    def await_ready(self) -> Self:
        def ready() -> bool:
            assert self.lives, self.said()
            return self.ready

        until(ready, f"replica {self.name} is ready")
        return self

    def kill(self) -> None:
        self.killed = True
        super().kill()
        self._reader.join(5)

    def open_calls(self) -> set[str]:
        """Return the calls under way; those of a killed replica ended with it."""
        return set() if self.killed else set(self.begun) - set(self.ended)

    def calls_take(self, seconds: float) -> None:
        """Let the next calls take so long at the engine."""
        assert self.process.stdin is not None
        print(seconds, file=self.process.stdin, flush=True)

    def stop(self) -> None:
        """Let it begin nothing more."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def await_end(self) -> None:
        """Wait for the end of what was under way, and of the process."""
        self.process.wait(PATIENCE_S)
        assert self.process.returncode == 0, self.said()
