"""The processes of a site beside its engines: Redis, cores, gateways, callers; each can be killed or frozen."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from random import SystemRandom
from typing import Any, Self

import psutil

from tests.scale_faults.account import Call
from tests.serve_kills.processes import PATIENCE_S, ROOT, Process

_PORTS = SystemRandom()

OVER = threading.Event()
"""Set where the run is stopped: nothing is waited for any more."""


def free_port() -> int:
    """Return a loopback port for a server that begins later, none of those that the system gives to connections."""
    while True:
        port = _PORTS.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Stall(AssertionError):
    """Something did not come in time."""


def until(what: Callable[[], Any], why: Callable[[], str], patience_s: float = PATIENCE_S) -> Any:
    """Wait until *what* returns something true, and return that.

    Raises:
        Stall: It did not in time; with what *why* says then.
        KeyboardInterrupt: The run is stopped.
    """
    end_s = time.monotonic() + patience_s
    while not (found := what()):
        if OVER.is_set():
            raise KeyboardInterrupt
        if time.monotonic() >= end_s:
            raise Stall(f"not within {patience_s:.0f} s: {why()}")
        time.sleep(0.02)
    return found


def got(url: str, limit_s: float = 0.5) -> tuple[int, bytes]:
    """Return status and body of an answer; 0 where there is none."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=limit_s) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as refused:
        with contextlib.suppress(OSError):
            return refused.code, refused.read()
    except (OSError, ValueError):
        pass
    return 0, b""


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

        until(answers, lambda: f"Redis answers\n{self.said()}")
        return self


APART = ("unshare", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child")
"""Before a process that sees no other's pid, as on a machine of its own."""


TOLD = ("orla_scheduler_in_flight{", "orla_scheduler_queue_depth{", "orla_circuit_breaker_state{", "orla_links{",
        "orla_store_answers")  # fmt: skip
"""Of a core's metrics, what says why calls do not flow."""


class Server(Process):
    """``orla-lg serve``, in its seat: a core, which decides or stands by, or a gateway."""

    def __init__(self, kind: str, seat: int, port: int, words: Sequence[str], log: Path, *, apart: bool) -> None:
        self.name, self.seat, self.port, self.apart, self.log = f"{kind} {seat}", seat, port, apart, log
        with log.open("ab") as told:
            self.process = subprocess.Popen(
                [*(APART if apart else ()), sys.executable, *words], cwd=ROOT, env=own_environment(),
                stdin=subprocess.DEVNULL, stdout=told, stderr=told, text=True, start_new_session=True,
            )  # fmt: skip

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

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
        with contextlib.suppress(ValueError, KeyError):
            return str(json.loads(got(f"{self.url}/readyz")[1])["state"])
        return ""

    def await_state(self, *states: str) -> Self:
        def there() -> bool:
            assert self.lives, self.said()
            return self.state in states

        until(there, lambda: f"{self.name} is {' or '.join(states)}\n{self.told()}")
        return self

    def told(self) -> str:
        """Return what it is at, what it counts, and the end of its log."""
        metrics = got(f"{self.url}/metrics", 2.0)[1].decode(errors="replace").splitlines()
        counts = [each.removeprefix("orla_") for each in metrics if each.startswith(TOLD)]
        at = f"{self.name}: {(self.state or 'does not answer') if self.lives else 'ended'}; {', '.join(counts)}"
        return "\n  ".join([at, *self.said().splitlines()[-6:]])


class Caller(Process):
    """A process that never stops calling, and what it tells of its calls."""

    def __init__(self, name: str, words: Sequence[str], log: Path, *, seed: int) -> None:
        super().__init__([*words, "--name", name], log, PYTHONHASHSEED=str(seed), **cached())
        self.name = name
        self.ready = self.killed = self.frozen = False
        self.calls: dict[str, Call] = {}
        """By name, in the order in which they began."""
        self._open: dict[str, str] = {}
        """Those under way, with their stages."""
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
            self._open[said["begun"]] = said["stage"]
        elif "ended" in said:
            begun = self.calls[said["ended"]]
            self.calls[said["ended"]] = begun._replace(ended_s=said["s"], error=said.get("error", ""))
            del self._open[said["ended"]]
        self.ready = self.ready or "ready" in said

    def await_ready(self) -> Self:
        def ready() -> bool:
            assert self.lives, self.said()
            return self.ready

        until(ready, lambda: f"{self.name} is ready\n{self.said()}")
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
        """Return the calls under way; those of a killed one ended with it."""
        return set() if self.killed else {
            call for call, of in list(self._open.items()) if not stage or of == stage
        }  # fmt: skip

    def begun_after(self, moment_s: float) -> Iterator[Call]:
        """Yield the calls that began after a moment, the newest first."""
        return takewhile(lambda call: call.begun_s > moment_s, reversed(list(self.calls.values())))

    def say(self, **what: Any) -> None:
        assert self.process.stdin is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)

    def end(self) -> None:
        """Let it begin nothing more, and end with what is under way."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(PATIENCE_S)
        assert self.process.returncode == 0, self.said()

    def told(self) -> str:
        """Return what it is at."""
        at = "killed" if self.killed else "frozen" if self.frozen else "lives" if self.lives else "ended"
        now = monotonic()
        oldest = max((now - self.calls[call].begun_s for call in self.open_calls()), default=0.0)
        errors = [call.error for call in list(self.calls.values())[-50:] if call.error]
        counts = ", ".join(f"{len(self.open_calls(stage))} {stage}" for stage in ("long", "short"))
        return f"{self.name}: {at}; under way {counts}, since {oldest:.1f} s; {errors[-1] if errors else 'no errors'}"


def monotonic() -> float:
    """Return seconds that all processes of this machine agree on."""
    return time.monotonic()


def own_environment() -> dict[str, str]:
    """Return what processes are started with: no proxies, all is near."""
    return {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")} | cached()


@cache
def cached() -> dict[str, str]:
    """Return what lets processes begin sooner after the first: they keep what they compile, while this run lasts."""
    kept = tempfile.mkdtemp(prefix="orla-compiled-")
    atexit.register(shutil.rmtree, kept, ignore_errors=True)
    return {"PYTHONPYCACHEPREFIX": kept, "PYTHONDONTWRITEBYTECODE": ""}


__all__ = ["PATIENCE_S", "ROOT", "Caller", "Process", "Redis", "Server", "Stall", "until"]
