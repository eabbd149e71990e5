"""How the core fares with very many calls waiting: on one core, without an engine.

    make bench-scale                      all of it, a few minutes; run it alone
    make bench-scale BENCH='--quick'      130,000 calls under two policies, and the growth up to 100,000
    python bench/scale.py --help

A backend runs 64 calls and 130,000 wait. Again and again one call ends, which lets another go, and a new one enters.
Calls belong to runs with eight calls each, in 48 stages. They go through the desk alone (``desk``: queue, policies,
ledger and lock), or the whole way from ``Serving.call`` to ``WaitForTurn``, the request and the record (``steps``).
Each row is a process of its own, pinned to one core. The garbage collector runs as it does in any program, and its
time is in every figure; only what Python and the packages have loaded is taken out of its sight first. Where calls
are *frozen*, the bench calls ``gc.freeze`` each time 2,000 more wait, as an application might that is nothing else.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import flags
import psutil
from marks import DOCS, put

from orla_lg.core.background import Background
from orla_lg.core.call import Ask, Call, Hints, RunShare, Usage
from orla_lg.core.engine.backend import Backend
from orla_lg.core.identity import Identity
from orla_lg.core.lifecycle import Send, arrive, serve
from orla_lg.core.memory.policies import memory_policy
from orla_lg.core.policies import policies
from orla_lg.core.queues import Queued
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.core.serving import Serving
from orla_lg.core.steps import Steps, Wait, WaitForTurn
from orla_lg.core.workflow import Outcome
from orla_lg.testing.virtual.serving import StillAdapter

PAGE, FIGURE = DOCS / "scale.md", DOCS / "scale.svg"
GOAL_RATE, GOAL_P99_MS, GOAL_PAUSE_MS, GOAL_BYTES = 30_000, 1.0, 50.0, 2048
CORES = sorted(os.sched_getaffinity(0))
OUTSTANDING, STAGES, CALLS_OF_RUN, IN_FLIGHT, TENANTS = 130_000, 48, 8, 64, 20
NAMES = (
    "fcfs", "workflow_fcfs", "priority", "sjf", "las", "edf", "shortest_remaining", "critical_path", "fair",
)  # fmt: skip
FREEZE_EACH = 2_000
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
CLOCK = time.thread_time
"""CPU seconds: on a core of its own those of the wall; what others take of a shared machine is not in them."""
MESSAGES = [{"role": "user", "content": "What is the capital of France? " * 8}]


class Load:
    """Calls as a busy server has them: what policies look at differs from call to call."""

    def __init__(self, seed: int = 0) -> None:
        self._dice = random.Random(seed)
        self._numbers = count()
        self._stages = [f"stage {n}" for n in range(STAGES)]
        self._asks = [Ask("main", MESSAGES, max_tokens=bound) for bound in range(16, 1040, 16)]
        # Hints are what nodes and runs say, so calls share them.
        self._hints = [
            Hints(
                priority=number % 5, deadline_s=1e4 * (1 + self._dice.random()), tenant=f"tenant {number % TENANTS}"
            )
            for number in range(1000)
        ]

    def next(self) -> tuple[int, str, Ask, Hints]:
        """Return the number of the next call's run, its stage, what it asks, its hints."""
        dice = self._dice
        stage = self._stages[int(dice.random() ** 2 * STAGES)]
        return next(self._numbers) // CALLS_OF_RUN, stage, dice.choice(self._asks), dice.choice(self._hints)


class Waiter:
    """The least an edge can have: told that it is its turn, it joins those that go."""

    __slots__ = ("_joins", "_who")

    def __init__(self, who: Any, joins: deque[Any]) -> None:
        self._who, self._joins = who, joins

    def __call__(self) -> None:
        self._joins.append(self._who)


class AtDesk:
    """Calls through one desk alone."""

    def __init__(self, policy: str, load: Load) -> None:
        backend = Backend("main", "http://127.0.0.1:1/v1", max_concurrency=IN_FLIGHT, capacity=10_000_000)
        chosen = policies("main", policy, policy)
        self.scheduler = BackendScheduler(backend, StillAdapter(), Background(), time.monotonic, chosen)
        self._load = load
        self._dice = random.Random(1)
        self._run, self._standing = -1, RunShare()
        self._in_flight: deque[Queued] = deque()

    def enter(self) -> Callable[[], None]:
        """Make a call, and return what is to be timed: its way into the queue."""
        number, stage, ask, hints = self._load.next()
        if number != self._run:
            self._run, self._standing = number, RunShare(time.monotonic())
            self._standing.remaining_s = self._dice.expovariate(0.1)
            self._standing.serve(self._dice.expovariate(1e-4), time.monotonic())
        name = f"run {number}"
        call = Call(
            f"call {self._dice.random()}", Identity(name, name, stage), ask, hints, hints, time.monotonic(),
            self._standing,
        )  # fmt: skip
        call.ahead_s = self._dice.random() * 100
        return partial(self._enter, call)

    def _enter(self, call: Call) -> None:
        queued = self.scheduler.enter(call, order=None, running=True, holds_grant=False)
        if queued.turn is None:
            self._in_flight.append(queued)
        else:
            queued.turn.on_settled(Waiter(queued, self._in_flight))

    def leave(self) -> None:
        """Let the oldest call in flight end; the next one goes."""
        queued = self._in_flight.popleft()
        queued.call.standing.serve(500, time.monotonic())
        self.scheduler.leave(queued, tokens=100, usage=Usage(100, 0, 10), followed=lambda: True)

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def close(self) -> None:
        self.scheduler.check_integrity()


class ThroughSteps:
    """Calls the whole way: identified, mapped, queued, sent to nobody, accounted for."""

    max_attempts = 1

    def __init__(self, policy: str, load: Load) -> None:
        backend = Backend("main", "http://127.0.0.1:1/v1", max_concurrency=IN_FLIGHT, capacity=10_000_000)
        self.serving = Serving(
            {backend: StillAdapter()}, mapper=None, stage_policy=policy, request_policy=policy,
            memory=memory_policy("default"), keep_records=1000,
        )  # fmt: skip
        self._load = load
        self._run = -1
        self._open: dict[str, int] = {}
        self._ready: deque[Steps] = deque()
        self._sending: deque[tuple[Steps, Send]] = deque()

    def enter(self) -> Callable[[], None]:
        number, stage, ask, hints = self._load.next()
        run = f"run {number}"
        if number != self._run:
            self._run, self._open[run] = number, CALLS_OF_RUN
            state = self.serving.progress.run_started(run, thread=None, graph="graph")
            self.serving.progress.node_entered(state, stage)
        return partial(self._enter, Identity(run, run, stage), ask, hints)

    def _enter(self, identity: Identity, ask: Ask, hints: Hints) -> None:
        inflight = arrive(self.serving.services, identity, ask, call_id=self.serving.new_id(), said=hints)
        steps = serve(inflight, self)
        effect = next(steps)
        while isinstance(effect, Wait):
            effect.run()
            effect = steps.send(None)
        if isinstance(effect, WaitForTurn):
            effect.turn.on_settled(Waiter(steps, self._ready))
        else:
            assert isinstance(effect, Send)
            self._sending.append((steps, effect))

    def leave(self) -> None:
        steps, send = self._sending.popleft()
        send.inflight.first_token()
        send.inflight.finish()
        _end(steps)
        while self._ready:
            ready = self._ready.popleft()
            self._sending.append((ready, ready.send(None)))
        self._ended(send.inflight.call)

    def _ended(self, call: Call) -> None:
        run = call.identity.run
        assert run is not None
        self._open[run] -= 1
        if not self._open[run]:
            del self._open[run]
            self.serving.progress.run_ended(run, Outcome.DONE)

    def send(self, inflight: Any) -> Any:
        raise NotImplementedError

    async def asend(self, inflight: Any) -> Any:
        raise NotImplementedError

    @property
    def in_flight(self) -> int:
        return len(self._sending)

    def close(self) -> None:
        self.serving.check_integrity()
        for _, send in self._sending:
            send.inflight.finish()
        self.serving.close()


def _end(steps: Steps) -> None:
    try:
        steps.send(None)
    except StopIteration:
        return
    raise AssertionError("a call goes on after its request")


WAYS: dict[str, Callable[[str, Load], AtDesk | ThroughSteps]] = {"desk": AtDesk, "steps": ThroughSteps}


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
    gc_ms: float
    """The longest collection."""
    bytes_each: float
    """Resident memory gained over calls gained; an edge's own means of waiting come on top."""
    fill_us: float
    """Entering while the queue fills, mean."""


@contextmanager
def collections() -> Iterator[list[float]]:
    """Collect the seconds that each garbage collection takes."""
    took: list[float] = []
    began = 0.0

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal began
        if phase == "start":
            began = CLOCK()
        else:
            took.append(CLOCK() - began)

    gc.callbacks.append(note)
    try:
        yield took
    finally:
        gc.callbacks.remove(note)


def measure(way: str, policy: str, outstanding: int, operations: int, frozen: int = 0) -> Row:
    """Fill a queue, then let calls come and go.

    Args:
        way: ``desk`` or ``steps``.
        policy: For stages and requests.
        outstanding: Calls that wait.
        operations: Calls that end, and calls that come for them.
        frozen: Whether those that wait are frozen as they come.
    """
    process = psutil.Process()
    subject = WAYS[way](policy, Load())
    subject.enter()()  # what the first call loads is not the waiting ones'
    gc.collect()
    gc.freeze()  # what is loaded is not the waiting calls', as the pauses would be if it counted
    before = process.memory_info().rss
    with collections() as gc_s:
        filling = []
        for number in range(outstanding + IN_FLIGHT - 1):
            filling.append(timed(subject.enter()))
            if frozen and number % FREEZE_EACH == 0:
                gc.freeze()
        gained = process.memory_info().rss - before - sys.getsizeof(filling) - 32 * len(filling)
        assert subject.in_flight == IN_FLIGHT
        steady = []
        for number in range(operations):
            steady.append(timed(subject.leave))
            steady.append(timed(subject.enter()))
            if frozen and number % FREEZE_EACH == 0:
                gc.freeze()
    subject.close()
    ordered = sorted(steady)
    return Row(
        way,
        policy,
        outstanding,
        bool(frozen),
        operations / sum(steady),
        ordered[len(ordered) // 2] * 1e6,
        ordered[int(len(ordered) * 0.99)] * 1e6,
        max(ordered[-1], *filling) * 1e3,
        max(gc_s, default=0.0) * 1e3,
        gained / outstanding,
        sum(filling) / len(filling) * 1e6,
    )


def timed(operation: Callable[[], None]) -> float:
    began = CLOCK()
    operation()
    return CLOCK() - began


def apart(way: str, policy: str, outstanding: int, operations: int, frozen: int = 0) -> Row:
    """Measure in a process of its own: memory is never given back whole, and what is frozen stays so."""
    command = [sys.executable, __file__, "--one", way, policy, *map(str, (outstanding, operations, frozen))]
    row = Row(**json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
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


def table(rows: Sequence[Row]) -> list[str]:
    lines = ["| through | policy | collector | calls/s | median, µs | p99, µs | pause, ms | bytes a call | missed |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        lines.append(
            f"| {row.way} | {row.policy} | {'frozen' if row.frozen else 'as it is'} | {row.rate:,.0f} | "
            f"{row.median_us:.0f} | {row.p99_us:.0f} | {row.pause_ms:.0f} | {row.bytes_each:,.0f} | "
            f"{', '.join(missed(row)) or 'none'} |"
        )
    return lines


def slope(rows: Sequence[Row]) -> tuple[float, float]:
    """Return a and b of the least-squares line a + b log2(n) through the microseconds of a call."""
    xs, ys = [math.log2(row.outstanding) for row in rows], [1e6 / row.rate for row in rows]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    b = sum((one - x) * (other - y) for one, other in zip(xs, ys, strict=True)) / sum((one - x) ** 2 for one in xs)
    return y - b * x, b


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the time of a call over how many wait, with the line that n log n in all would be."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "orla_lg", "svg.fonttype": "none", "font.size": 9})
    plot, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    sizes = [row.outstanding for row in rows]
    axis.plot(sizes, [1e6 / row.rate for row in rows], "o-", label="in and out, with the collector")
    axis.plot(sizes, [row.median_us for row in rows], ".-", label="one decision, median")
    a, b = slope(rows)
    axis.plot(sizes, [a + b * math.log2(size) for size in sizes], "k:", label=f"{a:.0f} + {b:.1f} log2 n")
    axis.set(xscale="log", xlabel="calls waiting", ylabel="microseconds", ylim=(0, None))
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    plot.savefig(path, metadata={"Date": None})


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="two policies, and the growth up to 100,000")
    add("--outstanding", type=flags.count, default=OUTSTANDING, help=f"calls that wait ({OUTSTANDING:,})")
    add("--operations", type=flags.count, default=60_000, help="calls that end, and that come (60,000)")
    add("--core", type=int, default=min(CORES), choices=CORES, help="which core to use (the first)")
    add("--write", action="store_true", help="write docs/scale.md and its figure")
    add("--one", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = options()
    if args.one is not None:
        way, policy, *numbers = args.one
        print(json.dumps(asdict(measure(way, policy, *map(int, numbers)))))
        return
    os.sched_setaffinity(0, {args.core})
    many, operations = args.outstanding, args.operations
    rows = [apart("desk", policy, many, operations) for policy in (("fcfs", "fair") if args.quick else NAMES)]
    for way in WAYS:
        rows += [
            apart(way, "workflow_fcfs", many, operations, frozen) for frozen in (0, 1) if way != "desk" or frozen
        ]
    sizes = [size for size in SIZES if size <= 100_000 or not args.quick]
    growth = [apart("desk", "workflow_fcfs", size, operations) for size in sizes]
    a, b = slope(growth)
    lines = [f"{many:,} calls waiting:", "", *table(rows), "", f"A call in and out: {a:.1f} + {b:.2f} log2(n) µs."]
    print("\n".join(lines))
    if args.write:
        put(PAGE, "scale.py", lines)
        draw(growth, FIGURE)


if __name__ == "__main__":
    main()
