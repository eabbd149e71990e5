"""``orla-lg serve`` as a process of its own, for tests; it is ended with the block that started it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 90.0
LAST_LINE = "drains and ends it"


def environment(folder: Path) -> dict[str, str]:
    """Return what a process is started with: nothing of ours from outside, and *folder* for its state."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ORLA_")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    return {**kept, "PYTHONPATH": path, "XDG_STATE_HOME": str(folder), "HOME": str(folder)}


def orla_lg(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in *folder* to its end."""
    return subprocess.run(
        [sys.executable, "-m", "orla_lg", *words], cwd=folder, env={**environment(folder), **env},
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip


class Served:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str], folder: Path, errors: Path) -> None:
        self.process, self.folder, self._errors = process, folder, errors
        self.said = self._read_to(LAST_LINE)
        self.url = next(line.split()[4].rstrip(",") for line in self.said if "listens at" in line)

    @property
    def errors(self) -> str:
        """What it wrote to standard error."""
        return self._errors.read_text(encoding="utf-8")

    def _read_to(self, last: str) -> list[str]:
        """Return lines up to the one with *last* in it."""
        out = self.process.stdout
        assert out is not None
        lines = list[str]()
        late = threading.Timer(PATIENCE_S, self.process.kill)
        late.start()
        try:
            while not (lines and last in lines[-1]):
                line = out.readline()
                assert line, f"it ended: {lines}; {self.errors}"
                lines.append(line.rstrip("\n"))
        finally:
            late.cancel()
        return lines

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def until(self, text: str) -> None:
        """Wait until it wrote *text* to standard error."""
        until_s = time.monotonic() + PATIENCE_S
        while text not in self.errors:
            assert time.monotonic() < until_s, self.errors
            time.sleep(0.02)

    def is_ready(self) -> bool:
        return httpx.get(f"{self.url}/readyz").is_success


@contextlib.contextmanager
def serving(
    folder: Path, words: Sequence[str] = ("--port", "0"), module: str = "orla_lg", **env: str
) -> Iterator[Served]:
    """Run ``orla-lg serve`` in *folder*, until the block ends; it answers requests when the block begins."""
    errors = folder / f"serve-{time.monotonic_ns()}.err"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "serve", *words], cwd=folder, env={**environment(folder), **env},
            stdout=subprocess.PIPE, stderr=file, text=True, bufsize=1,
        )  # fmt: skip
    try:
        yield Served(process, folder, errors)
    finally:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5.0)
        assert process.stdout is not None
        process.stdout.close()


def until_ready(served: Served) -> None:
    """Wait until a server takes calls."""
    until_s = time.monotonic() + PATIENCE_S
    while not served.is_ready():
        assert time.monotonic() < until_s, served.errors
        time.sleep(0.02)
