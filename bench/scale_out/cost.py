"""What one call costs a core, by the length of its prompt: callers that only speak the link's messages."""

from __future__ import annotations

import io
import json
import pstats
import re
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.lib.command import tell
from bench.lib.engines import child, started
from bench.lib.figures import Column, Rounds, rotated
from bench.scale_out.sites import Core, core

MESSAGES = (10, 60, 200)
FLYING = 64
GOAL_US = 150.0
GROWS = 1.25
"""The longest prompts may cost so much of what the shortest do: what grows is not to be seen."""
SHOWN = 15
"""Functions of the profile."""

Place = tuple[str, int, str]
"""File, line and name of a function."""


class Turn(NamedTuple):
    """Prompts of one length, in one round."""

    arm: str
    seed: int
    messages: int
    cpu_us: float
    """Of the core, per call."""
    wait_ms: float
    """Median, from the call's arrival to its grant."""
    p99_ms: float
    calls_s: float

    @property
    def capacity(self) -> float:
        """Calls a second that a whole CPU would carry."""
        return 1e6 / self.cpu_us


COLUMNS = [
    Column("CPU of the core per call, µs", lambda turn: turn.cpu_us, ".0f"),
    Column("calls/s of a whole CPU", lambda turn: turn.capacity, ",.0f"),
    Column("calls/s measured", lambda turn: turn.calls_s, ",.0f"),
    Column("wait: median, ms", lambda turn: turn.wait_ms, ".2f"),
    Column("p99, ms", lambda turn: turn.p99_ms, ".1f"),
]


def turn(by: subprocess.Popen[str], under: Core, messages: int, seed: int, calls: int) -> Turn:
    """Have a caller make *calls* of *messages* each."""
    before_s = under.cpu_s()
    print(json.dumps([messages, calls, FLYING]), file=by.stdin, flush=True)
    assert by.stdout is not None
    said = json.loads(by.stdout.readline() or "null")
    if said is None:
        raise SystemExit("the caller ended")
    cpu_us = (under.cpu_s() - before_s) / calls * 1e6
    return Turn(f"{messages} messages", seed, messages, cpu_us, said["median_ms"], said["p99_ms"], said["calls_s"])


def measure(rounds: int, calls: int) -> Rounds[Turn]:
    """Run prompts of all lengths, interleaved."""
    found = list[Turn]()
    with ExitStack() as stack:
        engine = stack.enter_context(started("tests.scripted_engine"))
        under = stack.enter_context(core(engine))
        by, _ = child("-m", "bench.scale_out.caller", under.url)
        stack.callback(by.terminate)
        for messages in MESSAGES:
            turn(by, under, messages, -1, 200)
        for seed in range(rounds):
            for messages in rotated(MESSAGES, seed):
                tell(f"cost: round {seed + 1}/{rounds}: {messages} messages")
                found.append(turn(by, under, messages, seed, calls))
    tell(f"cost: {rounds} rounds", last=True)
    return Rounds(found, [f"{messages} messages" for messages in MESSAGES])


def report(rounds: Rounds[Turn]) -> list[str]:
    """Return the table."""
    return rounds.table(f"prompts of, {FLYING} calls at a time", COLUMNS)


def beyond_goal(rounds: Rounds[Turn]) -> list[str]:
    """Return what a core is to take, and does not."""
    short, *_, long = (f"{messages} messages" for messages in MESSAGES)
    us = median(rounds.column(short, lambda each: each.cpu_us))
    grows = rounds.ratio(long, short, lambda each: each.cpu_us)
    found = []
    if us > GOAL_US:
        found.append(f"a call of {short} takes {us:.0f} µs of the core's CPU, the goal is {GOAL_US:.0f}")
    if grows > GROWS:
        found.append(f"a call of {long} takes {grows:.1f} times as much as one of {short}")
    return found


def profiled(calls: int, messages: int = MESSAGES[0]) -> list[str]:
    """Return where a core's time goes, by the profiler, which makes all of it slower."""
    tell(f"cost: a profile at {messages} messages")
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "profile")
        engine = stack.enter_context(started("tests.scripted_engine"))
        with core(engine, words=["bench.scale_out.profiled", str(path)]) as under:
            by, _ = child("-m", "bench.scale_out.caller", under.url)
            stack.callback(by.terminate)
            turn(by, under, messages, -1, 500)
            under.process.send_signal(signal.SIGUSR2)
            made = turn(by, under, messages, 0, calls)
        tell("cost: a profile", last=True)
        return [f"Where the time of a call of {messages} messages goes, under a profiler ({made.cpu_us:.0f} µs):",
                "", "```", *top(path, calls), "```"]  # fmt: skip


def top(path: Path, calls: int) -> list[str]:
    """Return the functions that take most by themselves, in µs of each call; what only waits is left out."""
    stats = pstats.Stats(str(path), stream=io.StringIO())
    spent: dict[Place, tuple[int, int, float, float, object]] = stats.stats  # type: ignore[attr-defined]
    rows = [(own_s, times, place) for place, (_, times, own_s, _, _) in spent.items() if not _waits(place)]
    shown = [f"{'µs':>7} {'times':>6}  function"]
    for own_s, times, (file, line, name) in sorted(rows, reverse=True)[:SHOWN]:
        shown.append(f"{own_s / calls * 1e6:7.1f} {times / calls:6.1f}  {_short(file, line, name)}")
    return shown


def _waits(place: Place) -> bool:
    return re.search(r"\b(poll|select|epoll|sleep|acquire|run_forever)\b", place[2]) is not None


def _short(file: str, line: int, name: str) -> str:
    if file == "~":
        return name
    parts: Sequence[str] = Path(file).parts
    at = next((number for number, part in enumerate(parts) if part in ("orla_lg", "site-packages")), len(parts) - 2)
    return f"{'/'.join(parts[at:])}:{line} {name}"
