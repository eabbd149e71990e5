"""What a call costs more through orla_lg than through plain ``ChatOpenAI``, on the same stub server.

    make bench-overhead                      all of it, about eight minutes; run it alone
    make bench-overhead BENCH='--quick'      two minutes, without the memory run
    make check-overhead                      CPU time alone, against its goal; fails beyond it
    python -m bench.overhead --help

The stub is a process of its own with TCP_NODELAY. The arms run in alternating blocks of one run, and each
figure is the difference between neighbouring blocks, so a machine that slows down slows both. Calls are
made inside a graph's node; the bare arm is the same graph, not wrapped. At 80 calls/s they arrive as a
Poisson process, whether or not earlier ones have ended (open loop).

With ``--clients`` the same ChatOpenAI calls by an SDK that is met at its HTTP client only, as Groq's or Anthropic's
are, with bytes that pass as they are: what that adds is set against what the faster way of OpenAI's own SDK adds.

Beside wall time stands the CPU time of the caller's process (all its threads, user and system), which a busy machine
disturbs less. The ratio to the bare arm is what ``--check`` judges:
the median over blocks, each against its neighbour.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import openai
import psutil
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

from bench.lib import plot
from bench.lib.command import parser
from bench.lib.engines import stub
from bench.lib.figures import at_rank, ratios, spread, table
from bench.lib.flags import count
from bench.lib.marks import ROOT
from orla_lg import Backend, ChatOrla, Orla
from orla_lg.clients import patching
from orla_lg.clients.table import Client

GOAL_MEDIAN_MS, GOAL_P99_MS = 0.3, 2.0
GOAL_CPU_RATIO = {"invoke": 1.10, "ainvoke": 1.10, "astream": 1.10}
"""Of a wrapped call to a bare one, by form, one at a time; about 0.4 ms where a bare call takes 4."""
LEAST_BLOCKS = 9
"""Fewer do not make a median that can be judged."""
ANSWER = " ".join(f"word{n}" for n in range(16))
PROMPT = [("system", "You answer briefly. " * 20), ("user", "What is the capital of France?")]
FORMS = ("invoke", "ainvoke", "astream")
ARMS = ("bare", "wrapped", "ChatOrla")


class Block(TypedDict):
    form: str
    calls: int
    rate: float | None
    seed: int
    """Blocks with the same seed have the same arrivals, whatever their arm."""
    taken_ms: list[float]


@dataclass
class Arm:
    """A graph whose one node makes a block of calls and times each."""

    name: str
    model: Any
    wrap: Callable[[Any], Any]
    graph: Any = None
    times: dict[tuple[str, str], list[list[float]]] = field(default_factory=dict)
    cpu_ms: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """Per call, by block."""

    def __post_init__(self) -> None:
        graph = StateGraph(Block)
        graph.add_node("block", self.sync_block)
        graph.add_edge(START, "block")
        agraph = StateGraph(Block)
        agraph.add_node("block", self.async_block)
        agraph.add_edge(START, "block")
        self.graph, self.agraph = self.wrap(graph.compile()), self.wrap(agraph.compile())

    def sync_block(self, state: Block) -> dict[str, Any]:
        taken = []
        for _ in range(state["calls"]):
            start = time.perf_counter()
            self.model.invoke(PROMPT)
            taken.append((time.perf_counter() - start) * 1e3)
        return {"taken_ms": taken}

    async def async_block(self, state: Block) -> dict[str, Any]:
        call = self.ainvoke if state["form"] == "ainvoke" else self.astream
        if state["rate"] is None:
            return {"taken_ms": [await timed(call) for _ in range(state["calls"])]}
        return {"taken_ms": await open_loop(call, state["calls"], state["rate"], random.Random(state["seed"]))}

    async def ainvoke(self) -> None:
        await self.model.ainvoke(PROMPT)

    async def astream(self) -> None:
        async for _ in self.model.astream(PROMPT):
            pass

    async def block(self, form: str, load: str, calls: int, rate: float | None, number: int) -> None:
        """Make a block of calls, and keep what they took."""
        gc.collect()
        before_s = time.process_time()
        taken = await self.run(form, calls, rate, number)
        self.cpu_ms.setdefault((form, load), []).append((time.process_time() - before_s) * 1e3 / calls)
        self.times.setdefault((form, load), []).append(taken)

    async def run(self, form: str, calls: int, rate: float | None, seed: int = 0) -> list[float]:
        given: Block = {"form": form, "calls": calls, "rate": rate, "seed": seed, "taken_ms": []}
        if form == "invoke":
            return (await asyncio.to_thread(self.graph.invoke, given))["taken_ms"]
        return (await self.agraph.ainvoke(given))["taken_ms"]


async def timed(call: Callable[[], Awaitable[None]]) -> float:
    start = time.perf_counter()
    await call()
    return (time.perf_counter() - start) * 1e3


async def open_loop(call: Callable[[], Awaitable[None]], calls: int, rate: float, dice: random.Random) -> list[float]:
    """Let calls arrive at *rate* per second, as they would from users who do not know of each other."""
    taken: list[float] = []

    async def arrive() -> None:
        taken.append(await timed(call))

    clock = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(calls):
            clock += dice.expovariate(rate)
            await asyncio.sleep(max(0.0, clock - time.perf_counter()))
            group.create_task(arrive())
    return taken


def loads(quick: bool, alone_only: bool = False) -> list[tuple[str, str, int, float | None]]:
    """Return form, name of the load, calls in a block, rate."""
    calls = 60 if quick else 150
    alone: list[tuple[str, str, int, float | None]] = [(form, "one at a time", calls, None) for form in FORMS]
    return alone if alone_only else alone + [(form, "80 calls/s", calls * 2, 80.0) for form in ("ainvoke", "astream")]


async def measure(arms: list[Arm], blocks: int, quick: bool, alone_only: bool = False) -> None:
    for form, load, calls, rate in loads(quick, alone_only):
        for arm in arms:  # warm: connections, code, caches
            await arm.run(form, 20, rate)
        for number in range(blocks):
            order = arms if number % 2 == 0 else arms[::-1]
            for arm in order:
                await arm.block(form, load, calls, rate, number)
            print(f"\r{form:8} {load:14} block {number + 1}/{blocks}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)


def pooled(blocks: list[list[float]]) -> list[float]:
    return list(itertools.chain.from_iterable(blocks))


@dataclass(frozen=True)
class Figure:
    """One row: what an arm adds to the bare arm, in milliseconds, block by block."""

    form: str
    load: str
    arm: str
    bare_ms: float
    added_ms: list[float]
    added_p99_ms: float
    bare_cpu_ms: float
    added_cpu_ms: list[float]
    cpu_ratios: list[float]
    """To the bare arm, block by block."""

    @property
    def cpu_ratio(self) -> float:
        return statistics.median(self.cpu_ratios)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.added_ms)


def figures(arms: list[Arm]) -> list[Figure]:
    bare, *others = arms
    rows = []
    for (form, load), base in bare.times.items():
        for arm in others:
            mine = arm.times[form, load]
            pairs = zip(mine, base, strict=True)
            added = [statistics.median(ours) - statistics.median(theirs) for ours, theirs in pairs]
            tails = at_rank(pooled(mine), 0.99) - at_rank(pooled(base), 0.99)
            cpu = list(zip(arm.cpu_ms[form, load], bare.cpu_ms[form, load], strict=True))
            rows.append(
                Figure(
                    form, load, arm.name, statistics.median(pooled(base)), added, tails,
                    statistics.median(theirs for _, theirs in cpu), [ours - theirs for ours, theirs in cpu],
                    ratios(arm.cpu_ms[form, load], bare.cpu_ms[form, load]),
                )
            )  # fmt: skip
    return rows


def report(rows: list[Figure]) -> str:
    head = ("form", "load", "through", "plain median, ms", "added median, ms (min … max of blocks)", "added p99, ms")
    return "\n".join(table(head, [
        [row.form, row.load, row.arm, f"{row.bare_ms:.2f}", spread(row.added_ms).shown(bold=True),
         f"{row.added_p99_ms:.2f}"]
        for row in rows
    ]))  # fmt: skip


def report_cpu(rows: list[Figure]) -> str:
    added, ratio = "added CPU, ms (min … max of blocks)", "ratio to plain (min … max)"
    head = ("form", "load", "through", "plain CPU, ms", added, ratio)
    return "\n".join(table(head, [
        [row.form, row.load, row.arm, f"{row.bare_cpu_ms:.2f}", spread(row.added_cpu_ms).shown(bold=True),
         spread(row.cpu_ratios).shown(bold=True)]
        for row in rows
    ]))  # fmt: skip


def beyond_goal(rows: list[Figure]) -> list[str]:
    """Return what the CPU time of a wrapped call is to be, and is not."""
    judged = [row for row in rows if row.arm == "wrapped" and row.load == "one at a time"]
    return [
        f"{row.form}: a wrapped call takes {row.cpu_ratio:.3f} times the CPU time of a bare one, the goal is "
        f"{GOAL_CPU_RATIO[row.form]:.2f} (median of {len(row.cpu_ratios)} blocks)"
        for row in judged
        if row.cpu_ratio > GOAL_CPU_RATIO[row.form]
    ]


def draw(rows: list[Figure], path: Path) -> None:
    """Draw the added medians with their spread."""
    figure, axes = plot.pyplot("overhead").subplots(figsize=(8, 0.42 * len(rows) + 1.2))
    added = {f"{row.arm} · {row.form} · {row.load}": spread(row.added_ms) for row in rows}
    colours = ["#3b7dd8" if row.arm == "wrapped" else "#e08a3c" for row in rows]
    plot.bars(axes, added, colours, GOAL_MEDIAN_MS, "#777")
    axes.text(GOAL_MEDIAN_MS, -0.9, " goal", color="#777", fontsize=8)
    axes.set_xlabel("added time per call, ms (median; whiskers: extreme blocks)")
    axes.invert_yaxis()
    plot.open_axes(axes)
    plot.save(figure, path)
    print(f"drawn: {path.relative_to(ROOT)}")


class OtherSDK(openai.OpenAI):
    """An SDK of the same make whose chat completions have no faster way in."""

    request = openai.OpenAI.request


class AsyncOtherSDK(openai.AsyncOpenAI):
    """``OtherSDK`` for a running loop."""

    request = openai.AsyncOpenAI.request


OTHER = Client("other", __name__, ("OtherSDK.request", "AsyncOtherSDK.request"), "stainless", ("chat",))


def other_model(plain: dict[str, Any]) -> ChatOpenAI:
    """Return a ChatOpenAI that calls by the other SDK."""
    made = {"base_url": plain["base_url"], "api_key": plain["api_key"]}
    sync, asynchronous = OtherSDK(**made, timeout=None), AsyncOtherSDK(**made, timeout=None)
    return ChatOpenAI(
        model=plain["model"],
        root_client=sync,
        client=sync.chat.completions,
        root_async_client=asynchronous,
        async_client=asynchronous.chat.completions,
    )


async def clients(arms: list[Arm], blocks: int, quick: bool) -> None:
    """Measure other clients' calls, and print their addition as a ratio to that of chat completions."""
    await measure(arms, blocks, quick, alone_only=True)
    rows = figures(arms)
    print(report_cpu(rows))
    by_form: dict[str, dict[str, Figure]] = {}
    for row in rows:
        by_form.setdefault(row.form, {})[row.arm] = row
    for form, found in by_form.items():
        chat, other = found["wrapped"].added_cpu_ms, found["other SDK"].added_cpu_ms
        ratio = spread(ratios(other, chat)).shown()
        print(f"{form}: an SDK met at its HTTP client adds {ratio} of what chat completions add")


async def memory(arm: Arm, calls: int) -> None:
    """Make many calls through a wrapped graph and print what the process holds on the way."""
    process, held = psutil.Process(os.getpid()), []
    step = calls // 10
    for done in range(0, calls + 1, step):
        gc.collect()
        held.append(process.memory_info().rss / 2**20)
        print(f"  {done:>7} calls: {held[-1]:.1f} MiB", flush=True)
        if done < calls:
            for _ in range(step // 500):
                await arm.run("ainvoke", 500, None)
    later = held[2:]
    slope = (later[-1] - later[0]) / (len(later) - 1) / step * 1e5
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"memory from the third sample on: {slope:+.1f} MiB per 100,000 calls; peak {peak:.0f} MiB")


async def main() -> int:
    options = parser("overhead", __doc__)
    options.add_argument("--quick", action="store_true", help="smaller blocks, no memory run")
    options.add_argument("--blocks", type=count, default=None, help="blocks per arm and load (default 10, quick 6)")
    options.add_argument("--memory-calls", type=count, default=100_000, metavar="N")
    options.add_argument("--only-memory", action="store_true")
    options.add_argument(
        "--check", action="store_true", help=f"CPU time alone, at least {LEAST_BLOCKS} blocks; fails beyond the goal"
    )
    options.add_argument("--clients", action="store_true", help="CPU time of other clients' calls alone")
    options.add_argument("--draw", action="store_true", help="draw docs/overhead.svg")
    args = options.parse_args()
    with (
        stub("--text", ANSWER) as url,
        Orla([Backend("main", url, model="stub-model")], {"*": "main"}, keep_records=1000) as orla,
    ):
        plain = {"model": "stub-model", "base_url": url, "api_key": "any"}
        arms = [
            Arm("bare", ChatOpenAI(**plain), lambda graph: graph),
            Arm("wrapped", ChatOpenAI(**plain), orla.wrap),
            Arm("ChatOrla", ChatOrla(orla=orla, model="main"), lambda graph: graph),
        ]
        rows: list[Figure] = []
        if args.clients:
            patching.patch(OTHER, sys.modules[__name__])
            other = Arm("other SDK", other_model(plain), orla.wrap)
            await clients([*arms[:2], other], args.blocks or LEAST_BLOCKS, args.quick)
            return 0
        if args.check:
            await measure(arms[:2], max(LEAST_BLOCKS, args.blocks or 0), args.quick, alone_only=True)
            rows = figures(arms[:2])
            print(report_cpu(rows))
            print("\n".join(missed := beyond_goal(rows)) or "within the goal")
            return 1 if missed else 0
        if not args.only_memory:
            await measure(arms, args.blocks or (6 if args.quick else 10), args.quick)
            rows = figures(arms)
            print(report(rows))
            print()
            print(report_cpu(rows))
        if not args.quick:
            await memory(arms[1], args.memory_calls)
    if args.draw:
        draw(rows, ROOT / "docs" / "overhead.svg")
    goal = [row for row in rows if row.arm == "wrapped"]
    missed = [row for row in goal if row.median_ms > GOAL_MEDIAN_MS or row.added_p99_ms > GOAL_P99_MS]
    for row in missed:
        print(f"goal missed: {row.form}, {row.load}: {row.median_ms:.2f} ms, p99 {row.added_p99_ms:.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
