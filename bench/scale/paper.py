"""To 10,000 workflows a second, in simulation and on paper: what a core, the store and the network have to do.

    make bench-scale-paper                       all of it, ten minutes; run it alone
    make bench-scale-paper BENCH='--quick'       fewer pools
    python -m bench.scale.paper --help

Up to 64 pools run in virtual time, in each a real core with its links before simulated engines (``pools``).
Counted are the CPU of a core for each call, its messages and bytes, and what all cores ask of the store. What the
simulation leaves out, a process's sockets, is measured on one real server (``bench.scale.linked``) and given here.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from bench.lib import flags, plot
from bench.lib.command import DOCS, ROOT, finish, parser, usual
from bench.lib.figures import at_rank, table
from bench.scale.arithmetic import Demand, PerCall, StoreLoad, ceilings, core_load, cores_needed, first_limit
from bench.scale.pools import CoreMeter, Shape, World

GOAL_US = 150.0
"""Of a core's CPU for a call with ten messages."""

SOCKET_US, REDIS_OPS_S = 60.0, 50_000.0
"""CPU of a core's process for a call beyond what is simulated, and operations of one Redis."""

FUNCTION_US = 0.2
"""CPU of a function on a quiet core: ``bench.scale`` has 107 µs for the 526 functions of a call through all steps."""

WARM_S, WINDOWS = 1.0, 12
RATE = 10_000 / 64
POOLS, REPLICAS, WAITING, MESSAGES = (1, 4, 16, 64), (4, 16, 64, 256), (0, 1_000, 10_000), (4, 10, 60, 200)


@dataclass(frozen=True)
class Row:
    """One load; figures are of the whole, or of a core where that is said."""

    what: str
    shape: Mapping[str, Any]
    seconds: float
    """Virtual ones."""
    calls: int
    workflows: int
    us: Mapping[str, float]
    """CPU of cores for each call, by what for."""
    functions: float
    """That a core calls for each call, Python's and C's: the same on a busy machine."""
    messages: float
    """Of a call, both ways; those that time brings are in it."""
    bytes: float
    asked: Mapping[str, float]
    """Of the store, by what, a second."""
    mib: float
    """Resident, of a core, with its engines and replicas."""

    @property
    def core_us(self) -> float:
        """As it was measured, beside whatever else the machine did."""
        return sum(self.us.values())

    @property
    def quiet_us(self) -> float:
        """On a quiet core."""
        return self.functions * FUNCTION_US

    @property
    def ops_s(self) -> float:
        return sum(self.asked.values())


def measure(what: str, shape: Shape, seconds: float) -> Row:
    """Let a load run for so many virtual seconds, once it is warm."""
    process = psutil.Process()
    gc.collect()
    before, meter = process.memory_info().rss, CoreMeter()
    with meter.on():
        world = World(shape)
        world.pass_time(WARM_S)
        gc.collect()
        gc.freeze()
        world.forget()
        windows = [window(world, meter, seconds / WINDOWS) for _ in range(WINDOWS)]
        calls, workflows = world.finished, world.ended
        messages = world.messages_in.total() + world.messages_out.total()
        sent, asked = world.bytes_in + world.bytes_out, dict(world.store.asked)
        meter.counts = True
        window(world, meter, min(0.5, seconds / 4))
        functions = meter.functions / max(1, world.finished - calls)
    us = min(windows, key=lambda each: abs(sum(each.values()) - quiet(windows)))
    assert not world.refused, world.refused
    row = Row(
        what, asdict(shape), seconds, calls, workflows, us, functions, messages / calls, sent / calls,
        {name: n / seconds for name, n in asked.items()},
        (process.memory_info().rss - before) / 2**20 / shape.pools,
    )  # fmt: skip
    world.close()
    return row


def window(world: World, meter: CoreMeter, seconds: float) -> dict[str, float]:
    """Return the microseconds of cores for a call in a part of the time."""
    before = world.finished
    meter.spent_s.clear()
    world.pass_time(seconds)
    return {name: spent / max(1, world.finished - before) * 1e6 for name, spent in meter.spent_s.items()}


def quiet(windows: Sequence[Mapping[str, float]]) -> float:
    """Return what a call takes in the quietest quarter of the time: beside other programs caches are cold."""
    return at_rank([sum(each.values()) for each in windows], 0.25)


def apart(what: str, shape: Shape, seconds: float) -> Row:
    """Measure in a process of its own."""
    one = [what, json.dumps(asdict(shape)), str(seconds)]
    command = [sys.executable, "-m", "bench.scale.paper", "--one", *one]
    began_s = time.monotonic()
    row = Row(**json.loads(subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout))
    print(f"{what}: {row.core_us:.0f} us, {time.monotonic() - began_s:.0f} s", file=sys.stderr, flush=True)
    return row


def loads(*, quick: bool) -> list[tuple[str, Shape, float]]:
    """Return what is measured: one figure differs in each group."""
    usual_one, seconds = Shape(workflows_per_s=RATE), 2.0
    found = [
        (f"{n} pools", replace(usual_one, pools=n), seconds if n < 16 else 0.5) for n in POOLS if n <= 4 or not quick
    ]
    found += [(f"{n} replicas", replace(usual_one, replicas=n), seconds) for n in REPLICAS]
    found += [(f"{n} waiting", replace(usual_one, waiting=n), seconds) for n in WAITING]
    found += [(f"{n} messages", replace(usual_one, messages=n), seconds) for n in MESSAGES]
    found += [
        ("no keys", replace(usual_one, keys=0, pools=4), seconds),
        ("limits of runs", replace(usual_one, keys=0, pools=4, run_limits=True), seconds),
    ]
    return found


def store_load(rows: Sequence[Row], capacity_s: float) -> StoreLoad:
    """Return what the store is asked for what, as differences between loads on four pools."""
    none, runs, keys = (row(rows, what) for what in ("no keys", "limits of runs", "4 pools"))
    cores, names = none.shape["pools"], keys.shape["keys"]
    begun = runs.workflows / runs.seconds
    return StoreLoad(
        none.ops_s / cores, max(0.0, runs.ops_s - none.ops_s) / begun,
        max(0.0, keys.ops_s - none.ops_s) / cores / names, capacity_s,
    )  # fmt: skip


def row(rows: Sequence[Row], what: str) -> Row:
    return next(each for each in rows if each.what == what)


def report(rows: Sequence[Row], socket_us: float, redis_s: float) -> list[str]:
    """Return the tables: what was measured, and what follows."""
    head = ("load", "calls", "functions a call", "CPU of a core, µs a call", "of that calls", "ticks", "slices",
            "messages", "bytes", "store, operations/s", "MiB a pool")  # fmt: skip
    lines = table(head, [
        [
            each.what, f"{each.calls:,}", f"{each.functions:,.0f}", f"{each.core_us:.0f}",
            *(f"{each.us.get(name, 0.0):.1f}" for name in ("calls", "ticks", "slices")), f"{each.messages:.1f}",
            f"{each.bytes:,.0f}", f"{each.ops_s:,.0f}", f"{each.mib:.0f}",
        ]
        for each in rows
    ])  # fmt: skip
    return [*lines, "", *paper(rows, socket_us, redis_s)]


def paper(rows: Sequence[Row], socket_us: float, redis_s: float) -> list[str]:
    """Return the arithmetic for 10,000 workflows a second."""
    demand, usual_one = Demand(), row(rows, "10 messages")
    most = max((each for each in rows if each.what.endswith(" pools")), key=lambda each: each.shape["pools"])
    call = PerCall(most.quiet_us, socket_us, most.messages, most.bytes)
    store, accounts = store_load(rows, redis_s), most.shape["keys"]
    bare, of_runs = (replace(store, per_run=each) for each in (0.0, store.per_run))
    lines = table(("10,000 workflows/s of 4 calls, 64 pools", "", "from"), [
        ["calls a second, of all pools and of one", f"{demand.calls_per_s:,.0f}, {demand.calls_per_s / 64:,.0f}", ""],
        [
            "a core's CPU for a call", f"{call.us:.0f} µs",
            f"{most.functions:,.0f} functions ({most.what}) of {FUNCTION_US} µs, {socket_us:.0f} µs of sockets",
        ],
        ["each pool's core is busy", f"{core_load(demand, call.us):.0%}", "calls/s × CPU"],
        ["cores of CPU at half load", f"{cores_needed(demand, call.us)}", "calls/s × CPU / 0.5"],
        [
            "the store", f"{bare.ops_per_s(demand, accounts):,.0f} operations/s",
            f"{store.per_core_s:.1f} of each core, {store.per_account_s:.2f} of each limit there; {accounts} limits",
        ],
        [
            "the store, if runs have limits of their own", f"{of_runs.ops_per_s(demand, accounts):,.0f} operations/s",
            f"{store.per_run:.1f} of each run besides",
        ],
        ["the network at each core", f"{demand.calls_per_s / 64 * call.bytes * 8e-6:,.1f} Mbit/s", "bytes × calls/s"],
    ])  # fmt: skip
    for what, each in (("", bare), (" where each run has limits of its own", of_runs)):
        found = ceilings(demand, call, each, accounts=accounts)
        name, at = first_limit(found)
        rest = ", ".join(f"{other} {most:,.0f}" for other, most in found.items() if other != name and most < 1e9)
        lines += ["", f"The first limit{what}: {name}, at {at:,.0f} workflows/s and half load ({rest})."]
    us = usual_one.quiet_us + socket_us
    lines += ["", f"A call with ten messages takes {us:.0f} µs of its core; the goal is {GOAL_US:.0f}."]
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw what a core does for a call over what grows."""
    groups = {"pools": POOLS, "replicas": REPLICAS, "waiting": WAITING, "messages": MESSAGES}
    figure, panes = plot.pyplot("orla_lg", 8, text=True).subplots(1, 4, figsize=(9.6, 2.5), layout="constrained")
    for axes, (name, sizes) in zip(panes, groups.items(), strict=True):
        own = [each for size in sizes for each in rows if each.what == f"{size} {name}"]
        places = [max(1, int(each.what.split()[0])) for each in own]
        axes.plot(places, [each.functions for each in own], "o-")
        ylabel = "functions that a core calls, for a call" if name == "pools" else ""
        axes.set(xscale="log", xlabel=name, ylim=(0, None), ylabel=ylabel)
        axes.grid(alpha=0.3, which="both")
    plot.open_axes(*panes)
    plot.save(figure, path, tight=None)


def options() -> argparse.Namespace:
    found = parser("scale.paper", __doc__)
    add = found.add_argument
    add("--quick", action="store_true", help="four pools at most")
    add("--socket-us", type=flags.count, default=int(SOCKET_US), help=f"of sockets, a call ({SOCKET_US:.0f})")
    add(
        "--redis-ops", type=flags.count, default=int(REDIS_OPS_S), help=f"of one store, a second ({REDIS_OPS_S:,.0f})"
    )
    usual(found, writes="docs/scale-out.md and its figure")
    add("--one", nargs=3, help=argparse.SUPPRESS)
    return found.parse_args()


def main() -> None:
    args = options()
    if args.one is not None:
        what, shape, seconds = args.one
        print(json.dumps(asdict(measure(what, Shape(**json.loads(shape)), float(seconds)))))
        return
    rows = [apart(*each) for each in loads(quick=args.quick)]
    if args.write:
        draw(rows, DOCS / "scale-out.svg")
    finish(
        report(rows, args.socket_us, args.redis_ops), "scale: paper", DOCS / "scale-out.md" if args.write else None
    )


if __name__ == "__main__":
    main()
