"""The processes of a site beside its engines: Redis, cores, replicas; each can be killed or frozen."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from tests.scale_faults.account import Call
from tests.serve_kills.processes import PATIENCE_S, ROOT, Process, until


class Redis(Process):
    """Debian's Redis; *durable*: what it acknowledged is in its append-only file."""

    def __init__(self, port: int, folder: Path, *, durable: bool = True) -> None:
        self.port, self.log = port, folder / "redis.log"
        words = [
            "redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "",
            "--appendonly", "yes" if durable else "no", "--daemonize", "no",
        ]  # fmt: skip
        if not durable:
            for file in folder.glob("appendonlydir/*"):
                file.unlink()
        with self.log.open("ab") as told:
            self.process = subprocess.Popen(
                words, cwd=folder, stdin=subprocess.DEVNULL, stdout=told, stderr=told, start_new_session=True,
                text=True,
            )  # fmt: skip

    def await_ready(self) -> Self:
        """Wait until it answers."""

        def answers() -> bool:
            assert self.lives, self.said()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as asking:
                asking.sendall(b"PING\r\n")
                return asking.recv(100).startswith(b"+PONG")
            return False

        until(answers, "Redis answers")
        return self


APART = ("unshare", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child")
"""Before a process that sees no other's pid, as on a machine of its own."""


class Core(Process):
    """``orla-lg serve``, in its seat: it decides, or stands by."""

    def __init__(self, seat: int, port: int, words: Sequence[str], log: Path, *, apart: bool) -> None:
        self.seat, self.port, self.apart, self.log = seat, port, apart, log
        with log.open("ab") as told:
            self.process = subprocess.Popen(
                [*(APART if apart else ()), sys.executable, *words], cwd=ROOT, env=own_environment(),
                stdin=subprocess.DEVNULL, stdout=told, stderr=told, text=True, start_new_session=True,
            )  # fmt: skip

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        inner = psutil.Process(self.process.pid).children() if self.apart else [self.process]
        for each in inner:
            os.kill(each.pid, number)

    @property
    def state(self) -> str:
        """What it says that it is at; empty where it does not answer."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://127.0.0.1:{self.port}/readyz", timeout=0.5) as answer:
                return str(json.loads(answer.read())["state"])
        except urllib.error.HTTPError as refused:
            with contextlib.suppress(ValueError, KeyError, OSError):
                return str(json.loads(refused.read())["state"])
        except (OSError, ValueError):
            pass
        return ""

    def await_state(self, *states: str) -> Self:
        def there() -> bool:
            assert self.lives, self.said()
            return self.state in states

        until(there, f"core {self.seat} is {' or '.join(states)}")
        return self


class Replica(Process):
    """``tests.scale_faults.replica``, and what it tells of its calls."""

    def __init__(self, name: str, server: str, engine: str, folder: Path, *options: str, seed: int) -> None:
        words = ["-m", "tests.scale_faults.replica", server, engine, "--name", name, *options]
        super().__init__(words, folder / f"replica-{name}.log", PYTHONHASHSEED=str(seed))
        self.name = name
        self.ready = self.killed = self.frozen = False
        self.calls: dict[str, Call] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):
            for line in self.process.stdout:
                if not line.endswith("\n"):
                    return  # cut off by its death
                self._heard(json.loads(line))

    def _heard(self, said: dict[str, Any]) -> None:
        if "begun" in said:
            self.calls[said["begun"]] = Call(self.name, said["stage"], said["takes_s"], said["s"])
        elif "ended" in said:
            begun = self.calls[said["ended"]]
            self.calls[said["ended"]] = begun._replace(ended_s=said["s"], error=said.get("error", ""))
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

    def freeze(self) -> None:
        self.frozen = True
        super().freeze()

    def thaw(self) -> None:
        super().thaw()
        self.frozen = False

    def open_calls(self, stage: str = "") -> set[str]:
        """Return the calls under way; those of a killed replica ended with it."""
        if self.killed:
            return set()
        return {
            name for name, call in list(self.calls.items())
            if call.ended_s is None and (not stage or call.stage == stage)
        }  # fmt: skip

    def say(self, **what: Any) -> None:
        assert self.process.stdin is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)

    def end(self) -> None:
        """Let it begin nothing more, and end with what is under way."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(PATIENCE_S)
        assert self.process.returncode == 0, self.said()


def monotonic() -> float:
    """Return seconds that all processes of this machine agree on."""
    return time.monotonic()


def own_environment() -> dict[str, str]:
    """Return what processes are started with: no proxies, all is near."""
    return {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}


__all__ = ["PATIENCE_S", "ROOT", "Core", "Process", "Redis", "Replica", "until"]
