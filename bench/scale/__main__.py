"""How the core fares with very many calls waiting: on one core, without an engine.

    make bench-scale                      all of it, a few minutes; run it alone
    make bench-scale BENCH='--quick'      130,000 calls under two policies, and the growth up to 100,000
    python -m bench.scale --help

A backend runs 64 calls and 130,000 wait; again and again one call ends and a new one enters: through one scheduler
alone (``scheduler``), or the whole way (``steps``). Each row is a process of its own, pinned to one core. The garbage
collector's time is in every figure; only what Python and the packages have loaded is taken out of its sight first.
Where calls are *frozen*, ``gc.freeze`` runs each time 2,000 more wait, as in an application that is nothing else.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import linear_regression

import psutil

from bench.lib import flags, plot
from bench.lib.command import DOCS, ROOT, finish, parser, usual
from bench.lib.figures import table
from bench.scale.ways import IN_FLIGHT, WAYS, Load

GOAL_RATE, GOAL_P99_MS, GOAL_PAUSE_MS, GOAL_BYTES = 30_000, 1.0, 50.0, 2048
CORES = sorted(os.sched_getaffinity(0))
OUTSTANDING = 130_000
NAMES = ("fcfs", "workflow_fcfs", "priority", "sjf", "las", "edf", "shortest_remaining", "fair")
FREEZE_EACH = 2_000
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
CLOCK = time.thread_time
"""CPU seconds: on a core of its own those of the wall; what others take of a shared machine is not in them."""


@dataclass(frozen=True)
class Row:
    """One process: a policy with so many calls waiting. Times include the garbage collector's."""

    way: str
    policy: str
    outstanding: int
    frozen: bool
    """The collector looks at all calls."""
    rate: float
    """Calls that entered and as many that went, per second of their time."""
    median_us: float
    """Of a single decision: an entering or a leaving."""
    p99_us: float
    pause_ms: float
    """The longest decision, while filling and afterwards."""
    bytes_each: float
    """Resident memory gained over calls gained; an edge's own means of waiting come on top."""


def measure(way: str, policy: str, outstanding: int, operations: int, frozen: int = 0) -> Row:
    """Fill a queue with so many calls, then let *operations* end and as many come; *frozen*: as they come."""
    process = psutil.Process()
    subject = WAYS[way](policy, Load())
    subject.enter()()  # what the first call loads is not the waiting ones'
    gc.collect()
    gc.freeze()  # what is loaded is not the waiting calls', as the pauses would be if it counted
    before = process.memory_info().rss
    filling, steady = [], []
    for number in range(outstanding + IN_FLIGHT - 1):
        filling.append(timed(subject.enter()))
        if frozen and number % FREEZE_EACH == 0:
            gc.freeze()
    gained = process.memory_info().rss - before - sys.getsizeof(filling) - 32 * len(filling)
    assert subject.in_flight == IN_FLIGHT
    for number in range(operations):
        steady.append(timed(subject.leave))
        steady.append(timed(subject.enter()))
        if frozen and number % FREEZE_EACH == 0:
            gc.freeze()
    subject.close()
    ordered = sorted(steady)
    return Row(
        way, policy, outstanding, bool(frozen), operations / sum(steady), ordered[len(ordered) // 2] * 1e6,
        ordered[int(len(ordered) * 0.99)] * 1e6, max(ordered[-1], *filling) * 1e3, gained / outstanding,
    )  # fmt: skip


def timed(operation: Callable[[], None]) -> float:
    began = CLOCK()
    operation()
    return CLOCK() - began


def apart(way: str, policy: str, outstanding: int, operations: int, frozen: int = 0) -> Row:
    """Measure in a process of its own: memory is never given back whole, and what is frozen stays so."""
    one = [way, policy, *map(str, (outstanding, operations, frozen))]
    command = [sys.executable, "-m", "bench.scale", "--one", *one]
    row = Row(**json.loads(subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout))
    print(row, file=sys.stderr, flush=True)
    return row


def missed(row: Row) -> list[str]:
    """Return which goals a row misses."""
    found = {
        "rate": row.rate < GOAL_RATE,
        "p99": row.p99_us > GOAL_P99_MS * 1e3,
        "pause": row.pause_ms > GOAL_PAUSE_MS,
        "memory": row.bytes_each > GOAL_BYTES,
    }
    return [name for name, misses in found.items() if misses]


def report(rows: Sequence[Row]) -> list[str]:
    times = ("calls/s", "median, µs", "p99, µs", "pause, ms")
    head = ("through", "policy", "collector", *times, "bytes a call", "missed")
    return table(head, [
        [
            row.way, row.policy, "frozen" if row.frozen else "as it is", f"{row.rate:,.0f}", f"{row.median_us:.0f}",
            f"{row.p99_us:.0f}", f"{row.pause_ms:.0f}", f"{row.bytes_each:,.0f}", ", ".join(missed(row)) or "none",
        ]
        for row in rows
    ])  # fmt: skip


def slope(rows: Sequence[Row]) -> tuple[float, float]:
    """Return a and b of the least-squares line a + b log2(n) through the microseconds of a call."""
    found = linear_regression([math.log2(row.outstanding) for row in rows], [1e6 / row.rate for row in rows])
    return found.intercept, found.slope


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the time of a call over how many wait, with the line that n log n in all would be."""
    figure, axis = plot.pyplot("orla_lg", 9, text=True).subplots(figsize=(6, 3.4), layout="constrained")
    sizes = [row.outstanding for row in rows]
    axis.plot(sizes, [1e6 / row.rate for row in rows], "o-", label="in and out, with the collector")
    axis.plot(sizes, [row.median_us for row in rows], ".-", label="one decision, median")
    a, b = slope(rows)
    axis.plot(sizes, [a + b * math.log2(size) for size in sizes], "k:", label=f"{a:.0f} + {b:.1f} log2 n")
    axis.set(xscale="log", xlabel="calls waiting", ylabel="microseconds", ylim=(0, None))
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    plot.save(figure, path, tight=None)


def options() -> argparse.Namespace:
    options = parser("scale", __doc__)
    add = options.add_argument
    add("--quick", action="store_true", help="two policies, and the growth up to 100,000")
    add("--outstanding", type=flags.count, default=OUTSTANDING, help=f"calls that wait ({OUTSTANDING:,})")
    add("--operations", type=flags.count, default=60_000, help="calls that end, and that come (60,000)")
    add("--core", type=int, default=min(CORES), choices=CORES, help="which core to use (the first)")
    usual(options, writes="docs/scale.md and its figure")
    add("--one", nargs=5, help=argparse.SUPPRESS)
    return options.parse_args()


def main() -> None:
    args = options()
    if args.one is not None:
        way, policy, *numbers = args.one
        print(json.dumps(asdict(measure(way, policy, *map(int, numbers)))))
        return
    os.sched_setaffinity(0, {args.core})
    many, operations = args.outstanding, args.operations
    rows = [apart("scheduler", policy, many, operations) for policy in (("fcfs", "fair") if args.quick else NAMES)]
    for way in WAYS:
        rows += [
            apart(way, "workflow_fcfs", many, operations, frozen) for frozen in (0, 1) if way != "scheduler" or frozen
        ]
    sizes = [size for size in SIZES if size <= 100_000 or not args.quick]
    growth = [apart("scheduler", "workflow_fcfs", size, operations) for size in sizes]
    a, b = slope(growth)
    lines = [f"{many:,} calls waiting:", "", *report(rows), "", f"A call in and out: {a:.1f} + {b:.2f} log2(n) µs."]
    if args.write:
        draw(growth, DOCS / "scale.svg")
    finish(lines, "scale", DOCS / "scale.md" if args.write else None)


if __name__ == "__main__":
    main()
