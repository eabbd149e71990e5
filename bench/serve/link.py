"""The link against a core in the process itself: what a call's wait for its grant grows by, idle and loaded."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.lib.command import tell
from bench.lib.engines import child, started
from bench.lib.figures import at_rank, rotated, spread, table
from bench.serve.servers import Server, orla

LOCAL, LINK = "in process", "link"
IDLE, LOADED = "idle", "loaded"
REPLICAS, AT_ONCE = 4, 8
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


Replica = subprocess.Popen[str]


def block(by: Sequence[Replica], core: Server, arm: str, seed: int, load: str, calls: int, at_once: int) -> Block:
    """Have replicas make *calls* each, at the same time."""
    before_s = core.cpu_s()
    for each in by:
        assert each.stdin is not None
        print(json.dumps([arm, calls, at_once]), file=each.stdin, flush=True)
    answers = [read(each) for each in by]
    core_ms = (core.cpu_s() - before_s) * 1e3 / (calls * len(by))
    columns = ([value for answer in answers for value in answer[name]] for name in ("wait_ms", "taken_ms"))
    return Block(arm, seed, load, *columns, core_ms)


def read(replica: Replica) -> dict[str, Any]:
    assert replica.stdout is not None
    if not (line := replica.stdout.readline()):
        raise SystemExit("a replica ended early")
    return dict(json.loads(line))


def measure(rounds: int, calls: int) -> list[Block]:
    """Run both arms, interleaved: one replica with a call at a time, then all of them with many."""
    found = []
    with ExitStack() as stack:
        engine = stack.enter_context(started("tests.scripted_engine", "--before-s", str(BEFORE_S)))
        core = stack.enter_context(orla(engine))
        words = ("-m", "bench.serve.replica", engine, core.url.removesuffix("/v1"))
        replicas = [stack.enter_context(child(*words)[0]) for _ in range(REPLICAS)]
        for each in replicas:
            stack.callback(each.terminate)
        for load, by, at_once in ((IDLE, replicas[:1], 1), (LOADED, replicas, AT_ONCE)):
            for arm in (LOCAL, LINK):  # warm: connections, code
                block(by, core, arm, 0, load, 20, at_once)
            for seed in range(rounds):
                for arm in rotated((LOCAL, LINK), seed):
                    tell(f"link: {load}, round {seed + 1}/{rounds}: {arm}")
                    found.append(block(by, core, arm, seed, load, calls, at_once))
        tell(f"link: {rounds} rounds", last=True)
    return found


def added(blocks: Iterable[Block], load: str, name: str = "wait_ms") -> list[float]:
    """Return what the link adds to a median, round by round."""
    middles = {(each.arm, each.seed): median(getattr(each, name)) for each in blocks if each.load == load}
    return [middles[LINK, seed] - middle for (arm, seed), middle in middles.items() if arm == LOCAL]


def report(blocks: Sequence[Block]) -> list[str]:
    """Return the table."""

    def row(load: str, arm: str) -> list[str]:
        own = [each for each in blocks if (each.load, each.arm) == (load, arm)]
        waits = [value for each in own for value in each.wait_ms]
        more, core = "", ""
        if arm == LINK:
            more = spread(added(blocks, load)).shown(bold=True)
            core = spread([each.core_ms for each in own]).shown()
        return [load, arm, spread([median(each.wait_ms) for each in own]).shown(), f"{at_rank(waits, 0.99):.1f}",
                more, spread([median(each.taken_ms) for each in own]).shown(".1f"), core]  # fmt: skip

    head = (
        "load",
        "core",
        "wait for a grant: median, ms",
        "p99, ms",
        "added, ms",
        "whole call, ms",
        "core's CPU, ms",
    )
    return table(head, [row(load, arm) for load in (IDLE, LOADED) for arm in (LOCAL, LINK)])


def beyond_goal(blocks: Sequence[Block]) -> list[str]:
    """Return what the link is to be, and is not."""
    ms = median(added(blocks, IDLE))
    return [f"the link adds {ms:.2f} ms to the wait when idle, the goal is {GOAL_MS}"] if ms > GOAL_MS else []
