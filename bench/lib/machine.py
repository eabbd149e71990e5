"""What else the machine does while an engine is measured."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any, TypeVar

import psutil

Turn = TypeVar("Turn", bound=Any)
LOCAL = ("//127.0.0.1:", "//localhost:")


class Others:
    """What processes other than the engine and this one take of the machine's time."""

    def __init__(self, url: str) -> None:
        port = int(url.rstrip("/").removesuffix("/v1").rpartition(":")[2])
        listening = [
            one.pid for one in psutil.net_connections("tcp") if one.status == "LISTEN" and one.laddr.port == port
        ]
        engine = psutil.Process(next(pid for pid in listening if pid))
        self._ours = {psutil.Process().pid, engine.pid, *(child.pid for child in engine.children(recursive=True))}
        self._since_s, self._before = time.monotonic(), self._times()

    def share(self) -> float:
        """Return the part of all cores' time since the begin, 0 to 1."""
        taken_s = sum(after - self._before.get(pid, 0.0) for pid, after in self._times().items())
        return taken_s / (time.monotonic() - self._since_s) / (psutil.cpu_count() or 1)

    def _times(self) -> dict[int, float]:
        found = {}
        for process in psutil.process_iter(["pid", "cpu_times"]):
            if process.pid not in self._ours and (spent := process.info["cpu_times"]) is not None:
                found[process.pid] = spent.user + spent.system
        return found


async def beside_others(url: str | None, turn: Awaitable[Turn]) -> Turn:
    """Run a turn, and note what other processes take of the machine if the engine is on this one."""
    others = Others(url) if url and any(host in url for host in LOCAL) else None
    made = await turn
    return replace(made, others=max(0.0, others.share())) if others else made
