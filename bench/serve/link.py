"""The link against a core in the process itself: what a call's wait for its grant grows by, idle and loaded."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

from bench.lib.command import tell
from bench.lib.engines import child, started
from bench.lib.figures import at_rank, rotated, spread, table
from bench.serve.servers import Server, orla

LOCAL, LINK = "in the process", "by link"
REPLICAS, RATE = 4, 25.0
IDLE, LOADED = "idle", f"{REPLICAS} × {RATE:.0f} calls/s"
RATES = {IDLE: None, LOADED: RATE}
BEFORE_S = 0.02
"""What the engine takes for an answer."""
GOAL_MS = 0.3


@dataclass(frozen=True, slots=True)
class Block:
    """One arm in one round, over all its replicas; milliseconds."""

    arm: str
    seed: int
    load: str
    wait_ms: Sequence[float]
    taken_ms: Sequence[float]
    core_ms: float
    """CPU time of ``orla-lg serve``, per call."""


def block(by: Sequence[subprocess.Popen[str]], core: Server, arm: str, seed: int, load: str, calls: int) -> Block:
    """Have replicas make *calls* each, at the same time."""
    before_ms, wait_ms, taken_ms = core.cpu_ms(), list[float](), list[float]()
    for each in by:
        print(json.dumps([arm, calls, RATES[load]]), file=each.stdin, flush=True)
    for each in by:
        assert each.stdout is not None
        waits, whole = json.loads(each.stdout.readline() or "[]")
        wait_ms += waits
        taken_ms += whole
    return Block(arm, seed, load, wait_ms, taken_ms, (core.cpu_ms() - before_ms) / len(taken_ms))


def measure(rounds: int, calls: int) -> list[Block]:
    """Run both arms, interleaved: one replica with a call at a time, then all of them at a rate."""
    found = []
    with ExitStack() as stack:
        engine = stack.enter_context(started("tests.scripted_engine", "--before-s", str(BEFORE_S)))
        core = stack.enter_context(orla(engine))
        words = ("-m", "bench.serve.replica", engine, core.url.removesuffix("/v1"))
        replicas = [stack.enter_context(child(*words)[0]) for _ in range(REPLICAS)]
        for each in replicas:
            stack.callback(each.terminate)
        for load, by in ((IDLE, replicas[:1]), (LOADED, replicas)):
            for arm in (LOCAL, LINK):  # warm: connections, code
                block(by, core, arm, 0, load, 20)
            for seed in range(rounds):
                for arm in rotated((LOCAL, LINK), seed):
                    tell(f"link: {load}, round {seed + 1}/{rounds}: {arm}")
                    found.append(block(by, core, arm, seed, load, calls))
        tell(f"link: {rounds} rounds", last=True)
    return found


def added(blocks: Iterable[Block], load: str) -> list[float]:
    """Return what the link adds to the median wait, round by round."""
    middles = {(each.arm, each.seed): median(each.wait_ms) for each in blocks if each.load == load}
    return [middles[LINK, seed] - middle for (arm, seed), middle in middles.items() if arm == LOCAL]


def report(blocks: Sequence[Block]) -> list[str]:
    """Return the table."""
    rows = []
    for load, arm in ((load, arm) for load in (IDLE, LOADED) for arm in (LOCAL, LINK)):
        own = [each for each in blocks if (each.load, each.arm) == (load, arm)]
        more, core = (
            (spread(added(blocks, load)), spread([each.core_ms for each in own])) if arm == LINK else (None,) * 2
        )
        p99 = at_rank([ms for each in own for ms in each.wait_ms], 0.99)
        rows.append([
            load, arm, spread([median(each.wait_ms) for each in own]).shown(), f"{p99:.1f}",
            more.shown(bold=True) if more else "", spread([median(each.taken_ms) for each in own]).shown(".1f"),
            core.shown() if core else "",
        ])  # fmt: skip
    head = (
        "load",
        "core",
        "wait for a grant: median, ms",
        "p99, ms",
        "added, ms",
        "whole call, ms",
        "core's CPU, ms",
    )
    return table(head, rows)


def beyond_goal(blocks: Sequence[Block]) -> list[str]:
    """Return what the link is to be, and is not."""
    ms = median(added(blocks, IDLE))
    return [f"the link adds {ms:.2f} ms to the wait when idle, the goal is {GOAL_MS:.2f}"] if ms > GOAL_MS else []
