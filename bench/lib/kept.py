"""Turns: each is kept when it has ended, with what else the machine did; what is kept is not measured again."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import psutil

from bench.lib.calls import CallSeen, JobSeen, Turn
from bench.lib.command import tell

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


Arm = TypeVar("Arm", bound=Any)
Load = TypeVar("Load")


class Kept:
    """The turns measured so far with the same settings."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._path, self.settings, self.turns = path, dict(settings), list[Turn]()
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            settings, self.turns = said["settings"], [_turn(row) for row in said["turns"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path} holds no turns of this benchmark: {error!r}") from error
        if changed := [name for name in self.settings if settings.get(name) != self.settings[name]]:
            raise SystemExit(
                f"{path} was measured with another {', '.join(changed)}: "
                f"{ {name: settings.get(name) for name in changed} }; give another file to --keep, or remove it"
            )
        self.settings = settings

    def has(self, arm: str, seed: int, place: str = "") -> bool:
        return any((turn.arm, turn.seed, turn.place) == (arm, seed, place) for turn in self.turns)

    def add(self, turn: Turn) -> None:
        """Keep a turn; the file is whole at every moment."""
        self.turns.append(turn)
        if self._path is not None:
            told = {"settings": self.settings, "turns": [asdict(each) for each in self.turns]}
            fresh = self._path.with_name(f"{self._path.name}.new")
            fresh.write_text(json.dumps(told), encoding="utf-8")
            fresh.replace(self._path)

    async def measure(
        self, url: str | None, arms: Sequence[Arm], rounds: int, load: Callable[[int], Load],
        turn: Callable[[Arm, Load, int], Awaitable[Turn]], *, quiet: float = 1.0, place: str = "",
    ) -> None:  # fmt: skip
        """Run every turn that is not kept yet, the arms of a round in an order of its own.

        A round's number is its seed; *load* makes its load, the same for all arms. Where there is the *url* of an
        engine, it is seen what others take of its machine, and a turn beside more than *quiet* is repeated once.
        """
        began_s = time.monotonic()
        for seed in range(rounds):
            order = [arm for arm in Random(seed).sample(arms, len(arms)) if not self.has(arm.name, seed, place)]
            given = [load(seed)] if order else []
            for arm in order:
                at = f"{place or 'round'} {seed + 1}/{rounds}, {time.monotonic() - began_s:4.0f} s"
                tell(f"{at}: {arm.name}")
                made = await beside_others(url, turn(arm, given[0], seed))
                if made.others > quiet:
                    tell(f"others took {made.others:.0%} of the machine; once more", last=True)
                    again = await beside_others(url, turn(arm, given[0], seed))
                    made = min(made, again, key=lambda each: each.others)
                self.add(made)
        tell(f"measured in {time.monotonic() - began_s:.0f} s", last=True)


def _turn(row: Mapping[str, Any]) -> Turn:
    calls, jobs = [CallSeen(**call) for call in row["calls"]], [JobSeen(**job) for job in row["jobs"]]
    return Turn(**{**row, "calls": calls, "jobs": jobs})
