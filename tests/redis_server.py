"""A real Redis for tests: a server in a folder of its own, that can be killed, frozen and started again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

PATIENCE_S = 10.0


def redis_program() -> str:
    """Return the program; skips a test where there is none, or no client for it."""
    pytest.importorskip("redis")
    found = os.environ.get("ORLA_TEST_REDIS") or shutil.which("redis-server")
    if not found:
        pytest.skip('ORLA_TEST_REDIS names no program: eval "$(.ci/redis.sh start)" finds or installs one')
    return found


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class RedisServer:
    """A server on a loopback port, with a log of what it was given; ends with its ``with`` block.

    Args:
        folder: Where its log is.
        options: Further ones of ``redis-server``.
        tls: Whether the port speaks TLS, by the certificate that *options* name.
    """

    def __init__(self, folder: Path, *options: str, tls: bool = False) -> None:
        self._program, self._folder, self._options, self._tls = redis_program(), folder, options, tls
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"{'rediss' if self._tls else 'redis'}://127.0.0.1:{self.port}/0"

    def start(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        port = ["--port", "0", "--tls-port", f"{self.port}"] if self._tls else ["--port", f"{self.port}"]
        self.process = subprocess.Popen(
            [self._program, *port, "--bind", "127.0.0.1", "--dir", f"{self._folder}", "--save", "",
             "--appendonly", "yes", "--appendfsync", "everysec", *self._options],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < until_s:
            assert self.process.poll() is None, f"redis-server ended with {self.process.returncode}"
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            except OSError:
                time.sleep(0.01)
        raise AssertionError("redis-server does not listen")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def freeze(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.thaw()
            self.kill()
