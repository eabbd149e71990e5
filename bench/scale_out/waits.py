"""Wrapped graphs in many processes against one, two and four cores: what a call waits, and how many go through."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from bench.lib.command import tell
from bench.lib.engines import child
from bench.lib.figures import at_rank, rotated, spread, table
from bench.scale_out.sites import Core, site

BEFORE_S = 0.02
"""What an engine takes for an answer."""
RATE = 48.0
"""Calls a second of all replicas together, where they keep to one: below what a small machine's replicas can."""


class Arm(NamedTuple):
    """So many cores and replicas; no core: each replica has one in its process."""

    cores: int
    replicas: int

    @property
    def name(self) -> str:
        if not self.cores:
            return f"in the process × {self.replicas}"
        return f"{self.cores} core{'s' * (self.cores > 1)} × {self.replicas} replicas"


ARMS = [Arm(0, 4), Arm(1, 4), Arm(2, 4), Arm(4, 4), Arm(0, 8), Arm(1, 8), Arm(2, 8), Arm(4, 8), Arm(0, 16),
        Arm(1, 16), Arm(2, 16), Arm(4, 16)]  # fmt: skip
QUICK = [Arm(0, 4), Arm(1, 4), Arm(2, 4)]


@dataclass(frozen=True, slots=True)
class Block:
    """One arm in one round, over all its replicas."""

    arm: Arm
    seed: int
    wait_ms: Sequence[float]
    calls_s: float
    """As many as go, one after the other in each replica."""
    core_us: float | None
    """CPU of all cores for each call."""


def measure(arms: Sequence[Arm], rounds: int, calls: int, *, pooled: bool) -> list[Block]:
    """Run all arms, interleaved, with *calls* of each replica."""
    found = list[Block]()
    with ExitStack() as stack:
        cores = stack.enter_context(site(max(arm.cores for arm in arms), BEFORE_S, pooled=pooled))
        words = ("-m", "bench.scale_out.replica", cores[0].engine, *(core.url for core in cores))
        replicas = list[subprocess.Popen[str]]()
        for number in range(max(arm.replicas for arm in arms)):
            tell(f"wait: replica {number + 1} starts")
            replicas.append(child(*words)[0])
            stack.callback(replicas[-1].terminate)
        for seed in range(-1, rounds):  # the first round warms
            for arm in rotated(arms, max(0, seed)):
                tell(f"wait: round {seed + 1}/{rounds}: {arm.name}")
                made = _block(replicas[: arm.replicas], cores, arm, seed, calls if seed >= 0 else 5)
                found += [made] if seed >= 0 else []
    tell(f"wait: {rounds} rounds", last=True)
    return found


def _block(by: Sequence[subprocess.Popen[str]], cores: Sequence[Core], arm: Arm, seed: int, calls: int) -> Block:
    """Have replicas make calls at a rate, all at the same time, and then as many as go."""
    under = cores[: arm.cores]
    before_s = sum(core.cpu_s() for core in under)
    paced = _asked(by, arm, calls, RATE / len(by))
    flat_out = _asked(by, arm, calls, None)
    cpu_s = sum(core.cpu_s() for core in under) - before_s
    rates = [len(taken_ms) / (sum(taken_ms) / 1e3) for _, taken_ms in flat_out]
    waits_ms = [ms for waits, _ in paced for ms in waits]
    return Block(arm, seed, waits_ms, sum(rates), cpu_s / (2 * calls * len(by)) * 1e6 if under else None)


def _asked(
    by: Sequence[subprocess.Popen[str]], arm: Arm, calls: int, rate: float | None
) -> list[tuple[list[float], list[float]]]:
    for number, each in enumerate(by):
        core = number % arm.cores if arm.cores else -1
        print(json.dumps([core, calls, rate]), file=each.stdin, flush=True)
    answers = []
    for each in by:
        assert each.stdout is not None
        waits, taken = json.loads(each.stdout.readline() or "[[],[]]")
        answers.append((waits, taken))
    return answers


def added(blocks: Iterable[Block], arm: Arm) -> list[float]:
    """Return what an arm adds to the median wait of as many replicas with cores of their own, round by round."""
    middles = {(each.arm, each.seed): median(each.wait_ms) for each in blocks}
    own = Arm(0, arm.replicas)
    return [ms - middles[own, seed] for (each, seed), ms in middles.items() if each == arm and (own, seed) in middles]


def report(blocks: Sequence[Block]) -> list[str]:
    """Return the table."""
    rows = []
    for arm in dict.fromkeys(each.arm for each in sorted(blocks, key=lambda each: (each.arm[1], each.arm[0]))):
        own = [each for each in blocks if each.arm == arm]
        more = added(blocks, arm) if arm.cores else []
        costs = [each.core_us for each in own if each.core_us is not None]
        rows.append([
            arm.name, spread([median(each.wait_ms) for each in own]).shown(),
            f"{at_rank([ms for each in own for ms in each.wait_ms], 0.99):.1f}",
            spread(more).shown(bold=True) if more else "", spread([each.calls_s for each in own]).shown(".0f"),
            spread(costs).shown(".0f") if costs else "",
        ])  # fmt: skip
    head = (
        f"cores and replicas, {RATE:.0f} calls/s", "wait for a grant: median, ms", "p99, ms", "added, ms",
        "calls/s without a pace", "CPU of the cores per call, µs",
    )  # fmt: skip
    return table(head, rows)
